"""Under `adaptive` the weights of adapters are limited by the whole norm alone, and so they learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_gradclip import Clipper, optim
from hf_gradclip.exempt import exempt
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.adapters import adapters_of
from tests.tiny import tiny_llama

RATE = 10.0
ALONE = "agc:include_adapters=false"
HEAD = "base_model.model.lm_head"


def adapted(kind: str, adapter_name: str = "default", **settings: Any) -> nn.Module:
    """The tiny Llama with adapters of a kind of PEFT's."""
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), getattr(peft, kind)(**settings), adapter_name)


def peft_lora(**settings: Any) -> nn.Module:
    return adapted("LoraConfig", **{"r": 2, "target_modules": ["q_proj", "up_proj"], **settings})


def loha() -> nn.Module:
    return adapted("LoHaConfig", r=2, target_modules=["q_proj"])


class ByHand(nn.Module):
    """LoRA that was written without PEFT, beside a layer that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.body = nn.Linear(4, 4)


def loud(model: nn.Module, clip: str, size: float = 10.0) -> dict[str, float]:
    """By how much each gradient of `size` everywhere is scaled."""
    clipper = Clipper.for_model(model, clip)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.grad = torch.full_like(p, size)
    clipper.step()
    return {name: float(p.grad.abs().max()) / size for name, p in trained.items()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (peft_lora, ("lora_",)),
        (lambda: peft_lora(use_dora=True), ("lora_",)),
        (lambda: peft_lora(modules_to_save=["embed_tokens"]), ("lora_",)),
        (loha, ("hada_",)),
        (ByHand, ("lora_",)),
    ],
    ids=["LoRA", "DoRA", "LoRA and an embedding", "LoHa", "by hand"],
)
def test_adapters_are_left_alone_and_what_is_trained_whole_is_not(make: Callable[[], nn.Module], words) -> None:
    model = make()
    scales = loud(model, "adaptive")
    of_adapters = {name for name in scales if any(word in name for word in words)}
    assert of_adapters
    assert all(scales[name] == 1 for name in of_adapters)
    matrices = {name for name, p in model.named_parameters() if name in scales and p.ndim > 1} - of_adapters
    assert all(scales[name] < 0.1 for name in matrices)
    asked_for = loud(model, "agc")
    assert all(asked_for[name] < 0.1 for name in of_adapters if "vector" not in name)


@pytest.mark.parametrize("clip", ["adaptive", ALONE + "+value:max_value=100"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "8 weights of adapters, all that is trained"),
        (
            {"modules_to_save": ["lm_head"]},
            f"the head ({HEAD}.modules_to_save.default) and 8 weights of adapters, all that is trained",
        ),
        (
            {"modules_to_save": ["embed_tokens"]},
            "8 weights of adapters; it found no trained head, so it clips every other matrix",
        ),
        ({"target_modules": ["lm_head"]}, f"the head ({HEAD}), all that is trained"),
    ],
    ids=["adapters", "a head", "an embedding", "adapters of a head"],
)
def test_the_start_line_says_it(clip, settings, words, caplog) -> None:
    clipper = Clipper.for_model(peft_lora(**settings), clip)
    assert exempt(clipper.config.gradient, clipper.view) == f"agc leaves alone {words}"
    assert words in repr(clipper)
    assert not caplog.messages, "the preset wants it so"


def test_of_groups_it_says_whose() -> None:
    model = peft_lora(modules_to_save=["embed_tokens"])
    clipper = Clipper.for_model(model, "*lora_*=adaptive;*=adaptive")
    words = exempt(clipper.config.gradient, clipper.view)
    assert words == "agc leaves alone 8 weights of adapters, all of its group; agc leaves alone nothing"


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (lambda: peft_lora(target_modules=["lm_head"]), "include_head=true,include_adapters=true"),
        (lambda: adapted("VeraConfig", r=2, target_modules=["q_proj"]), "include_1d=true,include_adapters=true"),
        (peft_lora, "include_adapters=true"),
    ],
    ids=["of a head", "vectors", "matrices"],
)
def test_what_is_to_be_used_instead_starts(make, use) -> None:
    with pytest.raises(SpecError, match=f"Use {use} or adaptive_norm"):
        Clipper.for_model(make(), ALONE)
    assert min(loud(make(), f"agc:{use}").values()) < 0.1


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig"])
def test_names_alone_tell_the_usual_kinds(kind) -> None:
    """What an optimizer of ours and a Lightning module know."""
    model = adapted(kind, target_modules=["q_proj"], **({"oft_block_size": 4} if kind == "OFTConfig" else {"r": 2}))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert adapters_of(None, named) == adapters_of(model, named) == {name for name, _ in named}


def test_names_that_only_look_like_it() -> None:
    """An adapter's own name, in what it trains whole, and modules of other kinds."""
    model = peft_lora(modules_to_save=["embed_tokens"], adapter_name="lora_math")
    saved = [name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert saved
    assert all(loud(model, "adaptive")[name] < 0.1 for name in saved)
    other = nn.ModuleDict({"lora_model": ByHand().body, "floral_a": nn.Linear(4, 4)})
    other.adapter_layer_names = None
    assert all(scale < 0.1 for name, scale in loud(other, "adaptive").items() if "weight" in name)


def test_an_adapter_that_is_added_in_mid_run() -> None:
    model = peft_lora()
    clipper = Clipper.for_model(model, "adaptive")
    before = clipper.view.adapters
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = torch.full_like(p, 10.0)
    clipper.step()
    assert len(before) == len(clipper.view.adapters) == 8
    assert before.isdisjoint(clipper.view.adapters)
    assert all(float(p.grad.max()) == 10.0 for p in model.parameters() if p.requires_grad)


def test_an_optimizer_without_names_warns(caplog) -> None:
    model = peft_lora()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optim.SGD(trained, lr=1.0, clip="adaptive")
    assert not caplog.messages
    optim.SGD([p for _, p in trained], lr=1.0, clip="adaptive")
    assert "agc: the parameters came without names" in caplog.text
    assert len(caplog.messages) == 1


def test_a_checkpoint_of_agc_with_adapters_goes_on() -> None:
    """What `adaptive` was."""
    saved = Clipper.for_model(peft_lora(), "adaptive_norm+agc")
    for p in saved.view.watched():
        p.grad = torch.ones_like(p)
    saved.step()
    clipper = Clipper.for_model(peft_lora(), "adaptive")
    words = clipper.load_state_dict(saved.state_dict())
    assert "include_adapters=true; its statistics go on under" in words
    assert clipper.state_dict()["state"]["0.seen"] == 1


def test_alone_it_has_nothing_to_do() -> None:
    with pytest.raises(
        SpecError, match=r"left alone: 8 weights of adapters. Use include_adapters=true or adaptive_norm"
    ):
        Clipper.for_model(peft_lora(), ALONE)


def trained(clip: str | None, steps: int = 40) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of SGD on one batch, one of whose steps is loud, and the weights at the end."""
    model = peft_lora()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=RATE)
    clipper = None if clip is None else Clipper.for_model(model, clip)
    rows = torch.randint(1, 20, (4, 8), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(steps):
        loss = model(input_ids=rows, labels=rows).loss
        losses.append(float(loss.detach()))
        (loss * (1000.0 if step == 30 else 1.0)).backward()
        if clipper is not None:
            clipper.step()
        optimizer.step()
        optimizer.zero_grad()
    return losses, weights


def test_lora_learns_under_adaptive_as_under_the_rule_of_the_whole_norm() -> None:
    """With SGD, where a gradient of 1e-5, which is what `agc` leaves of one of B's, moves nothing."""
    losses, weights = trained("adaptive")
    same, others = trained("adaptive_norm")
    free, _ = trained(None)
    assert losses == same
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert losses[:30] == pytest.approx(free[:30], rel=1e-6), "sound steps are not touched"
    learnt = losses[0] - losses[30]
    assert learnt > 0.05
    assert losses[-1] < losses[30], "the loud step did no harm"
    assert free[-1] > losses[-1] + learnt / 2, "and does some where nothing clips"
    by_agc, _ = trained("agc")
    assert by_agc[0] - by_agc[30] < learnt / 20
