"""Gradients that are whole on this process: one device, DDP, DataParallel, a model spread over devices by hand.

Under DDP every rank holds the same reduced gradient, so every rank computes the same numbers and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hf_gradclip.kernels import eager
from hf_gradclip.strategy import Needs
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.view import GradientView

_INNER = ("_orig_mod.", "_checkpoint_wrapped_module.")


class LocalView(GradientView):
    """The `.grad` of every trainable parameter of a model.

    Args:
        model: wrapped or not; a tied parameter counts once, a frozen one not at all until it is unfrozen.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable, or one is a DTensor.
    """

    def __init__(self, model: nn.Module, unscale: Callable[[], None] | None = None, guarded: bool = False) -> None:
        self._model = unwrap(model)
        self._unscale = unscale
        self._guarded = guarded
        self._read_parameters()

    def _read_parameters(self) -> None:
        named = list(named_parameters(self._model))
        self.parameters = [p for _, p in named if p.requires_grad]
        self._frozen = [p for _, p in named if not p.requires_grad]
        if not self.parameters:
            raise ValueError(
                f"{type(self._model).__name__} has no trainable parameter (requires_grad=True), so there is nothing "
                "to clip. Unfreeze or add some before training."
            )
        for name, parameter in named:
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    f"{name} is a DTensor (FSDP2 or tensor parallel). hf_gradclip does not read sharded gradients "
                    "yet; use clip=None with max_grad_norm, or DDP."
                )
        names = tuple(name for name, p in named if p.requires_grad)
        self._layout = Layout.of_parameters(names, [p.numel() for p in self.parameters], self.parameters[0].device)

    @property
    def layout(self) -> Layout:
        """One segment per trainable parameter; rebuilt when a frozen one was unfrozen."""
        if any(p.requires_grad for p in self._frozen):
            self._read_parameters()
        return self._layout

    @property
    def backend(self) -> str:
        """For the start-up line."""
        return f"local gradients on {self._layout.device.type}"

    @property
    def guarded(self) -> bool:
        """True if a GradScaler skips the steps with a non-finite gradient."""
        return self._guarded

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Norms of the local gradients, after the loss scale is taken out."""
        if self._unscale is not None and not rescale:
            self._unscale()
        layout = self.layout
        return measure(list(self._gradients()), layout, needs, rescale)

    @torch.no_grad()
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """Scale, then bound, the local gradients."""
        grads = list(self._gradients())
        eager.scale_(grads, plan.scale_S)
        if plan.bound_S is not None:
            eager.clamp_(grads, plan.bound_S)

    def drop_(self) -> None:
        """Set every gradient to None."""
        for parameter in self.parameters:
            parameter.grad = None

    def _gradients(self) -> Iterator[Tensor | None]:
        for parameter in self.parameters:
            yield writable(parameter)


def measure(grads: list[Tensor | None], layout: Layout, needs: Needs, rescale: bool) -> NormStats:
    """The statistics of flat gradients, one per segment of the layout."""
    max_abs_S = None
    if needs.max_abs or rescale:
        max_abs_S = eager.max_abs(grads, layout.dtype, layout.device)
    if not rescale:
        return NormStats(eager.sumsq(grads, None, layout.dtype, layout.device), layout, max_abs_S)
    assert max_abs_S is not None
    usable = (max_abs_S > 0) & max_abs_S.isfinite()
    divisor_S = torch.where(usable, max_abs_S, 1.0)
    sumsq_S = eager.sumsq(grads, divisor_S, layout.dtype, layout.device) * divisor_S.square()
    return NormStats(sumsq_S, layout, max_abs_S)


def writable(parameter: Tensor) -> Tensor | None:
    """The gradient as flat memory that may be scaled in place; None where it is missing.

    A sparse gradient is coalesced first, one whose elements share memory or leave gaps is made contiguous.
    """
    grad = parameter.grad
    if grad is None:
        return None
    if grad.is_sparse:
        if not grad.is_coalesced():
            parameter.grad = grad = grad.coalesce()
        grad = grad._values()
    memory = eager.flat(grad)
    if memory is None:
        parameter.grad = grad.contiguous()
        memory = eager.flat(parameter.grad)
    return memory


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under a name without the prefixes that compilation and checkpointing put inside it."""
    for name, parameter in model.named_parameters():
        for prefix in _INNER:
            name = name.replace(prefix, "")
        yield name, parameter
