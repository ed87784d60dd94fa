"""What a person should know of a clip and an optimizer together, which neither of them can tell alone."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.decision import LARGEST
from hf_gradclip.device import local
from hf_gradclip.say import logger, now_and_then
from hf_gradclip.strategies.none import NoClip
from hf_gradclip.strategy import describe, parts_of

SIGNS = ("Lion", "SignSGD", "Signum", "Tiger")
"""Optimizers of which each element of an update is -1 or 1, by what their names contain."""


def about(optimizer: Any, config: ClipConfig) -> Iterator[str]:
    """Warnings for the start, for an optimizer without wrappers: what its step makes of what is clipped."""
    name = type(optimizer).__name__
    parts = [part for part in parts_of(config.gradient) if not isinstance(part, NoClip)]
    if "muon" in name.lower() and parts:
        apart = any((part.per_parameter and part.needs.units is not None) or part.bounds for part in parts)
        yield (
            f"{name} with gradient={describe(config.gradient)!r}: it makes the momentum of each matrix orthogonal, so "
            "that its updates have one size, however large the gradients are. "
            + (
                "Rows or elements that are scaled apart change the direction that it takes. Use 'adaptive_norm'"
                if apart
                else "A clip limits no update; it only changes how much a step counts in the momentum. Leave it out "
                "('none'), or use 'adaptive_norm', which keeps a broken batch out of the momentum"
            )
            + "; to limit the updates lower the learning rate, or clip them ({'update': ...})."
        )
    if config.update is not None and any(word in name for word in SIGNS):
        yield (
            f"{name} with update={describe(config.update)!r}: each element of its update is -1 or 1, so that its norm "
            "is the root of the number of weights in every step: a limit acts in all steps or in none. Leave 'update' "
            "out, and lower the learning rate to limit the updates."
        )


def small_limit(optimizer: Any, clipper: Clipper) -> str:
    """Words for a limit on the norm that an update of RMS 1, as Adam makes them, is far above; "" for none."""
    keys = {*next(iter(optimizer.param_groups), {})}
    if not {"betas", "alpha"} & keys or "lambd" in keys:  # ASGD has an alpha of another kind
        return ""
    numel_S = clipper.view.layout.numel_S
    for part in parts_of(clipper.config.gradient):
        limit = getattr(part, "max_norm", float("inf"))
        usual = float(numel_S.max() if part.per_parameter else numel_S.sum()) ** 0.5
        if 10 * limit < usual:
            when = "every step of the warm-up" if hasattr(part, "warmup_steps") else "every step"
            return (
                f"update={describe(part)!r}: max_norm={limit:g}, and the norm of an update of "
                f"{type(optimizer).__name__} is about the root of the number of weights, {usual:.4g} here. That cuts "
                f"{when}. Set max_norm to suit, or max_norm=inf where it is for the warm-up only."
            )
    return ""


class Advice:
    """Looks, at the start and at every log, whether an optimizer can make something of what is clipped."""

    def __init__(self) -> None:
        self._met: weakref.WeakSet[Any] = weakref.WeakSet()
        self._below_eps = self._stuck = 0

    def at_start(self, optimizer: Any, configs: Sequence[ClipConfig]) -> None:
        """Warn, once per optimizer.

        Args:
            optimizer: without wrappers.
            configs: of the models that it steps.
        """
        if optimizer not in self._met and configs:
            self._met.add(optimizer)
            for words in dict.fromkeys(words for config in configs for words in about(optimizer, config)):
                logger.warning(words)

    def at_log(self, clipper: Clipper, scalars: dict[str, float], optimizers: Iterable[Any]) -> None:
        """Warn, the first, second, fourth, eighth ... time.

        Args:
            clipper: of the gradients.
            scalars: what its report gave for the log.
            optimizers: that step its parameters, without wrappers.
        """
        found = {key.partition("/")[2]: value for key, value in scalars.items()}
        largest = found.get("norm_max", 0.0)
        for optimizer in optimizers:
            if words := below_eps(optimizer, clipper, found):
                self._below_eps += 1
                if now_and_then(self._below_eps):
                    logger.warning("clip: %s", words)
            if largest > LARGEST and (words := stuck(optimizer, clipper)):
                self._stuck += 1
                if now_and_then(self._stuck):
                    logger.warning("clip: a step had a gradient of norm %.4g. %s", largest, words)


def below_eps(optimizer: Any, clipper: Clipper, found: dict[str, float]) -> str:
    """Words for gradients that an optimizer's eps outweighs, so that its updates shrink with them; "" for others.

    One step with a small gradient is none: the norms of all steps since the last log must be as small, or most of these
    steps clipped.

    Args:
        optimizer: without wrappers.
        clipper: of the gradients.
        found: what its report gave for the log, by key without a prefix.
    """
    groups = [group for group in optimizer.param_groups if {"betas", "alpha"} & set(group)]
    eps = max((float(group["eps"]) for group in groups if isinstance(group.get("eps"), (int, float))), default=0.0)
    root = float(clipper.view.layout.numel_S.sum()) ** 0.5
    bound = min((getattr(part, "max_value", math.inf) for part in parts_of(clipper.config.gradient)), default=math.inf)
    rms = min(found.get("norm_post", math.inf) / root, bound)
    usual = found.get("norm_mean", math.inf) / root < eps or found.get("rate", 0.0) > 0.5
    if not 0 < rms < eps or not usual:
        return ""
    return (
        f"the gradient that {type(optimizer).__name__} is given has an RMS of {rms:.2g}, below its eps of {eps:g}, so "
        "that its updates shrink with the gradient and training stalls. Raise the limit of the clip "
        f"({describe(clipper.config.gradient)}), look at what the loss is divided by, or lower eps."
    )


def stuck(optimizer: Any, clipper: Clipper) -> str:
    """Words for parameters whose moments are not finite in this process; "" where all are. Reads them all."""
    names = dict(zip(map(id, clipper.view.watched()), clipper.view.layout.by_param.names, strict=False))
    bad: dict[str, str] = {}
    for p, state in optimizer.state.items():
        for key, moment in state.items():
            if _is_measured(moment) and not bool(local(moment).isfinite().all()):
                bad.setdefault(names.get(id(p), "a parameter"), key)
    if not bad:
        return ""
    shown = ", ".join(f"{key} of {name}" for name, key in list(bad.items())[:5])
    return (
        f"What {type(optimizer).__name__} keeps of {len(bad)} parameters is not finite by now ({shown}), so that they "
        "do not move any more, or become NaN. Resume from the last checkpoint, with a strategy that limits the norm."
    )


def _is_measured(moment: Any) -> bool:
    """Whether it holds numbers that can be asked for infinity: those of 8 bits cannot."""
    return torch.is_tensor(moment) and moment.is_floating_point() and moment.element_size() > 1
