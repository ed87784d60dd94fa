"""fp16 with a loss scaler, and two optimizers for the gradients of one backward: each is stepped in true units."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import hf_gradclip

LIMIT = 0.02
SCALE = 2.0**10
STEPS = 6


@pytest.fixture(autouse=True)
def _fresh() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(clip: str | None, models: int, how: str, scale: float = SCALE) -> tuple[list[float], Accelerator]:
    """How far each of two layers moves in each step, by SGD with a rate of 1.

    Args:
        clip: of `attach`; None trains with Accelerate alone.
        models: 1, or 2 for a model and an optimizer each.
        how: "auto", "joint" (with auto), or "call" for a clip call before the steps.
        scale: of the loss, at first.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    accelerator.native_amp = True
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    if clip is not None:
        hf_gradclip.attach(accelerator, clip, auto=how != "call", joint=how == "joint")
    turns = [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in layers]
    given = [*layers] if models == 2 else [layers]
    *prepared, first, second = accelerator.prepare(*given, *turns)
    moved = []
    for step in range(STEPS):
        before = [torch.cat([p.detach().double().flatten() for p in layer.parameters()]) for layer in layers]
        x = torch.ones(8, 4) * (1 + step % 3)
        for model in prepared:
            x = model(x)
        accelerator.backward(x.float().square().mean() * 0.01)
        if how == "call":
            for model in prepared:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
        after = [torch.cat([p.detach().double().flatten() for p in layer.parameters()]) for layer in layers]
        moved += [float((b - a).norm()) for a, b in zip(before, after, strict=True)]
    return moved, accelerator


@pytest.mark.parametrize(("models", "how"), [(1, "auto"), (2, "auto"), (2, "joint"), (1, "call"), (2, "call")])
def test_both_move_as_with_accelerate_alone(models, how) -> None:
    """Which without a clip divides the gradients of each once, before its step."""
    stock, _ = run(None, models, "auto")
    ours, _ = run("none", models, how)
    assert ours == pytest.approx(stock, rel=1e-5)
    assert min(stock) > 1e-4


@pytest.mark.parametrize(("models", "how"), [(1, "auto"), (2, "auto"), (2, "joint"), (1, "call"), (2, "call")])
def test_both_are_clipped_in_true_units(models, how) -> None:
    moved, _ = run(f"global_norm:max_norm={LIMIT}", models, how)
    pairs = [(moved[i], moved[i + 1]) for i in range(0, len(moved), 2)]
    norms = [max(pair) if models == 2 and how != "joint" else (pair[0] ** 2 + pair[1] ** 2) ** 0.5 for pair in pairs]
    assert max(norms) == pytest.approx(LIMIT, rel=1e-3), "some steps clip"
    assert min(min(pair) for pair in pairs) > 1e-4, "and both layers move in each"


def test_overflows_are_left_out_and_the_scale_comes_down() -> None:
    moved, accelerator = run("none", 1, "auto", scale=2.0**126)
    assert moved[:2] == [0.0, 0.0]
    assert accelerator.scaler.get_scale() < 2.0**126
