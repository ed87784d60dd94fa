"""Calls of another object, with something done before or after them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def after(before: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, after `before` has seen its arguments."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return original(*args, **kwargs)

    return call


def then(original: Callable[..., Any], also: Callable[[], None]) -> Callable[..., Any]:
    """`original`, followed by `after`."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        also()
        return result

    return call
