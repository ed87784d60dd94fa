"""What clipping does to learning: small trainings that differ in how they clip, and in nothing else.

    python scripts/compare_strategies.py --out benchmarks
    python scripts/compare_strategies.py --task recurrent --optimizer momentum --clip none zclip none/zclip:max_norm=inf

The tasks are in tasks.py. Runs with the same seed begin with the same weights and see the same batches in the same
order, so that differences are taken pair by pair. Every way to clip gets every learning rate and is judged at its best
one. At the learning rate that is best without clipping the runs are repeated on broken data: in one kind a share of the
batches is noise, in the other the same share has a loss that is far too large. Rows are written as they come, and an
interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from benchmark import circumstances, hardware
from tasks import EVALUATED, TASKS, Batch, rows_of

from hf_gradclip import Clipper, optim
from hf_gradclip.clipper import NonFiniteError

NOTHING = "none"
CLIPS = (
    NOTHING,
    "global_norm:max_norm=1",
    "global_norm:max_norm=0.1",
    "zclip",
    "adagc:warmup_steps=50",
    "autoclip",
    "agc",
    "skip_step+zclip",
    "none/value:max_value=1",
    "none/block_rms",
    "zclip/block_rms",
)
RATES = {
    "adamw": (2.5e-4, 1e-3, 4e-3, 1.6e-2),
    "rmsprop": (1e-4, 4e-4, 1.6e-3, 6.4e-3),
    "momentum": (0.01, 0.04, 0.16, 0.64),
}
DATA = ("clean", "noise", "loud")
BROKEN = 0.05
LOUD = 100.0
RAMP = 0.05
UNBROKEN = 0.2
EVALUATED_AT_ONCE = 128


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: of tasks.TASKS.
        optimizer: of RATES.
        clip: how to clip the gradient, or gradient/update.
        lr: the highest learning rate, reached after a RAMP of the steps; a cosine to 0 follows.
        data: "clean", "noise" (of the batches after the first UNBROKEN of the run a share BROKEN is noise), or "loud"
            (the same share has LOUD times its loss).
        seed: of weights and batches.
        steps: of the optimizer.
    """

    task: str
    optimizer: str
    clip: str
    lr: float
    data: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Args:
        run: which.
        half: evaluation loss in the middle; None where it is not finite.
        end: the same at the end.
        clipped: share of the steps whose gradient was clipped.
        update_clipped: share of the steps whose update was.
        skipped: steps that were left out.
    """

    run: Run
    half: float | None
    end: float | None
    clipped: float
    update_clipped: float
    skipped: int


def places(clip: str) -> tuple[str, str]:
    """The spec for the gradient and the one for the update."""
    gradient, _, update = clip.partition("/")
    return gradient, update or NOTHING


def optimizer_of(run: Run, model: torch.nn.Module) -> optim.ClippedOptimizer:
    """The optimizer, clipping updates if the run does."""
    _, update = places(run.clip)
    named, spec = model.named_parameters(), None if update == NOTHING else update
    if run.optimizer == "adamw":
        return optim.AdamW(named, run.lr, weight_decay=0.1, update_clip=spec)
    if run.optimizer == "rmsprop":
        return optim.RMSprop(named, run.lr, update_clip=spec)
    return optim.SGD(named, run.lr, momentum=0.9, update_clip=spec)


def factor(step: int, steps: int) -> float:
    """Of the learning rate."""
    ramp = max(round(RAMP * steps), 1)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Batch) -> float | None:
    """Mean loss over the examples held out; None if it is not finite."""
    model.eval()
    parts = [rows_of(data, slice(i, i + EVALUATED_AT_ONCE)) for i in range(0, EVALUATED, EVALUATED_AT_ONCE)]
    loss = statistics.fmean(float(model(**part).loss) for part in parts)
    model.train()
    return loss if math.isfinite(loss) else None


def train(run: Run) -> Outcome:
    """Train, on one thread."""
    torch.set_num_threads(1)
    task, data = TASKS[run.task], TASKS[run.task].data()
    torch.manual_seed(run.seed)
    model = task.model().train()
    gradient, _ = places(run.clip)
    clipper = None if gradient == NOTHING else Clipper.for_model(model, gradient)
    optimizer = optimizer_of(run, model)
    drawn = torch.Generator().manual_seed(run.seed)
    half, end = None, None
    try:
        for step in range(run.steps):
            index = torch.randint(EVALUATED, len(data["labels"]), (task.batch_size,), generator=drawn)
            noise = task.noise(task.batch_size, drawn)
            broken = float(torch.rand((), generator=drawn)) < BROKEN and step >= UNBROKEN * run.steps
            loss = model(**(noise if broken and run.data == "noise" else rows_of(data, index))).loss
            (loss * LOUD if broken and run.data == "loud" else loss).backward()
            for group in optimizer.param_groups:
                group["lr"] = run.lr * factor(step, run.steps)
            if clipper is not None:
                clipper.step(loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 == run.steps // 2:
                half = evaluate(model, data)
        end = evaluate(model, data)
    except NonFiniteError as error:
        print(f"{run}: {error}", file=sys.stderr)
    summary = clipper.report.summary() if clipper is not None else {}
    update = optimizer.update_clipper.report.summary() if optimizer.update_clipper is not None else {}
    skipped = int(summary.get("skipped", 0) + update.get("skipped", 0))
    return Outcome(run, half, end, summary.get("rate", 0.0), update.get("rate", 0.0), skipped)


class Comparison:
    """Outcomes by run.

    Args:
        path: of the rows; those of the same commit count, others stay where they are. None keeps none.
        commit: of the code.
        workers: processes.
    """

    def __init__(self, path: Path | None, commit: str, workers: int) -> None:
        self.outcomes: dict[Run, Outcome] = {}
        self._path, self._commit, self._workers = path, commit, workers
        for line in path.read_text("utf-8").splitlines() if path is not None and path.exists() else []:
            row = json.loads(line)
            if row.pop("commit") == commit:
                run = Run(**row.pop("run"))
                self.outcomes[run] = Outcome(run, **row)

    def run(self, runs: Iterable[Run]) -> None:
        """Train what was not trained yet."""
        missing = [run for run in runs if run not in self.outcomes]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context) as pool:
            for i, done in enumerate(as_completed([pool.submit(train, run) for run in missing])):
                outcome = done.result()
                self.outcomes[outcome.run] = outcome
                if self._path is not None:
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"commit": self._commit, **asdict(outcome)}) + "\n")
                print(f"{i + 1} of {len(missing)}: {outcome}", file=sys.stderr)

    def ends(self, run: Run, seeds: Sequence[int]) -> list[float]:
        """The last evaluation losses of a run by seed, inf for one that is not finite."""
        found = (self.outcomes[replace(run, seed=seed)].end for seed in seeds)
        return [math.inf if end is None else end for end in found]

    def best(self, run: Run, seeds: Sequence[int], rates: Sequence[float]) -> Run:
        """The run at the learning rate with the lowest mean of the last evaluation losses."""
        return min((replace(run, lr=lr) for lr in rates), key=lambda r: statistics.fmean(self.ends(r, seeds)))


def paired(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean of the differences, and its standard error."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    if not all(map(math.isfinite, differences)):
        return f"diverged in {sum(not math.isfinite(d) for d in differences)} of {len(differences)}"
    mean = f"{statistics.fmean(differences):+.3f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}"


def number(values: Sequence[float]) -> str:
    """The mean, or a word."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if math.isfinite(mean) else "diverged"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def detail(found: Comparison, plain: Run, clips: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> str:
    """The table of one task and one optimizer.

    Args:
        found: all outcomes.
        plain: of the task and the optimizer, without clipping, on clean data.
        clips: the rows.
        rates: the columns.
        seeds: what is averaged over.
    """
    stock = found.best(plain, seeds, rates)
    rows = []
    for clip in clips:
        mine = replace(plain, clip=clip)
        best = found.best(mine, seeds, rates)
        outcomes = [found.outcomes[replace(best, seed=seed)] for seed in seeds]
        halves = [math.inf if outcome.half is None else outcome.half for outcome in outcomes]
        shares = [statistics.fmean(o.clipped for o in outcomes), statistics.fmean(o.update_clipped for o in outcomes)]
        same = replace(mine, lr=stock.lr)
        harm = [paired(found.ends(replace(same, data=d), seeds), found.ends(same, seeds)) for d in DATA[1:]]
        rows.append(
            [
                clip,
                *(number(found.ends(replace(mine, lr=lr), seeds)) for lr in rates),
                f"{best.lr:g}",
                number(halves),
                paired(found.ends(best, seeds), found.ends(stock, seeds)),
                " / ".join(f"{share:.0%}" for share in shares[: 1 + ("/" in clip)]),
                *harm,
            ]
        )
    head = ["clip", *(f"lr {lr:g}" for lr in rates), "best lr", "half-way", f"less {NOTHING}", "clipped", *DATA[1:]]
    return markdown(head, rows)


LEGEND = f"""\
- Losses are of evaluation, on examples held out, at the end of the run; a mean over the seeds.
- best lr: where that loss is lowest. half-way: the loss after half of the steps, there.
- less {NOTHING}: the loss at its best lr less that of `{NOTHING}` at its own best lr, seed by seed: mean and standard \
error. Below 0 is better than not to clip.
- clipped: share of the steps at the best lr; gradient / update.
- noise, loud: what broken data cost, at the learning rate that is best for `{NOTHING}` on clean data: the loss less \
that of the same run on clean data. noise: {BROKEN:.0%} of the batches after the first {UNBROKEN:.0%} of the run are \
random inputs with random labels. loud: the loss of as many batches is {LOUD:g} times too large."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), help="What to learn.")
    parser.add_argument("--optimizer", nargs="+", default=["adamw"], choices=list(RATES), help="With which optimizer.")
    parser.add_argument("--clip", nargs="+", default=list(CLIPS), help="Specs for the gradient, or gradient/update.")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each kind.")
    parser.add_argument("--steps", type=int, default=200, help="Of each run.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, each on one thread.")
    parser.add_argument("--out", type=Path, default=None, help="A folder for the rows and the Markdown file.")
    args = parser.parse_args(argv)
    args.argv = argv
    args.clip = list(dict.fromkeys([NOTHING, *args.clip]))  # which the others are compared with
    return args


def main(argv: Sequence[str] | None = None) -> str:
    """Train everything; the tables."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    cpu, seeds = torch.device("cpu"), range(args.seeds)
    facts = circumstances("compare_strategies", args.argv, cpu, "none: nothing is timed")
    stem = f"compare_{'-'.join(args.optimizer)}_{hardware(cpu)[1]}_{facts['date']}"
    path = None if args.out is None else args.out / f"{stem}.jsonl"
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    found = Comparison(path, facts["commit"], args.workers)
    plains = [Run(t, o, NOTHING, 0.0, "clean", 0, args.steps) for t, o in product(args.task, args.optimizer)]
    found.run(
        replace(plain, clip=clip, lr=lr, seed=seed)
        for seed, plain, clip in product(seeds, plains, args.clip)
        for lr in RATES[plain.optimizer]
    )
    best = {plain: found.best(plain, seeds, RATES[plain.optimizer]).lr for plain in plains}
    found.run(
        replace(plain, clip=clip, lr=best[plain], data=data, seed=seed)
        for seed, plain, clip, data in product(seeds, plains, args.clip, DATA[1:])
    )
    keep = ("hardware", "date", "command", "commit", "versions")
    lines = [f"- {key}: {facts[key]}" for key in keep[:-1]]
    lines.append("- versions: " + ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch")))
    parts = [f"# {stem}", "\n".join([*lines, f"- {args.seeds} seeds, {args.steps} steps each"]), LEGEND]
    for plain in plains:
        task, rates = TASKS[plain.task], RATES[plain.optimizer]
        parts += [f"## {task.name}, {plain.optimizer}: {task.what}", detail(found, plain, args.clip, rates, seeds)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out is not None:
        (args.out / f"{stem}.md").write_text(text, "utf-8")
    return text


if __name__ == "__main__":
    main()
