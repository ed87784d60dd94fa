"""Steps whose norm stands out, found when the record is written, each with what can be said of its cause.

A norm is judged as the strategy `adaptive_norm` judges it, by `hf_gradclip.outlier`. Its score z is how far its
logarithm lies above the median, where DEVIATIONS is the distance at which it begins to stand out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.outlier import DEVIATIONS, WINDOW, ordinary

TOP = 10
AT_ONCE = 10_000
KEPT = 1000
"""Files of spikes that a rank keeps, the latest; the record itself has the norms of all."""


@dataclass(frozen=True)
class Spike:
    """A row of the columns it was found in, and how far its norm stands out; inf for a norm that is not finite."""

    row: int
    z: float


def known(norms: Iterable[float]) -> list[float]:
    """Those that say something of the norms to come: finite, and not 0."""
    return [norm for norm in norms if 0 < norm < math.inf]


def judged(norms: np.ndarray, finite: np.ndarray) -> list[float]:
    """Norms of a record as `find_spikes` and `known` take them: inf for each that counted as not finite."""
    found: list[float] = np.where(finite, norms, np.inf).tolist()
    return found


def find_spikes(norms: Sequence[float], before: Sequence[float]) -> list[Spike]:
    """The new norms that stand out among the last ones before each.

    Args:
        norms: of steps that follow each other.
        before: of the steps before the first of them, the latest last; WINDOW finite ones that are not 0 suffice.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([*before, *norms], dtype=np.float64))
    finite = np.isfinite(logs)
    seen = (np.cumsum(finite) - finite)[len(before) :]
    padded = np.concatenate([np.full(WINDOW, np.inf), logs[finite]])
    rings, logs = np.lib.stride_tricks.sliding_window_view(padded, WINDOW), logs[len(before) :]
    spikes = []
    for first in range(0, len(norms), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        median, reach = ordinary(seen[rows], rings[seen[rows]])
        with np.errstate(invalid="ignore"):
            z = np.where(np.isneginf(logs[rows]), 0, DEVIATIONS * (logs[rows] - median) / reach)
        z = np.where(np.isinf(reach), 0, np.where(np.isnan(logs[rows]), np.inf, z))  # too few are known, or NaN
        spikes += [Spike(first + int(i), float(z[i])) for i in np.flatnonzero(z > DEVIATIONS)]
    return spikes


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
    """One file per spike and rank: `spikes/step_N.json` of rank 0, `step_N_rank1.json` of the others; KEPT of each."""
    folder = folder / "spikes"
    folder.mkdir(parents=True, exist_ok=True)
    ending = "" if rank == 0 else f"_rank{rank}"
    path = folder / f"step_{found['step']}{ending}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    aside.replace(path)
    named = (re.fullmatch(rf"step_(\d+){ending}\.json", other.name) for other in folder.iterdir())
    for step in sorted(int(match[1]) for match in named if match)[:-KEPT]:
        (folder / f"step_{step}{ending}.json").unlink(missing_ok=True)


def read_spike(path: Path) -> dict[str, Any]:
    """What `write_spike` wrote.

    Raises:
        ValueError: for a file that is none of its.
    """
    try:
        spike = json.loads(path.read_text("utf-8"))
        numbers = [spike[key] for key in ("norm", "z", "loss")] + [tensor["share"] for tensor in spike["tensors"]]
        words = [tensor["name"] for tensor in spike["tensors"]]
        sound = (
            type(spike["step"]) is int
            and type(spike["rank"]) is int
            and all(number is None or number == "inf" or type(number) in (int, float) for number in numbers)
            and all(isinstance(word, str) for word in words)
            and isinstance(spike["examples"], (list, str))
            and isinstance(text := spike.get("text", []), list)
            and all(isinstance(word, str) for word in text)
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path.name} is no file of a spike")
    return dict(spike)


def drop_spikes_after(folder: Path, step: int) -> None:
    """Remove the spikes past a step."""
    for path in (folder / "spikes").glob("step_*.json"):
        number = path.stem.split("_")[1]
        if number.isdecimal() and int(number) > step:
            path.unlink(missing_ok=True)


def _plain(value: Any) -> float | str | None:
    """A number as JSON knows it: None for NaN, "inf" for inf."""
    number = float(value)
    return None if math.isnan(number) else "inf" if math.isinf(number) else number
