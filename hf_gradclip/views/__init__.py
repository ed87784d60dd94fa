"""Where the gradients live. A view measures them and applies a plan: what is here times how it adds up over ranks.

One file per kind of memory: `plain`, `dtensor` (which share `parameters`), `flat`, `zero`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from hf_gradclip.views.plain import Plain
from hf_gradclip.views.trainable import Watched
from hf_gradclip.views.view import UnsupportedBackendError, View


def view_of(model: Watched, unscale: Callable[[], None] | None = None, guarded: bool = False) -> View:
    """The view for a model's `.grad`: local memory, DTensor shards where any parameter is one, or FSDP1's flat shards.

    Args:
        model: wrapped or not; or a part of one, or named parameters, which cannot be FSDP1's.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable, or a placement cannot be added up.
        UnsupportedBackendError: for a parameter of FSDP1 without its model; for a model that an old transformers split
            into shards that nothing marks.
    """
    if isinstance(model, nn.Module):
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
            from hf_gradclip.views.flat import Flat

            flat = Flat(model)
            return View(flat, flat.ranks, unscale=unscale, guarded=guarded)
        parameters: Iterable[Tensor] = model.parameters()
    else:
        parameters = (p for _, p in model)
    if any(hasattr(p, "device_mesh") for p in parameters):
        from hf_gradclip.views.dtensor import Shards

        shards = Shards(model)
        return View(shards, shards.ranks, unscale=unscale, guarded=guarded)
    if isinstance(model, nn.Module):
        _refuse_unmarked(model)
    return View(Plain(model), unscale=unscale, guarded=guarded)


def _refuse_unmarked(model: nn.Module) -> None:
    """Stop for tensor parallelism on plain tensors: no norm can be made of shards that do not tell which they are."""
    for module in model.modules():
        ranks = getattr(module, "_tp_size", None) or 1
        if ranks > 1:
            raise UnsupportedBackendError(
                f"{type(module).__name__} is loaded with tp_size={ranks}, and its parameters are plain tensors: this "
                "version of transformers does not mark which part of a weight a rank holds, so the norm of the whole "
                "gradient is not known. Use a version whose tensor parallelism is made of DTensors (5.17 was tried)."
            )
