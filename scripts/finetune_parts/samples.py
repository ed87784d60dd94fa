"""What the model writes before and after training, from the same beginning: the most likely token each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from finetune_parts.chat import with_template
from finetune_parts.examples import LEFT_OUT
from finetune_parts.flags import DataArguments
from finetune_parts.texts import CHATS
from finetune_parts.words import is_rank_0, tell

BEGINNING = 24
"""Tokens of a held-out text to go on from."""
SHOWN = 160
"""Characters of it that are said."""


def beginning_of(example: Mapping[str, Sequence[int]]) -> list[int]:
    """The tokens of an example before what is learnt of it; of text, which is all learnt, the first few."""
    labels, ids = example["labels"], example["input_ids"]
    first = next((i for i, label in enumerate(labels) if label != LEFT_OUT), 0)
    return list(ids[:first] if first > 1 else ids[:BEGINNING])


def asked_for(args: DataArguments, tokenizer: Any, kind: str) -> list[int] | None:
    """The tokens of --sample_prompt, in chats as a question of the user; None where it is not given."""
    if args.sample_prompt is None:
        return None
    if kind != CHATS:
        return list(tokenizer(args.sample_prompt)["input_ids"])
    question = [{"role": "user", "content": args.sample_prompt}]
    text = with_template(tokenizer).apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tell_sample(when: str, trainer: Any, beginning: Sequence[int], tokens: int) -> None:
    """Say what the model goes on with, on rank 0; nothing where no process has all weights (FSDP, ZeRO-3)."""
    zero = trainer.accelerator.state.deepspeed_plugin
    sharded = trainer.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3)
    if not tokens or sharded or not is_rank_0():
        return
    tokenizer = trainer.processing_class
    text = written(trainer.model, tokenizer, beginning, tokens)
    tell(f"{when}: {tokenizer.decode(beginning)[-SHOWN:]!r} goes on with {text!r}")


@torch.no_grad()
def written(model: Any, tokenizer: Any, beginning: Sequence[int], tokens: int) -> str:
    """What the model goes on with; neither its mode nor the random numbers are changed.

    Args:
        model: whose weights are whole in this process.
        tokenizer: its own.
        beginning: tokens to go on from.
        tokens: how many at most.
    """
    was_training = model.training
    model.eval()
    ids = torch.tensor([list(beginning)], device=model.device)
    config = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    model.train(was_training)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()
