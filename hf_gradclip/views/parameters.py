"""The parameters that a view watches, and their gradients as memory of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.weak import WeakIdKeyDictionary

from hf_gradclip import kernels
from hf_gradclip.kernels import eager
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.units import Division, Held, axes_of
from hf_gradclip.views.view import UnsupportedBackendError

Shape = Sequence[int]
Watched = nn.Module | Sequence[tuple[str, Tensor]]
"""A model, or named parameters."""

_INNER = ("_orig_mod.", "_checkpoint_wrapped_module.")


class Parameters:
    """The trainable parameters of a model: a tied one once, a frozen or missing one as soon as it is trained.

    Args:
        model: wrapped by DDP or torch.compile, or not; or named parameters, those of an optimizer, say.
        place: where this process's part of a parameter lies in the whole, as (offsets, sizes); None holds it whole.

    Raises:
        ValueError: if no parameter is trainable.
    """

    def __init__(self, model: Watched, place: Callable[[Tensor], tuple[Shape, Shape]] | None = None) -> None:
        self._source = unwrap(model) if isinstance(model, nn.Module) else model
        self._place = place or (lambda p: ([0] * p.ndim, p.shape))
        self._units: Units | None = None
        self._held: Held | None = None
        self._read()

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks through its model once, whose modules nobody has watched."""
        return {**self.__dict__, "_counted": -1}

    def _read(self) -> None:
        self._counted = registrations().watch(self._source) if isinstance(self._source, nn.Module) else 0
        named = list(named_parameters(self._source) if isinstance(self._source, nn.Module) else self._source)
        self.trainable = [p for _, p in named if p.requires_grad]
        self._frozen: list[Tensor] = [p for _, p in named if not p.requires_grad]
        if not self.trainable:
            raise ValueError(
                f"{type(self._source).__name__} has no trainable parameter (requires_grad=True), so there is nothing "
                "to clip. Unfreeze or add some before training."
            )
        names = tuple(name for name, p in named if p.requires_grad)
        device = self.trainable[0].device
        if self._units is None:
            self._held = None
            self._layout = Layout.of_parameters(names, [p.numel() for p in self.trainable], device)
            return
        model = self._source if isinstance(self._source, nn.Module) else None
        shapes = [p.shape for p in self.trainable]
        axes = axes_of(model, list(zip(names, self.trainable, strict=True)), shapes, self._units)
        division = Division(names, shapes, axes, device)
        self._layout = division.layout
        self._held = Held(self._layout, [division.box(i, i, *self._place(p)) for i, p in enumerate(self.trainable)])

    def divide(self, units: Units) -> None:
        """Measure and scale by unit from here on."""
        self._units = units
        self._read()

    @property
    def layout(self) -> Layout:
        """The segments of the trainable parameters; a new one when a parameter was unfrozen or added."""
        self._look_again()
        return self._layout

    def watched(self) -> list[Tensor]:
        """The trainable parameters, with those that were unfrozen or added."""
        self._look_again()
        return self.trainable

    def _look_again(self) -> None:
        """New parameters count as frozen ones, so that a trainable one among them is read as unfrozen.

        Where FSDP2 shows whole parameters for a while, in the place of its shards, nobody looks until they are back.
        """
        if isinstance(self._source, nn.Module) and self._counted != registrations().count:
            known, shown = {id(p) for p in self.trainable}, list(self._source.parameters())
            sharded = [p for p in (*self.trainable, *self._frozen) if hasattr(p, "device_mesh")]
            if {id(p) for p in sharded} <= {id(p) for p in shown}:
                self._counted = registrations().watch(self._source)
                self._frozen = [p for p in shown if id(p) not in known]
        if any(p.requires_grad for p in self._frozen):
            self._read()

    def gradients(self) -> list[Tensor | None]:
        """The gradients as contiguous memory that may be scaled in place, this process's part of sharded ones."""
        return gradients_of(self.trainable)

    def measure(self, needs: Needs, rescale: bool) -> NormStats:
        """The statistics of this process alone; see GradientView.measure."""
        if self._held is not None:
            weights = [_shaped(p.detach()) for p in self.trainable] if needs.weights else None
            return self._held.measure(self._blocks(), weights, needs, rescale)
        layout = self.layout
        sumsq_S, max_abs_S = measure(self.gradients(), layout.dtype, layout.device, needs.max_abs, rescale)
        return NormStats(sumsq_S, layout, max_abs_S)

    def apply_(self, plan: ClipPlan) -> None:
        """Scale, then bound."""
        if self._held is not None:
            self._held.apply_(self._blocks(), plan)
        else:
            kernels.apply_(self.gradients(), plan.scale_S, plan.bound_S)

    def _blocks(self) -> list[Tensor | None]:
        """The gradients with their logical shapes, this process's part of sharded ones."""
        for name, parameter in zip(self._layout.names, self.trainable, strict=True):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise UnsupportedBackendError(
                    f"{name} has a sparse gradient, which has no units. Use sparse=False in nn.Embedding, or a "
                    "strategy of whole parameters."
                )
            writable(parameter)  # one with gaps is replaced
        return [None if p.grad is None else _shaped(p.grad) for p in self.trainable]

    def drop_(self) -> None:
        """Set every gradient to None."""
        for parameter in self.trainable:
            parameter.grad = None


class Registrations:
    """Counts what may have been put into a watched model: one look instead of a walk through it in every step.

    A parameter counts wherever it is registered, for the module it is in may find its way into a model unseen. A module
    counts where it is put into a watched one, so a list that a forward makes of some layers, as Llama's does, costs
    nothing. Where a wrapper registers anew in every step, as FSDP1 does, it is a walk still.
    """

    def __init__(self) -> None:
        self.count = 0
        self._watched: WeakIdKeyDictionary = WeakIdKeyDictionary()
        torch_module.register_module_parameter_registration_hook(self._add_parameter)
        torch_module.register_module_module_registration_hook(self._add_module)

    def watch(self, model: nn.Module) -> int:
        """Count what is put into this model from here on; the count so far."""
        for module in model.modules():
            self._watched[module] = None
        return self.count

    def _add_parameter(self, *_: object) -> None:
        if not torch.compiler.is_compiling():  # a compiled forward would be compiled again for every count
            self.count += 1

    def _add_module(self, module: nn.Module, *_: object) -> None:
        if not torch.compiler.is_compiling() and module in self._watched:
            self.count += 1


registrations = functools.cache(Registrations)


def measure(
    grads: list[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool, rescale: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, if asked for or for `rescale`, largest element of flat gradients of this process alone."""
    if not rescale:
        return kernels.statistics(grads, dtype, device, max_abs)
    max_abs_S = eager.max_abs(grads, dtype, device)
    divisor_S = eager.divisors(max_abs_S)
    return eager.sumsq(grads, divisor_S, dtype, device) * divisor_S.square(), max_abs_S


def _shaped(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in its logical shape; of a complex one the real numbers, along one more axis."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each as contiguous memory that may be scaled in place, see `writable`.

    In the usual case no Python runs per gradient, a quarter of the time where there are hundreds of small ones.
    """
    grads = [parameter.grad for parameter in parameters]
    present = [grad for grad in grads if grad is not None]
    plain = set(map(type, present)) <= {Tensor} and all(map(Tensor.is_contiguous, present))  # a sparse one is not
    if plain and not any(map(Tensor.is_complex, present)):
        return grads
    return [writable(parameter) for parameter in parameters]


def writable(parameter: Tensor) -> Tensor | None:
    """The gradient as contiguous memory that may be scaled in place; None where it is missing.

    A sparse gradient is coalesced first, one whose elements share memory or leave gaps is made contiguous. Of a
    DTensor it is the local shard.
    """
    grad = parameter.grad
    if grad is None:
        return None
    if hasattr(grad, "to_local"):
        return eager.flat(grad.to_local())
    if grad.is_sparse:
        if not grad.is_coalesced():
            parameter.grad = grad = grad.coalesce()
        grad = grad._values()
    memory = eager.flat(grad)
    if memory is None:
        parameter.grad = grad.contiguous()
        memory = eager.flat(parameter.grad)
    return memory


def spread_of(norm: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """(largest - smallest) / largest of a number >= 0 over the ranks of a group, 0-d; NaN and inf compare equal."""
    number = norm.nan_to_num(nan=1.0, posinf=1.0).to(device)
    ends = torch.stack([number, -number])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    return ends.sum() / ends[0].clamp(min=torch.finfo(ends.dtype).tiny)


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
