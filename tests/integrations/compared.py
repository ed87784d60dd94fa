"""What the tests of sharded backends assert of a launch: against one process, or the same backend's own clip."""

from __future__ import annotations

from typing import Any

import torch

from hf_gradclip import Clipper
from hf_gradclip.state import flatten
from tests.integrations import scenarios
from tests.integrations.ranks import Found
from tests.integrations.sharded import STRATEGIES, Model


def assert_same_update(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (found["weights"] - expected["weights"]).abs().max() < 1e-6
    assert found["rates"] == expected["rates"]


def assert_poisoned(found: dict[str, Any]) -> None:
    seen, never = found["seen"], found["never seen"]
    assert torch.equal(seen["weights"], never["weights"])
    assert seen["counts"]["skipped"] == seen["counts"]["nonfinite"] == 3
    assert never["counts"]["skipped"] == 0
    assert 0 < seen["counts"]["clipped"] == never["counts"]["clipped"] < 47


def differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    norms, theirs = torch.tensor(found["norms"]), torch.tensor(expected["norms"])
    weights = (found["weights"] - expected["weights"]).abs().max().item()
    return ((norms - theirs).abs() / theirs).max().item(), weights


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    norm, weights = differences(found, expected)
    assert norm < 1e-6
    assert weights < 1e-6
    assert found["rates"] == expected["rates"]


def assert_skipped(found: Found, name: str) -> None:
    for case in ("strategy sgd", "nan sgd", *(f"nan {kind}" for kind in scenarios.STEPPED)):
        run, word = found[f"skips:{name}"][case], case.split()[0]
        assert run["kept"], "moments and counters, bit for bit"
        assert run["moved"] == [True, True, False, True, True]
        assert run["said"] == [False, False, True, False, False]
        assert run["counts"]["clip/skipped"] == 1
        assert run["counts"]["clip/nonfinite"] == (word == "nan")
        assert (run["norms"][2] < 1) == (word == "strategy"), "the reported norm stays the true one"


def assert_policies(found: Found, name: str) -> None:
    run = found[f"policies:{name}"]
    assert (run["raise"]["step"], run["limit"]["step"]) == (2, 4)
    assert "nonfinite='raise'" in run["raise"]["said"]
    assert "3 steps in a row were skipped" in run["limit"]["said"]
    for word in ("raise", "limit"):
        assert "Not finite: " in run[word]["said"]
        assert not run[word]["moved"]


def assert_resumed(found: Found, name: str) -> None:
    assert {"zclip", "groups", "update"} <= found[f"resume:{name}"].keys()
    for word in scenarios.resumed_on(name):
        run = found[f"resume:{name}"][word]
        assert run["state"], "strategy state bitwise equal"
        assert run["norms"]
        assert run["weights"] == 0
        assert any(run["rates"][2:5]), "clipped before the stop, past the warm-up"
        assert any(run["rates"][5:]), "and after it"

        spec = {**STRATEGIES, "adaptive": "adaptive"}.get(word, STRATEGIES["zclip"])
        alone = Clipper.for_model(Model(), spec)
        assert alone.load_state_dict(run["saved"]) == "", "two ranks' state loads into one process"
        counts = [value for key, value in flatten(alone.state).items() if f".{key}".endswith(".seen")]
        assert int(counts[0]) == 5


def assert_bf16(found: Found, reference: dict[str, Any], name: str) -> None:
    """A bf16 number has 8 bits, so a rounding is off by up to 2^-9 = 2e-3; a norm adds thousands of them.

    The same backend's own clip at the same limit sees the same gradients, so global_norm agrees with it to the rounding
    of one coefficient carried through 8 steps. Against the float32 run every strategy stays within a few roundings.
    """
    runs = found[f"bf16:{name}"]
    norm, weights = differences(runs["global_norm"], runs["stock"])
    assert norm < 2e-3
    assert weights < 2e-3
    for word in runs.keys() - {"stock"}:
        norm, weights = differences(runs[word], reference[word])
        assert 1e-6 < norm < 2e-2, "bf16 did run"
        assert weights < 2e-2
