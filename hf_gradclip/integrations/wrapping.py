"""Calls of another object, with something done before, around or after them.

An Accelerator and its optimizers are freed with the last reference to them, and the memory of a model with them. What
takes the place of one of their methods therefore holds them weakly.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a bound method that does not keep its object alive; any other callable as it is."""
    if getattr(method, "__self__", None) is None:
        return method
    weak, name = weakref.WeakMethod(method), method.__qualname__

    def call(*args: Any, **kwargs: Any) -> Any:
        found = weak()
        if found is None:
            raise ReferenceError(f"{name}: its object is gone.")
        return found(*args, **kwargs)

    return call


def wrap(
    owner: Any,
    name: str,
    before: Callable[..., None] | None = None,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    then: Callable[[], None] | None = None,
) -> None:
    """Replace a method of one object by a call that does more.

    Args:
        owner: the object.
        name: of its method.
        before: is given the arguments first.
        inside: a context around the call.
        then: is called last, after a call that did not raise.
    """
    original = getattr(owner, name)
    inner = weakly(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        with inside():
            result = inner(*args, **kwargs)
        if then is not None:
            then()
        return result

    setattr(owner, name, _named_as(original, call))


def wrap_step(optimizer: Any, around: Callable[[Any, Callable[..., Any], Any], Any]) -> None:
    """Replace an optimizer's `step` by around(optimizer, its step so far, closure).

    torch's schedulers take the function out of a bound method, so there is one in it.
    """
    original, weak = optimizer.step, weakref.ref(optimizer)
    inner = weakly(original)

    def step(optimizer: Any, closure: Any = None) -> Any:
        return around(optimizer, inner, closure)

    def call(closure: Any = None) -> Any:
        return step(weak(), closure)

    call.__func__ = step  # type: ignore[attr-defined]
    optimizer.step = _named_as(original, call)


def _named_as(original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """With its name and words, but without the reference that functools.wraps leaves."""
    functools.update_wrapper(call, original)
    del call.__wrapped__  # type: ignore[attr-defined]
    return call
