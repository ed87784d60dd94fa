"""What clipping does to learning: trainings that differ in how they clip, and in nothing else.

    python scripts/compare_strategies.py --out benchmarks
    python scripts/compare_strategies.py --task recurrent --optimizer momentum --clip adaptive none/zclip
    python scripts/compare_strategies.py --task decoder --clip adaptive --lr 0.004 --seeds 2 --steps 20     in a minute

The tasks are in compare_parts. Runs with the same seed begin with the same weights and see the same batches in the same
order, so that differences are taken pair by pair. The learning rate is the one that is best without clipping, or with
--own_rates the one that is best with each clip, on seeds of its own, which are not judged; while that is the highest or
the lowest of those tried, one beyond it is tried, four times at most. Broken data is broken in the same steps for all
runs of a seed. Where a run clips, the guard against NaN and inf comes with it.

Before it starts, the script says how long it will take. Rows are written as they come, one line of JSON per run under a
key of what it compares (the strategy's fields and its source, the task's source, data and settings), so that an
interrupted comparison goes on where it was, and a change elsewhere discards nothing. What trains all alike is not in
the key: compare_parts/training.py, the rest of the package (how gradients are found, measured and scaled, how parts are
chained, its optimizers), Python, whose library several tasks learn, torch, transformers, tokenizers, peft and the
packages of weights. After a change there begin with another --name. Beside the table are two pictures of each task: its
curves, with the broken steps marked, and the intervals.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from benchmark import circumstances, hardware
from compare_parts import pictures
from compare_parts.keys import described
from compare_parts.rows import RATE_SEEDS, Comparison
from compare_parts.tables import LEGEND, STOCK, T95, detail
from compare_parts.tasks import TASKS, missing
from compare_parts.training import BETA2, FAULTS, NOTHING, RATES, WEIGHT_DECAY, Run, broken_steps, optimizer_of, places

from hf_gradclip import Clipper
from hf_gradclip.budgets import Budgets
from hf_gradclip.config import ClipConfig
from hf_gradclip.strategy import SpecError

CLIPS = (NOTHING, STOCK, "zclip", "agc", "adaptive_norm", "adaptive")
DATA = tuple(FAULTS)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = [name for name, task in TASKS.items() if task.lr is None]
    parser.add_argument("--task", nargs="+", default=small, choices=list(TASKS), help="What to learn.")
    parser.add_argument("--optimizer", default="adamw", choices=list(RATES), help="With which optimizer.")
    parser.add_argument("--clip", nargs="+", default=list(CLIPS), help="Specs for the gradient, or gradient/update.")
    parser.add_argument("--against", nargs="+", help=f"Specs of these that all are compared with; {STOCK} without it.")
    parser.add_argument("--data", nargs="+", default=list(DATA[:3]), choices=DATA, help="Sound data comes with any.")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, len(T95) + 2), help="Runs of each kind.")
    parser.add_argument("--first_seed", type=int, default=0, help="The lowest of the seeds; those above it follow.")
    parser.add_argument("--steps", type=int, default=200, help="Of each run.")
    parser.add_argument(
        "--lr", type=float, help="The highest learning rate; else the task's own, or it is searched for."
    )
    parser.add_argument(
        "--own_rates", action="store_true", help="Search a rate for each clip, not one for all without clipping."
    )
    parser.add_argument("--beta2", type=float, default=BETA2, help="Of AdamW.")
    parser.add_argument("--weight_decay", type=float, default=WEIGHT_DECAY, help="Of AdamW.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, each on one thread; 1 is this one.")
    parser.add_argument("--name", default=None, help="Of the files; the optimizer without it.")
    parser.add_argument("--out", type=Path, default=None, help="A folder for the rows and the Markdown file.")
    args = parser.parse_args(argv)
    args.argv = argv
    args.task = list(dict.fromkeys(args.task))
    args.clip = list(dict.fromkeys([NOTHING, *args.clip]))  # which the others are compared with
    args.data = list(dict.fromkeys([DATA[0], *args.data]))
    if words := wrong(args) or wrong_clips(args):
        parser.error(words)
    args.against = [same for clip in args.against or [STOCK] if (same := same_as(clip, args.clip)) is not None]
    return args


def wrong(args: argparse.Namespace) -> str:
    """What cannot be run as it was asked for, or would be ignored; "" for nothing."""
    blank = Run("", args.optimizer, NOTHING, 0.0, DATA[0], 0, args.steps)
    whole = [kind for kind in args.data[1:] if args.steps > 0 and not broken_steps(replace(blank, data=kind))]
    packages = list(dict.fromkeys(package for task in args.task for package in missing(task)))
    own = args.optimizer != "adamw" and (args.beta2, args.weight_decay) != (BETA2, WEIGHT_DECAY)
    last = min(RATE_SEEDS) - args.seeds
    outside = not 0 <= args.first_seed <= last
    both = args.own_rates and args.lr is not None
    checks = {
        f"--steps {args.steps}: must be at least 1.": args.steps < 1,
        f"--first_seed {args.first_seed}: must be from 0 to {last}; rates are chosen on {RATE_SEEDS}.": outside,
        f"--workers {args.workers}: must be at least 1.": args.workers < 1,
        f"--lr {args.lr}: must be above 0 and finite.": args.lr is not None and not 0 < args.lr < math.inf,
        f"--own_rates searches for rates, and --lr {args.lr} gives one. Leave one of them out.": both,
        f"--beta2 {args.beta2}: must be at least 0 and below 1.": not 0 <= args.beta2 < 1,
        f"--weight_decay {args.weight_decay}: must be at least 0 and finite.": not 0 <= args.weight_decay < math.inf,
        f"--beta2 and --weight_decay are AdamW's. Leave them out with {args.optimizer}.": own,
        f"--steps {args.steps}: none of so few is broken with {', '.join(whole)}. Give more, or --data sound.": whole,
        f"--name {args.name}: must be a name without a folder; the folder is --out.": "/" in (args.name or ""),
        f"--out {args.out}: is a file. Give a folder.": args.out is not None and args.out.is_file(),
        f"--task {' '.join(args.task)}: pip install {' '.join(packages)}": packages,
        "--out draws pictures: pip install matplotlib": args.out is not None and find_spec("matplotlib") is None,
    }
    return next((words for words, is_so in checks.items() if is_so), "")


def wrong_clips(args: argparse.Namespace) -> str:
    """What cannot clip, would be trained twice, or is not there to be compared with; "" for nothing."""
    for i, clip in enumerate(args.clip):
        try:
            gradient, update = places(clip)
            ClipConfig.parse(gradient, update=update)
            for task in args.task if has_groups(clip) else ():  # whose patterns must find the names of the model
                model = TASKS[task].model()
                Clipper.for_model(model, gradient)
                optimizer_of(Run(task, args.optimizer, clip, 1.0, DATA[0], 0, 1), model)
        except SpecError as error:
            return f"--clip {clip}: {error}"
        try:
            again = same_as(clip, args.clip[:i])
        except SpecError:
            return f"--clip {clip}: is a whole configuration. Give a spec for the gradient, or gradient/update."
        if again is not None:
            return f"--clip {clip}: is {again} again. Leave one of them out."
    for clip in args.against or ():
        try:
            there = same_as(clip, args.clip) is not None
        except SpecError as error:
            return f"--against {clip}: {error}"
        if not there:
            return f"--against {clip}: not among --clip, which is {' '.join(args.clip)}."
    return ""


def same_as(clip: str, clips: Sequence[str]) -> str | None:
    """Which of some clips is the same as this one, however it is written; None for none."""
    return next((other for other in clips if described(other) == described(clip)), None)


def has_groups(clip: str) -> bool:
    """Whether some of a clip goes by patterns over names."""
    return any(isinstance(ClipConfig.parse(spec).gradient, Budgets) for spec in places(clip))


def main(argv: Sequence[str] | None = None) -> str:
    """Train everything; the tables."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    torch.set_num_threads(1)
    cpu, seeds = torch.device("cpu"), range(args.first_seed, args.first_seed + args.seeds)
    facts = circumstances("compare_strategies", args.argv, cpu, "none: nothing is timed")
    name = f"compare_{args.name or args.optimizer}_{hardware(cpu)[1]}"
    path = None if args.out is None else args.out / f"{name}.jsonl"
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise SystemExit(
                f"--out {args.out}: cannot be written to ({error}). Give another folder or --name."
            ) from None
    found = Comparison(path, facts["commit"], args.workers)
    rates = rated(found, args)
    tasks = [{arm.clip: arm for arm in rates if arm.task == task} for task in args.task]
    found.run(
        replace(arm, data=data, seed=seed)
        for seed, arms, data in product(seeds, tasks, args.data)
        for arm in arms.values()
    )
    lines = [f"- {key}: {facts[key]}" for key in ("hardware", "date", "command", "commit")]
    lines.append("- versions: " + ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch")))
    settings = f"beta2 {args.beta2:g} and weight decay {args.weight_decay:g}"
    lines.append(
        f"- seeds {seeds[0]} to {seeds[-1]}, {args.steps} steps each"
        + f"; AdamW has {settings}" * (args.optimizer == "adamw")
    )
    parts = [f"# {name}", "\n".join(lines), LEGEND]
    for arms in tasks:
        task, plain = TASKS[arms[NOTHING].task], arms[NOTHING]
        start = statistics.fmean(found.outcomes[replace(plain, seed=s)].start or math.nan for s in seeds)
        rate = rate_of(list(arms.values()), [clip for clip, arm in arms.items() if rates[arm]])
        title = f"## {task.name}, {plain.optimizer}: {task.what}; {start:.3f} at the start, {rate}"
        parts += [title, detail(found, arms, args.data, seeds, args.against)]
        if args.out is not None:
            drawn = {
                "curves": pictures.curves(found, arms, args.data, seeds[0]),
                "intervals": pictures.intervals(found, arms, args.data, seeds),
            }
            for kind, figure in drawn.items():
                figure.savefig(args.out / f"{name}_{task.name}_{kind}.png", dpi=90)
                parts.append(f"![{task.name}: {kind}]({name}_{task.name}_{kind}.png)")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out is not None:
        (args.out / f"{name}.md").write_text(text, "utf-8")
    return text


def rated(found: Comparison, args: argparse.Namespace) -> dict[Run, bool]:
    """Each task with each clip, on sound data, at its learning rate; and whether that is at the edge of those tried."""
    settings = {"steps": args.steps, "beta2": args.beta2, "weight_decay": args.weight_decay}
    runs = [Run(task, args.optimizer, clip, 0.0, DATA[0], 0, **settings) for task in args.task for clip in args.clip]
    usual = args.optimizer == "adamw" and not args.own_rates
    given = {task: lr for task in args.task if (lr := args.lr or (TASKS[task].lr if usual else None))}
    judges = {run: run if args.own_rates else replace(run, clip=NOTHING) for run in runs if run.task not in given}
    best = found.best(list(dict.fromkeys(judges.values())), RATES[args.optimizer], args.seeds * len(args.data) * runs)
    rates = {run: best[judges[run]] if run in judges else (given[run.task], False) for run in runs}
    return {replace(run, lr=lr): edge for run, (lr, edge) in rates.items()}


def rate_of(arms: Sequence[Run], edges: Sequence[str]) -> str:
    """The learning rate of a task in words; `edges` are the clips whose rate is at the edge of those tried."""
    rates = {arm.lr for arm in arms}
    words = f"lr {arms[0].lr:g}" if len(rates) == 1 else "each at a learning rate of its own"
    whose = "" if len(edges) == len(arms) else f" for {', '.join(f'`{clip}`' for clip in edges)}"
    return words + f" (edge{whose}: none beyond it was tried)" * bool(edges)


if __name__ == "__main__":
    main()
