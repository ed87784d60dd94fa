"""The rows to learn from, with some held out: of the hub, of files, or of Python's standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from finetune_parts.files import read_files
from finetune_parts.flags import DataArguments
from finetune_parts.words import InputError, in_one_line

TEXT, PAIRS, CHATS = "text", "prompts", "chats"
SIZES = {TEXT: 128, PAIRS: 1024, CHATS: 1024}
FROM_VALUE = "conversations"


def load_texts(args: DataArguments, seed: int) -> DatasetDict:
    """Rows to train on, and rows to evaluate with; where none are given some are held out.

    Raises:
        InputError: for data that cannot be read, or is too little to hold some out.
    """
    if not args.dataset_name and not args.train_file:
        rows = Dataset.from_dict({"text": standard_library_text(args.max_text_bytes)})
        return _held_out(rows, args, seed)
    if args.dataset_name:
        from datasets import load_dataset

        with in_one_line(f"--dataset_name {args.dataset_name}", Exception):
            found = load_dataset(args.dataset_name, args.dataset_config_name)
        if "train" not in found:
            raise InputError(f"--dataset_name {args.dataset_name}: has no split train, only {', '.join(found)}.")
        train, validation = found["train"], found.get("validation")
    else:
        train = read_files(str(args.train_file), "--train_file")
        validation = read_files(args.validation_file, "--validation_file") if args.validation_file else None
    kind = kind_of(train.column_names, args)
    if validation is not None:
        kind_of(validation.column_names, args, kind)
        return DatasetDict(train=train, validation=validation)
    if kind == TEXT and len(train) * args.validation_share < 1:
        return _ends_held_out(train[args.text_column], args)
    return _held_out(train, args, seed)


def no_bars() -> None:
    """Let `datasets` read and tokenize without progress bars, as --disable_tqdm asks of the Trainer."""
    import datasets

    if hasattr(datasets, "disable_progress_bars"):
        datasets.disable_progress_bars()


def kind_of(columns: Sequence[str], args: DataArguments, expected: str | None = None) -> str:
    """What the columns hold: chats, prompts with completions, or text.

    Raises:
        InputError: where no column has a name that is known, or where they hold something else than expected.
    """
    found = None
    if args.messages_column in columns or (args.messages_column == "messages" and FROM_VALUE in columns):
        found = CHATS
    elif args.prompt_column in columns and args.completion_column in columns:
        found = PAIRS
    if args.text_column in columns and (found is None or args.text_column != "text"):
        found = TEXT
    if args.text_column != "text" and args.text_column not in columns:
        raise InputError(f"--text_column {args.text_column}: the data has {', '.join(columns)}. Name one of them.")
    if found is None:
        raise InputError(
            f"the data has the columns {', '.join(columns)}. Name what to learn: --text_column ({args.text_column}), "
            f"--messages_column ({args.messages_column}), or --prompt_column ({args.prompt_column}) with "
            f"--completion_column ({args.completion_column})."
        )
    if expected not in (None, found):
        raise InputError(f"--validation_file {args.validation_file}: holds {found}, the data to train on {expected}.")
    return found


def messages_column(columns: Sequence[str], args: DataArguments) -> str:
    """The column of chats, which other people call conversations."""
    return args.messages_column if args.messages_column in columns else FROM_VALUE


def decided(args: DataArguments, kind: str) -> DataArguments:
    """The arguments, with the block size and the packing that this kind of data has where none is given."""
    return replace(
        args,
        block_size=args.block_size or SIZES[kind],
        packing=kind == TEXT if args.packing is None else args.packing,
    )


def words_in(rows: Any, args: DataArguments) -> list[str]:
    """All that is said in the rows, for a tokenizer to be trained on."""
    kind = kind_of(rows.column_names, args)
    if kind == TEXT:
        return [str(text) for text in rows[args.text_column]]
    if kind == PAIRS:
        return [f"{row[args.prompt_column]}{row[args.completion_column]}" for row in rows]
    return [
        str(value)
        for chat in rows[messages_column(rows.column_names, args)]
        for m in chat
        for value in m.values()
        if value
    ]


def standard_library_text(limit: int) -> list[str]:
    """The source files of Python's standard library, in a fixed order, `limit` bytes at most."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    texts: list[str] = []
    for path in files:
        if limit <= 0 or "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text("utf-8", errors="replace")[:limit]
        texts.append(text)
        limit -= len(text)
    return texts


def _held_out(rows: Any, args: DataArguments, seed: int) -> DatasetDict:
    """A share of the rows, drawn by the seed, for evaluation."""
    if len(rows) < 2:
        raise InputError(f"the data has {len(rows)} row, of which none can be held out. Give --validation_file.")
    split = rows.train_test_split(test_size=args.validation_share, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def _ends_held_out(texts: Sequence[str], args: DataArguments) -> DatasetDict:
    """The end of each document for evaluation, where they are so few that no whole one can be held out."""
    cuts = [(text, int(len(text) * (1 - args.validation_share))) for text in texts]
    return DatasetDict(
        train=Dataset.from_dict({args.text_column: [text[:cut] for text, cut in cuts]}),
        validation=Dataset.from_dict({args.text_column: [text[cut:] for text, cut in cuts]}),
    )
