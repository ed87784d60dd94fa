"""Where the gradients live: a view measures them and applies a plan. One file per kind of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from hf_gradclip.views.local import LocalView
from hf_gradclip.views.parameters import Watched
from hf_gradclip.views.view import GradientView


def view_of(model: Watched, unscale: Callable[[], None] | None = None, guarded: bool = False) -> GradientView:
    """The view for a model's `.grad`: local memory, DTensor shards where any parameter is one, or FSDP1's flat shards.

    Args:
        model: wrapped or not; or named parameters, whose view is never FSDP1's.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable, or a placement cannot be added up.
    """
    if isinstance(model, nn.Module):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            from hf_gradclip.views.flat import FlatView

            return FlatView(model, unscale, guarded)
        parameters: Iterable[Tensor] = model.parameters()
    else:
        parameters = (p for _, p in model)
    if any(hasattr(p, "device_mesh") for p in parameters):
        from hf_gradclip.views.dtensor import DTensorView

        return DTensorView(model, unscale, guarded)
    return LocalView(model, unscale, guarded)
