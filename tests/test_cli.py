"""`hf-gradclip` as it is typed: what it prints, its exit status, and what it says about bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hf_gradclip.cli import main
from hf_gradclip.spec import preset_names, strategy_names
from tests.analysis.records import norms_of, record_by_hand, recorded, save


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_replay_of_what_was_recorded(tmp_path, capsys) -> None:
    recorded("zclip:warmup_steps=10", tmp_path)
    assert main(["replay", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "What was recorded is zclip:" in said
    assert float(said.split("differ by ")[1].split()[0]) < 1e-6
    assert "would have gone another way" in said
    assert (tmp_path / "gradclip" / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_replay_of_others_side_by_side(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path)
    assert main(["replay", str(tmp_path), "--clip", "1.0", "--clip", "adagc", "--out", str(tmp_path / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (one,) = [line for line in lines if line.split()[:1] == ["1.0"]]
    assert one.split()[1:6] == ["1.7%", "0.993", "2", "of", "2"] or one.split()[1] == "1.7%"
    assert any(line.split()[:1] == ["adagc"] and "by parameter" in line for line in lines)
    assert (tmp_path / "a.png").exists()


def test_replay_of_updates(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path)
    save(record_by_hand(norms_of() * 10), tmp_path, place="update")
    assert main(["replay", str(tmp_path), "--clip", "1.0", "--place", "update"]) == 0
    assert "100.0%" in capsys.readouterr().out


def test_suggest(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path)
    assert main(["suggest", str(tmp_path), "--rate", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "global_norm:max_norm=" in said
    assert "10.0%" in said


def test_list_has_everything(capsys) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in strategy_names() + preset_names())
    assert "z_threshold=2.5" in said


def test_a_replay_without_a_strategy_says_whose_it_took(tmp_path, capsys) -> None:
    record = record_by_hand(norms_of())
    save(record_by_hand(norms_of(), meta={**record.meta, "spec": "adaptive"}), tmp_path)
    assert main(["replay", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "without --clip the run's own strategy is taken, and agc cannot be replayed" in said
    assert main(["replay", str(tmp_path), "--clip", "agc"]) == 2
    assert capsys.readouterr().err.startswith("hf-gradclip replay: agc cannot be replayed")


def test_a_reader_that_has_seen_enough() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hf_gradclip", "list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["replay", "RUN", "--clip", "value:max_value=1"], "value cannot be replayed"),
        (["replay", "RUN", "--clip", "zclap"], "Did you mean zclip?"),
        (["replay", "RUN", "--place", "update"], "holds no record of the update"),
        (["replay", "NOTHING"], "holds no record"),
        (["report", "NOTHING"], "holds no record"),
        (["report", "EMPTY"], "Train with clip={'gradient': 'adaptive', 'record': True}, --record true"),
        (["suggest", "RUN", "--rate", "2"], "must be a share between 0 and 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, reason, tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(tmp_path / "run"), "NOTHING": str(tmp_path), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_command_is_installed(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_gradclip.cli", "suggest", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "holds no record" in done.stderr
