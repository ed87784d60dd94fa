"""Part `sweep`: tile sizes of the kernels at 1.1B elements, behind a backlog, so that the device alone counts."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any, cast

import torch
from benchmark import Workload, bind

from gpu_parts.worker import ROOT, Clock, Worker, serve
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.types import ClipPlan

WHOLE = [  # CHUNK, BLOCK, WARPS; first those that are in force
    (1 << 16, 1 << 13, 8),
    (1 << 16, 1 << 14, 8),
    (1 << 16, 1 << 14, 4),
    (1 << 16, 1 << 15, 8),
    (1 << 17, 1 << 14, 8),
    (1 << 17, 1 << 15, 16),
    (1 << 15, 1 << 13, 4),
    (1 << 15, 1 << 12, 4),
]
STEP = [  # CHUNK, STEP, WARPS, REGISTERS
    (1 << 14, 1024, 4, 72),
    (1 << 14, 1024, 4, 96),
    (1 << 14, 1024, 4, 64),
    (1 << 14, 512, 4, 72),
    (1 << 15, 2048, 8, 72),
    (1 << 14, 1024, 8, 72),
]


def variant(sizes: tuple[int, int, int, int]) -> ModuleType:
    """The step's file with these sizes, as a module of its own, whose kernels are compiled anew."""
    name = "step_" + "_".join(map(str, sizes))
    spec = importlib.util.spec_from_file_location(name, ROOT / "hf_gradclip" / "kernels" / "triton" / "step.py")
    assert spec is not None
    assert spec.loader is not None
    made: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    for size in ("CHUNK", "STEP", "WARPS", "REGISTERS"):
        assert hasattr(made, size), f"kernels/triton/step.py has no {size} any more"
    made.CHUNK, made.STEP, made.WARPS, made.REGISTERS = sizes
    return cast(ModuleType, made)


def sweep(w: Worker) -> None:
    """In a rehearsal, whether the variants can be made."""
    if w.tiny:
        for sizes in STEP:
            with w.row(f"adam, {sizes}"):
                w.emit(row=f"adam, {sizes}", launcher=variant(sizes).step_.__name__)
        return
    device, clock = w.device(), Clock(w.device())
    work = w.workload("llama1b", "bf16")
    work.restore()
    _whole(w, clock, work, device)
    for moments in (torch.bfloat16, torch.float32):
        _step(w, clock, work, moments, device)


def _whole(w: Worker, clock: Clock, work: Workload, device: torch.device) -> None:
    from hf_gradclip.kernels.triton import whole

    grads, read = list(work.grads), work.flat.nbytes
    scale = torch.tensor(0.5, device=device, dtype=torch.float64)
    for sizes in WHOLE:
        name = "whole: CHUNK {} BLOCK {} WARPS {}".format(*sizes)
        with w.row(name):
            whole.CHUNK, whole.BLOCK, whole.WARPS = sizes
            measured = clock.behind(lambda: whole.statistics(grads, torch.float64, device, True), 9)
            applied = clock.behind(lambda: whole.apply_(grads, scale, None), 5, work.restore)
            w.emit(row=name, measure_ms=measured, TB_per_s=read / measured / 1e9, apply_ms=applied,
                   apply_TB_per_s=2 * read / applied / 1e9, now=sizes == WHOLE[0])  # fmt: skip
        if w.late(25):
            break
    whole.CHUNK, whole.BLOCK, whole.WARPS = WHOLE[0]


def _step(w: Worker, clock: Clock, work: Workload, moments: torch.dtype, device: torch.device) -> None:
    weights: list[Any] = [p.detach() for p in work.params]
    first, second = ([torch.rand_like(p, dtype=moments) for p in weights] for _ in range(2))
    memory = Memory(weights, list(work.grads), first, second, [None] * len(weights))
    numbers: dict[str, Any] = {"past": 0.9, "fresh": 0.1, "past2": 0.99, "fresh2": 0.01, "eps": 1e-8}
    rule = Rule("adam", 1e-6, 0.1, True, False, **numbers, terms=[(2.0, 0.5)] * len(weights))
    places = Places(tuple(range(len(weights))), tuple(range(len(weights))))
    plan = ClipPlan(torch.tensor(0.5, device=device, dtype=torch.float64))
    moved = work.flat.numel() * (3 * 2 + 4 * first[0].element_size())
    for sizes in STEP:
        full = f"adam, {str(moments)[6:]} moments: " + "CHUNK {} STEP {} WARPS {} REGISTERS {}".format(*sizes)
        with w.row(full):
            ms = clock.behind(bind(variant(sizes).step_, rule, memory, places, plan, None), 5)
            w.emit(row=full, ms=ms, TB_per_s=moved / ms / 1e9, now=sizes == STEP[0])
        if w.late(3):
            return


if __name__ == "__main__":
    serve(sweep)
