"""Where a run is killed, and the patches that do it there: in a step, in a save, in the record."""

from __future__ import annotations

import importlib
import io
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS, EVERY = 24, 6
"""Of a run, and between two checkpoints."""
IN_STEP = ("forward", "backward", "before the optimizer", "after the optimizer")
IN_RECORD = ("a part is written aside", "a part is there", "small parts are joined")


@dataclass(frozen=True)
class Point:
    """Where.

    Args:
        place: "step", "save" or "record".
        step: from 1, the first in which it may be.
        nth: of IN_STEP, the number of the file in a save, or of IN_RECORD.
        alone: whether the last rank dies alone.
    """

    place: str
    step: int
    nth: int
    alone: bool = False

    def __str__(self) -> str:
        what = {"step": IN_STEP, "record": IN_RECORD}.get(self.place)
        word = what[self.nth] if what else f"file {self.nth + 1} is half written"
        return f"{self.place} {self.step}: {word}" + (", one rank" if self.alone else "")


def points(ranks: int) -> list[Point]:
    """20 of them, of which 5 are of one rank alone where there are several."""
    found = [Point("step", step, nth) for nth, step in enumerate((2, 9, 13, 24))]
    found += [Point("step", step, nth) for nth, step in enumerate((7, 6, 18, 12))]
    found += [Point("save", step, nth) for step in (6, 18) for nth in range(3)]
    found += [Point("save", 24, 0)]
    found += [Point("record", 6, 0), Point("record", 6, 1), Point("record", 18, 0), Point("record", 18, 1)]
    found += [Point("record", STEPS, 2)]
    alone = [3, 5, 8, 10, 14] if ranks > 1 else []
    return [Point(p.place, p.step, p.nth, i in alone) for i, p in enumerate(found)]


class Killer:
    """Kills this process, and the others of the run unless it is to die alone.

    Args:
        point: where.
        rank: of this process.
        ranks: how many there are.
        pids: a file for each rank that holds its process.
    """

    def __init__(self, point: Point, rank: int, ranks: int, pids: Sequence[Path]) -> None:
        self.point, self._pids = point, pids
        self.armed = rank == (ranks - 1 if point.alone else 0)
        self.step, self._saves = 0, 0

    def kill(self) -> None:
        """Now."""
        if not self.armed:
            return
        for path in () if self.point.alone else self._pids:
            if (pid := int(path.read_text("utf-8"))) != os.getpid():
                os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def at(self, nth: int) -> None:
        """A place in a step."""
        if (self.point.place, self.point.step, self.point.nth) == ("step", self.step, nth):
            self.kill()

    def patch(self) -> None:
        """Watch what is saved and recorded."""
        if self.point.place == "save":
            self._patch_save()
        if self.point.place == "record":
            self._patch_record()

    def _patch_save(self) -> None:
        theirs = torch.save

        def save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if self.step >= self.point.step:
                if self._saves == self.point.nth and isinstance(file, (str, os.PathLike)) and self.armed:
                    whole = io.BytesIO()
                    theirs(content, whole, *args, **kwargs)
                    Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
                    self.kill()
                self._saves += 1
            theirs(content, file, *args, **kwargs)

        setattr(torch, "save", save)  # noqa: B010  (mypy knows its signature)

    def _patch_record(self) -> None:
        parts: Any = importlib.import_module("hf_gradclip.record.parts")
        keeping: Any = importlib.import_module("hf_gradclip.record.keeping")
        recording: Any = importlib.import_module("hf_gradclip.run.recording")
        replace: Callable[..., Any] = Path.replace
        joining = False

        def moved(path: Path, target: Any) -> Any:
            mine = path.parent.name == "gradclip" and str(target).endswith(".parquet") and self.step >= self.point.step
            if mine and self.point.nth == 0:
                self.kill()
            found = replace(path, target)
            if mine and self.point.nth == (2 if joining else 1):
                self.kill()
            return found

        def join(*args: Any, **kwargs: Any) -> None:
            nonlocal joining
            joining = True
            keeping.join_small(*args, **kwargs)
            joining = False

        recording.join_small = join
        assert parts.write_part is keeping.write_part
        setattr(Path, "replace", moved)  # noqa: B010
