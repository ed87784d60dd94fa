"""Faults in gradients, by the thousand: on every backend, with every strategy, and what came of them.

    python scripts/faults.py --seed 1 --out benchmarks/reliability_faults_cpu.md
    python scripts/faults.py --seed 1 --backend ddp zero3 --cases 0      these arrays alone
    python scripts/faults.py --seed 1 --only 108                         one case again

A case is a fault in the gradients of a tiny model: what (NaN, inf, -inf, 1e30, a subnormal number, zero), where (one
element, one tensor, one rank, all ranks), when (step 1, the warm-up, mid-run, 200 in a row), under which strategy or
preset, for the gradient or for the update, with AdamW of torch or of hf_gradclip.optim, on which backend. Every pair
of levels meets that can, by greedy arrays that the seed draws: those of strategies with others on `plain`, where the
rest of the cases are too, and with `--deep` on every backend. What is right: see faults_parts/right.py.

One backend after another gets a process, or two gloo ranks, that runs its cases in turn. A case of more than `--limit`
seconds is a hang: its processes are ended, and the rest of the cases go on in new ones. The exit status is 1 if
anything was not right.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faults_parts.cases import BACKENDS, FACTORS, FAULTS, ONE_PROCESS, STRATEGIES, WHEN, Case, cases

ROOT = Path(__file__).resolve().parents[1]
START = 120
"""Seconds that the first case of new processes may take longer."""


def run(backend: str, given: Sequence[Case], limit: float, folder: Path) -> list[dict[str, Any]]:
    """Run cases of one backend; a line for each, in the order in which they were done."""
    found: list[dict[str, Any]] = []
    left = list(given)
    while left:
        todo, lines, log = (folder / f"{backend}.{name}".replace(" ", "_") for name in ("json", "jsonl", "log"))
        todo.write_text(json.dumps([asdict(case) for case in left]), "utf-8")
        lines.write_text("", "utf-8")
        ended = _watch(_command(backend, todo, lines), lines, log, limit)
        read = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
        found += [line for line in read if "wrong" in line]
        done = {line["number"] for line in found}
        left = [case for case in left if case.number not in done]
        if left:
            begun = [line["begun"] for line in read if line.get("begun") not in (None, *done)]
            number = begun[0] if begun else left[0].number
            words = f"{ended}: {log.read_text('utf-8', 'replace')[-600:]}"
            found.append({"number": number, "wrong": [words], "seconds": limit, "steps": 0, "ended": ended})
            left = [case for case in left if case.number != number]
    return found


def _command(backend: str, todo: Path, lines: Path) -> list[str]:
    ranks = [] if backend in ONE_PROCESS else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, *ranks, "-m", "faults_parts.worker", backend, str(todo), str(lines)]


def _watch(command: list[str], lines: Path, log: Path, limit: float) -> str:
    """Run a command until it ends, or leaves no line for too long; in a word how it ended. It leaves no process."""
    more = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **more, "PYTHONPATH": path}, cwd=ROOT, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        size, since = 0, time.monotonic() + START
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if (now := lines.stat().st_size) != size:
                    size, since = now, time.monotonic()
                if time.monotonic() - since > limit:
                    return "hangs"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "done" if process.returncode == 0 else f"died with {process.returncode}"


def table(given: Sequence[Case], found: Iterable[dict[str, Any]], seed: int, command: str) -> str:
    """In Markdown: how many of which were right, and every one that was not."""
    lines = {line["number"]: line for line in found}
    right = {case: not lines[case.number]["wrong"] for case in given}
    text = [
        "# Faults in gradients",
        "",
        f"`{command}`: {len(given)} cases of seed {seed}, {sum(right.values())} right, "
        f"{len(given) - sum(right.values())} wrong. Every pair of levels meets that can be. In a cell: right of all.",
        "",
        *_counts("backend", BACKENDS, "fault", FAULTS, right),
        "",
        *_counts("backend", BACKENDS, "when", WHEN, right),
        "",
        *_counts("backend", BACKENDS, "where", FACTORS["where"], right),
        "",
        *_counts("strategy", STRATEGIES, "clip", FACTORS["clip"], right),
        "",
    ]
    ended = Counter(case.fault for case in given if lines[case.number]["ended"])
    text += [f"Runs that `max_consecutive_skips` ended: {', '.join(f'{n} of {word}' for word, n in ended.items())}."]
    if not all(right.values()):
        text += ["", "| case | what was not right |", "|---|---|"]
        text += [
            f"| {' '.join(str(value) for value in asdict(case).values())} | {_said(lines[case.number]['wrong'])} |"
            for case, good in right.items()
            if not good
        ]
    return "\n".join(text) + "\n"


def _said(words: Sequence[str]) -> str:
    return "; ".join(words)[:600].replace("\n", " ").replace("|", "/")


def _counts(
    row: str, rows: Iterable[str], column: str, columns: Iterable[str], right: dict[Case, bool]
) -> Iterable[str]:
    columns = list(columns)
    yield f"| {row} | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in rows:
        cells = []
        for level in columns:
            some = [good for c, good in right.items() if (getattr(c, row), getattr(c, column)) == (name, level)]
            cells.append(f"{sum(some)} / {len(some)}" if some else "-")
        yield f"| {name} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="Of the arrays, and of the cases beside them.")
    parser.add_argument("--cases", type=int, default=3000, help="At least so many in all.")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="On these only.")
    parser.add_argument("--only", type=int, nargs="+", help="The numbers of cases, of all that the seed gives.")
    parser.add_argument("--limit", type=float, default=60.0, help="Seconds of one case.")
    parser.add_argument("--out", type=Path, help="A file for the table.")
    parser.add_argument("--deep", action="store_true", help="Each strategy with every level on every backend.")
    args = parser.parse_args(argv)
    given = [case for case in cases(args.seed, args.cases, args.deep) if case.backend in args.backend]
    given = [case for case in given if args.only is None or case.number in args.only]
    print(f"seed {args.seed}, {len(given)} cases", flush=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        for backend in args.backend:
            some = [case for case in given if case.backend == backend]
            began = time.monotonic()
            lines = run(backend, some, args.limit, Path(folder)) if some else []
            bad = [line for line in lines if line["wrong"]]
            print(f"[{time.monotonic() - began:4.0f} s] {backend}: {len(some)} cases, {len(bad)} wrong", flush=True)
            for line in bad:
                case = next(case for case in some if case.number == line["number"])
                print(f"  {case}: {line['wrong']}", flush=True)
            found += lines
    words = shlex.join(["python", "scripts/faults.py", *(sys.argv[1:] if argv is None else argv)])
    text = table(given, found, args.seed, words)
    print(text)
    if args.out is not None:
        args.out.write_text(text, "utf-8")
    return int(any(line["wrong"] for line in found))


if __name__ == "__main__":
    sys.exit(main())
