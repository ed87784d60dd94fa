"""What clipping does to learning: small trainings that differ in how they clip, and in nothing else.

    python scripts/compare_strategies.py --out benchmarks
    python scripts/compare_strategies.py --task recurrent --optimizer momentum --clip none zclip none/zclip:max_norm=inf

The tasks are in tasks.py. Runs with the same seed begin with the same weights and see the same batches in the same
order, so that differences are taken pair by pair. Every way to clip gets every learning rate and is judged at its best
one. At the learning rate that is best without clipping the runs are repeated on broken data: in one kind a share of the
batches is noise, in the other the same share has a loss that is far too large. Where a run clips, the guard against NaN
and inf comes with it. Rows are written as they come, and an interrupted comparison goes on where it was.
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
from hf_gradclip.config import ClipConfig

NOTHING = "none"
CLIPS = (
    NOTHING,
    "global_norm:max_norm=1",
    "zclip",
    "adagc:warmup_steps=50",
    "autoclip",
    "agc",
)
RATES = {
    "adamw": tuple(1e-3 * 2**i for i in range(-1, 6)),
    "rmsprop": tuple(1e-3 * 2**i for i in range(-3, 4)),
    "momentum": tuple(0.01 * 2**i for i in range(7)),
}
DATA = ("clean", "noise", "loud")
BROKEN = 0.05
LOUD = 100.0
RAMP = 0.05
UNBROKEN = 0.35  # longer than the warm-ups of CLIPS
EVALUATED_AT_ONCE = 128


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: of tasks.TASKS.
        optimizer: of RATES.
        clip: how to clip the gradient, or gradient/update.
        lr: the highest learning rate, reached after a RAMP of the steps; a cosine to 0 follows.
        data: "clean", "noise" (so many batches as are BROKEN of the run are noise, none of them in its first UNBROKEN),
            or "loud" (the same batches have LOUD times their loss).
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
        start: evaluation loss before the first step.
        half: the same in the middle; None where it is not finite.
        end: the same at the end.
        clipped: share of the steps whose gradient was clipped.
        update_clipped: share of the steps whose update was.
        skipped: steps that were left out.
    """

    run: Run
    start: float | None
    half: float | None
    end: float | None
    clipped: float
    update_clipped: float
    skipped: int


def places(clip: str) -> tuple[str, str]:
    """The spec for the gradient and the one for the update; no path can be in either."""
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


def broken_steps(run: Run) -> set[int]:
    """Where its data is broken: the same for all runs of a seed and a length."""
    first = math.ceil(UNBROKEN * run.steps)
    order = torch.randperm(run.steps - first, generator=torch.Generator().manual_seed(run.seed))
    return {first + place for place in order[: round(BROKEN * run.steps)].tolist()}


def train(run: Run) -> Outcome:
    """Train, on one thread."""
    torch.set_num_threads(1)
    task, data = TASKS[run.task], TASKS[run.task].data()
    torch.manual_seed(run.seed)
    model = task.model().train()
    gradient, _ = places(run.clip)
    clipper = None if gradient == NOTHING else Clipper.for_model(model, gradient)
    optimizer = optimizer_of(run, model)
    drawn, broken = torch.Generator().manual_seed(run.seed), broken_steps(run)
    start, half, end = evaluate(model, data), None, None
    try:
        for step in range(run.steps):
            index = torch.randint(EVALUATED, len(data["labels"]), (task.batch_size,), generator=drawn)
            noise = task.noise(task.batch_size, drawn)
            loss = model(**(noise if run.data == "noise" and step in broken else rows_of(data, index))).loss
            if run.data == "loud" and step in broken:
                loss = loss * LOUD
            loss.backward()
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
    return Outcome(run, start, half, end, summary.get("rate", 0.0), update.get("rate", 0.0), skipped)


class Comparison:
    """Outcomes by run.

    Args:
        path: of the rows; those of the same commit count, others stay where they are. None keeps none.
        commit: of the code; rows of one that is not committed are not used again.
        workers: processes.
    """

    def __init__(self, path: Path | None, commit: str, workers: int) -> None:
        self.outcomes: dict[Run, Outcome] = {}
        self._path, self._commit, self._workers = path, commit, workers
        *whole, _ = path.read_text("utf-8").split("\n") if path is not None and path.exists() else [""]
        for row in map(json.loads, whole):
            if row.pop("commit") == commit and not commit.endswith(("dirty", "unknown")):
                run = Run(**row.pop("run"))
                self.outcomes[run] = Outcome(run, **row)
        if path is not None:
            path.write_text("".join(f"{line}\n" for line in whole), "utf-8")  # without what an interruption left

    def run(self, runs: Iterable[Run]) -> None:
        """Train what was not trained yet."""
        missing = [run for run in runs if run not in self.outcomes]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context) as pool:
            try:
                for i, done in enumerate(as_completed([pool.submit(train, run) for run in missing])):
                    self._keep(done.result())
                    print(f"{i + 1} of {len(missing)}: {done.result()}", file=sys.stderr)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.run] = outcome
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"commit": self._commit, **asdict(outcome)}) + "\n")

    def ends(self, run: Run, seeds: Sequence[int], when: str = "end") -> list[float]:
        """The last evaluation losses of a run by seed; inf for one that is not below the loss before training."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        pairs = [(getattr(outcome, when), outcome.start) for outcome in found]
        return [math.inf if end is None or start is None or end > start else end for end, start in pairs]

    def best(self, run: Run, seeds: Sequence[int], rates: Sequence[float]) -> Run:
        """The run at the learning rate with the lowest mean of the last evaluation losses."""
        return min((replace(run, lr=lr) for lr in rates), key=lambda r: statistics.fmean(self.ends(r, seeds)))


def paired(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean of the differences, and its standard error; or which of the two learnt nothing."""
    for whose, ends in (("", mine), (f"{NOTHING}: ", theirs)):
        if lost := sum(map(math.isinf, ends)):
            return f"{whose}no better than at the start in {lost} of {len(ends)}"
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = f"{statistics.fmean(differences):+.3f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}"


def number(values: Sequence[float]) -> str:
    """The mean, or a dash where one of them learnt nothing."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if math.isfinite(mean) else "-"


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
        shares = [statistics.fmean(o.clipped for o in outcomes), statistics.fmean(o.update_clipped for o in outcomes)]
        broken = [(replace(stock, clip=clip, data=data), replace(stock, data=data)) for data in DATA[1:]]
        rows.append(
            [
                clip,
                *(number(found.ends(replace(mine, lr=lr), seeds)) for lr in rates),
                f"{best.lr:g}" + " (edge)" * (best.lr in (min(rates), max(rates))),
                number(found.ends(best, seeds, "half")),
                paired(found.ends(best, seeds), found.ends(stock, seeds)),
                " / ".join(f"{share:.0%}" for share in shares[: 1 + ("/" in clip)]),
                *(paired(found.ends(one, seeds), found.ends(other, seeds)) for one, other in broken),
            ]
        )
        if clip == NOTHING:
            rows[-1][-2:] = [number(found.ends(one, seeds)) for one, _ in broken]
    head = ["clip", *(f"lr {lr:g}" for lr in rates), "best lr", "half-way", f"less {NOTHING}", "clipped", *DATA[1:]]
    return markdown(head, rows)


LEGEND = f"""\
- Losses are of evaluation, on examples held out, at the end of the run: a mean over the seeds, or a dash where a run \
ends no better than it began.
- best lr: where that loss is lowest; chosen on these seeds and examples. (edge): none beyond it was tried.
- half-way: the loss after half of the steps, there.
- less {NOTHING}: the loss at its best lr less that of `{NOTHING}` at its own best lr, seed by seed: mean and standard \
error. Below 0 is better than not to clip.
- clipped: share of the steps at the best lr; gradient / update.
- noise, loud: on broken data, at the learning rate that is best for `{NOTHING}` on clean data: its loss, and that of \
the others less it. noise: as many batches as are {BROKEN:.0%} of the run, after the first {UNBROKEN:.0%}, are random \
inputs with random labels. loud: the loss of the same batches is {LOUD:g} times too large."""


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
    for clip in args.clip:
        gradient, update = places(clip)
        ClipConfig.parse(gradient, update=update)  # a word that is not known is refused now
    return args


def main(argv: Sequence[str] | None = None) -> str:
    """Train everything; the tables."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    cpu, seeds = torch.device("cpu"), range(args.seeds)
    facts = circumstances("compare_strategies", args.argv, cpu, "none: nothing is timed")
    name = f"compare_{'-'.join(args.optimizer)}_{hardware(cpu)[1]}"
    path = None if args.out is None else args.out / f"{name}.jsonl"
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
    lines = [f"- {key}: {facts[key]}" for key in ("hardware", "date", "command", "commit")]
    lines.append("- versions: " + ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch")))
    parts = [f"# {name}", "\n".join([*lines, f"- {args.seeds} seeds, {args.steps} steps each"]), LEGEND]
    for plain in plains:
        task, rates = TASKS[plain.task], RATES[plain.optimizer]
        start = statistics.fmean(found.outcomes[replace(plain, lr=rates[0], seed=s)].start or math.nan for s in seeds)
        title = f"## {task.name}, {plain.optimizer}: {task.what}; {start:.3f} at the start"
        parts += [title, detail(found, plain, args.clip, rates, seeds)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out is not None:
        (args.out / f"{name}.md").write_text(text, "utf-8")
    return text


if __name__ == "__main__":
    main()
