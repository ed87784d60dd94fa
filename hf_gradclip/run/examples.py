"""Which examples a batch holds: a dataset's indices, carried past the collator to the training step.

Only map-style datasets have indices. The model never sees them. Where somebody else's code takes the indices off on the
way, the batch is as it would have been, and its examples are not known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset

KEY = "gradclip_examples"
ROWS_STAY = frozenset(
    ("remove_columns", "select_columns", "rename_column", "rename_columns", "add_column")
) | frozenset(("cast", "cast_column", "flatten", "with_format", "with_transform"))
"""Methods of a `datasets.Dataset` that give another one with the same rows in the same order."""


def has_indices(dataset: Any) -> bool:
    """Whether examples are asked for by index."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


class Example(NamedTuple):
    """An example, with its index in front."""

    number: int
    content: Any


class Indexed(Dataset[Example]):
    """A map-style dataset whose examples come with their index; anything else is asked of the dataset itself.

    Args:
        dataset: with `__len__` and `__getitem__`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return Example(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        many = getattr(self.dataset, "__getitems__", None)
        items = many(list(indices)) if many is not None else [self.dataset[i] for i in indices]
        return [Example(*pair) for pair in zip(indices, items, strict=True)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # while it is unpickled there is no dataset yet
            raise AttributeError(name)
        found = getattr(self.dataset, name)
        return functools.partial(self._like, name) if name in ROWS_STAY and callable(found) else found

    def _like(self, name: str, *args: Any, **kwargs: Any) -> Indexed:
        """What a method gives, with the same indices."""
        return Indexed(getattr(self.dataset, name)(*args, **kwargs))


class Collate:
    """A collator of examples that come with their index, and leave it to the batch under KEY.

    Args:
        collate: of the examples alone.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        """The batch of the inner collator, with the indices if it is a mapping, or a list of the examples' dicts."""
        batch = self._collate([e.content if isinstance(e, Example) else e for e in examples])
        if not all(isinstance(e, Example) for e in examples):
            return batch
        indices = [int(e.number) for e in examples]
        if isinstance(batch, MutableMapping):
            batch[KEY] = torch.tensor(indices)
        elif type(batch) is list and len(batch) == len(indices) and all(type(row) is dict for row in batch):
            return [{**row, KEY: index} for row, index in zip(batch, indices, strict=True)]
        return batch


def take_indices(batch: Any) -> Any:
    """Remove the indices from a batch; None if it has none."""
    if isinstance(batch, MutableMapping):
        return batch.pop(KEY, None)
    if isinstance(batch, list) and batch and all(isinstance(row, dict) and KEY in row for row in batch):
        return [row.pop(KEY) for row in batch]
    return None


def text_of(dataset: Any, tokenizer: Any, index: int) -> str:
    """An example in words: its `input_ids`, decoded, or what else in it is text; "unknown" where nothing is.

    Without `input_ids` that is every string, every list of messages, and every list of token ids (`chosen_ids`, say)
    that is not there as a string too, each after the name of its column. Token ids need a tokenizer.
    """
    example = dataset[index]
    if not isinstance(example, Mapping):
        return "unknown"
    if "input_ids" in example:
        return _decoded(tokenizer, example["input_ids"]) or "unknown"
    said = {str(key): _words(tokenizer, str(key), value) for key, value in example.items()}
    twice = {f"{key}_ids" for key, text in said.items() if text}  # `prompt_ids` beside `prompt`
    return "\n".join(f"{key}: {text}" for key, text in said.items() if text and key not in twice) or "unknown"


def _words(tokenizer: Any, key: str, value: Any) -> str:
    """A column in words; "" if it has none."""
    if isinstance(value, str):
        return value
    if key.endswith("_ids") and not key.endswith(("type_ids", "position_ids")):
        return _decoded(tokenizer, value)
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "content" in turn for turn in value):
        return " ".join(f"<{turn.get('role', 'unknown')}> {_said(turn['content'])}" for turn in value)
    return ""


def _said(content: Any) -> str:
    """What a turn of a conversation says: a string, or its parts that are text."""
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and part.get("text"))


def _decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids)) if hasattr(tokenizer, "decode") else ""
