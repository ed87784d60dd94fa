"""Part `counts`: how often a step waits for the device, and what it launches; and what the first step of all costs."""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_parts.steps import Step, cases
from gpu_parts.worker import Worker, given_up, serve
from hf_gradclip import Clipper, optim

ASKS = re.compile(r"cudaLaunchKernel|cuLaunchKernel|cudaLaunchKernelExC|cudaMemcpyAsync|cudaMemsetAsync")
WARM = 6  # steps before the one that is counted


def counts(w: Worker) -> None:
    """All of it, for 400 tensors."""
    device = w.device()
    _first_steps(w, device)
    work = w.workload("lora400", "bf16")
    for name, make in cases(work):
        with w.row(name):
            step = make()
            for _ in range(WARM):
                work.restore(0.1)
                step()
            waits = _waits(work.restore, step) if device.type == "cuda" else Counter()
            work.restore(0.1)
            found = _launches(step, device)
            w.emit(row=name, waits=sum(waits.values()), **found, where=dict(waits), given_up=given_up())
        if w.late(2):
            w.emit(row=name, note="no time left for what comes after it")
            return


def _first_steps(w: Worker, device: torch.device) -> None:
    """With nothing compiled."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).to(device, torch.bfloat16)
    made: dict[str, Callable[[], Step]] = {
        "first Clipper.step()": lambda: Clipper.for_model(model, "adaptive").step,
        "first optim.AdamW(clip, update_clip).step()": lambda: (
            optim.AdamW(model.parameters(), clip="adaptive", update_clip="block_rms").step
        ),
    }
    with _empty_cache():
        for name, make in made.items():
            with w.row(name):
                step = make()
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                start = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                w.emit(row=name, seconds=time.perf_counter() - start, given_up=given_up())


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Triton finds nothing that was compiled before."""
    name = "TRITON_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        yield
    os.environ.pop(name)
    if before is not None:
        os.environ[name] = before


def _waits(restore: Callable[[float], None], step: Step) -> Counter[str]:
    """Where a step waits for the device, and how often."""
    restore(0.1)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [one for one in caught if "called a synchronizing" in str(one.message)]
    return Counter(f"{Path(one.filename).name}:{one.lineno}" for one in said)


def _launches(step: Step, device: torch.device) -> dict[str, Any]:
    """What the profiler sees; on the CPU the operations of torch."""
    if device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
        return {"aten_ops": sum(event.name.startswith("aten::") for event in seen.events() or ())}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    events = list(seen.events() or ())
    there = [event for event in events if event.device_type.name == "CUDA"]
    there = [event for event in there if "#" not in event.name and not event.name.startswith("ProfilerStep")]
    copies = [event for event in there if event.name.lower().startswith(("memcpy", "memset"))]
    kernels = [event for event in there if event not in copies]
    names = Counter(re.sub(r"<.*|\(.*", "", event.name).split("::")[-1][:40] for event in kernels)
    return {
        "kernels": len(kernels),
        "copies": len(copies),
        "device_us": sum(event.time_range.elapsed_us() for event in there),
        "host_launches": sum(ASKS.match(event.name) is not None for event in events),
        "top": dict(names.most_common(4)),
        "detail": dict(names),
    }


if __name__ == "__main__":
    serve(counts)
