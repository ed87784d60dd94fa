"""What processes tell each other through the environment: how to clip, and that somebody did."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from hf_gradclip.config import ClipConfig
from hf_gradclip.strategy import SpecError

CLIP = "HF_GRADCLIP"
"""Holds a spec as `--clip` takes it, or a whole configuration in JSON."""
SEEN = "HF_GRADCLIP_SEEN"
"""Names a file that the first clipped step of any process makes."""
DEFAULT = "adaptive"


def clip_of_environment() -> ClipConfig:
    """The configuration in HF_GRADCLIP; `adaptive` where it is not set.

    Raises:
        SpecError: for a wrong one.
    """
    text = os.environ.get(CLIP, DEFAULT)
    try:
        return ClipConfig.parse(json.loads(text) if text.lstrip().startswith("{") else text)
    except ValueError as error:  # of JSON, and SpecError
        raise SpecError(f"{CLIP}={text!r}: {error}") from None


def note_step() -> None:
    """A step was clipped in this process; called once per run."""
    if path := os.environ.get(SEEN):
        with suppress(OSError):  # of a process that outlives the one that asks
            Path(path).touch()
