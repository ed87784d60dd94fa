"""A long run of a tiny model: does anything of hf_gradclip grow with the steps?

    python scripts/long_run.py --out benchmarks/reliability_long_run_cpu.md
    python scripts/long_run.py --steps 2000 --only silent

Three loops under `adaptive`, each of which keeps a record but for the last:

| loop | what |
|---|---|
| `logs` | `attach()`, `scalars()` in every 50th step |
| `silent` | `attach()`, nobody ever asks |
| `plain` | `Clipper.for_model`, nobody ever asks, no record |

A first pass is watched by tracemalloc: the memory that lines of hf_gradclip have allocated and still hold, and how many
blocks that is, at a quarter of the steps and later; what torch keeps for tensors is counted apart, by the bytes of all
tensors that live. A second pass, in a process of its own, is timed by the processor's clock. The exit status is 1 if
more is held at the end than at a quarter, beyond what one part of a record takes, or a step takes longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import hf_gradclip
from hf_gradclip.record.spikes import KEPT

ROOT = Path(__file__).resolve().parents[1]
LOOPS = ("logs", "silent", "plain")
QUARTERS = 4
SLACK = 16 * 1024
"""Bytes that may come and go between two looks: buffers that are full here and empty there."""
SLOWER = 1.3
"""How much longer the median step of the last quarter may take than that of the second."""


def loop(name: str, folder: str) -> Callable[[], None]:
    """One step of a loop; it logs by itself."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    asked: Callable[[], Any] = dict
    backward: Callable[..., Any]
    clip: Callable[[], Any]
    if name == "plain":
        clipper = hf_gradclip.Clipper.for_model(model, "adaptive")
        backward, clip = torch.Tensor.backward, clipper.step
    else:
        accelerator = Accelerator(cpu=True)
        attachment = hf_gradclip.attach(accelerator, "adaptive", record=folder)
        model, optimizer = accelerator.prepare(model, optimizer)
        backward, asked = accelerator.backward, attachment.scalars
        clip = partial(_clip, accelerator, model)

    steps = 0

    def step() -> None:
        nonlocal steps
        rows = torch.randn(6, 8, generator=generator)
        loud = 30.0 if steps % 97 == 96 else 1.0
        backward((model(rows) - rows[:, :4]).square().mean() * loud)
        clip()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if name == "logs" and steps % 50 == 0:
            asked()

    return step


def _clip(accelerator: Accelerator, model: nn.Module) -> Any:
    return accelerator.clip_grad_norm_(model.parameters(), 1.0)


def held() -> dict[str, int]:
    """What lines of hf_gradclip hold, by tracemalloc, and the bytes of all tensors that live."""
    gc.collect()
    only = tracemalloc.Filter(True, str(Path(hf_gradclip.__file__).parent / "*"))
    found = tracemalloc.take_snapshot().filter_traces([only]).statistics("filename")
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return {
        "bytes": sum(stat.size for stat in found),
        "blocks": sum(stat.count for stat in found),
        "tensors": sum(storages.values()),
    }


def files(folder: str) -> dict[str, int]:
    """How many files there are, how many of them are of spikes, and of how many bytes all are."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    spikes = sum(path.parent.name == "spikes" for path in paths)
    return {"files": len(paths) - spikes, "spikes": spikes, "on disk": sum(path.stat().st_size for path in paths)}


def watched(name: str, steps: int) -> list[dict[str, int]]:
    """What is held after each quarter of the steps."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        step = loop(name, folder)
        for _ in range(10):
            step()
        tracemalloc.start()
        for i in range(10, steps):
            step()
            if (i + 1) % (steps // QUARTERS) == 0:
                found.append({"steps": i + 1, **held(), **files(folder)})
        tracemalloc.stop()
    return found


def timed(name: str, steps: int) -> list[float]:
    """The median microseconds of a step in each quarter, by the processor's clock."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        step, times = loop(name, folder), []
        for _ in range(steps):
            began = time.process_time_ns()
            step()
            times.append((time.process_time_ns() - began) / 1e3)
            if len(times) == steps // QUARTERS:
                found.append(statistics.median(times))
                times = []
    return found


def wrong(looks: Sequence[dict[str, int]], times: Sequence[float]) -> list[str]:
    """In words what grows."""
    first, last = looks[0], looks[-1]
    words = [
        f"{key} grow from {first[key]} to {last[key]}" for key in ("bytes", "tensors") if last[key] > first[key] + SLACK
    ]
    if last["files"] > first["files"] + (last["steps"] - first["steps"]) / 1000 + 20:
        words.append(f"{first['files']} files become {last['files']}")
    if last["spikes"] > KEPT:
        words.append(f"there are {last['spikes']} files of spikes")
    rate = [look["on disk"] / look["steps"] for look in looks]
    if rate[-1] > 1.1 * rate[0]:
        words.append(f"bytes per step on disk grow from {rate[0]:.0f} to {rate[-1]:.0f}")
    if times[-1] > SLOWER * times[1]:
        words.append(f"a step takes {times[-1]:.0f} us in the place of {times[1]:.0f}")
    return words


def inside(call: str, name: str, steps: int) -> Any:
    """Run a function of this file in a process of its own."""
    code = f"import json, long_run; print(json.dumps(long_run.{call}({name!r}, {steps})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loops, print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="Of each loop.")
    parser.add_argument("--only", nargs="+", choices=LOOPS, default=LOOPS, help="These loops.")
    parser.add_argument("--out", type=Path, help="A file for the table.")
    args = parser.parse_args(argv)
    lines = [
        "# A long run",
        "",
        f"`python scripts/long_run.py --steps {args.steps}`",
        "",
        "| loop | steps | bytes of hf_gradclip | blocks | bytes of tensors | files | of spikes | disk, bytes a step "
        "| us a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    bad = []
    for name in args.only:
        looks, times = (inside(call, name, args.steps) for call in ("watched", "timed"))
        for look, taken in zip(looks, times, strict=True):
            cells = [name, *(look[key] for key in ("steps", "bytes", "blocks", "tensors", "files", "spikes"))]
            cells += [f"{look['on disk'] / look['steps']:.0f}", f"{taken:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
        bad += [f"{name}: {words}" for words in wrong(looks, times)]
    lines += ["", "; ".join(bad) or "Nothing grows."]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
