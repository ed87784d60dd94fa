"""A layout is of the parameters that are trained: a look sees every change of them, and none where there is none."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import Clipper
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.views import View, view_of
from tests.tiny import tiny_llama

MAX_NORM = 0.5


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def norm_of(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))


class TestChanges:
    """Whatever is put into the model or taken out of it after the start, the next step measures what is in it then."""

    def added_module(self, model: nn.Sequential) -> None:
        model.append(nn.Linear(2, 2))

    def added_deep_inside(self, model: nn.Sequential) -> None:
        model[0].adapter = nn.Sequential(nn.Linear(2, 3))

    def added_parameter(self, model: nn.Sequential) -> None:
        model[0].register_parameter("gain", nn.Parameter(torch.ones(3)))

    def replaced(self, model: nn.Sequential) -> None:
        model[1] = nn.Linear(3, 2)

    def replaced_parameter(self, model: nn.Sequential) -> None:
        model[0].weight = nn.Parameter(torch.ones(5, 2))

    def inserted(self, model: nn.Sequential) -> None:
        model.insert(1, nn.Linear(3, 3))

    def inserted_first(self, model: nn.Sequential) -> None:
        model.insert(0, nn.Linear(2, 2))

    def assigned_unseen(self, model: nn.Sequential) -> None:
        model._modules["1"] = nn.Linear(3, 2)

    def parameter_assigned_unseen(self, model: nn.Sequential) -> None:
        model[0]._parameters["weight"] = nn.Parameter(torch.ones(5, 2))

    def added_to_a_list_in_front(self, model: nn.Sequential) -> None:
        model[0].adapters.insert(0, nn.Linear(2, 2))

    def converted(self, model: nn.Sequential) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.double()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)

    def removed(self, model: nn.Sequential) -> None:
        del model[1]

    def added_frozen_and_unfrozen(self, model: nn.Sequential) -> None:
        model.append(nn.Linear(2, 2).requires_grad_(False))
        Clipper.for_model(model, "none").step()  # somebody else looks in between
        model[-1].requires_grad_(True)

    @pytest.mark.parametrize(
        "change",
        ["added_module", "added_deep_inside", "added_parameter", "replaced", "replaced_parameter",
         "inserted", "inserted_first", "assigned_unseen", "parameter_assigned_unseen", "added_to_a_list_in_front",
         "converted", "removed", "added_frozen_and_unfrozen"],
    )  # fmt: skip
    @pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
    def test_they_are_clipped(self, change, wrap, caplog):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        model[0].adapters = nn.ModuleList([nn.Linear(2, 2)])
        clipper = Clipper.for_model(wrap(model), f"global_norm:max_norm={MAX_NORM}")
        for _ in range(2):
            for p in model.parameters():
                p.grad = random(*p.shape, dtype=p.dtype)
            clipper.step()
        assert not caplog.messages
        getattr(self, change)(model)
        for p in model.parameters():
            p.grad = random(*p.shape, dtype=p.dtype)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert float(clipper.step()) == pytest.approx(norm, rel=1e-6)
        after = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert after == pytest.approx(MAX_NORM, rel=1e-5)
        assert "trainable parameters changed" in caplog.text

    def test_the_statistics_stay_where_another_model_or_a_frozen_part_changes(self, caplog):
        model, other = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
        clipper = Clipper.for_model(model, "zclip")
        for step in range(4):
            for p in model.parameters():
                p.grad = random(*p.shape, dtype=p.dtype)
            clipper.step()
            other.append(nn.Linear(3, 3))
            if step == 1:
                model.append(nn.Linear(3, 3).requires_grad_(False))
        assert int(clipper.state.seen) == 4
        assert not caplog.messages

    def test_a_copy_notices_too(self):
        model = nn.Sequential(nn.Linear(2, 3))
        model, clipper = copy.deepcopy((model, Clipper.for_model(model, "none")))
        model.append(nn.Linear(3, 3))
        for p in model.parameters():
            p.grad = random(*p.shape, dtype=p.dtype)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert float(clipper.step()) == pytest.approx(norm, rel=1e-6)

    def test_a_module_of_another_kind_of_equality_is_left_alone(self):
        """Its hash is of what it does not have before it is built."""

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(2, 2)
                self.name = "a"

            def __hash__(self) -> int:
                return hash(self.name)

        Clipper.for_model(nn.Linear(2, 2), "none")
        assert hash(Named()) == hash("a")

    def test_a_forward_that_makes_containers_costs_no_walk(self, monkeypatch):
        """That of Llama slices its list of layers, which registers each in another list."""
        model = tiny_llama()
        clipper = Clipper.for_model(model, "none")
        batch = torch.arange(12).view(2, 6)
        for step in range(3):
            model(input_ids=batch, labels=batch).loss.backward()
            clipper.step()
            if step == 0:
                for walk in ("parameters", "named_parameters", "modules"):
                    monkeypatch.setattr(model, walk, lambda *_: pytest.fail("walked through the model"))

    def test_a_frozen_part_that_is_replaced_is_let_go(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3).requires_grad_(False))
        clipper = Clipper.for_model(model, "none")
        gone = weakref.ref(model[1].weight)
        for _ in range(3):
            model[1] = nn.Linear(3, 3).requires_grad_(False)
            clipper.step()
        assert gone() is None

    def test_a_compiled_forward_is_not_compiled_again(self):
        layer, compiled = nn.Linear(2, 2), []
        view_of(layer).measure(Needs())

        def forward(x):
            return nn.Sequential(layer, nn.ReLU())(x)

        def count(graph, inputs):
            compiled.append(graph)
            return graph.forward

        torch.compiler.reset()
        run = torch.compile(forward, backend=count)
        for _ in range(5):
            run(random(3, 2))
            nn.Sequential(nn.Linear(2, 2))
        assert len(compiled) == 1

    def test_an_adapter_of_peft(self):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(4, 4))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(inner, config)
        clipper = Clipper.for_model(model, f"global_norm:max_norm={MAX_NORM}")
        model(random(3, 4)).square().sum().backward()
        clipper.step()
        model.zero_grad()
        model.add_adapter("other", config)
        model.set_adapter("other")
        (100 * model(random(3, 4))).square().sum().backward()
        trained = [p for name, p in model.named_parameters() if "other" in name]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trained))
        assert norm > MAX_NORM
        assert float(clipper.step()) == pytest.approx(norm, rel=1e-6)


class TestResized:
    """A parameter that gets other memory in its place, as resize_token_embeddings gives it (the object stays)."""

    def measured(self, view: View, model: nn.Module) -> list[float]:
        """The norm of every parameter, after fresh gradients."""
        for p in model.parameters():
            p.grad = 10 * random(*p.shape)
        stats = view.measure(Needs())
        assert stats.layout is view.layout
        return stats.by_param.norm_S.tolist()

    @pytest.mark.parametrize("units", [None, Units(), Units(vectors=True, head=True)], ids=["whole", "units", "all"])
    @pytest.mark.parametrize("rows", [1, 3, 12, 4000])
    @pytest.mark.parametrize("named", [False, True], ids=["model", "named"])
    def test_grown_and_shrunk(self, units, rows, named):
        model = nn.ModuleDict({"tokens": nn.Embedding(10, 6), "out": nn.Linear(6, 5)})
        view = view_of(list(model.named_parameters()) if named else model)
        if units is not None:
            view.divide(units)
        known = view.layout
        assert view.layout is known
        for size in (10, rows, 10):
            if size != model.tokens.weight.shape[0]:
                model.tokens.weight.data = torch.zeros(size, 6)
                assert view.layout is not known
                assert view.layout.by_param.numel_S.tolist() == [6 * size, 30, 5]
            norms = self.measured(view, model)
            assert norms == pytest.approx([float(p.grad.norm()) for p in model.parameters()], rel=1e-5)
            known = view.layout

    def test_another_shape_of_as_many_elements_has_other_units(self):
        layer = nn.Linear(6, 4, bias=False)
        view = view_of(layer)
        known = view.layout
        layer.weight.data = torch.zeros(6, 4)
        assert view.layout is known, "the same segment of the same size"
        view.divide(Units())
        layer.weight.data = torch.zeros(4, 6)
        layer.weight.grad = random(4, 6)
        assert view.measure(Needs()).norm_S.tolist() == pytest.approx(layer.weight.grad.norm(dim=1).tolist(), rel=1e-5)

    @pytest.mark.parametrize("size", [40, 80, 900])
    @pytest.mark.parametrize("spec", ["agc:clip_factor=0.01", "block_rms:max_rms=0.01", "global_norm:max_norm=0.1"])
    def test_a_language_model(self, size, spec, caplog):
        """What is clipped after the change is what a clipper of the resized model clips."""
        model, batch = tiny_llama(), torch.arange(12).view(2, 6)
        clipper = Clipper.for_model(model, spec)
        for step in range(2):
            model(input_ids=batch, labels=batch).loss.backward()
            if step == 1:
                grads = [p.grad.clone() for p in model.parameters()]
                norm = norm_of(model)
                assert float(clipper.step()) == pytest.approx(norm, rel=1e-5)
                clipped = [p.grad.clone() for p in model.parameters()]
                assert any(not torch.equal(a, b) for a, b in zip(clipped, grads, strict=True))
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p.grad = grad
                Clipper.for_model(model, spec).step()
                assert all(torch.equal(p.grad, c) for p, c in zip(model.parameters(), clipped, strict=True))
                return
            clipper.step()
            model.zero_grad()
            assert not caplog.messages
            model.resize_token_embeddings(size)

    def test_moved_to_another_device(self):
        layer = nn.Linear(3, 2)
        view = view_of(layer)
        layer.to("meta")
        assert view.layout.device.type == "meta"


def test_a_layer_that_is_taken_out_between_backward_and_zero_grad_counts_no_more():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    clipper = Clipper.for_model(model, "none")
    for p in model.parameters():
        p.grad = 100 * random(*p.shape)
    clipper.step()
    del model[1]
    for _ in range(2):
        assert float(clipper.step()) == pytest.approx(norm_of(model), rel=1e-6)
