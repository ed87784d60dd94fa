"""The Trainer on two gloo ranks against one process: its own checkpoints where weights are sharded, tensor parallelism.

FSDP and tensor parallelism are forced on the CPU, and every run asserts that its parameters are sharded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from hf_gradclip import GradClipTrainer
from tests.integrations.ranks import Found, launch
from tests.integrations.sharded import whole_weights
from tests.integrations.trainer_main import CLIPS, LOUD, LOUD_RATE, facts, run
from tests.tiny import VOCAB, logged, tiny_llama

RESUMED_ON_ZERO = ("zero2:zclip", "zero3:adagc")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Any:
    """With an even vocabulary: not every version of transformers halves an odd one."""
    folder = tmp_path_factory.mktemp("split") / "model"
    model = tiny_llama()
    model.resize_token_embeddings(VOCAB + 1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_dtensors(saved_model) -> list[Found]:
    words = [f"tensor_parallel:{word}" for word in LOUD] + [f"resume:fsdp2:{word}" for word in CLIPS]
    words += ["events:ddp", "events:fsdp2", "judged:ddp"]
    return launch(2, "trainer_main", saved_model.parent, *words)


@pytest.fixture(scope="module")
def on_zero(tmp_path_factory) -> list[Found]:
    words = [f"resume:{word}" for word in RESUMED_ON_ZERO] + ["events:zero2", "judged:zero2"]
    return launch(2, "trainer_main", tmp_path_factory.mktemp("zero"), *words)


@cache
def one_process(word: str) -> dict[str, Any]:
    """The clipped run of one process, in which steps past the warm-up clip and do not, which changes the weights."""
    found = facts(run(GradClipTrainer, tiny_llama(), clip=CLIPS[word]))
    free = run(Trainer, tiny_llama(), max_grad_norm=0)
    assert min(found["rates"][2:5]) < max(found["rates"][2:])
    assert (found["weights"] - whole_weights(free.model)).abs().max() > 1e-3
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert (found["weights"] - expected["weights"]).abs().max() < 1e-6
    assert found["rates"] == expected["rates"]


def assert_resumed(found: dict[str, Any], word: str) -> None:
    whole, again = found["whole"], found["again"]
    assert_same(whole, one_process(word))
    assert_same(again, one_process(word))
    assert any(again["rates"][:5]), "clipped before the stop"
    assert any(again["rates"][5:]), "and after it"
    assert torch.equal(whole["weights"], again["weights"])
    assert whole["norms"] == again["norms"]
    assert whole["state"].keys() == again["state"].keys()
    assert all(torch.equal(value, again["state"][key]) for key, value in whole["state"].items())
    assert int(whole["state"]["seen"]) == 10
    assert int(found["saved"]["state"]["seen"]) == int(found["first"]["state"]["seen"]) == 5


@pytest.mark.dist
@pytest.mark.parametrize("word", CLIPS)
def test_resume_under_fsdp2(on_dtensors, word) -> None:
    found = on_dtensors[0][f"resume:fsdp2:{word}"]
    assert "DTensor shards on a 2 mesh" in found["again"]["backend"]
    assert_resumed(found, word)


@pytest.mark.deepspeed
@pytest.mark.dist
@pytest.mark.parametrize("words", RESUMED_ON_ZERO)
def test_resume_under_zero(on_zero, words) -> None:
    found = on_zero[0][f"resume:{words}"]
    assert f"ZeRO-{'3' if 'zero3' in words else '1/2'} partitions" in found["again"]["backend"]
    assert_resumed(found, words.split(":")[1])


@pytest.mark.dist
@pytest.mark.parametrize("word", LOUD)
def test_tensor_parallel(on_dtensors, saved_model, word) -> None:
    """global_norm also against the stock Trainer's own clip, in one process."""

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(saved_model)

    found = on_dtensors[0][f"tensor_parallel:{word}"]
    assert "DTensor shards on a 2 mesh" in found["backend"]
    assert_same(found, facts(run(GradClipTrainer, load(), clip=LOUD[word], learning_rate=LOUD_RATE)))
    assert min(found["rates"][2:]) < max(found["rates"][2:])
    limit = 0.95 if word == "global_norm" else 0
    stock = run(Trainer, load(), max_grad_norm=limit, learning_rate=LOUD_RATE)
    apart = (found["weights"] - whole_weights(stock.model)).abs().max()
    if word == "global_norm":
        assert found["norms"] == pytest.approx(logged(stock), rel=1e-6)
        assert apart < 1e-6
    else:
        assert apart > 1e-3, "what it does without clipping"


@pytest.mark.dist
def test_the_judged_loss_is_the_logged_one(on_dtensors) -> None:
    found = on_dtensors[0]["judged:ddp"]
    assert found["judged"] == pytest.approx(found["logged"], rel=1e-3)


@pytest.mark.deepspeed
@pytest.mark.dist
def test_the_judged_loss_is_the_logged_one_under_zero(on_zero, on_dtensors) -> None:
    found = on_zero[0]["judged:zero2"]
    assert found["judged"] == pytest.approx(found["logged"], rel=1e-3)
    assert found["judged"] == pytest.approx(on_dtensors[0]["judged:ddp"]["judged"], rel=1e-5)


def assert_events(ranks: list[Found], name: str) -> None:
    """Both ranks hear of the same steps; what one asks for holds on both; a resumed run goes on with the lower rate."""
    mine, theirs = (rank[f"events:{name}"]["heard"] for rank in ranks)
    told = [(kind, step, before) for kind, step, before, _, _ in mine["events"]]
    assert told == [("on_spike", 5, 4), ("on_spike", 10, 9), ("on_spike", 14, 13)]
    assert [event[:4] for event in theirs["events"]] == [event[:4] for event in mine["events"]]
    for held in (mine, theirs):
        assert all(len(event[4]) == 4 for event in held["events"]), "the examples of this rank"
        assert held["steps"] == 14, "stopped in the step"
        assert held["saved"]
        assert held["skipped"] == 1
    assert {*mine["events"][0][4]}.isdisjoint(theirs["events"][0][4])
    assert torch.equal(mine["weights"], theirs["weights"])

    found = ranks[0][f"events:{name}"]
    assert found["whole"]["norms"] == found["again"]["norms"]
    assert torch.equal(found["whole"]["weights"], found["again"]["weights"])
    assert (found["whole"]["weights"] - found["free"]["weights"]).abs().max() > 1e-3, "the lower rate matters"


@pytest.mark.dist
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_events(on_dtensors, name) -> None:
    assert_events(on_dtensors, name)


@pytest.mark.deepspeed
@pytest.mark.dist
def test_events_under_zero(on_zero) -> None:
    assert_events(on_zero, "zero2")
