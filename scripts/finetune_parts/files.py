"""Files of every kind that `datasets` reads, and folders of them, as one table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_parts.words import InputError, first_line

READ_BY: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
    ".csv": ("csv", {"sep": ",", "keep_default_na": False}),
    ".tsv": ("csv", {"sep": "\t", "keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
"""The builder of `datasets` for each ending, with its settings."""
KNOWN = ", ".join(READ_BY)


def files_at(path: Path, flag: str) -> list[Path]:
    """The file, or those below a folder in the order of their names.

    Args:
        path: of a file or a folder; hidden ones in it are left out.
        flag: that named it, for the messages.

    Raises:
        InputError: where there is nothing, or nothing of a kind that can be read.
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in READ_BY and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise InputError(f"{flag} {path}: no file in this folder ends in {KNOWN}.")
        return files
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file or folder.")
    if path.suffix.lower() not in READ_BY:
        raise InputError(f"{flag} {path}: must end in {KNOWN}, or be a folder of such files.")
    return [path]


def read_files(path: str, flag: str) -> Any:
    """A Dataset with the rows of a file, or of all files in a folder; a .txt or .md file is one row.

    Raises:
        InputError: for a file that cannot be read, and for files that differ in their columns.
    """
    files = files_at(Path(path), flag)
    endings = sorted({file.suffix.lower() for file in files})
    tables = [_read([file for file in files if file.suffix.lower() == ending], ending, flag) for ending in endings]
    for ending, table in zip(endings, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise InputError(
                f"{flag} {path}: the {endings[0]} files have the columns {', '.join(tables[0].column_names)}, the "
                f"{ending} files {', '.join(table.column_names)}. Give files with the same columns."
            )
    if len(tables) == 1:
        return tables[0]
    from datasets import concatenate_datasets

    return concatenate_datasets(tables)


def _read(files: Sequence[Path], ending: str, flag: str) -> Any:
    """Files of one ending as a Dataset."""
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # what a builder logs of a broken file is raised too
    kind, settings = READ_BY[ending]
    if kind == "csv":
        settings = settings | {"features": _of_words(files[0], settings["sep"])}
    where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} {ending} files)"
    try:
        table = load_dataset(kind, data_files=[str(file) for file in files], split="train", **settings)
    except Exception as error:  # the builders raise errors of pyarrow, pandas and their own
        raise InputError(f"{flag} {where}: cannot be read as {kind}: {first_line(error)}") from error
    if not len(table):
        raise InputError(f"{flag} {where}: has no rows.")
    return table


def _of_words(file: Path, sep: str) -> Any:
    """The columns of a table of words, in which 007 and NA are what they are."""
    from datasets import Features, Value

    with file.open(encoding="utf-8-sig", newline="") as lines:
        return Features({name: Value("string") for name in next(csv.reader(lines, delimiter=sep), [])})
