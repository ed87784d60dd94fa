"""The files of a record, in Parquet: a part holds the steps from one to another, a row each.

A part is written aside and renamed, so every file of the folder is whole. Small parts are joined into a larger one
(see `keeping`), which covers the same steps; until the small ones are gone a reader leaves them out, so a crash at any
moment neither loses nor doubles a step.

| column | meaning |
|---|---|
| `step` | 1 is the first optimizer step |
| `loss` | mean over micro-batches (and ranks, where the Trainer writes); NaN where it is not known |
| `learning_rate` | of the first parameter group |
| `norm` | of the whole, before clipping |
| `threshold` | where clipping begins; NaN where it is not one number |
| `finite`, `skipped`, `bounded` | is the norm finite, was the step left out, were elements bounded |
| `scale_max` | the largest factor of any segment; of any parameter where an older part has no such column |
| `norms`, `scales` | per parameter: norm before clipping, norm after / before without bounds |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VERSION = 1
NUMBERS = ("loss", "learning_rate", "norm", "threshold", "scale_max")
FLAGS = ("finite", "skipped", "bounded")
BY_PARAMETER = ("norms", "scales")
UNSAID = {"spec": "unknown", "config": "unknown", "backend": "unknown", "world": 1}
"""Of a part that does not say."""

_PART = re.compile(r"([a-z0-9_]+)-(\d{9})-(\d{9})\.parquet")


class DamagedPartError(ValueError):
    """A part of a record that cannot be read, by its name."""


@dataclass(frozen=True, order=True)
class Part:
    """One file: the steps from `first` to `last`."""

    first: int
    last: int
    path: Path


def write_part(folder: Path, place: str, rows: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write rows as one part, so that nobody sees half a file.

    Args:
        folder: is made where it is missing.
        place: "gradient" or "update".
        rows: a column each, of equal lengths; `norms` and `scales` of shape (T, P).
        meta: what `Record.meta` gives back, with `names` and `numel`.
    """
    pa, parquet = _arrow()
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"step": pa.array(rows["step"], pa.int64())}
    for name in NUMBERS:
        columns[name] = pa.array(rows[name], pa.float32() if name in ("loss", "learning_rate") else pa.float64())
    columns |= {name: pa.array(rows[name], pa.bool_()) for name in FLAGS}
    for name in ("norms", "scales"):
        block = np.ascontiguousarray(rows[name], dtype=np.float32)
        flat = pa.array(block.reshape(-1), pa.float32())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, block.shape[1])
    table = pa.table(columns).replace_schema_metadata({"hf_gradclip": json.dumps({"version": VERSION, **meta})})
    first, last = int(rows["step"][0]), int(rows["step"][-1])
    path = folder / f"{place}-{first:09d}-{last:09d}.parquet"
    aside = path.with_suffix(".tmp")
    encoded = (*NUMBERS, "norms.list.element", "scales.list.element")
    encoding = dict.fromkeys(encoded, "BYTE_STREAM_SPLIT")
    try:
        parquet.write_table(table, aside, compression="zstd", use_dictionary=False, column_encoding=encoding)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk, half a file is in the way of what comes next
        raise
    aside.replace(path)


def parts_of(folder: Path, place: str) -> list[Part]:
    """The parts of a place in order, without those whose steps an earlier one covers."""
    found = []
    for path in folder.glob(f"{place}-*.parquet"):
        match = _PART.fullmatch(path.name)
        if match and match[1] == place:
            found.append(Part(int(match[2]), int(match[3]), path))
    kept: list[Part] = []
    for part in sorted(found, key=lambda part: (part.first, -part.last)):
        if not kept or part.last > kept[-1].last:
            kept.append(part)
    return kept


def meta_of(part: Part) -> dict[str, Any]:
    """What a part says of itself.

    Raises:
        DamagedPartError: if it cannot be read.
        ValueError: if it was written by a later version.
    """
    _, parquet = _arrow()
    with _named(part):
        meta: dict[str, Any] = json.loads(parquet.read_schema(part.path).metadata[b"hf_gradclip"])
        version, names, numel = meta["version"], meta["names"], meta["numel"]
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(numel):
            raise ValueError("its names and sizes do not match")
        later = version > VERSION
    if later:
        raise ValueError(f"{part.path.name}: was written by a later version of hf_gradclip. Install that one.")
    return UNSAID | meta


def columns_of(part: Part, width: int) -> dict[str, np.ndarray]:
    """The columns of a part, those by parameter of shape (T, width).

    Raises:
        DamagedPartError: if it cannot be read.
    """
    _, parquet = _arrow()
    with _named(part):
        table = parquet.read_table(part.path)
        columns: dict[str, np.ndarray] = {}
        for name in (*BY_PARAMETER, "step", *NUMBERS, *FLAGS):
            if name == "scale_max" and name not in table.column_names:
                columns[name] = columns["scales"].max(axis=1, initial=0.0)
                continue
            column = table[name].combine_chunks()
            flat = column.flatten() if name in BY_PARAMETER else column
            values = flat.to_numpy(zero_copy_only=False)
            columns[name] = values.reshape(table.num_rows, width) if name in BY_PARAMETER else values
    return columns


@contextmanager
def _named(part: Part) -> Iterator[None]:
    """An error while a part is read says which part, and what to do."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # pyarrow has a dozen kinds for a file that is not what it should be
        raise DamagedPartError(
            f"{part.path}: cannot be read ({' '.join(str(error).split())}). Move it away; the record then lacks the "
            f"steps {part.first} to {part.last}."
        ) from None


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("a record needs pyarrow: pip install 'hf_gradclip[report]'.") from None
    return pyarrow, pyarrow.parquet
