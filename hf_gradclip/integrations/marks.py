"""Which steps are clipped: marks that a clip sets, a step takes, and a new backward makes void."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from hf_gradclip.clipper import Clipper


class Marks:
    """For every optimizer the clippers that have clipped for its coming step, each with whether it skips.

    One clip marks all optimizers of its model. They may step in turn, so what is left over after one of them has
    stepped is of gradients that the next backward changes. A model that nobody has stepped since its clip may wait
    while another goes backward.
    """

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[Clipper, bool]] = weakref.WeakKeyDictionary()
        self._stepped: set[Clipper] = set()

    def clear(self) -> None:
        """Forget everything."""
        self._of.clear()
        self._stepped.clear()

    def set(self, clipper: Clipper, optimizers: Iterable[Any]) -> None:
        """A clipper has clipped for these optimizers."""
        self._stepped.discard(clipper)
        for optimizer in optimizers:
            self._of.setdefault(optimizer, {})[clipper] = clipper.step_was_skipped

    def has(self, clipper: Clipper, optimizer: Any) -> bool:
        """Whether it has clipped for the coming step."""
        return clipper in self._of.get(optimizer, {})

    def skips(self, optimizer: Any) -> bool:
        """Whether one of its clippers skips the coming step."""
        return any(self._of.get(optimizer, {}).values())

    def take(self, optimizer: Any) -> bool:
        """After a step: `skips`, and its marks are gone."""
        taken = self._of.pop(optimizer, {})
        self._stepped.update(taken)
        return any(taken.values())

    def before_backward(self, *_: Any, **__: Any) -> None:
        """What was clipped for a model that has been stepped since counts no longer."""
        for marked in self._of.values():
            for clipper in self._stepped:
                marked.pop(clipper, None)
        self._stepped.clear()
