"""Under `adaptive` the weights of adapters are limited by the whole norm alone, and so they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_gradclip import Clipper
from hf_gradclip.strategy import SpecError
from tests.tiny import tiny_llama

RATE = 10.0
ALONE = "agc:include_adapters=false"


def peft_lora(**settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **settings))


def loha() -> nn.Module:
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoHaConfig(r=2, target_modules=["q_proj"]))


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
def test_the_start_line_says_it(clip, caplog) -> None:
    assert "agc leaves alone 8 weights of adapters, all that is trained" in repr(Clipper.for_model(peft_lora(), clip))
    assert not caplog.messages, "the preset wants it so"
    both = Clipper.for_model(peft_lora(modules_to_save=["lm_head"]), clip)
    assert "agc leaves alone the head (base_model.model.lm_head" in repr(both)
    assert " and 8 weights of adapters, all that is trained" in repr(both)


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
    assert not math.isclose(losses[-1], free[-1], rel_tol=1e-3), "and does some where nothing clips"
    by_agc, _ = trained("agc")
    assert by_agc[0] - by_agc[30] < learnt / 20
