"""What others put around an optimizer."""

from __future__ import annotations

from typing import Any


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate, DeepSpeed and Fabric."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
