"""The numbers that a page shows under the pointer, and those of its slider, as JSON that a page may hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_gradclip.analysis.heat import heat_of
from hf_gradclip.analysis.ready import Ready
from hf_gradclip.analysis.run import Run, clipped_steps, total_scale
from hf_gradclip.analysis.tables import outcome_rows
from hf_gradclip.record.files import Record

MOST = 2000
"""Steps of a run whose numbers are in its page; of a longer run one of each so many, the one with the largest norm."""
CLIPPED, SKIPPED, BROKEN = 1, 2, 4


def data_of(runs: Sequence[Run], ready: Sequence[Ready | None]) -> str:
    """What page.js reads; no element can be closed by it."""
    found = [
        {
            "name": run.name,
            "gradient": steps_of(run.gradient),
            "update": None if run.update is None else steps_of(run.update),
            "heat": [_heat(run.gradient, narrow) for narrow in (False, True)],
            "fixed": [] if more is None else outcome_rows(more.fixed),
        }
        for run, more in zip(runs, ready, strict=True)
    ]
    return json.dumps(found, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def kept_rows(record: Record) -> np.ndarray:
    """Which rows of a record are in its page; of a step that was not finite the norm is taken for the largest."""
    every = -(-len(record) // MOST)
    norms = np.where(record.finite_T, record.norm_T, np.inf)
    starts = range(0, len(record), every)
    return np.array([start + int(norms[start : start + every].argmax()) for start in starts])


def steps_of(record: Record) -> dict[str, list[Any]]:
    """Columns of numbers of five digits, null where one is not known, and flags."""
    rows = kept_rows(record)
    flags = CLIPPED * clipped_steps(record) + SKIPPED * record.skipped_T + BROKEN * ~record.finite_T
    columns = {
        "loss": record.loss_T,
        "learning_rate": record.learning_rate_T,
        "norm": record.norm_T,
        "threshold": record.threshold_T,
        "scale": np.where(record.finite_T & ~record.skipped_T, total_scale(record), np.nan),
    }
    found: dict[str, list[Any]] = {name: _short(column[rows]) for name, column in columns.items()}
    return {"step": record.step_T[rows].tolist(), **found, "flags": flags[rows].astype(int).tolist()}


def _heat(record: Record, narrow: bool) -> dict[str, list[Any]]:
    heat = heat_of(record, narrow)
    return {
        "names": heat.names,
        "first": heat.first_B.tolist(),
        "last": heat.last_B.tolist(),
        "norm": [_short(row, 4) for row in heat.norm_RB],
        "broken": [np.flatnonzero(row).tolist() for row in heat.broken_RB],
    }


def _short(numbers: np.ndarray, digits: int = 5) -> list[float | None]:
    return [float(f"{number:.{digits}g}") if math.isfinite(number) else None for number in numbers.tolist()]
