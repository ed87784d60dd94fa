"""A skipped step leaves no trace: weights, moments and counters, bit for bit, in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_gradclip import Clipper, optim
from tests.integrations.loops import batches
from tests.tiny import tiny_llama, weights_of

MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.01),
    "ours": lambda params: optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "ours, update clipped": lambda params: optim.AdamW(params, lr=1e-2, update_clip="block_rms:max_rms=0.5"),
}
SPEC = "zclip:warmup_steps=5,z_threshold=0.2,max_norm=0.7"


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    return [weights_of(model), *(value.clone() for value in tensors)]


@pytest.mark.parametrize("name", MAKE)
def test_a_skipped_step_moves_nothing(name) -> None:
    model = tiny_llama()
    optimizer, clipper = MAKE[name](model.parameters()), Clipper.for_model(model, SPEC)
    moved = []
    for batch, factor in batches(6, poison=(3,)):
        before = snapshot(model, optimizer)
        (model(**batch).loss * factor).backward()
        clipper.step()
        optimizer.step()
        optimizer.zero_grad()
        after = snapshot(model, optimizer)
        moved.append(len(before) != len(after) or not all(map(torch.equal, before, after)))
    assert moved == [True, True, True, False, True, True]
    assert len(before) > 1, "there are moments and counters to compare"


@pytest.mark.parametrize("name", MAKE)
def test_bad_batches_leave_no_trace(name) -> None:
    """50 batches of which 3 are NaN, against the 47 others, at a constant learning rate."""
    bad, runs = (12, 25, 40), []
    for seen in (True, False):
        model = tiny_llama()
        optimizer, clipper = MAKE[name](model.parameters()), Clipper.for_model(model, SPEC)
        for i, (batch, factor) in enumerate(batches(50, poison=bad)):
            if i in bad and not seen:
                continue
            (model(**batch).loss * factor).backward()
            clipper.step()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((snapshot(model, optimizer), clipper.report.summary()))
    (weights, counts), (expected, others) = runs
    assert all(map(torch.equal, weights, expected))
    assert counts["skipped"] == counts["nonfinite"] == 3
    assert 0 < counts["clipped"] == others["clipped"] < 47
