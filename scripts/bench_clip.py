"""What clipping costs on this machine: whole steps of ours beside torch and per-tensor loops, in one interleaved run.

    python scripts/bench_clip.py
    python scripts/bench_clip.py --workload llama138m --dtype bfloat16 --repeats 21 --out benchmarks

Every round runs every row once, in another order; a row's figure is the median of its rounds, beside its quartiles. The
ceilings (one read, one read with a write in place, of one flat buffer of the same size) are rows of the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_gradclip import Clipper, clip_grad_norm_

NEVER = 1e30  # a limit that no norm reaches
Shapes = list[tuple[int, ...]]


def llama138m() -> Shapes:
    """A Llama of 12 layers, width 768, 32,000 tokens, separate head."""
    layer: Shapes = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048), (768,), (768,)]
    return [(32000, 768), *layer * 12, (768,), (32000, 768)]


def llama1b() -> Shapes:
    """A Llama of 22 layers, width 2048, 32,000 tokens, separate head, grouped keys and values."""
    layer: Shapes = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    return [(32000, 2048), *[*layer, (2048,), (2048,)] * 22, (2048,), (32000, 2048)]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "llama138m": llama138m,
    "llama1b": llama1b,
    "lora400": lambda: [(8, 2048), (2048, 8)] * 200,
    "tiny": lambda: [(64, 32), (32,), (7, 5)] * 3,
}


@dataclass
class Row:
    """One thing that is timed.

    Args:
        name: what it is.
        kind: ceiling, whole step or function.
        case: "nothing clips" or "clips".
        run: one repetition.
        before: what is done before each repetition and not timed.
    """

    name: str
    kind: str
    case: str
    run: Callable[[], object]
    before: Callable[[], object] = tuple


@dataclass
class Result:
    """Milliseconds of a row, and its ratios within the run."""

    name: str
    kind: str
    case: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    times_torch: float
    times_read: float


def model_of(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Parameters with random gradients, whose norm is 1."""
    generator = torch.Generator(device).manual_seed(0)
    model = nn.Module()
    for i, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        parameter.grad = torch.randn(shape, generator=generator, device=device).to(dtype)
        model.register_parameter(f"p{i}", parameter)
    clip_grad_norm_(model.parameters(), 1.0)
    return model


def zclip_loop(grads: list[Tensor]) -> Callable[[], None]:
    """The ZClip algorithm as a loop over tensors, with Python numbers for its statistics; nothing clips."""
    state = {"mean": 1.0, "var": 1.0}

    def run() -> None:
        norm = sum(float(g.norm()) ** 2 for g in grads) ** 0.5
        z = (norm - state["mean"]) / (state["var"] ** 0.5 + 1e-6)
        if z > NEVER:
            for g in grads:
                g.mul_(state["mean"] / norm)
        state["mean"] = 0.97 * state["mean"] + 0.03 * norm
        state["var"] = 0.97 * state["var"] + 0.03 * (norm - state["mean"]) ** 2

    return run


def adagc_loop(grads: list[Tensor]) -> Callable[[], None]:
    """The AdaGC algorithm as a loop over tensors, one `.item()` each; nothing clips."""
    gamma = [NEVER] * len(grads)

    def run() -> None:
        for i, g in enumerate(grads):
            norm = g.norm().item()
            if norm > 1.04 * gamma[i]:
                g.mul_(1.04 * gamma[i] / (norm + 1e-6))

    return run


def rows_of(model: nn.Module, flat: Tensor) -> list[Row]:
    """Everything that is timed on one model."""
    params = list(model.parameters())
    grads = [p.grad for p in params if p.grad is not None]
    torch_clip = torch.nn.utils.clip_grad_norm_
    double = partial(torch._foreach_mul_, grads, 2.0)  # a norm of 1 becomes 2, which a limit of 1 takes back
    rows = [
        Row("read one flat buffer", "ceiling", "nothing clips", flat.sum),
        Row("read it and multiply it in place", "ceiling", "clips", lambda: (flat.sum(), flat.mul_(1.0))),
    ]
    for foreach in (True, False):
        name = f"torch clip_grad_norm_, foreach={foreach}"
        rows.append(Row(name, "function", "nothing clips", partial(torch_clip, params, NEVER, foreach=foreach)))
        rows.append(Row(name, "function", "clips", partial(torch_clip, params, 1.0, foreach=foreach), double))
    rows.append(Row("torch, inf norm", "function", "nothing clips", lambda: torch_clip(params, NEVER, float("inf"))))
    rows.append(Row("ZClip algorithm as a loop", "function", "nothing clips", zclip_loop(grads)))
    rows.append(Row("AdaGC algorithm as a loop", "function", "nothing clips", adagc_loop(grads)))
    ours = {
        "global_norm": f"global_norm:max_norm={NEVER}",
        "inf norm": f"global_norm:max_norm={NEVER},norm_type=inf",
        "zclip": f"zclip:max_norm=inf,z_threshold={NEVER}",
        "adagc": f"adagc:max_norm=inf,lambda_rel={NEVER},warmup_steps=1",
    }
    for name, spec in ours.items():
        rows.append(Row(f"ours, {name}", "whole step", "nothing clips", Clipper.for_model(model, spec).step))
    clipper = Clipper.for_model(model, "global_norm:max_norm=1.0")
    rows.append(Row("ours, global_norm", "whole step", "clips", clipper.step, double))
    rows.append(Row("ours, clip_grad_norm_", "function", "nothing clips", lambda: clip_grad_norm_(params, NEVER)))
    return rows


def measure(rows: list[Row], repeats: int, device: torch.device) -> list[Result]:
    """Interleaved rounds after two for warming up."""
    seconds: dict[int, list[float]] = {i: [] for i in range(len(rows))}
    order = list(range(len(rows)))
    shuffle = random.Random(0)
    for turn in range(repeats + 2):
        shuffle.shuffle(order)
        for i in order:
            rows[i].before()
            _wait(device)
            start = time.perf_counter()
            rows[i].run()
            _wait(device)
            if turn >= 2:
                seconds[i].append(time.perf_counter() - start)
    medians = [statistics.median(seconds[i]) * 1e3 for i in range(len(rows))]
    at = {(row.name, row.case): medians[i] for i, row in enumerate(rows)}
    read = at["read one flat buffer", "nothing clips"]
    results = []
    for i, row in enumerate(rows):
        low, _, high = statistics.quantiles([s * 1e3 for s in seconds[i]], n=4)
        peer = at["torch, inf norm", "nothing clips"] if "inf norm" in row.name else None
        peer = peer or at["torch clip_grad_norm_, foreach=True", row.case]
        ratios = peer / medians[i], medians[i] / read
        results.append(Result(row.name, row.kind, row.case, medians[i], (low, high), *ratios))
    return results


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def precision_of(model: nn.Module) -> dict[str, float]:
    """Relative error of the total norm against float64."""
    params = list(model.parameters())
    true = sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5
    ours = float(clip_grad_norm_(params, NEVER))
    theirs = float(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
    return {"ours": abs(ours / true - 1), "torch": abs(theirs / true - 1)}


def hardware(device: torch.device) -> str:
    """The name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def table(title: str, results: list[Result], precision: dict[str, float]) -> str:
    """Markdown."""
    lines = [f"## {title}", "", "| what | kind | case | ms (quartiles) | x faster than torch | x one read |"]
    lines.append("|---|---|---|---|---|---|")
    for r in results:
        low, high = r.quartiles_ms
        ms = f"{r.median_ms:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"| {r.name} | {r.kind} | {r.case} | {ms} | {r.times_torch:.2f} | {r.times_read:.2f} |")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in precision.items())
    return "\n".join([*lines, "", f"Relative error of the total norm: {errors}.", ""])


def main(argv: list[str] | None = None) -> dict[str, list[Result]]:
    """Measure, print, write; the results by workload and dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="+", default=["lora400", "llama138m"], choices=WORKLOADS)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=dtypes[:2], choices=dtypes)
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for a Markdown and a JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    about = {
        "hardware": hardware(device),
        "threads": args.threads,
        "torch": torch.__version__,
        "command": "python scripts/bench_clip.py " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    found: dict[str, list[Result]] = {}
    parts = [f"# Clipping: {about['hardware']}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for workload in args.workload:
        for dtype in args.dtype:
            model = model_of(WORKLOADS[workload](), getattr(torch, dtype), device)
            size = sum(p.numel() for p in model.parameters())
            flat = torch.ones(size, dtype=getattr(torch, dtype), device=device)
            precision = precision_of(model)
            found[f"{workload} {dtype}"] = results = measure(rows_of(model, flat), args.repeats, device)
            count = len(list(model.parameters()))
            parts.append(table(f"{workload}, {dtype}: {size:,} elements in {count} tensors", results, precision))
            print(parts[-1], flush=True)
    if args.out is not None:
        words = re.sub(r"[^a-z0-9]+", "-", str(about["hardware"]).lower()).strip("-")
        path = args.out / f"clip_{words}_{date.today().isoformat()}"
        args.out.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".md").write_text("\n".join(parts), "utf-8")
        listed = {key: [asdict(result) for result in results] for key, results in found.items()}
        path.with_suffix(".json").write_text(json.dumps({**about, "results": listed}, indent=2) + "\n", "utf-8")
    return found


if __name__ == "__main__":
    main()
