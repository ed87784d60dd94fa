"""A plan that somebody else decided on, for an optimizer that clips as it reads."""

from __future__ import annotations

from torch import Tensor

from hf_gradclip.types import ClipPlan
from hf_gradclip.views.view import View


class Taken:
    """A plan between the clip and the step.

    The gradients are as they came until the step reads them. What is written to them in between would be clipped too,
    as noise that is added to a clipped gradient must not be, so it is refused.

    Args:
        plan: for the gradients.
        view: that shows them.
    """

    def __init__(self, plan: ClipPlan, view: View) -> None:
        self._plan, self._view = plan, view
        self._versions = _versions(view)

    def insist(self, name: str) -> tuple[ClipPlan, View]:
        """The plan and the view, at the step.

        Args:
            name: of the optimizer, for the message.

        Raises:
            RuntimeError: if a gradient was written to since the clip.
        """
        if self._versions != _versions(self._view):
            raise RuntimeError(
                f"{name}.step(): a gradient was written to between the clip and the step. Optimizers of "
                "hf_gradclip.optim clip as they read, so that between the two `.grad` is what backward left, and what "
                "you wrote would be clipped too. Write to it before the clip, or use the optimizer of torch.optim."
            )
        return self._plan, self._view


def _versions(view: View) -> list[tuple[int, int] | None]:
    grads: list[Tensor | None] = [p.grad for p in view.here.watched()]
    return [None if grad is None else (id(grad), grad._version) for grad in grads]
