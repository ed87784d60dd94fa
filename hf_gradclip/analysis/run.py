"""A recorded run: its records of gradient and update, and its spikes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.config import ClipConfig
from hf_gradclip.record.files import FOLDER, Record, folder_of, read_record
from hf_gradclip.record.parts import parts_of as files_of
from hf_gradclip.record.spikes import read_spike
from hf_gradclip.spec import is_own
from hf_gradclip.strategy import SpecError, parts_of

UPDATE = "update"

_FIELDS = {"norms": "norm_TP", "scales": "scale_TP"}


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Args:
        name: of its folder.
        folder: where the record is.
        gradient: the record of the gradients.
        update: the record of the updates; None where they were not clipped.
        spikes: the files of rank 0 in order, each with the examples that other ranks held under `other_ranks`, and the
            files of those ranks that have text under `texts`.
        unread: the names of files among them that are none.
    """

    name: str
    folder: Path
    gradient: Record
    update: Record | None
    spikes: list[dict[str, Any]]
    unread: tuple[str, ...] = ()


def load_run(path: Path) -> Run:
    """Read a run.

    Raises:
        FileNotFoundError: if it was not recorded.
    """
    folder = folder_of(path)
    whole = folder.resolve()
    name = whole.parent.name if whole.name == FOLDER else whole.name
    update = read_record(folder, UPDATE) if files_of(folder, UPDATE) else None
    return Run(name, folder, read_record(folder), update, *_spikes(folder))


def _spikes(folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The spikes, and the names of what is none."""
    unread: list[str] = []
    found: dict[int, dict[str, Any]] = {}
    others: dict[int, dict[str, Any]] = {}
    texts: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / "spikes").glob("step_*.json")):
        try:
            spike = read_spike(path)
        except ValueError:
            unread.append(path.name)
            continue
        if spike["rank"] == 0:
            found[spike["step"]] = spike
        else:
            others.setdefault(spike["step"], {})[str(spike["rank"])] = spike["examples"]
            if "text" in spike:
                texts.setdefault(spike["step"], {})[str(spike["rank"])] = spike
    steps = sorted(found)
    more = [{"other_ranks": others.get(step, {}), "texts": texts.get(step, {})} for step in steps]
    return [{**found[step], **words} for step, words in zip(steps, more, strict=True)], tuple(unread)


def total_scale(record: Record) -> np.ndarray:
    """Norm after / before of the whole per step, shape (T,); 1 where the norm is 0 or not finite."""
    squares = record.norm_TP.astype(np.float64) ** 2
    kept = squares * record.scale_TP.astype(np.float64) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.nansum(kept, axis=1) / np.nansum(squares, axis=1))
    return np.where(record.finite_T, np.nan_to_num(scale, nan=1.0), 1.0)


def clipped_steps(record: Record) -> np.ndarray:
    """The steps in which anything was scaled or bounded, shape (T,)."""
    return ((record.scale_TP < 1).any(axis=1) | record.bounded_T) & record.finite_T & ~record.skipped_T


def by_parameter(record: Record) -> bool:
    """Whether the parameters of a step were scaled apart."""
    scales = np.where(record.norm_TP > 0, record.scale_TP, np.nan)[record.finite_T & (record.norm_T > 0)]
    return bool(len(scales) and (np.nanmax(scales, axis=1) - np.nanmin(scales, axis=1) > 1e-6).any())


def threshold_of_norm(record: Record) -> np.ndarray:
    """Where each step begins to clip by the norm of the whole, shape (T,).

    NaN where the threshold is of something else: of each parameter or element, or of what an earlier part of a chain
    has left of the norm.
    """
    return np.concatenate(
        [
            part.threshold_T if limits_norm(part.meta["spec"]) else np.full(len(part), np.nan)
            for part in (by_config(record) if record.earlier else [record])
        ]
    )


def limits_norm(spec: str) -> bool:
    """Whether the threshold of a strategy, where it has one, is one for the norm of the whole.

    A class of somebody's own is not asked, since a record may name it, and is taken to be.
    """
    try:
        part = parts_of(ClipConfig.parse(spec).gradient)[0] if is_own(spec) else None
    except SpecError:
        part = None
    return part is None or not (part.per_parameter or part.bounds or part.needs.max_abs or part.needs.units is not None)


def configs_of(record: Record) -> str:
    """What the run was clipped by, in its order."""
    before = [f"{meta['config']} (to step {meta['last']:,})" for meta in record.earlier]
    return " then ".join([*before, record.meta["config"]])


def by_config(record: Record) -> list[Record]:
    """The record cut where the run went on under another configuration; each part has the meta of its own."""
    metas = [*record.earlier, record.meta]
    ends = [*(meta["last"] for meta in record.earlier), record.step_T[-1]]
    first, found = -1, []
    for meta, last in zip(metas, ends, strict=True):
        rows = (record.step_T > first) & (record.step_T <= last)
        columns: dict[str, Any] = {_FIELDS.get(name, f"{name}_T"): column for name, column in record.of(rows).items()}
        found.append(replace(record, **columns, meta=meta, earlier=()))
        first = last
    return found
