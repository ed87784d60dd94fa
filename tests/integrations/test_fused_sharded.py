"""AdamW's step in Triton's interpreter on the shards of FSDP2, against plain torch in one process.

One launch runs all; the kernels are counted on both ranks, and so are the groups that plain torch would have stepped.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from hf_gradclip.kernels import choice
from tests.integrations.fused_main import GROUPS, RUNS, STEPS, Net, fit
from tests.integrations.ranks import Found, launch
from tests.kernels.languages import serving

pytestmark = pytest.mark.dist
CLIPPED = [word for word in RUNS if word != "without"]
GOOD = STEPS - 1


@pytest.fixture(scope="module")
def on_shards(tmp_path_factory) -> list[Found]:
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    variables = {"TRITON_INTERPRET": "1", choice.VARIABLE: "triton"}
    return launch(2, "fused_main", tmp_path_factory.mktemp("fused"), *RUNS, **variables)


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Any]]:
    """One process, whose parameters are plain; every clipper clips some tensors and leaves some, and both matter."""
    with serving("torch"):
        found = {word: fit(Net(), options, 0, 1)[1] for word, options in RUNS.items()}
    for word in CLIPPED:
        assert (found[word]["weights"] - found["without"]["weights"]).abs().max() > 1e-3
        for prefix, rates in found[word]["rates"].items():
            assert min(rates[:GOOD]) == 0, (word, prefix)
            assert sum(rate > 0 for rate in rates[:GOOD]) >= 2, (word, prefix)
            if word != "global_norm":
                assert any(0 < rate < 1 for rate in rates[:GOOD]), "its scales differ between tensors"
    return found


def runs_of(on_shards: list[Found], word: str) -> list[dict[str, Any]]:
    """What each rank found."""
    return [found[word] for found in on_shards]


def apart(runs: list[dict[str, Any]], expected: dict[str, Any]) -> float:
    """The largest difference of a weight on any rank."""
    return max((run["weights"] - expected["weights"]).abs().max().item() for run in runs)


@pytest.mark.parametrize("word", RUNS)
def test_equals_one_process(on_shards, reference, word) -> None:
    assert apart(runs_of(on_shards, word), reference[word]) < 1e-6
    for run in runs_of(on_shards, word):
        assert run["rates"] == reference[word]["rates"]


@pytest.mark.parametrize("word", RUNS)
def test_the_kernels_stepped_the_shards(on_shards, word) -> None:
    """Every group in every step that was not skipped; measured too if updates are clipped, unless the gradient was."""
    steps = STEPS if word == "without" else GOOD
    counts = {"step_": GROUPS * steps}
    if "update_clip" in RUNS[word]:
        counts["measure_update"] = GROUPS * (STEPS if word == "block_rms" else GOOD)
    for run in runs_of(on_shards, word):
        assert run["sharded"], "parameters and moments are DTensors"
        assert run["counts"] == counts
        assert run["given up"] == []
    assert [run["sizes"] for run in runs_of(on_shards, word)] == [[99, 9, 17], [88, 8, 0]]


@pytest.mark.parametrize("word", CLIPPED)
def test_a_nan_in_one_shard_moves_nothing_on_any_rank(on_shards, word) -> None:
    for run in runs_of(on_shards, word):
        assert run["skipped"] == [False] * GOOD + [True]
        assert run["kept"], "weights, moments and counters, bit for bit"


@pytest.mark.parametrize("word", CLIPPED)
def test_the_comparison_fails_without_the_clip(on_shards, reference, word) -> None:
    """The same fused run with clipping taken out."""
    assert apart(runs_of(on_shards, "without"), reference[word]) > 1e-3
