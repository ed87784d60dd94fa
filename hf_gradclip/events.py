"""What is told of a step that stands out, is left out, or has a NaN or inf."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KINDS = ("on_spike", "on_skip", "on_nonfinite")
ASKED = ("skip", "stop", "save", "evaluate", "log")
"""What a handler may ask for."""
UNKNOWN = "unknown"

Handler = Callable[["Event"], Any]
Rows = Callable[[str, int], list[tuple[int, float]]]


class SpikeLimitError(RuntimeError):
    """More steps stand out than `after_spike=stop` allows."""


@dataclass(frozen=True)
class Event:
    """A step that somebody wants to know of.

    Args:
        kind: "on_spike" for a norm that stands out by the rule of `adaptive_norm`, whatever strategy clips; "on_skip"
            for a step that is left out; "on_nonfinite" for a norm that is NaN or inf.
        step: which one of the run, from 1; a checkpoint keeps the count.
        norm: of the whole gradient before clipping.
        threshold: the norm above which a norm stands out now; NaN where that is not judged.
        z: how far it stands out, 5 is where that begins; inf for a norm that is not finite, NaN where not judged.
        tensors: the parameters with the largest shares of the squared norm, and these shares; of a norm that is not
            finite those that hold a NaN or inf, each with 1.
        examples: the indices in the dataset of what this rank's batches held, or "unknown".
        late: whether this is told with the log, since nobody reads in the step itself; it cannot be skipped any more.
        of: the name of the model, where there are several.
        asked: what was asked for, of "skip", "stop", "save", "evaluate" and "log"; a set to add to.
    """

    kind: str
    step: int
    norm: float
    threshold: float = math.nan
    z: float = math.nan
    tensors: tuple[tuple[str, float], ...] = ()
    examples: list[int] | str = UNKNOWN
    late: bool = False
    of: str = ""
    asked: set[str] = field(default_factory=set)
    _rows: Rows | None = field(default=None, repr=False)

    def rows(self, name: str = "", count: int = 5) -> list[tuple[int, float]]:
        """The rows of a tensor's gradient with the largest norms, and these: the tokens of a table of embeddings.

        It reads the gradient once more, and waits for that.

        Args:
            name: of the parameter; the one with the largest share, if left out.
            count: how many at most.

        Raises:
            ValueError: for an event that came late; for a gradient that is sharded, or has no rows.
        """
        if self._rows is None:
            raise ValueError(f"event.rows({name!r}): the gradients of step {self.step} are gone. See event.late.")
        return self._rows(name or self.tensors[0][0], count)

    def skip_step(self) -> None:
        """Ask that no weight moves in this step, on any rank."""
        self.asked.add("skip")

    def __str__(self) -> str:
        words = {"on_spike": "stands out", "on_skip": "is left out", "on_nonfinite": "is not finite"}[self.kind]
        largest = ", ".join(f"{name} {share:.0%}" for name, share in self.tensors[:3])
        return f"step {self.step}{self.of and ' of '}{self.of} {words}: norm {self.norm:.4g}, largest {largest}"
