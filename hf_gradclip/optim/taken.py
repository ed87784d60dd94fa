"""A plan that somebody else decided on, for an optimizer that clips as it reads."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from hf_gradclip.fingerprint import fingerprint
from hf_gradclip.types import ClipPlan
from hf_gradclip.views.view import View


class Taken:
    """A plan between the clip and the step.

    The gradients are as they came until the step reads them. What is written to them in between would be clipped too,
    as noise that is added to a clipped gradient must not be, so it is refused, whether the plan clips or not.

    Args:
        plan: for the gradients; None leaves them as they are.
        view: that shows them.
    """

    def __init__(self, plan: ClipPlan | None, view: View) -> None:
        self.plan, self.view = plan, view
        self._seen = [fingerprint(p.grad) for p in view.here.watched()]

    def changed(self) -> bool:
        """Whether a gradient is another one now, or was written to; one that was taken away is not."""
        watched = self.view.here.watched()
        return len(watched) != len(self._seen) or any(
            p.grad is not None and (seen is None or not seen.fits(p.grad))
            for p, seen in zip(watched, self._seen, strict=True)
        )

    def insist(self, name: str, stepped: Collection[int]) -> None:
        """At the step: what is stepped must be what was clipped, and all of it.

        Args:
            name: of the optimizer, for the message.
            stepped: the `id` of each of its parameters.

        Raises:
            RuntimeError: if a gradient is another one since the clip, or was written to; if a parameter that was
                clipped has left the optimizer.
        """
        if self.changed():
            raise RuntimeError(
                f"{name}.step(): a gradient was written to, or replaced, between the clip and the step. Optimizers of "
                "hf_gradclip.optim clip as they read, so that between the two `.grad` is what backward left, and what "
                "you wrote would be clipped too. Write to it before the first clip call of a step, or use the "
                "optimizer of torch.optim."
            )
        gone = [p for p in self.view.here.watched() if p.grad is not None and id(p) not in stepped]
        if gone:
            raise RuntimeError(
                f"{name}.step(): {len(gone)} parameters left the optimizer between the clip and the step, and it was "
                "to clip them as it reads. Change the groups before the clip."
            )


def ids_of(groups: list[dict[str, list[Tensor]]]) -> set[int]:
    """The `id` of each parameter of some groups."""
    return {id(p) for group in groups for p in group["params"]}
