"""What the command line says of strategies: everything that their classes hold, in 80 columns, without rich."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from hf_gradclip.analysis.explain import explain, listing
from hf_gradclip.cli import main
from hf_gradclip.spec import preset_names, strategy_class, strategy_names
from hf_gradclip.strategy import SpecError


@pytest.mark.parametrize("name", strategy_names())
def test_a_strategy_shows_its_fields_and_paper(name) -> None:
    said = explain(name)
    assert said.startswith(f"{name}\n")
    for field in fields(strategy_class(name)):
        assert f"  {field.name} (" in said
    assert "\n\nCost: one read of the gradients" in said
    assert ("Paper\n" in said) == ("References:" in (strategy_class(name).__doc__ or ""))
    assert [line for line in said.splitlines() if len(line) > 80 and ">>>" not in line and "[" not in line] == []


def test_what_is_said_of_some() -> None:
    assert "warmup_steps (default 25): norms collected" in explain("zclip")
    assert "past.logs (64)" in explain("zclip")
    assert "gamma_S (S)" in explain("adagc")
    assert "logs_S (S x 64)" in explain("adaptive_tensors")
    assert "a number per row" in " ".join(explain("agc").split())
    assert "FSDP1" in explain("agc")
    assert "last in a chain" in explain("value")
    assert "max_value (no default)" in explain("value")
    assert "not for updates" in explain("skip_step")
    assert "two reductions" in explain("global_norm") or "one reduction" in explain("global_norm")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_shows_what_it_is(name) -> None:
    said = explain(name)
    assert said.startswith(f"{name} (a preset)")
    assert "hf-gradclip explain " in said


def test_an_unknown_word_is_named(capsys) -> None:
    with pytest.raises(SpecError, match="Did you mean zclip"):
        explain("zclap")
    assert main(["explain", "zclap"]) == 2
    assert "Did you mean zclip?" in capsys.readouterr().err


def test_the_list_has_everything() -> None:
    said = listing()
    for name in (*strategy_names(), *preset_names()):
        assert f"\n{name}\n" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("command", [["list"], ["explain", "adagc"]])
def test_neither_needs_rich(command) -> None:
    code = "import sys; sys.modules['rich'] = None; from hf_gradclip.cli import main; sys.exit(main(sys.argv[1:]))"
    found = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "adagc" in found.stdout
