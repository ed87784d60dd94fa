"""The record of a run, in OUTPUT_DIR/gradclip, as it is read: all its steps, from all its parts (see `parts`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.record.parts import FLAGS, NUMBERS, Part, columns_of, meta_of, parts_of

FOLDER = "gradclip"


@dataclass(frozen=True)
class Record:
    """What was recorded of one place, as numpy arrays; T steps, P parameters.

    Args:
        names: of the parameters.
        numel_P: their numbers of elements, int64.
        step_T: int64, rising.
        loss_T: float64, and so are learning_rate_T, norm_T, threshold_T and scale_max_T; `parts` has their meaning.
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
    scale_max_T: np.ndarray
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


def folder_of(run: str | Path) -> Path:
    """The folder with the record: `run` itself, or its `gradclip`.

    Raises:
        FileNotFoundError: if neither holds a record, or there is no such folder.
    """
    run = Path(run)
    if not run.exists():
        raise FileNotFoundError(f"{run}: is not there. Give the output_dir of a recorded run.")
    for folder in (run / FOLDER, run):
        if any(folder.glob("*-*.parquet")):
            return folder
    if below := sorted(str(path.parent) for path in run.glob(f"*/{FOLDER}") if any(path.glob("*-*.parquet"))):
        raise FileNotFoundError(f"{run}: holds no record ({FOLDER}/*.parquet), but these do: {' '.join(below)}")
    raise FileNotFoundError(
        f"{run}: holds no record ({FOLDER}/*.parquet). Train with clip={{'gradient': 'adaptive', 'record': True}}, "
        "--record true of hf-gradclip run, or --clip_record true of finetune.py."
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
        DamagedPartError: if a part of it cannot be read.
        ValueError: if it was written by a later version.
    """
    folder = folder_of(run)
    parts = parts_of(folder, place)
    if not parts:
        raise FileNotFoundError(f"{folder}: holds no record of the {place}.")
    return read_parts(parts)


def read_parts(parts: Iterable[Part]) -> Record:
    """The record that these parts make, see `read_record`.

    Raises:
        DamagedPartError: if one cannot be read.
        ValueError: if it was written by a later version.
    """
    found: dict[str, list[np.ndarray]] = {}
    numel: dict[str, int] = {}
    owners: list[list[str]] = []
    meta: dict[str, Any] = {}
    earlier: list[dict[str, Any]] = []
    until = -1
    for part in parts:
        new_meta = meta_of(part)
        columns = columns_of(part, len(new_meta["names"]))
        if meta and meta["config"] != new_meta["config"]:
            earlier.append({**meta, "last": until})
        meta = new_meta
        numel |= dict(zip(meta["names"], meta["numel"], strict=True))
        owners.append(meta["names"])
        new = columns["step"] > until
        until = part.last
        for name, values in columns.items():
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


def _spread(values: np.ndarray, own: list[str], names: list[str]) -> np.ndarray:
    """The columns of `own` at their places among `names`, NaN elsewhere."""
    if own == names:
        return values
    wide = np.full((len(values), len(names)), np.nan, dtype=values.dtype)
    wide[:, [names.index(name) for name in own]] = values
    return wide
