"""DeepSpeed: the engine steps inside `accelerator.backward`, so the clipper goes into the optimizer's own step.

Two seams per ZeRO optimizer: where it computes its norm we measure and decide; where it unscales a part, just before
stepping it, we apply the plan to that part. DeepSpeed's own clip is held at 0 through every step, whatever config,
checkpoint or default say. Methods are replaced on the instance, so other engines in the process are not touched.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from hf_gradclip.clipper import CLIP, Clipper, Decision
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.optimizer import (
    Updates,
    clip_moved,
    decay_of,
    innermost,
    recover_,
    refuse_own_clip,
    refuse_recovery,
)
from hf_gradclip.optim.clipped import PLACES
from hf_gradclip.views.local import LocalView
from hf_gradclip.views.view import UnsupportedBackendError
from hf_gradclip.views.zero import Bf16, Partition, Stage3, Stage12, ZeroView

_NEEDED: dict[str, tuple[type[Partition], str]] = {
    "DeepSpeedZeroOptimizer": (
        Stage12,
        "scaled_global_norm unscale_and_clip_grads _optimizer_step step params_in_partition averaged_gradients "
        "grad_partition_insertion_offset grad_start_offset partition_size single_partition_of_fp32_groups clip_grad",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        Stage3,
        "_get_norm_groups unscale_and_clip_grads _optimizer_step step grad_position fp16_groups averaged_gradients "
        "fp32_partitioned_groups_flat clip_grad",
    ),
    "BF16_Optimizer": (
        Bf16,
        "step bf16_groups fp32_groups_gradients fp32_groups_has_gradients clear_hp_grads clear_lp_grads clip_grad",
    ),
}


class ZeroSeams:
    """A clipper inside a DeepSpeed engine's step.

    Args:
        engine: the prepared engine.
        config: what to do.
        updates: of the run, where the update clipper is added.
        loss: gives the reduced loss of the step, for a strategy that judges it.

    Attributes:
        norm: of the last step, before clipping.
        stepped: set by every step, for somebody to take back.

    Raises:
        UnsupportedBackendError: by the setting's name, with what to use instead.
    """

    def __init__(
        self, engine: Any, config: ClipConfig, updates: Updates, loss: Callable[[], Tensor | None] = lambda: None
    ) -> None:
        refuse_settings(engine, config)
        refuse_own_clip(innermost(engine.optimizer))
        self._loss = loss
        self._updates: ZeroUpdates | None = None
        self._engine = engine
        self._zero = engine.optimizer
        self._decision: Decision | None = None
        self.norm: Tensor | None = None
        self.stepped = False
        name = type(self._zero).__name__
        install = {
            "DeepSpeedZeroOptimizer": self._install_stage12,
            "DeepSpeedZeroOptimizer_Stage3": self._install_stage3,
            "BF16_Optimizer": self._install_bf16,
        }.get(name, self._install_without_zero)
        if name not in _NEEDED:
            self.clipper = Clipper(config, LocalView(engine.module))
            install()
            updates.watch([self._zero], [engine.module])
            return
        partition, needed = _NEEDED[name]
        missing = [word for word in needed.split() if not hasattr(self._zero, word)]
        if missing:
            raise UnsupportedBackendError(
                f"DeepSpeed {deepspeed.__version__}: {name} has no {', '.join(missing)}, where hf_gradclip hooks in. "
                "Install the version in constraints.txt, or use clip=None."
            )
        guarded = bool(getattr(self._zero, "dynamic_loss_scale", False))
        self.view = ZeroView(engine.module, self._zero, partition, torch.device(engine.device), guarded)
        self.clipper = Clipper(config, self.view)
        if config.update is not None:
            self._updates = ZeroUpdates(self.view, config, updates)
        install()

    def _install_without_zero(self) -> None:
        """Stage 0 in float32: a torch optimizer, stepped by the engine after its all-reduce."""
        self._engine.clip_fp32_gradients = lambda: None
        self._zero.register_step_pre_hook(lambda *_: self._keep(self.clipper.step(self._loss())))

    def _keep(self, norm: Tensor) -> None:
        self.norm = norm
        self.stepped = True
        self._engine._global_grad_norm = norm

    def _install_stage12(self) -> None:
        zero = self._zero

        def scaled_global_norm(_: Any, norm_type: float = 2) -> Tensor:
            return self._decide()

        def unscale_and_clip_grads(_: Any, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
            with self._own_clip_off():
                unscale(grad_groups_flat, total_norm)
            flats = zero.single_partition_of_fp32_groups
            self._apply(next(i for i, flat in enumerate(flats) if flat.grad is grad_groups_flat[0]))

        unscale = zero.unscale_and_clip_grads
        self._replace("scaled_global_norm", scaled_global_norm)
        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)
        self._skip_exactly()

    def _install_stage3(self) -> None:
        def get_norm_groups(_: Any) -> list[Tensor]:
            if self._zero.offload_optimizer:
                get_accelerator().synchronize()  # gradients are measured on the host, and may be on their way there
            return [self._decide()]

        def unscale_and_clip_grads(_: Any, sub_group_id: int, total_norm: Tensor) -> None:
            with self._own_clip_off():
                unscale(sub_group_id, total_norm)
            self._apply(sub_group_id)

        unscale = self._zero.unscale_and_clip_grads
        self._replace("_get_norm_groups", get_norm_groups)
        self._replace("unscale_and_clip_grads", unscale_and_clip_grads)
        self._skip_exactly()

    def _install_bf16(self) -> None:
        zero, step = self._zero, self._zero.step

        def clipped_step(_: Any, closure: Any = None) -> None:
            norm = self._decide()
            if self.clipper.step_was_skipped:
                zero.clear_hp_grads()
                zero.clear_lp_grads()
                zero.overflow, zero._global_grad_norm = True, norm
                self.view.skipping = False
                return
            if self._decision is not None:
                self.view.apply_(self._decision.plan)
            with self._own_clip_off():
                step(closure)
            zero._global_grad_norm = norm

        self._replace("step", clipped_step)

    def _decide(self) -> Tensor:
        """Measure and decide; the norm in the units that the optimizer expects at its seam (loss scale still in)."""
        decision, action = self.clipper.settle(self.clipper.decide(loss=self._loss()))
        self._decision = decision if action == CLIP else None
        self.norm = decision.stats.total
        self.stepped = True
        if self.clipper.step_was_skipped:
            self.view.drop_()
        return (self.norm * self.view.loss_scale).float()

    def _apply(self, part: int) -> None:
        if self._decision is not None:
            self.view.apply_(self._decision.plan, part=part)

    def _skip_exactly(self) -> None:
        """While a strategy skips, no part is stepped; afterwards the step is reported as skipped, scale untouched."""
        zero, optimizer_step, step = self._zero, self._zero._optimizer_step, self._zero.step

        def guarded_optimizer_step(_: Any, part: int) -> None:
            if self.view.skipping:
                return
            if self._updates is None:
                optimizer_step(part)
                return
            self._updates.before(part)
            optimizer_step(part)
            self._updates.after(part)

        def reported_step(_: Any, closure: Any = None) -> None:
            self._decision, self.norm = None, None
            step(closure)
            if self.norm is None:  # a loss scaler dropped the step before its norm was asked for
                self.norm = torch.full((), float("inf"), device=self.clipper.report.device)
                self.stepped = True
                self._loss()
                self.clipper.count_overflow()
            if self.view.skipping:
                zero.overflow = True
                self.view.skipping = False

        self._replace("_optimizer_step", guarded_optimizer_step)
        self._replace("step", reported_step)

    @contextmanager
    def _own_clip_off(self) -> Iterator[None]:
        clip, self._zero.clip_grad = self._zero.clip_grad, 0.0
        try:
            yield
        finally:
            self._zero.clip_grad = clip

    def _replace(self, name: str, function: Callable[..., Any]) -> None:
        setattr(self._zero, name, types.MethodType(function, self._zero))


class ZeroUpdates:
    """Clips the updates of whatever optimizer ZeRO steps: one decision after the last part.

    Args:
        view: of the gradients.
        config: of the run.
        updates: of the run, where the clipper is added.

    Raises:
        UnsupportedBackendError: by the optimizer's name, where its update cannot be recovered.
    """

    def __init__(self, view: ZeroView, config: ClipConfig, updates: Updates) -> None:
        seen, self._moved = view.of_updates()
        self._partition = self._moved.of
        self._optimizer = innermost(self._partition.zero)
        self._parts = len(self._moved.parts)
        self._rates: dict[int, tuple[float, float]] = {}
        segments = [piece.parameter for pieces in self._moved.parts for piece in pieces]
        self._segments = torch.tensor(segments, dtype=torch.int64, device=view.layout.device)
        weights = [self._partition.weights(part) for part in range(self._parts)]
        refuse_recovery(self._optimizer, [weight.dtype for weight in weights])
        self.clipper = Clipper(config.of_update(), seen, PLACES["update"])
        updates.add(self._optimizer, self.clipper)
        updates.say_cost(type(self._optimizer).__name__, sum(4 * weight.numel() for weight in weights))

    @torch.no_grad()
    def before(self, part: int) -> None:
        """Copy the weights of a part, into memory that is kept."""
        weight, group = self._partition.weights(part), self._optimizer.param_groups[self._partition.group_of(part)]
        if part not in self._moved.memory:
            self._moved.memory[part] = torch.empty_like(weight)
        self._moved.memory[part].copy_(weight)
        self._rates[part] = (float(group["lr"]), decay_of(self._optimizer, group))

    @torch.no_grad()
    def after(self, part: int) -> None:
        """Turn the copy into the update; after the last part clip them all."""
        recover_(self._moved.memory[part], self._partition.weights(part), *self._rates[part])
        if part < self._parts - 1 or not any(lr for lr, _ in self._rates.values()):
            return
        weights, updates, lrs = [], [], []
        for i, pieces in enumerate(self._moved.parts):
            for piece in pieces:
                weights.append(self._partition.weights(i).narrow(0, piece.start, piece.length))
                updates.append(self._moved.memory[i].narrow(0, piece.start, piece.length))
                lrs.append(self._rates[i][0])
        if clip_moved(self.clipper, type(self._optimizer).__name__, weights, updates, lrs, self._segments):
            for i in range(self._parts - 1):  # DeepSpeed itself copies the last part, which it is still stepping
                self._partition.publish(i)


def refuse_settings(engine: Any, config: ClipConfig) -> None:
    """Stop where a setting would make clipping inactive or wrong.

    Raises:
        UnsupportedBackendError: by the setting's name, with what to use instead.
    """
    zero, name = engine.optimizer, type(engine.optimizer).__name__
    refused = {
        "pipeline parallelism": (type(engine).__name__ == "PipelineEngine", "ZeRO without a pipeline"),
        "tensor parallelism": (
            getattr(engine, "mp_world_size", 1) > 1,
            "ZeRO alone, or tensor parallelism of transformers without DeepSpeed",
        ),
        "ZenFlow": (bool(getattr(zero, "zenflow", False)) or "ZenFlow" in name, "plain optimizer offload"),
        "SuperOffload": ("SuperOffload" in name, "plain optimizer offload"),
        "NVMe offload": (_on_nvme(engine), 'offload to "cpu"'),
        "compute_grad_norm=false": (getattr(zero, "compute_grad_norm", True) is False, "compute_grad_norm=true"),
        "mixture of experts": (bool(getattr(engine, "has_moe_layers", False)), "a model without DeepSpeed MoE layers"),
        "Muon": (bool(getattr(zero, "use_muon", False) or getattr(zero, "_uses_muon", False)), "another optimizer"),
        "torch_autocast with a GradScaler": (
            getattr(zero, "torch_autocast_gradscaler", None) is not None,
            "torch_autocast in bf16",
        ),
        "ZeRO stage 0 in bf16 or fp16": (
            name not in _NEEDED and not isinstance(zero, torch.optim.Optimizer),
            "stage 1, or float32",
        ),
    }
    for what, (found, instead) in refused.items():
        if found:
            raise UnsupportedBackendError(
                f"DeepSpeed with {what}: not supported by hf_gradclip. Use {instead}, or clip=None."
            )
    if config.fold or not config.skip_sync:
        word = "fold=True" if config.fold else "skip_sync=False"
        raise UnsupportedBackendError(
            f"{word} under DeepSpeed: its step unscales each part itself and reads its own overflow. Leave it out."
        )
    if config.update is not None and name == "BF16_Optimizer":
        raise UnsupportedBackendError(
            "clipping updates under DeepSpeed's BF16_Optimizer (bf16 with grad_accum_dtype=fp32 in stage 1): not "
            "supported. Leave grad_accum_dtype out, or use stage 2."
        )
    if config.nonfinite == "pass" and name in _NEEDED:
        raise UnsupportedBackendError(
            "nonfinite='pass' under DeepSpeed ZeRO: the optimizer itself skips a step with a NaN or inf. "
            "Use nonfinite='skip' or 'raise'."
        )


def _on_nvme(engine: Any) -> bool:
    devices = [
        getattr(engine.zero_offload_optimizer(), "device", None),
        getattr(engine.zero_offload_param(), "device", None),
    ]
    return any(str(getattr(device, "value", device)) == "nvme" for device in devices)
