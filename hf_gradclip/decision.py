"""What one step will do, and what is left of it: what flows from a measurement to whoever drives the step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_gradclip.device import number_on
from hf_gradclip.misuse import shown
from hf_gradclip.seat import handed
from hf_gradclip.strategy import Needs, State, Strategy, describe, parts_of, where
from hf_gradclip.types import ClipPlan, Layout, NormStats, cached, is_one, norm_after
from hf_gradclip.views.view import View

LEAVE, CLIP, SKIP, NONFINITE = range(4)
"""What a step does: nothing to its gradients, scale or bound them, leave the step out, meet a NaN or inf."""

LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""A gradient whose norm is above it may hold an element whose square float32, and so a second moment, cannot."""

FACTOR = float(torch.finfo(torch.float32).max)
"""The largest factor that can be applied: kernels multiply in float32."""

Measure = Callable[[Needs, bool], NormStats]
"""Gives the statistics of what is to be clipped, reduced over ranks; see the `measure` of a view."""


@dataclass(frozen=True)
class Outcome:
    """What is left of a step that was decided on and counted, for whoever drives it.

    Args:
        stats: what was measured.
        plan: what is still to be done to the gradients or updates; None where that is nothing. One number for all
            may be on the host, vectors are where the gradients are.
        device: where that is.
        skipped: whether the optimizer must not step, as far as the host knows.
        drop: whether the gradients must not reach an optimizer; False where a loss scaler keeps them from it.
        skip: whether the optimizer must not step, where it reads that itself, on the device.
    """

    stats: NormStats
    plan: ClipPlan | None
    device: torch.device
    skipped: bool = False
    drop: bool = False
    skip: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """The 2-norm of the whole before clipping, 0-d, on the device."""
        return number_on(self.device, self.stats.total)


@dataclass(frozen=True)
class Decision:
    """What one step will do, before anybody has looked.

    Args:
        stats: what was measured.
        plan: what to do; it touches nothing where the norm is not finite.
        found: the action, where the step is judged on the host; on a device whether the norm is finite, 0-d bool.
        measure: how to measure again.
        device: where what was measured is.
        void: whether the step is left out already, for another reason, 0-d bool on the device: nothing of it is kept.
    """

    stats: NormStats
    plan: ClipPlan
    found: Tensor | int
    measure: Measure
    device: torch.device
    void: Tensor | None = None

    @cached
    def action(self) -> Tensor | int:
        """LEAVE, CLIP, SKIP or NONFINITE: on a device a 0-d int64, the one number that a step may read."""
        if not isinstance(self.found, Tensor):
            return self.found
        action = self.plan.changed_S.any()  # as a number LEAVE or CLIP
        if self.plan.skip is not None:
            action = torch.where(self.plan.skip, SKIP, action)
        return torch.where(self.found, action, NONFINITE)

    @property
    def finite(self) -> Tensor:
        """Whether the norm is, 0-d bool on the device."""
        found = self.found if isinstance(self.found, Tensor) else self.found != NONFINITE
        return torch.as_tensor(found, device=self.device)

    @property
    def counted(self) -> Tensor:
        """The same for a report: NaN where the step is void, and nobody asked."""
        return self.finite if self.void is None else torch.where(self.void, float("nan"), self.finite)

    def clipped_by(self, action: int) -> bool | None:
        """Whether anything is made smaller, now that the action was read; None where nobody has looked.

        What is only made larger is CLIP too: there is something to do.
        """
        plan = self.plan
        if action != CLIP:
            return False
        if plan.scale_S.ndim or plan.bound_S is not None or not plan.scale_S.is_cpu:
            return None
        return float(plan.scale_S) < 1

    def outcome(
        self, plan: ClipPlan | None = None, skipped: bool = False, drop: bool = False, skip: Tensor | None = None
    ) -> Outcome:
        """What is left of it, see there."""
        plan = None if plan is None else handed(plan, self.device)
        return Outcome(self.stats, plan, self.device, skipped, drop, skip)


class Taker(Protocol):
    """An optimizer that clips as it reads."""

    def take(self, plan: ClipPlan | None, view: View) -> None:
        """Clip the coming step by a plan for the gradients of a view; None leaves them as they are."""


Judged = tuple[ClipPlan, Tensor | int, State]
"""A step's plan, what was found of it (see Decision), and the state to keep."""


def asked(strategy: Strategy, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
    """What a strategy says of a step; a factor without a limit of its own, of a subnormal gradient, stays a number."""
    plan, new = strategy.update(stats, state)
    if any(getattr(part, "max_scale", 1.0) > FACTOR for part in parts_of(strategy)):
        plan = replace(plan, scale_S=plan.scale_S.clamp(max=FACTOR))
    return plan, new


def judge_on_device(strategy: Strategy, stats: NormStats, state: State, largest: float = math.inf) -> Judged:
    """Ask the strategy, and leave everything as it is where the norm is not finite. Pure, without a host read."""
    plan, new = asked(strategy, stats, state)
    # A norm is not negative, and NaN is below nothing: isfinite is four launches.
    if largest < math.inf and plan.bound_S is None and plan.skip is None:
        finite = norm_after(stats, plan) <= largest  # no factor makes a number of a NaN or inf
    else:
        finite = stats.total < math.inf
        if largest < math.inf:
            held = norm_after(stats, plan) <= largest
            finite = finite & (held if plan.skip is None else held | plan.skip)
    if not is_one(plan.scale_S):
        plan = replace(plan, scale_S=torch.where(finite, plan.scale_S, 1.0))
    if plan.bound_S is not None:
        plan = replace(plan, bound_S=torch.where(finite, plan.bound_S, float("inf")))
    return plan, finite, where(finite, new, state)


def judge(
    strategy: Strategy, stats: NormStats, state: State, void: Tensor | None = None, largest: float = math.inf
) -> Judged:
    """One step, where its statistics are, or at least its total norm.

    Args:
        strategy: asked for a plan.
        stats: as measured.
        state: of the strategy.
        void: see Decision.
        largest: a norm that is above it after clipping counts as not finite.
    """
    plan, found, new = (judge_on_host if stats.total.is_cpu else judge_on_device)(strategy, stats, state, largest)
    return plan, found, new if void is None else where(void, state, new)


def judge_on_host(strategy: Strategy, stats: NormStats, state: State, largest: float = math.inf) -> Judged:
    """The same where the total norm is on the host; scales by unit may be on a device, which then decides on them."""
    plan, new = asked(strategy, stats, state)
    skips, total = plan.skip is not None and bool(plan.skip), float(stats.total)
    finite = total < math.inf
    if total > largest and finite and not skips:
        finite = float(norm_after(stats, plan)) <= largest
    if not finite:
        bound_S = None if plan.bound_S is None else torch.full_like(plan.bound_S, float("inf"))
        return replace(plan, scale_S=torch.ones_like(plan.scale_S), bound_S=bound_S), NONFINITE, state
    if skips:
        return plan, SKIP, new
    if plan.scale_S.ndim == 0 and plan.bound_S is None:
        return plan, LEAVE if float(plan.scale_S) == 1 else CLIP, new
    return plan, CLIP if not plan.scale_S.is_cpu or bool(plan.changed_S.any()) else LEAVE, new


def as_loss(loss: Any, layout: Layout, strategy: Strategy) -> Tensor:
    """The loss of a step where the statistics are, 0-d: of a tensor with one element, or a number.

    Args:
        loss: as it was given.
        layout: of the statistics.
        strategy: that judges it.

    Raises:
        ValueError: if there is none.
        TypeError: for anything else.
    """
    if loss is None:
        raise ValueError(
            f"{describe(strategy)} judges the loss: call clipper.step(loss=loss). Trainer and attach() do so by "
            "themselves."
        )
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.detach().reshape(()).to(device=layout.device, dtype=layout.dtype)
    if isinstance(loss, numbers.Real):
        return torch.full((), float(loss), device=layout.device, dtype=layout.dtype)  # no copy that the host waits for
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
    raise TypeError(f"clipper.step(loss={what}): must be one number, the loss of the step. Pass loss.mean(), say.")
