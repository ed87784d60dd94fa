"""A decision as a CUDA graph, on a tape, which like a graph runs the operations it saw on the memory it saw.

Every number must be that of the same operations launched one by one, for every strategy and for the report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gradclip import ClipConfig, Clipper
from hf_gradclip.kernels import graphed
from hf_gradclip.kernels.graphed import CALLS_BEFORE, Graphed
from hf_gradclip.spec import strategy_names
from hf_gradclip.strategy import Strategy, flatten
from tests.strategies.sequence import Tiny, gradients, set_gradients
from tests.strategies.test_contract import short

SPECS: dict[str, Any] = {name: short(name) for name in strategy_names()} | {
    "chain": "adagc:warmup_steps=3+zclip:warmup_steps=3,z_threshold=0.5+value:max_value=0.2",
    "units": "agc:clip_factor=0.1,eps=1,include_1d=true+global_norm:max_norm=0.5",
    "pass": {"gradient": "zclip:warmup_steps=3", "nonfinite": "pass"},
}
STEPS = 120


class Tape(TorchDispatchMode):
    """Records operations with their tensors; `replay` runs them again and writes what they give over what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(("_local_scalar_dense", "lift_fresh", "nonzero")):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            if not any(out.alias_info for out in func._schema.returns):  # neither a view nor in place
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    old.copy_(new)


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """A tape in the place of a CUDA graph; grows by one in every replay."""
    seen: list[int] = []

    def capture(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        function()
        with Tape() as tape:
            result = function()
        for tensor in graphed.leaves(result):
            if tensor.dtype.is_floating_point and tensor._base is None:
                tensor.fill_(float("nan"))  # the operations of a capture do not run
        return lambda: (seen.append(1), tape.replay()), result

    monkeypatch.setattr(graphed, "capture", capture)
    monkeypatch.setattr(graphed, "_captures", lambda device: True)
    return seen


def run(spec: Any, asked: str, monkeypatch, load_at: int | None = None) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Every gradient, norm and state of a run, and what was logged."""
    monkeypatch.setenv(graphed.VARIABLE, asked)
    model = Tiny()
    clipper = Clipper.for_model(model, spec, max_consecutive_skips=100)
    seen, logs = [], []
    for step, grads in enumerate(gradients(STEPS)):
        set_gradients(model, grads)
        seen.append(clipper.step(torch.tensor(2.0 + step % 5)))
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        seen += flatten(clipper.state).values()
        if step % 10 == 9:
            logs.append(clipper.report.scalars())
        if step == load_at:
            clipper.load_state_dict(clipper.state_dict())
    logs.append(clipper.report.summary())
    return seen, logs


@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_as_one_by_one(name, monkeypatch, replays) -> None:
    spec = SPECS[name] if not isinstance(SPECS[name], Strategy) else ClipConfig(SPECS[name])
    plain, logged = run(spec, "0", monkeypatch)
    assert replays == []
    found, said = run(spec, "1", monkeypatch, load_at=50)
    assert len(replays) > 1.8 * (STEPS - 2 * CALLS_BEFORE)  # the decision and the report
    assert len(plain) == len(found)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))
    assert said == logged


def test_a_result_is_not_overwritten_by_the_next(monkeypatch, replays) -> None:
    monkeypatch.setenv(graphed.VARIABLE, "1")
    double = Graphed(lambda x: {"twice": x * 2, "itself": x})
    results = [double(torch.tensor([float(i)])) for i in range(10)]
    assert [(r["twice"].item(), r["itself"].item()) for r in results] == [(2.0 * i, float(i)) for i in range(10)]
    assert len(replays) == 10 - CALLS_BEFORE + 1


def test_made_again_for_other_shapes(monkeypatch, replays) -> None:
    monkeypatch.setenv(graphed.VARIABLE, "1")
    double = Graphed(lambda x: (x * 2,))
    for size in (3, 5):
        for i in range(6):
            assert double(torch.full((size,), float(i)))[0].tolist() == [2.0 * i] * size
    assert len(replays) == 2 * (6 - CALLS_BEFORE + 1)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: (x * float(x.sum()),), "operation not permitted"),
        (lambda x, calls=[0] * CALLS_BEFORE: (x + (calls.pop() if calls else 1),), "other numbers than the function"),
    ],
)
def test_where_it_cannot_be_made_the_function_serves(function, says, monkeypatch, replays, caplog) -> None:
    monkeypatch.setenv(graphed.VARIABLE, "1")
    caplog.set_level(logging.WARNING, logger="hf_gradclip")
    unfit = Graphed(function)
    for _ in range(CALLS_BEFORE):
        assert unfit(torch.ones(2))[0].shape == (2,)
    made = len(replays)
    unfit(torch.ones(2))
    assert len(replays) == made
    assert caplog.text.count("HF_GRADCLIP_GRAPH=1: no CUDA graph of a decision: ") == 1
    assert says in caplog.text


def test_off_by_itself(monkeypatch, replays) -> None:
    monkeypatch.delenv(graphed.VARIABLE, raising=False)
    plain = Graphed(lambda x: x + 1)
    assert [plain(torch.tensor(i)).item() for i in range(6)] == [1, 2, 3, 4, 5, 6]
    assert replays == []


def test_a_word_that_is_no_choice_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(graphed.VARIABLE, "yes")
    with pytest.raises(ValueError, match="HF_GRADCLIP_GRAPH=yes: must be 0 or 1"):
        Graphed(lambda x: x)
