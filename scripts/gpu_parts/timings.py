"""Part `timings`: clips and steps, from an idle stream and behind a backlog, as multiples of what the bytes would cost.

The floor of a row is the bytes that it must read and write, at the speed of a copy on this device.
"""

from __future__ import annotations

from functools import partial

import torch
from benchmark import Workload

from gpu_parts.steps import Step, cases
from gpu_parts.worker import Clock, Worker, given_up, serve

CASES = (("nothing clips", 0.001), ("clips", 1.0))  # what the gradients are multiplied by; the steps before saw 0.001
WARM = 8
MODELS = (("lora400", "bf16"), ("llama1b", "bf16"), ("llama1b", "fp32"))


def timings(w: Worker) -> None:
    """All of it."""
    clock = Clock(w.device())
    speed = _speed(w, clock)
    w.emit(row="copy", TB_per_s=speed / 1e9)
    for name, dtype in MODELS[:1] if w.tiny else MODELS:
        _model(w, clock, speed, name, dtype)


def _speed(w: Worker, clock: Clock) -> float:
    """Of a copy, in bytes per ms, those read and those written."""
    source = torch.empty(1 << (16 if w.tiny else 29), device=w.device()).normal_()
    target = torch.empty_like(source)
    ms, _ = clock.idle(lambda: target.copy_(source))
    return float(2 * source.nbytes / ms)


def _model(w: Worker, clock: Clock, speed: float, name: str, dtype: str) -> None:
    work = w.workload(name, dtype)
    for case, factor in CASES:
        for row, make in cases(work):
            full = f"{name} {dtype}, {case}: {row}"
            if w.late(3):
                w.emit(row=full, note="no time left")
                return
            with w.row(full):
                found = _times(w, clock, work, make(), factor)
                floor = _moved(row, work.flat.nbytes, case == "clips") / speed
                w.emit(row=full, **found, floor_ms=floor, x_floor=found["ms_behind"] / floor, given_up=given_up())


def _times(w: Worker, clock: Clock, work: Workload, step: Step, factor: float) -> dict[str, float]:
    """Of a step past its warm-up, of gradients times this factor."""
    for _ in range(WARM):
        work.restore(CASES[0][1])
        step()
    rounds = 3 if w.tiny else 7  # an adaptive strategy takes the twentieth spike in a row for a new level
    restore = partial(work.restore, factor)
    idle, host = clock.idle(step, rounds, restore)
    return {"ms_idle": idle, "ms_behind": clock.behind(step, rounds, restore), "host_ms": host}


def _moved(row: str, read: int, clips: bool) -> int:
    """Bytes that a step must read and write, where reading all gradients is `read`."""
    moved = 0 if "no clip" in row else read
    if "AdamW" in row:
        moved += 7 * read  # weight and two moments read and written, the gradient read
    if "SGD" in row:
        moved += 5 * read
    if "update=" in row:
        moved += 3 * read  # gradient and moments
    if clips and "optim." not in row and "fold" not in row and "clip none" not in row:
        moved += 2 * read
    return moved


if __name__ == "__main__":
    serve(timings)
