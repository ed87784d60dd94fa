"""What people hand to a call in the place of what it takes, and the words that say so.

No framework is imported: a Trainer or an Accelerator is known by the name of its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FOR_MODEL = "Clipper.for_model(model, 'adaptive')"
INSTEAD = {
    "model": f"This is a model. In a plain torch loop use {FOR_MODEL}.",
    "optimizer": "This is an optimizer. Pass the model that it trains; "
    "an optimizer of hf_gradclip.optim clips by itself: hf_gradclip.optim.AdamW(model.parameters(), clip='adaptive').",
    "Trainer": "This is a Trainer. GradClipTrainer(..., clip='adaptive') clips by itself.",
    "Accelerator": "This is an Accelerator. Use hf_gradclip.attach(accelerator, 'adaptive').",
    "class": "This is a class. Pass what you made of it.",
    "named": "Pass the model itself, or list(model.named_parameters()).",
    "parameters": "Parameters alone have no names, by which the state of a strategy is kept. Pass the model itself; "
    "hf_gradclip.clip_grad_norm_(parameters, max_norm) clips parameters at a fixed norm.",
}


def insist_on_model(model: Any) -> None:
    """Stop where `Clipper.for_model` is given something else than a model, or a list of named parameters.

    Raises:
        TypeError: in words.
    """
    named = isinstance(model, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in model)
    if isinstance(model, nn.Module) or (named and model):
        return
    raise TypeError(
        f"Clipper.for_model({shown(model)}): must be a model, a torch.nn.Module. "
        f"{INSTEAD.get(kind_of(model), f'Write {FOR_MODEL}.')}"
    )


def insist_on_parts(config: Any, view: Any) -> None:
    """Stop where a Clipper is made of a model, and not of a configuration and a view.

    Raises:
        TypeError: in words.
    """
    if isinstance(view, (str, nn.Module)) or view is None or not hasattr(config, "gradient"):
        given = ", ".join(shown(thing) for thing in (config, view) if thing is not None)
        raise TypeError(f"Clipper({given}): must be a ClipConfig and a view. For a model write {FOR_MODEL}.")


def is_scaling(scaler: Any) -> bool:
    """Whether a GradScaler is there and on.

    Raises:
        TypeError: for something else.
    """
    if scaler is not None and not hasattr(scaler, "is_enabled"):
        raise TypeError(f"Clipper.for_model(..., scaler={shown(scaler)}): must be your torch.amp.GradScaler, or None.")
    return scaler is not None and bool(scaler.is_enabled())


def listed(parameters: Any, call: str) -> list[Tensor]:
    """The parameters that a clip call is given, one tensor or several, as a list.

    Raises:
        TypeError: for a model, or named parameters, in their place.
    """
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, nn.Module) and not isinstance(parameters, nn.ParameterList):
        raise TypeError(f"{call}({type(parameters).__name__}, ...): must be parameters. Pass model.parameters().")
    found = list(parameters)
    if found and not isinstance(found[0], Tensor):
        raise TypeError(f"{call}({shown(parameters)}, ...): must be parameters. Pass model.parameters().")
    return found


def kind_of(thing: Any) -> str:
    """What a person has taken for something else: a key of INSTEAD; "" for anything else."""
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(thing).__mro__}
    found = {
        "class": isinstance(thing, type),
        "model": isinstance(thing, nn.Module),
        "optimizer": isinstance(thing, torch.optim.Optimizer),
        "Trainer": ("transformers", "Trainer") in names,
        "Accelerator": ("accelerate", "Accelerator") in names,
        "named": getattr(thing, "__name__", "") == "named_parameters",
        "parameters": isinstance(thing, (Tensor, Iterable)) and not isinstance(thing, (str, bytes, dict)),
    }
    return next((kind for kind, is_so in found.items() if is_so), "")


def shown(thing: Any) -> str:
    """As it was typed, where that is short; else its class."""
    if isinstance(thing, (str, int, float, bool)) or thing is None:
        return repr(thing)
    return f"<{thing.__name__ if isinstance(thing, type) else type(thing).__name__}>"
