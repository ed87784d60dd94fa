"""A strategy says how hard to clip, from a small vector of norms. It never sees a gradient, a rank or a device.

A strategy is a frozen dataclass: its fields are its configuration. `init` makes its state, `update` is a pure
function of (statistics, state). `Chain` composes strategies; `needs` says what must be measured.
"""

from __future__ import annotations

import numbers
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_gradclip.types import ClipPlan, Layout, NormStats, is_one

State = Any
"""A NamedTuple of tensors; one whose name ends in `_S` has an entry per segment. Nested tuples in a chain."""


class SpecError(ValueError):
    """A clip specification that cannot be: the message has what was typed, the rule and the fix."""


class Stateless(NamedTuple):
    """The state of a strategy that remembers nothing."""


@dataclass(frozen=True)
class Units:
    """Which parameters are measured by unit: what makes one output of a layer, such as a row of nn.Linear's weight.

    Args:
        axis: the axis of a matrix that counts its outputs, 0 or 1; None for what the layer's kind says.
        vectors: also parameters of one dimension, each as one unit.
        head: also the layer that makes the model's output.
        adapters: also the weights of adapters, LoRA's say.
    """

    axis: int | None = None
    vectors: bool = False
    head: bool = False
    adapters: bool = True

    def of(self, name: str) -> Units | None:
        """What is asked for of a parameter by its name: the same of all; None leaves it whole."""
        return self


@dataclass(frozen=True)
class Needs:
    """What a strategy reads beside the norms.

    Args:
        max_abs: the largest absolute element per segment. Costs a second reduction over ranks.
        loss: the loss of the step. Costs a reduction of one number over ranks.
        units: segments are units of these parameters; None where they are parameters.
        weights: the norms of the weights per segment. Costs a read of the weights.
    """

    max_abs: bool = False
    loss: bool = False
    units: Units | None = None
    weights: bool = False

    def __or__(self, other: Needs) -> Needs:
        if self.units is not None and other.units is not None and self.units != other.units:
            apart = [f.name for f in fields(Units) if getattr(self.units, f.name) != getattr(other.units, f.name)]
            raise SpecError(
                f"units by {self.units} and by {other.units} in one chain: a gradient is cut in one way only. "
                f"Give both parts the same fields; they differ in {', '.join(apart)}."
            )
        return Needs(
            max_abs=self.max_abs or other.max_abs,
            loss=self.loss or other.loss,
            units=self.units or other.units,
            weights=self.weights or other.weights,
        )


class Strategy(ABC):
    """How hard to clip. Subclasses are final frozen dataclasses, checked in `__post_init__`.

    `bounds` is True for a strategy that sets `ClipPlan.bound_S`: the norms after it are not known. `per_parameter` is
    True for one that treats parameters apart, which FSDP1 cannot. `skips` is True for one that may set
    `ClipPlan.skip`, which the update of a foreign optimizer, known after the moments have moved, cannot honour.
    `remembers_by` names the fields that say what the numbers of its state are, norms or their logarithms, say: a
    checkpoint that was made with another value of one is not gone on with.
    """

    bounds: ClassVar[bool] = False
    per_parameter: ClassVar[bool] = False
    skips: ClassVar[bool] = False
    remembers_by: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be measured."""

    @abstractmethod
    def init(self, layout: Layout) -> State:
        """The state before the first step, on `layout.device`."""

    @abstractmethod
    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """Decide one step. Pure: no gradients, no collectives, no host read. No NaN or inf is ever kept in a state."""

    def _made_of(self) -> tuple[Strategy, ...]:
        """The strategies that this one puts together; itself, if it is none of several."""
        return (self,)

    def _written(self, word: Callable[[Strategy], str]) -> str | None:
        """How a spec writes what it puts together, each by its word; None if it is none of several."""
        return None


@dataclass(frozen=True)
class Chain(Strategy):
    """Strategies in order: each sees the statistics as the ones before it leave them, and the scales multiply.

    Raises:
        SpecError: if anything follows a strategy that bounds elements, whose result has no known norm.
    """

    parts: tuple[Strategy, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise SpecError(f"Chain({self.parts!r}): must hold two strategies or more.")
        for part in self.parts:
            if parts_of(part) != (part,):
                held, fix = ("a chain", "one") if isinstance(part, Chain) else ("groups", "in each group a")
                raise SpecError(f"Chain(...): a chain cannot hold {held}. Write {fix} chain with all the parts.")
        _ = self.needs  # refuses two ways of cutting
        for early in self.parts[:-1]:
            if early.bounds:
                word = name_of(early)
                raise SpecError(
                    f"{describe(self)}: nothing may follow {word}, because the norms after it are not known. "
                    f"Put {word} last."
                )

    @property
    def needs(self) -> Needs:
        """The union of what the parts need."""
        needs = Needs()
        for part in self.parts:
            needs = needs | part.needs
        return needs

    def init(self, layout: Layout) -> State:
        """A tuple with the state of each part; one that does not ask for units sees parameters."""
        return tuple(part.init(layout if part.needs.units else layout.by_param) for part in self.parts)

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """Fold the parts; the chain has a threshold only where exactly one part has one."""
        plans, states = [], []
        for part, part_state in zip(self.parts, state, strict=True):
            by_unit = part.needs.units is not None
            plan, new = part.update(stats if by_unit else stats.by_param, part_state)
            plans.append(plan if by_unit else plan.over(stats.layout))
            states.append(new)
            stats = stats.scaled(plan.scale_S) if by_unit else stats.scaled_by_param(plan.scale_S)
        scale_S = plans[0].scale_S
        for plan in plans[1:]:
            scale_S = plan.scale_S if is_one(scale_S) else scale_S * plan.scale_S
        skips = [plan.skip for plan in plans if plan.skip is not None]
        thresholds = [plan.threshold for plan in plans if plan.threshold is not None]
        return ClipPlan(
            scale_S=scale_S,
            bound_S=plans[-1].bound_S,
            threshold=thresholds[0] if len(thresholds) == 1 else None,
            skip=torch.stack(skips).any() if skips else None,
        ), tuple(states)

    def _made_of(self) -> tuple[Strategy, ...]:
        return self.parts

    def _written(self, word: Callable[[Strategy], str]) -> str | None:
        return "+".join(map(word, self.parts))


def parts_of(strategy: Strategy) -> tuple[Strategy, ...]:
    """The parts of a chain, the parts of all groups, or the strategy itself."""
    return strategy._made_of()


def limit_scale(limit: Tensor | float, norm: Tensor) -> Tensor:
    """The factor that brings `norm` down to `limit`: min(1, limit / norm), and 1 where both are 0."""
    return torch.where(norm > limit, limit / norm, 1.0)


def torch_scale(limit: Tensor | float, norm: Tensor) -> Tensor:
    """The factor of torch's `clip_grad_norm_`: min(1, limit / (norm + 1e-6)); 1 where there is nothing to scale."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    plain = not isinstance(limit, Tensor) and limit >= 1e-6  # a norm of 0 has a factor of 1 by itself
    return scale if plain else torch.where(norm == 0, 1.0, scale)


def where(ok: Tensor, new: State, old: State) -> State:
    """`new` where `ok` (0-d bool), else `old`, for every tensor of a state; on the CPU no copy of either."""
    if ok.device.type == "cpu":
        return new if bool(ok) else old
    if isinstance(new, Tensor):
        return torch.where(ok, new, old)
    return rebuild(new, [where(ok, a, b) for a, b in zip(new, old, strict=True)])


def choose(ok: Tensor, then: Callable[[], State], other: Callable[[], State]) -> State:
    """One of two results: on the CPU that one alone is computed, on a device both, since nobody waits there for `ok`.

    Args:
        ok: 0-d bool.
        then: gives the result where it is true; a tensor, or (named) tuples of tensors.
        other: gives the result elsewhere, of the same structure.
    """
    if ok.device.type == "cpu":
        return then() if bool(ok) else other()
    return where(ok, then(), other())


def rebuild(like: State, values: Sequence[State]) -> State:
    """A state of the type of `like` (NamedTuple or tuple) with other values."""
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def name_of(strategy: Strategy) -> str:
    """The word a spec uses: `zclip` for the strategies of this package, a dotted path for others; of several all."""
    if (written := strategy._written(name_of)) is not None:
        return written
    cls = type(strategy)
    package, _, module = cls.__module__.rpartition(".")
    return module if package == "hf_gradclip.strategies" else f"{cls.__module__}.{cls.__qualname__}"


def describe(strategy: Strategy) -> str:
    """The spec with every field written out; parsing it gives the strategy back."""
    if (written := strategy._written(describe)) is not None:
        return written
    shown = ",".join(f"{f.name}={_literal(getattr(strategy, f.name))}" for f in fields(strategy))  # type: ignore[arg-type]
    return name_of(strategy) + (f":{shown}" if shown else "")


def warmup_of(strategy: Strategy) -> int:
    """Steps before the strategy adapts: the largest `warmup_steps` in it, 0 where there is none."""
    return max((int(getattr(part, "warmup_steps", 0)) for part in parts_of(strategy)), default=0)


def require(strategy: Any, field: str, rule: Callable[[Any], bool], text: str) -> None:
    """Refuse a field whose value breaks a rule.

    Raises:
        SpecError: `ZClip(alpha=2): must be in [0, 1). The paper uses 0.97.`
    """
    value = getattr(strategy, field)
    if not rule(value):
        text = "must be finite, and " * (value == float("inf")) + text
        raise SpecError(f"{type(strategy).__name__}({field}={_literal(value)}): {text}")


def check_types(strategy: Any) -> None:
    """Refuse a field of the wrong type; any real number is welcome where a float is asked for, and becomes one.

    Raises:
        SpecError: `ZClip(alpha='high'): must be a number.`
    """
    hints = typing.get_type_hints(type(strategy))
    for field in fields(strategy):
        value, hint = getattr(strategy, field.name), hints[field.name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and isinstance(value, numbers.Real) and not isinstance(value, bool):
            try:
                object.__setattr__(strategy, field.name, float(value))
            except OverflowError:
                raise SpecError(f"{type(strategy).__name__}({field.name}=...): too large for a float.") from None
            continue
        if int in allowed and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            if abs(int(value)) >= 2**63:
                raise SpecError(f"{type(strategy).__name__}({field.name}={value}): too large, must be below 2^63.")
            object.__setattr__(strategy, field.name, int(value))
            continue
        if type(value) not in allowed:
            names = " or ".join(_KINDS.get(kind, kind.__name__) for kind in allowed)
            raise SpecError(f"{type(strategy).__name__}({field.name}={value!r}): must be {names}.")


_KINDS = {float: "a number", int: "a whole number", str: "a word", bool: "true or false", types.NoneType: "none"}


def _literal(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e6
    return str(int(value)) if whole else str(value)  # type: ignore[call-overload]
