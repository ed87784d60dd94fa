"""What a kernel does: the operations, each declared once, for every language that they are written in.

The folders `eager` (plain torch), `c` and `triton` each have a file per Protocol, with functions of these names and
arguments. Shape letters: S segments (here one per tensor that is handed in), U units, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_gradclip.kernels.blocks import Axes
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.kernels.table import Table
from hf_gradclip.types import ClipPlan


class WrittenError(RuntimeError):
    """A kernel failed after it may have written: nothing may be tried again on this memory."""


class Whole(Protocol):
    """Operations on whole gradients: contiguous memory of any shape, or None where a gradient is missing."""

    def statistics(
        self, grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of squares and, if asked for, largest absolute element per gradient.

        Args:
            grads: contiguous, or None.
            dtype: of the results, float64 where the device has it.
            device: of the results.
            max_abs: whether the largest elements are asked for.

        Returns:
            The sums and the largest elements, each of shape (S,). A missing or empty gradient gives 0 in both; NaN
            gives NaN in the sum and inf in the largest element.

        Raises:
            MisfitError: for memory that is not contiguous, or of a dtype or device that is not taken.
        """

    def apply_(self, grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
        """g <- clamp(g * scale, -bound, +bound), in float32 or wider and rounded once; NaN stays NaN.

        Args:
            grads: as for `statistics`.
            scale_S: factor per gradient, shape (S,), or 0-d for one factor that serves all, which may be the host's.
            bound_S: largest absolute element per gradient, of the same shapes; inf or None bounds nothing.

        Raises:
            MisfitError: as `statistics`, and for vectors of another length; nothing was written then.
            WrittenError: for a failure after some gradients were written.
        """


class ByUnit(Protocol):
    """Operations by unit, on blocks: this process's part of a parameter in its logical shape, or None.

    `kept` are the axes of a block that count units, in order; a unit is everything along the other axes.
    """

    def serves(self, blocks: Sequence[Tensor | None], kept: Sequence[Axes]) -> bool:
        """Whether these blocks are taken."""

    def unit_sums(
        self,
        blocks: Sequence[Tensor | None],
        kept: Sequence[Axes],
        counts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Sum of squares per unit of all blocks, one after another, shape (sum of counts,); a missing block gives 0.

        Args:
            blocks: which `serves`; None where missing.
            kept: per block the axes that count units.
            counts: per block its units.
            dtype: of the result; squares may overflow to inf in float32.
            device: of the result.

        Raises:
            MisfitError: where a block has other units than its count says.
        """

    def unit_apply_(
        self,
        blocks: Sequence[Tensor | None],
        kept: Sequence[Axes],
        counts: Sequence[int],
        scale_U: Tensor,
        bound_U: Tensor | None,
    ) -> None:
        """g <- clamp(g * scale, -bound, +bound) by unit, in float32 or wider and rounded once; NaN stays NaN.

        Args:
            blocks, kept, counts: as for `unit_sums`.
            scale_U: factor per unit, shape (sum of counts,).
            bound_U: largest absolute element per unit, of the same shape; inf or None bounds nothing.

        Raises:
            MisfitError: as `unit_sums`, and for vectors of another length; nothing was written then.
            WrittenError: for a failure after some blocks were written.
        """


class Step(Protocol):
    """Operations of an optimizer's step, on the memory of one group of parameters. Gradients are never written."""

    def serves(self, memory: Memory, places: Places) -> bool:
        """Whether this memory is taken, with a plan that finds its numbers at these places."""

    def prepare(self, rule: Rule, memory: Memory, places: Places) -> Table | None:
        """Check and upload what does not depend on a plan, so that nothing but the launch is left when one is known.

        Args:
            rule: the arithmetic.
            memory: which `serves`.
            places: where a parameter finds its numbers.

        Returns:
            What `measure_update` and `step_` take for the same rule, memory and places; None where there is nothing to
            make ready.

        Raises:
            MisfitError: for memory or places that do not fit each other.
        """

    def measure_update(
        self, rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, table: Table | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure the update that `step_` would go along, before its own clip; nothing is written.

        Args:
            rule, memory, places: as for `prepare`.
            plan: for the gradients; None leaves them as they are. On their device, or one number of the host's for all.
            table: what `prepare` gave for these; None prepares now.

        Returns:
            Sum of squares and largest absolute element per parameter, float64 where the device has it, each of shape
            (P,). NaN gives NaN in the sum and inf in the largest element.

        Raises:
            MisfitError: for memory, places or plan that do not fit each other.
        """

    def step_(
        self,
        rule: Rule,
        memory: Memory,
        places: Places,
        plan: ClipPlan | None,
        after: ClipPlan | None,
        table: Table | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """One step: weights and moments change, in float32 or wider and rounded once.

        Args:
            rule, memory, places, plan, table: as for `measure_update`.
            after: for the updates; None leaves them as they are.
            skip: whether nothing is written, 0-d bool beside the memory, for which no host waits; None always steps.

        Raises:
            MisfitError: as `measure_update`; nothing was written then.
            WrittenError: for a failure after something was written.
        """


@dataclass(frozen=True)
class Language:
    """All operations in one language.

    Args:
        name: as a message says it.
        dtypes: of the memory that is taken; None takes any.
        whole, units, step: the files.
    """

    name: str
    dtypes: frozenset[torch.dtype] | None
    whole: Whole
    units: ByUnit
    step: Step
