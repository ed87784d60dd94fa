"""A gradient whose square is none in float32 is left out like a NaN, where nothing makes it smaller.

Which is one is worked out in float64 from the gradient and the rule of the strategy; the optimizers are torch's.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hf_gradclip import Clipper, optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.decision import judge_on_device
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.run.spikes import SpikeWatch
from hf_gradclip.state import flatten

ROOT = float(np.sqrt(np.float64(np.finfo(np.float32).max)))


class Pair(nn.Module):
    """A matrix and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.deep = nn.Parameter(torch.ones(3, 4, dtype=dtype))
        self.flat = nn.Parameter(torch.ones(5, dtype=dtype))

    def set(self, element: float) -> None:
        """Gradients of 0.1, but for one element of the matrix."""
        for p in self.parameters():
            p.grad = torch.full_like(p, 0.1)
        self.deep.grad[1, 2] = element


@pytest.fixture(params=["on the host", "on the device"])
def judged(request, monkeypatch):
    if request.param == "on the device":
        monkeypatch.setattr("hf_gradclip.clipper.judge", lambda *given: judge_on_device(*given[:3], *given[4:]))


def run(clipper: Clipper, model: nn.Module, optimizer: torch.optim.Optimizer, elements: list[float]) -> list[bool]:
    """Of each step whether a weight moved; weights and moments are finite after every one."""
    moved = []
    for element in elements:
        before = [p.detach().clone() for p in model.parameters()]
        model.set(element)
        clipper.step()
        optimizer.step()
        moved.append(not all(map(torch.equal, before, model.parameters())))
        kept = [value for state in optimizer.state.values() for value in state.values()]
        assert all(bool(value.isfinite().all()) for value in [*kept, *model.parameters()])
    return moved


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("spec", ["none", "autoclip", "skip_step", "adaptive_norm", "zclip:max_norm=inf", "percentile"])
def test_in_step_1_it_reaches_no_moment(spec) -> None:
    """And nothing of it is remembered: the state is that of a strategy that never saw it."""
    model, other = Pair(), Pair()
    clipper, unseen = Clipper.for_model(model, spec), Clipper.for_model(other, spec)
    moved = run(clipper, model, torch.optim.AdamW(model.parameters(), lr=1e-2), [1e30, 0.2, 0.3])
    assert run(unseen, other, torch.optim.AdamW(other.parameters(), lr=1e-2), [0.2, 0.3]) == [True, True]
    assert moved == [False, True, True]
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, flatten(clipper.state).values(), flatten(unseen.state).values()))
    counts = clipper.report.summary()
    assert (counts["steps"], counts["skipped"], counts["nonfinite"]) == (3, 1, 1)
    assert counts["norm_max"] < 1


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("spec", ["global_norm:max_norm", "param_norm:max_norm", "value:max_value", "soft:max_norm"])
def test_what_makes_it_small_enough_clips_as_ever(spec) -> None:
    model = Pair()
    clipper = Clipper.for_model(model, f"{spec}=1")
    assert run(clipper, model, torch.optim.AdamW(model.parameters(), lr=1e-2), [1e30, 0.2]) == [True, True]
    assert clipper.report.summary()["nonfinite"] == 0
    assert clipper.report.summary()["clipped"] >= 1


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("share", [0.9, 1.1])
@pytest.mark.parametrize(
    ("spec", "after"),
    [
        ("none", lambda x: math.hypot(x, 0.4)),
        ("global_norm:max_norm={limit}", lambda x: x),
        ("param_norm:max_norm={limit}", lambda x: x),
        ("value:max_value={limit}", lambda x: x * math.sqrt(17)),  # the most that 17 elements below it can be
    ],
)
def test_where_it_begins(spec, after, share) -> None:
    """The norm after clipping against the root of float32's largest number, in float64."""
    model = Pair()
    x = share * ROOT / (math.sqrt(17) if spec.startswith("value") else 1)
    clipper = Clipper.for_model(model, spec.format(limit=repr(x)))
    model.set(float(np.float32(x)) if spec == "none" else 1e30)
    if spec.startswith("value"):
        for p in model.parameters():
            p.grad.fill_(1e30)
    clipper.step()
    assert clipper.step_was_skipped == (after(x) > ROOT)


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("spec", ["value:max_value=1", "deep=value:max_value=1;*=none"])
def test_a_parameter_without_elements_has_a_norm(spec) -> None:
    """Of 0, whatever bounds it: a sound step is made."""
    model = Pair()
    model.empty = nn.Parameter(torch.ones(0))
    clipper = Clipper.for_model(model, spec)
    assert run(clipper, model, torch.optim.AdamW(model.parameters(), lr=1e-2), [0.2, 3.0, 0.3]) == [True] * 3
    assert [clipper.report.summary()[key] for key in ("clipped", "skipped", "nonfinite")] == [1, 0, 0]


@pytest.mark.usefixtures("judged")
def test_the_policies(caplog) -> None:
    caplog.set_level(logging.WARNING, logger="hf_gradclip")
    model = Pair()
    model.set(1e30)
    Clipper.for_model(model, "none", nonfinite="pass").step()
    assert float(model.deep.grad[1, 2]) == float(np.float32(1e30)), "as it came"
    with pytest.raises(NonFiniteError, match=r"norm is 1\.0\d*e\+30 in step 1.*more than the float32 of a"):
        Clipper.for_model(model, "none", nonfinite="raise").step()
    clipper = Clipper.for_model(model, "none", max_consecutive_skips=3)
    with pytest.raises(NonFiniteError, match="Step 3: 3 steps in a row"):  # noqa: PT012
        for _ in range(9):
            model.set(1e30)
            clipper.step()
    assert "step 1 is skipped, its norm is 1e+30. Its square is more than the float32 of a second moment" in caplog.text


@pytest.mark.usefixtures("judged")
def test_where_squares_overflow_it_is_still_a_number(monkeypatch) -> None:
    """A device that adds up squares in float32 says inf first; what is said in the end is the norm."""
    model, told = Pair(), []
    clipper = Clipper.for_model(model, "none", nonfinite="raise", on_nonfinite=told.append)
    measure = clipper.view.measure

    def in_float32(needs, rescale=False):
        stats = measure(needs, rescale)
        return stats if rescale else replace(stats, sumsq_S=stats.sumsq_S.float().double())

    monkeypatch.setattr(clipper.view, "measure", in_float32)
    model.set(1e30)
    with pytest.raises(NonFiniteError, match=r"norm is 1\.0\d*e\+30 in step 1.*more than the float32 of a"):
        clipper.step()
    assert [event.norm for event in told] == [pytest.approx(1e30)]
    model.set(math.inf)
    with pytest.raises(NonFiniteError, match=r"norm is inf in step 2.*Not finite: deep"):
        clipper.step()


def test_a_record_judges_no_later_norm_by_it(tmp_path) -> None:
    """What the coming norms of the run are judged by is what it is in a run without these steps."""
    sound, watched = np.random.default_rng(0).uniform(0.1, 3, 40).tolist(), []
    for elements in (sound, [*sound[:20], *[1e30] * 15, *sound[20:]]):
        model = Pair()
        clipper = Clipper.for_model(model, "none")
        clipper.recorder = Recorder()
        for element in elements:
            model.set(element)
            clipper.step()
        watched.append(SpikeWatch(tmp_path, 0, None))
        watched[-1].look(clipper.recorder.drain(), clipper.view.layout.names)
    assert watched[0].norms == watched[1].norms
    assert max(watched[1].norms) < 4


@pytest.mark.usefixtures("judged")
def test_a_strategy_that_skips_it_has_skipped_it() -> None:
    """It keeps its own count of such steps, and what it learns from them."""
    model = Pair()
    clipper = Clipper.for_model(model, "skip_step")
    moved = run(clipper, model, torch.optim.AdamW(model.parameters(), lr=1e-2), [0.2, 0.2, 0.2, 0.2, 1e30, 0.2])
    assert moved == [True] * 4 + [False, True]
    assert clipper.report.summary()["nonfinite"] == 0
    assert int(clipper.state.norms_seen) == 6


def test_in_float64_the_square_is_one() -> None:
    model = Pair(torch.float64)
    clipper = Clipper.for_model(model, "none")
    assert run(clipper, model, torch.optim.AdamW(model.parameters(), lr=1e-2), [1e30, 0.2]) == [True, True]
    assert not clipper.report.summary()["nonfinite"]


def test_under_a_scaler_it_is_torchs_affair() -> None:
    """Nobody but the scaler leaves a step out there, and to it a finite gradient is none to leave out."""
    model, scaler = Pair(), torch.amp.GradScaler("cpu")
    clipper = Clipper.for_model(model, "none", scaler=scaler)
    model.set(1e30)
    clipper.step()
    assert not clipper.step_was_skipped
    assert model.deep.grad is not None


@pytest.mark.parametrize("unread", [False, True])
def test_optimizers_that_clip_by_themselves(unread) -> None:
    model = Pair()
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, clip={"gradient": "none", "skip_sync": not unread})
    before = [p.detach().clone() for p in model.parameters()]
    model.set(1e30)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    model.set(0.2)
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert all(bool(value.isfinite().all()) for value in kept)
    assert optimizer.clipper.report.summary()["skipped"] == 1


def test_an_update_has_no_square() -> None:
    """It is clipped, or made, as it is: no moment is made of it."""
    model = Pair()
    optimizer = optim.SGD(model.parameters(), lr=1e-31, update_clip="none")
    model.set(1e30)
    optimizer.step()
    assert float(model.deep.detach()[1, 2]) == pytest.approx(0.9, rel=1e-6)
    assert optimizer.update_clipper.report.summary()["skipped"] == 0


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize("tiny", [1e-30, 1e-40, 1e-45])
def test_a_factor_without_a_limit_stays_a_number(tiny) -> None:
    """Of the smallest gradients: 1 / norm where float32 has that number, else the largest that it has."""
    model = Pair()
    clipper = Clipper.for_model(model, "normalize_paper")
    for p in model.parameters():
        p.grad = torch.full_like(p, tiny)
    clipper.step()
    smallest = float(np.float32(tiny))
    for p in model.parameters():
        factor = min(1 / (smallest * math.sqrt(p.numel())), float(np.finfo(np.float32).max))
        np.testing.assert_allclose(p.grad.numpy(), smallest * factor, rtol=1e-5)
    assert clipper.report.summary()["nonfinite"] == 0
