"""As much of the package `datasets` as scripts/finetune.py and the Trainer use, for a machine without it.

Copied under the name `datasets.py`. Columns are lists in memory, and nothing is loaded from anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

__version__ = "4.0.0"


class Dataset:
    """Columns of equal length."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> Dataset:
        """As in datasets."""
        return cls({name: list(column) for name, column in columns.items()})

    @property
    def column_names(self) -> list[str]:
        """As in datasets."""
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self._columns[index]
        if isinstance(index, list):
            return {name: [column[i] for i in index] for name, column in self._columns.items()}
        return {name: column[index] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def select(self, rows: Sequence[int]) -> Dataset:
        """As in datasets."""
        return Dataset(self[list(rows)])

    def remove_columns(self, names: str | list[str]) -> Dataset:
        """As in datasets."""
        gone = [names] if isinstance(names, str) else names
        return Dataset({name: column for name, column in self._columns.items() if name not in gone})

    def train_test_split(self, test_size: float, seed: int | None = None) -> dict[str, Dataset]:
        """As in datasets; the rows are others."""
        rows = list(range(len(self)))
        random.Random(seed).shuffle(rows)
        cut = max(1, round(test_size * len(rows)))
        return {"train": self.select(rows[cut:]), "test": self.select(rows[:cut])}

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], **_: Any) -> Dataset:
        """Batched, over everything at once, without the columns that were there."""
        return Dataset(function(dict(self._columns)))


class IterableDataset:
    """Never made; the Trainer asks for the class."""


class DatasetDict(dict[str, Dataset]):
    """Datasets by name."""

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], **settings: Any) -> DatasetDict:
        """Of each."""
        return DatasetDict({name: data.map(function, **settings) for name, data in self.items()})


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """Not here."""
    raise NotImplementedError("the package `datasets` is not installed, so nothing can be loaded")
