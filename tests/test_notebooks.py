"""The notebooks run as they are, from the first cell to the last, and are kept without what they printed."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def cells_of(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]


def run(name: str) -> tuple[dict[str, Any], list[Any]]:
    """The names that a notebook leaves behind, and what its cells show."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for i, cell in enumerate(cells_of(name)):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{name}[{i}]", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"{name}[{i}]", "eval"), names))
    return names, shown


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.ipynb"))])
def test_a_notebook_is_kept_without_what_it_printed(name) -> None:
    code = [cell for cell in cells_of(name) if cell["cell_type"] == "code"]
    assert len(code) > 3
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_a_first_run(capsys) -> None:
    names, shown = run("first_run")
    assert names["report"].summary["steps"] == 100
    assert names["report"].summary["clipped"] > 0
    assert "<img" in shown[0]._repr_html_()
    assert shown[1:] == [names["report"].summary, 0]
    assert Path("outputs/first_run/gradclip/report.html").exists()


def test_choose_a_threshold(capsys) -> None:
    """One step in twenty is what the replay promises, and about what the run with it clips."""
    names, shown = run("choose_a_threshold")
    assert names["wanted"].spec.startswith("global_norm:max_norm=")
    assert names["wanted"].rate == pytest.approx(0.05, abs=0.01)
    assert 0 < names["report"].summary["rate"] < 0.2
    assert "global_norm:max_norm=" in capsys.readouterr().out
    assert Path("outputs/compared.html").exists()
    assert [status for status in shown if isinstance(status, int)] == [0, 0, 0]
