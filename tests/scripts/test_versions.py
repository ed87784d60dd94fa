"""The table of versions: what it asks pip for, and what it reads of pytest. No environment is made here."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("versions", None)
    return importlib.import_module("versions")


def test_constraints_differ_in_what_a_row_changes(script) -> None:
    text = "torch==2.13.0\naccelerate==1.15.0\n# words\n"
    changed = script.constraints(text, {"accelerate": "1.11.0", "peft": ">=0.21"})
    assert changed.splitlines() == ["torch==2.13.0", "# words", "accelerate==1.11.0", "peft>=0.21"]
    assert script.constraints(text, {}) == text


@pytest.mark.parametrize(
    ("said", "count", "names"),
    [
        ("....\n4 passed in 1.20s\n", (4, 0), []),
        ("====== 3 passed, 2 warnings in 61.20s (0:01:01) ======\n", (3, 0), []),
        (
            "FAILED tests/a.py::T::test_x[1] - E\nERROR tests/b.py::test_y\n1 failed, 7 passed, 1 error in 2.00s\n",
            (7, 2),
            ["tests/a.py::T::test_x[1]", "tests/b.py::test_y"],
        ),
        ("no tests ran in 0.1s\n", None, []),
        ("ImportError\n", None, []),
    ],
)
def test_the_end_of_pytest_is_read(script, said, count, names) -> None:
    assert script.read(said) == (count, names)


def test_the_table(script) -> None:
    good = script.Row("pinned", {"torch": "2.13.0"}, counts={"core": (5, 0)})
    bad = script.Row(
        "x", {"torch": "2.8.0"}, counts={"core": (3, 2), "ddp": None}, failed=[f"a::t{i}" for i in range(6)]
    )
    none = script.Row("transformers-5.24", why="needs peft>=0.22")
    assert script.table([good, bad, none], ["core", "ddp"]).splitlines() == [
        "| versions | core | ddp | what fails |",
        "|---|---|---|---|",
        "| torch 2.13.0 | 5 passed | - |  |",
        "| torch 2.8.0 | 3 passed, 2 failed | - | t0, t1, t2, t3 and 2 more |",
        "| transformers-5.24 | - | - | does not install: needs peft>=0.22 |",
    ]


def test_over_an_environment_only_what_differs_is_installed(script, tmp_path) -> None:
    over, folder = tmp_path / "over", tmp_path / "new"
    for place in (over, folder):
        (place / "lib/python3.12/site-packages").mkdir(parents=True)
    script.ROWS["other"] = {"accelerate": "1.11.0", "peft": ">=0.21"}
    words = script.wanted("other", folder, over)
    assert words == ["-c", str(folder / "constraints.txt"), "-e", f"{ROOT}[test]", "peft>=0.21"]
    assert "accelerate==1.11.0\npeft>=0.21\n" in (folder / "constraints.txt").read_text("utf-8")
    there = folder / "lib/python3.12/site-packages/over.pth"
    assert there.read_text("utf-8") == f"{over / 'lib/python3.12/site-packages'}\n"


def test_the_oldest_row_has_what_runs_the_tests_and_no_extra_of_triton(script, tmp_path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer read pyproject.toml")
    _, _, _, package, *tools = script.wanted("oldest", tmp_path, None)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["test"]
    brought = {*package.partition("[")[2].rstrip("]").split(",")}
    assert brought == {*extras[0].partition("[")[2].rstrip("]").split(",")} - {"triton"}
    assert {re.split("[<>=]", tool)[0] for tool in extras[1:]} <= {*tools}


def test_the_tests_that_are_run_are_there(script) -> None:
    assert [path for paths in script.PARTS.values() for path in paths if not (ROOT / path).exists()] == []


def test_rows_change_packages_that_are_pinned(script) -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()}
    assert {name for changes in script.ROWS.values() for name in changes} <= pinned
