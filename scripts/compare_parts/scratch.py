"""Four small kinds of training from the start, each with a model of its own kind.

Texts are the sources of eight packages of Python's standard library, images are drawn by a formula. What is said of
clipping is then not said of one architecture.
"""

from __future__ import annotations

import functools

import torch
from finetune import END
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from compare_parts.task import PACKAGES, Batch, Task, shuffled, sources

VOCABULARY = 1024
TOKENS, CHARACTERS, PIXELS = 64, 64, 32
IMAGES = 4096
HIDDEN = 128


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


TASKS = (
    Task("decoder", "a Llama continues source code", decoder, blocks, random_tokens, 8),
    Task("encoder", "a BERT says which package a passage is from", encoder, passages, random_labels, 16),
    Task("recurrent", "an LSTM continues the bytes of source code", Recurrent, characters, random_bytes, 16),
    Task("convolutional", "a ConvNeXt counts the points of a star", convolutional, drawings, random_images, 32),
)
