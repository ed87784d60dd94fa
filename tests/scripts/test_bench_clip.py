"""scripts/bench_clip.py at a size that takes a second: its rows, its ratios, its files. No test looks at a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_clip", ROOT / "scripts" / "bench_clip.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_clip"] = module
    spec.loader.exec_module(module)
    return module


def test_rows_ratios_and_files(bench, tmp_path) -> None:
    threads = torch.get_num_threads()
    found = bench.main(["--workload", "tiny", "--repeats", "3", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert set(found) == {"tiny float32", "tiny bfloat16"}
    (written,) = tmp_path.glob("clip_*.json")
    kept = json.loads(written.read_text("utf-8"))["results"]["tiny float32"]
    at = {(row["name"], row["case"]): row["median_ms"] for row in kept}
    assert len(at) == len(kept) == 15
    for row in kept:
        assert row["times_read"] == pytest.approx(row["median_ms"] / at["read one flat buffer", "nothing clips"])
        peer = "torch, inf norm" if "inf norm" in row["name"] else "torch clip_grad_norm_, foreach=True"
        case = "nothing clips" if "inf norm" in row["name"] else row["case"]
        assert row["times_torch"] == pytest.approx(at[peer, case] / row["median_ms"])
    text = written.with_suffix(".md").read_text("utf-8")
    assert all(f"| {name} | " in text for name, _ in at)
    assert "Relative error of the total norm: ours" in text


def test_the_rows_do_what_they_say(bench) -> None:
    """Where nothing clips no gradient changes; where it does the norm is halved."""
    model = bench.model_of(bench.WORKLOADS["tiny"](), torch.float32, torch.device("cpu"))
    flat = torch.ones(10)
    for row in bench.rows_of(model, flat):
        row.before()
        before = [p.grad.clone() for p in model.parameters()]
        row.run()
        same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
        if row.kind != "ceiling":
            assert same == (row.case == "nothing clips"), row.name
        if row.case == "clips" and row.kind != "ceiling":
            ratios = [float(p.grad.norm() / g.norm()) for p, g in zip(model.parameters(), before, strict=True)]
            assert ratios == pytest.approx([0.5] * len(before), rel=1e-4), row.name
