"""What is checked of every tool that trains by a transformers.Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from doors_parts.door import FailedError, Room

STRATEGY = "zclip:warmup_steps=2,z_threshold=0.2"
"""With a state, and so eager that some steps of a short run are clipped."""
STEPS = 8


class Run(NamedTuple):
    """A training of the tiny model: STEPS steps, a log at each, a checkpoint after each half.

    Args:
        clip: a spec.
        out: the folder to write to.
        sgd: train by plain SGD with a learning rate of 1; else by the tool's AdamW.
        resume: a checkpoint.
    """

    clip: str
    out: Path
    sgd: bool = False
    resume: Path | None = None


Train = Callable[[Room, Run], Path]
"""Runs the tool's own command; returns the folder with the weights before training."""


def checks_of(train: Train, way: str = "") -> dict[str, Callable[[Room], str]]:
    """The checks of one way into a tool.

    Args:
        train: see Train. Checkpoints must be in `checkpoint-N` in the run's folder, the last one after STEPS.
        way: its name, where a tool has several.
    """

    def engaged(room: Room) -> str:
        """A tiny limit moves nothing under SGD, and none moves much."""
        found = {}
        for clip in ("1e-12", "none"):
            out = room.folder / clip
            start = train(room, Run(clip, out, sgd=True))
            found[clip] = float(room.look("moved", start, out / f"checkpoint-{STEPS}"))
        insist(found["1e-12"] < 1e-9 and found["none"] > 1e-4, f"weights moved by {found}")
        return f"weights move by {found['1e-12']:.2g}, without a limit by {found['none']:.2g}"

    def goes_on(room: Room) -> str:
        """Logs, state in the checkpoint, and a run that is resumed from it, which goes on to the bit."""
        whole, rest = room.folder / "whole", room.folder / "rest"
        train(room, Run(STRATEGY, whole))
        half, last = whole / f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"
        state = whole / last / "trainer_state.json"
        keys, rates = room.look("logged", state), room.look("clipped", state)
        clipped, logs = map(int, rates.split(" of "))
        insist("clip/norm_mean" in keys and "clip/threshold" in keys, f"logged: {keys}")
        insist(0 < clipped < logs == STEPS, f"clipped in {rates} logs")
        insist((half / "gradclip.pt").exists(), f"{half} holds no gradclip.pt")
        train(room, Run(STRATEGY, rest, resume=half))
        insist(not (rest / half.name).exists(), f"resumed: it began anew, and saved {half.name} again")
        for name in ("", "gradclip.pt", "optimizer.pt"):
            found = room.look("same", whole / last / name, rest / last / name)
            insist(found == "same", f"resumed: {name or 'weights'}: {found}")
        insist(room.look("same", half / "gradclip.pt", whole / last / "gradclip.pt") != "same", "the state stood still")
        return f"{len(keys.split())} keys logged, clipped in {rates} steps; all of it resumed to the bit"

    words = f" by {way}" if way else ""
    return {f"a tiny limit{words}": engaged, f"logs, checkpoint, resume{words}": goes_on}


def insist(holds: Any, words: str) -> None:
    """Fail with these words unless it holds.

    Raises:
        FailedError: else.
    """
    if not holds:
        raise FailedError(words)
