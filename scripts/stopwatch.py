"""How long a call takes: by events on a GPU, from an idle stream or behind other work; on a CPU by a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Milliseconds of one call, by a clock that fits the device and the number of threads.

    Args:
        device: what is timed.
        threads: of torch, on the CPU.
        backlog_ms: on a GPU, for how long the device is busy with something else when the call begins. Then the host
            runs ahead, as it does behind a backward pass, and its own time counts only where the device waits for it.
            0 begins from an idle stream, where every launch that the host is slow to make counts.
    """

    def __init__(self, device: torch.device, threads: int, backlog_ms: float = 0.0) -> None:
        self._cuda = device.type == "cuda"
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self._cycles = 0
        self.name = f"time.{self._clock.__name__}"
        if self._cuda:
            self.name = "CUDA events around a synchronised call"
        if backlog_ms and self._cuda:
            self._cycles = round(backlog_ms * _cycles_per_ms())
            self.name = f"CUDA events around a call behind {backlog_ms:g} ms of other work"

    def time(self, call: Callable[[], Any]) -> float:
        """Call it once."""
        return self.both(call)[0]

    def both(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Call it once: the time by this clock, and how long the host was busy with it or waited in it."""
        if not self._cuda:
            start = self._clock()
            call()
            taken = (self._clock() - start) * 1e3
            return taken, taken
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if self._cycles:
            torch.cuda._sleep(self._cycles)
        first.record()
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e3
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)), host


def _cycles_per_ms() -> float:
    """Of torch's kernel that only waits."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in (1000, 20_000_000):  # the first one loads the kernel
        first.record()
        torch.cuda._sleep(cycles)
        last.record()
        last.synchronize()
    return 20_000_000 / float(first.elapsed_time(last))
