"""`hf-gradclip`: run a script with clipping; report, replay, suggest or watch from a record; list and explain."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_gradclip.say import printable
from hf_gradclip.strategy import SpecError
from hf_gradclip.version import __version__

DONE, BAD_INPUT = 0, 2
_RUN = "[-h] [--clip SPEC] [--record true|text|false] -- (FILE.py | -m MODULE | COMMAND) [ARGUMENT ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0, or 2 for input that cannot be served; that of a script that is run."""
    words, command = _cut(list(sys.argv[1:] if argv is None else argv))
    args = _parser().parse_args(words)
    args.script = command
    try:
        then: Callable[[], int] | None = args.run_command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads it, `head` say, has seen enough; the rest, flushed at the exit, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (SpecError, ValueError, OSError, ImportError) as error:
        print(printable(f"hf-gradclip {args.command}: {error}"), file=sys.stderr)
        return BAD_INPUT
    return DONE if then is None else then()


def _cut(words: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and the command that `run` shall run: from `--`, `-m` or the first word that is no option on."""
    place = 1
    while words[:1] == ["run"] and place < len(words):
        word = words[place]
        if word == "--":
            return words[:place], words[place + 1 :]
        if word == "-m" or not word.startswith("-"):
            return words[:place], words[place:]
        place += 1 if "=" in word or word in ("-h", "--help") else 2
    return words, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-gradclip", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hf-gradclip {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="somebody's script, with clipping", usage=f"hf-gradclip run {_RUN}")
    run.add_argument("--clip", default="adaptive", metavar="SPEC", help="a strategy; adaptive if left out")
    run.add_argument("--record", choices=["true", "text", "false"], help="keep every step's norms and scales")
    run.set_defaults(run_command=_run)

    report = commands.add_parser("report", help="a page and pictures of recorded runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run; several side by side")
    report.add_argument("--out", type=Path, default=None, help="a folder, or a file x.html; RUN/gradclip if left out")
    report.add_argument("--text", action="store_true", help="print tables instead")
    report.set_defaults(run_command=_report)

    help_of_clip = "a strategy; may be repeated; the run's own if left out"
    replay = commands.add_parser("replay", help="what other strategies would have done with the recorded norms")
    replay.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run")
    replay.add_argument("--clip", action="append", default=[], metavar="SPEC", help=help_of_clip)
    replay.add_argument("--place", choices=["gradient", "update"], default="gradient", help="which norms")
    replay.add_argument("--out", type=Path, default=None, help="a folder, or the picture; RUN/gradclip if left out")
    replay.set_defaults(run_command=_replay)

    suggest = commands.add_parser("suggest", help="a threshold for a wanted share of clipped steps")
    suggest.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run")
    suggest.add_argument("--rate", type=float, default=0.05, help="wanted share of clipped steps (default 0.05)")
    suggest.set_defaults(run_command=_suggest)

    watch = commands.add_parser("watch", help="a run in the terminal while it goes on, from its record")
    watch.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run, which may not have begun")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between looks (default 2)")
    watch.add_argument("--once", action="store_true", help="look once, print it and end; needs no rich")
    watch.set_defaults(run_command=_watch)

    commands.add_parser("list", help="strategies and presets, with their fields").set_defaults(run_command=_list)

    explain = commands.add_parser("explain", help="what a strategy or a preset is: rule, fields, state, cost, limits")
    explain.add_argument("name", metavar="NAME", help="as `hf-gradclip list` shows it")
    explain.set_defaults(run_command=_explain)
    return parser


def _run(args: argparse.Namespace) -> Callable[[], int]:
    from hf_gradclip.launch import prepared

    return prepared(args.clip, args.record, args.script)


def _report(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis.report import print_report, write_report

    if args.text:
        print_report(args.runs)
        return
    for path in write_report(args.runs, args.out):
        print(path)


def _replay(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis import groups
    from hf_gradclip.analysis.replay import (
        LIMIT_OF_REPLAY,
        difference,
        outcome_of,
        replay,
        spec_recorded,
        strategy_for_replay,
    )
    from hf_gradclip.analysis.replay_figure import draw_replay
    from hf_gradclip.analysis.tables import COLUMNS, outcome_rows
    from hf_gradclip.analysis.terminal import say, show_table
    from hf_gradclip.record.files import folder_of, read_record

    record = read_record(args.run, args.place)
    if not record.finite_T.any():
        raise ValueError(f"{args.run}: no recorded step has a finite norm.")
    specs = args.clip or [spec_recorded(record)]
    try:
        strategies = [strategy_for_replay(spec) for spec in specs]
    except SpecError as error:
        if args.clip:
            raise
        raise SpecError(f"without --clip the run's own strategy is taken, and {error}") from None
    found = [replay(record, strategy) for strategy in strategies]
    show_table(COLUMNS, outcome_rows(map(functools.partial(outcome_of, record), found, specs)))
    for spec, strategy, of_spec in zip(specs, strategies, found, strict=True):
        if parts := groups.replayed_groups(record, strategy, of_spec):
            show_table(groups.COLUMNS, groups.group_rows(parts), f"Groups of parameters under {spec}")
    for run in found:
        if run.spec == record.meta["spec"] and not record.earlier:
            say("", f"What was recorded is {run.spec}: its scales differ by {difference(record, run):.1e} at most.")
    say("", LIMIT_OF_REPLAY)
    path = args.out or folder_of(args.run)
    if path.is_dir() or not path.suffix:
        path /= "replay.png"
    draw_replay(record, found, specs, path)
    print(path)


def _suggest(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis.replay import LIMIT_OF_REPLAY
    from hf_gradclip.analysis.suggest import misses, suggest
    from hf_gradclip.analysis.tables import COLUMNS, outcome_rows
    from hf_gradclip.analysis.terminal import say, show_table
    from hf_gradclip.record.files import read_record

    record = read_record(args.run)
    outcomes = suggest(record, args.rate)
    show_table(COLUMNS, outcome_rows(outcomes), f"To clip {args.rate:.1%} of the steps:")
    say("", *misses(outcomes, args.rate, int(record.finite_T.sum())), LIMIT_OF_REPLAY)


def _watch(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis.watch import watch

    watch(args.run, args.every, args.once)


def _explain(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis.explain import explain

    print(explain(args.name))


def _list(args: argparse.Namespace) -> None:
    from hf_gradclip.analysis.explain import listing

    print(listing())


if __name__ == "__main__":
    sys.exit(main())
