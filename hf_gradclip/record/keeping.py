"""What happens to the parts of a record while its run goes on: small ones are joined, later steps are dropped.

A folder belongs to one run at a time, which leaves its mark in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from hf_gradclip.record.files import read_parts
from hf_gradclip.record.parts import DamagedPartError, Part, meta_of, parts_of, write_part

JOIN_AT = 20
LARGE = 1000
OWNER = "run.json"


def join_small(folder: Path, place: str, at: int = JOIN_AT) -> None:
    """Join the last parts into one when `at` of them have fewer than LARGE steps each, and remove what it covers.

    Parts that were recorded under another configuration stay apart, and so does one that cannot be read.
    """
    small: list[Part] = []
    for part in reversed(parts_of(folder, place)):
        if part.last - part.first + 1 >= LARGE:
            break
        small.insert(0, part)
    if len(small) < max(at, 2):
        return
    configs = [_config_of(part) for part in small]
    while any(config != configs[-1] for config in configs):
        small, configs = small[1:], configs[1:]
    if len(small) < 2 or configs[-1] is None:
        return
    record = read_parts(small)
    write_part(folder, place, record.of(slice(None)), record.meta)
    joined = (int(record.step_T[0]), int(record.step_T[-1]))
    for part in small:
        if (part.first, part.last) != joined:
            part.path.unlink(missing_ok=True)


def _config_of(part: Part) -> str | None:
    """What a part was recorded under; None if it cannot be read."""
    try:
        return str(meta_of(part)["config"])
    except DamagedPartError:
        return None


def drop_after(folder: Path, place: str, step: int) -> int:
    """Remove the rows past a step; how many there were."""
    dropped = 0
    for part in reversed(parts_of(folder, place)):
        if part.last <= step:
            break
        record = read_parts([part])
        kept = record.step_T <= step
        dropped += int((~kept).sum())
        if kept.any():
            write_part(folder, place, record.of(kept), record.meta)
        part.path.unlink()
    for path in folder.glob(f"{place}-*.parquet"):  # leftovers that a joined part covered
        match = re.fullmatch(rf"{place}-\d{{9}}-(\d{{9}})\.parquet", path.name)
        if match and int(match[1]) > step:
            path.unlink()
    return dropped


def put_damaged_aside(folder: Path, place: str) -> list[str]:
    """Rename what cannot be read to `....parquet.damaged`, so that a run can go on; a sentence for each."""
    said = []
    for part in parts_of(folder, place):
        try:
            read_parts([part])
        except DamagedPartError as error:
            aside = part.path.with_name(f"{part.path.name}.damaged")
            part.path.replace(aside)
            said.append(f"{str(error).partition(' Move it away')[0]} It is kept as {aside.name}.")
    return said


def take(folder: Path, run: str) -> None:
    """Leave the mark of a run in a folder, which is made where it is missing: it alone writes there from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"run": run}) + "\n", "utf-8")
    aside.replace(path)


def is_taken(folder: Path, run: str) -> bool:
    """Whether another run has left its mark since; a folder without one is nobody's."""
    try:
        return bool(json.loads((folder / OWNER).read_text("utf-8"))["run"] != run)
    except (OSError, ValueError, KeyError, TypeError):
        return False
