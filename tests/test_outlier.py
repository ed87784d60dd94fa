"""What stands out, by hf_gradclip.outlier: its definition, and what the strategies make of runs that were made.

A made run is 2,000 norms around 1 from NumPy's random numbers. Steps count from 0 unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import ClipConfig, Clipper, outlier
from hf_gradclip.outlier import judge, nothing_seen, nothing_seen_each
from hf_gradclip.record.spikes import find_spikes
from hf_gradclip.state import flatten
from hf_gradclip.types import Layout, NormStats
from tests.strategies.past import Past

STEPS = 2000
SEEDS = range(6)
SIGMAS = (0.02, 0.1, 0.3)
T = np.arange(STEPS)


def layout_of(segments: int = 1) -> Layout:
    return Layout.of_parameters(tuple(map(str, range(segments))), [1] * segments, torch.device("cpu"))


def scales_of(spec: str, norms: np.ndarray) -> np.ndarray:
    """What a strategy scales norms by, in the shape of them: (steps,), or (steps, tensors); 0 where it skips."""
    strategy = ClipConfig.parse(spec).gradient
    layout = layout_of(1 if norms.ndim == 1 else norms.shape[1])
    state, scales = strategy.init(layout), np.empty(norms.shape)
    for step, row in enumerate(torch.from_numpy(norms.reshape(len(norms), -1))):
        plan, state = strategy.update(NormStats(row.square(), layout), state)
        scales[step] = plan.scale_S if plan.skip is None or not plan.skip else 0.0
    return scales


# The rule.


def odd_norms(steps: int, seed: int) -> np.ndarray:
    """Noise whose spread changes, spikes, a second level, zeros, NaN and inf."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.choice([0.02, 0.3, 1.0], steps) * rng.standard_normal(steps))
    norms[steps // 2 :] *= 20
    norms[rng.random(steps) < 0.05] *= 100
    for odd in (0.0, math.nan, math.inf):
        norms[rng.random(steps) < 0.03] = odd
    return norms


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_is_its_definition(seed):
    """Step by step, from an empty past to one three times as long as the window."""
    past, by_hand = nothing_seen(layout_of()), Past()
    stood_out = 0
    for step, norm in enumerate(odd_norms(200, seed)):
        cap, begin, past = judge(past, torch.tensor(norm, dtype=torch.float64))
        if math.isfinite(norm):
            wanted = by_hand(norm)
        else:  # not shown to anyone, but judged
            m, r = by_hand.ordinary()
            wanted = (math.exp(m) if norm > math.exp(m + r) else math.inf, math.exp(m + r))
        assert (cap.item(), begin.item()) == (pytest.approx(wanted[0], rel=1e-12), pytest.approx(wanted[1], rel=1e-12))
        assert past.seen.item() == len(by_hand.logs), step
        kept = past.logs[past.logs.isfinite()]
        np.testing.assert_allclose(np.sort(kept.numpy()), np.sort(by_hand.logs[-64:]), rtol=1e-15, atol=1e-15)
        stood_out += math.isfinite(wanted[0])
    assert stood_out > 5
    assert len(by_hand.logs) > 150


def test_many_are_judged_as_each_alone():
    norms = np.stack([odd_norms(150, seed) for seed in range(7)], axis=1)
    pasts, alone = nothing_seen_each(layout_of(7)), [nothing_seen(layout_of()) for _ in range(7)]
    for row in torch.from_numpy(norms):
        cap_S, begin_S, pasts = judge(pasts, row)
        for i, norm in enumerate(row):
            cap, begin, alone[i] = judge(alone[i], norm)
            for one, many in ((cap, cap_S[i]), (begin, begin_S[i])):
                assert torch.equal(one, many) or (one.isnan() and many.isnan())
    assert torch.equal(pasts.seen_S, torch.stack([past.seen for past in alone]))
    assert torch.equal(pasts.logs_S, torch.stack([past.logs for past in alone]))


@pytest.mark.parametrize("segments", [None, 5])
def test_on_a_device_as_on_the_cpu(segments):
    """What serves a device is torch, what serves the CPU is NumPy."""
    shape = () if segments is None else (segments,)
    empty = nothing_seen(layout_of()) if segments is None else nothing_seen_each(layout_of(segments))
    on_cpu, on_device = empty, empty
    norms = np.stack([odd_norms(150, seed) for seed in range(segments or 1)], axis=1).reshape(-1, *shape)
    for step, norm in enumerate(torch.from_numpy(norms)):
        cap, begin, on_cpu = judge(on_cpu, norm)
        there = outlier._judge(outlier._Torch, *on_device, norm.log())
        on_device = type(empty)(*there[2:])
        for name, a, b in zip(("cap", "begin", "seen", "logs"), (cap, begin, *on_cpu), there, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=lambda text, at=(step, name): f"{at}: {text}")
    assert int(on_device[0].max()) > 100


def test_a_judgement_changes_nothing_that_it_was_given():
    past, norm = nothing_seen(layout_of()), torch.tensor(2.0, dtype=torch.float64)
    for _ in range(70):
        before = [tensor.clone() for tensor in past]
        *_, new = judge(past, norm)
        assert all(torch.equal(a, b) for a, b in zip(before, past, strict=True))
        assert not torch.equal(new.seen, past.seen)
        past = new


# Made runs.


class Made(NamedTuple):
    """Norms, which of them are loud, and what must hold of (norms, scales, loud)."""

    norms: np.ndarray
    loud: np.ndarray
    check: Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def sound(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    assert (scales[~loud] < 1).mean() <= 0.005


def rises(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    assert (scales[:100] < 1).sum() <= 4
    assert (scales[100:] < 1).mean() <= 0.005


def settles(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    """Clipped in the 40 steps after the shift at 1,000 alone, or hardly."""
    assert (scales[:1000] < 1).mean() <= 0.005
    assert (scales[1040:1060] == 1).all()
    assert (scales[1060:] < 1).mean() <= 0.01


def a_second_kind(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    """What comes in every tenth step is a second kind of batch, which is to be learnt from, and no outlier.

    It is taken for one until it came four times, and where it happens to come less often in a window of 64.
    """
    assert (scales < 1).mean() <= 0.02


def quiet(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    assert (norms * scales)[loud].max() <= 4
    sound(norms, scales, loud)


def early(norms: np.ndarray, scales: np.ndarray, loud: np.ndarray) -> None:
    for step in np.flatnonzero(loud):
        assert norms[step] * scales[step] <= 8 * np.median(norms[:step])
    sound(norms, scales, loud)


def made(seed: int) -> Iterator[tuple[str, Made]]:
    """All runs of one seed, by name."""
    rng = np.random.default_rng(seed)
    none = np.zeros(STEPS, dtype=bool)

    def noise(sigma: float) -> np.ndarray:
        return np.exp(sigma * rng.standard_normal(STEPS))

    def loud(sigma: float, factors: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        norms, where = noise(sigma), none.copy()
        for step, factor in factors.items():
            norms[step] *= factor
            where[step] = True
        return norms, where

    for sigma in (*SIGMAS, 0.6, 1.0):
        yield f"noise {sigma}", Made(noise(sigma), none, sound)
    for sigma in SIGMAS:
        yield f"growth {sigma}", Made(noise(sigma) * np.where(T < 1600, 1, 3 ** ((T - 1600) / 400)), none, sound)
        yield f"decay {sigma}", Made(noise(sigma) * 10 ** (-T / STEPS), none, sound)
        yield f"fall {sigma}", Made(noise(sigma) * (0.2 + 5 * np.exp(-T / 15)), none, sound)
        for first, last in ((1, 30), (16, 40)):
            part = np.clip((T + 1 - first) / (last - first), 0, 1)
            yield f"geometric rise {first} to {last} {sigma}", Made(noise(sigma) * 10**part, none, rises)
            yield f"linear rise {first} to {last} {sigma}", Made(noise(sigma) * (1 + 9 * part), none, rises)
        for factor in (2, 5, 20):
            yield f"level x{factor} {sigma}", Made(noise(sigma) * np.where(T < 1000, 1, factor), none, settles)
        yield f"two kinds {sigma}", Made(noise(sigma) * np.where(rng.random(STEPS) < 0.1, 4, 1), none, a_second_kind)
        places = [*rng.choice(np.arange(100, 1900, 20), 30, replace=False).tolist(), *range(1001, 1011)]
        yield f"spikes {sigma}", Made(*loud(sigma, dict.fromkeys(places, 30)), quiet)
        yield f"early spikes {sigma}", Made(*loud(sigma, {2: 100, 6: 100}), early)
        yield f"loud steps {sigma}", Made(*loud(sigma, {9: 300, 29: 100, 119: 100}), quiet)
    norms, where = noise(1.0), none.copy()
    where[rng.choice(np.arange(30, STEPS), 100, replace=False)] = True
    yield "a hundred medians in norms that spread widely", Made(np.where(where, 100, norms), where, quiet)


MADE = [dict(made(seed)) for seed in SEEDS]


@pytest.fixture(scope="module")
def alongside() -> dict[str, np.ndarray]:
    """The scales of every run by name, shape (seeds, steps): each is one tensor of `adaptive_tensors`, judged alone."""
    norms = np.stack([run.norms for runs in MADE for run in runs.values()], axis=1)
    scales = scales_of("adaptive_tensors", norms).T.reshape(len(MADE), -1, STEPS)
    return {name: scales[:, i] for i, name in enumerate(MADE[0])}


@pytest.mark.parametrize("name", MADE[0])
def test_a_made_run(name, alongside):
    """The first seed by `adaptive_norm`, then all seeds; the two decide alike."""
    run = MADE[0][name]
    scales = scales_of("adaptive_norm", run.norms)
    run.check(run.norms, scales, run.loud)
    np.testing.assert_allclose(scales, alongside[name][0], rtol=1e-12)
    for runs, others in zip(MADE, alongside[name], strict=True):
        runs[name].check(runs[name].norms, others, runs[name].loud)


def test_what_is_clipped_is_brought_to_the_median():
    run = MADE[0]["spikes 0.1"]
    scales = scales_of("adaptive_norm", run.norms)
    steps = np.flatnonzero(run.loud)
    medians = [np.exp(np.median(np.log(run.norms[step - 64 : step]))) for step in steps]
    np.testing.assert_allclose((run.norms * scales)[steps], medians, rtol=1e-12)
    assert (scales[~run.loud] == 1).all()


DISARMED = (
    "adaptive_norm",
    "zclip",
    "autoclip:percentile=10",
    "autoclip:percentile=95",
    "skip_step",
    "skip_step:log_norm=true",
    "adagc",
)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("spec", DISARMED)
def test_one_loud_step_disarms_nothing(spec, sigma):
    """x300 in step 10, counted from 1, then x100 in the steps 30 and 120."""
    for seed in range(3):
        run = MADE[seed][f"loud steps {sigma}"]
        norms, loud = run.norms[:120], run.loud[:120]
        left = norms * scales_of(spec, norms)
        assert loud.sum() == 3
        assert left[loud].max() <= 4


@pytest.mark.parametrize("spec", [spec for spec in DISARMED if spec != "adagc"])
def test_the_threshold_is_where_a_strategy_begins_to_act(spec):
    """What is logged as clip/threshold, before the warm-up has ended and after it."""
    norms = MADE[0]["loud steps 0.3"].norms[:150].copy()
    norms[140] *= 2.5
    strategy, layout = ClipConfig.parse(spec).gradient, layout_of()
    state, acted = strategy.init(layout), 0
    for step, norm in enumerate(torch.from_numpy(norms)):
        plan, state = strategy.update(NormStats(norm.square()[None], layout), state)
        acts = bool(plan.scale_S < 1) if plan.skip is None else bool(plan.skip)
        assert acts == bool(norm.square().sqrt() > plan.threshold), step
        assert spec.startswith("autoclip") or plan.threshold.isinf() == (step < 2), step
        acted += acts
    assert acted >= 3


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize(
    "spec", ["adaptive_norm", "adaptive_tensors", "zclip", "adagc", "autoclip", "autoclip:percentile=95"]
)
def test_the_unit_of_the_norms_does_not_matter(spec, factor):
    """Spikes, a level that doubles at 150 and one that grows from 200 on, in three tensors."""
    rng = np.random.default_rng(3)
    norms = np.exp(0.2 * rng.standard_normal((260, 3))) * [1.0, 0.1, 3.0]
    norms[150:] *= 2
    norms[200:] *= 1.05 ** np.arange(60)[:, None]
    norms[[5, 40, 130]] *= 50
    norms[90, 1] *= 50
    scales = scales_of(spec, norms)
    assert (scales < 1).any(axis=1).sum() >= 3
    np.testing.assert_allclose(scales_of(spec, norms * factor), scales, rtol=1e-12)


@pytest.mark.parametrize("spec", ["adaptive_norm", "adaptive_tensors", "adaptive", "zclip", "autoclip", "adagc"])
def test_nan_and_inf_leave_no_trace(spec):
    """The state after them is that before, to the bit; the first norms of a run among them."""
    model = nn.ParameterDict({name: torch.ones(4, 3) for name in "ab"})
    clipper = Clipper.for_model(model, spec, max_consecutive_skips=1000)
    generator = torch.Generator().manual_seed(0)
    remembered = 0
    for step in range(100):
        for parameter in model.values():
            parameter.grad = torch.randn(4, 3, generator=generator)
        broken = step in (0, 1, 3, 20, 21, 22, 80)
        if broken:
            model["b"].grad[1, 2] = (math.nan, math.inf, -math.inf)[step % 3]
        before = {key: value.clone() for key, value in flatten(clipper.state).items()}
        clipper.step()
        assert clipper.step_was_skipped == broken
        same = all(torch.equal(before[key], value) for key, value in flatten(clipper.state).items())
        assert same == broken, step
        remembered += not broken
    counts = [value for key, value in flatten(clipper.state).items() if key.endswith(("seen", "seen_S"))]
    assert counts[0].flatten()[0] == remembered


def test_spikes_of_a_record_are_what_adaptive_norm_clips():
    rng = np.random.default_rng(1)
    norms = np.exp(rng.choice([0.05, 0.4], STEPS) * rng.standard_normal(STEPS))
    norms[rng.random(STEPS) < 0.03] *= 12
    norms[800:] *= 9
    norms[[3, 40, 1200]] = 0.0
    clipped = np.flatnonzero(scales_of("adaptive_norm", norms) < 1)
    assert 20 < len(clipped) < 200
    assert [spike.row for spike in find_spikes(norms.tolist(), [])] == clipped.tolist()
    later = [spike.row + 1000 for spike in find_spikes(norms[1000:].tolist(), norms[:1000].tolist())]
    assert later == [row for row in clipped.tolist() if row >= 1000]


# Tensors by themselves.


def twenty() -> tuple[nn.ParameterDict, Callable[[int], dict[str, Tensor]]]:
    """A model of 20 tensors, and its gradients step by step; those of `t7` are a millionth of the others."""
    model = nn.ParameterDict({f"t{i}": torch.ones(5, 3) for i in range(20)})

    def gradients(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        grads = {name: torch.randn(5, 3, generator=generator) for name in model}
        grads["t7"] *= 1e-6
        return grads

    return model, gradients


@pytest.mark.parametrize("spec", ["adaptive_tensors", "adaptive_norm"])
def test_a_spike_in_one_tensor_that_the_whole_norm_does_not_show(spec):
    """x1000 in the smallest of 20: brought to its own median, and the others keep every bit."""
    model, gradients = twenty()
    clipper = Clipper.for_model(model, spec)
    seen = []
    for step in range(100):
        grads = gradients(step)
        if step == 90:
            grads["t7"] *= 1000
        for name, parameter in model.items():
            parameter.grad = grads[name].clone()
        clipper.step()
        changed = [name for name, parameter in model.items() if not torch.equal(parameter.grad, grads[name])]
        assert changed == (["t7"] if step == 90 and spec == "adaptive_tensors" else []), step
        if changed:
            median = np.exp(np.median(np.log(seen[-64:])))
            assert model["t7"].grad.double().norm().item() == pytest.approx(median, rel=1e-6)
        seen.append(grads["t7"].double().norm().item())


def test_a_norm_of_zero_says_nothing():
    """A tensor without a gradient in every third step, and in the first five: as if those steps had not been."""
    rng = np.random.default_rng(0)
    norms = np.exp(0.2 * rng.standard_normal((200, 3)))
    norms[[60, 150], 1] *= 50
    norms[120, 2] *= 50
    silent = (np.arange(200) % 3 == 1) | (np.arange(200) < 5)
    norms[silent, 1] = 0.0
    assert norms[[60, 150], 1].min() > 10
    scales = scales_of("adaptive_tensors", norms)
    assert (scales[silent, 1] == 1).all()
    np.testing.assert_allclose(scales[~silent, 1], scales_of("adaptive_norm", norms[~silent, 1]), rtol=1e-12)
    assert np.argwhere(scales < 1).tolist() == [[60, 1], [120, 2], [150, 1]]


@pytest.mark.parametrize(("sigma", "share"), [(0.1, 0), (0.3, 5e-5), (0.6, 2e-4)])
def test_how_often_a_sound_tensor_is_taken_for_an_outlier(sigma, share):
    """Of 400 tensors in 500 steps. Of ten seeds the worst had a share of 0, 2.5e-5 and 9e-5."""
    rng = np.random.default_rng(0)
    scales = scales_of("adaptive_tensors", np.exp(sigma * rng.standard_normal((500, 400))))
    assert (scales < 1).mean() <= share
