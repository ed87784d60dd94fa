"""Versions of other packages that no test was run with, and hooks that are gone."""

from __future__ import annotations

import re
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import hf_gradclip
from hf_gradclip.run import tested
from hf_gradclip.run.tested import TESTED, untested
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import counting_data, tiny_llama

ROOT = Path(__file__).parents[2]
CONSTRAINTS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
OLDEST = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8")))


@pytest.fixture(autouse=True)
def _unsaid():
    tested.insist_on_hooks.cache_clear()
    yield
    tested.insist_on_hooks.cache_clear()


def trainer(folder: Path, **kwargs) -> hf_gradclip.GradClipTrainer:
    args = TrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True)
    return hf_gradclip.GradClipTrainer(tiny_llama(), args, train_dataset=counting_data(), **kwargs)


class Hooked:
    clip_grad_norm_ = unscale_gradients = prepare = _clip_grad_norm = print


@pytest.mark.parametrize("package", TESTED)
def test_what_is_pinned_is_tested_and_what_is_admitted_begins_there(package) -> None:
    owner = {"torch": torch.optim.Optimizer, "transformers": Trainer, "accelerate": accelerate.Accelerator}
    assert untested(package, CONSTRAINTS[package], owner.get(package)) == ""
    assert OLDEST[package].startswith(".".join(map(str, TESTED[package].first)))


@pytest.mark.parametrize("version", ["1.99.0", "0.34.2", "2.0.0.dev0", "1.99rc1"])
def test_another_version_is_said_with_what_was_probed(version) -> None:
    words = untested("accelerate", version, Hooked)
    assert words.startswith(f"accelerate {version}: hf_gradclip was tested with 1.")
    assert "clip_grad_norm_, unscale_gradients, prepare" in words


def test_where_nothing_was_probed_nothing_is_said_to_be_there() -> None:
    words = untested("deepspeed", "0.20.1", Hooked)
    assert words == "deepspeed 0.20.1: hf_gradclip was tested with 0.19. Compare a few steps with your own clip."


@pytest.mark.parametrize("version", ["git", ""])
def test_a_version_without_a_number_is_left_in_peace(version) -> None:
    assert untested("accelerate", version, Hooked) == ""


def test_a_missing_hook_is_an_error_in_every_version() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"Hooked has no _get_grad_norm, _prepare_for_train"):
        untested("transformers", CONSTRAINTS["transformers"], Hooked)


def test_a_trainer_says_it_once(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    monkeypatch.setattr(accelerate, "__version__", "2.3.0")
    for _ in range(2):
        trainer(tmp_path, clip="adaptive").train()
    for words in ("transformers 6.1.0: hf_gradclip was tested", "accelerate 2.3.0: hf_gradclip was tested"):
        assert caplog.text.count(words) == 1


def test_a_trainer_without_the_place_where_it_clips(tmp_path, monkeypatch) -> None:
    monkeypatch.delattr(Trainer, "_prepare_for_training")
    with pytest.raises(UnsupportedBackendError, match="Trainer has no _prepare_for_training"):
        trainer(tmp_path, clip="adaptive")
    stock = Trainer(tiny_llama(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    with pytest.raises(UnsupportedBackendError, match="Trainer has no _prepare_for_training"):
        hf_gradclip.patch(stock, clip="adaptive")


def test_an_accelerator_without_it(monkeypatch) -> None:
    monkeypatch.delattr(accelerate.Accelerator, "unscale_gradients")
    with pytest.raises(UnsupportedBackendError, match="Accelerator has no unscale_gradients"):
        hf_gradclip.attach(accelerate.Accelerator(cpu=True), "adaptive")
