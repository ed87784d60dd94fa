"""Part `bench`: bench_clip.py and bench_step.py on this device, with all their peers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from gpu_parts.worker import ROOT, Worker, serve

BEHIND = 12  # ms
RUNS = [  # in order of value
    ("step", "llama1b", "bf16", BEHIND),
    ("clip", "llama1b", "bf16", BEHIND),
    ("step", "lora400", "bf16", BEHIND),
    ("clip", "lora400", "bf16", BEHIND),
    ("clip", "lora400", "bf16", 0),
    ("step", "llama1b", "fp32", BEHIND),
    ("clip", "llama1b", "fp32", BEHIND),
]


def bench(w: Worker) -> None:
    """Each in a process of its own; the tables go to bench.md and bench.json."""
    reports: dict[str, Any] = {}
    texts = []
    for theme, name, dtype, backlog in RUNS[:2] if w.tiny else RUNS:
        full = f"bench_{theme} {name} {dtype}, {f'behind {backlog} ms' if backlog else 'from idle'}"
        if w.late(8):
            w.emit(row=full, note="no time left")
            continue
        out = w.work / full.replace(" ", "_").replace(",", "")
        command = [sys.executable, f"scripts/bench_{theme}.py", "--out", str(out), "--dtype", dtype]
        command += ["--backlog", str(backlog)]
        command += ["--tiny", "--repeats", "2"] if w.tiny else ["--device", "cuda", "--workload", name]
        with w.row(full):
            began = time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=w.left())
            print(done.stdout[-20_000:], done.stderr[-3_000:])
            if done.returncode:
                raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-1:]))
            reports[full] = json.loads(next(out.glob("*.json")).read_text("utf-8"))
            texts.append(next(out.glob("*.md")).read_text("utf-8"))
            w.emit(row=full, seconds=time.monotonic() - began)
            for table in reports[full]["tables"]:
                _emit(w, table)
        (w.out / "bench.json").write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
        (w.out / "bench.md").write_text("\n\n".join(texts) + "\n", "utf-8")


def _emit(w: Worker, table: dict[str, Any]) -> None:
    for row in table["rows"]:
        if row["median_ms"] is not None:
            w.emit(row=f"  {table['case']}: {row['row']}", ms=row["median_ms"], x_torch=row["times_torch"] or 0.0,
                   per_read=row["per_read"] or 0.0, note=row["note"])  # fmt: skip
        elif row["group"] == "ours":
            w.emit(row=f"  {table['case']}: {row['row']}", FAILED=row["note"])


if __name__ == "__main__":
    serve(bench)
