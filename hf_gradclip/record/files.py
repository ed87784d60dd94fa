"""A run's record as Parquet parts in OUTPUT_DIR/gradclip: one row per optimizer step.

A part is written aside and renamed, so every file of the folder is whole. Small parts are joined into a larger one,
which covers the same steps; until the small ones are gone a reader leaves them out, so a crash at any moment neither
loses nor doubles a step.

| column | meaning |
|---|---|
| `step` | 1 is the first optimizer step |
| `loss` | mean over micro-batches (and ranks, where the Trainer writes); NaN where it is not known |
| `learning_rate` | of the first parameter group |
| `norm` | of the whole, before clipping |
| `threshold` | where clipping begins; NaN where it is not one number |
| `finite`, `skipped`, `bounded` | is the norm finite, was the step left out, were elements bounded |
| `norms`, `scales` | per parameter: norm before clipping, norm after / before without bounds |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FOLDER = "gradclip"
VERSION = 1
JOIN_AT = 20
LARGE = 1000
NUMBERS = ("loss", "learning_rate", "norm", "threshold")
FLAGS = ("finite", "skipped", "bounded")

_PART = re.compile(r"([a-z0-9_]+)-(\d{9})-(\d{9})\.parquet")


@dataclass(frozen=True)
class Record:
    """What was recorded of one place, as numpy arrays; T steps, P parameters.

    Args:
        names: of the parameters.
        numel_P: their numbers of elements, int64.
        step_T: int64, rising.
        loss_T: float64, and so are learning_rate_T, norm_T and threshold_T; the file's docstring has their meaning.
        finite_T: bool, and so are skipped_T and bounded_T.
        norm_TP: float32.
        scale_TP: float32.
        meta: `spec`, `config`, `place`, `backend`, `world`, `version`; of the last steps where the run went on under
            another configuration.
        earlier: the meta of what it ran under before, each with `last`, the last step of it.
    """

    names: tuple[str, ...]
    numel_P: np.ndarray
    step_T: np.ndarray
    loss_T: np.ndarray
    learning_rate_T: np.ndarray
    norm_T: np.ndarray
    threshold_T: np.ndarray
    finite_T: np.ndarray
    skipped_T: np.ndarray
    bounded_T: np.ndarray
    norm_TP: np.ndarray
    scale_TP: np.ndarray
    meta: dict[str, Any]
    earlier: tuple[dict[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.step_T)

    def of(self, rows: np.ndarray | slice) -> dict[str, np.ndarray]:
        """The columns of some rows, by column name."""
        columns = {name: getattr(self, f"{name}_T") for name in ("step", *NUMBERS, *FLAGS)}
        return {name: column[rows] for name, column in columns.items()} | {
            "norms": self.norm_TP[rows],
            "scales": self.scale_TP[rows],
        }


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
        columns[name] = pa.array(rows[name], pa.float64() if name in ("norm", "threshold") else pa.float32())
    columns |= {name: pa.array(rows[name], pa.bool_()) for name in FLAGS}
    for name in ("norms", "scales"):
        block = np.ascontiguousarray(rows[name], dtype=np.float32)
        flat = pa.array(block.reshape(-1), pa.float32())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, block.shape[1])
    table = pa.table(columns).replace_schema_metadata({"hf_gradclip": json.dumps({"version": VERSION, **meta})})
    first, last = int(rows["step"][0]), int(rows["step"][-1])
    path = folder / f"{place}-{first:09d}-{last:09d}.parquet"
    aside = path.with_suffix(".tmp")
    parquet.write_table(
        table,
        aside,
        compression="zstd",
        use_dictionary=False,
        column_encoding={
            **dict.fromkeys(("loss", "learning_rate", "norm", "threshold"), "BYTE_STREAM_SPLIT"),
            **dict.fromkeys(("norms.list.element", "scales.list.element"), "BYTE_STREAM_SPLIT"),
        },
    )
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


def join_small(folder: Path, place: str, at: int = JOIN_AT) -> None:
    """Join the last parts into one when `at` of them have fewer than LARGE steps each, and remove what it covers.

    Parts that were recorded under another configuration stay apart.
    """
    small: list[Part] = []
    for part in reversed(parts_of(folder, place)):
        if part.last - part.first + 1 >= LARGE:
            break
        small.insert(0, part)
    if len(small) < max(at, 2):
        return
    configs = [_meta_of(part).get("config") for part in small]
    while any(config != configs[-1] for config in configs):
        small, configs = small[1:], configs[1:]
    if len(small) < 2:
        return
    record = _read(small)
    write_part(folder, place, record.of(slice(None)), record.meta)
    joined = (int(record.step_T[0]), int(record.step_T[-1]))
    for part in small:
        if (part.first, part.last) != joined:
            part.path.unlink(missing_ok=True)


def drop_after(folder: Path, place: str, step: int) -> int:
    """Remove the rows past a step; how many there were."""
    dropped = 0
    for part in reversed(parts_of(folder, place)):
        if part.last <= step:
            break
        record = _read([part])
        kept = record.step_T <= step
        dropped += int((~kept).sum())
        if kept.any():
            write_part(folder, place, record.of(kept), record.meta)
        part.path.unlink()
    for path in folder.glob(f"{place}-*.parquet"):  # leftovers that a joined part covered
        match = _PART.fullmatch(path.name)
        if match and match[1] == place and int(match[3]) > step:
            path.unlink()
    return dropped


def folder_of(run: str | Path) -> Path:
    """The folder with the record: `run` itself, or its `gradclip`.

    Raises:
        FileNotFoundError: if neither holds a record.
    """
    run = Path(run)
    for folder in (run / FOLDER, run):
        if any(folder.glob("*-*.parquet")):
            return folder
    raise FileNotFoundError(
        f"{run}: holds no record ({FOLDER}/*.parquet). Train with record=True, or --clip_record true in finetune.py."
    )


def read_record(run: str | Path, place: str = "gradient") -> Record:
    """The record of a run.

    Args:
        run: its output_dir, or the folder `gradclip` in it.
        place: "gradient" or "update".

    Returns:
        Its steps in order. Where the set of parameters changed in the run, a parameter's norm and scale are NaN at
        the steps that did not have it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was written by a later version.
    """
    folder = folder_of(run)
    parts = parts_of(folder, place)
    if not parts:
        raise FileNotFoundError(f"{folder}: holds no record of the {place}.")
    return _read(parts)


def _read(parts: Iterable[Part]) -> Record:
    _, parquet = _arrow()
    found: dict[str, list[np.ndarray]] = {}
    numel: dict[str, int] = {}
    owners: list[list[str]] = []
    meta: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []
    until = -1
    for part in parts:
        table = parquet.read_table(part.path)
        new_meta = _meta_of(part)
        if meta and meta.get("config") != new_meta.get("config"):
            earlier.append({**meta, "last": until})
        meta = new_meta
        numel |= dict(zip(meta["names"], meta["numel"], strict=True))
        owners.append(meta["names"])
        new = table["step"].to_numpy() > until
        until = part.last
        for name in table.column_names:
            column = table[name].combine_chunks()
            if name in ("norms", "scales"):
                values = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, len(meta["names"]))
            else:
                values = column.to_numpy(zero_copy_only=False)
            found.setdefault(name, []).append(values[new])
    for name in ("norms", "scales"):
        found[name] = [_spread(values, own, [*numel]) for values, own in zip(found[name], owners, strict=True)]
    meta |= {"names": [*numel], "numel": [*numel.values()]}
    columns = {name: np.concatenate(values) for name, values in found.items()}
    numbers = {f"{name}_T": columns[name].astype(np.float64) for name in NUMBERS}
    flags = {f"{name}_T": columns[name].astype(bool) for name in FLAGS}
    return Record(
        names=tuple(meta["names"]),
        numel_P=np.array(meta["numel"], dtype=np.int64),
        step_T=columns["step"],
        norm_TP=columns["norms"],
        scale_TP=columns["scales"],
        meta=meta,
        earlier=tuple(earlier),
        **numbers,
        **flags,
    )


def _meta_of(part: Part) -> dict[str, Any]:
    _, parquet = _arrow()
    meta: dict[str, Any] = json.loads(parquet.read_schema(part.path).metadata[b"hf_gradclip"])
    if meta["version"] > VERSION:
        raise ValueError(f"{part.path.name}: was written by a later version of hf_gradclip. Install that one.")
    return meta


def _spread(values: np.ndarray, own: list[str], names: list[str]) -> np.ndarray:
    """The columns of `own` at their places among `names`, NaN elsewhere."""
    if own == names:
        return values
    wide = np.full((len(values), len(names)), np.nan, dtype=values.dtype)
    wide[:, [names.index(name) for name in own]] = values
    return wide


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("a record needs pyarrow: pip install 'hf_gradclip[report]'.") from None
    return pyarrow, pyarrow.parquet
