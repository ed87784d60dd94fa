"""DeepSpeed: the engine steps inside `accelerator.backward`, so the clipper goes into the optimizer's own step.

Where a ZeRO optimizer computes its norm we measure and decide; where it unscales a part, just before stepping it, we
apply the plan to that part. DeepSpeed's own clip is held at 0 through every step, whatever config, checkpoint or
default say. Methods are replaced on the instance, so other engines in the process are not touched.
"""

from __future__ import annotations

import types
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.deepspeed_refusals import refuse_release, refuse_settings
from hf_gradclip.run.tested import insist_on_hooks
from hf_gradclip.run.updates import Updates, refuse_own_clip
from hf_gradclip.run.zero_updates import ZeroUpdates
from hf_gradclip.types import ClipPlan
from hf_gradclip.views import view_of
from hf_gradclip.views.partitions import Bf16, Kind, Stage3, Stage12
from hf_gradclip.views.zero import zero_view
from hf_gradclip.wrappers import innermost

Loss = Callable[[], Tensor | None]
"""Gives the loss of the step, reduced over ranks, to a strategy that judges it."""


def seams_of(engine: Any, config: ClipConfig, updates: Updates, loss: Loss = lambda: None) -> Seams:
    """Put a clipper into the step of a prepared engine.

    Args:
        engine: made by `prepare`.
        config: what to do.
        updates: of the run, where the update clipper is added.
        loss: see Loss.

    Raises:
        UnsupportedBackendError: by the setting's name, with what to use instead.
    """
    insist_on_hooks("deepspeed", deepspeed.__version__, deepspeed.DeepSpeedEngine)
    refuse_settings(engine, config)
    refuse_own_clip(innermost(engine.optimizer))
    seams = SEAMS.get(type(engine.optimizer).__name__, WithoutZero)
    return seams(engine, config, updates, loss)


class Seams:
    """A clipper inside the step of a DeepSpeed engine.

    Attributes:
        clipper: of the gradients.
        norm: of the last step, before clipping; None before the first.
        stepped: set by every step, for somebody to take back.
    """

    clipper: Clipper
    norm: Tensor | None = None
    stepped = False


class WithoutZero(Seams):
    """Stage 0 in float32: a torch optimizer, stepped by the engine after its all-reduce. See `seams_of`."""

    def __init__(self, engine: Any, config: ClipConfig, updates: Updates, loss: Loss) -> None:
        self.clipper = Clipper(config, view_of(engine.module))
        self._engine = engine
        self._loss = loss
        engine.clip_fp32_gradients = lambda: None
        engine.optimizer.overflow = False
        engine.optimizer.register_step_pre_hook(self._before_step)
        updates.watch([engine.optimizer], [engine.module])

    def _before_step(self, *_: Any) -> None:
        self.norm = self._engine._global_grad_norm = self.clipper.step(self._loss())
        self._engine.optimizer.overflow = self.clipper.step_was_skipped  # for which schedulers wait, as under ZeRO
        self.stepped = True


class ZeroSeams(Seams, ABC):
    """A clipper inside a ZeRO optimizer. See `seams_of`.

    Attributes:
        kind: of the optimizer: what DeepSpeed calls it, and which of its attributes are used.
        replaced: its methods, in whose place those of the same name here stand; they are given the optimizer.
    """

    kind: ClassVar[type[Kind]]
    replaced: ClassVar[tuple[str, ...]]

    def __init__(self, engine: Any, config: ClipConfig, updates: Updates, loss: Loss) -> None:
        zero = engine.optimizer
        refuse_release(deepspeed.__version__, zero, self.kind.missing(zero))
        guarded = bool(getattr(zero, "dynamic_loss_scale", False))
        self.view = zero_view(engine.module, zero, self.kind, torch.device(engine.device), guarded)
        self.clipper = Clipper(config, self.view)
        self._updates = None if config.update is None else ZeroUpdates(self.view, config, updates)
        self._loss = loss
        self._plan: ClipPlan | None = None
        self._theirs = {name: getattr(zero, name) for name in self.replaced}
        for name in self.replaced:
            setattr(zero, name, types.MethodType(getattr(self, name), zero))

    def _decide(self) -> Tensor:
        """Measure and decide; the norm in the units that the optimizer expects at its seam (loss scale still in)."""
        outcome = self.clipper.settle(self.clipper.decide(self._loss()))
        self._plan, self.norm, self.stepped = outcome.plan, outcome.norm, True
        if outcome.skipped:
            self.view.drop_()
        return (self.norm * self.view.loss_scale).float()

    def _step_theirs(self, zero: Any, closure: Any) -> None:
        """The optimizer's own step, with what would get before us held off; its settings are for its checkpoints.

        That is its own clip, and, where no loss scaler owns such steps, its own look for a NaN or inf: it would drop
        the step before its norm is asked for, and neither policy nor limit would hear of it.
        """
        held = {"clip_grad": 0.0} if self.view.guarded else {"clip_grad": 0.0, "check_grad_overflow": False}
        kept = {name: getattr(zero, name) for name in held if hasattr(zero, name)}
        try:
            for name in kept:
                setattr(zero, name, held[name])
            self._theirs["step"](closure)
        finally:
            for name, value in kept.items():
                setattr(zero, name, value)


class InParts(ZeroSeams):
    """A ZeRO optimizer that steps its parts in turn, each right after it was unscaled.

    While a strategy skips, no part is stepped; afterwards the step is reported as skipped, the scale untouched.
    """

    def _optimizer_step(self, zero: Any, part: int) -> None:
        if self.view.skipping:
            return
        if self._updates is None:
            self._theirs["_optimizer_step"](part)
            return
        self._updates.before(part)
        self._theirs["_optimizer_step"](part)
        self._updates.after(part)

    def step(self, zero: Any, closure: Any = None) -> None:
        """In the place of the optimizer's own."""
        self._plan = self.norm = None
        self._step_theirs(zero, closure)
        if self.norm is None:  # a loss scaler dropped the step before its norm was asked for
            self._count_overflow()
        if self.view.skipping:
            zero.overflow = True
            self.view.skipping = False

    def _count_overflow(self) -> None:
        self.norm = torch.full((), float("inf"), device=self.view.layout.device)
        self.stepped = True
        self._loss()
        self.clipper.count_overflow()


class Stage12Seams(InParts):
    """Stages 1 and 2, with or without CPU offload."""

    kind = Stage12
    replaced = ("scaled_global_norm", "unscale_and_clip_grads", "_optimizer_step", "step")

    def scaled_global_norm(self, zero: Any, norm_type: float = 2) -> Tensor:
        """In the place of the optimizer's own: decide."""
        return self._decide()

    def unscale_and_clip_grads(self, zero: Any, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        """After the optimizer's own: apply the plan to the part whose gradient this is."""
        self._theirs["unscale_and_clip_grads"](grad_groups_flat, total_norm)
        if self._plan is not None:
            flats = zero.single_partition_of_fp32_groups
            part = next(i for i, flat in enumerate(flats) if flat.grad is grad_groups_flat[0])
            self.view.apply_(self._plan, part)


class Stage3Seams(InParts):
    """Stage 3, with or without CPU offload."""

    kind = Stage3
    replaced = ("_get_norm_groups", "unscale_and_clip_grads", "_optimizer_step", "step")

    def _get_norm_groups(self, zero: Any) -> list[Tensor]:
        if zero.offload_optimizer:
            get_accelerator().synchronize()  # gradients are measured on the host, and may be on their way there
        return [self._decide()]

    def unscale_and_clip_grads(self, zero: Any, sub_group_id: int, total_norm: Tensor) -> None:
        """After the optimizer's own: apply the plan to this part."""
        self._theirs["unscale_and_clip_grads"](sub_group_id, total_norm)
        if self._plan is not None:
            self.view.apply_(self._plan, sub_group_id)


class Bf16Seams(ZeroSeams):
    """Stage 1 with float32 accumulation: the gradients are scaled all at once, before the step."""

    kind = Bf16
    replaced = ("step",)

    def step(self, zero: Any, closure: Any = None) -> None:
        """In the place of the optimizer's own."""
        norm = self._decide()
        if self.view.skipping:
            self.view.skipping = False
            zero.clear_hp_grads()
            zero.clear_lp_grads()
            zero.overflow = True
        else:
            if self._plan is not None:
                self.view.apply_(self._plan)
            self._step_theirs(zero, closure)
        zero._global_grad_norm = norm


SEAMS: dict[str, type[WithoutZero | ZeroSeams]] = {s.kind.of: s for s in (Stage12Seams, Stage3Seams, Bf16Seams)}
"""By the name of DeepSpeed's class."""
