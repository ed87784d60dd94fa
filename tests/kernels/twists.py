"""Tensors and vectors of numbers that fit, and such as do not: for test_sanitizer.py, drawn by Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

F32, BF16 = torch.float32, torch.bfloat16
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([64, 257, 4097, 9001]))
SHAPES = st.one_of(
    st.tuples(SIZES),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(), (3, 5000), (70, 1025), (70_000,)]),
)
WRONG = ["expanded", "gaps", "freed", "cut", "float64", "int32", "meta", "other order", "smaller", "larger", "data"]


def numbers(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In memory of its own, of which the sanitizer knows the end."""
    seed = data.draw(st.integers(0, 9))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def twisted(tensor: Tensor, how: str) -> Tensor:
    """What stands where this tensor was, often at its address."""
    if not is_there(tensor):  # torch itself would read on
        return tensor
    if how == "expanded":
        return tensor.reshape(-1)[:1].expand(tensor.numel())
    if how == "gaps":
        return tensor.reshape(-1)[::2]
    if how == "freed":
        tensor.untyped_storage().resize_(0)
    elif how == "cut":
        tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    elif how in ("float64", "int32"):
        return tensor.to(getattr(torch, how))
    elif how == "meta":
        return tensor.to("meta")
    elif how == "other order":
        return tensor.t() if tensor.ndim == 2 else tensor
    elif how == "smaller":
        tensor.resize_(max(0, tensor.numel() // 2))
    elif how == "larger":
        tensor.resize_(2 * tensor.numel() + 1).fill_(1.5)
    elif how == "data":
        tensor.data = torch.full((tensor.numel() + 3,), 0.25, dtype=tensor.dtype)
    return tensor


def is_there(tensor: Tensor | None) -> bool:
    """Whether torch itself can read it."""
    if tensor is None or not tensor.is_cpu:
        return False
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    return tensor.numel() > 0 and end <= tensor.untyped_storage().nbytes()


def vector(data: st.DataObject, count: int, *, one: bool = True) -> Tensor | None:
    """Numbers for so many, mostly; of several dtypes and with gaps too."""
    kind = data.draw(
        st.sampled_from(["right"] * 20 + ["one"] * one + ["gaps", "short", "long", "flat", "wide", "meta", "none"])
    )
    dtype = data.draw(st.sampled_from([torch.float64, F32, BF16, torch.int64]))
    length = {"short": max(count - 1, 0), "long": count + 1, "gaps": 2 * count}.get(kind, count)
    made = (torch.arange(length) % 5 / 4 + 0.25).to(dtype)
    shaped = {
        "one": lambda: torch.tensor(0.5, dtype=dtype), "gaps": lambda: made[::2], "flat": lambda: made.view(1, -1),
        "wide": lambda: made.view(-1, 1).expand(-1, 2), "meta": lambda: made.to("meta"), "none": lambda: None,
    }  # fmt: skip
    return shaped.get(kind, lambda: made)()
