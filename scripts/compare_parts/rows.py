"""The rows of a comparison: one line of JSON per run, kept by a key of what it compares."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from compare_parts import training
from compare_parts.keys import key_of
from compare_parts.task import rows_of
from compare_parts.tasks import TASKS
from compare_parts.training import Outcome, Run

RATE_SEEDS = (1000, 1001)
FURTHER = 4
"""How often at most a rate beyond those tried is tried, while the best is at their edge."""
FIELDS = tuple(Outcome.__annotations__)[1:]
NEW = ("norm", "rise")
"""Those of them that old rows lack."""


class Comparison:
    """Outcomes by run.

    Args:
        path: of the rows; None keeps none.
        commit: of the code, for who reads the rows.
        workers: processes; 1 trains in this one.

    Raises:
        SystemExit: for a file that has something else than rows.
    """

    def __init__(self, path: Path | None, commit: str, workers: int) -> None:
        self.outcomes: dict[Run, Outcome] = {}
        self._path, self._commit, self._workers = path, commit, workers
        self._rows = {} if path is None or not path.exists() else read_rows(path)

    def run(self, runs: Iterable[Run], later: Sequence[Run] = ()) -> None:
        """Train what was not trained yet, and say before how long that will take, and what is to come `later`."""
        missing = []
        for run in dict.fromkeys(runs):
            if run in self.outcomes:
                continue
            row = self._rows.get(key_of(run))
            if row is None:
                missing.append(run)
            else:
                self.outcomes[run] = outcome_of(run, row)
        if missing:
            more = f"; then {len(later)}, about {duration(later)}, but for those that have a row" if later else ""
            print(f"{len(missing)} runs, about {duration(missing)}{more}", file=sys.stderr, flush=True)
            self._train(missing)

    def _train(self, missing: Sequence[Run]) -> None:
        """Train and keep. What has begun when one run fails or somebody interrupts is still kept, if it ends."""
        keep = self._keeper(len(missing))
        if self._workers == 1:
            for run in missing:
                keep(training.train(run))
            return
        context, waiting = multiprocessing.get_context("spawn"), iter(missing)
        with ProcessPoolExecutor(self._workers, mp_context=context, initializer=begin_worker) as pool:
            running: set[Future[Outcome]] = set()
            try:
                while True:
                    for run in islice(waiting, self._workers - len(running)):  # none waits in a queue
                        running.add(pool.submit(training.train, run))
                    if not running:
                        return
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        keep(done.result())
                        running.discard(done)
            except BaseException:
                self._keep_begun(running, keep)
                raise

    def _keep_begun(self, running: Iterable[Future[Outcome]], keep: Callable[[Outcome], None]) -> None:
        """Wait for what has begun, and keep what ends well; a second interrupt ends the workers."""
        print("what has begun is waited for and kept; another interrupt drops it", file=sys.stderr, flush=True)
        try:
            for done in wait(running).done:
                if done.exception() is None and done.result().run not in self.outcomes:
                    keep(done.result())
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()

    def _keeper(self, total: int) -> Callable[[Outcome], None]:
        """Keeps one outcome after another, and says how long the others will take."""
        begun, done = time.perf_counter(), 0

        def keep(outcome: Outcome) -> None:
            nonlocal done
            self._keep(outcome)
            done += 1
            left = (time.perf_counter() - begun) / done * (total - done) / 3600
            print(f"{done} of {total}, {left:.1f} h left: {outcome}", file=sys.stderr)

        return keep

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.run] = outcome
        if self._path is not None:
            row = {"key": key_of(outcome.run), "commit": self._commit, **asdict(outcome)}
            row["losses"] = [loss if math.isfinite(loss) else None for loss in outcome.losses]
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def ends(self, run: Run, seeds: Sequence[int]) -> list[float]:
        """The last evaluation losses of a run by seed; inf for one that is not below the loss before training."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        pairs = [(outcome.end, outcome.start) for outcome in found]
        return [math.inf if end is None or start is None or end >= start else end for end, start in pairs]

    def clipped(self, run: Run, seeds: Sequence[int]) -> str:
        """The mean share of its steps that were clipped; gradient / update."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        shares = [statistics.fmean(o.clipped for o in found), statistics.fmean(o.update_clipped for o in found)]
        return " / ".join(f"{share:.1%}" for share in shares[: 1 + ("/" in run.clip)])

    def norms(self, run: Run, seeds: Sequence[int]) -> list[str]:
        """The means of its norm and its rise; "-" where one of the rows has none."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        columns = ([outcome.norm for outcome in found], [outcome.rise for outcome in found])
        known = [[value for value in column if value is not None] for column in columns]
        return [f"{statistics.fmean(values):.3g}" if len(values) == len(found) else "-" for values in known]

    def best(
        self, plains: Sequence[Run], rates: Sequence[float], later: Sequence[Run] = ()
    ) -> dict[Run, tuple[float, bool]]:
        """By run the learning rate with the lowest mean of the last evaluation losses, on the seeds RATE_SEEDS.

        While it is the highest or the lowest of those that were tried, twice or half of it is tried too, FURTHER times.
        Beside it stands whether it is at the edge still.
        """
        tried = {plain: sorted(rates) for plain in plains}
        for further in range(FURTHER + 1):
            wanted = ((plain, lr, seed) for seed in RATE_SEEDS for plain in plains for lr in tried[plain])
            self.run((replace(plain, lr=lr, seed=seed) for plain, lr, seed in wanted), later)
            found = {plain: min(tried[plain], key=lambda lr: self._ending(replace(plain, lr=lr))) for plain in plains}
            for plain, lr in found.items() if further < FURTHER else ():
                lowest, highest = tried[plain][0], tried[plain][-1]
                tried[plain] = [lr / 2] * (lr == lowest) + tried[plain] + [lr * 2] * (lr == highest)
        return {plain: (lr, lr in (tried[plain][0], tried[plain][-1])) for plain, lr in found.items()}

    def _ending(self, run: Run) -> float:
        return statistics.fmean(self.ends(run, RATE_SEEDS))


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their keys. What an interruption left of a last one is taken out of the file.

    Raises:
        SystemExit: for a file that has something else than rows; it is left alone.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    if rest and _row_in(rest) is not None:  # whole but for its end
        whole, rest = [*whole, rest], b"\n"
    rows = [_row_in(line) for line in whole]
    if None in rows:
        where = f"{path} has lines that are no rows of a comparison, the first of them line {rows.index(None) + 1}"
        raise SystemExit(f"{where}. Mend it or take it out, or give another --name.")
    if rest:
        written = path.with_name(f"{path.name}.new")
        written.write_bytes(b"".join(line + b"\n" for line in whole))
        written.replace(path)
    return {row["key"]: row for row in rows if row is not None}


def _row_in(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    needed = {"key", *FIELDS} - set(NEW)
    return row if isinstance(row, dict) and needed <= row.keys() else None


def outcome_of(run: Run, row: dict[str, Any]) -> Outcome:
    """What a row says of a run."""
    losses = [math.nan if loss is None else loss for loss in row["losses"]]
    return Outcome(run, **{**{name: row[name] for name in FIELDS if name in row}, "losses": losses})


def begin_worker() -> None:
    """In a worker: leave an interrupt from the terminal to the process that began it, and end when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def duration(runs: Iterable[Run]) -> str:
    """About how long runs take, in words."""
    hours = sum(seconds_of(run.task, run.steps) for run in runs) / 3600
    return f"{hours:.1f} core-hours" if hours >= 1 else f"{60 * hours:.1f} core-minutes"


@functools.cache
def seconds_of(name: str, steps: int) -> float:
    """About how long a run of a task of so many steps takes on one thread here, from three steps of it."""
    task, data = TASKS[name], TASKS[name].data()
    model = task.model().train()
    begun = time.perf_counter()
    for _ in range(3):
        model(**rows_of(data, slice(task.batch_size))).loss.backward()
    examples = steps * task.batch_size + task.evaluated  # two evaluations take a third of a step's time each
    return (time.perf_counter() - begun) / (3 * task.batch_size) * examples
