"""Whose examples a spike names: Trainers that make their own dataloaders, and those of TRL."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, default_collate
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer

from hf_gradclip import GradClipMixin
from tests.integrations.recorded import RECORD, is_poison, poisoned_data
from tests.tiny import VOCAB, tiny_llama, train

TEXT = {"gradient": "none", "record": "text"}
LOUD = 5


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")


def spikes_in(folder: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "gradclip" / "spikes").iterdir()]
    return {spike["step"]: spike for spike in found}


class DropsLength(Trainer):
    """Drops a column by its name before anything else, as Axolotl's Trainers do."""

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if dataset.column_names and "length" in dataset.column_names:
            dataset = dataset.remove_columns(["length"])
        return super()._get_dataloader(dataset, description, *args, **kwargs)


class Shuffles(Trainer):
    """Puts the rows in another order, so that an index means another example."""

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        return super()._get_dataloader(dataset.shuffle(seed=3), description, *args, **kwargs)


class OwnCollator(Trainer):
    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **kwargs):
        sampler = sampler_fn(dataset)
        loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=lambda rows: default_collate(rows))
        return self.accelerator.prepare(loader)


class OneKind(Trainer):
    def _get_dataloader(self, dataset, description, *args, **kwargs):
        if not isinstance(dataset, datasets.Dataset):
            raise TypeError("only for datasets")
        return super()._get_dataloader(dataset, description, *args, **kwargs)


def loud(base: type[Trainer]) -> type[Trainer]:
    """With the mixin; a batch with a poisoned sequence has a hundred times the loss."""

    class Loud(GradClipMixin, base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert set(inputs) <= {"input_ids", "labels"}, "the model never sees the indices"
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if not any(is_poison(row) for row in inputs["input_ids"]):
                return loss
            self.poisoned_steps = [*getattr(self, "poisoned_steps", []), self.state.global_step + 1]
            return loss * 100

    return Loud


@pytest.mark.parametrize("base", [DropsLength, Shuffles, OwnCollator, OneKind])
def test_a_trainer_with_a_dataloader_of_its_own_is_recorded(tmp_path, caplog, base) -> None:
    """With the right examples, or with none: never with others."""
    length = {"length": 16} if base is DropsLength else {}
    data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} | length for row in poisoned_data()])
    settings = {"remove_unused_columns": base is not DropsLength, "max_steps": 60, "output_dir": str(tmp_path)}
    trainer = train(loud(base), clip=RECORD, data=data.with_format("torch"), **settings)
    late = [step for step in trainer.poisoned_steps if step > 25]
    found = spikes_in(tmp_path)
    assert len(late) >= 2
    assert set(late) <= set(found)
    for step in late:
        if base is DropsLength:
            assert any(is_poison(data[i]["input_ids"]) for i in found[step]["examples"])
        else:
            assert found[step]["examples"] == "unknown"
    lost = {"OwnCollator": "(it has a collator of its own)", "OneKind": "(TypeError: only for datasets)"}
    why = lost.get(base.__name__)
    assert (f"Loud._get_dataloader lost them {why}" in caplog.text) == (why is not None)


def numbers() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers below the tiny model's vocabulary."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    return made


def words(*ids: int) -> str:
    return " ".join(str(2 + i % (VOCAB - 2)) for i in ids)


def pairs(n: int = 48) -> list[dict[str, Any]]:
    """Every example has words of its own."""
    return [{"prompt": words(i, i + 1), "chosen": words(3 * i), "rejected": words(5 * i + 1)} for i in range(n)]


def spaced(row: dict[str, Any]) -> dict[str, Any]:
    """An example as TRL wants it: the answer is put right behind the prompt."""
    return {key: f" {value}" if key in ("chosen", "rejected", "completion") else value for key, value in row.items()}


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": LOUD + 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-4,
    } | changes


def of_trl(base: type[Trainer]) -> type[Trainer]:
    """With the mixin; the loss of one step is a thousand times as large, and what the model was given in it is kept."""

    class Loud(GradClipMixin, base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if self.state.global_step != LOUD - 1:
                return loss
            self.given = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
            return loss * 1000

    return Loud


def seen(trainer: Trainer) -> set[str]:
    """What the model was given in the loud step, in words."""
    decode = trainer.processing_class.decode
    return {" ".join(decode(row, skip_special_tokens=True).split()) for row in trainer.given["input_ids"]}


def said(text: str) -> dict[str, str]:
    """The columns in the text of an example; a column of token ids has the name of what they are the ids of."""
    lines = dict(line.partition(": ")[::2] for line in text.splitlines())
    return {key.removesuffix("_ids"): " ".join(value.replace("<eos>", " ").split()) for key, value in lines.items()}


class TestTRL:
    """What the spike says of its examples is what the model was given in that step, and what a person wrote."""

    def test_dpo(self, tmp_path) -> None:
        from trl import DPOConfig, DPOTrainer

        rows = pairs()
        trainer = of_trl(DPOTrainer)(
            model=tiny_llama(),
            ref_model=tiny_llama(1),
            args=DPOConfig(**settings_of(tmp_path)),
            train_dataset=Dataset.from_list([spaced(row) for row in rows]),
            processing_class=numbers(),
            clip=TEXT,
        )
        trainer.train()
        spike = spikes_in(tmp_path)[LOUD]
        examples = [rows[i] for i in spike["examples"]]
        assert seen(trainer) == {f"{row['prompt']} {row[key]}" for row in examples for key in ("chosen", "rejected")}
        assert [said(text) for text in spike["text"]] == examples

    def test_reward(self, tmp_path) -> None:
        from trl import RewardConfig, RewardTrainer

        rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs()]
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**{**tiny_llama().config.to_dict(), "num_labels": 1}))
        model.config.pad_token_id = 0
        trainer = of_trl(RewardTrainer)(
            model=model,
            args=RewardConfig(**settings_of(tmp_path)),
            train_dataset=Dataset.from_list(rows),
            processing_class=numbers(),
            clip=TEXT,
        )
        trainer.train()
        spike = spikes_in(tmp_path)[LOUD]
        examples = [rows[i] for i in spike["examples"]]
        assert seen(trainer) == {row[key] for row in examples for key in ("chosen", "rejected")}
        assert [said(text) for text in spike["text"]] == examples

    def test_kto(self, tmp_path) -> None:
        from trl import KTOConfig, KTOTrainer

        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(pairs())
        ]
        trainer = of_trl(KTOTrainer)(
            model=tiny_llama(),
            ref_model=tiny_llama(1),
            args=KTOConfig(**settings_of(tmp_path)),
            train_dataset=Dataset.from_list([spaced(row) for row in rows]),
            processing_class=numbers(),
            clip=TEXT,
        )
        trainer.train()
        spike = spikes_in(tmp_path)[LOUD]
        examples = [rows[i] for i in spike["examples"]]
        assert {f"{row['prompt']} {row['completion']}" for row in examples} <= seen(trainer)
        for text, row in zip(spike["text"], examples, strict=True):
            assert said(text)["prompt"] == row["prompt"]
            assert said(text)["completion"] == row["completion"]

    @pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
    @pytest.mark.parametrize("chat", [False, True])
    def test_grpo_and_rloo(self, tmp_path, kind, chat) -> None:
        """They generate for several steps at once: the examples are the prompts of that generation."""
        import trl

        prompts = [row["prompt"] for row in pairs()]
        asked = []

        def reward(prompts, completions, **_):
            words_of = [prompt[0]["content"] if chat else prompt for prompt in prompts]
            asked.append((trainer.state.global_step + 1, words_of))
            return [float(i) for i in range(len(completions))]

        settings = settings_of(tmp_path, num_generations=2, max_completion_length=4, steps_per_generation=2, beta=0)
        rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in prompts]
        trainer = of_trl(getattr(trl, f"{kind}Trainer"))(
            model=tiny_llama(),
            args=getattr(trl, f"{kind}Config")(**settings),
            train_dataset=Dataset.from_list(rows),
            reward_funcs=reward,
            processing_class=numbers(),
            clip=TEXT,
        )
        trainer.train()
        spike = spikes_in(tmp_path)[LOUD]
        [*_, (generated_at, wanted)] = [found for found in asked if found[0] <= LOUD]
        assert LOUD - 1 <= generated_at <= LOUD
        assert len(spike["examples"]) == len(wanted) == 8
        assert [prompts[i] for i in spike["examples"]] == wanted
        assert spike["text"] == [f"prompt: <user> {text}" if chat else f"prompt: {text}" for text in wanted]
