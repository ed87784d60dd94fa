"""What a step costs on the host where the work is done by a GPU, measured without one.

    python scripts/bench_host.py
    python scripts/bench_host.py --tensors 1000

The kernels in Triton are replaced by launches that do nothing, on tensors of the CPU, so that everything is timed but
the work: the checks, the tables, the judging, the counts. A launch itself costs about 5 us more each on a GPU.

- after the read: from the moment at which the norms are on the host to the last launch of the step. A GPU has nothing
  to do meanwhile. Judged by `adaptive_norm`.
- the step: all of it, beside torch's clip and fused AdamW on the same tensors, which do their work: they are so small
  that it costs nearly nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from benchmark import hardware
from torch import nn

from hf_gradclip import clipper, optim
from hf_gradclip.kernels import check, choice
from hf_gradclip.kernels.triton import step, whole

SHAPE = (4, 4)
ROUNDS = 200
SPEC = "adaptive_norm"
UPDATE = "block_rms:max_rms=0.5"


class Launches:
    """Stands in for a kernel: `kernel[grid](...)` takes the time. Where it measures, each number is that of `norm`."""

    last = 0.0
    norm = 1.0

    def __getitem__(self, grid: Any) -> Launches:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Do nothing, and note when."""
        Launches.last = time.thread_time()


class Finish(Launches):
    """The kernel that leaves the sums of squares where the host reads them."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Leave what `norm` says."""
        arguments[3].fill_(Launches.norm**2)
        arguments[4].fill_(Launches.norm)
        super().__call__()


@contextmanager
def stubbed() -> Iterator[list[float]]:
    """Triton serves the CPU and does nothing; gives the times at which norms reached the host."""
    read: list[float] = []

    def brought(*given: Any) -> Any:
        found = real(*given)
        read.append(time.thread_time())
        return found

    real = vars(clipper)["brought"]
    with ExitStack() as stack:
        for owner, name, stub in (
            (whole, "_measure", Launches()),
            (whole, "_scale_and_clamp", Launches()),
            (whole, "finish", Finish()),
            (step, "finish", Finish()),
            (step, "_step", Launches()),
            (check, "check", lambda *_: None),
            (choice, "language_of", lambda _: choice.triton_language()),
            (clipper, "brought", brought),
        ):
            stack.enter_context(mock.patch.object(owner, name, stub))
        yield read


def parameters(tensors: int) -> list[nn.Parameter]:
    """Small ones with gradients."""
    found = [nn.Parameter(torch.randn(SHAPE)) for _ in range(tensors)]
    for p in found:
        p.grad = torch.randn(SHAPE)
    return found


def after_the_read(tensors: int, update: str | None, clips: bool) -> float:
    """Median milliseconds from the first read to the last launch."""
    with stubbed() as read:
        optimizer = optim.AdamW(parameters(tensors), lr=1e-9, clip=SPEC, update_clip=update)
        times = []
        for i in range(ROUNDS):
            read.clear()
            Launches.norm = 100.0 if clips and i >= 20 and i % 8 == 0 else 1.0
            optimizer.step()
            if i >= 20 and (not clips or i % 8 == 0):
                times.append(1e3 * (Launches.last - read[0]))
    return statistics.median(times)


def whole_steps(tensors: int) -> tuple[float, float]:
    """Median milliseconds of a step of ours without its work, and of torch's with it, in turns."""
    ours = optim.AdamW(parameters(tensors), lr=1e-9, clip=SPEC)
    params = parameters(tensors)
    torchs = torch.optim.AdamW(params, lr=1e-9, fused=True)
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(ROUNDS):
        with stubbed():
            mine.append(timed(ours.step))
        theirs.append(timed(lambda: (nn.utils.clip_grad_norm_(params, 1.0, foreach=True), torchs.step())))
    return statistics.median(mine[20:]), statistics.median(theirs[20:])


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of this thread."""
    begun = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - begun)


def main(argv: Sequence[str] | None = None) -> str:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[200, 400], help="Parameters.")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = [
        f"{hardware(torch.device('cpu'))[0]}, milliseconds of the host",
        "",
        "| tensors | after the read | and it clips ",
    ]
    lines[-1] += "| with an update clip | the step | torch's clip and fused AdamW |"
    lines.append("|---" * 6 + "|")
    for tensors in options.tensors:
        kinds = ((None, False), (None, True), (UPDATE, True))
        found = [after_the_read(tensors, update, clips) for update, clips in kinds]
        lines.append(f"| {tensors} | " + " | ".join(f"{t:.2f}" for t in (*found, *whole_steps(tensors))) + " |")
    text = "\n".join(lines)
    print(text)
    return text


if __name__ == "__main__":
    main()
