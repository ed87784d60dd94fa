"""What a clip costs beside its arithmetic: many small tensors on one CPU thread, where calls are most of the time.

    python scripts/bench_fixed.py
    python scripts/bench_fixed.py --tensors 400 --size 16

Every round calls each row twice, in an order shuffled with a fixed seed: with gradients of norm 0.5, which no row
clips, and with gradients of norm 5, which every row clips; the first rounds insist on that. The gradients are restored
before each call, outside the timed region. Shown are the medians, and their ratio to `torch.nn.utils.clip_grad_norm_`
in its default form in the same case. zclip has its warm-up behind it, and sees the norm 5 as a spike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_gradclip import Clipper, clip_grad_norm_

LIMIT = 1.0
NORMS = {"nothing clips": 0.5, "clips": 5.0}
BASELINE = "torch.nn.utils.clip_grad_norm_"
WARMUP = 60
CHECKED = 20


class Workload(nn.Module):
    """Small square parameters whose gradients can be given again, with a norm that is asked for."""

    def __init__(self, tensors: int, size: int) -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(0)
        self.params = nn.ParameterList([nn.Parameter(torch.zeros(size, size)) for _ in range(tensors)])
        made = [torch.randn(size, size, generator=seed) for _ in range(tensors)]
        whole = float(torch.stack([grad.double().square().sum() for grad in made]).sum().sqrt())
        self._unit = [grad / whole for grad in made]
        for param in self.params:
            param.grad = torch.zeros_like(param)

    def restore(self, norm: float) -> None:
        """Give every parameter its gradient again, in the same memory."""
        grads = [param.grad for param in self.params if param.grad is not None]
        torch._foreach_copy_(grads, self._unit)
        torch._foreach_mul_(grads, norm)

    def norm(self) -> float:
        """Of all gradients together, in float64."""
        sums = [param.grad.double().square().sum() for param in self.params if param.grad is not None]
        return float(torch.stack(sums).sum().sqrt())


def rows_of(work: Workload) -> dict[str, Callable[[], Tensor]]:
    """What is measured, by name; the baseline first."""
    params = list(work.params)
    fixed = Clipper.for_model(work, f"global_norm:max_norm={LIMIT}")
    adaptive = Clipper.for_model(work, "zclip")
    return {
        BASELINE: lambda: nn.utils.clip_grad_norm_(params, LIMIT),
        "hf_gradclip.clip_grad_norm_": lambda: clip_grad_norm_(params, LIMIT),
        "clipper.step() global_norm:max_norm=1": fixed.step,
        "clipper.step() zclip": adaptive.step,
    }


def measure(tensors: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median of each row in microseconds, by case.

    Raises:
        RuntimeError: if a row clips where it should not, or does not where it should.
    """
    work = Workload(tensors, size)
    rows = rows_of(work)
    for _ in range(WARMUP):
        for call in rows.values():
            work.restore(NORMS["nothing clips"])
            call()
    times: dict[str, dict[str, list[float]]] = {case: {name: [] for name in rows} for case in NORMS}
    order = random.Random(0)
    for turn in range(rounds):
        for case, norm in NORMS.items():
            for name in order.sample(list(rows), len(rows)):
                work.restore(norm)
                since = time.thread_time_ns()
                rows[name]()
                times[case][name].append((time.thread_time_ns() - since) / 1e3)
                if turn < CHECKED and (work.norm() < 0.99 * norm) != (case == "clips"):
                    raise RuntimeError(f"{name}, {case}: norm {norm} before, {work.norm():.4g} after.")
    return {case: {name: statistics.median(taken) for name, taken in of.items()} for case, of in times.items()}


def table_of(found: dict[str, dict[str, float]]) -> str:
    """A Markdown table that can also be read as it is."""
    lines = [("case", "row", "us", "x torch")]
    for case, medians in found.items():
        lines += [(case, name, f"{us:.1f}", f"{us / medians[BASELINE]:.2f}") for name, us in medians.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2], "-" * widths[3]))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print the table; the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=40, help="how many (default 40)")
    parser.add_argument("--size", type=int, default=64, help="rows and columns of each (default 64)")
    parser.add_argument("--rounds", type=int, default=1000, help="calls of each row in each case (default 1000)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(args.tensors, args.size, args.rounds)
    print(f"{args.tensors} tensors of {args.size} x {args.size}, float32, {args.rounds} rounds")
    print(table_of(found))
    return found


if __name__ == "__main__":
    main()
