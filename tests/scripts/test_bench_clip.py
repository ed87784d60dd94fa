"""The benchmarks at a size of seconds: every row is there, ratios are of the medians, and what clips did clip."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
READ = "read: sum of one flat buffer"
CEILINGS = [
    READ,
    "read + multiply in place, flat buffer",
    "copy of a flat buffer",
    "two reads, then multiply in place",
]
OURS = {
    "clip": [
        "clipper.step() global_norm",
        "clipper.step() global_norm:norm_type=inf",
        "clipper.step() zclip",
        "clipper.step() adagc",
        "clipper.step() agc",
        "clipper.step() adaptive_norm+agc",
        "hf_gradclip.clip_grad_norm_",
        "hf_gradclip.clip_grad_norm_, inf",
    ],
    "step": [
        "clipper.step() + fused AdamW",
        "clipper.step() fold=True + fused AdamW",
        "hf_gradclip.optim.AdamW clip",
        "hf_gradclip.optim.AdamW clip, update_clip=block_rms",
    ],
}
PEERS = {
    "clip": [
        "torch clip_grad_norm_ foreach=True",
        "torch clip_grad_norm_ foreach=False",
        "torch clip_grad_norm_ foreach=True, inf",
        "torch clip_grad_norm_ foreach=False, inf",
        "torch get_total_norm + clip_grads_with_norm_",
        "ZClip algorithm as a per-tensor loop",
        "AdaGC algorithm as a per-tensor loop",
        "ZeRO-1/2 norm and clip as a per-tensor loop",
        "timm adaptive_clip_grad",
        "pytorch_optimizer agc, per tensor",
        "deepspeed clip_tensors_by_global_norm",
        "apex.contrib clip_grad_norm_",
        "TransformerEngine multi_tensor_l2norm + scale",
    ],
    "step": [
        "torch fused AdamW, no clip",
        "torch clip_grad_norm_ + fused AdamW",
        "torch clip_grad_norm_ + foreach AdamW",
    ],
}
ROWS = {theme: [*CEILINGS, *OURS[theme], *(f"{row} [eager]" for row in OURS[theme]), *PEERS[theme]] for theme in OURS}
BASELINE = {"clip": "torch clip_grad_norm_ foreach=True", "step": "torch clip_grad_norm_ + fused AdamW"}


@pytest.fixture(scope="module", params=["clip", "step"])
def written(request, tmp_path_factory) -> tuple[str, dict, str]:
    """The theme, the JSON and the Markdown of a run."""
    folder = tmp_path_factory.mktemp("benchmarks")
    script = f"scripts/bench_{request.param}.py"
    command = [sys.executable, script, "--tiny", "--repeats", "2", "--dtype", "fp32", "bf16", "--out", str(folder)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.suffix: path for path in folder.iterdir()}
    assert set(files) == {".json", ".md"}
    assert all(path.name.startswith(f"{request.param}_cpu-") for path in files.values())
    return request.param, json.loads(files[".json"].read_text()), files[".md"].read_text()


def test_every_row_is_there_and_measured_or_says_why_not(written) -> None:
    theme, report, markdown = written
    assert [(table["dtype"], table["case"]) for table in report["tables"]] == [
        (dtype, case) for dtype in ("fp32", "bf16") for case in ("nothing clips", "clips")
    ]
    for table in report["tables"]:
        assert sorted(row["row"] for row in table["rows"]) == sorted(ROWS[theme])
        for row in table["rows"]:
            assert f"| {row['row']} " in markdown
            assert row["kind"] in ("kernel", "whole step")
            if row["median_ms"] is None:
                assert row["group"] == "peer"
                assert row["note"] == "not installed" or "cannot be loaded" in row["note"]
            else:
                low, high = row["quartiles_ms"]
                assert 0 < low <= row["median_ms"] <= high


def test_the_ratios_are_of_the_medians(written) -> None:
    theme, report, _ = written
    for table in report["tables"]:
        medians = {row["row"]: row["median_ms"] for row in table["rows"] if row["median_ms"] is not None}
        for row in table["rows"]:
            if row["median_ms"] is not None:
                assert row["times_torch"] == pytest.approx(medians[BASELINE[theme]] / medians[row["row"]])
                assert row["per_read"] == pytest.approx(medians[row["row"]] / medians[READ])
            if row["task"] == "inf":
                inf = medians["torch clip_grad_norm_ foreach=True, inf"]
                assert row["times_peer"] == pytest.approx(inf / medians[row["row"]])


def test_what_should_clip_did_and_the_rest_did_not(written) -> None:
    _, report, _ = written
    for table in report["tables"]:
        seen = [row for row in table["rows"] if row["kept"] is not None]
        assert len(seen) >= 5
        for row in seen:
            if table["case"] == "nothing clips":
                assert row["kept"] == pytest.approx(1, abs=1e-6), row["row"]
            elif row["task"] in ("agc", "adaptive"):
                assert 0 < row["kept"] < 0.01, row["row"]
            else:
                assert row["kept"] == pytest.approx(0.1, rel=0.05), row["row"]


def test_norms_are_compared_with_float64(written) -> None:
    _, report, _ = written
    for table in report["tables"]:
        errors = {row["row"]: row["norm_error"] for row in table["rows"] if row["norm_error"] is not None}
        assert len(errors) >= 4
        assert all(math.isfinite(error) and error < 1e-2 for error in errors.values())
        ours = [error for name, error in errors.items() if name.startswith(("clipper", "hf_gradclip"))]
        assert max(ours) < 1e-6


def test_the_circumstances_are_said_and_no_folder(written, tmp_path) -> None:
    theme, report, markdown = written
    assert report["versions"]["torch"] in markdown
    assert report["command"].startswith(f"python scripts/bench_{theme}.py --tiny")
    assert report["threads"] == 1
    assert report["clock"] == "time.thread_time"
    for text in (markdown, json.dumps(report)):
        assert str(ROOT) not in text
        assert str(tmp_path.parent) not in text
        assert str(Path.home()) not in text


@pytest.mark.parametrize(("word", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_one_that_torch_can_be_set_to(word, index, monkeypatch) -> None:
    """`torch.cuda.set_device` takes no device without a number."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    benchmark = importlib.import_module("benchmark")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert benchmark.device_of(word) == torch.device("cuda", index)
    assert benchmark.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=rf"--device {word}: torch sees no GPU here"):
        benchmark.device_of(word)
