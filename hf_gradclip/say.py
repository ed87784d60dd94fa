"""How the package speaks to the person at the terminal: the logger `hf_gradclip`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("hf_gradclip")


def announce(text: str) -> None:
    """Say something once to the person at the terminal, also where logging in general begins at WARNING.

    A level that is set on `logging.getLogger("hf_gradclip")` is kept, so that `setLevel(logging.WARNING)` silences it.
    """
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers and not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
    logger.info(text)


def is_first() -> bool:
    """Whether this process is the first of a job, or its only one: what all of them know is said by that one."""
    import torch.distributed as dist  # what only speaks, as the command line does, need not wait for torch

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def printable(text: str) -> str:
    """Words that may be of somebody's file, with what moves a cursor or turns a line written as `\\x1b`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(text))


def now_and_then(count: int) -> bool:
    """Whether the count of something that may come often is 1, 2, 4, 8, ...: then it is said."""
    return count & (count - 1) == 0
