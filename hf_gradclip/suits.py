"""Which strategies a view can serve: the others are refused before the first step, by name."""

from __future__ import annotations

from typing import Any

from hf_gradclip.budgets import Budgets
from hf_gradclip.config import ClipConfig
from hf_gradclip.misuse import shown
from hf_gradclip.reactions import LowerRate, written
from hf_gradclip.say import is_first, logger
from hf_gradclip.strategy import SpecError, Strategy, describe, name_of, parts_of
from hf_gradclip.views.view import UnsupportedBackendError, View
from hf_gradclip.wrappers import innermost


def refuse_unsuited(strategy: Strategy, view: View) -> None:
    """Stop where a strategy would be inactive or wrong.

    Raises:
        UnsupportedBackendError: with the strategy's name, the reason and what to use instead.
    """
    if isinstance(strategy, Budgets):
        _refuse_groups(strategy, view)
    names = [name for name, p in zip(view.layout.names, view.watched(), strict=False) if p.is_complex()]
    for part in parts_of(strategy):
        if view.whole_only and part.per_parameter:
            raise UnsupportedBackendError(
                f"{name_of(part)} under FSDP1: its flat shards do not follow the parameters, so only the norm of the "
                "whole gradient is known. Use FSDP2 (fsdp_version: 2), or adaptive_norm or global_norm."
            )
        if names and (part.bounds or part.needs.max_abs):
            raise UnsupportedBackendError(
                f"{name_of(part)} of complex gradients ({', '.join(names[:5])}): it goes by single elements, and would "
                "take the real and the imaginary part for two. Use adaptive_norm, or global_norm with norm_type=2."
            )


def _refuse_groups(strategy: Budgets, view: View) -> None:
    """Stop where groups of parameters cannot be told, a parameter is in none, or a pattern finds none."""
    if view.whole_only:
        raise UnsupportedBackendError(
            f"{describe(strategy)} under FSDP1: its flat shards do not follow the parameters, so groups of them cannot "
            "be told. Use FSDP2 (fsdp_version: 2), or one strategy of the whole gradient, adaptive_norm say."
        )
    strategy.insist_on_names(view.known)
    if (idle := strategy.idle_among(view.known)) and is_first():
        logger.warning(
            "%s: all that %s finds is in groups before it, so that it does nothing here. The first pattern that finds "
            "a parameter has it.",
            describe(strategy),
            " and ".join(map(repr, idle)),
        )
    strategy.split(view.layout)


def refuse_in_a_loop(config: ClipConfig, optimizer: Any) -> None:
    """Stop where a plain loop is asked for what only an optimizer or a run can do.

    Args:
        config: that was asked for.
        optimizer: None if there is none.

    Raises:
        SpecError: with what to use instead.
    """
    if config.update is not None:
        raise SpecError(
            f"Clipper.for_model(..., {describe(config.gradient)!r} with update={describe(config.update)!r}): an "
            "update is known to the optimizer only. Give hf_gradclip.optim.AdamW(..., update_clip=...), or use "
            "GradClipTrainer or attach()."
        )
    if any(isinstance(reaction, LowerRate) for reaction in config.after_spike):
        call = f"Clipper.for_model(..., after_spike={written(config.after_spike)!r}"
        if optimizer is None:
            raise SpecError(
                f"{call}): it lowers the rate of an optimizer, and there is none here. Add optimizer=optimizer."
            )
        if not hasattr(innermost(optimizer), "register_step_pre_hook"):
            raise SpecError(
                f"{call}, optimizer={shown(optimizer)}): it lowers the rate in the steps of a torch.optim.Optimizer, "
                "and this is none. Pass the optimizer that steps the model."
            )
    refuse_a_record("Clipper.for_model(...", config)


def refuse_a_record(call: str, config: ClipConfig) -> None:
    """Stop where there is no run that could write what is recorded or logged.

    Args:
        call: as it was typed, up to its last argument.
        config: that may ask for a record, for some of the logs, or for a look at replicas.

    Raises:
        SpecError: with what to use instead.
    """
    for word in ("record", "histogram_every", "log", "console"):
        if getattr(config, word) != getattr(ClipConfig, word):
            raise SpecError(
                f"{call}, {word}={getattr(config, word)!r}): there is no run here that could write it. Leave "
                f"{word} out and log `clipper.report.scalars()`, or use GradClipTrainer or attach()."
            )
    if config.check_every not in (0, ClipConfig.check_every):
        raise SpecError(
            f"{call}, check_every={config.check_every}): nobody compares the replicas of a loop without a Trainer or "
            "an Accelerator. Leave it out, or use GradClipTrainer or attach()."
        )
