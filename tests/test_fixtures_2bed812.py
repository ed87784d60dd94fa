"""What commit 2bed812 saved still loads, and goes on with the numbers that it had itself.

Three things are others by now, and accounted for: limits are exact, where that commit added 1e-6 to the norm as torch
does; a skipped value is remembered as the limit that it broke; and strategies that start anew know what stands out.

The files are in tests/fixtures/2bed812; tests/fixtures/make.py, which made them with that commit, says how.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from hf_gradclip.cli import main
from hf_gradclip.record.files import read_record
from hf_gradclip.state import flatten
from hf_gradclip.strategies import adagc, autoclip, zclip
from hf_gradclip.strategy import torch_scale
from tests.fixtures.make import (
    CLIPPERS,
    COMMIT,
    GO_ON,
    TAKEN,
    TRAINER_CLIPS,
    TRAINER_STEPS,
    columns,
    give_gradients,
    go_on_clipping,
    go_on_optimizing,
    go_on_training,
    load,
    net,
)
from tests.kernels.languages import serving
from tests.strategies.past import Past

FOLDER = Path(__file__).parent / "fixtures" / COMMIT
RECORD = FOLDER / "trainer"
CLOSE, CLOSE_IN_FLOAT64 = 1e-6, 1e-12
# an update that is recovered from float32 weights has their rounding, divided by the learning rate
CLOSE_IF_RECOVERED = 1e-5

ADAPTIVE = "zclip:max_norm=1"
"""What the preset `adaptive` was at that commit; it is another strategy now."""

OPTIMIZERS = [tuple(word.split()) for word in load(FOLDER / "optim_next.pt")]


@pytest.fixture(params=["C", "torch"])
def kernels(request: Any) -> Iterator[str]:
    """The language that computes."""
    with serving(request.param):
        yield request.param


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


@pytest.fixture
def added(monkeypatch: Any) -> None:
    """Every limit adds 1e-6 to the norm again."""
    for module in (zclip, adagc):
        monkeypatch.setattr(module, "limit_scale", torch_scale)

    def where_above(limit: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return torch.where(norm > limit, torch_scale(limit, norm), 1.0)

    monkeypatch.setattr(autoclip, "limit_scale", where_above)


def later(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What a state has that it had not then; the rest has the same keys."""
    assert theirs.keys() <= mine.keys()
    found = {key: value for key, value in mine.items() if key not in theirs}
    assert all(key.split(".")[-2:] in (["past", "seen"], ["past", "logs"]) or key[-3:] == "row" for key in found)
    return found


def remembered(theirs: dict[str, Any]) -> dict[str, Any]:
    """The state that must come of what that commit did: a norm that `skip_step` skipped is there as its limit."""
    state = dict(theirs["state"]["state"])
    for key in ("norms", "0.norms"):
        if True in theirs["skipped"] and key in state:
            ring, step = np.array(state[key]), theirs["skipped"].index(True)
            place = int(np.flatnonzero(ring == float(theirs["norms"][step]))[0])
            others = ring_before(theirs, key, place, step)
            ring[place] = limit_of(others)
            state[key] = ring.tolist()
    return state


def ring_before(theirs: dict[str, Any], key: str, place: int, step: int) -> np.ndarray:
    """The window of a step, from the one at the end: what later steps wrote over is in the norms of the saved state."""
    saved = load(FOLDER / "clippers" / ("chain.pt" if key[0] == "0" else "skip_step.pt"))["state"][key].numpy().copy()
    for back in range(step):
        saved[(place - step + back) % len(saved)] = float(theirs["norms"][back])
    return saved


def limit_of(window: np.ndarray) -> float:
    """Mean and two deviations, as the saved specs say."""
    return float(window.mean() + 2 * max(window.std(ddof=1), 0.05 * window.mean()))


def states_close(mine: dict[str, Any], theirs: dict[str, Any], relative: float) -> None:
    """The state of a clip: close numbers."""
    assert mine.keys() - theirs.keys() == {"parts"}, "which that commit did not write"
    assert theirs.keys() <= mine.keys()
    assert mine["names"] == theirs["names"]
    assert mine["spec"] == theirs["spec"]
    later(mine["state"], theirs["state"])
    for key, value in theirs["state"].items():
        close(mine["state"][key], value, key, relative)


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.usefixtures("added")
def test_a_clipper_goes_on_bit_for_bit_in_float64(name: str) -> None:
    """Under the spec that was saved, which has every field as it was: some defaults are others now."""
    theirs, saved = load(FOLDER / "clippers_next.pt")[name], load(FOLDER / "clippers" / f"{name}.pt")
    said, mine = go_on_clipping(saved["spec"], saved)
    assert said == ""
    wanted = {**theirs["state"], "state": remembered(theirs)}
    seen = {key: value for key, value in later(mine["state"]["state"], wanted["state"]).items() if "seen" in key}
    judged = {"autoclip": {"past.seen"}, "skip_step": {"past.seen"}, "chain": {"0.past.seen"}}.get(name, set())
    assert {key for key, value in seen.items() if value == GO_ON} == judged, "others are past their warm-up"
    assert {value for key, value in seen.items() if key not in judged} <= {0}
    exact = [key for key in wanted["state"] if not key.endswith("norms") or name == "autoclip"]
    assert {key: mine["state"]["state"][key] for key in exact} == {key: wanted["state"][key] for key in exact}
    states_close(mine["state"], wanted, CLOSE_IN_FLOAT64)
    assert mine["skipped"] == theirs["skipped"]
    assert torch.equal(mine["norms"], theirs["norms"])
    close(mine["grads"], theirs["grads"], "gradients after the clip", CLOSE_IN_FLOAT64)
    rows_close(mine["rows"], rows_then(name, theirs), CLOSE_IN_FLOAT64)


def rows_then(name: str, theirs: dict[str, Any]) -> list[dict[str, float]]:
    """The rows; after a skip the threshold of `skip_step` is that of the window with the limit in it. A skip counts."""
    rows = [dict(row) for row in theirs["rows"]]
    for row, skipped in zip(rows, theirs["skipped"], strict=True):
        row["clip/rate"] = max(row["clip/rate"], float(skipped))
    if name == "skip_step":
        step = theirs["skipped"].index(True)
        place = theirs["state"]["state"]["norms"].index(float(theirs["norms"][step]))
        window = ring_before(theirs, "norms", place, step)
        window[place] = limit_of(window)
        rows[step + 1]["clip/threshold"] = limit_of(window)
        assert step + 2 == GO_ON
    return rows


@pytest.mark.parametrize("name", CLIPPERS)
def test_the_limits_of_a_clipper_that_goes_on_are_exact(name: str) -> None:
    """Without what is added to the norms, the gradients differ by as little."""
    theirs, saved = load(FOLDER / "clippers_next.pt")[name], load(FOLDER / "clippers" / f"{name}.pt")
    _, mine = go_on_clipping(saved["spec"], saved)
    ratio = (mine["grads"] / theirs["grads"])[mine["grads"].abs() > 0]
    assert ((ratio > 1 - 1e-14) & (ratio < 1 + 3e-6)).all()
    clips = name not in ("skip_step", "zclip_reference", "adagc_reference")
    assert bool((ratio > 1 + 1e-8).any()) == clips


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_clipper_goes_on_in_float32(name: str, kernels: str) -> None:
    """The made gradients are the same numbers there."""
    theirs, saved = load(FOLDER / "clippers_next.pt")[name], load(FOLDER / "clippers" / f"{name}.pt")
    _, mine = go_on_clipping(saved["spec"], saved, torch.float32)
    states_close(mine["state"], {**theirs["state"], "state": remembered(theirs)}, CLOSE)
    assert mine["skipped"] == theirs["skipped"]
    close(mine["norms"], theirs["norms"], "norms")
    close(mine["grads"], theirs["grads"], "gradients after the clip")
    rows_close(mine["rows"], rows_then(name, theirs))


@pytest.mark.parametrize("name", CLIPPERS)
def test_a_clipper_without_the_state_goes_elsewhere(name: str) -> None:
    """The steps above depend on what was loaded."""
    theirs = load(FOLDER / "clippers_next.pt")[name]
    _, mine = go_on_clipping(CLIPPERS[name], None)
    assert mine["state"] != theirs["state"]
    assert mine["rows"] != theirs["rows"] or not torch.equal(mine["grads"], theirs["grads"])


@pytest.mark.parametrize("spec", ["adaptive", {"gradient": "adaptive", "nonfinite": "raise"}])
def test_what_adaptive_was_starts_anew_as_adaptive_with_a_sentence(spec: Any) -> None:
    saved = load(FOLDER / "clippers" / "zclip.pt")
    model = net().double()
    clipper = Clipper.for_model(model, spec)
    fresh = {key: value.clone() for key, value in flatten(clipper.state).items()}
    said = clipper.load_state_dict(saved)
    assert said == (
        f"The checkpoint's clip state is of {saved['spec']}, so "
        "adaptive_norm+agc:clip_factor=0.01,eps=0.001,unit_axis=none,include_1d=false,include_head=false,"
        "include_adapters=false starts anew."
    )
    assert {key: value.tolist() for key, value in flatten(clipper.state).items()} == {
        key: value.tolist() for key, value in fresh.items()
    }
    give_gradients(model, 30, 1.0)
    clipper.step()
    assert [value.item() for key, value in flatten(clipper.state).items() if key.endswith("seen")] == [1]


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


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(("name", "maker", "taker"), OPTIMIZERS)
def test_an_optimizer_goes_on(name: str, maker: str, taker: str, kernels: str, caplog: Any) -> None:
    """This package's takes its own state and torch's; torch's takes ours, and leaves the clip state aside."""
    theirs = load(FOLDER / "optim_next.pt")[f"{name} {maker} {taker}"]
    mine = go_on_optimizing(name, taker, load(FOLDER / "optim" / f"{name}_{maker}.pt"))
    relative = CLOSE_IN_FLOAT64 if name.endswith("float64") else CLOSE
    close(mine["weights"], theirs["weights"], "weights of each step", relative)
    wanted = [dict(row) for row in theirs["rows"]]
    if (maker, taker) == ("torch", "ours"):  # zclip starts anew, and says in its warm-up where a norm would stand out
        past = Past()
        for row in wanted:
            row["clip/threshold"] = past(row["clip/norm_mean"])[1]
    rows_close(mine["rows"], wanted, relative)
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


@pytest.mark.usefixtures("added")
def test_a_trainer_resumes(run: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(TRAINER_CLIPS[1], "gradient", ADAPTIVE)
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


def test_a_trainer_of_adaptive_starts_anew_with_a_sentence(run: Path, caplog: Any) -> None:
    """Its clip, not its weights or its record."""
    mine = go_on_training(run)
    (said,) = [r.message for r in caplog.records if "starts anew" in r.message]
    assert "clip state is of zclip:z_threshold=2.5,alpha=0.97,warmup_steps=25,max_norm=1," in said
    assert "so adaptive_norm+agc:" in said
    assert mine["state"]["state"]["0.seen"] == GO_ON
    assert mine["record"]["gradient"]["step"].tolist() == list(range(1, TRAINER_STEPS[-1] + 1))


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
    """The same columns; those that no later step computed are equal. The largest scale was not kept then."""
    assert mine.keys() == theirs.keys() | {"scale_max"}
    close(mine["scale_max"], mine["scales"].amax(1), "scale_max")
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
