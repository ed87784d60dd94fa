"""Part `sweep`: tile sizes and arithmetic of the kernels at 1.1B elements, behind a backlog, so that the device alone
counts. A variant of the step's arithmetic is kernels/triton/step.py with one line changed."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType
from typing import Any

import torch
from benchmark import Workload, bind

from gpu_parts.worker import ROOT, Clock, Worker, serve
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.types import ClipPlan

LINE = "u = term * tl.div_rn(a, tl.div_rn(tl.sqrt_rn(top), root) + eps)"
VARIANTS = {
    "as is": LINE,
    "one division less": "u = term * tl.div_rn(a, tl.sqrt_rn(top) * (1.0 / root) + eps)",
    "fast division": "u = term * (a / (tl.sqrt_rn(top) * (1.0 / root) + eps))",
    "fast division and root": "u = term * (a / (tl.sqrt(top) * (1.0 / root) + eps))",
}
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
STEP = [(1 << 14, 1024, 4), (1 << 14, 512, 4), (1 << 15, 2048, 8), (1 << 14, 1024, 8)]  # CHUNK, STEP, WARPS


def variant(w: Worker, name: str) -> ModuleType:
    """The step's file with the arithmetic of this name, as a module of its own."""
    text = (ROOT / "hf_gradclip" / "kernels" / "triton" / "step.py").read_text("utf-8")
    if LINE not in text:
        raise LookupError(f"kernels/triton/step.py has no line {LINE!r} any more: sweep.py changes that one")
    path = w.work / f"step_{re.sub(r'[^a-z]+', '_', name)}.py"
    path.write_text(text.replace(LINE, VARIANTS[name]), "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


def sweep(w: Worker) -> None:
    """In a rehearsal, whether the variants can be made."""
    if w.tiny:
        for name in VARIANTS:
            with w.row(f"adam, {name}"):
                w.emit(row=f"adam, {name}", launcher=variant(w, name).step_.__name__)
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
    numbers = {"past": 0.9, "fresh": 0.1, "past2": 0.99, "fresh2": 0.01, "eps": 1e-8}
    rule = Rule("adam", 1e-6, 0.1, True, False, **numbers, terms=[(2.0, 0.5)] * len(weights))
    places = Places(tuple(range(len(weights))), tuple(range(len(weights))))
    plan = ClipPlan(torch.tensor(0.5, device=device, dtype=torch.float64))
    moved = work.flat.numel() * (3 * 2 + 4 * first[0].element_size())
    for name in VARIANTS:
        for sizes in STEP:
            full = f"adam, {str(moments)[6:]} moments, {name}: " + "CHUNK {} STEP {} WARPS {}".format(*sizes)
            with w.row(full):
                made: Any = variant(w, name)
                made.CHUNK, made.STEP, made.WARPS = sizes
                ms = clock.behind(bind(made.step_, rule, memory, places, plan, None), 5)
                w.emit(row=full, ms=ms, TB_per_s=moved / ms / 1e9, now=name == "as is" and sizes == STEP[0])
            if w.late(3):
                return


if __name__ == "__main__":
    serve(sweep)
