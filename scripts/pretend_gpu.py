"""Tensors that say they are on a GPU and compute on the CPU, and a count of what a GPU would have been asked to do.

Each holds an ordinary tensor, on which torch's operations run for real, so that every number that the host reads is
one that the device would have had. Kernels in Triton are not run: where one measures, every gradient gets the norm that
was asked for. Counted as one launch are

- an operation of torch that computes or fills, after torch has split it into those of a backend (`torch.where(c, x,
  1.0)` is a fill and a where); views, and memory that is left empty, are none;
- each tensor of a cat of several dtypes, which CUDA copies one by one;
- a copy from or to the host;
- a kernel in Triton.

Sorts and operations on lists of tensors count as one and are several.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.jit import JITFunction

from hf_gradclip.kernels import check, choice, table

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
SILENT = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "set_",
}
MEASURED = ("sum", "max")  # how the kernels' names for what they measure begin


class OnGpu(Tensor):
    """A tensor that says it is on a GPU. Methods are here that would enter the device in torch.

    Attributes:
        held: where it computes.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        """Of the same layout in memory."""
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Only where no `Gpu` is there to count."""
        return _computed(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor):
            return aten.index(self, [index])
        return OnGpu(self.held[index])

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def item(self) -> Any:
        """Read to the host."""
        return aten._local_scalar_dense(self)

    def tolist(self) -> Any:
        """The same of a vector."""
        return self.cpu().tolist()

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"


class Gpu(TorchDispatchMode):
    """While it is entered, `device="cuda"` gives an `OnGpu`, and Triton's kernels serve.

    Attributes:
        norm: what a kernel measures of every gradient from now on; of a weight it is 1.
        launches: how often each was made since `forget`.
        reads: copies to the host since.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = 1.0
        self._weights: set[int] = set()
        self._measured = 1.0
        self._patches = contextlib.ExitStack()
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.launches: Counter[str] = Counter()
        self.reads = 0

    def weight(self, shape: tuple[int, ...]) -> OnGpu:
        """A weight."""
        made = self.gradient(shape)
        self._weights.add(made.held.data_ptr())
        return made

    def gradient(self, shape: tuple[int, ...]) -> OnGpu:
        """Anything else."""
        return OnGpu(torch.zeros(shape))

    def __enter__(self) -> Gpu:
        address, stream = Tensor.data_ptr, SimpleNamespace(stream_id=0)
        for patch in (
            mock.patch.object(JITFunction, "run", lambda kernel, *args, **_: self._launch(kernel, args)),
            mock.patch.object(Tensor, "data_ptr", lambda t: address(t.held if isinstance(t, OnGpu) else t)),
            mock.patch.object(Tensor, "pin_memory", lambda t, *_: t),
            mock.patch.object(torch.cuda, "_lazy_init"),
            mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
            mock.patch.object(torch.cuda, "current_stream", return_value=stream),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
            mock.patch.object(table, "PLAIN", {*table.PLAIN, OnGpu}),
            mock.patch.object(check, "check"),
        ):
            self._patches.enter_context(patch)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a copy that is seen here
        choice.forget()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._patches.close()
        choice.forget()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute and count."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(tensor, OnGpu) for tensor in before)
        made = _computed(func, args, kwargs)
        there = any(isinstance(leaf, OnGpu) for leaf in tree_leaves(made))
        if not (here or there) or func.is_view or name in SILENT:
            return made
        given = any(isinstance(leaf, Tensor) for leaf in tree_leaves(made))
        if name == "_local_scalar_dense" or (here and given and not there):
            self.reads += 1
            self.launches[f"{name} to the host"] += 1
        elif name in ("cat", "stack") and len({tensor.dtype for tensor in before}) > 1:
            self.launches[f"{name} of several dtypes"] += len(before)
        else:
            from_host = name in ("_to_copy", "copy_") and not all(isinstance(tensor, OnGpu) for tensor in before[-1:])
            self.launches[f"{name} from the host" if from_host else name] += 1
        return made

    def _launch(self, kernel: JITFunction[Any], args: tuple[Any, ...]) -> None:
        """A kernel, which is not run."""
        self.launches[f"kernel {kernel.fn.__name__}"] += 1
        given = dict(zip(kernel.arg_names, args, strict=False))
        addresses = next((given[name] for name in given if name.startswith("address")), None)
        if addresses is not None:
            first = int(addresses.held.view(-1)[0])
            self._measured = 1.0 if first in self._weights and not _is_step(given) else self.norm
        for name, value in given.items():
            if isinstance(value, OnGpu) and name.startswith(MEASURED):
                value.held.fill_(self._measured**2 if name.startswith("sum") else self._measured)


def _is_step(given: dict[str, Any]) -> bool:
    """Whether a kernel reads weights for an optimizer's step, so that what it measures is an update."""
    return "lr" in given


def _computed(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the CPU inside."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = kwargs.get("device")
    there = any(isinstance(t, OnGpu) for t in tensors) if asked is None else torch.device(asked).type == "cuda"
    if there and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, (args, kwargs))
    with torch.utils._python_dispatch._disable_current_modes():
        out = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:  # type: ignore[attr-defined]
        return return_and_correct_aliasing(func, args, kwargs, out)
    return tree_map(lambda x: OnGpu(x) if isinstance(x, Tensor) and there else x, out)
