"""Which examples a batch holds: a dataset's indices, carried past the collator to the training step.

Only map-style datasets have indices. The model never sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

KEY = "gradclip_examples"


def has_indices(dataset: Any) -> bool:
    """Whether examples are asked for by index."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


class Indexed(Dataset[tuple[int, Any]]):
    """A map-style dataset whose examples come with their index.

    Args:
        dataset: with `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        items = many(list(indices)) if many is not None else [self.dataset[i] for i in indices]
        return list(zip(indices, items, strict=True))


class Collate:
    """A collator of examples that come with their index; the batch gets the indices under KEY.

    Args:
        collate: of the examples alone.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: list[tuple[int, Any]]) -> Any:
        """The batch of the inner collator, with the indices if it is a mapping."""
        batch = self._collate([example for _, example in examples])
        if isinstance(batch, MutableMapping):
            batch[KEY] = torch.tensor([int(index) for index, _ in examples])
        return batch


def take_indices(batch: Any) -> Any:
    """Remove the indices from a batch; None if it has none."""
    return batch.pop(KEY) if isinstance(batch, MutableMapping) and KEY in batch else None


def text_of(dataset: Any, tokenizer: Any, index: int) -> str:
    """An example in words: its `input_ids`, decoded; "unknown" where it has none, or there is no tokenizer."""
    example = dataset[index]
    if not hasattr(tokenizer, "decode") or not isinstance(example, Mapping) or "input_ids" not in example:
        return "unknown"
    return str(tokenizer.decode(example["input_ids"]))
