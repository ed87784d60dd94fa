"""Which axes of a parameter count its units, the weights of one output each.

That depends on the layer: `nn.Linear` and `nn.Embedding` have a unit per row, the `Conv1D` of GPT-2 one per column,
convolutions and `nn.Bilinear` one per output, fused experts of shape (experts, out, in) one per expert and row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from hf_gradclip.strategy import Units
from hf_gradclip.views.heads import Heads

Shape = Sequence[int]


def axes_of(
    model: nn.Module | None,
    named: Sequence[tuple[str, Tensor]],
    shapes: Sequence[Shape],
    units: Units,
    heads: Heads,
    adapters: Collection[str] = (),
) -> list[tuple[int, ...] | None]:
    """Per parameter the axes that count units; () for one unit, None for a parameter that is not cut.

    Args:
        model: whose layers say how they store their weights; None goes by names and shapes alone.
        named: the parameters.
        shapes: of the whole parameters.
        units: what the strategy asks for.
        heads: see `heads_of`; their parameters are not cut, unless asked for.
        adapters: parameters that are not cut either.
    """
    layers = (
        {} if model is None else {id(p): layer for layer in model.modules() for p in layer.parameters(recurse=False)}
    )
    apart = {name for names in heads.values() for name in names}
    axes: list[tuple[int, ...] | None] = []
    for (name, p), shape in zip(named, shapes, strict=True):
        asked = units.of(name)
        if asked is None or (name in apart and not asked.head) or name in adapters:
            axes.append(None)
        elif is_vector(name, shape):
            axes.append(() if asked.vectors else None)
        else:
            axes.append(_matrix_axes(layers.get(id(p)), name, len(shape), asked.axis))
    return axes


def is_vector(name: str, shape: Shape) -> bool:
    """Whether a parameter is one unit, a bias of any shape too."""
    return len(shape) < 2 or name.endswith("bias")


def _matrix_axes(layer: nn.Module | None, name: str, ndim: int, axis: int | None) -> tuple[int, ...]:
    if isinstance(layer, nn.Embedding):
        return (0,)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return (1,)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear)) or ndim > 3:
        return (0,)
    if axis is None:  # transformers' Conv1D, and the experts of GPT-OSS, store (in, out)
        axis = int(type(layer).__name__ == "Conv1D" or getattr(layer, "is_transposed", None) is True)
    if ndim == 2:
        return (axis,)
    return (0, 1 + axis) if layer is not None or "expert" in name else (0,)
