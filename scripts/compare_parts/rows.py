"""The rows of a comparison: one line of JSON per run, kept by a key of what it compares."""

from __future__ import annotations

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
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from compare_parts import task as task_module
from compare_parts import training
from compare_parts.task import rows_of
from compare_parts.tasks import TASKS
from compare_parts.training import Outcome, Run, places
from hf_gradclip import budgets, outlier
from hf_gradclip.spec import read_strategy
from hf_gradclip.strategy import describe, parts_of

RATE_SEEDS = (1000, 1001)
FURTHER = 4
"""How often at most a rate beyond those tried is tried, while the best is at their edge."""


def key_of(run: Run) -> str:
    """Of what decides how a run differs from others; what trains them all alike is not in it."""
    task = TASKS[run.task]
    code = [code_of(task_module), code_of(sys.modules[task.data.__module__])]
    specs = []
    for spec in places(run.clip):
        strategy = read_strategy(spec)
        specs.append(describe(strategy))
        modules = [sys.modules[type(part).__module__] for part in parts_of(strategy)]
        code += [code_of(module) for module in modules]
        code += [code_of(budgets)] * isinstance(strategy, budgets.Budgets)
        code += [code_of(outlier)] * any(map(names_outliers, modules))
    settings = [training.RAMP, training.BETA1 if run.optimizer == "adamw" else 0.0]
    if run.data != "sound":
        settings += [training.FAULTS[run.data], training.BROKEN, training.UNBROKEN]
    text = json.dumps([asdict(replace(run, clip="/".join(specs))), settings, code])
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


@functools.cache
def names_outliers(module: ModuleType) -> bool:
    """Whether a strategy goes by the rule for what stands out."""
    return "outlier" in inspect.getsource(module)


def _is_docstring(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


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
        *whole, rest = path.read_text("utf-8").split("\n") if path is not None and path.exists() else [""]
        try:
            self._rows = {row["key"]: row for row in map(json.loads, whole)}
        except (ValueError, LookupError, TypeError):
            raise SystemExit(f"{path} has lines that are no rows of a comparison. Give another --name.") from None
        if path is not None and rest:
            path.write_text("".join(f"{line}\n" for line in whole), "utf-8")  # without what an interruption left

    def run(self, runs: Iterable[Run]) -> None:
        """Train what was not trained yet, and say before how long that will take."""
        missing = []
        for run in dict.fromkeys(runs):
            if run in self.outcomes:
                continue
            row = self._rows.get(key_of(run))
            if row is None:
                missing.append(run)
            else:
                fields = (row[name] for name in list(Outcome.__annotations__)[1:] if name in row)  # old rows have fewer
                self.outcomes[run] = Outcome(run, *fields)
        if not missing:
            return
        seconds = seconds_of({(run.task, run.steps) for run in missing})
        hours = sum(seconds[run.task, run.steps] for run in missing) / 3600
        print(f"{len(missing)} runs, about {hours:.1f} core-hours", file=sys.stderr, flush=True)
        if self._workers == 1:
            self._keep_all(map(training.train, missing), len(missing))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context) as pool:
            try:
                done = as_completed([pool.submit(training.train, run) for run in missing])
                self._keep_all((one.result() for one in done), len(missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _keep_all(self, outcomes: Iterable[Outcome], total: int) -> None:
        begun = time.perf_counter()
        for done, outcome in enumerate(outcomes, start=1):
            self._keep(outcome)
            left = (time.perf_counter() - begun) / done * (total - done) / 3600
            print(f"{done} of {total}, {left:.1f} h left: {outcome}", file=sys.stderr)

    def _keep(self, outcome: Outcome) -> None:
        self.outcomes[outcome.run] = outcome
        if self._path is not None:
            row = {"key": key_of(outcome.run), "commit": self._commit, **asdict(outcome)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def ends(self, run: Run, seeds: Sequence[int]) -> list[float]:
        """The last evaluation losses of a run by seed; inf for one that is above the loss before training."""
        found = [self.outcomes[replace(run, seed=seed)] for seed in seeds]
        pairs = [(outcome.end, outcome.start) for outcome in found]
        return [math.inf if end is None or start is None or end > start else end for end, start in pairs]

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

    def best(self, plains: Sequence[Run], rates: Sequence[float]) -> dict[Run, tuple[float, bool]]:
        """By run the learning rate with the lowest mean of the last evaluation losses, on the seeds RATE_SEEDS.

        While it is the highest or the lowest of those that were tried, twice or half of it is tried too, FURTHER times.
        Beside it stands whether it is at the edge still.
        """
        tried = {plain: sorted(rates) for plain in plains}
        for further in range(FURTHER + 1):
            wanted = ((plain, lr, seed) for seed in RATE_SEEDS for plain in plains for lr in tried[plain])
            self.run(replace(plain, lr=lr, seed=seed) for plain, lr, seed in wanted)
            found = {plain: min(tried[plain], key=lambda lr: self._ending(replace(plain, lr=lr))) for plain in plains}
            for plain, lr in found.items() if further < FURTHER else ():
                lowest, highest = tried[plain][0], tried[plain][-1]
                tried[plain] = [lr / 2] * (lr == lowest) + tried[plain] + [lr * 2] * (lr == highest)
        return {plain: (lr, lr in (tried[plain][0], tried[plain][-1])) for plain, lr in found.items()}

    def _ending(self, run: Run) -> float:
        return statistics.fmean(self.ends(run, RATE_SEEDS))


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
