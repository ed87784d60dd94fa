"""scripts/bench_host.py: its table, at a size that costs nothing."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "bench_host", raising=False)
    return importlib.import_module("bench_host")


def test_a_row_for_each_size_and_what_is_after_the_read_is_part_of_the_step(script, monkeypatch):
    monkeypatch.setattr(script, "ROUNDS", 40)
    rows = [line for line in script.main(["--tensors", "3", "30"]).splitlines() if re.match(r"\| \d", line)]
    numbers = [[float(cell) for cell in row.strip("| ").split("|")] for row in rows]
    assert [row[0] for row in numbers] == [3, 30]
    for _, quiet, clips, both, step, torchs in numbers:
        assert 0 < quiet < step
        assert min(clips, both, torchs) > 0


def test_the_launches_are_those_of_a_step(script):
    """Nothing is written by a stub, and a step that clips makes as many launches as one that does not."""
    from hf_gradclip import optim

    with script.stubbed() as read:
        params = script.parameters(5)
        before = [p.detach().clone() for p in params]
        optimizer = optim.AdamW(params, lr=1.0, clip=script.SPEC)
        for _ in range(4):
            optimizer.step()
        assert len(read) == 4
        assert all((a == b).all() for a, b in zip(before, params, strict=True))
        assert float(optimizer.clipper.report.last.total) == pytest.approx(5**0.5)
