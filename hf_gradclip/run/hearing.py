"""Who is told of the events of a run, and what its processes agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from hf_gradclip.clipper import Clipper
from hf_gradclip.events import ASKED, KINDS, Event, Handler
from hf_gradclip.run.startup import world_size


class Hearing:
    """The handlers of a run.

    Every process decides from the same numbers, so that all of them meet an event in the same step. What is asked for
    on one of them holds on all.

    Args:
        handlers: gives by kind a function of an Event; None for nothing.
        obey: does what was asked for, on every process; without it "stop" is an error.
        together: whether every process reads the report in the same steps, so that they can agree on late events.
    """

    def __init__(
        self,
        handlers: Callable[[], Mapping[str, Handler | None]] = dict,
        obey: Callable[[Event], Any] | None = None,
        together: bool = False,
    ) -> None:
        self._together = together
        self._handlers = handlers
        self._obey = obey

    def begin(self, clipper: Clipper, name: str, device: torch.device) -> None:
        """Tell of a clipper's events from now on. Every process must come here.

        Args:
            clipper: that is new.
            name: of its model, where there are several.
            device: for what the processes tell each other.
        """
        events = clipper.events
        events.hear(self._handlers())
        events.obey, events.of, events.agree_late = self._obey, name, self._together
        if world_size() > 1:
            events.kinds = _any(events.kinds, KINDS, device)
            events.agree = lambda asked, failed: _agree(asked, failed, device)


def _any(mine: set[str], known: tuple[str, ...], device: torch.device) -> set[str]:
    """The words that any process has."""
    flags = torch.tensor([word in mine for word in known], dtype=torch.int32, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return {word for word, flag in zip(known, flags.tolist(), strict=True) if flag}


def _agree(asked: set[str], failed: bool, device: torch.device) -> bool:
    """Add to what is asked for here what is asked for anywhere; whether a handler failed anywhere."""
    found = _any(asked | {"failed"} if failed else asked, (*ASKED, "failed"), device)
    asked |= found & {*ASKED}
    return "failed" in found
