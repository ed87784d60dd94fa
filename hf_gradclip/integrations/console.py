"""How much of what clipping logs the Trainer prints; log history and trackers get all that is logged."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from hf_gradclip.logged import pick


def shorten(callbacks: Iterable[Any], words: Sequence[str]) -> None:
    """Let those that print the logs print these words only, beside what is not of clipping."""
    for callback in callbacks:
        if isinstance(callback, (PrinterCallback, ProgressCallback)):
            callback.on_log = functools.partial(_print, callback, tuple(words))


def restore(callbacks: Iterable[Any]) -> None:
    """Let them print everything."""
    for callback in callbacks:
        if getattr(vars(callback).get("on_log"), "func", None) is _print:
            del callback.on_log


def _print(callback: Any, words: Sequence[str], args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
    given = pick(logs, words)
    shown = dict(given)
    type(callback).on_log(callback, args, state, control, logs=shown, **kwargs)
    for key in given.keys() - shown.keys():  # PrinterCallback takes one out, for whoever comes after it
        logs.pop(key)
