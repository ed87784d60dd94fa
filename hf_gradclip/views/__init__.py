"""Where the gradients live: a view measures them and applies a plan. One file per kind of memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_gradclip.views.local import LocalView
from hf_gradclip.views.view import GradientView, UnsupportedBackendError


def view_of(model: nn.Module, unscale: Callable[[], None] | None = None, guarded: bool = False) -> GradientView:
    """The view for a model's `.grad`: local memory, or DTensor shards where any parameter is one.

    Args:
        model: wrapped or not.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable, or a placement cannot be added up.
        UnsupportedBackendError: for FSDP1.
    """
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UnsupportedBackendError(
                f"{type(model).__name__} is wrapped by FSDP1, which flattens parameters: its norms would be of one "
                "rank's part only. Use FSDP2 (fully_shard), or the model's own clip_grad_norm_."
            )
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        from hf_gradclip.views.dtensor import DTensorView

        return DTensorView(model, unscale, guarded)
    return LocalView(model, unscale, guarded)
