"""Scenarios on several ranks: how a test starts them, and how a module runs them. Each fails alone.

A module of scenarios ends in `serve(scenario)`. A test calls `launch` with the names of the scenarios and looks up what
each found; where one failed, the look-up raises the tracebacks of its ranks.

A rank that fails ends its process, since another may wait for it in a collective, and the launcher then ends that one.
The scenarios that are left are started anew, in new processes. A scenario counts as done where all ranks are.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
SECONDS = 560
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
ACCELERATE = (
    *("accelerate.commands.launch", "--main_process_port", "0"),  # one that is free: there may be other launches
    *("--multi_gpu", "--num_machines", "1", "--num_processes"),
)


class Found(dict[str, Any]):
    """What one rank found in each scenario.

    Args:
        failures: the words of the scenarios that did not come to an end.
    """

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__()
        self._failures = failures

    def __missing__(self, scenario: str) -> Any:
        if scenario in self._failures:
            raise AssertionError(f"the scenario {scenario!r} failed\n{self._failures[scenario]}")
        raise KeyError(scenario)


def launch(
    ranks: int, module: str, folder: Path, *scenarios: str, by: Sequence[str] = TORCHRUN, **variables: str
) -> list[Found]:
    """Run scenarios on several ranks.

    Args:
        ranks: how many processes.
        module: of this folder, ends in `serve`.
        folder: for files; empty, but for what the scenarios read.
        *scenarios: what `serve` is given, in this order.
        by: the launcher's module and arguments, up to the number of ranks.
        **variables: added to the environment.

    Returns:
        What each rank found.

    Raises:
        AssertionError: if not even the first scenario was begun.
    """
    command = [sys.executable, "-m", *by, str(ranks), "-m", f"tests.integrations.{module}", str(folder)]
    failures: dict[str, str] = {}
    left, deadline = [*scenarios], time.monotonic() + SECONDS
    while left:
        said = _run([*command, *left], {**os.environ, **variables}, folder / "said", deadline)
        left = [name for name in left if not all(_file(folder, name, rank, "found").exists() for rank in range(ranks))]
        if not left:
            break
        failed = left.pop(0)
        assert any(folder.glob(f"{quote(failed, safe='')}.*.begun")), f"{module} did not begin {failed!r}\n{said}"
        failures[failed] = _tracebacks(folder, failed) or said
        if time.monotonic() > deadline:
            failures |= dict.fromkeys(left, f"not begun: {failed!r} failed, and the time was up")
            break
    found = []
    for rank in range(ranks):
        found.append(Found(failures))
        for name in scenarios:
            if name not in failures:
                found[-1][name] = torch.load(_file(folder, name, rank, "found"), weights_only=False)
    return found


def serve(scenario: Callable[[str], Any]) -> None:
    """Run the scenarios that the command line names after the folder, and leave a file of each for `launch`.

    Args:
        scenario: runs one, by its name, on this rank; returns what `torch.save` takes.
    """
    folder, *names = sys.argv[1:]
    rank = int(os.environ["RANK"])
    gc.collect()
    gc.freeze()  # what was imported stays, and need not be looked through again: DeepSpeed collects in every start
    for name in names:
        _file(Path(folder), name, rank, "begun").touch()
        try:
            found = scenario(name)
            dist.barrier()
        except BaseException:
            _file(Path(folder), name, rank, "failed").write_text(traceback.format_exc(), "utf-8")
            os._exit(1)
        aside = _file(Path(folder), name, rank, "part")
        torch.save(found, aside)
        aside.replace(_file(Path(folder), name, rank, "found"))
    dist.barrier()
    dist.destroy_process_group()


def _file(folder: Path, scenario: str, rank: int, what: str) -> Path:
    return folder / f"{quote(scenario, safe='')}.{rank}.{what}"


def _tracebacks(folder: Path, scenario: str) -> str:
    """Of every rank that had one, the earliest first: the others failed because they were left alone."""
    files = sorted(folder.glob(f"{quote(scenario, safe='')}.*.failed"), key=lambda file: file.stat().st_mtime_ns)
    return "\n".join(f"rank {file.suffixes[-2][1:]}: {file.read_text('utf-8')}" for file in files)


def _run(command: Sequence[str], environment: dict[str, str], log: Path, deadline: float) -> str:
    """Run a command to its end, or to the deadline; the end of what it said. It leaves no process behind."""
    with log.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            file.write(f"\n{' '.join(command)}: not done in time")
        finally:
            process.terminate()  # the launcher ends its ranks
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    return log.read_text("utf-8", "replace")[-6000:]
