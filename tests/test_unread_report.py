"""A report that nobody reads: the same numbers, in memory of one size."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from hf_gradclip.tally import MOST_KEPT, Norms

STEPS = 40
SPECS = (
    "global_norm:max_norm=2",
    "zclip:warmup_steps=3,max_norm=2",
    "value:max_value=1",
    "skip_step",
    "a*=none;b=soft:max_norm=1",
)


def run(spec: str, most: int, monkeypatch, **settings: object) -> list[dict[str, float]]:
    """What is read after 25 and after 40 steps, of which some are NaN, loud, or all zero; and of the run."""
    monkeypatch.setattr("hf_gradclip.report.MOST_UNREAD", most)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(3)) for name in ("a", "b")})
    clipper = Clipper.for_model(model, spec, **settings)
    found, rng = [], random.Random(0)
    for step in range(STEPS):
        size = {7: float("nan"), 19: 1e3, 26: float("inf")}.get(step, 0.0 if step % 9 == 8 else rng.uniform(0.1, 4))
        for p in model.values():
            p.grad = torch.full_like(p, size)
        clipper.step()
        if step in (24, STEPS - 1):
            found.append(clipper.report.scalars())
    return [*found, clipper.report.summary()]


@pytest.mark.parametrize("settings", [{}, {"nonfinite": "pass"}])
@pytest.mark.parametrize("spec", SPECS)
def test_what_was_taken_in_before_is_in_the_next_read(spec, settings, monkeypatch) -> None:
    often, never = run(spec, 3, monkeypatch, **settings), run(spec, 10**9, monkeypatch, **settings)
    for a, b in zip(often, never, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-12)
    assert never[0]["clip/nonfinite"] == never[1]["clip/nonfinite"] == 1
    assert never[2]["steps"] == STEPS


def test_the_median_of_a_long_run() -> None:
    """Exact at first; then of every second, fourth ... norm, which for norms in no order is within two per cent."""
    norms, rng = Norms(), np.random.default_rng(0)
    numbers = rng.lognormal(0, 0.5, 50_000).tolist()
    norms.add(numbers[:MOST_KEPT])
    assert norms.median() == np.median(numbers[:MOST_KEPT])
    size = len(norms._kept)
    for i in range(MOST_KEPT, len(numbers), 1000):
        norms.add(numbers[i : i + 1000])
    assert norms.median() == pytest.approx(np.median(numbers), rel=0.02)
    assert norms.largest == max(numbers)
    assert list(norms.last) == numbers[-10:]
    assert MOST_KEPT // 2 <= len(norms._kept) <= size
    assert norms._kept == numbers[:: norms._every]


def test_nothing_grows_where_nobody_asks(monkeypatch) -> None:
    monkeypatch.setattr("hf_gradclip.report.MOST_UNREAD", 50)
    monkeypatch.setattr("hf_gradclip.tally.MOST_KEPT", 64)
    model = torch.nn.Linear(2, 2)
    clipper = Clipper.for_model(model, "adaptive")
    sizes = []
    for step in range(600):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 + step % 3)
        clipper.step()
        if step % 50 == 25:
            report = clipper.report
            lists = [*vars(report).values(), report._tally.norms._kept]
            sizes.append(sum(len(value) for value in lists if isinstance(value, list)))
    assert max(sizes[1:]) <= 25 * 3 + 64
    assert clipper.report.summary()["steps"] == 600


def test_a_report_that_moves_loses_no_step() -> None:
    """To another dtype, as to another device: what was counted before is in the next read, once."""
    found = []
    for moves in (False, True):
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(3)) for name in ("a", "b")})
        clipper = Clipper.for_model(model, "a*=none;b=soft:max_norm=1")
        for size in (0.1, 3.0, float("nan"), 0.2):
            for p in model.values():
                p.grad = torch.full_like(p, size)
            clipper.step()
            if moves and size == 3.0:
                clipper.report.move_to(torch.device("cpu"), torch.float32)
        found.append([clipper.report.scalars(), clipper.report.scalars(), clipper.report.summary()])
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][0]["clip/nonfinite"] == 1
    assert found[1][1] == {}
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-6)
