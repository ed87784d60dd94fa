"""What `attach` and a class with GradClipMixin are given, checked before anything is done with it."""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hf_gradclip.config import ClipConfig
from hf_gradclip.misuse import INSTEAD, kind_of, shown
from hf_gradclip.record.options import read_record_options
from hf_gradclip.strategy import SpecError

ATTACH = "attach(accelerator, 'adaptive')"


def insist_on_accelerator(accelerator: Any) -> None:
    """Stop where `attach` is given something else than an Accelerator.

    Raises:
        TypeError: in words.
    """
    kind = kind_of(accelerator)
    if kind == "Accelerator":
        return
    instead = {
        **INSTEAD,
        "optimizer": f"This is an optimizer. Pass the accelerator that prepared it: {ATTACH}.",
        "parameters": f"Write {ATTACH}.",
    }.get(kind, f"Write {ATTACH}.")
    raise TypeError(f"attach({shown(accelerator)}): must be an accelerate.Accelerator. {instead}")


def refuse_settings(trainer: type, clip: Any, given: Mapping[str, Any]) -> None:
    """Stop where a Trainer is given a word of the clip configuration beside `clip`, and no class of it takes the word.

    Raises:
        TypeError: with the clip to write.
    """
    own = [*inspect.signature(ClipConfig.parse).parameters][1:]
    found = {name: given[name] for name in own if name in given}
    if not found:
        return
    made_by = [vars(cls)["__init__"] for cls in trainer.__mro__ if "__init__" in vars(cls)]
    taken = {name for init in made_by for name in inspect.signature(init).parameters}
    if found := {name: value for name, value in found.items() if name not in taken}:
        spec = dict(clip) if isinstance(clip, Mapping) else {"gradient": "adaptive" if clip is None else clip}
        words = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise TypeError(f"{trainer.__name__}({words}): is a part of clip. Write clip={spec | found!r}.")


def insist_on_switches(**switches: Any) -> None:
    """Stop where a switch of `attach` is no bool: "false" would count as true.

    Raises:
        SpecError: in words.
    """
    for word, value in switches.items():
        if type(value) is not bool:
            raise SpecError(f"attach(accelerator, {word}={value!r}): must be True or False.")


def record_folder(record: Any, config: ClipConfig) -> str | os.PathLike[str] | None:
    """Where `attach` shall record; None for nowhere.

    Args:
        record: as it was given.
        config: whose `record` may ask for one.

    Raises:
        SpecError: for something else than a folder, where a record is wanted and there is none, where it is to be
            uploaded, and where somebody shall print.
    """
    options = read_record_options(config.record)
    if options is not None and options.push:
        raise SpecError(
            "attach(accelerator, {'record': {'push': true}}): Accelerate uploads nothing, so nobody would push it. "
            "Leave 'push' out."
        )
    if config.console is not None:
        raise SpecError(
            f"attach(accelerator, {{'console': {config.console}}}): a loop prints what it wants itself. Leave it out; "
            "'log' chooses what attachment.scalars() gives."
        )
    if record is None or record is False:
        if options is not None:
            raise SpecError(
                "attach(accelerator, {'record': ...}): there is no output_dir here. Give record='a/folder'."
            )
        return None
    if not isinstance(record, (str, os.PathLike)):
        raise SpecError(
            f"attach(accelerator, record={record!r}): must be a folder, since there is no output_dir here. "
            "Give record='a/folder'."
        )
    return record


def limit_of(max_grad_norm: Any, overruled: bool) -> float:
    """The number in TrainingArguments, as it is.

    Args:
        max_grad_norm: what stands there.
        overruled: whether a clip takes its place, so that it need be no limit.

    Raises:
        ValueError: for something else than a number >= 0; for no number where it is overruled.
    """
    value = float(max_grad_norm) if isinstance(max_grad_norm, numbers.Real) else float("nan")
    if value >= 0 or (overruled and value < 0):
        return max_grad_norm
    fix = ""
    if isinstance(max_grad_norm, str):
        with suppress(ValueError):
            fix = f" Write max_grad_norm={float(max_grad_norm):g}."
    raise ValueError(
        f"TrainingArguments(max_grad_norm={max_grad_norm!r}): must be a number >= 0. 0 switches clipping off.{fix}"
    )


def insist_on_order(cls: type, mixin: type, trainer: type) -> None:
    """Stop where a class has a mixin behind the Trainer, whose methods hide the mixin's.

    Raises:
        TypeError: in words.
    """
    order = cls.__mro__
    if trainer not in order or order.index(mixin) < order.index(trainer):
        return
    bases = [base.__name__ for base in cls.__bases__]
    first = [mixin.__name__, *(name for name in bases if name != mixin.__name__)]
    raise TypeError(
        f"class {cls.__name__}({', '.join(bases)}): {mixin.__name__} must come before the Trainer, whose methods would "
        f"hide its own, so that nothing would be clipped. Write class {cls.__name__}({', '.join(first)})."
    )
