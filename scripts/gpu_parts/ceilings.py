"""Part `env`: what this machine is, and what its memory, its launches and its copies cost."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial

import torch
from benchmark import hardware, version_of

from gpu_parts.worker import Clock, Worker, serve

NAMES = ("torch", "triton", "transformers", "accelerate", "peft", "datasets", "pyarrow", "pytest", "pytest-xdist")
ASKED = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def env(w: Worker) -> None:
    """All of it."""
    device = w.device()
    w.emit(python=platform.python_version(), **{name: version_of(name) for name in NAMES})
    w.emit(device=hardware(device)[0], cores=os.cpu_count(), kernel=platform.release())
    if device.type == "cuda":
        got, says = torch.cuda.get_device_properties(0), ""
        with contextlib.suppress(OSError):
            command = ["nvidia-smi", ASKED, "--format=csv,noheader"]
            says = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        w.emit(multiprocessors=got.multi_processor_count, GiB=got.total_memory / 2**30, smi=says)
    clock = Clock(device, 30.0)
    _memory(w, clock, device)
    _launches(w, clock, device)


def _memory(w: Worker, clock: Clock, device: torch.device) -> None:
    """Bytes moved per time, from an idle stream."""
    size = 1 << (20 if w.tiny else 31)  # bytes
    a = torch.randn(size // 4, device=device)
    b = torch.empty_like(a)
    half = a[: size // 8].to(torch.bfloat16)
    n = 256 if w.tiny else 8192
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "copy (read + write)": (lambda: b.copy_(a), 2 * size),
        "in place multiply fp32 (read + write)": (lambda: b.mul_(1.0001), 2 * size),
        "fill (write)": (b.zero_, size),
        "sum fp32 (read)": (a.sum, size),
        "sum bf16 (read)": (lambda: half.sum(dtype=torch.float32), half.nbytes),
    }
    for name, (call, count) in calls.items():
        with w.row(name):
            ms, _ = clock.idle(call)
            w.emit(row=name, ms=ms, TB_per_s=count / ms / 1e9)
    with w.row("matmul"):
        ms, _ = clock.idle(lambda: x @ y)
        w.emit(row=f"matmul bf16 {n}^3", ms=ms, TFLOP_per_s=2 * n**3 / ms / 1e9)


def _launches(w: Worker, clock: Clock, device: torch.device) -> None:
    """What is small and frequent: on the host, and on the device where the host is ahead of it."""
    number = torch.ones((), device=device, dtype=torch.float64)
    flag, host = number > 0, torch.zeros(400, dtype=torch.int64)
    pinned = host.pin_memory() if device.type == "cuda" else host
    count = 20 if w.tiny else 1000
    calls: dict[str, Callable[[], object]] = {
        "x + 1 (0-d)": lambda: number + 1,
        "torch.where(flag, x, 1.0): a fill and a where": lambda: torch.where(flag, number, 1.0),
        "copy of 3 kB that nobody waits for": lambda: pinned.to(device, non_blocking=True),
    }
    if device.type == "cuda":
        calls["pin 3 kB, copy, nobody waits"] = lambda: host.clone().pin_memory().to(device, non_blocking=True)
    for name, call in calls.items():
        with w.row(name):
            many = partial(_often, call, count)
            ms, host_ms = clock.idle(many, 3)
            each = 1e3 / count
            ahead = clock.behind(many, 3)
            w.emit(row=f"one of {count}: {name}", host_us=host_ms * each, us_idle=ms * each, us_behind=ahead * each)
    _, host_ms = clock.idle(number.item, 50)
    w.emit(row="read of one number, stream idle", host_us=1e3 * host_ms)


def _often(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


if __name__ == "__main__":
    serve(env)
