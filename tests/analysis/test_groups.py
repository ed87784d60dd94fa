"""Groups of parameters over a run, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from hf_gradclip.analysis.groups import COLUMNS, group_rows, recorded_groups, replayed_groups
from hf_gradclip.analysis.page import page_of
from hf_gradclip.analysis.replay import replay, strategy_for_replay
from hf_gradclip.analysis.report import print_report
from hf_gradclip.analysis.run import load_run
from hf_gradclip.cli import main
from tests.analysis.records import norms_of, record_by_hand, recorded, save

SPEC = "embed*=global_norm:max_norm=0.3;layers* as deep=global_norm:max_norm=0.5;*=none"


def test_numbers_by_group() -> None:
    norms = norms_of()
    record = record_by_hand(norms)
    strategy = strategy_for_replay(SPEC)
    embed, deep, rest = replayed_groups(record, strategy, replay(record, strategy))
    assert (embed.label, deep.label, rest.label) == ("embed", "deep", "rest")
    assert (embed.tensors, deep.tensors, rest.tensors) == (1, 2, 1)
    of_deep, total = np.hypot(norms[:, 1], norms[:, 2]), (norms**2).sum(axis=1)
    assert deep.median_norm == pytest.approx(np.median(of_deep), rel=1e-6)
    assert deep.largest_norm == pytest.approx(of_deep.max(), rel=1e-6)
    assert deep.share == pytest.approx(np.median(of_deep**2 / total), rel=1e-6)
    assert deep.clipped == pytest.approx((of_deep > 0.5).mean(), abs=0.01)
    assert deep.mean_scale == pytest.approx(np.minimum(1, 0.5 / of_deep).mean(), rel=1e-5)
    assert embed.clipped == pytest.approx((norms[:, 0] > 0.3).mean(), abs=0.01)
    assert (rest.clipped, rest.mean_scale) == (0, 1)
    assert 0 < embed.clipped < 1
    assert 0 < deep.clipped < 1


def test_a_run_shows_its_groups(tmp_path, capsys) -> None:
    recorded(SPEC, tmp_path)
    run = load_run(tmp_path)
    rows = group_rows(recorded_groups(run.gradient))
    assert [row[0] for row in rows] == ["embed", "deep", "rest"]
    assert len(rows[0]) == len(COLUMNS)
    page = page_of([run], [], [None])
    assert "Groups of parameters" in page
    assert "<td>deep</td>" in page
    print_report([tmp_path])
    assert "Groups of parameters" in capsys.readouterr().out


def test_the_command_shows_the_groups_of_a_replay(tmp_path, capsys) -> None:
    recorded("adaptive_norm", tmp_path)
    assert main(["replay", str(tmp_path), "--clip", SPEC, "--clip", "1.0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Groups of parameters under") == 1
    assert "deep" in said


def test_a_run_without_groups_or_of_a_foreign_class_shows_none(tmp_path) -> None:
    record = recorded("adaptive_norm", tmp_path)
    assert recorded_groups(record) == []
    foreign = record_by_hand(norms_of(), meta={**record.meta, "spec": "embed*=somebody.Clip;*=none"})
    save(foreign, tmp_path / "foreign")
    assert recorded_groups(foreign) == []
