"""Names of parameters as people read them, and what is known of an adapter's by its name."""

from __future__ import annotations

import re

PEFT = "base_model.model."
_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.|$)")


def plain(name: str) -> str:
    """Without what PEFT puts before every name of a model."""
    return name.removeprefix(PEFT)


def is_factor(name: str) -> bool:
    """Whether this is one of the two factors of a low-rank adapter, of which one begins at 0.

    While it is 0 the gradient of the other one is exactly 0.
    """
    return _FACTOR.search(name) is not None
