"""What clipping costs: this package, its peers and the memory itself, measured in one interleaved run.

    python scripts/bench_clip.py --out benchmarks
    python scripts/bench_clip.py --workload llama138m --dtype bf16 --repeats 15
    python scripts/bench_clip.py --workload llama1b size count --device cuda

How it measures is in benchmark.py. `size` goes from 10M to 1B elements, which takes 16 GB in fp32, `count` from 10 to
10,000 tensors. `--tiny` takes a few thousand elements in the place of every workload, for the tests.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import DTYPES, INF, Case, Row, Shapes, Workload, bind, ceilings, norm64, run
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import hf_gradclip
from hf_gradclip import Clipper
from hf_gradclip.kernels import choice

STEP = "whole step"
BACKENDS = ("auto", "eager")  # the kernels that a user gets, and those in plain torch


def llama(layers: int, hidden: int, intermediate: int, kv: int, vocab: int, tied: bool) -> Shapes:
    """The parameters of a Llama: embedding, layers, last norm, head."""
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    layer: Shapes = [*attention, *mlp, (hidden,), (hidden,)]
    return [(vocab, hidden), *layer * layers, (hidden,), *([] if tied else [(vocab, hidden)])]


def even(numel: int, count: int) -> Shapes:
    """`count` equal matrices with rows of 1000."""
    return [(numel // count // 1000, 1000)] * count


WORKLOADS: dict[str, dict[str, Shapes]] = {
    "llama138m": {"llama138m": llama(16, 768, 2048, 768, 32000, tied=True)},
    "llama1b": {"llama1b": llama(22, 2048, 5632, 256, 32000, tied=False)},
    "lora400": {"lora400": [(8, 2048), (2048, 8)] * 200},
    "size": {f"size-{millions}M": even(millions * 10**6, 100) for millions in (10, 30, 100, 300, 1000)},
    "count": {f"count-{count}": even(10**7, count) for count in (10, 100, 1000, 10_000)},
}
TINY: dict[str, Shapes] = {"tiny": [(64, 32), (32,), (8, 64), (64, 8), (7,)]}


def ours(work: Workload, case: Case, backend: str) -> list[Row]:
    """This package, past the warm-up of its strategies, on one kind of kernels."""
    limit, largest = case.limit * work.norms[2.0], case.limit * work.norms[INF]
    plain = f"global_norm:max_norm={limit}"
    specs: dict[str, tuple[str, Any]] = {
        "global_norm": ("norm", plain),
        "global_norm:norm_type=inf": ("inf", f"global_norm:max_norm={largest},norm_type=inf"),
        "zclip": ("zclip", "zclip:warmup_steps=2,max_norm=inf"),
        "adagc": ("adagc", "adagc:warmup_steps=2,max_norm=inf"),
    }
    agc = f"agc:clip_factor={case.agc},include_1d=true"  # as its peers do; where it clips, it clips every row
    specs["agc"] = ("agc", agc)
    specs["adaptive_norm+agc"] = ("adaptive", f"adaptive_norm+{agc}")  # the preset `adaptive`
    if work.flat.is_cuda:
        specs["global_norm, nonfinite=pass"] = ("norm", {"gradient": plain, "nonfinite": "pass"})
    rows = [_clipper_row(work, case, backend, name, *spec) for name, spec in specs.items()]
    for order, task in ((2.0, "norm"), (INF, "inf")):
        call = bind(hf_gradclip.clip_grad_norm_, list(work.params), case.limit * work.norms[order], order)
        rows.append(our_row(work, f"hf_gradclip.clip_grad_norm_{_of(order)}", task, call, backend, order=order))
    return rows


def _clipper_row(work: Workload, case: Case, backend: str, name: str, task: str, spec: Any) -> Row:
    clipper = Clipper.for_model(work, spec)
    for _ in range(2):
        work.restore(case.history)
        clipper.step()
    start = bind(setattr, clipper, "state", clipper.state)
    return our_row(work, f"clipper.step() {name}", task, clipper.step, backend, order=2.0, before=start)


def our_row(
    work: Workload, name: str, task: str, call: Callable[[], Any], backend: str, before: Any = None, **more: Any
) -> Row:
    """A row under HF_GRADCLIP_KERNELS=backend; as auto it does not count if plain torch had to serve."""

    def choose() -> None:
        os.environ[choice.VARIABLE] = backend
        choice.language_of.cache_clear()  # it reads the variable once
        choice.language_of(work.flat.device)
        if before is not None:
            before()

    def why_not() -> str:
        dtypes = choice.language_of(work.flat.device).dtypes
        if backend == "eager" or (dtypes is not None and work.flat.dtype in dtypes):
            return ""
        return "plain torch serves: " + ("; ".join(choice._given_up.values()) or "no kernels for this")

    name = name if backend == "auto" else f"{name} [{backend}]"
    return Row(name, "ours", STEP, task, call, before=choose, why_not=why_not, **more)


def _of(order: float) -> str:
    return ", inf" if order == INF else ""


def torch_peers(work: Workload, case: Case) -> list[Row]:
    """torch's own clipping."""
    params, limit = list(work.params), case.limit * work.norms[2.0]
    rows = []
    for order, task in ((2.0, "norm"), (INF, "inf")):
        for foreach in (True, False):
            call = bind(clip_grad_norm_, params, case.limit * work.norms[order], order, foreach=foreach)
            rows.append(
                Row(f"torch clip_grad_norm_ foreach={foreach}{_of(order)}", "peer", STEP, task, call, foreach, order)
            )

    def in_two_calls() -> Tensor:
        norm = get_total_norm([p.grad for p in params if p.grad is not None])
        clip_grads_with_norm_(params, limit, norm)
        return norm

    name = "torch get_total_norm + clip_grads_with_norm_"
    return [*rows, Row(name, "peer", STEP, "norm", in_two_calls, order=2.0)]


def algorithm_peers(work: Workload, case: Case) -> list[Row]:
    """Published rules as loops over tensors, written here from their equations. Their states are put back each time."""
    grads, limit = work.grads, case.limit * work.norms[2.0]
    mean = case.history * work.norms[2.0]
    start = {"mean": mean, "var": (0.05 * mean) ** 2}
    state = dict(start)
    first = [case.history * norm64([part]) for part in work.parts]
    gammas = list(first)

    def zclip() -> float:
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        sigma = state["var"] ** 0.5
        z = (norm - state["mean"]) / (sigma + 1e-6)
        kept = state["mean"] + 2.5**2 * sigma / z if z > 2.5 else norm
        if kept < norm:
            for grad in grads:
                grad.mul_(kept / (norm + 1e-6))
        state["mean"] = 0.97 * state["mean"] + 0.03 * kept
        state["var"] = 0.97 * state["var"] + 0.03 * (kept - state["mean"]) ** 2
        return norm

    def adagc() -> None:
        for i, grad in enumerate(grads):
            norm = grad.norm().item()
            if norm > 1.04 * gammas[i]:
                grad.mul_(1.04 * gammas[i] / (norm + 1e-6))
                norm = 1.04 * gammas[i]
            gammas[i] = 0.99 * gammas[i] + 0.01 * norm

    def zero() -> Tensor:
        norms = [torch.linalg.vector_norm(grad.to(torch.double)) for grad in grads]
        norm = torch.stack(norms).pow(2).sum().float().pow(0.5)
        factor = 1.0 / torch.clamp((norm + 1e-6) / limit, min=1.0)
        for grad in grads:
            grad.mul_(factor)
        return norm

    text = "written here from the equations"
    peer = ("peer", STEP)
    return [
        Row(
            "ZClip algorithm as a per-tensor loop",
            *peer,
            "zclip",
            zclip,
            baseline=True,
            order=2.0,
            before=bind(state.update, start),
            note=f"{text}; one .item()",
        ),
        Row(
            "AdaGC algorithm as a per-tensor loop",
            *peer,
            "adagc",
            adagc,
            baseline=True,
            before=bind(gammas.__setitem__, slice(None), first),
            note=f"{text}; one .item() per tensor",
        ),
        Row(
            "ZeRO-1/2 norm and clip as a per-tensor loop",
            *peer,
            "norm",
            zero,
            order=2.0,
            note=f"{text} of DeepSpeed 0.19.8: float64 copies",
        ),
    ]


def installed_peers(work: Workload, case: Case) -> Iterator[Row]:
    """Other packages, by their own functions; a row that says so where one is missing."""
    params, grads, limit = list(work.params), work.grads, case.limit * work.norms[2.0]

    timm, note = found("timm", "timm/utils/agc.py", "adaptive_clip_grad")
    call = bind(timm, params, clip_factor=case.agc) if timm else None
    yield Row("timm adaptive_clip_grad", "peer", STEP, "agc", call, baseline=True, note=note)

    agc, note = found("pytorch_optimizer", "pytorch_optimizer.optimizer.agc", "agc")

    def agc_loop() -> None:
        for param, grad in zip(params, grads, strict=True):
            grad.copy_(agc(param.detach(), grad, 1e-3, case.agc))

    yield Row("pytorch_optimizer agc, per tensor", "peer", STEP, "agc", agc_loop if agc else None, note=note)

    deepspeed, note = found("deepspeed", "deepspeed.runtime.utils", "clip_tensors_by_global_norm")
    call = bind(deepspeed, grads, limit) if deepspeed else None
    yield Row("deepspeed clip_tensors_by_global_norm", "peer", STEP, "norm", call, order=2.0, note=note)

    apex, note = found("apex", "apex.contrib.clip_grad", "clip_grad_norm_")
    call = bind(apex, params, limit) if apex else None
    yield Row("apex.contrib clip_grad_norm_", "peer", STEP, "norm", call, order=2.0, note=note)

    engine, note = found("transformer_engine", "transformer_engine.pytorch", "optimizers")

    def multi_tensor() -> Tensor:
        overflow = torch.zeros(1, dtype=torch.int, device=work.flat.device)
        norm, _ = engine.multi_tensor_applier(engine.multi_tensor_l2norm, overflow, [grads], False)
        factor = limit / (norm.item() + 1e-6)
        if factor < 1.0:
            engine.multi_tensor_applier(engine.multi_tensor_scale, overflow, [grads, grads], factor)
        return norm

    call = multi_tensor if engine else None
    yield Row("TransformerEngine multi_tensor_l2norm + scale", "peer", STEP, "norm", call, order=2.0, note=note)


def found(package: str, where: str, name: str) -> tuple[Any, str]:
    """Something of an installed package, with its version; or None, and why.

    Args:
        package: as it is installed.
        where: a module; or a file, run by itself where importing the whole package would need others.
        name: what to take from it.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None, "not installed"
    try:
        if not where.endswith(".py"):
            return getattr(importlib.import_module(where), name), distribution.version
        return runpy.run_path(str(distribution.locate_file(where)))[name], distribution.version
    except Exception as error:
        return None, f"{distribution.version} cannot be loaded: {type(error).__name__}"


def rows_of(work: Workload, case: Case) -> list[Row]:
    """All rows of a table."""
    rows = [*ceilings(work), *(row for backend in BACKENDS for row in ours(work, case, backend))]
    return [*rows, *torch_peers(work, case), *algorithm_peers(work, case), *installed_peers(work, case)]


def parse_args(argv: Sequence[str], description: str, workloads: list[str]) -> argparse.Namespace:
    """Read the command line; `workloads` are the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=workloads, help="What to clip.")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="Of weights and gradients."
    )
    parser.add_argument("--repeats", type=int, default=5, help="Rounds; three times as many below 20M elements.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch, on the CPU.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda.")
    parser.add_argument("--backlog", type=float, default=0.0, help="On a GPU: ms of other work before each call.")
    parser.add_argument("--out", type=Path, default=None, help="A folder for the Markdown and JSON files.")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = list(argv)
    return args


def chosen(args: argparse.Namespace) -> dict[str, Shapes]:
    """The workloads of the command line."""
    return TINY if args.tiny else {name: shapes for word in args.workload for name, shapes in WORKLOADS[word].items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure clipping; the report."""
    args = parse_args(sys.argv[1:] if argv is None else argv, __doc__ or "", ["llama138m", "lora400"])
    return run("clip", chosen(args), rows_of, args)


if __name__ == "__main__":
    main()
