"""Calls of another object, with something done before, around or after them.

An Accelerator and its optimizers are freed with the last reference to them, and the memory of a model with them. What
takes the place of one of their methods therefore holds them weakly.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a bound method that does not keep its object alive; any other callable as it is."""
    find = _finder(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        return find()(*args, **kwargs)

    return call if getattr(method, "__self__", None) is not None else method


def wrap(
    owner: Any,
    name: str,
    before: Callable[..., None] | None = None,
    inside: Callable[[], AbstractContextManager[None]] | None = None,
    result_to: Callable[[Any], None] | None = None,
    then: Callable[[], None] | None = None,
) -> None:
    """Replace a method of one object by a call that does more.

    Args:
        owner: the object.
        name: of its method.
        before: is given the arguments first.
        inside: makes a context around the call.
        result_to: is given what the call gave.
        then: is called last, after a call that did not raise.
    """
    original = getattr(owner, name)
    find = _finder(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        if inside is None:
            result = find()(*args, **kwargs)
        else:
            with inside():
                result = find()(*args, **kwargs)
        if result_to is not None:
            result_to(result)
        if then is not None:
            then()
        return result

    setattr(owner, name, _named_as(original, call))


def wrap_class(owner: type, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of a class, for all of its objects, by around(the method, the object, *arguments).

    Args:
        owner: the class, in whose own body the method is.
        name: of the method.
        around: what is called in its place.

    Returns:
        What puts the method back, unless somebody has replaced it in turn.
    """
    original = vars(owner)[name]

    @functools.wraps(original)  # who asks for its signature, or its source, gets those of the original
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    def undo() -> None:
        if vars(owner)[name] is call:
            setattr(owner, name, original)

    setattr(owner, name, call)
    return undo


def wrap_step(optimizer: Any, around: Callable[[Any, Callable[..., Any], Any], Any]) -> None:
    """Replace an optimizer's `step` by around(optimizer, its step so far, closure).

    torch's schedulers take the function out of a bound method, so there is one in it.
    """
    original, weak = optimizer.step, weakref.ref(optimizer)
    find = _finder(original)

    def step(optimizer: Any, closure: Any = None) -> Any:
        return around(optimizer, find(), closure)

    def call(closure: Any = None) -> Any:
        return step(weak(), closure)

    call.__func__ = step  # type: ignore[attr-defined]
    optimizer.step = _named_as(original, call)


def _finder(method: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """Gives a method back without keeping its object alive; any other callable is kept."""
    if getattr(method, "__self__", None) is None:
        return lambda: method
    weak, name = weakref.WeakMethod(method), method.__qualname__

    def gone(*_: Any, **__: Any) -> Any:
        raise ReferenceError(f"{name}: its object is gone.")

    return lambda: weak() or gone


def _named_as(original: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """With its name and words, but without the reference that functools.wraps leaves."""
    functools.update_wrapper(call, original)
    del call.__wrapped__  # type: ignore[attr-defined]
    return call
