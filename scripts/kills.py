"""Runs that are killed at twenty points each, and resumed: do they end as the run that was not?

    python scripts/kills.py --out benchmarks/reliability_kills_cpu.md
    python scripts/kills.py --backend ddp --only 3 10
    python scripts/kills.py --backend finetune.py "finetune.py, ddp"

A small Trainer run with a record, which adapts its clip and clips some steps and not others, is killed by SIGKILL in a
step, while a checkpoint is written, and while the record is: see kills_parts/points.py. Where there are two ranks five
of the points kill one of them alone; the other must end by itself within 60 seconds, with words. The run is then
started again with nothing said: it must find its newest whole checkpoint (or begin anew, where there is none), end bit
for bit as the run that was not killed (weights, moments, clip state), and its record must have every step once, with
the same numbers. The Trainer is one of a few lines, or that of `finetune.py --resume_from_checkpoint true`.

Processes are forked from one that has imported everything. The exit status is 1 if anything was not right.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

BACKENDS = {"one process": 1, "ddp": 2, "zero2": 2, "finetune.py": 1, "finetune.py, ddp": 2}
LIMIT = 60.0
"""Seconds in which a rank must end after another one died."""
LONGEST = 600.0
"""Seconds of a whole run."""


def launched(folder: Path, backend: str, point: Any) -> tuple[list[int], float, str]:
    """Fork the ranks of a run and wait for them: their exit codes, how long the last one outlived the first, what was
    said."""
    ranks = BACKENDS[backend]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.with_suffix(".log")
    pids = [folder / f"pid.{rank}" for rank in range(ranks)]
    children = {}
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            _inside(folder, backend, point, rank, ranks, port, log, pids)
        pids[rank].write_text(str(child), "utf-8")
        children[child] = rank
    codes, began, first = [0] * ranks, time.monotonic(), None
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
                first = first or time.monotonic()
        late = first is not None and time.monotonic() - first > LIMIT
        if children and (late or time.monotonic() - began > LONGEST):
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return codes, time.monotonic() - (first or began), log.read_text("utf-8", "replace")


def _inside(
    folder: Path, backend: str, point: Any, rank: int, ranks: int, port: int, log: Path, pids: Sequence[Path]
) -> None:
    """What a forked process does; it never returns."""
    code = 1
    try:
        file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
        while not all(path.exists() and path.read_text("utf-8") for path in pids):
            time.sleep(0.01)
        points: Any = importlib.import_module("kills_parts.points")
        run: Any = importlib.import_module("kills_parts.run")
        killer = None if point is None else points.Killer(point, rank, ranks, pids)
        run.train(folder, backend, killer)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def share_clipped(folder: Path) -> float:
    """Of the steps of a recorded run."""
    record = importlib.import_module("hf_gradclip.record.files").read_record(folder)
    return float((record.scale_TP < 1).any(1).mean())


def compared(folder: Path, wanted: Path, ranks: int) -> list[str]:
    """In words what a run came to that the one that was not killed did not."""
    torch: Any = importlib.import_module("torch")
    files: Any = importlib.import_module("hf_gradclip.record.files")
    words = []
    for rank in range(ranks):
        if not (folder / f"final.{rank}.pt").exists():  # finetune.py, or its last checkpoint was of its last step
            words += _unlike(folder, wanted)
            break
        mine, theirs = (torch.load(path / f"final.{rank}.pt", weights_only=True) for path in (folder, wanted))
        for key in ("weights", "state"):
            bad = [name for name in theirs[key] if not _same(mine[key][name], theirs[key][name])]
            words += [f"rank {rank}: {key} {bad[0]} differs"] if bad else []
        if not all(map(_same, mine["moments"], theirs["moments"])):
            words.append(f"rank {rank}: a moment differs")
    mine, theirs = (files.read_record(path) for path in (folder, wanted))
    if mine.step_T.tolist() != theirs.step_T.tolist():
        words.append(f"the record has the steps {mine.step_T.tolist()}")
    elif not all((getattr(mine, key) == getattr(theirs, key)).all() for key in ("norm_T", "norm_TP", "scale_TP")):
        words.append("the record has other numbers")
    return words


def _unlike(folder: Path, wanted: Path) -> list[str]:
    """Which files of tensors in the last checkpoint, or of the model beside it, have other bytes."""
    last = Path(f"checkpoint-{importlib.import_module('kills_parts.points').STEPS}")
    names = [path.relative_to(wanted) for kind in ("*.safetensors", "*.pt") for path in (wanted / last).rglob(kind)]
    names += [path.relative_to(wanted) for path in wanted.glob("*.safetensors")]
    there = [name for name in names if (folder / name).is_file()]
    words = [f"{name} differs" for name in there if (folder / name).read_bytes() != (wanted / name).read_bytes()]
    words += [f"{name} is missing" for name in names if name not in there]
    return words if names else ["there is no file to compare it by"]


def _same(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and ((a == b) | ((a != a) & (b != b))).all())


def tried(backend: str, point: Any, folder: Path, wanted: Path) -> list[str]:
    """Kill a run at a point, resume it, compare it; in words what was not right."""
    ranks = BACKENDS[backend]
    folder.mkdir()
    codes, seconds, said = launched(folder, backend, point)
    words = []
    if -signal.SIGKILL not in codes:
        return [f"was not killed: {codes} {said[-300:]}"]
    if point.alone:
        if codes[0] == -signal.SIGKILL or seconds > LIMIT:
            words.append(f"the other rank did not end within {LIMIT:.0f} s")
        elif "Error" not in said:
            words.append("the other rank ended without a word")
    codes, _, said = launched(folder, backend, None)
    if any(codes):
        return [*words, f"the resumed run ended with {codes}: {' '.join(said.split())[-300:]}"]
    return [*words, *compared(folder, wanted, ranks)]


def main(argv: Sequence[str] | None = None) -> int:
    """Kill runs, print the table; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), help="On these only.")
    parser.add_argument("--only", type=int, nargs="+", help="These points, counted from 0.")
    parser.add_argument("--out", type=Path, help="A file for the table.")
    args = parser.parse_args(argv)
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    points: Any = importlib.import_module("kills_parts.points")
    for name in ("kills_parts.run", "finetune", "tests.tiny", "transformers.trainer", "accelerate", "pyarrow.parquet"):
        importlib.import_module(name)
    if "zero2" in args.backend:
        importlib.import_module("tests.integrations.sharded")
        importlib.import_module("deepspeed")
    lines = ["# Kills", "", "| backend | killed in | seconds | what was not right |", "|---|---|---|---|"]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="kills_") as folder:
        for backend in args.backend:
            wanted = Path(folder, f"{backend} whole")
            wanted.mkdir()
            codes, _, said = launched(wanted, backend, None)
            if any(codes):
                raise RuntimeError(f"{backend}: the run that nobody kills ended with {codes}\n{said[-3000:]}")
            clipped = share_clipped(wanted)
            if not 0 < clipped < 1:
                raise RuntimeError(f"{backend}: the run that nobody kills clips {clipped:.0%} of its steps: all alike.")
            for i, point in enumerate(points.points(BACKENDS[backend])):
                if args.only is not None and i not in args.only:
                    continue
                began = time.monotonic()
                words = tried(backend, point, Path(folder, f"{backend} {i}"), wanted)
                bad += bool(words)
                seconds = time.monotonic() - began
                lines.append(f"| {backend} | {point} | {seconds:.0f} | {'; '.join(words) or 'nothing'} |")
                print(lines[-1], flush=True)
    lines += ["", f"{len(lines) - 4} kills, {bad} of them not right."]
    print(lines[-1])
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
