"""What a checkpoint of Lightning has for the clippers of a run, and the words for what it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_gradclip.clipper import Clipper
from hf_gradclip.state import flatten
from hf_gradclip.strategy import name_of

GRADIENT, UPDATE = "gradient", "update"


def kept(gradient: Sequence[Clipper], update: Sequence[Clipper]) -> dict[str, Any]:
    """What a checkpoint keeps: of each optimizer the state of its clippers.

    Args:
        gradient: the clippers of gradients, in the order of the optimizers.
        update: those of updates, in the same order.
    """
    return {kind: [clipper.state_dict() for clipper in some] for kind, some in ((GRADIENT, gradient), (UPDATE, update))}


def take(saved: Mapping[str, Any], gradient: Sequence[Clipper], update: Sequence[Clipper]) -> Iterator[str]:
    """Give every clipper its state in a checkpoint. What it does not have is said only of a strategy that learns.

    Args:
        saved: what `kept` gave; empty where the checkpoint was made without GradClip.
        gradient: see `kept`.
        update: see `kept`.

    Yields:
        Sentences about what happens instead.
    """
    if not saved:
        learning = [name_of(clipper.config.gradient) for clipper in (*gradient, *update) if flatten(clipper.state)]
        if learning:
            yield f"it was made without GradClip. {' and '.join(dict.fromkeys(learning))} starts anew."
        return
    for kind, clippers in ((GRADIENT, gradient), (UPDATE, update)):
        yield from _take(kind, saved.get(kind) or [], clippers)


def _take(kind: str, states: Sequence[Any], clippers: Sequence[Clipper]) -> Iterator[str]:
    for clipper, state in zip(clippers, states, strict=False):
        if words := clipper.take_state(state):
            yield words
    there = f"a clip state of the {kind} for {len(states) or 'no'} optimizer{'s'[: len(states) != 1]}"
    for i, clipper in enumerate(clippers[len(states) :], len(states)):
        if flatten(clipper.state):
            yield f"it has {there}. {name_of(clipper.config.gradient)} of optimizer {i} starts anew."
    if clippers and len(states) > len(clippers):
        yield f"it has {there}, and the run has {len(clippers)} now. The others are left out."
