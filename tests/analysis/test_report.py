"""A report says what is in the record: its sentences, its tables and its curves, against records made by hand."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_gradclip.analysis.figures import BINS, MOST_ROWS, POINTS, heat_of, rolling_rate, rows_of, thin
from hf_gradclip.analysis.findings import findings, tensors_of
from hf_gradclip.analysis.report import print_report, write_report
from hf_gradclip.analysis.run import Run, load_run
from hf_gradclip.analysis.tables import spike_rows, summary_rows
from hf_gradclip.cli import main
from hf_gradclip.record.files import FOLDER, Record
from tests.analysis.records import NAMES, norms_of, record_by_hand, save


def run_of(record: Record, spikes: list[dict] | None = None, update: Record | None = None) -> Run:
    return Run("made", Path("made"), record, update, spikes or [])


def scaled(norms: np.ndarray, clipped: np.ndarray, scale: float = 0.5) -> Record:
    """A record in which some steps were scaled as a whole."""
    scales = np.where(clipped[:, None], scale, 1.0) * np.ones_like(norms)
    return record_by_hand(norms, scales)


def spike(step: int, **changes) -> dict:
    made = {"step": step, "norm": 7.5, "z": 12.0, "loss": 5.0, "learning_rate": 1e-3, "threshold": 1.0, "rank": 0}
    tensors = [{"name": NAMES[1], "norm": 7.0, "share": 0.87}]
    return {**made, "tensors": tensors, "examples": [3, 1, 4], "other_ranks": {}, **changes}


class TestFindings:
    @pytest.mark.parametrize(
        ("every", "count", "meaning"),
        [(1, "120 of 120 steps (100%)", "acts as a learning-rate cut, to 0.50 of it"),
         (4, "30 of 120 steps (25%)", "more than a safety net"),
         (20, "6 of 120 steps (5%)", "a safety net")],
    )  # fmt: skip
    def test_what_the_clip_rate_means(self, every, count, meaning) -> None:
        said = findings(run_of(scaled(norms_of(), np.arange(120) % every == 0)))[0]
        assert f"clipped in {count}" in said
        assert "to 0.50 of their norm on average" in said
        assert meaning in said

    def test_the_warm_up_is_told_apart(self) -> None:
        """Clipped in 18 of the first 25 steps and never again."""
        meta = {**record_by_hand(norms_of()).meta, "spec": "zclip"}
        record = record_by_hand(
            norms_of(), np.where(np.arange(120) < 18, 0.5, 1.0)[:, None] * np.ones((1, 4)), meta=meta
        )
        said = findings(run_of(record))[0]
        assert "clipped in 18 of 120 steps (15%)" in said
        assert said.endswith("; 18 of them in the warm-up of 25 steps, later 0%: a safety net.")

    def test_a_run_that_was_never_clipped_says_by_how_much(self) -> None:
        record = record_by_hand(norms_of(), threshold_T=np.full(120, 25.0))
        said = findings(run_of(record))[0]
        assert "0 of 120 steps (0%)" in said
        assert f"largest norm was {record.norm_T.max():.3g}, the threshold at least 25" in said

    def test_parameters_that_are_scaled_apart(self) -> None:
        scales = np.ones((120, 4))
        scales[:60, 1] = 0.25
        said = findings(run_of(record_by_hand(norms_of(), scales)))[0]
        assert "60 of 120 steps" in said
        assert "of all tensors in all steps 12% were scaled" in said

    def test_zero_norms_are_counted_by_name(self) -> None:
        norms = norms_of()
        norms[:12, 2] = 0.0
        said = findings(run_of(record_by_hand(norms)))
        assert f"Norm exactly 0 for {NAMES[2]} in 12 of 120 steps." in said

    def test_steps_that_were_lost(self) -> None:
        norms = norms_of()
        norms[[7, 50], 1] = np.nan
        said = findings(run_of(record_by_hand(norms)))
        assert "The norm was NaN or inf in 2 steps, first in step 8." in said
        assert "2 steps were left out: no weight moved in them." in said

    def test_the_level_of_the_norm(self) -> None:
        rising = np.linspace(1, 4, 100)[:, None] * np.ones((1, 4))
        (said,) = [s for s in findings(run_of(record_by_hand(rising))) if s.startswith("The norm rose")]
        assert "rose 3.4-fold" in said
        assert "fixed threshold" in said

    def test_a_tensor_that_dominates(self) -> None:
        norms = norms_of()
        norms[:, 0] *= 10
        (said,) = [s for s in findings(run_of(record_by_hand(norms))) if "squared norm" in s]
        assert said.startswith(NAMES[0])

    def test_spikes_and_whether_they_were_clipped(self) -> None:
        clipped = np.zeros(120, dtype=bool)
        clipped[60] = True
        run = run_of(scaled(norms_of(), clipped, 0.2), [spike(61), spike(91)])
        (said,) = [s for s in findings(run) if "stand out" in s]
        assert said == "2 steps stand out by the norm (61, 91); 1 were clipped, to 0.2 of its norm."
        assert "No step stands out by its norm." in findings(run_of(record_by_hand(norms_of())))

    def test_the_update_is_told_apart(self) -> None:
        run = run_of(record_by_hand(norms_of()), update=scaled(norms_of(), np.ones(120, dtype=bool)))
        assert findings(run)[-1].startswith("The update was clipped in 120 of 120 steps")

    def test_nothing_finite(self) -> None:
        said = findings(run_of(record_by_hand(np.full((5, 4), np.nan))))
        assert said[0] == "No gradient of the 5 recorded steps was finite and applied."


def test_what_was_made_larger_is_said() -> None:
    """In 30 of 120 steps by 3, of which one was skipped; a record that only clips has no such sentence."""
    record = scaled(norms_of(), np.arange(120) % 4 == 0, 3.0)
    skipped = np.arange(120) == 4
    found = [said for said in findings(run_of(replace(record, skipped_T=skipped))) if "made larger" in said]
    assert found == ["Parts of the gradient were made larger in 29 steps (24%), 3-fold at most."]
    assert not [said for said in findings(run_of(scaled(norms_of(), ~skipped))) if "larger" in said]


def test_tensors_by_their_largest_norm() -> None:
    norms = norms_of()
    norms[17, 3] = 50.0
    first = tensors_of(scaled(norms, np.arange(120) < 30, 0.125))[0]
    assert (first.name, first.largest_norm, first.largest_step) == (NAMES[3], 50.0, 18)
    assert first.median_norm == pytest.approx(np.median(norms[:, 3]))
    assert (first.clipped, first.smallest_scale, first.zeros) == (0.25, 0.125, 0)
    assert first.share == pytest.approx(np.median(norms[:, 3] ** 2 / (norms**2).sum(axis=1)), rel=1e-5)


class TestCurves:
    def test_a_spike_survives_thinning(self) -> None:
        values = np.ones(100_000)
        values[77_777] = 9.0
        steps, found = thin(np.arange(1, 100_001), values)
        assert len(steps) == len(found) <= POINTS
        assert found.max() == 9.0
        assert steps[found.argmax()] <= 77_778 < steps[found.argmax() + 1]

    def test_the_rate_over_a_window(self) -> None:
        clipped = np.zeros(600, dtype=bool)
        clipped[100:120] = True
        rate = rolling_rate(clipped)
        assert rate[119] == 1.0
        assert rate[109] == 0.5
        assert rate[99] == rate[140] == 0.0

    def test_every_tensor_if_they_are_few_else_layers(self) -> None:
        assert [name for name, _ in rows_of(NAMES)] == list(NAMES)
        deep = [
            f"model.layers.{i}.{part}.weight" for i in range(20) for part in ("attn.q", "attn.k", "mlp.up", "mlp.down")
        ]
        rows = rows_of(deep)
        assert len(rows) == 40
        assert rows[0] == ("model.layers.0.attn", [0, 1])
        wide = [f"model.layers.{i}.{part}" for i in range(200) for part in ("a.w", "b.w")]
        rows = rows_of(wide)
        assert len(rows) <= MOST_ROWS
        assert sorted(i for _, members in rows for i in members) == list(range(400))

    def test_the_heat_map_holds_the_largest_norm_of_a_bin(self) -> None:
        norms = norms_of(3000)
        norms[5, 2] = 0.0
        names, heat, starts = heat_of(record_by_hand(norms))
        assert (list(names), heat.shape, len(starts)) == (list(NAMES), (4, BINS), BINS)
        np.testing.assert_allclose(heat[1], norms[:, 1].reshape(BINS, 10).max(axis=1), rtol=1e-6)
        assert np.isnan(heat_of(record_by_hand(norms[:20]))[1][2, 5])


def test_the_files_of_a_page(tmp_path) -> None:
    """Everything is inside: pictures as data, no address but the page's own; as many as were written as PNG."""
    save(scaled(norms_of(), np.arange(120) % 9 == 0), tmp_path / "one")
    save(record_by_hand(norms_of() * 20), tmp_path / "one", place="update")
    (tmp_path / "one" / FOLDER / "spikes").mkdir()
    for name, found in (("step_61", spike(61)), ("step_61_rank1", spike(61, rank=1, examples="unknown"))):
        found.pop("other_ranks")
        (tmp_path / "one" / FOLDER / "spikes" / f"{name}.json").write_text(json.dumps(found))
    page, *pictures = write_report([tmp_path / "one"])
    text = page.read_text("utf-8")
    assert [path.name for path in pictures] == ["loss.png", "norm.png", "rate.png", "heat.png", "update.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    inside = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="[^"]+"', text)
    assert [base64.b64decode(data) for data in inside] == [path.read_bytes() for path in pictures]
    assert not re.search(r'(?:src|href|srcset)="(?!data:)', text)
    assert "<script" not in text
    assert "rank 0: 3, 1, 4; rank 1: unknown" in text
    assert findings(load_run(tmp_path / "one"))[0] in text


@pytest.mark.filterwarnings("error")
def test_a_run_of_skipped_steps_only(tmp_path) -> None:
    save(record_by_hand(np.full((30, 4), np.nan)), tmp_path)
    assert "No gradient of the 30 recorded steps was finite and applied." in findings(load_run(tmp_path))
    assert write_report([tmp_path], tmp_path / "out")


def test_runs_side_by_side(tmp_path, monkeypatch, capsys) -> None:
    for name, factor in (("a", 1.0), ("b", 3.0)):
        save(record_by_hand(norms_of() * factor), tmp_path / name)
    files = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert {path.name for path in files} == {
        "report.html",
        "loss.png",
        "norm.png",
        "rate.png",
        "heat_a.png",
        "heat_b.png",
    }
    rows = summary_rows([load_run(tmp_path / "a"), load_run(tmp_path / "b")])
    medians = [float(row[4]) for row in rows]
    assert medians[1] / medians[0] == pytest.approx(3, rel=1e-3)
    monkeypatch.setenv("COLUMNS", "200")
    print_report([tmp_path / "a", tmp_path / "b"])
    said = capsys.readouterr().out
    assert all(cell in said for row in rows for cell in row)


def test_the_command_prints_what_it_wrote(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written[0].name == "report.html"
    assert all(path.exists() for path in written)
    assert main(["report", str(tmp_path), "--text"]) == 0
    assert "Tensors with the largest norms" in capsys.readouterr().out


def test_many_examples_are_cut_short() -> None:
    (row,) = spike_rows(run_of(record_by_hand(norms_of()), [spike(61, examples=list(range(40)), z="inf", loss=None)]))
    assert row[2:4] == ("inf", "-")
    assert row[5].endswith("11 and 28 more")
