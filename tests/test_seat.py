"""Where a step is judged, and that it is judged alike wherever that is."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_gradclip import Clipper, kernels, optim
from hf_gradclip.device import refuse_capture
from hf_gradclip.kernels import choice
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.report import ClipReport
from hf_gradclip.run import startup
from hf_gradclip.seat import MOST, brought, handed, seen_by
from hf_gradclip.spec import read_strategy
from hf_gradclip.state import flatten
from hf_gradclip.types import ClipPlan, Layout, NormStats
from tests.strategies.sequence import Tiny, gradients, set_gradients
from tests.strategies.test_contract import VARIANTS

DEVICE = "cuda" if torch.backends.cuda.is_built() else "lazy"  # a fake one: nothing is in its memory
LOSS = torch.tensor(2.0)


def layout_of(params: int, units: int = 0) -> Layout:
    """On the fake device; the first parameter has so many units, each other one is one segment."""
    counts = [units or 1] + [1] * (params - 1)
    param_S = torch.arange(params).repeat_interleave(torch.tensor(counts), output_size=sum(counts))
    unit_S = (param_S == 0).to(DEVICE) if units else None
    names = tuple(f"p{i}" for i in range(params))
    return Layout(names, torch.ones_like(param_S).to(DEVICE), param_S.to(DEVICE), unit_S)


@pytest.mark.parametrize(
    ("spec", "params", "units", "where"),
    [
        ("adaptive_norm", 400, 0, "host"),
        ("adaptive_norm", MOST, 0, "host"),
        ("adaptive_norm", MOST + 1, 0, "device"),
        ("adagc", 400, 0, "host"),
        ("agc", 400, 1000, "host"),
        ("agc", 400, MOST, "parts"),
        ("adaptive", 400, MOST, "parts"),
        ("adagc+agc", 400, MOST, "parts"),
        ("adaptive", MOST + 1, MOST, "device"),
        ("agc+adaptive_norm", 400, MOST, "device"),
        ("adaptive_norm+agc+global_norm", 400, MOST, "device"),
    ],
)
def test_where(spec, params, units, where):
    with FakeTensorMode():
        layout, strategy = layout_of(params, units), read_strategy(spec)
        seen = seen_by(strategy, layout, read=True)
        devices = {"host": ("cpu", "cpu"), "parts": (DEVICE, "cpu"), "device": (DEVICE, DEVICE)}[where]
        assert (seen.device.type, seen.by_param.device.type) == devices
        assert seen_by(strategy, layout, read=True) is seen, "one object, by which changes are seen"
        assert seen_by(strategy, layout, read=False) is layout


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, "cpu"),
        ({"nonfinite": "raise"}, "cpu"),
        ({"nonfinite": "pass"}, DEVICE),
        ({"guarded": True}, DEVICE),
    ],
)
@pytest.mark.parametrize("spec", ["adaptive_norm", "skip_step"])
def test_a_step_is_judged_on_the_host_where_it_is_read(spec, settings, where):
    with FakeTensorMode():
        model = torch.nn.Linear(3, 2, device=DEVICE)
        guarded = settings.pop("guarded", False) if (settings := dict(settings)) else False
        scaler = torch.amp.GradScaler("cpu", enabled=True) if guarded else None
        clipper = Clipper.for_model(model, spec, scaler=scaler, **settings)
        wanted = "cpu" if spec == "skip_step" else where  # whose own skips are read
        assert {tensor.device.type for tensor in flatten(clipper.state).values()} == {wanted}


class Seats:
    """Stands in for `seen_by` where everything is on the CPU: twins of the layouts, as if they were elsewhere."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.twins: dict[int, tuple[Layout, Layout]] = {}

    def __call__(self, strategy: object, layout: Layout, read: bool) -> Layout:
        if self.where == "there":
            return layout
        twin = replace(layout)
        if self.where == "parts":
            vars(twin)["by_param"] = replace(layout.by_param)
        return self.twins.setdefault(id(layout), (layout, twin))[1]


def trained(monkeypatch, strategy: object, where: str) -> dict[str, object]:
    """What 60 steps leave behind."""
    monkeypatch.setattr("hf_gradclip.clipper.seen_by", Seats(where))
    model = Tiny()
    clipper = Clipper.for_model(model, strategy)
    clipper.recorder = Recorder()
    clipper.recorder.start_after(0)
    norms, left, changed = [], [], False
    for grads in gradients(steps=60):
        set_gradients(model, grads)
        norms.append(clipper.step(LOSS).item())
        for key, p in model.named_parameters():
            left.append(None if p.grad is None else p.grad.clone())
            changed |= p.grad is not None and not np.array_equal(p.grad, grads[key], equal_nan=True)
    rows = clipper.recorder.drain()
    assert (changed or any(rows["skipped"] & rows["finite"])) == (clipper.report.summary()["clipped"] > 0)
    return {"norms": norms, "left": left, "state": flatten(clipper.state), "rows": rows} | clipper.report.scalars()


@pytest.mark.parametrize("where", ["host", "parts"])
@pytest.mark.parametrize("spec", list(VARIANTS))
def test_what_is_brought_is_judged_as_it_was(monkeypatch, spec, where):
    there, brought_ = (trained(monkeypatch, VARIANTS[spec], place) for place in ("there", where))
    assert there.keys() == brought_.keys()
    for key, value in there.items():
        other = brought_[key]
        if key == "left":
            for a, b in zip(value, other, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
        elif key == "state":
            assert value.keys() == other.keys()
            assert all(torch.equal(value[name], other[name]) for name in value)
        elif key == "rows":
            for name, column in value.items():
                np.testing.assert_array_equal(column, other[name], err_msg=name)
        else:
            assert value == pytest.approx(other, rel=1e-12, nan_ok=True), key


def test_everything_that_was_measured_is_brought():
    layout = Layout.of_parameters(("a", "b"), [2, 3], torch.device("cpu"))
    numbers = [torch.rand(2, dtype=torch.float64) for _ in range(3)]
    stats = NormStats(numbers[0], layout, numbers[1], torch.tensor(3.0, dtype=torch.float64), numbers[2])
    there = brought(read_strategy("none"), stats, replace(layout))
    assert torch.equal(there.sumsq_S, numbers[0])
    assert torch.equal(there.max_abs_S, numbers[1])
    assert torch.equal(there.weight_sumsq_S, numbers[2])
    assert there.loss.shape == ()
    assert float(there.loss) == 3.0


def test_a_plan_is_handed_over_where_the_gradients_are(monkeypatch):
    """Vectors are uploaded, one number for all is left to whoever launches."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode():
        device = torch.device(DEVICE)
        vector, number = torch.ones(3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        plan = handed(ClipPlan(vector, bound_S=vector), device)
        assert (plan.scale_S.device.type, plan.bound_S.device.type) == (DEVICE, DEVICE)
        assert handed(ClipPlan(number), device).scale_S is number


def test_what_only_the_device_knows_is_counted_when_the_report_is_read():
    """Two tensors of four are clipped in every third step, of which every second one is skipped."""
    layout = Layout.of_parameters(tuple("abcd"), [1] * 4, torch.device("cpu"))
    report = ClipReport(layout.device, layout.dtype)
    for step in range(1200):
        scale_S = torch.tensor([0.5, 1, 1, 0.5] if step % 3 == 0 else [1.0] * 4, dtype=torch.float64)
        stats = NormStats(torch.ones(4, dtype=torch.float64), layout)
        report.add(stats, ClipPlan(scale_S), finite=True, skipped=step % 6 == 0, clipped=None)
    found = report.scalars()
    assert found["clip/rate"] == pytest.approx(400 / 1200)
    assert found["clip/tensor_rate"] == pytest.approx(2 * 200 / 4 / 1200)
    assert found["clip/skipped"] == 200


def test_ranks_that_measure_or_judge_otherwise_do_not_start(monkeypatch):
    """What the ranks compare before the first step; of two that differ, each raises."""
    sent: list[int] = []
    monkeypatch.setattr(startup, "world_size", lambda: 2)
    monkeypatch.setattr(startup.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(startup.dist, "all_reduce", lambda ends, op: sent.append(int(ends[0])))

    def number(spec: str = "adaptive", **settings: object) -> int:
        choice.forget()
        startup.insist_on_one_layout(Clipper.for_model(torch.nn.Linear(3, 2), spec, **settings), torch.device("cpu"))
        return sent.pop()

    kinds = {"now": number(), "policy": number(nonfinite="raise"), "spec": number("adaptive_norm")}
    assert number() == kinds["now"]
    with monkeypatch.context() as patch:
        patch.setenv(choice.VARIABLE, "eager")
        kinds["language"] = number()
    choice.forget()
    with monkeypatch.context() as patch:
        elsewhere = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        elsewhere.by_param = SimpleNamespace(device=torch.device("cpu"))
        patch.setattr(Clipper, "seen", lambda clipper, layout: layout)
        clipper = Clipper.for_model(torch.nn.Linear(3, 2), "adaptive")
        patch.setattr(Clipper, "seen", lambda clipper, layout: elsewhere)
        startup.insist_on_one_layout(clipper, torch.device("cpu"))
        kinds["seat"] = sent.pop()
    assert len({*kinds.values()}) == (5 if choice.compiled() else 4), kinds
    monkeypatch.setattr(startup.dist, "all_reduce", lambda ends, op: ends[1].add_(1))
    with pytest.raises(RuntimeError, match=r"with kernels in \w+, and another rank something else"):
        number()


@pytest.mark.parametrize("what", ["Clipping", "optimizer.step()"])
def test_a_step_in_a_captured_graph_is_refused(monkeypatch, what):
    """Nothing of it would change from one replay to the next."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=re.escape(f"{what} in a CUDA graph: a capture would freeze")):
        refuse_capture(what, torch.device("cuda"))
    asked = []
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for place in ("hf_gradclip.views.view", "hf_gradclip.optim.step"):
        monkeypatch.setattr(f"{place}.refuse_capture", lambda call, device: asked.append((call, device.type)))
    Clipper.for_model(model, "none").step() if what == "Clipping" else optim.AdamW(model.parameters()).step()
    assert asked == [(what, "cpu")]


@pytest.mark.parametrize(("gradient", "measures"), [([math.nan, 1.0], 1), ([math.inf, 1.0], 2), ([1e30, 1.0], 1)])
def test_a_nan_is_not_measured_again(gradient, measures):
    """Squares that overflow give inf, and only a NaN gives NaN; the kernels' own squares do not overflow."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([gradient])
    clipper, asked = Clipper.for_model(model, "global_norm:max_norm=1"), []
    real = clipper.view.here.measure
    clipper.view.here.measure = lambda needs, rescale: asked.append(rescale) or real(needs, rescale)
    clipper.step()
    if kernels.squares_overflow(torch.device("cpu")) and gradient[0] == 1e30:
        measures = 2
    assert asked == [False, True][:measures]
    assert clipper.step_was_skipped == (not math.isfinite(gradient[0]))


def test_a_record_says_of_an_infinite_norm_that_nothing_was_scaled():
    model = torch.nn.Linear(3, 2)
    clipper = Clipper.for_model(model, "adaptive_norm")
    clipper.recorder = Recorder()
    clipper.recorder.start_after(0)
    for loud in (1.0, math.inf, math.nan, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, loud)
        clipper.step()
    rows = clipper.recorder.drain()
    assert rows["finite"].tolist() == [True, False, False, True]
    assert (rows["scales"] == 1).all()


JUDGE = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from hf_gradclip.seat import MOST
from hf_gradclip.spec import read_strategy
from hf_gradclip.state import flatten
from hf_gradclip.types import Layout, NormStats
layout = Layout.of_parameters(tuple(map(str, range(MOST))), [1] * MOST, torch.device("cpu"))
seen = hashlib.sha256()
for spec in ("adaptive_norm", "adagc", "zclip", "adaptive_tensors"):
    strategy, numbers = read_strategy(spec), torch.Generator().manual_seed(0)
    state = strategy.init(layout)
    for step in range(8):
        sumsq_S = torch.rand(MOST, dtype=torch.float64, generator=numbers) * (50.0 if step == 6 else 1.0)
        plan, state = strategy.update(NormStats(sumsq_S, layout), state)
        seen.update(plan.scale_S.numpy().tobytes())
    for value in flatten(state).values():
        seen.update(value.numpy().tobytes())
print(seen.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    found = {
        subprocess.run([sys.executable, "-c", JUDGE, str(n)], capture_output=True, text=True, check=True).stdout
        for n in (1, 2, 5)
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == hashlib.sha256().digest_size * 2
