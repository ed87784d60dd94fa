"""What the benchmarks share: rows measured in interleaved rounds beside the ceiling of the memory, and the report.

A table is one workload, one dtype and one case. In every round each row runs once, in an order shuffled with a fixed
seed. Before each call the gradients are restored from a copy and states are put back, outside the timed region, so
every row meets the same gradients and the same cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from stopwatch import Stopwatch as Stopwatch
from torch import Tensor, nn

INF = float("inf")
READ = "read: sum of one flat buffer"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "triton", "timm", "pytorch_optimizer", "deepspeed", "apex", "transformer_engine")
SAMPLE = 4096
SMALL = 20_000_000
COLUMNS = ("row", "kind", "ms", "quartiles", "x torch", "x peer", "/ read", "kept", "norm error", "note")
LEGEND = """\
- ms: median; quartiles: of the same calls.
- x torch: how many times as fast as torch's clip_grad_norm_ in its foreach form (before a fused AdamW in bench_step).
- x peer: how many times as fast as the first peer that does the same.
- / read: the time over that of reading the gradients once.
- kept: norm of the gradients after / before, of the first 4096 elements of each; 1 means that nothing was clipped.
- norm error: of the norm returned, relative to a sum in float64."""

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """How hard to clip. Limits are relative to the norms of the workload, so they do not depend on its size.

    Args:
        name: for the table.
        limit: times the norm of the whole gradient.
        history: what adaptive rules have seen before: the gradient times this.
        agc: clip factor of AGC.
        rms: limit on the root mean square of updates, which Adam makes about 1.
    """

    name: str
    limit: float
    history: float
    agc: float
    rms: float


CASES = (Case("nothing clips", 10.0, 1.0, 100.0, 10.0), Case("clips", 0.1, 0.1, 1e-3, 0.1))


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: unique in its table.
        group: "ceiling", "ours" or "peer".
        kind: "kernel" or "whole step".
        task: rows of one task do the same thing; "" for ceilings.
        call: what is timed; it returns the norm if `order` is given. None if it cannot run here, and `note` says why.
        baseline: whether the other rows of the task are compared with this one; of the task "norm" it is torch's.
        order: of the norm returned, 2 or inf.
        grads: whether what is left of the gradients tells if it clipped.
        before: what puts states back; not timed.
        why_not: asked after the first call; not "" if something else has served, so that the row must not count.
        note: whatever the reader must know.
    """

    name: str
    group: str
    kind: str
    task: str = ""
    call: Callable[[], Any] | None = None
    baseline: bool = False
    order: float | None = None
    grads: bool = True
    before: Callable[[], None] | None = None
    why_not: Callable[[], str] | None = None
    note: str = ""


@dataclass
class Result:
    """What was measured of a row: the columns of the table. Ratios are of medians."""

    row: str
    group: str
    kind: str
    task: str
    note: str
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    times_torch: float | None = None
    times_peer: float | None = None
    per_read: float | None = None
    kept: float | None = None
    norm_error: float | None = None


class Workload(nn.Module):
    """Parameters of given shapes whose `.grad` is filled with random numbers.

    Attributes:
        flat: one buffer with the numbers of all gradients, which `restore` copies from.
        norms: the norms by order, summed in float64.
    """

    def __init__(self, name: str, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        seed = torch.Generator(device).manual_seed(0)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self.flat = torch.empty(sum(sizes), dtype=dtype, device=device).normal_(0, 0.01, generator=seed)
        self.parts = [part.view(shape) for part, shape in zip(self.flat.split(sizes), shapes, strict=True)]
        weights = (torch.empty_like(part).normal_(0, 0.02, generator=seed) for part in self.parts)
        self.params = nn.ParameterList([nn.Parameter(weight) for weight in weights])
        self.grads = [torch.empty_like(part) for part in self.parts]
        largest = torch.stack(torch.aminmax(self.flat)).abs().max()
        self.norms = {2.0: norm64(self.flat.split(1 << 22)), INF: float(largest)}
        self._sampled = norm64(part.view(-1)[:SAMPLE] for part in self.parts)

    def restore(self, factor: float = 1.0) -> None:
        """Give every parameter its gradient again, times a factor."""
        torch._foreach_copy_(self.grads, self.parts)
        if factor != 1.0:
            torch._foreach_mul_(self.grads, factor)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad

    def kept(self) -> float:
        """Norm after / norm before, of the first elements of every gradient."""
        return norm64(p.grad.view(-1)[:SAMPLE] for p in self.params if p.grad is not None) / self._sampled


def norm64(chunks: Iterable[Tensor]) -> float:
    """The 2-norm of all chunks together, in float64."""
    return float(torch.stack([chunk.double().square().sum() for chunk in chunks]).sum().sqrt())


def bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """The call of a function with these arguments."""
    return lambda: function(*args, **kwargs)


def ceilings(work: Workload) -> list[Row]:
    """What the memory allows, on one flat buffer of the same size and dtype."""
    spare = torch.zeros_like(work.flat)

    def two_reads_and_a_write() -> None:
        """What a rule by unit needs where it clips: gradients and weights read, then gradients written."""
        work.flat.sum()
        spare.sum()
        work.flat.mul_(1.0)

    calls = {
        READ: bind(torch.sum, work.flat),
        "read + multiply in place, flat buffer": bind(work.flat.mul_, 1.0),
        "copy of a flat buffer": bind(spare.copy_, work.flat),
        "two reads, then multiply in place": two_reads_and_a_write,
    }
    return [Row(name, "ceiling", "kernel", call=call, grads=False) for name, call in calls.items()]


def _prepare(work: Workload, row: Row) -> None:
    work.restore()
    if row.before is not None:
        row.before()


def first_call(work: Workload, row: Row) -> tuple[Row, Result]:
    """Run a row once, and look at what it did; a peer that fails becomes a row that says so."""
    result = Result(row.name, row.group, row.kind, row.task, row.note)
    if row.call is None:
        return row, result
    _prepare(work, row)
    try:
        value = row.call()
    except Exception as error:
        if row.group != "peer":
            raise
        result.note = f"{row.note}; failed: {type(error).__name__}".strip("; ")
        return replace(row, call=None), result
    if row.why_not is not None and (why := row.why_not()):
        result.note = f"not measured: {why}"
        return replace(row, call=None), result
    result.kept = work.kept() if row.grads else None
    if row.order is not None:
        result.norm_error = abs(float(value) / work.norms[row.order] - 1)
    return row, result


def measure(work: Workload, rows: Sequence[Row], rounds: int, stopwatch: Stopwatch) -> list[Result]:
    """Two warm-up calls of every row, then rounds in which each runs once, in shuffled order."""
    checked = [first_call(work, row) for row in rows]
    alive = [row for row, _ in checked if row.call is not None]
    times: dict[str, list[float]] = {row.name: [] for row in alive}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for row in order.sample(alive, len(alive)):
            _prepare(work, row)
            assert row.call is not None
            taken = stopwatch.time(row.call)
            if turn > 0:
                times[row.name].append(taken)
    results = [result for _, result in checked]
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for result in results:
        if result.row in times:
            low, result.median_ms, high = torch.tensor(times[result.row]).double().quantile(quarters).tolist()
            result.quartiles_ms = (low, high)
    _compare(rows, results)
    return results


def _compare(rows: Sequence[Row], results: list[Result]) -> None:
    """Fill in the ratios."""
    medians = {result.row: result.median_ms for result in results}
    baselines = {row.task: medians[row.name] for row in rows if row.baseline}
    for result in results:
        if result.median_ms is not None:
            result.times_torch = _ratio(baselines.get("norm"), result.median_ms)
            result.times_peer = _ratio(baselines.get(result.task), result.median_ms)
            result.per_read = _ratio(result.median_ms, medians.get(READ))


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def table_of(results: list[dict[str, Any]]) -> str:
    """A Markdown table that can also be read as it is."""
    lines = [COLUMNS, *(_cells(result) for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    quartiles = result["quartiles_ms"]
    return (
        result["row"],
        f"{result['group']}, {result['kind']}",
        shown(result["median_ms"], ".4g"),
        "-" if quartiles is None else f"{quartiles[0]:.4g} to {quartiles[1]:.4g}",
        *(shown(result[key], ".2f") for key in ("times_torch", "times_peer", "per_read")),
        shown(result["kept"], ".4g"),
        shown(result["norm_error"], ".1e"),
        result["note"],
    )


def hardware(device: torch.device) -> tuple[str, str]:
    """The CPU or GPU in words, and as a part of a file's name."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
        return words, _slug(words)
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.exists() else None
    model = match[1].strip() if match else platform.machine()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{model}, {count} vCPU", f"cpu-{_slug(model)}-{count}vcpu"


def _slug(words: str) -> str:
    plain = re.sub(r"\((r|tm)\)|@.*|\b(amd|intel|nvidia|cpu|processor|\d+-core)\b", " ", words.lower())
    return "-".join(re.findall(r"[a-z0-9]+", plain)) or "unknown"


def version_of(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def circumstances(script: str, argv: Sequence[str], device: torch.device, clock: str) -> dict[str, Any]:
    """What a reader must know to judge the numbers. No folder and no name of a machine is in it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return {
        "hardware": hardware(device)[0],
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"scripts/{script}.py", *words]),
        "commit": commit or "unknown",
        "threads": torch.get_num_threads(),
        "clock": clock,
        "load": f"{os.getloadavg()[0]:.1f} processes that ran or waited, mean of the minute before",
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
    }


def title_of(table: dict[str, Any]) -> str:
    """The workload, the dtype and the case, with the exact size."""
    size = f"{table['elements']:,} elements in {table['tensors']:,} tensors, {table['bytes'] / 1e6:,.0f} MB"
    return f"{table['workload']}, {table['dtype']}, {table['case']} ({size}; {table['rounds']} rounds)"


def write(folder: Path, stem: str, report: dict[str, Any]) -> None:
    """The report as JSON and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [f"- {key}: {value}" for key, value in report.items() if key not in ("versions", "tables")]
    facts.append("- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    parts = [f"# {stem}", "\n".join(facts), LEGEND]
    for table in report["tables"]:
        parts += [f"## {title_of(table)}", table_of(table["rows"])]
    (folder / f"{stem}.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(f"written: {stem}.md and .json")


def device_of(word: str) -> torch.device:
    """The device of `--device`; a GPU without a number is the first.

    Raises:
        SystemExit: for a GPU where torch sees none.
    """
    device = torch.device(word)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {word}: torch sees no GPU here. Leave it out to measure the CPU.")
    return torch.device("cuda", device.index or 0)


def run(
    theme: str, workloads: dict[str, Shapes], rows_of: Callable[[Workload, Case], list[Row]], args: argparse.Namespace
) -> dict[str, Any]:
    """Measure and print every table, and write them all with `--out`; the report."""
    device = device_of(args.device)
    torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    stopwatch = Stopwatch(device, args.threads, args.backlog)
    report = {**circumstances(f"bench_{theme}", args.argv, device, stopwatch.name), "tables": []}
    for name, shapes in workloads.items():
        for dtype in args.dtype:
            work = None  # so that the memory of the last one is free
            work = Workload(name, shapes, DTYPES[dtype], device)
            rounds = args.repeats * (3 if work.flat.numel() < SMALL and not args.tiny else 1)
            for case in CASES:
                results = measure(work, rows_of(work, case), rounds, stopwatch)
                table = {
                    "workload": name,
                    "dtype": dtype,
                    "case": case.name,
                    "tensors": len(work.parts),
                    "elements": work.flat.numel(),
                    "bytes": work.flat.nbytes,
                    "rounds": rounds,
                    "rows": [asdict(result) for result in results],
                }
                report["tables"].append(table)
                print(f"\n{title_of(table)}\n\n{table_of(table['rows'])}", flush=True)
    print(f"\n{LEGEND}\n- clock: {stopwatch.name}, {args.threads} thread(s); {report['hardware']}")
    if args.out is not None:
        write(args.out, f"{theme}_{hardware(device)[1]}_{report['date']}", report)
    return report
