"""Clip what any optimizer does to the weights: recover its update, decide, and take back what is too much.

It costs one copy of this process's weights, which becomes the update. The optimizers of hf_gradclip.optim need none of
this: they know their update before a weight moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.device import local, moved, number_on
from hf_gradclip.guard import NonFiniteError
from hf_gradclip.lowered import factor_of
from hf_gradclip.run.recovery import decay_of, recover_, refuse_recovery
from hf_gradclip.types import ClipPlan


class WeightDifference:
    """Clips the updates of a torch optimizer around its step.

    Args:
        optimizer: with float32 or float64 weights, and a learning rate in its groups.
        clipper: over the optimizer's trainable parameters; its view is shown the update in the place of the gradient.

    Raises:
        UnsupportedBackendError: by the optimizer's name, where its update cannot be recovered.
    """

    def __init__(self, optimizer: Any, clipper: Clipper) -> None:
        refuse_recovery(optimizer, [p.dtype for p in clipper.view.watched()])
        self._name = type(optimizer).__name__
        self._clipper = clipper
        self._copies: dict[int, Tensor] = {}
        self._stepping: dict[int, tuple[float, float]] = {}
        self._segments: dict[tuple[int, ...], Tensor] = {}
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def remove(self) -> None:
        """Clip no longer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Any, *_: Any) -> None:
        """Copy the weights that will move, into memory that is kept."""
        self._stepping = {}
        left_out = getattr(optimizer, "found_inf", None)  # by a loss scaler or `skip_sync=False`, for a fused kernel
        if left_out is not None and bool(left_out):
            return
        factor = factor_of(optimizer)  # of `after_spike`, whose hook may come later
        for group in optimizer.param_groups:
            rates = float(group["lr"]) * factor, decay_of(optimizer, group)
            for p in group["params"]:
                if p.grad is None or not p.requires_grad:
                    continue
                weight = local(p.detach())
                kept = self._copies.get(id(p))
                if kept is None or _kind(kept) != _kind(weight):  # it may have been resized, or moved
                    kept = self._copies[id(p)] = torch.empty_like(weight)
                kept.copy_(weight)
                self._stepping[id(p)] = rates
        if len(self._copies) > len(self._stepping):  # some have no gradient now, or are gone
            there = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._copies = {key: kept for key, kept in self._copies.items() if key in there}

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        """Turn the copies into updates, clip them where the gradients were, and take back what is too much."""
        if not any(lr for lr, _ in self._stepping.values()):
            return
        watched = self._clipper.view.watched()
        grads = [p.grad for p in watched]
        moving = [i for i, p in enumerate(watched) if id(p) in self._stepping]
        weights = [local(watched[i].detach()) for i in moving]
        updates = [self._copies[id(watched[i])] for i in moving]
        rates = [self._stepping[id(watched[i])] for i in moving]
        for update, weight, (lr, decay) in zip(updates, weights, rates, strict=True):
            recover_(update, weight, lr, decay)
        try:
            for p in watched:
                p.grad = None
            for i, update in zip(moving, updates, strict=True):
                watched[i].grad = like(watched[i], update)
            clip_moved(self._clipper, self._name, weights, updates, [lr for lr, _ in rates], self._segments_of(moving))
        finally:
            for p, grad in zip(watched, grads, strict=True):
                p.grad = grad

    def _segments_of(self, moving: list[int]) -> Tensor:
        """The numbers of some watched parameters on the device; kept while the same ones move."""
        key = tuple(moving)
        if key not in self._segments:
            self._segments = {key: torch.tensor(moving, device=self._clipper.view.layout.device)}
        return self._segments[key]


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def clip_moved(
    clipper: Clipper,
    name: str,
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    lrs: Sequence[float],
    segments: Tensor,
) -> bool:
    """Decide on updates that are in the weights already, and take back what is too much.

    Args:
        clipper: whose view shows the updates.
        name: of the optimizer, for messages.
        weights: after the step, flat or not.
        updates: of the same shapes.
        lrs: learning rate per entry.
        segments: the segment of each entry, int64, shape (len(weights),).

    Returns:
        Whether any weight was changed again, as far as is known without a read.

    Raises:
        NonFiniteError: for an update with a NaN or inf, unless the policy is "pass": it cannot be taken back.
    """
    outcome = clipper.settle(clipper.decide())
    if outcome.skipped and not float(outcome.norm) < float("inf"):  # on the way to an error: the norm may be read
        raise NonFiniteError(
            f"The update of {name} is NaN or inf, and is in the weights by now. The gradient was finite, so look at "
            "the moments and eps. Resume from the last checkpoint; nonfinite='pass' goes on regardless."
        )
    if outcome.plan is None:
        return False
    correct_(weights, updates, lrs, outcome.plan, segments, len(outcome.stats.layout), clipper.view.apply_)
    return True


def correct_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    lrs: Sequence[float],
    plan: ClipPlan,
    segments: Tensor,
    size: int,
    apply_: Callable[[ClipPlan], None],
) -> None:
    """w' <- w' + lr (u - clip(u)) where the plan changes u; a weight whose u it leaves alone keeps every bit.

    Args:
        weights: after the step.
        updates: of the same shapes; they are clipped in place.
        lrs: learning rate per entry.
        plan: for the updates.
        segments: the segment of each entry, int64, shape (len(weights),).
        size: how many segments there are.
        apply_: does the plan to the updates.
    """
    rate = moved(torch.tensor(lrs, dtype=torch.float32, device="cpu"), segments.device)
    changed_S = plan.changed_S
    changed_S = changed_S if changed_S.ndim else number_on(segments.device, changed_S)
    rates = torch.where(changed_S.expand(size)[segments], rate, 0.0)
    there = {device: moved(rates, device) for device in {weight.device for weight in weights}}
    factors = [there[weight.device][i].to(weight.dtype) for i, weight in enumerate(weights)]
    for weight, update, factor in zip(weights, updates, factors, strict=True):
        weight.addcmul_(update, factor)
    apply_(plan)
    for weight, update, factor in zip(weights, updates, factors, strict=True):
        weight.addcmul_(update, factor, value=-1)


def like(parameter: Tensor, memory: Tensor) -> Tensor:
    """This process's memory as a tensor that can be the parameter's gradient."""
    if not hasattr(parameter, "device_mesh"):
        return memory
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        memory,
        parameter.device_mesh,
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
