"""The share of clipping in a step: what the script writes is what it measured, and its ratios are of these numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_shares_of_a_step(tmp_path) -> None:
    words = ["--clip", "zclip", "agc", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "scripts/bench_job.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("job_*.json")
    report = json.loads(written.read_text("utf-8"))
    assert [row["strategy"] for row in report["rows"]] == ["zclip", "agc"]
    for row in report["rows"]:
        assert row["steps"] == 2
        assert 0 < row["clipping_ms"] < row["step_ms"]
        assert row["clipping_share"] == pytest.approx(row["clipping_ms"] / row["step_ms"])
        assert row["recording_share"] == pytest.approx(row["recording_ms"] / row["step_ms"])
        assert f"| {row['strategy']} | 2 |" in done.stdout
    assert "4,212,992 parameters in 38 tensors" in report["job"]
    assert str(tmp_path) not in written.read_text("utf-8")
