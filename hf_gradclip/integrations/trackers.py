"""How a run clips, in what the trackers keep of its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hf_gradclip.config import ClipConfig

NAME = "gradclip"
MODULES = {"_wandb": {"allow_val_change": True}, "_trackio": {"allow_val_change": True}, "_swanlab": {}}
"""Where callbacks of the Trainer keep a tracker's module, and what its `config.update` is told beside the values."""


def tell_trackers(callbacks: Iterable[Any], config: ClipConfig) -> None:
    """Write a configuration under NAME: as a text for TensorBoard, in `config` for Weights & Biases, Trackio, SwanLab.

    Args:
        callbacks: of a Trainer, which have begun their runs.
        config: of the run.
    """
    values = config.to_dict()
    for callback in callbacks:
        if (board := getattr(callback, "tb_writer", None)) is not None:
            board.add_text(NAME, json.dumps(values, indent=2))
        for attribute, more in MODULES.items():
            kept = getattr(getattr(callback, attribute, None), "config", None)
            if kept is not None:
                kept.update({NAME: values}, **more)
