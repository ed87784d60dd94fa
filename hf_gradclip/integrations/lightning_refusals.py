"""What a run of Lightning is refused for at start-up: by name, with what to use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.refusals import refuse_several_gradients
from hf_gradclip.record.options import read_record_options
from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.run.wrapping import wrap
from hf_gradclip.strategy import SpecError
from hf_gradclip.wrappers import innermost

SERVED = ("SingleDeviceStrategy", "DDPStrategy")
"""Strategies of Lightning that are tested."""
REASONS = {
    "DeepSpeedStrategy": "DeepSpeed steps inside its engine, where Lightning has no seam. Use GradClipTrainer, or "
    "Accelerate with attach(); both clip inside that step.",
    "FSDPStrategy": "FSDP1 shards flat parameters, of which nobody here adds up the norms. Use DDP, or Accelerate with "
    "FSDP2 (fsdp_version: 2) and attach().",
    "ModelParallelStrategy": "it is not tested here. Use DDP, or Accelerate with FSDP2 or tensor parallelism and "
    "attach().",
    "XLAStrategy": "XLA traces the step, and hf_gradclip reads a flag in it. Use a GPU or the CPU.",
    "SingleDeviceXLAStrategy": "XLA traces the step, and hf_gradclip reads a flag in it. Use a GPU or the CPU.",
}


def insist_on_spec(config: ClipConfig) -> None:
    """Stop for what a spec asks of a Trainer of transformers, and a callback of Lightning cannot do.

    Raises:
        SpecError: with what to use instead.
    """
    if config.console is not None:
        raise SpecError(
            f"GradClip({{'console': {config.console}}}): Lightning prints nothing of it. Leave it out; 'log' chooses "
            "what is logged."
        )
    options = read_record_options(config.record)
    for word in ("text", "push"):
        if options is not None and getattr(options, word):
            raise SpecError(
                f"GradClip({{'record': {{{word!r}: true}}}}): the examples of a batch are not known here, and nothing "
                "is uploaded. Write record: true."
            )


def refuse_run(trainer: Any, module: Any) -> None:
    """Stop where clipping would be inactive, wrong, or done twice.

    Raises:
        UnsupportedBackendError: with the setting's name, the reason and what to use instead.
    """
    refuse(_of_run(trainer, module))


def _of_run(trainer: Any, module: Any) -> Iterator[Refusal]:
    name = type(trainer.strategy).__name__
    reason, _, instead = REASONS.get(name, "it is not tested here. Use a single device or DDP.").partition(". ")
    yield Refusal(name not in SERVED, f"GradClip with {name}", f"{reason}.", instead)
    limit = trainer.gradient_clip_val
    yield Refusal(
        bool(limit),
        f"Trainer(gradient_clip_val={limit!r}) beside GradClip",
        "Lightning would clip first, and GradClip would judge what it left.",
        f"Leave one of the two out; GradClip({float(limit or 0):g}) clips at that norm.",
    )
    own = [cls for cls in type(module).__mro__ if "configure_gradient_clipping" in vars(cls)]
    replaced = "configure_gradient_clipping" in vars(module) or own[0].__name__ != "LightningModule"
    yield Refusal(
        replaced and module.automatic_optimization,
        f"{type(module).__name__}.configure_gradient_clipping beside GradClip",
        "the module clips by itself first, and GradClip would judge what it left.",
        "Leave one of the two out.",
    )


def refuse_clips(precision: Any) -> Callable[[], None]:
    """Stop, from now on, where a module clips by itself: `self.clip_gradients(optimizer, ...)`.

    Args:
        precision: the plugin of the run, whose `clip_gradients` Lightning calls for it.

    Returns:
        What undoes that.
    """
    before = vars(precision).get("clip_gradients")
    wrap(precision, "clip_gradients", before=_refuse_clip)

    def undo() -> None:
        if before is None:
            vars(precision).pop("clip_gradients", None)
        else:
            precision.clip_gradients = before

    return undo


def _refuse_clip(optimizer: Any, clip_val: Any = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
    limit = float(clip_val or 0)
    how = str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm))
    same = f"'value:max_value={limit:g}'" if how == "value" else f"{limit:g}"
    own = Refusal(
        limit > 0,
        f"self.clip_gradients({type(innermost(optimizer)).__name__}, gradient_clip_val={clip_val!r}) beside GradClip",
        "the module clips by itself first, and GradClip would judge what it left.",
        f"Leave one of the two out; GradClip({same}) does the same.",
    )
    refuse([own])


def refuse_optimizers(optimizers: list[Any], config: ClipConfig, scaler: Any) -> None:
    """Stop where the steps of the optimizers of a module could not be clipped as the configuration says.

    Args:
        optimizers: without wrappers.
        config: of the run.
        scaler: of the loss; None if there is none.

    Raises:
        UnsupportedBackendError: by name, with what to use instead.
    """
    for optimizer in optimizers:
        refuse_several_gradients(optimizer, [config])
    fused = [type(o).__name__ for o in optimizers if getattr(o, "_step_supports_amp_scaling", False)]
    several = len(optimizers) > 1
    refuse(
        (
            Refusal(
                scaler is not None and bool(fused),
                f"{', '.join(fused)}(fused=True) with precision='16-mixed'",
                "it takes the loss scale out inside its step, so that nobody sees true gradients before.",
                "Use fused=False, or precision='bf16-mixed'.",
            ),
            Refusal(
                scaler is not None and (config.fold or not config.skip_sync),
                "fold=True or skip_sync=False with precision='16-mixed'",
                "the loss scaler sets the same attributes of the optimizer.",
                "Leave them out, or use precision='bf16-mixed'.",
            ),
            Refusal(
                several and config.gradient.needs.loss,
                f"a strategy that judges the loss, with {len(optimizers)} optimizers",
                "nobody can tell which of the losses is of which.",
                "Use one that judges the norm.",
            ),
            Refusal(
                several and bool(config.record),
                f"record with {len(optimizers)} optimizers",
                "a record is of one.",
                "Leave record out, or use Accelerate with attach(accelerator, {model: spec, ...}, record=...).",
            ),
        )
    )
