"""A clipper's state as a file beside the optimizer's, and the sentences for when it cannot be taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hf_gradclip.clipper import Clipper
from hf_gradclip.run.startup import world_size
from hf_gradclip.say import logger
from hf_gradclip.state import flatten
from hf_gradclip.strategy import name_of

STATE_NAME = "gradclip.pt"
UPDATE_NAME = "gradclip_update.pt"


def save_state(clipper: Clipper, path: str) -> None:
    """Write a clipper's state, so that a reader never sees half a file."""
    torch.save(clipper.state_dict(), f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_state(clipper: Clipper, path: str, say: bool = True) -> None:
    """Take a clipper's state from a file, or say what happens instead. Never raises over a missing or foreign file.

    Every rank calls it, and the file of rank 0 counts for all: ranks with different states would come apart.
    """
    found = [_read(path)]
    if world_size() > 1:
        dist.broadcast_object_list(found)
    (saved,) = found
    if saved is None:
        if flatten(clipper.state) and say:
            logger.warning(
                "%s is missing: the checkpoint was made without hf_gradclip or optimizer state. %s starts anew.",
                path,
                name_of(clipper.config.gradient),
            )
        return
    message = clipper.take_state(saved)
    if message and say:
        logger.warning("%s: %s", path, message)


def _read(path: str) -> dict[str, Any] | None:
    """What the file holds, nothing if it is damaged or of something else; None if there is none."""
    if not os.path.isfile(path):
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load has no error of its own for a file that is not one of torch's
        return {}
    return saved if isinstance(saved, dict) else {}


def save_updates(clippers: Sequence[Clipper], folder: str) -> None:
    """Write the state of each update clipper of a run."""
    for i, clipper in enumerate(clippers):
        save_state(clipper, os.path.join(folder, numbered(UPDATE_NAME, i)))


def load_updates(clippers: Sequence[Clipper], folder: str, say: bool = True) -> None:
    """Take the state of each update clipper of a run, or say what happens instead."""
    for i, clipper in enumerate(clippers):
        load_state(clipper, os.path.join(folder, numbered(UPDATE_NAME, i)), say)


def numbered(name: str, i: int) -> str:
    """The file of the i-th model or optimizer: the first has the plain name."""
    return name if i == 0 else name.replace(".", f"_{i}.")
