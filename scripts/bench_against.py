"""This checkout against another one, row by row: both run at the same time, and take turns.

    git worktree add ../before 2bed812
    (cd ../before && python -c "from setuptools import setup; setup()" build_ext --inplace)
    python scripts/bench_against.py ../before
    python scripts/bench_against.py ../before --script step --workload llama138m --pairs 15

The rows are those of bench_clip.py, bench_step.py and bench_job.py that are of this package, as each checkout has them.
Each has a process; in a round both run every row once, one right after the other, in an order that changes. A ratio is
the median over the rounds of the other's time over ours, so above 1 is faster than the other; beside it the quartiles.
On one thread the clock is the processor time of the thread, except for the job, which is timed by the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
COLUMNS = ("table", "row", "ours ms", "other ms", "times as fast", "quartiles")


class Worker:
    """A process with one checkout, which is asked by lines of JSON and answers so.

    Args:
        checkout: its folder.
        script: "clip", "step" or "job".
        threads: of torch.
    """

    def __init__(self, checkout: Path, script: str, threads: int) -> None:
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).resolve()), "--answer", script, "--threads", str(threads), "-"]
        self._process = subprocess.Popen(
            command, env=env, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.where = self.ask("where")
        if Path(self.where).resolve() != checkout.resolve():
            raise SystemExit(f"bench_against.py {checkout}: {self.where} was imported instead.")

    def ask(self, *words: Any) -> Any:
        """Send a question, and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)["answer"]
        raise SystemExit(f"bench_against.py: the process of {self.where} has ended, with {self._process.wait()}.")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def answer(script: str, threads: int) -> None:
    """What a worker does: set up tables, and time their rows."""
    sys.path[0] = str(Path.cwd() / "scripts")  # the checkout's, not where this file is
    import torch

    import hf_gradclip

    torch.set_num_threads(threads)
    rows: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        what, *given = json.loads(line)
        found: Any = None
        if what == "where":
            found = str(Path(str(hf_gradclip.__file__)).parent.parent)
        elif what == "table":
            rows.clear()  # so that the memory of the last one is free
            rows.update(job_rows() if script == "job" else kernel_rows(script, threads, *given))
            found = list(rows)
        elif what == "time":
            found = rows[given[0]]()
        print(json.dumps({"answer": found}), flush=True)


def kernel_rows(script: str, threads: int, workload: str, dtype: str, case: int) -> dict[str, Callable[[], float]]:
    """The rows of bench_clip.py or bench_step.py that are ours, by the kernels that a user gets."""
    import bench_clip
    import bench_step
    import torch
    from benchmark import CASES, DTYPES, Stopwatch, Workload, first_call

    shapes = (bench_clip.TINY if workload == "tiny" else bench_clip.WORKLOADS[workload])[workload]
    work = Workload(workload, shapes, DTYPES[dtype], torch.device("cpu"))
    stopwatch = Stopwatch(work.flat.device, threads)
    module = bench_clip if script == "clip" else bench_step
    found: dict[str, Callable[[], float]] = {}

    def timed(row: Any) -> Callable[[], float]:
        def once() -> float:
            work.restore()
            if row.before is not None:
                row.before()
            return stopwatch.time(row.call)

        return once

    for row in module.rows_of(work, CASES[case]):
        if row.group == "ours" and "[eager]" not in row.name:
            row, _ = first_call(work, row)
            if row.call is not None:
                found[row.name] = timed(row)
    return found


def job_rows() -> dict[str, Callable[[], float]]:
    """What clipping, and its record, take in a step of bench_job.py; a step is made for each."""
    import bench_job
    import torch
    from finetune import load_model, load_texts, load_tokenizer, parse, to_blocks
    from torch.utils.data import DataLoader
    from transformers import default_data_collator, set_seed

    _, data_args, args = parse([])
    set_seed(args.seed)
    texts = load_texts(data_args, args.seed)
    tokenizer = load_tokenizer(data_args, texts["train"][data_args.text_column])
    model = load_model(data_args, tokenizer).train()
    data = to_blocks(texts, tokenizer, data_args)["train"]
    size = args.per_device_train_batch_size
    loader = DataLoader(data, batch_size=size, shuffle=True, collate_fn=default_data_collator, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)
    batches = (batch for _ in range(1000) for batch in loader)
    folder = tempfile.mkdtemp()

    def timed(strategy: Any) -> Callable[[], float]:
        def once() -> float:
            loss = model(**next(batches)).loss
            loss.backward()
            strategy.clip(loss.detach(), args.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            return 1e3 * (strategy.clipping[-1] + strategy.recording[-1])

        return once

    specs = enumerate(bench_job.DEFAULT)
    return {f"clip and record, {spec}": timed(bench_job.Timed(spec, model, f"{folder}/{i}")) for i, spec in specs}


def compared(ours: Worker, other: Worker, table: Sequence[Any], pairs: int) -> Iterator[tuple[str, ...]]:
    """The lines of one table."""
    mine, theirs = ours.ask("table", *table), other.ask("table", *table)
    names = [name for name in mine if name in theirs]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(pairs + 2):  # two to warm up
        for name in names if turn % 2 else reversed(names):
            first, second = (ours, other) if turn % 2 else (other, ours)
            taken = {first: first.ask("time", name), second: second.ask("time", name)}
            if turn >= 2:
                times[name].append((taken[ours], taken[other]))
    for name in names:
        ratios = [b / a for a, b in times[name]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = (f"{statistics.median(column):.4g}" for column in zip(*times[name], strict=True))
        yield " ".join(map(str, table)) or "job", name, *medians, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"


def main(argv: Sequence[str] | None = None) -> list[tuple[str, ...]]:
    """Measure; the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="The other checkout, with its C files compiled.")
    parser.add_argument("--script", choices=("clip", "step", "job"), nargs="+", default=["clip", "step", "job"])
    parser.add_argument("--workload", nargs="+", default=["llama138m", "lora400"], help="Of bench_clip.py.")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=15, help="Rounds.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch.")
    parser.add_argument("--answer", choices=("clip", "step", "job"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.answer:
        answer(args.answer, args.threads)
        return []
    lines: list[tuple[str, ...]] = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for script in args.script:
        tables = [(w, d, case) for w in args.workload for d in args.dtype for case in (0, 1)]
        started = (Worker(checkout.resolve(), script, args.threads) for checkout in (HERE, args.other))
        with closing(next(started)) as ours, closing(next(started)) as other:
            for table in [()] if script == "job" else tables:
                for line in compared(ours, other, table, args.pairs):
                    lines.append((script, *line))
                    print(f"| {' | '.join((f'{script} {line[0]}', *line[1:]))} |", flush=True)
    return lines


if __name__ == "__main__":
    main()
