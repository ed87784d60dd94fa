"""The scripts that measure this package itself run, and print what they measured. No time is asserted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def printed(script: str, *words: str) -> str:
    command = [sys.executable, f"scripts/{script}.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bench_fixed() -> None:
    """Its first rounds insist that rows clip where they should."""
    text = printed("bench_fixed", "--tensors", "3", "--size", "4", "--rounds", "3")
    assert len(re.findall(r"^\| (?:nothing clips|clips) +\|", text, re.MULTILINE)) == 8


def test_bench_against_itself() -> None:
    """Two processes of the same checkout; every row of ours is there."""
    words = ["--script", "clip", "step", "--workload", "tiny", "--dtype", "fp32", "--pairs", "3"]
    lines = printed("bench_against", str(ROOT), *words).splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    assert len(rows) == 2 * (7 + 4)
    assert {"clipper.step() agc", "hf_gradclip.optim.AdamW clip"} <= {row[1] for row in rows}
    for _, _, ours, other, ratio, _ in rows:
        assert min(float(ours), float(other), float(ratio)) > 0


def test_profile_step() -> None:
    """A step of the optimizers of this package: every function that it lists is there."""
    text = printed("profile_step", "--step", "fused", "--names")
    counts = re.search(r"\| fused +\| nothing clips +\| (\d+) +\| (\d+) +\| (\d+) +\| (\d+)", text)
    assert counts is not None
    listed = re.findall(r"^ +(\d+) +\d+ +\d+  (\S+\.py):(\S+)$", text, re.MULTILINE)
    assert sum(int(calls) for calls, _, _ in listed) == int(counts[1])
    assert {"clipper.py", "optim/step.py", "kernels/c/step.py"} <= {file for _, file, _ in listed}
    assert all((ROOT / "hf_gradclip" / file).is_file() for _, file, _ in listed)
