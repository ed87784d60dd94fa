"""The scripts that measure this package itself run, and print what they measured. No time is asserted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints, given the words of a command line."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def printed(script: str, *words: str) -> str:
        threads = torch.get_num_threads()
        importlib.import_module(script).main(words)
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return printed


def test_bench_fixed(printed) -> None:
    """Its first rounds insist that rows clip where they should."""
    text = printed("bench_fixed", "--tensors", "3", "--size", "4", "--rounds", "3")
    assert len(re.findall(r"^\| (?:nothing clips|clips) +\|", text, re.MULTILINE)) == 8


def test_bench_against_itself(printed) -> None:
    """Two processes of the same checkout; every row of ours is there."""
    words = ["--script", "clip", "step", "--workload", "tiny", "--dtype", "fp32", "--pairs", "3"]
    lines = printed("bench_against", str(ROOT), *words).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    assert len(rows) == 2 * (8 + 4)
    assert {"clipper.step() agc", "hf_gradclip.optim.AdamW clip"} <= {row[1] for row in rows}
    for _, _, ours, other, ratio, _ in rows:
        assert min(float(ours), float(other), float(ratio)) > 0


def test_profile_step(printed) -> None:
    """A step of the optimizers of this package: every function that it lists is there."""
    text = printed("profile_step", "--step", "fused", "--names")
    counts = re.search(r"\| fused +\| nothing clips +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+)", text)
    assert counts is not None
    listed = re.findall(r"^ +(\d+) +\d+ +\d+  (\S+\.py):(\S+)$", text, re.MULTILINE)
    assert sum(int(calls) for calls, _, _ in listed) == int(counts[1])
    assert {"clipper.py", "optim/step.py", "kernels/c/step.py"} <= {file for _, file, _ in listed}
    assert all((ROOT / "hf_gradclip" / file).is_file() for _, file, _ in listed)
