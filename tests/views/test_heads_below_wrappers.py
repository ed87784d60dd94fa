"""The heads of a model are found below whatever holds it: a module, DDP, torch.compile, PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_gradclip import Clipper
from tests.views.models import ALL, Model, large, left_alone, mlp, same


class Wrapped(nn.Module):
    """As a person writes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()


class Network(nn.Module):
    """Under a name of its own, with a frozen teacher and trained numbers beside it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.log_sigma = nn.Parameter(torch.zeros(2))


@pytest.fixture
def alone() -> Iterator[None]:
    """The one process of a group."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "self.model": (Wrapped, "model."),
    "by another name": (Network, "network."),
    "twice": (lambda model: Wrapped(Network(model)), "model.network."),
    "DDP inside": (lambda model: Wrapped(DistributedDataParallel(model)), "model.module."),
    "DDP": (lambda model: DistributedDataParallel(Wrapped(model)), "module.model."),
    "compiled inside": (lambda model: Wrapped(torch.compile(model)), "model._orig_mod."),
    "beside a trained loss": (lambda model: Model("criterion", model=model), "model."),
}


@pytest.mark.parametrize(
    ("make", "head"),
    [(lambda: Model("conv1", "layer1.0.fc", "fc"), "fc"), (lambda: Model("conv1", head=mlp(0, 2)), "head.2")],
    ids=["one layer", "a Sequential"],
)
@pytest.mark.parametrize(("wrap", "prefix"), WRAPPERS.values(), ids=WRAPPERS)
def test_below_a_wrapper(alone, make, head, wrap, prefix) -> None:
    model = wrap(make())
    assert left_alone(model) == [prefix + head]
    said = prefix.removeprefix("module.").replace("_orig_mod.", "")
    assert f"the head ({said}{head})" in repr(Clipper.for_model(model, "agc"))


class TestPeft:
    def adapted(self, **settings: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = Model("body", "fc")
        model.config = {}
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))

    def test_a_head_that_is_trained_whole(self) -> None:
        model = self.adapted(target_modules=["body"], modules_to_save=["fc"])
        assert left_alone(model) == ["base_model.model.fc.modules_to_save.default"]

    def test_it_is_that_of_the_adapter_in_use(self) -> None:
        model = self.adapted(target_modules=["body"], modules_to_save=["fc"])
        model.add_adapter("other", model.peft_config["default"])
        model.set_adapter("default")
        assert left_alone(model) == ["base_model.model.fc.modules_to_save.default"]

    def test_adapters_of_a_head(self) -> None:
        model = self.adapted(target_modules=["body", "fc"])
        assert left_alone(model) == [f"base_model.model.fc.lora_{word}.default" for word in "AB"]


def test_a_layer_that_is_unfrozen_later_changes_no_head() -> None:
    model = Wrapped(Model("body", "fc"))
    model.model.body.requires_grad_(False)
    model.model.register_parameter("scale", nn.Parameter(torch.zeros(4, 4)))
    clipper = Clipper.for_model(model, ALL)
    model.model.body.requires_grad_(True)
    large(model)
    clipper.step()
    assert same(model) == ["model.fc"]
