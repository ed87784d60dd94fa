"""Everything that is worth knowing of this package on one GPU, in one command and at most nine minutes.

    python scripts/gpu_check.py --out gpu_check
    python scripts/gpu_check.py --out gpu_check --only counts,sweep --minutes 3
    python scripts/gpu_check.py --out rehearsal --cpu-rehearsal      every part, tiny, without a GPU

The package need not be installed. Each part is a process of its own with a time box, so that a crash, a hang or an
illegal address in one costs the others nothing; what a part has found by then is kept, line by line. The parts, in
order of value:

| part | what |
|---|---|
| `env` | versions, and what memory, launches and copies cost on this device |
| `pytest` | the tests that are marked `gpu` |
| `counts` | where a step waits for the device, and what it launches |
| `timings` | clips and steps, from idle and behind a backlog, as multiples of the measured ceiling |
| `share` | the share of clipping in a step of a model of 1B |
| `job` | scripts/finetune.py in bf16, fp16, fp32, with LoRA, with our optimizer, under FSDP2 |
| `bench` | bench_step.py and bench_clip.py |
| `sweep` | tile sizes and arithmetic of the kernels |
| `ncu` | hardware counters |

Six files are written: check.txt (all lines), check.json, check.log (what the parts printed), pytest_gpu.xml, bench.md
and bench.json. What is printed last fits in 12,000 characters. The exit status is 1 if a part or a row failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gpu_parts.headline import Found, failed, headline, summary

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
LEAST = 12  # seconds, for which no part is begun
SPARE = 10  # seconds that ending a part may take


class Part(NamedTuple):
    """A module, and the seconds that it may take at most."""

    module: str
    seconds: float


PARTS = {
    "env": Part("gpu_parts.ceilings", 45),
    "pytest": Part("gpu_parts.marked_tests", 150),
    "counts": Part("gpu_parts.counts", 75),
    "timings": Part("gpu_parts.timings", 90),
    "share": Part("gpu_parts.share", 60),
    "job": Part("gpu_parts.job", 120),
    "bench": Part("gpu_parts.bench", 110),
    "sweep": Part("gpu_parts.sweep", 75),
    "ncu": Part("gpu_parts.counters", 45),
}


def bounded(command: Sequence[str], limit: float, printed: Path, env: dict[str, str]) -> int:
    """Run a command in a process group of its own.

    Args:
        command: the words.
        limit: seconds; then all of the group are ended.
        printed: the file for what it prints.
        env: its environment.

    Returns:
        Its exit status, 124 if its time was up.
    """
    with printed.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            for sent, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 5)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience)
            return 124


def environment(work: Path, rehearsal: bool) -> dict[str, str]:
    """For the parts: they find the package and each other, and nothing asks the network."""
    paths = [str(ROOT), str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(work / "triton"))}
    if rehearsal:
        env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **env}


def commit() -> str:
    """What is checked; `COMMIT` says it where there is no git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return os.environ.get("COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return "unknown"


def check(out: Path, names: Sequence[str], minutes: float, rehearsal: bool) -> Found:
    """Run these parts one after another, and write down what they find; also what is printed last."""
    start = time.monotonic()
    end = start + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    found: Found = {"commit": commit(), "rehearsal": rehearsal, "parts": {}}
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check_") as folder,
        (out / "check.log").open("w", encoding="utf-8") as log,
    ):
        work = Path(folder)
        for name in names:
            left, began = end - SPARE - time.monotonic(), time.monotonic()
            if left < LEAST:
                found["parts"][name] = {"status": "no time left", "seconds": 0.0, "lines": []}
                continue
            lines, printed = work / f"{name}.jsonl", work / f"{name}.log"
            limit = min(PARTS[name].seconds, left)
            command = [sys.executable, "-m", PARTS[name].module, "--limit", f"{limit:.0f}", "--out", str(out.resolve())]
            command += ["--lines", str(lines), "--work", folder, *["--cpu-rehearsal"] * rehearsal]
            status = bounded(command, limit, printed, environment(work, rehearsal))
            took = round(time.monotonic() - began, 1)
            found["parts"][name] = {
                "status": {0: "ok", 124: "time box"}.get(status, f"exit {status}"),
                "seconds": took,
                "lines": [json.loads(line) for line in _whole_lines(lines)],
            }
            text = printed.read_text("utf-8", errors="replace")
            if status:
                found["parts"][name]["said"] = " ".join(text.strip().splitlines()[-1:])[-300:]
            words = f"{name}: {found['parts'][name]['status']}"
            log.write(f"\n==== {words}, {took} s\n{text[-400_000:]}\n")
            log.flush()
            print(f"[{time.monotonic() - start:5.0f} s] {words} ({took} s)", flush=True)
            (out / "check.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            (out / "check.txt").write_text(summary(found), "utf-8")
    print(headline(found))
    return found


def _whole_lines(path: Path) -> list[str]:
    """Without one that was being written when the process ended."""
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    return text.split("\n")[:-1]


def main(argv: Sequence[str] | None = None) -> Found:
    """Read the command line and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")), help="A folder.")
    parser.add_argument("--minutes", type=float, default=9.0, help="For everything.")
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, by comma.")
    parser.add_argument("--skip", default="", help="Parts, by comma.")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="Every part, tiny, without a GPU.")
    args = parser.parse_args(argv)
    asked, left_out = args.only.split(","), list(filter(None, args.skip.split(",")))
    if unknown := sorted({*asked, *left_out} - {*PARTS}):
        parser.error(f"{', '.join(unknown)}: no such part. There are {', '.join(PARTS)}.")
    names = [name for name in PARTS if name in asked and name not in left_out]
    return check(args.out, names, args.minutes, args.cpu_rehearsal)


if __name__ == "__main__":
    sys.exit(bool(failed(main())))
