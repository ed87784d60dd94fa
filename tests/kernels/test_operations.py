"""Every language has every operation under its declared name, with the declared arguments; see operations.py."""

from __future__ import annotations

import inspect

import pytest

from hf_gradclip import kernels
from hf_gradclip.kernels.operations import ByUnit, Step, Whole
from tests.kernels.languages import NAMES, language

FILES = {"whole": Whole, "units": ByUnit, "step": Step}
OPERATIONS = [(file, name) for file, protocol in FILES.items() for name in vars(protocol) if not name.startswith("_")]


def declared(file: str, name: str) -> inspect.Signature:
    signature = inspect.signature(getattr(FILES[file], name))
    return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self


def test_nothing_is_forgotten():
    assert len(OPERATIONS) == 9
    assert {name for _, name in OPERATIONS} == {
        "statistics", "apply_", "serves", "unit_sums", "unit_apply_", "prepare", "measure_update", "step_",
    }  # fmt: skip


@pytest.mark.parametrize(("file", "name"), OPERATIONS)
@pytest.mark.parametrize("of", NAMES)
def test_as_declared(of, file, name):
    module = getattr(language(of), file)
    found, wanted = inspect.signature(getattr(module, name)), declared(file, name)
    if name == "prepare":  # one that always makes a table says so, and one that never does
        assert found.return_annotation in ("Table", "None")
        found = found.replace(return_annotation=wanted.return_annotation)
    assert found == wanted
    assert getattr(module, name).__module__ == module.__name__


@pytest.mark.parametrize(("file", "name"), [pair for pair in OPERATIONS if pair[1] != "serves"])
def test_as_chosen(file, name):
    """What the package offers takes the same arguments, whichever language serves; a step also what that made ready."""
    offered, wanted = inspect.signature(getattr(kernels, name)), declared(file, name)
    if file == "step":
        *first, ready = offered.parameters.values()
        assert (ready.name, ready.default) == ("before" if name == "prepare" else "ready", None)
        wanted = wanted.replace(parameters=[p for p in wanted.parameters.values() if p.name != "table"])
        offered = offered.replace(parameters=first)
        if name == "prepare":
            assert offered.return_annotation == "Ready"
            wanted = wanted.replace(return_annotation="Ready")
    assert offered == wanted
