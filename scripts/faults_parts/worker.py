"""A process that runs cases of one backend, one after another, and leaves a line for each: see faults.py.

python -m faults_parts.worker BACKEND CASES.json LINES.jsonl
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from faults_parts.cases import ONE_PROCESS, Case
from faults_parts.right import found_on, wrong
from faults_parts.runs import Watched, run, start


def judged(case: Case) -> dict[str, Any]:
    """Run a case in this process, which is all there is; what was not right."""
    return _judged(case, 0, 1)


def _judged(case: Case, rank: int, ranks: int) -> dict[str, Any]:
    began, watched, words = time.monotonic(), None, []
    try:
        watched = run(case, rank, ranks)
    except Exception as error:
        words = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        print(traceback.format_exc(), file=sys.stderr, flush=True)
    everywhere: list[Any] = [None if watched is None else found_on(watched)]
    if ranks > 1:
        everywhere *= ranks
        dist.all_gather_object(everywhere, None if watched is None else found_on(watched))
    if watched is not None and None not in everywhere:
        words = list(wrong(watched, everywhere))
    if ranks > 1:
        heard: list[Any] = [None] * ranks
        dist.all_gather_object(heard, words)
        words = [f"rank {i}: {word}" for i, some in enumerate(heard) for word in some]
    return {"number": case.number, "wrong": words, "seconds": time.monotonic() - began, **_outcome(watched)}


def _outcome(watched: Watched | None) -> dict[str, Any]:
    if watched is None:
        return {"steps": 0, "ended": ""}
    return {"steps": len(watched.looks.weights) - 1, "ended": str(watched.error or "")}


def main() -> None:
    """Run the cases of the command line."""
    backend, given, lines = sys.argv[1:]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, ranks = 0, 1
    if backend not in ONE_PROCESS:
        start(backend)
        rank, ranks = dist.get_rank(), dist.get_world_size()
    with Path(lines).open("a", encoding="utf-8") as file:
        for case in (Case(**fields) for fields in json.loads(Path(given).read_text("utf-8"))):
            if rank == 0:
                print(json.dumps({"begun": case.number}), file=file, flush=True)
            found = _judged(case, rank, ranks)
            if rank == 0:
                print(json.dumps(found), file=file, flush=True)
    if ranks > 1:
        dist.barrier()
        os._exit(0)  # the end of a process group is not what is tried here


if __name__ == "__main__":
    main()
