"""Two gloo ranks: DDP under the Trainer against the stock Trainer, and a plain loop against one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from hf_gradclip.record.files import read_record
from tests.integrations.ddp_main import LIMIT, NAMES, OPTIMIZERS, SPECS, two_models
from tests.integrations.loops import batches
from tests.integrations.ranks import ACCELERATE, Found, launch
from tests.integrations.recorded import POISON
from tests.tiny import tiny_llama, weights_of

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder) -> list[Found]:
    return launch(2, "ddp_main", folder, *NAMES, by=ACCELERATE)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("clip", [f"global_norm:max_norm={LIMIT}", None])
def test_trains_like_the_stock_trainer(ranks, optim, clip) -> None:
    for result in ranks:
        found = result[f"parity:{optim}"][str(clip)]
        assert found["world"] == 2
        assert found["steps"] == 24
        assert 3 <= found["clipped"] <= 21
        assert found["norm"] < 1e-5
        assert found["weights"] < 1e-5
        assert found["without"] > 1e-4, "clipping matters in this run"
        assert found["agree"]


def test_clipping_is_engaged(ranks) -> None:
    assert all(result["engaged"]["moved"] <= 5 * 0.5e-12 for result in ranks)


def test_a_nan_on_one_rank_is_skipped_on_both(ranks) -> None:
    for result in ranks:
        assert result["nan"]["skipped"] == 2
        assert result["nan"]["finite"]
        assert result["nan"]["agree"]
        assert result["nan"]["clipped"] > 0


def test_a_loss_that_stands_out_on_one_rank_is_skipped_on_both(ranks) -> None:
    for result in ranks:
        assert [step for step, skipped in enumerate(result["loss"]["skipped"]) if skipped] == [14]
        assert result["loss"]["agree"]


def test_replicas_that_come_apart_stop_the_run(ranks) -> None:
    for result in ranks:
        assert "The ranks measured gradient norms that differ by up to" in result["apart:4"]
        assert result["apart:0"] == "trained on"
        assert result["apart:4"].endswith("In step 4.")
        assert result["apart:100:0"].endswith("In step 1."), "the first steps are looked at, whatever check_every says"
        assert result["apart:100:7"].endswith("In step 8."), "and the last one"


def test_a_rank_that_is_out_of_data_is_not_waited_for(ranks) -> None:
    assert [result["uneven"] for result in ranks] == [3, 7]


@pytest.mark.parametrize("asker", ["loss", "on_spike", "after_spike"])
def test_what_asks_all_ranks_is_refused_where_one_may_be_out_of_data(ranks, asker) -> None:
    words = "a strategy that judges the loss" if asker == "loss" else "a handler of events, or after_spike,"
    for result in ranks:
        assert result[f"asked:{asker}"].startswith(f"{words} in model.join(): the ranks ask each other in a step")
        assert result[f"asked:{asker}"].endswith("Give all ranks as many batches (even_batches=True), or leave it out.")


def test_ranks_must_have_one_spec(ranks) -> None:
    for rank, result in enumerate(ranks):
        assert f"Rank {rank} clips 21 segments by {('zclip', 'adagc')[rank]}" in result["specs"]


def test_a_plain_loop_equals_one_process(ranks) -> None:
    """adagc, whose scales differ between tensors, past its warm-up: 20 steps on the same batches."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    clipper = Clipper.for_model(model, "adagc:warmup_steps=4")
    norms = []
    for batch, _ in batches(20):
        model(**batch).loss.backward()
        norms.append(float(clipper.step()))
        optimizer.step()
        optimizer.zero_grad()
    rate = clipper.report.scalars()
    assert 0 < rate["clip/tensor_rate"] < 1
    for result in ranks:
        assert result["loop"]["backend"] == "MULTI_CPU"
        assert result["loop"]["names"] == clipper.state_dict()["names"], "no wrapper prefix in the names"
        torch.testing.assert_close(torch.tensor(result["loop"]["norms"]), torch.tensor(norms), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(result["loop"]["weights"]), weights_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["joint", "each"])
def test_two_models_equal_one_process(ranks, how) -> None:
    """Against torch's own clip, over the chain of both models or of each; some steps clip and some do not."""
    joint = how == "joint"
    (a, b), optimizers, x = two_models(joint)
    limits = [float(spec.split("=")[1]) for spec in SPECS]
    norms = [[], []]
    for step in range(12):
        (b(a(x)).square().mean() * (3.0 if step % 3 == 0 else 0.3)).backward()
        parts = [[*a.parameters(), *b.parameters()]] if joint else [[*a.parameters()], [*b.parameters()]]
        for part, limit, found in zip(parts, limits, norms, strict=False):
            found.append(float(torch.nn.utils.clip_grad_norm_(part, limit)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for model in (a, b) for p in model.parameters()])
    keys = ["clip"] if joint else ["clip_Sequential", "clip_Sequential_2"]
    for key, found, limit in zip(keys, norms, limits, strict=False):
        rate = sum(norm > limit for norm in found) / 12
        assert 0 < rate < 1
        for result in ranks:
            scalars = result[f"several:{how}"]["scalars"]
            assert scalars[f"{key}/rate"] == pytest.approx(rate)
            assert scalars[f"{key}/norm_mean"] == pytest.approx(sum(found) / 12)
    for result in ranks:
        assert result[f"several:{how}"]["backend"] == "DistributedDataParallel"
        assert (torch.tensor(result[f"several:{how}"]["weights"]) - weights).abs().max() < 1e-6


def test_the_loss_that_one_of_two_models_is_judged_by_is_that_of_all_ranks(ranks) -> None:
    assert [result["judged"] for result in ranks] == [[10], [10]]


def test_the_record_has_the_mean_over_ranks(ranks, folder) -> None:
    record = read_record(folder / "recorded")
    assert record.step_T.tolist() == [*range(1, 61)]
    assert record.meta["world"] == 2
    for result in ranks:
        np.testing.assert_allclose(record.loss_T.reshape(10, 6).mean(1), result["recorded"]["loss"], rtol=1e-6)
        np.testing.assert_allclose(record.norm_T[5::6], result["recorded"]["norm"], rtol=1e-6)


def test_a_spike_names_the_poisoned_example_on_the_rank_that_held_it(ranks, folder) -> None:
    held = {rank: [step for step in result["recorded"]["poisoned"] if step > 25] for rank, result in enumerate(ranks)}
    assert held[0] or held[1]
    for step in {*held[0], *held[1]}:
        for rank, name in enumerate((f"step_{step}.json", f"step_{step}_rank1.json")):
            spike = json.loads((folder / "recorded" / "gradclip" / "spikes" / name).read_text())
            assert spike["rank"] == rank
            assert len(spike["examples"]) == 2, "two micro-batches of one example"
            assert bool(set(spike["examples"]) & set(POISON)) == (step in held[rank])


def test_a_full_disk_on_one_rank_does_not_hold_up_the_other(ranks) -> None:
    for result in ranks:
        assert result["full"]["steps"] == 60
        assert result["full"]["loss"] == result["recorded"]["loss"]
