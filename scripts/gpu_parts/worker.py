"""What a part of gpu_check.py has: lines that are kept as they come, a time to end, a device, a clock.

A line is an object of JSON. One with the key `row` is a measurement, one with `FAILED` a measurement that was not made.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import DTYPES, Shapes, Workload
from stopwatch import Stopwatch

from hf_gradclip.kernels import choice

ROOT = Path(__file__).parents[2]
SPARE = 4  # seconds before the end of the time box in which nothing new is begun


@dataclass(frozen=True)
class Worker:
    """One part while it runs.

    Args:
        lines: the file of what it found.
        out: the folder that is kept.
        work: one that is not.
        tiny: whether this is a rehearsal on the CPU.
        end: when it should be done, by time.monotonic.
    """

    lines: Path
    out: Path
    work: Path
    tiny: bool
    end: float

    def emit(self, **line: Any) -> None:
        """Keep a line, and print it."""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(shown(line), flush=True)

    def left(self, least: float = 5.0) -> float:
        """Seconds that are left, `least` at least: a limit for a process."""
        return max(least, self.end - time.monotonic())

    def late(self, seconds: float = 0.0) -> bool:
        """Whether fewer are left than these."""
        return time.monotonic() + seconds > self.end

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Whatever goes wrong inside is a line, and the part goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.emit(row=name, FAILED=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def device(self) -> torch.device:
        """The first GPU; in a rehearsal the CPU, in one thread."""
        if self.tiny:
            torch.set_num_threads(1)
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no GPU; --cpu-rehearsal runs without one.")
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)

    def workload(self, name: str, dtype: str) -> Workload:
        """One of bench_clip.py; what the last one held is free."""
        from bench_clip import TINY, WORKLOADS

        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
        shapes: Shapes = TINY["tiny"] * 3 if self.tiny else WORKLOADS[name][name]
        return Workload(name, shapes, DTYPES[dtype], self.device())


class Clock:
    """Medians of times in ms, from an idle stream and behind a backlog of other work.

    Args:
        device: what is timed; on the CPU both are the same.
        backlog_ms: of the second; more than the host takes for the call, else its time counts too.
    """

    def __init__(self, device: torch.device, backlog_ms: float = 12.0) -> None:
        self._idle = Stopwatch(device, threads=1)
        self._behind = Stopwatch(device, threads=1, backlog_ms=backlog_ms)

    def idle(self, call: Callable[[], Any], rounds: int = 11, before: Callable[[], Any] | None = None) -> Any:
        """(time on the device, time on the host) of a call, after two that are not counted."""
        return _median(self._idle, call, rounds, before)

    def behind(self, call: Callable[[], Any], rounds: int = 11, before: Callable[[], Any] | None = None) -> float:
        """Time on the device of a call that begins behind the backlog."""
        return _median(self._behind, call, rounds, before)[0]


def _median(
    stopwatch: Stopwatch, call: Callable[[], Any], rounds: int, before: Callable[[], Any] | None
) -> tuple[float, float]:
    found = []
    for _ in range(rounds + 2):
        if before is not None:
            before()
        found.append(stopwatch.both(call))
    device, host = zip(*found[2:], strict=True)
    return statistics.median(device), statistics.median(host)


def given_up() -> str:
    """The languages that were given up in this process, and why; "" where none was."""
    return "; ".join(f"{name}: {why}" for name, why in choice._given_up.items())


def shown(line: dict[str, Any]) -> str:
    """A line in one line of text."""
    words = "  ".join(f"{key} {number(value)}" for key, value in line.items() if key not in ("row", "detail"))
    return f"{line['row']:66s} {words}" if "row" in line else words


def number(value: Any) -> str:
    """A value in a few digits, or in 400 characters."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:400]


def serve(part: Callable[[Worker], None]) -> None:
    """Run a part with the command line that gpu_check.py gives it."""
    parser = argparse.ArgumentParser()
    for name in ("--lines", "--out", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--cpu-rehearsal", action="store_true")
    args = parser.parse_args()
    part(Worker(args.lines, args.out, args.work, args.cpu_rehearsal, time.monotonic() + args.limit - SPARE))
