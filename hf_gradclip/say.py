"""How the package speaks to the person at the terminal: the logger `hf_gradclip`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("hf_gradclip")


def announce(text: str) -> None:
    """Say something once to the person at the terminal; `logging.getLogger("hf_gradclip")` silences it."""
    if not logger.handlers and not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.info(text)
