"""Part `ncu`: hardware counters of our kernels and of torch's fused AdamW, where Nsight Compute can read them."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys

import torch

from gpu_parts.worker import ROOT, Worker, serve
from hf_gradclip import optim

METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
KERNELS = "regex:^(_measure|_scale_and_clamp|_step|finish)$|multi_tensor|lpnorm"
TARGET = "--target"


def counters(w: Worker) -> None:
    """Run this file again under ncu."""
    if shutil.which("ncu") is None or w.tiny:
        w.emit(ncu="not here" if shutil.which("ncu") is None else "not in a rehearsal")
        return
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(METRICS), "-k", KERNELS, "-c", "16", sys.executable, __file__, TARGET]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=w.left())
    print(done.stdout[-20_000:], done.stderr[-3_000:])
    rows = list(csv.reader(line for line in done.stdout.splitlines() if line.startswith('"')))
    if len(rows) < 3:  # names, units, kernels
        w.emit(ncu="no counters", says=" ".join((done.stdout + done.stderr).split())[-300:])
        return
    names = rows[0].index("Kernel Name")
    for row in rows[2:]:
        found = {metric.split(".")[0]: row[rows[0].index(metric)] for metric in METRICS if metric in rows[0]}
        w.emit(row=f"ncu {row[names][:50]}", **found)


def target() -> None:
    """What is looked at: a step of ours, a write of the gradients, torch's step and norm."""
    from hf_gradclip.kernels.triton import whole

    device = torch.device("cuda", 0)
    params = [torch.nn.Parameter(torch.randn(64, 1 << 20, device=device, dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.randn_like(p)
    own = optim.AdamW(params, lr=1e-6, clip="global_norm:max_norm=1", update_clip="block_rms:max_rms=0.1")
    other = torch.optim.AdamW(params, lr=1e-6, fused=True)
    for turn in range(2):
        if turn:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        own.step()
        whole.apply_([p.grad for p in params], torch.tensor(0.5, device=device), None)
        other.step()
        torch.nn.utils.clip_grad_norm_(params[:1], 1e9)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    if TARGET in sys.argv:
        target()
    else:
        serve(counters)
