"""A record is somebody's file: nothing that it names is run or believed, and what is odd in it is shown as it is."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_gradclip.analysis.report import write_report
from hf_gradclip.cli import main
from hf_gradclip.record.files import FOLDER, read_record
from tests.analysis.records import norms_of, record_by_hand, save

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from dataclasses import dataclass
from hf_gradclip import Strategy
from hf_gradclip.strategy import Needs, Stateless
from hf_gradclip.types import ClipPlan


@dataclass(frozen=True)
class Halve(Strategy):
    needs = Needs()
    warmup_steps: int = 30

    def init(self, layout):
        return Stateless()

    def update(self, stats, state):
        return ClipPlan(stats.sumsq_S.new_full((), 0.5)), state
"""


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file where it is imported, and a YAML file that names it."""
    marker = tmp_path / "was_imported"
    (tmp_path / "trap_module.py").write_text(CODE.format(marker=str(marker)))
    (tmp_path / "trap.yaml").write_text("trap_module.Halve\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield marker
    sys.modules.pop("trap_module", None)


@pytest.mark.parametrize("spec", ["trap_module.Halve", "zclip+trap_module.Halve", "trap.yaml", "trap_module.Halve:a=1"])
@pytest.mark.parametrize("command", [["report"], ["report", "--text"], ["replay"], ["suggest"]])
def test_no_module_that_a_record_names_is_imported(tmp_path, trap, capsys, spec, command) -> None:
    meta = {**record_by_hand(norms_of()).meta, "spec": spec, "config": spec}
    scales = np.where(np.arange(120) % 3 == 0, 0.5, 1.0)[:, None] * np.ones((1, 4))
    save(record_by_hand(norms_of(), scales, meta=meta), tmp_path / "run")
    status = main([*command, str(tmp_path / "run")])
    assert not trap.exists()
    assert status == (2 if command == ["replay"] else 0)
    said = capsys.readouterr()
    if command == ["replay"]:
        assert f"{spec!r}, which is no strategy of hf_gradclip" in said.err
        assert f"If you trust it, name it: --clip {spec}." in said.err


def test_a_person_may_name_it(tmp_path, trap, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path / "run")
    assert main(["replay", str(tmp_path / "run"), "--clip", "trap_module.Halve"]) == 0
    assert trap.exists()
    assert "100.0%" in capsys.readouterr().out


ODD = ("[bold]w[/bold]", "[red]x", "a\x1b[2Jb\x07", "cost$$", "a$x^{$.weight", "c\\$d$", "e\nf", "g\u202eh")
SHOWN = ("[bold]w[/bold]", "[red]x", "a\\x1b[2Jb\\x07", "cost$$", "a$x^{$.weight", "c\\$d$", "e\\nf", "g\\u202eh")


def odd_record(**changes):
    norms = np.abs(np.random.default_rng(0).standard_normal((60, len(ODD)))) + 0.1
    return record_by_hand(norms, names=ODD, **changes)


def test_names_in_the_terminal_are_shown_as_they_are(tmp_path, capsys) -> None:
    """No markup is lost in a name, and no byte of one reaches the terminal that could move its cursor."""
    record = odd_record()
    meta = {**record.meta, "config": "none \x1b]0;title\x07 [red]"}
    save(odd_record(meta=meta), tmp_path / "run")
    assert main(["report", "--text", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for name in (*SHOWN, "none \\x1b]0;title\\x07 [red]"):
        assert name in said
    assert not [char for char in said if not char.isprintable() and char != "\n"]


def test_an_error_is_one_line_of_printable_words(tmp_path, capsys) -> None:
    (tmp_path / "a\x1b[2J\nb").mkdir()
    assert main(["report", str(tmp_path / "a\x1b[2J\nb")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a\\x1b[2J\\nb: holds no record" in said


@pytest.mark.filterwarnings("error")
def test_names_with_dollars_in_pictures(tmp_path) -> None:
    """Matplotlib reads what lies between two of them as a formula, and raises over most names."""
    for run in ("cost$$", "a$x^{$"):
        save(odd_record(), tmp_path / run)
    assert main(["report", str(tmp_path / "cost$$"), str(tmp_path / "a$x^{$"), "--out", str(tmp_path / "out")]) == 0
    assert main(["replay", str(tmp_path / "cost$$"), "--clip", "global_norm:max_norm=0.5"]) == 0


def test_a_name_in_a_picture_has_its_dollars() -> None:
    """What is drawn for a name is what is drawn for it where matplotlib reads no formulas at all."""
    from matplotlib.figure import Figure

    from hf_gradclip.analysis.curves import label

    def drawn(text: str, parse: bool) -> bytes:
        figure = Figure(figsize=(3, 1))
        figure.text(0.1, 0.5, text, parse_math=parse)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="raw")
        return buffer.getvalue()

    for name in ("cost$$", "a$x$", "one$", "c$d\\$e$", "plain"):
        assert drawn(label(name), True) == drawn(name, False), name


SPIKE = {"step": 61, "norm": 7.5, "z": 12.0, "loss": 5.0, "learning_rate": 1e-3, "threshold": 1.0, "rank": 0}
SPIKE |= {"tensors": [{"name": "head.weight", "norm": 7.0, "share": 0.87}], "examples": [3, 1, 4]}


MALFORMED = (
    "",
    "{",
    "[]",
    "null",
    "{}",
    json.dumps({**SPIKE, "step": "61"}),
    json.dumps({**SPIKE, "norm": "high"}),
    json.dumps({**SPIKE, "tensors": 5}),
    json.dumps({**SPIKE, "tensors": [{"name": 1, "share": 0.5}]}),
    json.dumps({**SPIKE, "tensors": [{"name": "a"}]}),
    json.dumps({**SPIKE, "examples": None}),
    json.dumps({**SPIKE, "text": "words"}),
    json.dumps({**SPIKE, "text": [None]}),
    json.dumps({key: value for key, value in SPIKE.items() if key != "rank"}),
    "[" * 20_000,
    b"\xff\xfe",
)


@pytest.mark.parametrize("how", [[], ["--text"]])
def test_malformed_spikes_are_left_out_and_said(tmp_path, capsys, how) -> None:
    """Each of them, beside one that is sound."""
    save(record_by_hand(norms_of()), tmp_path)
    folder = tmp_path / FOLDER / "spikes"
    folder.mkdir()
    (folder / "step_61.json").write_text(json.dumps(SPIKE))
    for i, content in enumerate(MALFORMED, start=91):
        (folder / f"step_{i}.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "step_x.json").write_text("{}")
    assert main(["report", str(tmp_path), *how]) == 0
    said = capsys.readouterr().out if how else (tmp_path / FOLDER / "report.html").read_text()
    (left_out,) = re.findall(r"Left out, since it cannot be read: (.*?)\.(?=\s|<)", " ".join(said.split()))
    names, _, more = left_out.partition(" and ")
    assert len(names.split(", ")) + int(more.removesuffix(" more") or 0) == len(MALFORMED) + 1
    assert "step_61.json" not in names
    assert "1 step stands out by the norm (61)" in said
    assert "3, 1, 4" in said


def test_a_part_that_is_none_is_named(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path)
    other = tmp_path / FOLDER / "gradient-000000121-000000130.parquet"
    other.write_bytes(b"PAR1 nothing PAR1")
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{other.name}: cannot be read" in said
    assert "the record then lacks the steps 121 to 130" in said
    other.unlink()
    assert len(read_record(tmp_path)) == 120


def test_the_warm_up_of_a_strategy_that_is_not_here(tmp_path) -> None:
    """It is in the record, so that nobody need ask the strategy."""
    meta = {**record_by_hand(norms_of()).meta, "spec": "elsewhere.Mine", "warmup": 25}
    scales = np.where(np.arange(120) < 18, 0.5, 1.0)[:, None] * np.ones((1, 4))
    save(record_by_hand(norms_of(), scales, meta=meta), tmp_path)
    page = write_report([tmp_path])[0]
    assert "18 of them in the warm-up of 25 steps, later 0%: a safety net." in Path(page).read_text()
