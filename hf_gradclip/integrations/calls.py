"""What a call of `accelerator.clip_grad_norm_` is of."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor, nn

from hf_gradclip.clipper import Clipper


def model_of(
    parameters: Sequence[Tensor], known: Sequence[tuple[nn.Module, Clipper]], models: Sequence[nn.Module], joint: bool
) -> nn.Module:
    """The prepared model whose trainable parameters these are.

    Args:
        parameters: as they were given.
        known: the models that have a clipper.
        models: all that were prepared.
        joint: whether one clipper is of all of them.

    Raises:
        ValueError: if they are not all those of one model.
    """
    in_order = [p for p in parameters if p.requires_grad]
    for model, clipper in known:
        watched = clipper.view.watched()
        if watched and len(watched) == len(in_order) and all(map(is_, watched, in_order)):
            return model
    if not models:
        raise ValueError(
            f"accelerator.clip_grad_norm_({len(in_order)} trainable parameters): no model was prepared yet. Call "
            "model, optimizer = accelerator.prepare(model, optimizer) first."
        )
    given, sizes = {*map(id, in_order)}, []
    trainable = [{id(p) for p in model.parameters() if p.requires_grad} for model in models]
    together = set().union(*trainable)
    for model, own in zip(models, trainable, strict=True):  # in another order, or not known to the view
        if own and given == (together if joint else own):
            return model
        sizes.append(len(own))
    must, call = "of one prepared model, which", "model.parameters()"
    if joint:
        must, call = "of all prepared models (joint=True), which", "those of each, itertools.chain(...)"
    elif given == together:
        call = "the parameters of each in a call of its own, or use attach(..., joint=True) for one norm over all"
    raise ValueError(
        f"accelerator.clip_grad_norm_({len(given)} trainable parameters): must be all trainable parameters {must} "
        f"have {sizes}. Pass {call}."
    )


def norm_of(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of the gradients of some parameters together, 0-d."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
