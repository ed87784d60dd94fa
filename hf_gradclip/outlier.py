"""Which norm stands out among those before it: one rule for the strategies that act on it and the record that shows it.

Norms spread by factors, so they are judged by their logarithm l, against the median m of the last WINDOW ones. They
are kept raw, outliers included: the median does not heed a few of them, and after half a window of a new level it is
the new level. A norm stands out where l > m + r, with the reach

    r = max(min(DEVIATIONS s, FARTHEST), min(max(BEYOND (o - m), LEAST), MOST)),  s = 1.4826 median |l_i - m|

and o the OFTEN-th largest of them. So norms that spread widely may go DEVIATIONS of their robust deviations, up to
FARTHEST; what came OFTEN times in a window is a second kind of batch, or a level that rises, and no outlier up to MOST;
and nothing stands out below LEAST, however even the run. Before SETTLED norms are known the reach is at least MOST,
before FEW infinite. No absolute number of the norm's own unit is in it: norms times a constant are judged alike.

The arithmetic is written once, for what torch, NumPy and Python's floats have in common. Of the 64 numbers of one thing
on a CPU, floats take a third of the time of NumPy's calls, and these a fraction of torch's.
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
    if norm.device.type != "cpu":
        cap, begin, seen, logs = _judge(_Torch, seen, logs, norm.log())
    elif norm.ndim == 0:
        cap, begin, count, ring = _judge(_Floats, int(seen), logs.tolist(), _Floats.log(float(norm)))
        cap, begin = torch.from_numpy(np.array((cap, begin))).unbind()
        seen, logs = torch.from_numpy(np.array(count)), torch.from_numpy(np.array(ring))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # a norm of 0, a ring with nothing in it
            found = _judge(_NumPy, seen.numpy(), logs.numpy(), np.log(norm.numpy()))
        cap, begin, seen, logs = (torch.from_numpy(array) for array in found)
    return cap, begin, type(past)(seen, logs)


def ordinary(seen_S: np.ndarray, logs_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is usual, of many pasts: the median of the logarithms and the reach above it, shapes (S,).

    Args:
        seen_S: how many norms each has seen.
        logs_S: their rings, shape (S, WINDOW), inf where nothing was put in.
    """
    with np.errstate(invalid="ignore"):
        median_S, reach_S = _ordinary(_NumPy, seen_S, logs_S)
    return median_S, reach_S


def _judge(of: Any, seen: Any, logs: Any, log: Any) -> tuple[Any, Any, Any, Any]:
    """The work of `judge`; `of` is the library: _Torch, _NumPy or _Floats."""
    median, reach = _ordinary(of, seen, logs)
    limit = median + reach
    finite = of.isfinite(log)
    cap = of.exp(of.where(log > limit, median, math.inf))
    return cap, of.exp(limit), seen + finite, of.put(logs, seen % WINDOW, log, finite)


def _ordinary(of: Any, seen: Any, logs: Any) -> tuple[Any, Any]:
    known = of.between(seen, 1, WINDOW)
    ordered = of.sorted(logs)
    median = _middle(of, ordered, known)
    away = of.sorted(of.away(logs, median))
    often = of.at(ordered, of.between(known - OFTEN, 0, WINDOW)) - median
    least = of.where(seen < SETTLED, MOST, of.between(BEYOND * often, LEAST, MOST))
    reach = of.maximum(least, of.between(DEVIATIONS * 1.4826 * _middle(of, away, known), 0, FARTHEST))
    return median, of.where(seen < FEW, math.inf, reach)


def _middle(of: Any, ordered: Any, known: Any) -> Any:
    """The median of the first `known` of ordered numbers."""
    return (of.at(ordered, (known - 1) // 2) + of.at(ordered, known // 2)) / 2


class _Torch:
    """One past or many, on any device; nobody reads a number."""

    exp, where, maximum, isfinite = torch.exp, torch.where, torch.maximum, torch.isfinite

    @staticmethod
    def between(number: Tensor, low: float, high: float) -> Tensor:
        return number.clamp(low, high)

    @staticmethod
    def sorted(logs: Tensor) -> Tensor:
        return logs.sort(-1).values

    @staticmethod
    def away(logs: Tensor, median: Tensor) -> Tensor:
        return (logs - median[..., None]).abs()

    @staticmethod
    def at(ordered: Tensor, place: Tensor) -> Tensor:
        return ordered.gather(-1, place[..., None])[..., 0]

    @staticmethod
    def put(logs: Tensor, place: Tensor, log: Tensor, finite: Tensor) -> Tensor:
        """The ring with one more logarithm, if it is finite."""
        here = torch.arange(WINDOW, device=logs.device) == place[..., None]
        return torch.where(here & finite[..., None], log[..., None], logs)


class _NumPy:
    """Many pasts."""

    exp, where, maximum, isfinite = np.exp, np.where, np.maximum, np.isfinite

    @staticmethod
    def between(number: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.minimum(np.maximum(number, low), high)

    @staticmethod
    def sorted(logs: np.ndarray) -> np.ndarray:
        return np.sort(logs, -1)

    @staticmethod
    def away(logs: np.ndarray, median: np.ndarray) -> np.ndarray:
        return np.abs(logs - median[..., None])

    @staticmethod
    def at(ordered: np.ndarray, place: np.ndarray) -> np.ndarray:
        return np.take_along_axis(ordered, place[..., None], -1)[..., 0]

    @staticmethod
    def put(logs: np.ndarray, place: np.ndarray, log: np.ndarray, finite: np.ndarray) -> np.ndarray:
        here = np.arange(WINDOW) == place[..., None]
        return np.where(here & finite[..., None], log[..., None], logs)


class _Floats:
    """One past. NumPy's log and exp, so that it is judged as one of many, to the bit."""

    maximum, isfinite, sorted = max, math.isfinite, sorted

    @staticmethod
    def log(norm: float) -> float:
        return float(np.log(norm)) if norm > 0 else -math.inf if norm == 0 else math.nan

    @staticmethod
    def exp(log: float) -> float:
        if 709 < log < math.inf:  # near the largest number, or above it
            with np.errstate(over="ignore"):
                return float(np.exp(log))
        return float(np.exp(log))

    @staticmethod
    def where(condition: bool, then: float, other: float) -> float:
        return then if condition else other

    @staticmethod
    def between(number: float, low: float, high: float) -> float:
        return min(max(number, low), high)

    @staticmethod
    def away(logs: list[float], median: float) -> list[float]:
        return [abs(log - median) for log in logs]

    @staticmethod
    def at(ordered: list[float], place: int) -> float:
        return ordered[place]

    @staticmethod
    def put(logs: list[float], place: int, log: float, finite: bool) -> list[float]:
        return [*logs[:place], log, *logs[place + 1 :]] if finite else logs
