"""The parameters of an optimizer's groups: their names, and this process's memory of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from hf_gradclip.device import local
from hf_gradclip.kernels.rule import Memory


def memory_of(params: list[Tensor], states: list[dict[str, Any]], moments: tuple[str | None, ...]) -> Memory:
    """This process's memory of some parameters, their gradients and up to three moments, by their keys in the state."""
    kept = [[None if key is None else state[key] for state in states] for key in moments]
    columns: list[list[Any]] = [params, [p.grad for p in params], *kept]
    if not {type(t) for column in columns for t in column if t is not None} <= {Tensor, Parameter}:
        columns = [[None if t is None else local(t) for t in column] for column in columns]
    return Memory(*columns)


def named_of(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The parameters of some groups with their names, or their numbers where they came without."""
    named: list[tuple[str, Tensor]] = []
    for group in groups:
        numbers = [str(len(named) + i) for i in range(len(group["params"]))]
        named += zip(group.get("param_names", numbers), group["params"], strict=True)
    return named


def stepped_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """All parameters of some groups."""
    return [p for group in groups for p in group["params"]]
