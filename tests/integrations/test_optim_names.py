"""`optim=` of TrainingArguments; `python -m tests.integrations.optim_names` has those that need more packages."""

from __future__ import annotations

import pytest

from tests.integrations.optim_names import NAMES, row_of

OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
IN_BACKWARD = [name for name in NAMES if name.endswith("layerwise")] + ["lomo", "adalomo"]


@pytest.mark.parametrize("optim", OF_TORCH)
def test_a_tiny_limit_holds(optim) -> None:
    row = row_of(optim)
    assert not row.missing
    assert row.moved < row.free / 100
    assert row.apart < 1e-8


def test_adafactor_which_divides_by_the_gradients_rms_does_what_it_does_under_the_stock_trainer() -> None:
    row = row_of("adafactor")
    assert not row.missing
    assert row.moved > row.free / 2
    assert row.apart < 1e-6


@pytest.mark.parametrize("optim", IN_BACKWARD)
def test_what_steps_in_backward_is_refused_by_name(optim) -> None:
    assert f"TrainingArguments(optim='{optim}'): steps inside backward" in row_of(optim).refused
