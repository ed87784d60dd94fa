"""Steps whose norm stands out, found when the record is written, each with what can be said of its cause.

A norm is judged by the logarithm, since norms spread by factors: z = (log n - median) / sigma over the finite norms of
the last WINDOW steps before it, with sigma = 1.4826 times their median absolute deviation, which a spike among them
does not move, and at least FLOOR, a spread of 5 %, so that a smooth run does not call every ripple a spike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 200
LEAST = 20
FLOOR = 0.05
LIMIT = 6.0
TOP = 10


@dataclass(frozen=True)
class Spike:
    """A row of the columns it was found in, and how far its norm stands out."""

    row: int
    z: float


def robust_z(norm: float, before: Sequence[float]) -> float:
    """How many robust standard deviations the logarithm of a norm lies above that of the norms before it.

    Args:
        norm: > 0; inf and NaN give inf.
        before: the latest last; of more than WINDOW the last count, zero and non-finite ones do not.

    Returns:
        0 while fewer than LEAST norms are known.
    """
    known = np.array([n for n in before[-WINDOW:] if math.isfinite(n) and n > 0])
    if len(known) < LEAST or norm == 0:
        return 0.0
    if not math.isfinite(norm):
        return math.inf
    logs = np.log(known)
    middle = np.median(logs)
    sigma = max(1.4826 * float(np.median(np.abs(logs - middle))), FLOOR)
    return float((math.log(norm) - middle) / sigma)


def find_spikes(norms: Sequence[float], before: Sequence[float]) -> list[Spike]:
    """The new norms that stand out by more than LIMIT; `before` are those of the steps before the first of them."""
    seen = [*before[-WINDOW:], *norms]
    start = len(seen) - len(norms)
    zs = [robust_z(norm, seen[max(0, start + i - WINDOW) : start + i]) for i, norm in enumerate(norms)]
    return [Spike(i, z) for i, z in enumerate(zs) if z > LIMIT]


def describe_spike(spike: Spike, rows: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """What is known of a spike: numbers, and the parameters with the largest share of the squared norm."""
    i = spike.row
    squares = np.nan_to_num(rows["norms"][i].astype(np.float64), nan=np.inf, posinf=np.inf) ** 2
    total = squares.sum()
    with np.errstate(invalid="ignore"):
        shares = squares / total if np.isfinite(total) and total > 0 else np.isinf(squares).astype(float)
    order = np.argsort(-shares, kind="stable")[:TOP]
    numbers = {key: _plain(rows[key][i]) for key in ("norm", "loss", "learning_rate", "threshold")}
    return {
        "step": int(rows["step"][i]),
        "z": _plain(spike.z),
        **numbers,
        "tensors": [{"name": names[p], "norm": _plain(rows["norms"][i, p]), "share": _plain(shares[p])} for p in order],
    }


def write_spike(folder: Path, found: dict[str, Any], rank: int) -> None:
    """One file per spike and rank: `spikes/step_N.json` of rank 0, `step_N_rank1.json` of the others."""
    folder = folder / "spikes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"step_{found['step']}.json" if rank == 0 else f"step_{found['step']}_rank{rank}.json")
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    aside.replace(path)


def drop_spikes_after(folder: Path, step: int) -> None:
    """Remove the spikes past a step."""
    for path in (folder / "spikes").glob("step_*.json"):
        if int(path.stem.split("_")[1]) > step:
            path.unlink(missing_ok=True)


def _plain(value: Any) -> float | str | None:
    """A number as JSON knows it: None for NaN, "inf" for inf."""
    number = float(value)
    return None if math.isnan(number) else "inf" if math.isinf(number) else number
