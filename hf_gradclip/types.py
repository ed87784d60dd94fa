"""What flows between the parts: where the numbers belong, what was measured, what to do.

Shape letters: S segments (a segment is a parameter, or one unit of it: an output row, say), P parameters.
The three records hold tensors and know nothing of ranks, backends or strategies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class cached(Generic[T]):  # noqa: N801  (it is written as functools.cached_property is)
    """A property that is computed once, without the lock of functools.cached_property before Python 3.12.

    That lock is one for all objects, and a process that is forked while another thread holds it never gets it.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> cached[T]: ...

    @overload
    def __get__(self, owner: object, kind: type) -> T: ...

    def __get__(self, owner: object, kind: type) -> cached[T] | T:
        if owner is None:
            return self
        value = vars(owner)[self._name] = self._compute(owner)
        return value


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Layout:
    """The segments of a model: the same, in the same order, on every rank.

    Args:
        names: parameter names without wrapper prefixes, length P.
        numel_S: elements per segment of the whole (unsharded) parameter, int64, shape (S,).
        param_S: index into `names` per segment, ascending, int64, shape (S,).
        unit_S: which segments are units, bool, shape (S,); None where every segment is a parameter.
    """

    names: tuple[str, ...]
    numel_S: Tensor
    param_S: Tensor
    unit_S: Tensor | None = None

    @classmethod
    def of_parameters(cls, names: tuple[str, ...], numels: list[int], device: torch.device) -> Layout:
        """One segment per parameter."""
        return cls(
            names=names,
            numel_S=torch.tensor(numels, dtype=torch.int64, device=device),
            param_S=torch.arange(len(names), dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return int(self.numel_S.shape[0])

    @cached
    def by_param(self) -> Layout:
        """The same parameters with one segment each."""
        if self.unit_S is None:
            return self
        zero_P = torch.zeros(len(self.names), dtype=torch.int64, device=self.device)
        places_P = torch.arange(len(self.names), device=self.device)
        return Layout(self.names, zero_P.index_add(0, self.param_S, self.numel_S), places_P)

    @cached
    def on_host(self) -> Layout:
        """The same on the CPU, one object for each layout."""
        return self if self.device.type == "cpu" else self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        unit_S = None if self.unit_S is None else self.unit_S.to(device)
        return Layout(self.names, self.numel_S.to(device), self.param_S.to(device), unit_S)

    @cached
    def with_params_on_host(self) -> Layout:
        """The same segments, with a `by_param` on the CPU; one object for each layout."""
        twin = replace(self)
        vars(twin)["by_param"] = self.by_param.on_host
        return twin

    @cached
    def whole_S(self) -> Tensor | None:
        """Which segments are parameters, the opposite of `unit_S`; None where all of them are."""
        return None if self.unit_S is None else ~self.unit_S

    @cached
    def segments_P(self) -> Tensor:
        """How many segments each parameter has, int64, shape (P,)."""
        zero_P = torch.zeros(len(self.names), dtype=torch.int64, device=self.device)
        return zero_P.index_add(0, self.param_S, torch.ones_like(self.param_S))

    def over_params(self, vector_S: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        """Numbers >= 0 per segment as one per parameter, shape (P,).

        They are added in the same order every time, so that ranks with the same numbers decide the same.
        """
        first = float("inf") if how == "min" else 0.0
        if vector_S.device.type in ("cpu", "cuda"):
            return torch.segment_reduce(vector_S, how, lengths=self.segments_P, initial=first, unsafe=True)
        first_P = vector_S.new_full((len(self.names),), first)
        return first_P.scatter_reduce(0, self.param_S, vector_S, {"sum": "sum", "max": "amax", "min": "amin"}[how])

    def changed_from(self, old: Layout) -> str:
        """In words how these parameters differ from earlier ones; reads sizes to the host."""
        before = dict(zip(old.names, old.by_param.numel_S.tolist(), strict=True))
        now = dict(zip(self.names, self.by_param.numel_S.tolist(), strict=True))
        counts = {
            "new": len(now.keys() - before.keys()),
            "gone": len(before.keys() - now.keys()),
            "resized": sum(before[name] != now[name] for name in now.keys() & before.keys()),
        }
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "replaced by others"
        if len(before) == len(now):
            return f"The {len(now)} trainable parameters changed ({words})"
        return f"The trainable parameters changed, from {len(before)} to {len(now)} ({words})"

    @property
    def device(self) -> torch.device:
        """Where the statistics live."""
        return self.numel_S.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics."""
        return statistics_dtype(self.device)


@dataclass(frozen=True)
class NormStats:
    """One measurement, reduced over ranks, in true (unscaled) units.

    Args:
        sumsq_S: sum of squares per segment, shape (S,); a missing gradient is 0.
        layout: what the segments are.
        max_abs_S: largest absolute element per segment, shape (S,), NaN given as inf; only if asked for.
        loss: of this step, the mean over ranks and micro-batches, 0-d; only if asked for.
        weight_sumsq_S: sum of squares of the weights per segment, shape (S,); only if asked for.
    """

    sumsq_S: Tensor
    layout: Layout
    max_abs_S: Tensor | None = None
    loss: Tensor | None = None
    weight_sumsq_S: Tensor | None = None

    @cached
    def norm_S(self) -> Tensor:
        """2-norm per segment, shape (S,)."""
        return self.sumsq_S.sqrt()

    @cached
    def total(self) -> Tensor:
        """2-norm of the whole gradient, 0-d."""
        return self.sumsq_S.sum().sqrt()

    @cached
    def max_abs(self) -> Tensor:
        """Largest absolute element of the whole gradient, 0-d.

        Raises:
            ValueError: if the strategy did not ask for it with `Needs(max_abs=True)`.
        """
        if self.max_abs_S is None:
            raise ValueError("NormStats.max_abs: not measured. Set needs = Needs(max_abs=True) on the strategy.")
        return self.max_abs_S.amax() if len(self.layout) else self.sumsq_S.new_zeros(())

    @cached
    def by_param(self) -> NormStats:
        """The same measurement with one segment per parameter."""
        layout = self.layout
        if layout.unit_S is None:
            return self

        weights, largest = self.weight_sumsq_S, self.max_abs_S
        return NormStats(
            layout.over_params(self.sumsq_S, "sum"),
            layout.by_param,
            None if largest is None else layout.over_params(largest, "max"),
            self.loss,
            None if weights is None else layout.over_params(weights, "sum"),
        )

    def scaled(self, scale_S: Tensor) -> NormStats:
        """The statistics after the gradients are multiplied by `scale_S`, shape (S,) or 0-d."""
        if is_one(scale_S):
            return self
        max_abs_S = None if self.max_abs_S is None else self.max_abs_S * scale_S
        return replace(self, sumsq_S=self.sumsq_S * scale_S.square(), max_abs_S=max_abs_S)

    def scaled_by_param(self, scale_P: Tensor) -> NormStats:
        """The same with a factor per parameter, shape (P,), or one for all, 0-d; keeps what is known of parameters."""
        if self.layout.unit_S is None or is_one(scale_P):
            return self.scaled(scale_P)
        new = self.scaled(over_segments(scale_P, self.layout))
        vars(new)["by_param"] = self.by_param.scaled(scale_P)
        return new


def norm_after(stats: NormStats, plan: ClipPlan) -> Tensor:
    """The 2-norm of the whole after a plan, 0-d; where elements are bounded the most that it can be."""
    if plan.bound_S is not None:
        most_S = plan.bound_S * stats.layout.numel_S.clamp(min=1).sqrt()  # no bound, inf, times 0 elements were NaN
        most_S = torch.minimum(stats.norm_S * plan.scale_S, most_S)
        return most_S.square().sum().sqrt()
    if plan.scale_S.ndim == 0:
        return stats.total if is_one(plan.scale_S) else stats.total * plan.scale_S
    return torch.dot(stats.sumsq_S, plan.scale_S.to(stats.sumsq_S).square()).sqrt()


def is_one(scale: Tensor) -> bool:
    """Whether this is one number that the host knows to be 1, so that a multiplication by it is left out."""
    return scale.ndim == 0 and scale.is_cpu and float(scale) == 1.0


def over_segments(number_P: Tensor, layout: Layout) -> Tensor:
    """A number per parameter, shape (P,), as one per segment, shape (S,), where the segments are; or one for all."""
    if layout.unit_S is None or number_P.ndim == 0:
        return number_P
    return number_P.to(layout.device)[layout.param_S]


@dataclass(frozen=True)
class ClipPlan:
    """What to do with the gradients: g <- clamp(g * scale, -bound, +bound).

    Args:
        scale_S: factor per segment, finite and > 0, shape (S,), or 0-d for one number that serves all; 1 leaves a
            segment alone, and above 1 it is made larger.
        bound_S: largest absolute element per segment, shape (S,); inf leaves a segment alone.
        threshold: the norm (or value) at which this step begins to clip, 0-d; None where it is not one number.
        skip: True if the optimizer must not step, 0-d bool.
        by_group: where groups of parameters are judged apart, by label what each saw and decided.

    Raises:
        TypeError: for one of the first four that is no tensor.
    """

    scale_S: Tensor
    bound_S: Tensor | None = None
    threshold: Tensor | None = None
    skip: Tensor | None = None
    by_group: Mapping[str, tuple[NormStats, ClipPlan]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scale_S", "bound_S", "threshold", "skip"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (value is not None or name == "scale_S"):
                raise TypeError(f"ClipPlan({name}={value!r}): must be a tensor, torch.tensor(0.5) say.")

    def over(self, layout: Layout) -> ClipPlan:
        """A plan with one number per parameter as one with a number per segment."""
        if layout.unit_S is None:
            return self
        bound_S = None if self.bound_S is None else over_segments(self.bound_S, layout)
        return replace(self, scale_S=over_segments(self.scale_S, layout), bound_S=bound_S)

    @property
    def clipped_S(self) -> Tensor:
        """Which segments are made smaller, by their scale or a bound, bool, shape (S,) or 0-d: what is counted."""
        return self._or_bounded(self.scale_S < 1)

    @property
    def changed_S(self) -> Tensor:
        """Which segments are changed, bool, shape (S,) or 0-d: what is to be applied."""
        return self._or_bounded(self.scale_S != 1)

    @property
    def largest(self) -> Tensor:
        """The largest factor of any segment, 0-d, where the scales are; 1 of no segments."""
        if self.scale_S.ndim == 0:
            return self.scale_S
        return self.scale_S.amax() if len(self.scale_S) else self.scale_S.new_ones(())

    def _or_bounded(self, changed_S: Tensor) -> Tensor:
        return changed_S if self.bound_S is None else changed_S | (self.bound_S < float("inf"))
