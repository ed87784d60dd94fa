"""What plain torch's step takes: it reads no address, and would broadcast, or find in the middle what does not fit."""

from __future__ import annotations

from hf_gradclip.kernels.blocks import are_axes, units_of
from hf_gradclip.kernels.rule import Memory, Places
from hf_gradclip.kernels.table import MisfitError, insist_on_memory
from hf_gradclip.types import ClipPlan


def insist_on_step_memory(memory: Memory) -> None:
    """Stop before torch broadcasts what does not belong together, or finds in the middle what it does not take.

    Raises:
        MisfitError: for a gradient or a moment of another shape or device than its weight, or memory that cannot be
            read or written.
    """
    names = ("weight", "gradient", "first moment", "second moment", "third moment")
    for i, (weight, *others) in enumerate(zip(*memory, strict=True)):
        for name, tensor in zip(names, (weight, *others), strict=True):
            if tensor is None:
                continue
            insist_on_memory(f"parameter {i}'s {name}", tensor, written=name != "gradient")
            if tensor.device != weight.device:
                raise MisfitError(f"parameter {i} is on {weight.device} and its {name} on {tensor.device}.")
            if tensor.shape != weight.shape:
                raise MisfitError(
                    f"parameter {i} has shape {tuple(weight.shape)} and its {name} {tuple(tensor.shape)}: was it "
                    "resized after the optimizer's first step? Make the optimizer anew, or drop the state of this "
                    "parameter."
                )


def insist_on_units(memory: Memory, places: Places, plan: ClipPlan | None) -> None:
    """Stop before units are scaled that are not there. On a GPU the host does not read which segments they are.

    Raises:
        MisfitError: for a parameter of other units than it is said to have, or segments that the plan does not have.
    """
    length = None if plan is None or plan.scale_S.ndim == 0 else len(plan.scale_S)
    lowest, highest = places.ends
    inside = length is None or (lowest >= 0 and highest < length)
    for i, (weight, cut) in enumerate(zip(memory.weights, places.units or (), strict=False)):
        if cut is None:
            continue
        fits = are_axes(cut.kept, weight.ndim) and tuple(cut.segments.shape) == (units_of(weight.shape, cut.kept),)
        if not fits or not inside:
            raise MisfitError(
                f"parameter {i} has shape {tuple(weight.shape)}, and {cut} says what its units along these axes are in "
                f"a plan of {length}. Was it resized? Its units must be counted anew."
            )
