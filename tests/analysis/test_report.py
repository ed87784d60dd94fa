"""A report says what is in the record: its sentences, its tables and its curves, against records made by hand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_gradclip.analysis.curves import POINTS, rolling_rate, smooth, thin
from hf_gradclip.analysis.findings import findings, tensors_of
from hf_gradclip.analysis.heat import BINS, MOST_ROWS, heat_of, rows_of
from hf_gradclip.analysis.report import print_report, write_report
from hf_gradclip.analysis.run import Run, load_run
from hf_gradclip.analysis.tables import SUMMARY_COLUMNS, spike_rows, summary_rows
from hf_gradclip.cli import main
from hf_gradclip.record.files import FOLDER, Record
from tests.analysis.records import LORA_NAMES, NAMES, norms_of, record_by_hand, save


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


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """A page without pictures, which take most of its time."""
    monkeypatch.setattr("hf_gradclip.analysis.report.pictures_of", lambda *_: [])


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

    @pytest.mark.parametrize(
        ("spec", "every", "usual"), [("adaptive", 1, True), ("adaptive", 4, False), ("adagc", 1, False)]
    )
    def test_many_steps_that_were_clipped_are_usual_by_rows_only(self, spec, every, usual) -> None:
        scales = np.ones((120, 4))
        scales[::every, 1] = 0.25
        meta = {**record_by_hand(norms_of()).meta, "spec": spec}
        said = findings(run_of(record_by_hand(norms_of(), scales, meta=meta)))[0]
        assert f"clipped in {120 // every} of 120 steps" in said
        assert said.endswith("usual with agc: it limits single rows, some in most steps.") is usual

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

    def test_steps_that_were_too_large_are_no_nan(self) -> None:
        norms = norms_of()
        norms[[7, 50], 1] = 1e30
        norms[60, 1] = np.nan
        finite = norms.max(axis=1) < 1e19
        said = findings(run_of(record_by_hand(norms, finite_T=finite, skipped_T=~finite)))
        first = said.index("The norm was a number whose square float32 cannot hold in 2 steps, first in step 8.")
        assert said[first + 1] == "The norm was NaN or inf in 1 step, first in step 61."
        assert said[first + 2].startswith("In step 61 it was in 1 of 4 tensors")
        assert "3 steps were left out: no weight moved in them." in said

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

    @pytest.mark.parametrize(("count", "counted"), [(2, "2"), (3, "3 or more"), (4, "4")])
    def test_spikes_of_which_only_the_latest_are_kept(self, monkeypatch, count, counted) -> None:
        """As many as are kept may be fewer than there were; a record from before there was a limit has more."""
        for module in ("findings", "tables"):
            monkeypatch.setattr(f"hf_gradclip.analysis.{module}.KEPT", 3)
        run = run_of(record_by_hand(norms_of()), [spike(step) for step in (61, 91, 95, 99)[:count]])
        (said,) = [s for s in findings(run) if "stand out" in s]
        assert said.startswith("The latest 3 steps that stand out by the norm are known (61, 91, 95);") == (count == 3)
        assert said.startswith(f"{count} steps stand out by the norm (61, ") == (count != 3)
        assert summary_rows([run])[0][SUMMARY_COLUMNS.index("spikes")] == counted

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
        heat = heat_of(record_by_hand(norms))
        assert (heat.names, heat.norm_RB.shape, len(heat.first_B)) == (list(NAMES), (4, BINS), BINS)
        np.testing.assert_allclose(heat.norm_RB[1], norms[:, 1].reshape(BINS, 10).max(axis=1), rtol=1e-6)
        assert (heat.first_B[:2].tolist(), heat.last_B[:2].tolist()) == ([1, 11], [10, 20])
        assert np.isnan(heat_of(record_by_hand(norms[:20])).norm_RB[2, 5])
        assert heat_of(record_by_hand(norms), narrow=True).norm_RB.shape == (4, 100)

    def test_a_step_that_is_not_finite_is_broken_where_it_was(self) -> None:
        """The other tensors show their norms; a step that a loss scaler dropped is broken nowhere."""
        norms = norms_of()[:40]
        norms[7, 1] = np.nan
        norms[8, 2] = np.inf
        norms[9] = np.nan
        norms[20] = np.nan
        totals = np.where(np.arange(40) == 20, np.inf, np.nan_to_num(np.sqrt((norms**2).sum(axis=1)), nan=np.nan))
        heat = heat_of(record_by_hand(norms, norm_T=totals))
        assert [np.flatnonzero(row).tolist() for row in heat.broken_RB] == [[9], [7, 9], [8, 9], [9]]
        assert heat.norm_RB[0, 7] == pytest.approx(norms[7, 0])
        assert np.isnan(heat.norm_RB[:, 20]).all()

    def test_a_curve_among_others_has_its_medians(self) -> None:
        values = np.random.default_rng(0).standard_normal(400)
        values[[50, 51]] = np.nan
        found = smooth(values)
        assert found[200] == np.median(values[195:206])
        assert found[50] == np.nanmedian(values[45:56])
        assert np.isnan(smooth(np.full(30, np.nan))).all()


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
    assert [path.name for path in pictures] == [
        "loss.png",
        "norm.png",
        "rate.png",
        "learning_rate.png",
        "heat.png",
        "update.png",
        "strategies.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert re.findall(r'<figure id="([a-z_]+)"', text) == [path.stem for path in pictures]
    assert text.count("<svg ") == 2 * len(pictures), "one for a wide page and one for a phone"
    assert not re.search(r'(?:src|href|srcset)="(?!data:|#)', text)
    ids = re.findall(r'<[^>]* id="([^"]+)"', text)
    assert len(ids) > 100
    referred = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred <= set(ids)
    assert "rank 0: 3, 1, 4; rank 1: unknown" in text
    assert findings(load_run(tmp_path / "one"))[0] in text


def test_only_the_scripts_of_the_page_run(tmp_path) -> None:
    """By the policy that is in it; a name in a record closes no element."""
    evil = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a&b", '"><b>')
    save(record_by_hand(norms_of(), names=evil), tmp_path)
    text = write_report([tmp_path], tmp_path / "x.html")[0].read_text("utf-8")
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", text)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
    assert [kind for kind, _ in scripts] == [' type="application/json" id="data"', ""]
    assert base64.b64encode(hashlib.sha256(scripts[1][1].encode()).digest()).decode() == allowed
    assert json.loads(scripts[0][1])[0]["heat"][0]["names"] == [*evil]
    assert "<img" not in text
    assert "<b>" not in text


@pytest.mark.parametrize("name", ["x.html", "below/x.HTM"])
def test_one_file(tmp_path, name, capsys, undrawn) -> None:
    save(record_by_hand(norms_of()), tmp_path / "a")
    assert main(["report", str(tmp_path / "a"), "--out", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name)]
    assert (tmp_path / name).is_file()
    assert not (tmp_path / "a" / FOLDER / "report.html").exists()


def test_a_comparison_leaves_the_page_of_its_first_run_alone(tmp_path, undrawn) -> None:
    for name in "ab":
        save(record_by_hand(norms_of()), tmp_path / name)
    (own,) = (path for path in write_report([tmp_path / "a"]) if path.suffix == ".html")
    before = own.read_bytes()
    (page,) = write_report([tmp_path / "a", tmp_path / "b"])
    assert page == tmp_path / "a" / FOLDER / "with_b" / "report.html"
    assert own.read_bytes() == before


def test_a_folder_that_is_not_there(tmp_path, capsys) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is not there." in capsys.readouterr().err


class TestLora:
    """Of the two factors of an adapter one begins at 0, and until it moves the other's gradient is exactly 0."""

    def record(self, zeros: int, rates: int, **changes) -> Record:
        norms = norms_of()
        norms[:zeros, ::2] = 0.0
        return record_by_hand(norms, names=LORA_NAMES, learning_rate_T=np.arange(120) >= rates, **changes)

    @pytest.mark.parametrize(("zeros", "rates"), [(1, 0), (2, 1)])
    def test_its_beginning_is_no_news(self, zeros, rates) -> None:
        """With a warm-up the rate is 0 in the first step, so that nothing has moved in the second."""
        assert not [said for said in findings(run_of(self.record(zeros, rates))) if "exactly 0" in said]

    @pytest.mark.parametrize(("zeros", "rates"), [(2, 0), (40, 1)])
    def test_what_is_still_0_later_is(self, zeros, rates) -> None:
        said = [said for said in findings(run_of(self.record(zeros, rates))) if "exactly 0" in said]
        name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
        assert said[0] == f"Norm exactly 0 for {name} in {zeros} of 120 steps."

    def test_a_skipped_first_step_moves_nothing(self) -> None:
        record = self.record(2, 0, skipped_T=np.arange(120) == 0)
        assert not [said for said in findings(run_of(record)) if "exactly 0" in said]

    def test_another_tensor_is_named_from_the_first_step_on(self) -> None:
        norms = norms_of()
        norms[0, 1] = 0.0
        assert f"Norm exactly 0 for {NAMES[1]} in 1 of 120 steps." in findings(run_of(record_by_hand(norms)))

    def test_what_peft_puts_before_all_names_is_left_out(self, tmp_path) -> None:
        save(self.record(1, 0), tmp_path)
        page = write_report([tmp_path], tmp_path / "x.html")[0].read_text("utf-8")
        assert "base_model" not in page
        assert "lora_A" in page


def test_where_a_nan_was_is_said() -> None:
    norms = norms_of()
    norms[[7, 50]] = np.nan
    assert not [said for said in findings(run_of(record_by_hand(norms))) if "it was in" in said]
    norms[50] = 1.0
    norms[50, 2] = np.inf
    said = findings(run_of(record_by_hand(norms)))
    assert f"In step 51 it was in 1 of 4 tensors: {NAMES[2]}." in said


def test_the_text_of_a_spike_is_shown(tmp_path, capsys, monkeypatch, undrawn) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    save(record_by_hand(norms_of()), tmp_path)
    folder = tmp_path / FOLDER / "spikes"
    folder.mkdir()
    first = {**spike(61), "text": ["<i>one</i>\ntwo", "x" * 3000, "three"]}
    other = {**spike(61, rank=1, examples=[8]), "text": ["of rank one"]}
    for name, found in (("step_61", first), ("step_61_rank1", other)):
        found.pop("other_ranks")
        (folder / f"{name}.json").write_text(json.dumps(found))
    text = write_report([tmp_path], tmp_path / "x.html")[0].read_text("utf-8")
    assert "<summary>Step 61: 4 examples</summary>" in text
    assert "<li><b>rank 0, 3</b> &lt;i&gt;one&lt;/i&gt;\ntwo</li>" in text
    assert f"<b>rank 0, 1</b> {'x' * 1000} ... (3,000 letters)</li>" in text
    assert "<li><b>rank 1, 8</b> of rank one</li>" in text
    print_report([tmp_path])
    said = capsys.readouterr().out
    assert "- rank 0, 3: <i>one</i> two" in said


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
        "learning_rate.png",
        "norm.png",
        "rate.png",
        "heat_a.png",
        "heat_b.png",
        "strategies_a.png",
        "strategies_b.png",
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


def test_a_spike_that_was_bounded_is_not_said_to_be_unclipped() -> None:
    bounded = np.arange(120) == 60
    record = record_by_hand(norms_of(), bounded_T=bounded, meta={**record_by_hand(norms_of()).meta, "spec": "value"})
    said = findings(run_of(record, [spike(61)]))
    assert "it was clipped, single elements too, so the norm after it is not known." in " ".join(said)
    assert summary_rows([run_of(record)])[0][SUMMARY_COLUMNS.index("mean scale")] == "-"


@pytest.mark.parametrize(
    ("spec", "of_norm"),
    [
        ("adaptive_norm", True),
        ("global_norm:max_norm=0.1", True),
        ("adaptive_norm+agc", True),
        ("none", True),
        ("agc+adaptive_norm", False),
        ("param_norm:max_norm=0.1", False),
        ("value:max_value=0.1", False),
        ("global_norm:max_norm=0.1,norm_type=inf", False),
        ("somebody.elses.Class", True),
    ],
)
def test_a_threshold_of_something_else_is_not_compared_with_the_norm(spec, of_norm) -> None:
    made = record_by_hand(norms_of())
    threshold = {"threshold_T": np.full(120, 0.1), "meta": {**made.meta, "spec": spec}}
    said = findings(run_of(replace(made, **threshold)))[0]
    assert ("the threshold at least 0.1" in said) == of_norm
    scales = np.ones_like(norms_of())
    scales[:, 0] = 0.5
    said = findings(run_of(replace(record_by_hand(norms_of(), scales), **threshold)))[0]
    assert ("above its threshold in 120 steps" in said) == of_norm


def test_a_tensor_counts_from_when_it_was_trained() -> None:
    """A NaN before that is not in it, and what it is like is not known then."""
    norms, scales = norms_of(), np.ones_like(norms_of())
    norms[:20, :2] = scales[:20, :2] = np.nan
    norms[5, 2] = np.nan
    scales[40, 0] = 0.5
    finite = np.arange(120) != 5
    record = record_by_hand(norms, scales, finite_T=finite, skipped_T=~finite)
    assert f"In step 6 it was in 1 of 4 tensors: {NAMES[2]}." in findings(run_of(record))
    late = next(tensor for tensor in tensors_of(record) if tensor.name == NAMES[0])
    assert (late.smallest_scale, late.clipped) == (0.5, pytest.approx(1 / 100))
    assert late.median_norm == pytest.approx(np.median(norms[20:, 0]))
    assert not heat_of(record).broken_RB[:2].any()
