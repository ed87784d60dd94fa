"""A replay does what the clipper did, and what the equations say, with the norms of a record."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gradclip.analysis.ready import READY, ready_of
from hf_gradclip.analysis.replay import difference, outcome_of, replay, strategy_for_replay
from hf_gradclip.analysis.suggest import misses, suggest
from hf_gradclip.cli import main
from hf_gradclip.strategy import SpecError
from hf_gradclip.types import Layout, NormStats
from tests.analysis.records import norms_of, record_by_hand, recorded, save
from tests.strategies.past import Past

SPECS = (
    "adaptive_norm",
    "adaptive_tensors",
    "zclip:warmup_steps=10",
    "adagc:warmup_steps=10,max_norm=0.6",
    "autoclip:percentile=80",
    "global_norm:max_norm=0.6",
    "param_norm:max_norm=0.3",
    "block_rms:max_rms=0.03",
    "soft:max_norm=1",
    "adagc:warmup_steps=10,mode=reference+global_norm:max_norm=0.6",
    "skip_step:window=30,min_values=10",
    "embed*=global_norm:max_norm=0.3;layers*=adagc:warmup_steps=10,max_norm=0.6;*=zclip:warmup_steps=10",
    "mean_sigma:window=20,min_values=5,sigmas=1",
    "percentile:percentile=60",
    "normalize",
    "normalize_paper",
)


@pytest.mark.parametrize("spec", SPECS)
def test_the_recorded_strategy_gives_the_recorded_scales(spec, tmp_path) -> None:
    record = recorded(spec, tmp_path)
    assert not record.finite_T[33]
    found = replay(record, strategy_for_replay(spec))
    assert difference(record, found) < 1e-6
    assert 0 < found.clipped_T.sum() < len(record) or spec.startswith(("soft", "normalize"))
    np.testing.assert_array_equal(found.skipped_T[record.finite_T], record.skipped_T[record.finite_T])
    np.testing.assert_allclose(found.threshold_T[record.finite_T], record.threshold_T[record.finite_T], rtol=1e-9)


def test_parameters_without_a_gradient(tmp_path) -> None:
    """A zero norm has no scale: the record says 1, the coefficient of the whole may be anything."""
    norms = norms_of()
    norms[::3, 2] = 0.0
    record = recorded("global_norm:max_norm=0.5", tmp_path, norms)
    assert (record.scale_TP[::3, 2] == 1).all()
    assert difference(record, replay(record, strategy_for_replay("global_norm:max_norm=0.5"))) < 1e-6


def test_another_strategy_than_the_recorded_one_differs(tmp_path) -> None:
    record = recorded("global_norm:max_norm=0.6", tmp_path)
    assert difference(record, replay(record, strategy_for_replay("global_norm:max_norm=0.59"))) > 1e-3


def test_zclip_by_its_equations() -> None:
    """25 steps in which what stands out is brought to the median; then z > 2.5 to mu + 2.5^2 sigma / z. In float64."""
    norms = norms_of()
    norms[[5, 18]] *= 20
    record = record_by_hand(norms)
    totals, mean, var, scales, early, past = record.norm_T, 0.0, 0.0, [], [], Past()
    for norm in totals:
        if len(early) < 25:
            cap, _ = past(norm)
            early.append(min(norm, cap))
            scales.append(early[-1] / norm)
            mean, var = float(np.mean(early)), float(np.var(early))
            continue
        sigma = max(var**0.5, 0.05 * mean)
        z = (norm - mean) / sigma
        kept = mean + 2.5**2 * sigma / z if z > 2.5 else norm
        scales.append(kept / norm)
        old, mean = mean, 0.97 * mean + 0.03 * kept
        var = 0.97 * var + 0.03 * (kept - old) * (kept - mean)
    found = replay(record, strategy_for_replay("zclip"))
    np.testing.assert_allclose(found.scale_TP[:, 0], scales, rtol=1e-9)
    assert found.clipped_T[[5, 18, 60, 90]].all()
    assert found.clipped_T[:25].sum() == 2


def test_the_numbers_of_an_outcome() -> None:
    """global_norm at 1: both spikes are caught, nothing else is touched."""
    record = record_by_hand(norms_of())
    outcome = outcome_of(record, replay(record, strategy_for_replay("1.0")), "1.0")
    assert (outcome.spikes, outcome.caught, outcome.false_alarms) == (2, 2, 0)
    assert outcome.rate == pytest.approx(2 / 120)
    expected = np.minimum(1, 1 / (record.norm_T + 1e-6)).mean()
    assert outcome.mean_scale == pytest.approx(expected, rel=1e-6)
    assert outcome.thresholds == (1.0, 1.0, 1.0)

    tight = outcome_of(record, replay(record, strategy_for_replay("0.01")), "0.01")
    assert (tight.caught, tight.false_alarms, tight.rate) == (2, 118, 1.0)
    by_tensor = outcome_of(record, replay(record, strategy_for_replay("adagc")), "adagc")
    assert by_tensor.thresholds is None


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("value:max_value=1", "value cannot be replayed: it bounds single elements"),
        ("ada_clip", "ada_clip cannot be replayed: it bounds single elements"),
        ("relative_value:factor=9", "relative_value cannot be replayed: it bounds single elements"),
        ("agc", "agc cannot be replayed: it needs the norms of units"),
        ("global_norm:norm_type=inf", "global_norm cannot be replayed: it needs the largest elements"),
        ("zclip+value:max_value=1", "value cannot be replayed"),
        ("embed*=agc;*=zclip", "agc cannot be replayed"),
        ("nonsense", "no strategy or preset is called"),
    ],
)
def test_what_norms_cannot_tell_is_refused_by_name(spec, reason) -> None:
    with pytest.raises(SpecError, match=reason):
        strategy_for_replay(spec)


def test_a_loss_is_used_where_there_is_one_and_missed_where_there_is_none(tmp_path) -> None:
    spec = "skip_step:window=30,min_values=10,on=loss"
    record = recorded(spec, tmp_path, loss=2.0)
    assert difference(record, replay(record, strategy_for_replay(spec))) < 1e-6
    blind = record_by_hand(norms_of(), loss_T=np.full(120, np.nan))
    with pytest.raises(SpecError, match="judges the loss, and this record has none"):
        replay(blind, strategy_for_replay(spec))


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_a_suggestion_clips_about_the_wanted_share(rate) -> None:
    record = record_by_hand(norms_of(400))
    found = limit, percentile, z = suggest(record, rate)
    assert limit.spec == f"global_norm:max_norm={np.quantile(record.norm_T, 1 - rate):.4g}"
    assert limit.rate == pytest.approx(rate, abs=0.01)
    assert z.rate == pytest.approx(rate, abs=0.02)
    assert percentile.rate == pytest.approx(rate, abs=0.02)
    assert misses(found, rate, 400) == []


def test_a_share_that_cannot_be_reached_is_said() -> None:
    """Norms that fall from 30 to 1: none but the two spikes is above zclip's moving mean, whatever its threshold."""
    record = record_by_hand(norms_of(200) * np.geomspace(30, 1, 200)[:, None])
    found = limit, _, z = suggest(record, 0.05)
    assert limit.rate == pytest.approx(0.05, abs=0.01)
    assert z.rate == 2 / 200
    said = misses(found, 0.05, 200)
    assert said[-1].startswith(f"zclip comes no nearer than {z.rate:.1%} with these norms")
    assert not any(sentence.startswith("global_norm") for sentence in said)


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.05), (5, 0.05), (9, 0.05), (30, 0.001), (120, 0.001)])
def test_a_run_that_is_too_short_for_a_share_says_so(steps, rate) -> None:
    found = suggest(record_by_hand(norms_of()[:steps]), rate)
    assert 0.1 <= float(found[2].spec.partition("z_threshold=")[2]) <= 10
    assert 0 < float(found[1].spec.partition("percentile=")[2]) <= 100
    near = [outcome for outcome in found if rate / 4 < abs(outcome.rate - rate) < 1 / steps]
    assert near
    said = misses(near, rate, steps)
    assert all(f"one step of {steps} is {1 / steps:.1%}. Record a longer run" in sentence for sentence in said)


def test_norms_that_are_alike_are_said_to_be_clipped_together() -> None:
    norms = np.full((100, 4), 0.5)
    (said, *_) = misses(suggest(record_by_hand(norms), 0.05), 0.05, 100)
    assert said.startswith("global_norm comes no nearer than 100.0%")
    assert "alike" in said
    assert "warms up" not in said


@pytest.mark.parametrize("rate", [0.0, 1.0, -1.0, 5.0])
def test_a_rate_that_is_no_share_is_refused(rate) -> None:
    with pytest.raises(ValueError, match="must be a share between 0 and 1"):
        suggest(record_by_hand(norms_of()), rate)


def test_a_suggestion_for_a_long_run_is_what_its_replay_says_and_comes_after_few_replays(monkeypatch) -> None:
    """1000 steps of 40 tensors, and as many steps of a strategy for a replay. Halving the whole range takes 24."""
    from hf_gradclip.strategies.autoclip import AutoClip
    from hf_gradclip.strategies.zclip import ZClip

    rng = np.random.default_rng(0)
    norms = 0.3 * np.exp(0.3 * rng.standard_normal((1000, 40))) * np.exp(0.3 * rng.standard_normal((1000, 1)))
    record = record_by_hand(norms)
    sizes = []

    def counted(update):
        def call(self, stats, state):
            sizes.append(len(stats.layout))
            return update(self, stats, state)

        return call

    for kind in (AutoClip, ZClip):
        monkeypatch.setattr(kind, "update", counted(kind.update))
    found = suggest(record, 0.05)
    assert len(sizes) <= 12 * 1000
    assert set(sizes) == {1}, "they go by the norm of the whole"
    for outcome in found:
        assert outcome.rate == pytest.approx(0.05, abs=0.0011), outcome.spec
        again = outcome_of(record, replay(record, strategy_for_replay(outcome.spec)), outcome.spec)
        assert again.rate == outcome.rate
        assert again.mean_scale == pytest.approx(outcome.mean_scale, rel=1e-5)
        assert (again.spikes, again.caught, again.false_alarms) == (
            outcome.spikes,
            outcome.caught,
            outcome.false_alarms,
        )


@pytest.mark.parametrize("spec", ["global_norm:max_norm=0.6", "param_norm:max_norm=0.3", "soft:max_norm=2", "none"])
def test_steps_that_are_judged_at_once_are_judged_alike(spec) -> None:
    """By a strategy that remembers nothing: what it says of each step by itself, of a run with NaN and a zero norm."""
    norms = norms_of()
    norms[33, 1], norms[40] = np.nan, 0.0
    record = record_by_hand(norms)
    strategy = strategy_for_replay(spec)
    layout = Layout.of_parameters(record.names, record.numel_P.tolist(), torch.device("cpu"))
    found = replay(record, strategy)
    for t in range(len(record)):
        if t == 33:
            assert (found.scale_TP[t] == 1).all()
            continue
        sumsq_P = torch.from_numpy(record.norm_TP[t].astype(np.float64)) ** 2
        plan, _ = strategy.update(NormStats(sumsq_P, layout), strategy.init(layout))
        np.testing.assert_allclose(found.scale_TP[t], plan.scale_S.expand(4).numpy(), rtol=1e-6)
        assert plan.threshold is None or found.threshold_T[t] == float(plan.threshold)
    assert found.clipped_T.any() == (spec != "none")


class TestReady:
    def test_each_is_what_a_replay_finds(self) -> None:
        norms = norms_of(300)
        record = record_by_hand(norms, np.where(np.arange(300) % 9 == 0, 0.5, 1.0)[:, None] * np.ones((1, 4)))
        found = ready_of(record)
        assert [outcome.spec for outcome in found.outcomes] == ["as recorded", *READY]
        assert found.outcomes[0].rate == pytest.approx(34 / 300)
        for outcome in (*found.outcomes[1:], *found.fixed[::7]):
            again = outcome_of(record, replay(record, strategy_for_replay(outcome.spec)), outcome.spec)
            assert again.rate == outcome.rate
            assert again.mean_scale == pytest.approx(outcome.mean_scale, rel=1e-5)
            assert (again.caught, again.false_alarms) == (outcome.caught, outcome.false_alarms)

    @pytest.mark.parametrize("level", [1.0, 1e-3, 1e6])
    def test_thresholds_lie_where_they_change_something(self, level) -> None:
        """From all steps to none, one step in 20 among them, and no two neighbours far apart."""
        rates = [outcome.rate for outcome in ready_of(record_by_hand(norms_of(300) * level)).fixed]
        assert (rates[0], rates[-1]) == (1.0, 0.0)
        assert rates == sorted(rates, reverse=True)
        assert max(np.diff(rates[::-1])) <= 0.12
        assert min(abs(rate - 0.05) for rate in rates) < 0.01

    def test_nothing_finite_is_no_replay(self) -> None:
        assert ready_of(record_by_hand(np.full((5, 4), np.nan))) is None

    def test_a_long_run_has_fixed_thresholds_alone(self, monkeypatch) -> None:
        monkeypatch.setattr("hf_gradclip.analysis.ready.MOST_STEPS", 100)
        found = ready_of(record_by_hand(norms_of(120)))
        assert found.replays == ()
        assert len(found.fixed) > 20


def test_the_picture_goes_into_a_folder_or_a_file(tmp_path, capsys) -> None:
    save(record_by_hand(norms_of()), tmp_path / "run")
    (tmp_path / "there").mkdir()
    for out, file in (("there", "there/replay.png"), ("new", "new/replay.png"), ("x.png", "x.png"), ("x.svg", "x.svg")):
        assert main(["replay", str(tmp_path / "run"), "--clip", "zclip", "--out", str(tmp_path / out)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / file)
        assert (tmp_path / file).stat().st_size > 1000
