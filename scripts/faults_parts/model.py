"""A model of seven small tensors whose gradients can be broken on their way, on every backend alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from faults_parts.cases import FAULTS, Case

WORDS, WIDTH, DEEP, LENGTH, ROWS = 11, 8, 12, 4, 6
TENSORS = 7


class Fault:
    """What is put into the gradients of the steps in which it is active.

    Args:
        case: which elements, and what.
        rank: of this process.
        ranks: how many there are.

    Attributes:
        active: whether it is put into those of the coming backward.
        loss_scale: gives what the loss is multiplied by.
    """

    def __init__(self, case: Case, rank: int, ranks: int) -> None:
        self.active = False
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self._value = FAULTS[case.fault]
        self._one_element = case.where == "one element"
        self._here = case.where == "all ranks" or rank == ranks - 1
        self._only = case.number % TENSORS if case.where in ("one element", "one tensor") else None

    def on(self, weight: Tensor, place: int) -> Tensor:
        """The same weight; its gradient passes here on its way back, before ranks add theirs up."""
        seen = weight.view_as(weight)
        if self.active and self._here and self._only in (None, place):
            seen.register_hook(partial(self._put, place=place))
        return seen

    def _put(self, grad: Tensor, place: int) -> Tensor:
        value = self._value * self.loss_scale()
        if not self._one_element:
            return torch.full_like(grad, value)
        grad = grad.contiguous().clone()
        grad.view(-1)[(7 * place) % grad.numel()] = value
        return grad


class Embedding(nn.Embedding):
    """With a gradient that may be broken."""

    fault: Fault

    def forward(self, words: Tensor) -> Tensor:
        """As ever."""
        return functional.embedding(words, self.fault.on(self.weight, 0))


class Linear(nn.Linear):
    """With gradients that may be broken."""

    fault: Fault
    place: int

    def forward(self, rows: Tensor) -> Tensor:
        """As ever."""
        return functional.linear(rows, self.fault.on(self.weight, self.place), self.fault.on(self.bias, self.place + 1))


class Net(nn.Module):
    """Three layers over the mean of some embeddings, the same for the same number of a case."""

    def __init__(self, case: Case, fault: Fault) -> None:
        super().__init__()
        torch.manual_seed(case.number)
        self.embed = Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Linear(WIDTH, DEEP), Linear(DEEP, WIDTH)])
        self.head = Linear(WIDTH, WORDS)
        self.embed.fault = fault
        for i, layer in enumerate([*self.layers, self.head]):
            layer.fault, layer.place = fault, 1 + 2 * i

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of predicting one word."""
        rows = self.embed(input_ids).mean(dim=1)
        for layer in self.layers:
            rows = layer(rows).tanh()
        logits = self.head(rows)
        return {"loss": functional.cross_entropy(logits.float(), labels), "logits": logits}


def batch(step: int, rank: int) -> dict[str, Tensor]:
    """The rows of a rank in a step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    words = torch.randint(0, WORDS, (ROWS, LENGTH), generator=generator)
    return {"input_ids": words, "labels": words[:, 0]}
