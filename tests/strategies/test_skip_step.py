"""`skip_step` against its rule in float64, and what a skip does and does not do."""

from __future__ import annotations

import io
import math
from collections import deque

import numpy as np
import pytest
import torch

from hf_gradclip import ClipConfig, Clipper
from hf_gradclip.preview import preview
from hf_gradclip.state import flatten
from hf_gradclip.strategy import SpecError
from tests.strategies.past import Past
from tests.strategies.sequence import NAN, SPIKES, TENSOR_SPIKES, Tiny, gradients, norm_of, set_gradients


class Judge:
    """Skip a value above mean + sigmas * deviation of the last `window` finite ones, this one not among them.

    Norms of 0 are not among them either.

    Before `min_values` are known a norm is skipped that stands out by the rule of `adaptive_norm`, three times in a row
    at most; a loss is not. The first two values in a row that are skipped are remembered as the limit they broke.
    """

    def __init__(self, window=128, sigmas=6.0, min_values=64, min_sigma=0.05, log=False, loss=False) -> None:
        self.sigmas, self.min_values, self.min_sigma, self.log = sigmas, min_values, min_sigma, log
        self.values: deque[float] = deque(maxlen=window)
        self.past = None if loss else Past()

    def __call__(self, value: float, row: int) -> bool:
        """Whether to skip, after `row` steps in a row that were skipped."""
        limit = math.inf
        if self.past is not None:
            _, begin = self.past(value)
            if row < 3:
                limit = math.log(begin) if self.log else begin
        if self.log:
            value = math.log(value) if value > 0 else -math.inf
        if len(self.values) >= self.min_values:
            mean, sigma = np.mean(self.values), np.std(self.values, ddof=1)
            limit = mean + self.sigmas * max(sigma, self.min_sigma * (1.0 if self.log else abs(mean)))
        if math.isfinite(value) and (value != 0 or self.log or self.past is None):
            self.values.append(value if row >= 2 else min(value, limit))
        return not value <= limit


def skips(spec, run, norm_rule=None, loss_rule=None, losses=None) -> list[int]:
    """The steps left out, each as the rules say. A step that is not left out keeps its gradients bit for bit."""
    model = Tiny()
    clipper = Clipper.for_model(model, spec, max_consecutive_skips=1000)
    skipped, row = [], 0
    for step, grads in enumerate(run):
        set_gradients(model, grads)
        before = {key: value.clone() for key, value in flatten(clipper.state).items()}
        loss = None if losses is None else torch.tensor(losses[step], dtype=torch.float64)
        clipper.step(loss)
        norm = norm_of({name: np.float64(g) for name, g in grads.items() if g is not None})
        if math.isfinite(norm):
            judged = [rule(v, row) for rule, v in ((norm_rule, norm), (loss_rule, losses and losses[step])) if rule]
            assert clipper.step_was_skipped == any(judged), step
            row = row + 1 if any(judged) else 0
            if any(judged):
                skipped.append(step)
        else:
            assert clipper.step_was_skipped, step
            assert all(torch.equal(before[key], value) for key, value in flatten(clipper.state).items()), step
        for name, parameter in model.named_parameters():
            if clipper.step_was_skipped or grads[name] is None:
                assert parameter.grad is None, (step, name)
            else:
                np.testing.assert_array_equal(parameter.grad.numpy(), grads[name])
    return skipped


def norms(values) -> list[dict[str, np.ndarray]]:
    """Gradients with these norms."""
    one = {name: np.zeros(tuple(p.shape), dtype=np.float32) for name, p in Tiny().named_parameters()}
    return [{**one, "bias": np.array([v, 0, 0, 0, 0], dtype=np.float32)} for v in values]


def spiked(steps: int = 255) -> list[dict[str, np.ndarray]]:
    """Noise, NaN steps, a x2 shift at 100, and a few spikes."""
    run = gradients(steps, quiet=True)
    for step in {30, 80, 150, 151, 250} & set(range(steps)):
        run[step] = {name: 10 * g for name, g in run[step].items()}
    return run


def test_default():
    """128, 6 sigma, 64 values: the spike at 30 stands out before there are 64, that at 151 comes after another."""
    assert skips("skip_step", spiked(), Judge()) == [30, 80, 150, 151, 250]


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("window=8,min_values=4", Judge(window=8, min_values=4)),
        ("window=30,min_values=30,sigmas=3", Judge(window=30, min_values=30, sigmas=3)),
        ("min_values=2,sigmas=2", Judge(min_values=2, sigmas=2)),
        ("min_sigma=0,sigmas=4,window=20,min_values=20", Judge(min_sigma=0, sigmas=4, window=20, min_values=20)),
        ("min_sigma=0.5,window=10,min_values=10", Judge(min_sigma=0.5, window=10, min_values=10)),
        ("log_norm=true,window=20,min_values=10,sigmas=4", Judge(log=True, window=20, min_values=10, sigmas=4)),
        (
            "log_norm=true,min_sigma=0.2,window=20,min_values=10",
            Judge(log=True, min_sigma=0.2, window=20, min_values=10),
        ),
    ],
)
def test_other_fields(spec, rule):
    assert 0 < len(skips(f"skip_step:{spec}", gradients(steps=250), rule)) < 60


def losses_of(steps: int) -> list[float]:
    """About 2, two spikes, two NaN and an inf; the spikes are where the norm has none."""
    rng = np.random.default_rng(5)
    losses = [2 + 0.1 * rng.standard_normal() for _ in range(steps)]
    losses[50] = losses[90] = 9.0
    losses[20] = losses[92] = math.nan
    losses[110] = math.inf
    return losses


def test_on_the_loss():
    losses = losses_of(160)
    rule = Judge(min_values=40, loss=True)
    skipped = skips("skip_step:on=loss,min_values=40", gradients(), loss_rule=rule, losses=losses)
    assert skipped == [20, 50, 90, 92, 110], "a NaN loss skips with a finite norm, also before there is a limit"


def test_on_both():
    losses = losses_of(160)
    rules = {"norm_rule": Judge(min_values=30), "loss_rule": Judge(min_values=30, loss=True)}
    skipped = skips("skip_step:on=both,min_values=30", gradients(), losses=losses, **rules)
    assert skipped == sorted({20, 50, 90, 92, 110, *SPIKES, *TENSOR_SPIKES}), "by the loss, and by the norm"


def test_a_missing_loss_says_what_to_call():
    model = Tiny()
    clipper = Clipper.for_model(model, "skip_step:on=loss")
    set_gradients(model, gradients(1)[0])
    with pytest.raises(ValueError, match=r"judges the loss: call clipper\.step\(loss=loss\)"):
        clipper.step()


@pytest.mark.parametrize(
    ("step", "value", "skipped"),
    [
        (1, 1000.0, []),  # two norms must be known
        (2, 7.9, []),
        (2, 8.1, [2]),
        (15, 7.9, []),
        (16, 7.9, [16]),
        (16, 2.9, []),
        (63, 3.1, [63]),
        (63, 2.9, []),
        (64, 1.4, [64]),
    ],
)
def test_before_64_values_what_stands_out_is_skipped(step, value, skipped):
    """From the third norm eight medians stand out, from the 17th three; after 64 norms of 1 the limit is 1.3."""
    assert skips("skip_step", norms([*[1.0] * step, value, *[1.0] * 40]), Judge()) == skipped


def test_before_64_values_three_in_a_row_are_skipped_at_most():
    """A new level: three of four steps are skipped until it is the median."""
    skipped = skips("skip_step", norms([*noisy(20), *(50 * v for v in noisy(100))]), Judge())
    assert skipped == [step for step in range(20, 40) if step % 4 != 3]


def test_no_loss_is_skipped_before_64_values():
    losses = [2 + 0.01 * (step % 3) for step in range(140)]
    losses[50] = losses[63] = 1000.0
    run = norms([1.0] * 140)
    assert skips("skip_step:on=loss", run, loss_rule=Judge(loss=True), losses=losses) == []
    losses[50], losses[63], losses[100] = 2.0, 2.0, 1000.0
    assert skips("skip_step:on=loss", run, loss_rule=Judge(loss=True), losses=losses) == [100]


@pytest.mark.parametrize("spec", ["skip_step", "skip_step:log_norm=true"])
def test_a_loud_step_does_not_let_the_next_one_pass(spec):
    """It is remembered as the limit that it broke."""
    values = noisy(200)
    for step, factor in {10: 100, 40: 30, 120: 30, 121: 30, 170: 30}.items():
        values[step] *= factor
    assert skips(spec, norms(values), Judge(log="log" in spec)) == [10, 40, 120, 121, 170]


@pytest.mark.parametrize(("value", "skipped"), [(1.29, []), (1.31, [100])])
def test_constant_values_have_a_deviation_of_five_percent(value, skipped):
    assert skips("skip_step", norms([*[1.0] * 100, value, *[1.0] * 10]), Judge()) == skipped


def test_zero_norms_have_no_logarithm_and_are_left_out_of_the_window():
    run = norms([*[1.0] * 70, 0.0, 0.0, 50.0, 1.0])
    assert skips("skip_step:log_norm=true", run, Judge(log=True)) == [72]


def noisy(steps: int) -> list[float]:
    rng = np.random.default_rng(2)
    return [float(v) for v in 1 + 0.05 * rng.standard_normal(steps)]


@pytest.mark.parametrize("spike", [3.0, 1e3, 1e12])
def test_a_spike_is_skipped_exactly_once(spike):
    """The steps after it go on."""
    assert skips("skip_step", norms([*noisy(150), spike, *noisy(100)]), Judge()) == [150]


@pytest.mark.parametrize("start", [64, 200])
@pytest.mark.parametrize("factor", [2.0, 10.0, 1e4])
def test_a_lasting_change_of_level_is_accepted(start, factor):
    """After fewer steps than max_consecutive_skips, whose default is 20, would bear."""
    values = [*noisy(start), *(factor * v for v in noisy(100))]
    skipped = skips("skip_step", norms(values), Judge())
    assert skipped[0] == start
    assert skipped[-1] < start + 10
    assert 1 <= len(skipped) < ClipConfig.parse("none").max_consecutive_skips / 2


def test_a_skip_moves_nothing():
    """No weight, no moment, no decay, no counter."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    clipper = Clipper.for_model(model, "skip_step:window=8,min_values=4")
    seen = []
    for value in [1.0] * 10 + [9.0] + [1.0] * 3:
        before = [t.clone() for t in (*model.parameters(), *state_of(optimizer))]
        set_gradients(model, norms([value])[0])
        clipper.step()
        optimizer.step()
        after = [*model.parameters(), *state_of(optimizer)]
        seen.append(len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    assert seen == [False] * 10 + [True] + [False] * 3
    assert clipper.report.summary()["skipped"] == 1


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value for entry in optimizer.state.values() for value in entry.values()]


@pytest.mark.parametrize("on", ["norm", "both"])
def test_the_window_survives_a_checkpoint(on):
    """80 and 80 steps are 160; a fresh window would skip nothing for 64 steps more."""
    spec, run, losses = f"skip_step:on={on}", spiked(160), losses_of(160)

    def go(model, clipper, first, last):
        done = []
        for step in range(first, last):
            set_gradients(model, run[step])
            clipper.step(torch.tensor(losses[step]))
            done.append(clipper.step_was_skipped)
        return done

    model = Tiny()
    whole = Clipper.for_model(model, spec)
    wanted = go(model, whole, 0, 160)
    first = Clipper.for_model(model, spec)
    done = go(model, first, 0, 80)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Clipper.for_model(model, spec)
    assert second.load_state_dict(torch.load(file, weights_only=True)) == ""
    assert done + go(model, second, 80, 160) == wanted
    assert sum(wanted[80:]) > len(set(NAN) - set(range(80))), "more than the NaN steps"
    assert all(torch.equal(value, flatten(second.state)[key]) for key, value in flatten(whole.state).items())


def test_with_a_clip_after_it():
    """The spikes are skipped and the rest is clipped."""
    model = Tiny()
    clipper = Clipper.for_model(model, "skip_step:window=20,min_values=10+global_norm:max_norm=1")
    done = []
    for value in [0.9] * 15 + [1.1, 0.9, 50.0, 0.9, 1.1]:
        set_gradients(model, norms([value])[0])
        clipper.step()
        done.append(None if model.bias.grad is None else round(model.bias.grad.norm().item(), 4))
    assert done == [0.9] * 15 + [1.0, 0.9, None, 0.9, 1.0]


@pytest.mark.parametrize("spec", ["skip_step", "skip_step:on=loss", "zclip+skip_step"])
def test_refused_for_an_update(spec):
    with pytest.raises(SpecError, match=r"update=skip_step.*moments have moved.*Put skip_step under 'gradient'"):
        ClipConfig.parse({"gradient": "none", "update": spec})


@pytest.mark.parametrize("log_norm", ["true", "false"])
def test_norms_of_zero_do_not_lock_it_up(log_norm):
    """As of batches that are masked as a whole: what is learnt between them is not skipped, and a loud step is."""
    strategy = ClipConfig.parse(f"skip_step:log_norm={log_norm}").gradient
    sparse = [0.0] * 64 + [1.0, 0.0] * 80
    assert preview(strategy, sparse) == sparse
    assert preview(strategy, [*sparse, 50.0])[-1] is None
