"""What one process makes of the batches that the sharded backends share. Some of its steps clip and some do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integrations.sharded import (
    ADAPTIVE,
    BY_TENSOR,
    LOUD,
    OTHERS,
    STRATEGIES,
    UPDATES,
    one_process,
    one_process_update,
)


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    found = {word: one_process(spec) for word, spec in STRATEGIES.items()}
    free = one_process("none")
    for word, run in found.items():
        assert (run["weights"] - free["weights"]).abs().max() > 1e-4, "clipping matters"
        clipped = [rate > 0 for rate in run["rates"]]
        if word in BY_TENSOR:
            assert any(0 < rate < 1 for rate in run["rates"][2:]), "its scales differ between tensors"
            assert min(run["rates"][2:]) < 1
        else:
            assert any(clipped), word
            assert not all(clipped), word
    return found


@pytest.fixture(scope="session")
def others_reference() -> dict[str, Any]:
    found = {word: one_process(spec) for word, spec in OTHERS.items()}
    free = one_process("none")
    for word, run in found.items():
        assert (run["weights"] - free["weights"]).abs().max() > 1e-4, "it matters"
        assert min(run["rates"]) < max(run["rates"]), word
        assert any(0 < rate < 1 for rate in run["rates"]) == (word != "mean_sigma"), "its scales differ between tensors"
    return found


@pytest.fixture(scope="session")
def loud_reference() -> dict[str, Any]:
    found = {word: one_process(word, loud=LOUD) for word in ADAPTIVE}
    free = one_process("none", loud=LOUD)
    for word, run in found.items():
        assert (run["weights"] - free["weights"]).abs().max() > 1e-2, "clipping matters"
        assert run["rates"][5] > 0.9, word  # a layer that is not used has no gradient to be loud
        assert word == "adaptive" or sum(run["rates"]) == run["rates"][5], "nothing but the loud step"
        assert word != "adaptive" or any(0 < rate < 1 for rate in run["rates"])
    return found


@pytest.fixture(scope="session")
def update_reference() -> dict[str, Any]:
    found = {word: one_process_update(*case) for word, case in UPDATES.items()}
    for word, run in found.items():
        assert any(run["rates"][1:]), word
        assert run["rates"][0] == 0, "at a learning rate of 0 nothing moves"
        assert min(run["rates"][1:]) < 1, word
    return found
