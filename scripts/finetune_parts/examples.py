"""Examples of tokens with labels: blocks of joined text, or rows of which only the completion is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import DatasetDict

from finetune_parts.chat import chat_tokens, messages_of, shared, with_template
from finetune_parts.flags import DataArguments
from finetune_parts.texts import CHATS, TEXT, decided, kind_of, messages_column
from finetune_parts.words import InputError, tell
from hf_gradclip.misuse import shown

LEFT_OUT = -100
"""The label of a token that is not learnt, as torch's cross entropy has it."""


def to_blocks(data: DatasetDict, tokenizer: Any, args: DataArguments) -> DatasetDict:
    """Tokenize, and cut or fill to at most `block_size` tokens.

    Text is joined, with an end after each document, and cut into blocks of equal length. Prompts and chats are an
    example each, padded in the batch; with `packing` several fill one, each with positions of its own, by which models
    that take `position_ids` keep them apart.

    Raises:
        InputError: where nothing is left to learn, or a row holds something else than it should.
    """
    kind = kind_of(data["train"].column_names, args)
    args = decided(args, kind)
    if kind == TEXT and args.packing:
        return _text_blocks(data, tokenizer, args)
    return DatasetDict({name: _rows(rows, tokenizer, args, kind, name) for name, rows in data.items()})


def row_tokens(row: Mapping[str, Any], tokenizer: Any, args: DataArguments, kind: str) -> tuple[list[int], list[bool]]:
    """One row as tokens, and for each whether it is learnt.

    Raises:
        InputError: for a row that holds something else than it should.
    """
    if kind == CHATS:
        column = messages_column(list(row), args)
        return chat_tokens(with_template(tokenizer), messages_of(row[column], column))
    if kind == TEXT:
        ids = _ended(tokenizer(_text(row, args.text_column, "--text_column"))["input_ids"], tokenizer)
        return ids, [True] * len(ids)
    prompt, completion = row[args.prompt_column], row[args.completion_column]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = messages_of(prompt, args.prompt_column)
        after = messages_of(completion, args.completion_column)
        return chat_tokens(with_template(tokenizer), before + after, first=len(before))
    prompt = _text(row, args.prompt_column, "--prompt_column")
    whole = prompt + _text(row, args.completion_column, "--completion_column")
    ids = _ended(tokenizer(whole)["input_ids"], tokenizer)
    begin = shared(tokenizer(prompt)["input_ids"], ids) if prompt else 0
    return ids, [i >= begin for i in range(len(ids))]


def packed(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Which rows share a block: each, the longest first, goes into the first block that has room for it.

    Args:
        rows: of `size` tokens at most.
        size: tokens of a block.

    Returns:
        The places of the rows of each block.
    """
    blocks: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        place = next((b for b, free in enumerate(room) if free >= len(rows[i])), len(blocks))
        if place == len(blocks):
            blocks.append([])
            room.append(size)
        blocks[place].append(i)
        room[place] -= len(rows[i])
    return blocks


def _text_blocks(data: DatasetDict, tokenizer: Any, args: DataArguments) -> DatasetDict:
    """Tokenize, join, and cut into blocks of equal length."""
    size = args.block_size or 0

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        texts = (_text({args.text_column: text}, args.text_column, "--text_column") for text in batch[args.text_column])
        tokens = [t for text in texts for t in tokenizer(text)["input_ids"] + end]
        whole = len(tokens) // size * size
        blocks = [tokens[i : i + size] for i in range(0, whole, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    found = data.map(tokenize, batched=True, remove_columns=data["train"].column_names, desc="tokenizing")
    for name, rows in found.items():
        if not len(rows):
            raise InputError(f"--block_size {size}: the {name} text has fewer tokens. Lower it.")
    return found


def _rows(rows: Any, tokenizer: Any, args: DataArguments, kind: str, name: str) -> Any:
    """A row as an example, or several packed into one; those in which nothing is learnt are left out."""
    size = args.block_size or 0

    def tokenize(row: Mapping[str, Any]) -> dict[str, Any]:
        ids, learnt = row_tokens(row, tokenizer, args, kind)
        labels = [t if is_learnt else LEFT_OUT for t, is_learnt in zip(ids, learnt, strict=True)]
        labels[:1] = [LEFT_OUT] * len(labels[:1])  # nothing comes before it, from which it could be told
        return {"input_ids": ids[:size], "labels": labels[:size], "cut": len(ids) > size}

    found = rows.map(tokenize, remove_columns=rows.column_names, desc="tokenizing")
    kept = [i for i, labels in enumerate(found["labels"]) if any(label != LEFT_OUT for label in labels)]
    _tell(name, kind, found, kept, size)
    found = found.select(kept).remove_columns("cut")
    if not args.packing:
        return found

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        filled: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for block in packed(batch["input_ids"], size):
            ids = [t for i in block for t in batch["input_ids"][i]]
            rest = size - len(ids)
            positions = [p for i in block for p in range(len(batch["input_ids"][i]))]
            filled["input_ids"].append(ids + [tokenizer.pad_token_id] * rest)
            filled["labels"].append([t for i in block for t in batch["labels"][i]] + [LEFT_OUT] * rest)
            filled["position_ids"].append(positions + list(range(rest)))
        return filled

    return found.map(pack, batched=True, remove_columns=found.column_names, desc="packing")


def _tell(name: str, kind: str, found: Any, kept: Sequence[int], size: int) -> None:
    """Say what was cut and what is left out.

    Raises:
        InputError: where nothing is left.
    """
    if not kept:
        raise InputError(
            f"--block_size {size}: in none of the {len(found)} {kind} of the {name} set is anything left to learn."
        )
    cut, out = sum(found["cut"]), len(found) - len(kept)
    if cut or out:
        tell(
            f"{name}: of {len(found)} {kind} {cut} are longer than --block_size {size} and were cut, {out} have "
            "nothing to learn and are left out."
        )


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens with the one that ends a document."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _text(row: Mapping[str, Any], column: str, flag: str) -> str:
    """The text in a column; numbers as they are written.

    Raises:
        InputError: for an empty cell, and for lists and the like.
    """
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    hint = " Chats are named by --messages_column." if isinstance(value, list) else ""
    raise InputError(f"{flag} {column}: must hold text, and one row is {shown(value)}.{hint}")
