"""What a person may say beside a spec where a clipper is made for a loop of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

from hf_gradclip.config import ClipConfig
from hf_gradclip.events import KINDS, Handler
from hf_gradclip.spec import nearest


class LoopSettings(TypedDict, total=False):
    """The keywords of `Clipper.for_model` after `scaler`."""

    nonfinite: str
    max_consecutive_skips: int
    fold: bool
    skip_sync: bool
    after_spike: Any
    on_spike: Handler | None
    on_skip: Handler | None
    on_nonfinite: Handler | None


def split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords as those of `ClipConfig.parse`, and handlers by the kind of their event.

    Raises:
        TypeError: for a word that is neither, with the nearest that is.
    """
    known = [*LoopSettings.__annotations__]
    of_config = [*inspect.signature(ClipConfig.parse).parameters][1:]
    for name in settings:
        if name not in (*known, *of_config):
            raise TypeError(
                f"Clipper.for_model(..., {name}={settings[name]!r}): is no setting.{nearest(name, known)} "
                f"There are {', '.join(known)}."
            )
    handlers = {kind: settings.get(kind) for kind in KINDS}
    return {name: value for name, value in settings.items() if name not in KINDS}, handlers
