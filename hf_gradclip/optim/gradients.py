"""The gradients that a step is about to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def settle_(params: Sequence[Tensor]) -> None:
    """Add up over ranks the gradients that are parts of a sum: sequence parallelism leaves some so.

    Args:
        params: of an optimizer; some may have no gradient.

    Raises:
        ValueError: for a gradient that is not taken, before anything has changed.
    """
    grads = [grad for p in params if (grad := p.grad) is not None]
    plain = set(map(type, grads)) <= {Tensor} and {grad.layout for grad in grads} <= {torch.strided}
    if plain and not any(map(Tensor.is_complex, grads)):
        return
    for p in params:
        if hasattr(p.grad, "placements"):
            from hf_gradclip.views.dtensor import settle_placements

            settle_placements(p)
        if p.grad is not None and (p.grad.is_sparse or p.grad.is_complex()):
            kind = "sparse gradients" if p.grad.is_sparse else "complex parameters"
            raise ValueError(f"hf_gradclip.optim does not take {kind}. Use the optimizer of torch.optim, with Clipper.")
