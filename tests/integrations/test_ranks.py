"""The harness of the scenarios itself: one that fails takes no other with it, and says why."""

from __future__ import annotations

import pytest

from tests.integrations.ranks import launch

pytestmark = pytest.mark.dist


def test_a_scenario_that_fails_takes_no_other_with_it(tmp_path) -> None:
    names = ["first", "one rank fails", "second", "dies", "third"]
    ranks = launch(2, "ranks_main", tmp_path, *names)
    assert [[found[name] for name in ("first", "second", "third")] for found in ranks] == [[2, 2, 2], [2, 2, 2]]
    for found in ranks:
        with pytest.raises(AssertionError, match=r"'one rank fails' failed\nrank \d: (.|\n)*ValueError: only here"):
            found["one rank fails"]
        with pytest.raises(AssertionError, match=r"'dies' failed\n(.|\n)*SIGABRT"):
            found["dies"]
        with pytest.raises(KeyError):
            found["nobody asked for it"]


def test_a_module_that_cannot_begin_says_why(tmp_path) -> None:
    with pytest.raises(AssertionError, match=r"is_not_there did not begin 'first'\n(.|\n)*No module named"):
        launch(1, "is_not_there", tmp_path, "first")
