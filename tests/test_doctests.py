"""The examples in the docstrings give what they say. Every strategy has one."""

from __future__ import annotations

import doctest
import importlib

import pytest

from hf_gradclip.preview import preview
from hf_gradclip.spec import strategy_class, strategy_names
from hf_gradclip.strategies.global_norm import GlobalNorm


@pytest.mark.parametrize("name", strategy_names())
def test_a_strategys_example(name: str) -> None:
    kind = strategy_class(name)
    module = importlib.import_module(kind.__module__)
    examples = doctest.DocTestFinder().find(kind, kind.__name__, globs={**vars(module), "preview": preview})
    run = doctest.DocTestRunner()
    results = [run.run(example) for example in examples if example.examples]
    assert sum(result.attempted for result in results) >= 1, f"{kind.__name__} has no example"
    assert all(result.failed == 0 for result in results)


def test_previews_example() -> None:
    globs = {"preview": preview, "GlobalNorm": GlobalNorm}
    (example,) = doctest.DocTestFinder().find(preview, "preview", globs=globs)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=1)
