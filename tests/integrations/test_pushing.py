"""Nothing that was recorded leaves the machine unasked: what a Trainer hands to a stand-in for the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from accelerate import Accelerator
from huggingface_hub import HfApi, hf_api
from transformers import Trainer

from hf_gradclip import ClipConfig, GradClipTrainer, attach, patch
from hf_gradclip.config import SpecError
from hf_gradclip.integrations.pushing import without_record
from hf_gradclip.record.options import RecordOptions
from tests.tiny import counting_data, tiny_llama, training_args

MODEL = "model.safetensors"


@pytest.fixture
def sent(monkeypatch) -> list[set[str]]:
    """The files of each commit that reaches the hub, by the hub's own way from a folder to a commit."""
    commits: list[set[str]] = []

    def commit(self: Any, *args: Any, operations: Any, **kwargs: Any) -> Any:
        commits.append({operation.path_in_repo for operation in operations})
        return SimpleNamespace(pr_url=None, commit_url="https://there/commit/1", oid="1", commit_message="")

    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False)  # else nothing comes by `create_commit`
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="me/it"))
    return commits


def make(cls: type[Trainer], folder: Path, record: Any, strategy: str = "every_save") -> Trainer:
    args = training_args(
        str(folder),
        max_steps=12,
        save_strategy="steps",
        save_steps=6,
        push_to_hub=True,
        hub_model_id="me/it",
        hub_strategy=strategy,
        hub_always_push=True,
    )
    old = folder / "gradclip.old1"
    old.mkdir(parents=True)
    (old / "run.json").write_text("{}")
    given = {"model": tiny_llama(), "args": args, "train_dataset": counting_data(64)}
    clip = {"gradient": "adaptive", "record": record}
    if cls is GradClipTrainer:
        return cls(**given, clip=clip)
    trainer = cls(**given)
    patch(trainer, clip=clip)
    return trainer


def pushed(trainer: Trainer) -> None:
    """At every checkpoint, at the end, and by a call; the last two need a model card of nobody's."""
    trainer.create_model_card = lambda *args, **kwargs: None
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()


def recorded(files: set[str]) -> set[str]:
    return {name for name in files if "gradclip" in name and not name.endswith("gradclip.pt")}


@pytest.mark.parametrize("cls", [GradClipTrainer, Trainer], ids=["GradClipTrainer", "patched"])
@pytest.mark.parametrize("record", [True, "text", {"push": False}, False])
def test_nothing_recorded_is_sent(cls, record, sent, tmp_path):
    trainer = make(cls, tmp_path, record)
    pushed(trainer)
    assert (tmp_path / "gradclip" / "run.json").exists() == bool(record), "there was something to send"
    assert len(sent) == 4, "two checkpoints, the end, and a call"
    for files in sent:
        assert MODEL in files
        assert recorded(files) == set()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints", "end"])
def test_whatever_the_strategy(strategy, sent, tmp_path):
    """A checkpoint that is sent has the state of the clip, without which no resumed run goes on as it would have."""
    pushed(make(GradClipTrainer, tmp_path, "text", strategy))
    assert set().union(*map(recorded, sent)) == set()
    states = {name for files in sent for name in files if name.endswith("gradclip.pt")}
    folder = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-6", "checkpoint-12"}, "end": set()}
    assert {name.partition("/")[0] for name in states} == folder[strategy]


def test_what_is_asked_for_is_sent(sent, tmp_path):
    pushed(make(GradClipTrainer, tmp_path, {"text": True, "push": True}))
    assert {"gradclip/run.json", "gradclip.old1/run.json"} <= recorded(sent[-1])
    assert any(name.startswith("gradclip/gradient-") for name in sent[-1])


def test_it_is_said_once(sent, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    pushed(make(GradClipTrainer, tmp_path, True))
    assert caplog.text.count("gradclip/ is not uploaded. record={'push': true} lets it go along.") == 1


def test_the_hub_is_as_before_afterwards(sent, tmp_path):
    before = HfApi.upload_folder
    trainer = make(GradClipTrainer, tmp_path, True)
    pushed(trainer)
    assert HfApi.upload_folder is before
    (tmp_path / "it.txt").write_text("")
    HfApi().upload_folder(repo_id="me/it", folder_path=tmp_path)
    assert "gradclip/run.json" in sent[-1], "an upload of somebody else's own is theirs"


@pytest.mark.parametrize("given", [None, "x*", ["x*", "y*"]])
def test_a_function_as_earlier_versions_had_it(given, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(transformers.trainer, "upload_folder", lambda **kwargs: seen.append(kwargs), raising=False)
    with without_record(transformers.trainer):
        transformers.trainer.upload_folder(folder_path="a", ignore_patterns=given)
    own = [given] if isinstance(given, str) else given or []
    assert seen == [{"folder_path": "a", "ignore_patterns": [*own, "gradclip/*", "gradclip.old*/*"]}]


class TestOptions:
    @pytest.mark.parametrize(
        ("record", "is_"),
        [
            (True, True),
            ("text", "text"),
            ({}, True),
            ({"text": False}, True),
            ({"text": True, "push": False}, "text"),
            ({"push": True}, RecordOptions(push=True)),
            (RecordOptions(text=True), "text"),
            (False, False),
        ],
    )
    def test_what_may_be_written(self, record, is_):
        config = ClipConfig.parse({"gradient": "zclip", "record": record})
        assert config.record == is_
        assert ClipConfig.parse(config.to_dict()) == config
        hash(config)

    @pytest.mark.parametrize("record", ["all", 1, None, {"txt": True}, {"text": 1}, {"push": "yes"}, ["text"]])
    def test_what_may_not(self, record):
        with pytest.raises(SpecError, match=r"record=.*must be true"):
            ClipConfig.parse({"gradient": "zclip", "record": record})

    def test_accelerate_pushes_nothing(self, tmp_path):
        with pytest.raises(SpecError, match=r"Accelerate uploads nothing, so nobody would push it\. Leave 'push' out"):
            attach(Accelerator(cpu=True), {"gradient": "zclip", "record": {"push": True}}, record=tmp_path)
