"""Which norm stands out among those before it: one rule for the strategies that act on it and the record that shows it.

Norms spread by factors, so they are judged by their logarithm l, against the median m of the last WINDOW ones. They
are kept raw, outliers included: the median does not heed a few of them, and after half a window of a new level it is
the new level. A norm stands out where l > m + r, with the reach

    r = max(min(DEVIATIONS s, FARTHEST), min(max(BEYOND (o - m), LEAST), MOST)),  s = 1.4826 median |l_i - m|

and o the OFTEN-th largest of them. So norms that spread widely may go DEVIATIONS of their robust deviations, up to
FARTHEST; what came OFTEN times in a window is a second kind of batch, or a level that rises, and no outlier up to MOST;
and nothing stands out below LEAST, however even the run. Before SETTLED norms are known the reach is at least MOST,
before FEW infinite. No absolute number of the norm's own unit is in it: norms times a constant are judged alike.

The arithmetic is written once, for arrays of NumPy and of torch: for 64 numbers on a CPU, NumPy's calls take a fraction
of the time of torch's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_gradclip.types import Layout

WINDOW = 64
DEVIATIONS = 5.0
OFTEN = 4
BEYOND = 1.5
LEAST = math.log(3)
MOST = math.log(8)
FARTHEST = math.log(30)
SETTLED = 16
FEW = 2


class Past(NamedTuple):
    """Logarithms of the last norms of one thing.

    Args:
        seen: how many were ever put in, int64, 0-d.
        logs: the ring, shape (WINDOW,); inf where nothing was put in yet.
    """

    seen: Tensor
    logs: Tensor


class Pasts(NamedTuple):
    """The same of many things, shapes (S,) and (S, WINDOW)."""

    seen_S: Tensor
    logs_S: Tensor


AnyPast = TypeVar("AnyPast", Past, Pasts)


def nothing_seen(layout: Layout) -> Past:
    """The past of the whole before its first norm."""
    return Past(*_empty((), layout))


def nothing_seen_each(layout: Layout) -> Pasts:
    """The past of every segment before its first norm."""
    return Pasts(*_empty((len(layout),), layout))


def _empty(shape: tuple[int, ...], layout: Layout) -> tuple[Tensor, Tensor]:
    seen = torch.zeros(shape, dtype=torch.int64, device=layout.device)
    return seen, torch.full((*shape, WINDOW), float("inf"), dtype=layout.dtype, device=layout.device)


def judge(past: AnyPast, norm: Tensor) -> tuple[Tensor, Tensor, AnyPast]:
    """Judge norms by those before them. Pure, without a host read.

    Args:
        past: without these norms.
        norm: 0-d, or shape (S,) for as many pasts.

    Returns:
        Of the shape of `norm`: the most that is left of it, the median where it stands out and inf elsewhere; and the
        norm above which it would. Then the past with it, where it is neither 0 nor infinite nor NaN.
    """
    seen, logs = past
    if norm.device.type == "cpu":
        with np.errstate(divide="ignore", invalid="ignore"):  # a norm of 0, a ring with nothing in it
            found = _judge(np, seen.numpy(), logs.numpy(), np.log(norm.numpy()))
        cap, begin, seen, logs = (torch.from_numpy(np.asarray(array)) for array in found)
    else:
        cap, begin, seen, logs = _judge(torch, seen, logs, norm.log())
    return cap, begin, type(past)(seen, logs)


def ordinary(seen_S: np.ndarray, logs_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is usual, of many pasts: the median of the logarithms and the reach above it, shapes (S,).

    Args:
        seen_S: how many norms each has seen.
        logs_S: their rings, shape (S, WINDOW), inf where nothing was put in.
    """
    with np.errstate(invalid="ignore"):
        median_S, reach_S = _ordinary(np, seen_S, logs_S)
    return median_S, reach_S


def _judge(arrays: Any, seen: Any, logs: Any, log: Any) -> tuple[Any, Any, Any, Any]:
    """The work of `judge`; `arrays` is the library, numpy or torch."""
    median, reach = _ordinary(arrays, seen, logs)
    limit = median + reach
    cap = arrays.exp(arrays.where(log > limit, median, math.inf))
    finite = arrays.isfinite(log)
    written = (_places(arrays, logs) == (seen % WINDOW)[..., None]) & finite[..., None]
    return cap, arrays.exp(limit), seen + finite, arrays.where(written, log[..., None], logs)


def _ordinary(arrays: Any, seen: Any, logs: Any) -> tuple[Any, Any]:
    known = _between(seen, 1, WINDOW)
    ordered = _sorted(logs)
    median = _middle(ordered, known)
    away = _sorted(abs(logs - median[..., None]))
    often = _at(ordered, _between(known - OFTEN, 0, WINDOW)) - median
    least = arrays.where(seen < SETTLED, MOST, _between(BEYOND * often, LEAST, MOST))
    reach = arrays.maximum(least, _between(DEVIATIONS * 1.4826 * _middle(away, known), 0, FARTHEST))
    return median, arrays.where(seen < FEW, math.inf, reach)


def _middle(ordered: Any, known: Any) -> Any:
    """The median of the first `known` of ordered numbers."""
    return (_at(ordered, (known - 1) // 2) + _at(ordered, known // 2)) / 2


def _between(array: Any, low: float, high: float) -> Any:
    return array.clamp(low, high) if isinstance(array, Tensor) else np.minimum(np.maximum(array, low), high)


def _sorted(array: Any) -> Any:
    return array.sort(-1).values if isinstance(array, Tensor) else np.sort(array, -1)


def _at(ordered: Any, place: Any) -> Any:
    if isinstance(ordered, Tensor):
        return ordered.gather(-1, place[..., None])[..., 0]
    return ordered[place] if ordered.ndim == 1 else np.take_along_axis(ordered, place[..., None], -1)[..., 0]


def _places(arrays: Any, logs: Any) -> Any:
    return arrays.arange(WINDOW, device=logs.device) if isinstance(logs, Tensor) else np.arange(WINDOW)
