"""optimizer.step(closure): the closure is called once, then its gradients are clipped, then they are stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_gradclip.run.refusal import Refusal


def once(optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
    """Call a closure, for its gradients to be clipped; what the optimizer is given in its place then.

    Args:
        optimizer: without wrappers.
        closure: of a person's loop.

    Returns:
        A closure that gives the loss. It raises RuntimeError, with the optimizer's name, where it is called a second
        time or after weights have moved: gradients of those weights were neither computed nor clipped.
    """
    with torch.enable_grad():
        loss = closure()
    name, calls = type(optimizer).__name__, 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    versions = [p._version for p in parameters]

    def given() -> Any:
        nonlocal calls
        calls += 1
        if calls > 1 or versions != [p._version for p in parameters]:
            raise RuntimeError(repeats(name).text)
        return loss

    return given


def repeats(name: str, found: bool = True) -> Refusal:
    """The refusal of an optimizer that wants gradients more than once in a step."""
    return Refusal(
        found,
        name,
        "it asks for several gradients in one step, at weights that it has moved, and only the first are clipped.",
        "Use an optimizer that calls its closure once, or leave clipping out.",
    )
