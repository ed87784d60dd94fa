"""How many launches a step makes on a GPU, counted without one.

    python scripts/count_launches.py
    python scripts/count_launches.py --show zclip adagc

The tensors say that they are on a GPU and are on the CPU; see pretend_gpu.py, which also says what counts as a launch.
A row is a clipper or an optimizer that has seen enough steps: one step in which nothing clips and one in which all
tensors do. `reads` are copies to the host, for which a step waits.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pretend_gpu import Gpu
from torch import nn

from hf_gradclip import Clipper, optim
from hf_gradclip.record.buffer import Recorder

TENSORS = 400
SHAPE = (8, 16)
TALL = (64, 16)  # with 400 tensors more rows than are judged on the host
QUIET, LOUD = 1.0, 100.0  # the norm of every gradient; that of every weight is 1
COLUMNS = ("step", "nothing clips", "clips", "reads")
SPECS = {
    "none": "none",
    "global_norm": "global_norm:max_norm={limit}",
    "zclip": "zclip:warmup_steps=2,max_norm=inf",
    "adaptive_norm": "adaptive_norm",
    "value": "value:max_value=2",
    "adagc": "adagc:warmup_steps=2,max_norm=inf",
    "agc": "agc:clip_factor=2",
    "adaptive": "adaptive_norm+agc:clip_factor=2",
}
UPDATE = f"block_rms:max_rms={2 / math.sqrt(math.prod(SHAPE))}"


@dataclass(frozen=True)
class Count:
    """Launches of a step by what they are, copies to the host among them, and whether something was clipped."""

    launches: Counter[str]
    reads: int
    clipped: bool

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


Step = Callable[[], Any]
Made = tuple[Step, list[Clipper]]
"""A step, and the clippers that say what it did."""


def clipping(params: nn.ParameterList, spec: str, record: bool = False, nonfinite: str = "skip") -> Made:
    """`Clipper.step()` alone."""
    clipper = Clipper.for_model(nn.ModuleList([params]), spec, nonfinite=nonfinite)
    if record:
        clipper.recorder = Recorder()
    return clipper.step, [clipper]


def stepping(params: nn.ParameterList, clip: Any, update: Any = None, groups: int = 1, sync: bool = True) -> Made:
    """The step of our AdamW, which clips as it reads."""
    clip = clip if sync else {"gradient": clip, "skip_sync": False}
    rows = list(params)
    size = -(-len(rows) // groups)
    made = optim.AdamW(
        [{"params": rows[i : i + size]} for i in range(0, len(rows), size)], lr=1e-6, clip=clip, update_clip=update
    )
    return made.step, [c for c in (made.clipper, made.update_clipper) if c is not None]


def rows_of(tensors: int) -> Iterator[tuple[str, Callable[[nn.ParameterList], Made]]]:
    """The name of every row, and what makes its step."""
    specs = {name: spec.format(limit=2 * QUIET * math.sqrt(tensors)) for name, spec in SPECS.items()}
    for name, spec in specs.items():
        yield name, partial(clipping, spec=spec)
        yield f"{name}, record", partial(clipping, spec=spec, record=True)
        yield f"{name}, nonfinite=pass", partial(clipping, spec=spec, nonfinite="pass")
    zclip = specs["zclip"]
    yield "AdamW clip=None", partial(stepping, clip=None)
    yield "AdamW clip=global_norm", partial(stepping, clip=specs["global_norm"])
    yield "AdamW clip=zclip", partial(stepping, clip=zclip)
    yield "AdamW clip=global_norm, skip_sync=False", partial(stepping, clip=specs["global_norm"], sync=False)
    yield "AdamW clip=zclip, two groups", partial(stepping, clip=zclip, groups=2)
    yield "AdamW clip=zclip, update_clip", partial(stepping, clip=zclip, update=UPDATE)
    yield "AdamW clip=zclip, update_clip, two groups", partial(stepping, clip=zclip, update=UPDATE, groups=2)


def counts(
    make: Callable[[nn.ParameterList], Made], tensors: int, shape: tuple[int, int] = SHAPE
) -> tuple[Count, Count]:
    """A step in which nothing clips, and one in which everything does, of what has seen both before."""
    with Gpu() as gpu:
        params = nn.ParameterList([nn.Parameter(gpu.weight(shape)) for _ in range(tensors)])
        for param in params:
            param.grad = gpu.gradient(shape)
        grads = [param.grad for param in params]
        step, clippers = make(params)

        def run(norm: float) -> Count:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            gpu.norm = norm
            before = [clipper.report.summary()["clipped"] for clipper in clippers]
            gpu.forget()
            step()
            launches, reads = Counter(gpu.launches), gpu.reads
            after = [clipper.report.summary()["clipped"] for clipper in clippers]
            return Count(launches, reads, after != before)

        for norm in (*[QUIET] * 6, LOUD, *[QUIET] * 2):
            run(norm)
        return run(QUIET), run(LOUD)


def table_of(found: dict[str, tuple[Count, Count]]) -> str:
    """The rows in Markdown; "-" where no step clips."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, (quiet, loud) in found.items():
        reads = sorted({quiet.reads, loud.reads} if loud.clipped else {quiet.reads})
        cells = (name, str(quiet.total), str(loud.total) if loud.clipped else "-", " or ".join(map(str, reads)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[Count, Count]]:
    """Count and print; the counts by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=TENSORS, help="Gradients.")
    parser.add_argument("--only", nargs="+", default=None, help="Rows; all by default.")
    parser.add_argument("--show", nargs="+", default=[], help="Rows of which every launch is named.")
    options = parser.parse_args(argv)
    rows = {name: make for name, make in rows_of(options.tensors) if options.only is None or name in options.only}
    found = {name: counts(make, options.tensors) for name, make in rows.items()}
    for name in ("agc, record", "adaptive", "adaptive, record"):
        if options.only is None or name in options.only:
            found[f"{name}, {TALL[0] * options.tensors} rows"] = counts(rows[name], options.tensors, TALL)
    print(f"Launches per step, {options.tensors} tensors\n\n{table_of(found)}")
    for name in options.show:
        for what, count in zip(COLUMNS[1:], found[name], strict=False):
            print(f"\n{name}, {what}: {count.total}")
            print("\n".join(f"  {number:4d}  {launch}" for launch, number in count.launches.most_common()))
    return found


if __name__ == "__main__":
    main()
