"""What clipping and the optimizer's step cost together: torch's AdamW after a clip, folded into it, and AdamW of ours.

    python scripts/bench_step.py --out benchmarks
    python scripts/bench_step.py --workload llama1b --dtype bf16 --device cuda

Workloads and flags are those of bench_clip.py, how it measures is in benchmark.py. Four sets of moments are held beside
the weights and gradients. The learning rate is so small that the weights stay as they are; that costs the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from bench_clip import BACKENDS, chosen, our_row, parse_args
from benchmark import Case, Row, Workload, bind, ceilings, run
from torch.nn.utils import clip_grad_norm_

from hf_gradclip import Clipper, optim

RATE = 1e-6
STEP = "whole step"


def then(clip: Callable[[], Any], step: Callable[[], Any]) -> Callable[[], Any]:
    """Clip, then step; what the clip returns."""

    def both() -> Any:
        norm = clip()
        step()
        return norm

    return both


def torch_rows(work: Workload, case: Case, fused: torch.optim.Optimizer) -> list[Row]:
    """torch alone: the step without a clip, then with one."""
    params, limit = list(work.params), case.limit * work.norms[2.0]
    foreach = torch.optim.AdamW(params, lr=RATE, foreach=True)
    clip = bind(clip_grad_norm_, params, limit)
    rows = [Row("torch fused AdamW, no clip", "ceiling", STEP, call=fused.step, grads=False)]
    for name, optimizer in (("fused", fused), ("foreach", foreach)):
        call = then(clip, optimizer.step)
        name = f"torch clip_grad_norm_ + {name} AdamW"
        rows.append(Row(name, "peer", STEP, "norm", call, baseline=optimizer is fused, order=2.0))
    return rows


def our_rows(work: Workload, case: Case, fused: torch.optim.Optimizer) -> list[Row]:
    """This package: with torch's fused AdamW, and with an AdamW of its own."""
    spec = f"global_norm:max_norm={case.limit * work.norms[2.0]}"
    update = f"block_rms:max_rms={case.rms}"
    plain = Clipper.for_model(work, spec)
    fold = Clipper.for_model(work, spec, optimizer=fused, fold=True)
    named = list(work.named_parameters())
    own = optim.AdamW(named, lr=RATE, clip=spec)
    own_update = optim.AdamW(named, lr=RATE, clip=spec, update_clip=update)
    rows = []
    for backend in BACKENDS:
        row = partial(our_row, work, backend=backend)
        rows += [
            row("clipper.step() + fused AdamW", "norm", then(plain.step, fused.step), order=2.0),
            row("clipper.step() fold=True + fused AdamW", "norm", then(fold.step, fused.step), order=2.0),
            # clips as it steps, and leaves the gradients as they are
            row("hf_gradclip.optim.AdamW clip", "norm", own.step, grads=False),
            row("hf_gradclip.optim.AdamW clip, update_clip=block_rms", "update", own_update.step, grads=False),
        ]
    return rows


def rows_of(work: Workload, case: Case) -> list[Row]:
    """All rows of a table. The rows with torch's fused AdamW share one."""
    fused = torch.optim.AdamW(work.params, lr=RATE, fused=True)
    return [*ceilings(work), *our_rows(work, case, fused), *torch_rows(work, case, fused)]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure clip and step; the report."""
    args = parse_args(sys.argv[1:] if argv is None else argv, __doc__ or "", ["llama138m", "lora400"])
    return run("step", chosen(args), rows_of, args)


if __name__ == "__main__":
    main()
