"""The count of launches without a GPU: what counts as one is known by hand, and no count depends on how many tensors
there are. In a process of its own, since Triton is an interpreter in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
UNREAD = "AdamW clip=global_norm, skip_sync=False"
BY_ROW = ["agc, record", "adaptive, record"]
"""With more rows than are judged on the host."""
ROWS = ["none", "zclip", "value", "adagc", "agc, record", "AdamW clip=zclip", "AdamW clip=zclip, two groups", UNREAD]

SINGLE = """
import json, torch
from pretend_gpu import CUDA, Gpu

found, numbers = {}, {}
with Gpu() as gpu:
    x = torch.arange(4.0, device=CUDA)
    few = [x, x.double(), x > 1]
    zero = x.new_zeros(())
    for name, call in {
        "view": lambda: x.view(2, 2)[1].t(),
        "empty": lambda: torch.empty_like(x),
        "add": lambda: x + 1,
        "in place": lambda: x.mul_(2),
        "where": lambda: torch.where(x > 1, x, 1.0),
        "stack": lambda: torch.stack([x, x, x]),
        "stack of dtypes": lambda: torch.stack(few),
        "upload": lambda: torch.tensor([1, 2]).to(CUDA),
        "item": lambda: (zero + 7).item(),
        "tolist": lambda: x.tolist(),
        "to the CPU": lambda: (x + 1).cpu().sum(),
    }.items():
        gpu.forget()
        made = call()
        found[name] = [sum(gpu.launches.values()), gpu.reads]
        numbers[name] = made.tolist() if isinstance(made, torch.Tensor) else made
print(json.dumps([found, numbers]))
"""

STEPS = f"""
import json
import count_launches
from torch import nn

def slow(params):
    step, clippers = count_launches.clipping(params, "none")
    def both():
        step()
        return [param.grad.norm() for param in params]
    return both, clippers

found = {{}}
for tensors in (40, 120):
    rows = {{name: make for name, make in count_launches.rows_of(tensors) if name in {ROWS!r}}}
    for name, make in {{**rows, "a norm for each": slow}}.items():
        quiet, loud = count_launches.counts(make, tensors)
        kernels = sum(n for launch, n in loud.launches.items() if launch.startswith("kernel"))
        found.setdefault(name, []).append([quiet.total, loud.total, quiet.reads, quiet.clipped, loud.clipped, kernels])
for tensors in (260, 280):
    for name, make in {{name: make for name, make in count_launches.rows_of(tensors) if name in {BY_ROW!r}}}.items():
        pair = count_launches.counts(make, tensors, count_launches.TALL)
        found.setdefault(f"{{name}} by row", []).append([count.total for count in pair])
print(json.dumps(found))
"""

SAVED = """
import json, torch
from torch import nn
from pretend_gpu import CUDA, Gpu
from hf_gradclip import optim

found = {}
with Gpu() as gpu:
    params = [nn.Parameter(gpu.weight((8, 16))) for _ in range(5)]
    optimizer = optim.AdamW(params, clip={"gradient": "none", "skip_sync": False}, update_clip="zclip")
    for step in range(4):
        for p in params:
            p.grad = None if p is params[0] and step % 2 else gpu.gradient((8, 16))
        gpu.forget()
        optimizer.step()
        found.setdefault("reads", []).append(gpu.reads)
    found["device"] = sorted({entry["step"].device.type for entry in optimizer.state.values()})
    gpu.forget()
    saved = optimizer.state_dict()
    found["to save"] = gpu.reads
    found["saved"] = sorted({entry["step"].device.type for entry in saved["state"].values()})
    found["steps"] = [entry["step"].item() for entry in saved["state"].values()]
    optimizer.load_state_dict(saved)
    for p in params:
        p.grad = gpu.gradient((8, 16))
    gpu.forget()
    optimizer.step()
    found["reads"].append(gpu.reads)
print(json.dumps(found))
"""


def told(script: str) -> Any:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_counts_as_a_launch() -> None:
    found, numbers = told(SINGLE)
    assert found == {
        "view": [0, 0],
        "empty": [0, 0],
        "add": [1, 0],
        "in place": [1, 0],
        "where": [3, 0],  # a comparison, a fill, a where
        "stack": [1, 0],
        "stack of dtypes": [3, 0],
        "upload": [1, 0],
        "item": [2, 1],
        "tolist": [1, 1],
        "to the CPU": [2, 1],  # what the host adds up then is none
    }
    assert numbers["where"] == [1, 2, 4, 6]
    assert numbers["item"] == 7
    assert numbers["to the CPU"] == 16


@pytest.fixture(scope="module")
def steps() -> dict[str, list[list[Any]]]:
    return told(STEPS)


def test_no_count_depends_on_how_many_tensors_there_are(steps) -> None:
    for name in ROWS:
        few, many = steps[name]
        assert few == many, name
        assert 3 <= many[0] < 200
    for name in BY_ROW:
        few, many = steps[f"{name} by row"]
        assert few == many, name
    few, many = steps["a norm for each"]
    assert many[0] - few[0] == 80


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("none", 5),
        ("zclip", 5),
        ("value", 8),
        ("agc, record", 25),
        ("agc, record by row", 25),
        ("adaptive, record by row", 25),
        ("AdamW clip=zclip", 6),
        ("AdamW clip=zclip, two groups", 7),
        (UNREAD, 30),
    ],
)
def test_a_step_takes_few(steps, name, most) -> None:
    _few, many = steps[name]
    assert max(many[:2]) <= most


def test_something_clips_where_it_should(steps) -> None:
    for name in ROWS:
        quiet_launches, loud_launches, reads, quiet, loud, kernels = steps[name][0]
        assert not quiet
        assert loud == (name != "none"), name
        assert (reads == 0) == (name == UNREAD)
        if loud and not name.startswith("AdamW"):
            assert loud_launches > quiet_launches  # it writes
        assert kernels == {"none": 2, "zclip": 3, "adagc": 3, "agc, record": 3}.get(name, 3 + name.endswith("groups"))


def test_counters_of_unread_steps_are_on_the_device_and_saved_of_the_host() -> None:
    """Also where other parameters have a gradient, and after a checkpoint was loaded; saving is one read, and one of
    the states of a clip for each of its numbers."""
    found = told(SAVED)
    assert found["reads"] == [0] * 5
    assert (found["device"], found["saved"]) == (["cuda"], ["cpu"])
    assert found["steps"] == [2, 4, 4, 4, 4]
    assert 1 <= found["to save"] <= 12
