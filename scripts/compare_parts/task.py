"""What a task is, and the text that several of them learn."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib")
PACKAGE_CHARACTERS = 140_000


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        name: for the table.
        what: in words.
        model: makes the model, from torch's random numbers.
        data: all examples; the first `evaluated` of them are for evaluation.
        noise: the same keys with as many examples from which nothing can be learnt: random inputs and labels.
        batch_size: examples per step.
        lr: the learning rate for AdamW; None where it is to be found.
        evaluated: how many examples are held out.
        uses: modules that have a part in the data, beside the one it is in and this one.
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    noise: Callable[[int, torch.Generator], Batch]
    batch_size: int
    lr: float | None = None
    evaluated: int = 256
    uses: tuple[ModuleType, ...] = ()


@functools.cache
def sources() -> list[str]:
    """The beginning of each package's sources, as long as the others'."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = (
        "\n".join(p.read_text("utf-8", "replace") for p in sorted((folder / name).glob("*.py"))) for name in PACKAGES
    )
    return [text[:PACKAGE_CHARACTERS] for text in joined]


def shuffled(data: Batch) -> Batch:
    """The examples in an order that is always the same."""
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    return {key: value[order] for key, value in data.items()}


def rows_of(data: Batch, index: Any) -> Batch:
    """Some of the examples."""
    return {key: value[index] for key, value in data.items()}
