"""The share of clipping in a step: what the script writes is what it measured, and its ratios are of these numbers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_shares_of_a_step(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script, threads = importlib.import_module("bench_job"), torch.get_num_threads()
    parse = script.parse
    monkeypatch.setattr(script, "parse", lambda words: parse([*words, "--max_text_bytes", "500000"]))
    script.main(["--clip", "zclip", "agc", "--steps", "2", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    (written,) = tmp_path.glob("job_*.json")
    report = json.loads(written.read_text("utf-8"))
    assert [row["strategy"] for row in report["rows"]] == ["zclip", "agc"]
    for row in report["rows"]:
        assert row["steps"] == 2
        assert 0 < row["clipping_ms"] < row["step_ms"]
        assert row["clipping_share"] == pytest.approx(row["clipping_ms"] / row["step_ms"])
        assert row["recording_share"] == pytest.approx(row["recording_ms"] / row["step_ms"])
        assert f"| {row['strategy']} | 2 |" in printed
    assert report["job"] == "4,212,992 parameters in 38 tensors, batches of 8 x 128"
    assert str(tmp_path) not in written.read_text("utf-8")
