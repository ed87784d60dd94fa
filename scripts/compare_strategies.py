"""What clipping does to learning: trainings that differ in how they clip, and in nothing else.

    python scripts/compare_strategies.py --out benchmarks
    python scripts/compare_strategies.py --task recurrent --optimizer momentum --clip adaptive none/zclip

The tasks are in tasks.py. Runs with the same seed begin with the same weights and see the same batches in the same
order, so that differences are taken pair by pair. The learning rate is the one that is best without clipping on seeds
of its own, which are not judged. Broken data is broken in the same steps for all runs of a seed. Where a run clips, the
guard against NaN and inf comes with it.

Before it starts, the script says how long it will take. Rows are written as they come, one line of JSON per run under a
key of everything that decides its result (the strategy's fields and its source, the task's source, data and settings),
so that an interrupted comparison goes on where it was, and a change elsewhere discards nothing.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType

import tasks
import torch
from benchmark import circumstances, hardware
from tasks import TASKS, Batch, Task, rows_of

from hf_gradclip import Clipper, budgets, optim, outlier
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.config import ClipConfig
from hf_gradclip.spec import read_strategy
from hf_gradclip.strategy import describe, parts_of

NOTHING = "none"
STOCK = "global_norm:max_norm=1"
CLIPS = (NOTHING, STOCK, "zclip", "agc", "adaptive_norm", "adaptive")
RATES = {
    "adamw": tuple(1e-3 * 2**i for i in range(-1, 6)),
    "rmsprop": tuple(1e-3 * 2**i for i in range(-3, 4)),
    "momentum": tuple(0.01 * 2**i for i in range(7)),
}
DATA = ("sound", "loud", "tensor", "noise", "one")
BETAS = (0.9, 0.99)
BROKEN = 0.05
LOUD = 100.0
TENSOR = 1000.0
ONE = 10_000.0
RAMP = 0.05
UNBROKEN = 0.15
RATE_SEEDS = (1000, 1001)
MEANS = 20
EVALUATED_AT_ONCE = 128
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: of tasks.TASKS.
        optimizer: of RATES.
        clip: how to clip the gradient, or gradient/update.
        lr: the highest learning rate, reached after a RAMP of the steps; a cosine to 0 follows.
        data: "sound", or what is wrong with so many batches as are BROKEN of the run, none of them in its first
            UNBROKEN: "loud" (LOUD times their loss), "tensor" (one tensor's gradient is TENSOR times too large, each
            time another one's), "noise" (random inputs and labels), "one" (the gradient of the first parameter, an
            embedding or the first layer, is ONE times too large).
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
        end: the same at the end; None where it is not finite.
        losses: of the batches, MEANS means over as many stretches of the run.
        clipped: share of the steps whose gradient was clipped.
        update_clipped: share of the steps whose update was.
        skipped: steps that were left out.
    """

    run: Run
    start: float | None
    end: float | None
    losses: list[float]
    clipped: float
    update_clipped: float
    skipped: int


def places(clip: str) -> tuple[str, str]:
    """The spec for the gradient and the one for the update; no path can be in either."""
    gradient, _, update = clip.partition("/")
    return gradient, update or NOTHING


def key_of(run: Run) -> str:
    """Of everything that decides what a run comes to."""
    code, specs = [code_of(tasks), f"{BETAS} {BROKEN} {LOUD} {TENSOR} {RAMP} {UNBROKEN}"], []
    for spec in places(run.clip):
        strategy = read_strategy(spec)
        specs.append(describe(strategy))
        modules = [sys.modules[type(part).__module__] for part in parts_of(strategy)]
        code += [code_of(module) for module in modules]
        code += [code_of(budgets)] * isinstance(strategy, budgets.Budgets)
        code += [code_of(outlier)] * any("outlier" in inspect.getsource(module) for module in modules)
    specs += [f"{ONE}"] * (run.data == "one")
    text = json.dumps([asdict(replace(run, clip="/".join(specs))), code])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_of(module: ModuleType) -> str:
    """The source of a module without comments and docstrings."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        for name, lines in ast.iter_fields(node):
            if name == "body" and isinstance(lines, list):
                lines[:] = [line for line in lines if not _is_docstring(line)]
    return ast.dump(tree)


def _is_docstring(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def optimizer_of(run: Run, model: torch.nn.Module) -> optim.ClippedOptimizer:
    """The optimizer, clipping updates if the run does."""
    _, update = places(run.clip)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spec = None if update == NOTHING else update
    if run.optimizer == "adamw":
        return optim.AdamW(named, run.lr, betas=BETAS, weight_decay=0.1, update_clip=spec)
    if run.optimizer == "rmsprop":
        return optim.RMSprop(named, run.lr, update_clip=spec)
    return optim.SGD(named, run.lr, momentum=0.9, update_clip=spec)


def factor(step: int, steps: int) -> float:
    """Of the learning rate."""
    ramp = max(round(RAMP * steps), 1)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, data: Batch) -> float | None:
    """Mean loss over the examples held out; None if it is not finite."""
    model.eval()
    size = min(EVALUATED_AT_ONCE, task.evaluated)
    parts = [rows_of(data, slice(i, i + size)) for i in range(0, task.evaluated, size)]
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient, _ = places(run.clip)
    clipper = None if gradient == NOTHING else Clipper.for_model(model, gradient)
    optimizer = optimizer_of(run, model)
    drawn, broken = torch.Generator().manual_seed(run.seed), broken_steps(run)
    start, end = evaluate(model, task, data), None
    losses: list[float] = []
    try:
        for step in range(run.steps):
            index = torch.randint(task.evaluated, len(data["labels"]), (task.batch_size,), generator=drawn)
            noise = task.noise(task.batch_size, drawn)
            which = int(torch.randint(len(parameters), (), generator=drawn))
            loss = model(**(noise if run.data == "noise" and step in broken else rows_of(data, index))).loss
            losses.append(float(loss.detach()))
            (loss * LOUD if run.data == "loud" and step in broken else loss).backward()
            if run.data == "tensor" and step in broken and (spike := parameters[which].grad) is not None:
                spike.mul_(TENSOR)
            if run.data == "one" and step in broken and (spike := parameters[0].grad) is not None:
                spike.mul_(ONE)
            for group in optimizer.param_groups:
                group["lr"] = run.lr * factor(step, run.steps)
            if clipper is not None:
                clipper.step(loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        end = evaluate(model, task, data)
    except NonFiniteError as error:
        print(f"{run}: {error}", file=sys.stderr)
    summary = clipper.report.summary() if clipper is not None else {}
    update = optimizer.update_clipper.report.summary() if optimizer.update_clipper is not None else {}
    skipped = int(summary.get("skipped", 0) + update.get("skipped", 0))
    means = [round(statistics.fmean(part), 4) for part in stretches(losses) if part]
    return Outcome(run, start, end, means, summary.get("rate", 0.0), update.get("rate", 0.0), skipped)


def stretches(losses: Sequence[float]) -> list[Sequence[float]]:
    """A run in MEANS parts, the last of which may be shorter."""
    size = max(math.ceil(len(losses) / MEANS), 1)
    return [losses[i : i + size] for i in range(0, len(losses), size)]


class Comparison:
    """Outcomes by run.

    Args:
        path: of the rows; None keeps none.
        commit: of the code, for who reads the rows.
        workers: processes; 1 trains in this one.
    """

    def __init__(self, path: Path | None, commit: str, workers: int) -> None:
        self.outcomes: dict[Run, Outcome] = {}
        self._path, self._commit, self._workers = path, commit, workers
        *whole, rest = path.read_text("utf-8").split("\n") if path is not None and path.exists() else [""]
        self._rows = {row["key"]: row for row in map(json.loads, whole)}
        if path is not None and rest:
            path.write_text("".join(f"{line}\n" for line in whole), "utf-8")  # without what an interruption left

    def run(self, runs: Iterable[Run]) -> None:
        """Train what was not trained yet, and say before how long that will take."""
        missing = []
        for run in dict.fromkeys(runs):
            row = self._rows.get(key_of(run))
            if row is None:
                missing.append(run)
            else:
                self.outcomes[run] = Outcome(run, *(row[field] for field in list(Outcome.__annotations__)[1:]))
        if not missing:
            return
        seconds = seconds_of({(run.task, run.steps) for run in missing})
        hours = sum(seconds[run.task, run.steps] for run in missing) / 3600
        print(f"{len(missing)} runs, about {hours:.1f} core-hours", file=sys.stderr, flush=True)
        if self._workers == 1:
            self._keep_all(map(train, missing), len(missing))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context) as pool:
            try:
                done = as_completed([pool.submit(train, run) for run in missing])
                self._keep_all((one.result() for one in done), len(missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _keep_all(self, outcomes: Iterable[Outcome], total: int) -> None:
        for i, outcome in enumerate(outcomes):
            self._keep(outcome)
            print(f"{i + 1} of {total}: {outcome}", file=sys.stderr)

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.run] = outcome
        if self._path is not None:
            row = {"key": key_of(outcome.run), "commit": self._commit, **asdict(outcome)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def ends(self, run: Run, seeds: Sequence[int]) -> list[float]:
        """The last evaluation losses of a run by seed; inf for one that is not below the loss before training."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        pairs = [(outcome.end, outcome.start) for outcome in found]
        return [math.inf if end is None or start is None or end > start else end for end, start in pairs]

    def clipped(self, run: Run, seeds: Sequence[int]) -> str:
        """The mean share of its steps that were clipped; gradient / update."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        shares = [statistics.fmean(o.clipped for o in found), statistics.fmean(o.update_clipped for o in found)]
        return " / ".join(f"{share:.1%}" for share in shares[: 1 + ("/" in run.clip)])

    def best(self, run: Run, seeds: Sequence[int], rates: Sequence[float]) -> float:
        """The learning rate with the lowest mean of the last evaluation losses."""
        return min(rates, key=lambda lr: statistics.fmean(self.ends(replace(run, lr=lr), seeds)))


def seconds_of(kinds: Iterable[tuple[str, int]]) -> dict[tuple[str, int], float]:
    """About how long a run of a task of so many steps takes on one thread here, from three steps of each."""
    found = {}
    for name, steps in kinds:
        task, data = TASKS[name], TASKS[name].data()
        model = task.model().train()
        begun = time.perf_counter()
        for _ in range(3):
            model(**rows_of(data, slice(task.batch_size))).loss.backward()
        examples = steps * task.batch_size + task.evaluated  # two evaluations take a third of a step's time each
        found[name, steps] = (time.perf_counter() - begun) / (3 * task.batch_size) * examples
    return found


def paired(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean of the differences and its 95 % interval; or which of the two learnt nothing."""
    for whose, ends in (("", mine), ("the other: ", theirs)):
        if lost := sum(map(math.isinf, ends)):
            return f"{whose}no better than at the start in {lost} of {len(ends)}"
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f}"
    reach = T95[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]"


def number(values: Sequence[float]) -> str:
    """The mean, or a dash where one of them learnt nothing."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if math.isfinite(mean) else "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def detail(
    found: Comparison,
    plain: Run,
    clips: Sequence[str],
    data: Sequence[str],
    seeds: Sequence[int],
    others: Sequence[str] = (STOCK,),
) -> str:
    """The table of one task and one optimizer.

    Args:
        found: all outcomes.
        plain: of the task, the optimizer and the learning rate, without clipping, on sound data.
        clips: the rows.
        data: the columns; "sound" first.
        seeds: what is averaged over.
        others: of the rows, those that all are compared with, beside `none`.
    """
    against = [clip for clip in (NOTHING, *others) if clip in clips]
    rows = []
    for clip in clips:
        mine = replace(plain, clip=clip)
        sound = found.ends(mine, seeds)
        row = [f"`{clip}`", number(sound), found.clipped(mine, seeds)]
        row += ["" if clip == c else paired(sound, found.ends(replace(plain, clip=c), seeds)) for c in against]
        for kind in data[1:]:
            broken = replace(mine, data=kind)
            ends = found.ends(broken, seeds)
            row += [number(ends), paired(ends, sound), found.clipped(broken, seeds)]
            theirs = [found.ends(replace(broken, clip=c), seeds) for c in against[1:]]
            row += ["" if clip == c else paired(ends, end) for c, end in zip(against[1:], theirs, strict=True)]
        rows.append(row)
    head = ["clip", "sound", "clipped", *(f"less `{c}`" for c in against)]
    for kind in data[1:]:
        head += [kind, "less its own sound", "clipped", *(f"less `{c}`, {kind}" for c in against[1:])]
    return markdown(head, rows)


LEGEND = f"""\
- Losses are of evaluation, on examples held out, at the end of the run: a mean over the seeds, or a dash where a run \
ends no better than it began.
- less ...: the difference of the losses, seed by seed: mean and 95 % interval (Student's t). Below 0 is better.
- The learning rate is the one that is best for `{NOTHING}` on sound data, on the seeds {RATE_SEEDS}, which are not \
judged; or the task's own.
- Of broken data so many batches as are {BROKEN:.0%} of the run are broken, after its first {UNBROKEN:.0%}. loud: \
their loss is {LOUD:g} times too large. tensor: the gradient of one tensor is {TENSOR:g} times too large. noise: \
random inputs with random labels. one: the gradient of the first parameter is {ONE:g} times too large.
- clipped: share of the steps; gradient / update. AdamW has betas {BETAS} and weight decay 0.1."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = [name for name, task in TASKS.items() if task.lr is None]
    parser.add_argument("--task", nargs="+", default=small, choices=list(TASKS), help="What to learn.")
    parser.add_argument("--optimizer", default="adamw", choices=list(RATES), help="With which optimizer.")
    parser.add_argument("--clip", nargs="+", default=list(CLIPS), help="Specs for the gradient, or gradient/update.")
    parser.add_argument("--against", nargs="+", default=[STOCK], help="Specs of these that all are compared with.")
    parser.add_argument("--data", nargs="+", default=list(DATA[:3]), choices=DATA, help="Sound data comes with any.")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(T95) + 2), help="Runs of each kind.")
    parser.add_argument("--steps", type=int, default=200, help="Of each run.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, each on one thread; 1 is this one.")
    parser.add_argument("--name", default=None, help="Of the files; the optimizer without it.")
    parser.add_argument("--out", type=Path, default=None, help="A folder for the rows and the Markdown file.")
    args = parser.parse_args(argv)
    args.argv = argv
    args.clip = list(dict.fromkeys([NOTHING, *args.clip]))  # which the others are compared with
    args.data = list(dict.fromkeys([DATA[0], *args.data]))
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
    name = f"compare_{args.name or args.optimizer}_{hardware(cpu)[1]}"
    path = None if args.out is None else args.out / f"{name}.jsonl"
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    found = Comparison(path, facts["commit"], args.workers)
    fixed = {task: TASKS[task].lr for task in args.task if args.optimizer == "adamw"}
    plains = [Run(task, args.optimizer, NOTHING, fixed.get(task) or 0.0, "sound", 0, args.steps) for task in args.task]
    rates = RATES[args.optimizer]
    open_ = [plain for plain in plains if not plain.lr]
    found.run(replace(plain, lr=lr, seed=seed) for plain, seed, lr in product(open_, RATE_SEEDS, rates))
    best = {plain.task: found.best(plain, RATE_SEEDS, rates) for plain in open_}
    plains = [replace(plain, lr=best.get(plain.task, plain.lr)) for plain in plains]
    found.run(
        replace(plain, clip=clip, data=data, seed=seed)
        for seed, plain, data, clip in product(seeds, plains, args.data, args.clip)
    )
    lines = [f"- {key}: {facts[key]}" for key in ("hardware", "date", "command", "commit")]
    lines.append("- versions: " + ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch")))
    parts = [f"# {name}", "\n".join([*lines, f"- {args.seeds} seeds, {args.steps} steps each"]), LEGEND]
    for plain in plains:
        task = TASKS[plain.task]
        edge = " (edge: none beyond it was tried)" * (plain.task in best and plain.lr in (min(rates), max(rates)))
        start = statistics.fmean(found.outcomes[replace(plain, seed=s)].start or math.nan for s in seeds)
        title = f"## {task.name}, {plain.optimizer}: {task.what}; {start:.3f} at the start, lr {plain.lr:g}{edge}"
        parts += [title, detail(found, plain, args.clip, args.data, seeds, args.against)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out is not None:
        (args.out / f"{name}.md").write_text(text, "utf-8")
    return text


if __name__ == "__main__":
    main()
