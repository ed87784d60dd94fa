"""Tables in 80 columns: no line is wider, and no name is folded into a column of its own."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from hf_gradclip.analysis.terminal import table_lines
from hf_gradclip.cli import main
from tests.analysis.records import LORA_NAMES, norms_of, record_by_hand, save

COLUMNS = ("tensor", "median norm", "largest", "share", "words")
ROWS = [("a.b", "0.1", "12", "3%", "one two"), ("c" * 30, "0.123", "4", "50%", "three " * 20)]


def test_a_table_that_fits_is_one() -> None:
    lines = table_lines(COLUMNS, [ROWS[0]], 80, "Title", text=(4,))
    assert lines == [
        "",
        "Title",
        "tensor  median norm  largest  share  words",
        "------------------------------------------",
        "a.b             0.1       12     3%  one two",
    ]


def test_else_names_and_words_have_lines_of_their_own() -> None:
    lines = table_lines(COLUMNS, ROWS, 60, text=(4,))
    assert max(map(len, lines)) <= 60
    assert "c" * 30 in lines
    assert lines[lines.index("c" * 30) + 1].split() == ["0.123", "4", "50%"]
    assert " ".join(" ".join(lines[lines.index("c" * 30) + 2 :]).split()) == "words: " + " ".join(["three"] * 20)


def test_a_name_that_is_wider_than_the_terminal_goes_on_after_a_dot() -> None:
    name = ".".join(f"part{i:02}" for i in range(14))
    lines = table_lines(("tensor", "n"), [(name, "1")], 40)
    assert max(map(len, lines)) <= 40
    shown = [line.strip() for line in lines if "part" in line]
    assert "".join(shown) == name
    assert all(line.endswith(".") for line in shown[:-1])


@pytest.mark.parametrize("command", [["report", "--text"], ["replay"], ["suggest"]])
def test_commands_in_80_columns_and_without_rich(tmp_path, capsys, monkeypatch, command) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(sys.modules, "rich", None)
    scales = np.where(np.arange(120) % 3 == 0, 0.5, 1.0)[:, None] * np.ones((1, 4))
    meta = {**record_by_hand(norms_of()).meta, "spec": "zclip:z_threshold=2.5,alpha=0.97,warmup_steps=25"}
    save(record_by_hand(norms_of(), scales, names=LORA_NAMES, meta=meta), tmp_path)
    more = ["--clip", "adagc", "--clip", "embed*=global_norm:max_norm=1;*lora_A*=adaptive_norm;*=zclip:warmup_steps=10"]
    assert main([*command, str(tmp_path), *(more if command == ["replay"] else [])]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    if command == ["report", "--text"]:
        assert all(f"\n{name.removeprefix('base_model.model.')}\n" in said for name in LORA_NAMES)
    if command == ["replay"]:
        assert "\nadagc" in said
