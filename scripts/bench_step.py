"""What clipping and the optimizer's step cost together: torch's AdamW after a clip, folded into it, and AdamW of ours.

    python scripts/bench_step.py --out benchmarks
    python scripts/bench_step.py --workload llama1b --dtype bf16 --device cuda

Workloads and flags are those of bench_clip.py, how it measures is in benchmark.py. Four sets of moments are held beside
the weights and gradients, six on CUDA. The learning rate is so small that the weights stay as they are; that costs the
same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_clip import chosen, parse_args
from benchmark import Case, Row, Workload, bind, ceilings, run
from torch.nn.utils import clip_grad_norm_

from hf_gradclip import Clipper, kernels, optim

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
    ours = ("ours", STEP)
    return [
        Row("clipper.step() + fused AdamW", *ours, "norm", then(plain.step, fused.step), order=2.0),
        Row("clipper.step() fold=True + fused AdamW", *ours, "norm", then(fold.step, fused.step), order=2.0),
        Row("hf_gradclip.optim.AdamW clip", *ours, "norm", own.step),
        Row("hf_gradclip.optim.AdamW clip, update_clip=block_rms", *ours, "update", own_update.step, grads=False),
        fused_row(work, "hf_gradclip.optim.AdamW clip [triton]", "norm", clip=spec),
        fused_row(
            work,
            "hf_gradclip.optim.AdamW clip, update_clip=block_rms [triton]",
            "update",
            clip=spec,
            update_clip=update,
        ),
    ]


def fused_row(work: Workload, name: str, task: str, **clips: Any) -> Row:
    """Clip and step in one launch under HF_GRADCLIP_KERNELS=triton; a row that says so where it cannot run."""
    if not work.flat.is_cuda or importlib.util.find_spec("triton") is None:
        return Row(name, "ours", STEP, task, note="left out: needs CUDA and triton")
    optimizer = optim.AdamW(list(work.named_parameters()), lr=RATE, **clips)

    def call() -> None:
        os.environ[kernels.VARIABLE] = "triton"
        optimizer.step()
        os.environ[kernels.VARIABLE] = "eager"

    def why_not() -> str:
        return kernels._given_up[0] if kernels._given_up else ""

    return Row(name, "ours", STEP, task, call, grads=False, why_not=why_not)


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
