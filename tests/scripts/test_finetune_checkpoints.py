"""Which checkpoint `--resume_from_checkpoint true` goes on from: the newest of which every file is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetune_parts.checkpoints import checkpoint_for, end_of_run, fault_of, keeps_state
from finetune_parts.words import InputError
from safetensors.torch import save_file
from torch import nn

from hf_gradclip.spec import read_strategy, strategy_names

CLIP = "gradclip.pt"


def checkpoint(folder: Path, step: int, clipped: bool = True) -> Path:
    """What a Trainer leaves after `step` steps, in small."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    weights = {"weight": torch.randn(300)}
    save_file(weights, path / "model.safetensors")
    for name in ["optimizer.pt", "scheduler.pt", "rng_state.pth", *([CLIP] if clipped else [])]:
        torch.save(weights, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def cut(path: Path) -> None:
    """Only the first half was written."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    """The file has its length, and zeros where its end should be: what a crash leaves on some disks."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2))


def test_a_whole_checkpoint_has_no_fault(tmp_path) -> None:
    assert fault_of(checkpoint(tmp_path, 10), [CLIP]) is None
    assert fault_of(checkpoint(tmp_path, 9, clipped=False)) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", CLIP, "trainer_state.json"]
)
@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_every_file_is_missed_or_found_cut(tmp_path, name, harm) -> None:
    path = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 5)
    harm(path / name)
    said = str(fault_of(path, [CLIP]))
    assert said.startswith(name)
    assert ("missing" in said) == (harm is Path.unlink)


def test_every_rank_left_its_random_numbers(tmp_path, monkeypatch) -> None:
    """As in an older checkpoint of as many ranks; the first one, and a job of fewer ranks, are not asked for more."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step, ranks in ((5, 4), (10, 2), (15, 1)):
        path = checkpoint(tmp_path, step)
        (path / "rng_state.pth").unlink()
        for rank in range(ranks):
            torch.save({}, path / f"rng_state_{rank}.pth")
    found = [fault_of(tmp_path / f"checkpoint-{step}") for step in (5, 10, 15)]
    assert found == [None, None, "rng_state_1.pth is missing"]


def test_zeros_at_the_end_of_an_archive(tmp_path) -> None:
    path = checkpoint(tmp_path, 10)
    emptied(path / "optimizer.pt")
    assert fault_of(path) == "optimizer.pt is cut short or damaged"


def test_shards_are_all_there(tmp_path) -> None:
    path = checkpoint(tmp_path, 10)
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fault_of(path) == "model-00002-of-00002.safetensors is missing"
    save_file({"b": torch.zeros(3)}, path / "model-00002-of-00002.safetensors")
    assert fault_of(path) is None


def test_what_deepspeed_and_fsdp_leave(tmp_path) -> None:
    engine = checkpoint(tmp_path, 10)
    (engine / "optimizer.pt").unlink()
    (engine / "latest").write_text("global_step10")
    assert fault_of(engine) == "global_step10 is missing"
    (engine / "global_step10").mkdir()
    torch.save({}, engine / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert fault_of(engine) is None
    cut(engine / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt is cut short" in str(fault_of(engine))
    sharded = checkpoint(tmp_path, 20)
    for name in ("model.safetensors", "optimizer.pt"):
        (sharded / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (sharded / name).mkdir()
        (sharded / name / "__0_0.distcp").write_bytes(b"1")
    assert fault_of(sharded) == "pytorch_model_fsdp_0/.metadata is missing"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (sharded / name / ".metadata").write_bytes(b"1")
    assert fault_of(sharded) is None


def test_the_newest_whole_one_is_taken_and_the_others_are_named(tmp_path, capsys) -> None:
    for step in (9, 10, 11, 100, 101):
        checkpoint(tmp_path, step)
    cut(tmp_path / "checkpoint-101" / "model.safetensors")
    (tmp_path / "checkpoint-100" / CLIP).unlink()
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    assert checkpoint_for("true", str(tmp_path), [CLIP]) == str(tmp_path / "checkpoint-10")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path}/checkpoint-101 is passed over: model.safetensors is cut short or damaged.",
        f"{tmp_path}/checkpoint-100 is passed over: gradclip.pt is missing.",
        f"{tmp_path}/checkpoint-11 is passed over: trainer_state.json is missing, which is written last.",
        f"going on from {tmp_path}/checkpoint-10.",
    ]
    assert checkpoint_for("true", str(tmp_path)) == str(tmp_path / "checkpoint-100"), "a strategy without state"


def test_a_run_that_never_clipped_is_not_asked_for_a_state(tmp_path) -> None:
    path = checkpoint(tmp_path, 10, clipped=False)
    assert checkpoint_for("true", str(tmp_path), [CLIP]) == str(path)
    logged = {"global_step": 10, "log_history": [{"loss": 1.0, "clip/rate": 0.5, "step": 10}]}
    (path / "trainer_state.json").write_text(json.dumps(logged))
    assert checkpoint_for("true", str(tmp_path), [CLIP]) is None, "its log says that it clipped"


def test_nothing_to_go_on_from_is_said(tmp_path, capsys) -> None:
    assert checkpoint_for("true", str(tmp_path)) is None
    assert f"true: {tmp_path} has no checkpoint. Starting at step 0." in capsys.readouterr().out
    cut(checkpoint(tmp_path, 10) / "optimizer.pt")
    assert checkpoint_for("true", str(tmp_path)) is None
    assert "has no whole checkpoint. Starting at step 0." in capsys.readouterr().out
    assert checkpoint_for(None, str(tmp_path)) is checkpoint_for("false", str(tmp_path)) is None


def test_a_folder_that_is_named_must_be_whole(tmp_path) -> None:
    path = checkpoint(tmp_path, 10)
    assert checkpoint_for(str(path), "elsewhere", [CLIP]) == str(path)
    with pytest.raises(InputError, match=r"holds checkpoint-10\. Give one of them"):
        checkpoint_for(str(tmp_path), "elsewhere")
    cut(path / "optimizer.pt")
    with pytest.raises(
        InputError, match=r"optimizer\.pt is cut short or damaged\. true takes the newest whole one of elsewh"
    ):
        checkpoint_for(str(path), "elsewhere")


def test_which_strategies_keep_a_state() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    without = {"agc", "block_rms", "global_norm", "none", "param_norm", "relative_value", "soft", "value"}
    written = {"global_norm": ":max_norm=1", "param_norm": ":max_norm=1", "value": ":max_value=1"}
    written |= {"relative_value": ":factor=3", "block_rms": ":max_rms=1"}
    for name in strategy_names():
        assert keeps_state(read_strategy(name + written.get(name, "")), model) == (name not in without), name
    assert keeps_state(read_strategy("0*=zclip;*=none"), model)
    assert keeps_state(None, model) is False


@pytest.mark.parametrize(
    ("max_steps", "epochs", "word"),
    [
        (10, 3.0, "--max_steps 10"),
        (9, 3.0, "--max_steps 9"),
        (-1, 2.0, "--num_train_epochs 2"),
        (11, 1.0, ""),
        (-1, 3.0, ""),
    ],
)
def test_a_run_that_has_ended_is_not_gone_on_with(tmp_path, max_steps, epochs, word) -> None:
    path = checkpoint(tmp_path, 10)
    state = json.loads((path / "trainer_state.json").read_text())
    (path / "trainer_state.json").write_text(json.dumps({**state, "epoch": 2.0}))
    said = end_of_run(str(path), max_steps, epochs)
    assert (word in said, bool(said)) == (True, bool(word))
