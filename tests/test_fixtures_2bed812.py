"""What commit 2bed812 saved still loads, and goes on with the numbers that it had itself.

The files are in tests/fixtures/2bed812; tests/fixtures/make.py, which made them with that commit, says how.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_gradclip.cli import main
from hf_gradclip.record.files import read_record
from tests.fixtures.make import (
    CLIPPERS,
    COMMIT,
    GO_ON,
    TAKEN,
    TRAINER_STEPS,
    columns,
    go_on_clipping,
    go_on_optimizing,
    go_on_training,
    load,
)

FOLDER = Path(__file__).parent / "fixtures" / COMMIT
RECORD = FOLDER / "trainer"
CLOSE, CLOSE_IN_FLOAT64 = 1e-6, 1e-12
# an update that is recovered from float32 weights has their rounding, divided by the learning rate
CLOSE_IF_RECOVERED = 1e-5

OPTIMIZERS = [tuple(word.split()) for word in load(FOLDER / "optim_next.pt")]


@pytest.fixture(params=["auto", "eager"])
def kernels(request: Any, monkeypatch: Any) -> str:
    """What computes: the compiled kernels where there are some, plain torch."""
    monkeypatch.setenv("HF_GRADCLIP_KERNELS", request.param)
    return request.param


def close(mine: Any, theirs: Any, what: str, relative: float = CLOSE) -> None:
    """Equal, to a share of the largest number; NaN where the other has NaN."""
    mine, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in (mine, theirs))
    largest = float(theirs[theirs.isfinite()].abs().max()) if theirs.isfinite().any() else 0.0
    limits = {"rtol": relative, "atol": relative * largest, "equal_nan": True}
    torch.testing.assert_close(mine, theirs, **limits, msg=lambda text: f"{what}: {text}")


def rows_close(mine: list[dict[str, float]], theirs: list[dict[str, float]], relative: float = CLOSE) -> None:
    """The report of each step: the same keys, the same numbers."""
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for step, (row, other) in enumerate(zip(mine, theirs, strict=True)):
        for key, value in other.items():
            tolerance = max(relative, CLOSE_IF_RECOVERED) if key.startswith("clip_update") else relative
            close(row[key], value, f"{key} of step {step}", tolerance)


def states_close(mine: dict[str, Any], theirs: dict[str, Any], relative: float) -> None:
    """The state of a clip: the same keys, close numbers."""
    assert mine.keys() == theirs.keys()
    assert mine["names"] == theirs["names"]
    assert mine["spec"] == theirs["spec"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, value in theirs["state"].items():
        close(mine["state"][key], value, key, relative)


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_clipper_goes_on_bit_for_bit_in_float64(name: str) -> None:
    theirs = load(FOLDER / "clippers_next.pt")[name]
    said, mine = go_on_clipping(CLIPPERS[name], load(FOLDER / "clippers" / f"{name}.pt"))
    assert said == ""
    assert mine["state"] == theirs["state"]
    assert mine["skipped"] == theirs["skipped"]
    assert torch.equal(mine["norms"], theirs["norms"])
    close(mine["grads"], theirs["grads"], "gradients after the clip", CLOSE_IN_FLOAT64)
    rows_close(mine["rows"], theirs["rows"], CLOSE_IN_FLOAT64)


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_clipper_goes_on_in_float32(name: str, kernels: str) -> None:
    """The made gradients are the same numbers there."""
    theirs = load(FOLDER / "clippers_next.pt")[name]
    _, mine = go_on_clipping(CLIPPERS[name], load(FOLDER / "clippers" / f"{name}.pt"), torch.float32)
    states_close(mine["state"], theirs["state"], CLOSE)
    assert mine["skipped"] == theirs["skipped"]
    close(mine["norms"], theirs["norms"], "norms")
    close(mine["grads"], theirs["grads"], "gradients after the clip")
    rows_close(mine["rows"], theirs["rows"])


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_clipper_without_the_state_goes_elsewhere(name: str) -> None:
    """The steps above depend on what was loaded."""
    theirs = load(FOLDER / "clippers_next.pt")[name]
    _, mine = go_on_clipping(CLIPPERS[name], None)
    assert mine["state"] != theirs["state"]
    assert mine["rows"] != theirs["rows"] or not torch.equal(mine["grads"], theirs["grads"])


def test_the_steps_of_the_clippers_reach_what_they_are_for() -> None:
    found = load(FOLDER / "clippers_next.pt")
    rates = {name: [row["clip/tensor_rate"] for row in theirs["rows"]] for name, theirs in found.items()}
    for name in CLIPPERS:
        assert len(rates[name]) == GO_ON
        skips = name in ("skip_step", "chain")
        assert sum(found[name]["skipped"]) == skips, "a step was skipped where the strategy can"
        if name != "skip_step":
            assert max(rates[name]) == 1.0, "some tensors were clipped"
            assert min(rates[name]) < 1.0, "and some were not"


@pytest.mark.parametrize(("name", "maker", "taker"), OPTIMIZERS)
def test_an_optimizer_goes_on(name: str, maker: str, taker: str, kernels: str, caplog: Any) -> None:
    """This package's takes its own state and torch's; torch's takes ours, and leaves the clip state aside."""
    theirs = load(FOLDER / "optim_next.pt")[f"{name} {maker} {taker}"]
    mine = go_on_optimizing(name, taker, load(FOLDER / "optim" / f"{name}_{maker}.pt"))
    relative = CLOSE_IN_FLOAT64 if name.endswith("float64") else CLOSE
    close(mine["weights"], theirs["weights"], "weights of each step", relative)
    rows_close(mine["rows"], theirs["rows"], relative)
    assert mine["clip"].keys() == theirs["clip"].keys() == ({"gradient", "update"} if taker == "ours" else set())
    if taker == "ours":
        states_close(mine["clip"]["gradient"], theirs["clip"]["gradient"], relative)
        states_close(mine["clip"]["update"], theirs["clip"]["update"], relative)
    told = sum("has no clip state" in record.message for record in caplog.records)
    assert told == (2 if (maker, taker) == ("torch", "ours") else 0)


def test_the_steps_of_the_optimizers_reach_what_they_are_for() -> None:
    found = load(FOLDER / "optim_next.pt")
    assert {tuple(word.split()[1:]) for word in found} == set(TAKEN)
    for word, theirs in found.items():
        if word.endswith("ours ours"):
            assert {row["clip/rate"] for row in theirs["rows"]} == {0.0, 1.0}
            assert any(row["clip_update/rate"] for row in theirs["rows"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the saved run, to write into."""
    return Path(shutil.copytree(RECORD, tmp_path / "run"))


def test_a_trainer_resumes(run: Path) -> None:
    theirs, mine = load(FOLDER / "trainer_next.pt"), go_on_training(run)
    rows_close(mine["logs"], theirs["logs"])
    assert {row["clip/rate"] for row in theirs["logs"]} == {0.0, 1.0}
    assert len({row["clip_update/scale"] for row in theirs["logs"]}) == GO_ON
    close(mine["weights"], theirs["weights"], "weights at the end")
    states_close(mine["state"], theirs["state"], CLOSE)
    states_close(mine["update_state"], theirs["update_state"], CLOSE_IF_RECOVERED)
    for place, record in theirs["record"].items():
        same_record(mine["record"][place], record)
        assert record["step"].tolist() == list(range(1, TRAINER_STEPS[-1] + 1))


def test_a_record_is_read() -> None:
    """As that commit read it: what it found after five more steps, without them."""
    steps = TRAINER_STEPS[1]
    for place, record in load(FOLDER / "trainer_next.pt")["record"].items():
        theirs = {key: value[:steps] if key in record_columns(record) else value for key, value in record.items()}
        mine = columns(read_record(RECORD, place))
        same_record(mine, theirs, exact=True)
    gradient = read_record(RECORD)
    assert [meta["last"] for meta in gradient.earlier] == [TRAINER_STEPS[0]], "it went on under another configuration"
    assert np.isfinite(gradient.norm_T).all()


def record_columns(record: dict[str, Any]) -> set[str]:
    """The keys that have a row for each step."""
    return {key for key, value in record.items() if isinstance(value, torch.Tensor)} - {"numel"}


def same_record(mine: dict[str, Any], theirs: dict[str, Any], exact: bool = False) -> None:
    """The same columns; those that no later step computed are equal."""
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            assert mine[key] == value, key
        elif exact or not value.is_floating_point():
            assert torch.equal(mine[key].nan_to_num(-1), value.nan_to_num(-1)), key
        else:
            close(mine[key], value, key, CLOSE_IF_RECOVERED)


@pytest.mark.parametrize(
    "words",
    [
        ["report", "RUN", "--text"],
        ["report", "RUN", "--out", "OUT"],
        ["replay", "RUN", "--clip", "adagc:warmup_steps=10", "--out", "OUT/replay.png"],
        ["suggest", "RUN"],
    ],
    ids=["text", "page", "replay", "suggest"],
)
def test_the_command_line_reads_a_record(words: list[str], run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    status = main([word.replace("RUN", str(run)).replace("OUT", str(out)) for word in words])
    found = capsys.readouterr()
    assert status == 0, found.err
    assert found.out
    if "--text" in words:
        assert "zclip" in found.out
        assert "0.weight" in found.out
        assert "35" in found.out, "the spike"
