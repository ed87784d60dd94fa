"""What finetune.py makes of files, prompts and chats, against token ids that are written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, DatasetDict
from finetune_parts.chat import PLAIN, chat_tokens, with_template
from finetune_parts.examples import LEFT_OUT, packed, row_tokens, to_blocks
from finetune_parts.files import read_files
from finetune_parts.flags import DataArguments
from finetune_parts.samples import beginning_of
from finetune_parts.texts import CHATS, PAIRS, TEXT, kind_of, load_texts
from finetune_parts.words import InputError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<end>", "<user>", "<assistant>", "<cut>", "user:", "assistant:", "a", "b", "c", "d", "e", "f"]
END, USER, ASSISTANT, CUT, PLAIN_USER, PLAIN_ASSISTANT, A, B, C, D, E, F = range(len(WORDS))
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant> {% endif %}"
FORGETFUL = TEMPLATE.replace("m.content", "m.content if m.role == 'user' or loop.last else '<cut>'")
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]


def words(template: str | None = TEMPLATE):
    """A tokenizer with one token for each word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<cut>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


def learnt_of(ids: list[int], mask: list[bool]) -> list[int]:
    return [token for token, is_learnt in zip(ids, mask, strict=True) if is_learnt]


def test_of_a_chat_every_answer_is_learnt_with_its_end() -> None:
    ids, mask = chat_tokens(words(), CHAT)
    assert ids == [USER, A, B, END, ASSISTANT, C, END, USER, D, END, ASSISTANT, E, F, END]
    assert [i for i, is_learnt in enumerate(mask) if is_learnt] == [5, 6, 11, 12, 13]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_to_learn() -> None:
    ids, mask = chat_tokens(words(FORGETFUL), CHAT)
    assert ids == [USER, A, B, END, ASSISTANT, CUT, END, USER, D, END, ASSISTANT, E, F, END]
    assert [i for i, is_learnt in enumerate(mask) if is_learnt] == [11, 12, 13]


def test_a_tokenizer_without_a_template_gets_the_plain_one() -> None:
    tokenizer = with_template(words(None))
    assert tokenizer.chat_template == PLAIN
    ids, mask = chat_tokens(tokenizer, [CHAT[0], {"role": "assistant", "content": "c "}])
    assert ids == [PLAIN_USER, A, B, PLAIN_ASSISTANT, C, END]
    assert learnt_of(ids, mask) == [C, END]


@pytest.mark.parametrize(
    ("row", "ids", "learnt"),
    [
        ({"prompt": "a b", "completion": " c"}, [A, B, C, END], [C, END]),
        ({"prompt": "", "completion": "c"}, [C, END], [C, END]),
        ({"prompt": "a", "completion": " c <end>"}, [A, C, END], [C, END]),
        (
            {"prompt": CHAT[:3], "completion": CHAT[3:]},
            [USER, A, B, END, ASSISTANT, C, END, USER, D, END, ASSISTANT, E, F, END],
            [E, F, END],
        ),
    ],
)
def test_of_a_prompt_only_the_completion_is_learnt(row, ids, learnt) -> None:
    found, mask = row_tokens(row, words(), DataArguments(), PAIRS)
    assert found == ids
    assert learnt_of(found, mask) == learnt


def test_chats_that_other_people_wrote() -> None:
    row = {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}
    assert kind_of(list(row), DataArguments()) == CHATS
    ids, mask = row_tokens(row, words(), DataArguments(), CHATS)
    assert ids == [USER, A, B, END, ASSISTANT, C, END]
    assert learnt_of(ids, mask) == [C, END]


def test_long_rows_are_cut_and_those_without_an_answer_left_out(capsys) -> None:
    rows = Dataset.from_dict({"prompt": ["a", "a b c", "a b c d e"], "completion": [" b", " d e", " f"]})
    data = to_blocks(DatasetDict(train=rows), words(), DataArguments(block_size=4))["train"]
    assert data["input_ids"][:] == [[A, B, END], [A, B, C, D]]
    assert data["labels"][:] == [[LEFT_OUT, B, END], [LEFT_OUT, LEFT_OUT, LEFT_OUT, D]]
    assert (
        "of 3 prompts 2 are longer than --block_size 4 and were cut, 1 have nothing to learn" in capsys.readouterr().out
    )
    with pytest.raises(InputError, match="in none of the 3 prompts"):
        to_blocks(
            DatasetDict(train=rows.map(lambda row: {"prompt": "a b c d e"})), words(), DataArguments(block_size=4)
        )


def test_text_is_joined_with_an_end_after_each_document() -> None:
    rows = Dataset.from_dict({"text": ["a b c", "d", "e f"]})
    data = to_blocks(DatasetDict(train=rows), words(), DataArguments(block_size=3))["train"]
    assert data["input_ids"][:] == [[A, B, C], [END, D, END], [E, F, END]]
    assert data["labels"][:] == data["input_ids"][:]
    apart = to_blocks(DatasetDict(train=rows), words(), DataArguments(block_size=3, packing=False))["train"]
    assert apart["input_ids"][:] == [[A, B, C], [D, END], [E, F, END]]
    with pytest.raises(InputError, match="--block_size 128: the train text has fewer tokens"):
        to_blocks(DatasetDict(train=rows), words(), DataArguments())


def test_rows_fill_blocks_without_being_cut() -> None:
    lengths = [5, 3, 8, 1, 2, 5, 4]
    blocks = packed([[0] * length for length in lengths], 8)
    assert sorted(i for block in blocks for i in block) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in block) <= 8 for block in blocks)
    assert len(blocks) == 4, "28 tokens do not go into three blocks of eight"


def test_packed_rows_do_not_see_each_other() -> None:
    """The mean loss over packed blocks is that over each row alone, and differs where one row is let see another."""
    rows = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "b"], "completion": [" c d", " f a b", " e", " c d a e"]})
    args = DataArguments(block_size=12, packing=True)
    blocks = to_blocks(DatasetDict(train=rows), words(), args)["train"]
    apart = to_blocks(DatasetDict(train=rows), words(), replace(args, packing=False))["train"]
    assert len(blocks) < len(apart)
    assert {len(ids) for ids in blocks["input_ids"]} == {12}
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.5, **size)).eval()

    def mean_loss(examples, *keys: str) -> float:
        losses, counts = [], []
        for example in examples:
            batch = {key: torch.tensor([example[key]]) for key in ("input_ids", "labels", *keys)}
            counts.append(int((batch["labels"][:, 1:] != LEFT_OUT).sum()))
            losses.append(float(model(**batch, use_cache=False).loss.detach()) * counts[-1])
        return sum(losses) / sum(counts)

    assert mean_loss(blocks, "position_ids") == pytest.approx(mean_loss(apart), rel=1e-5)
    assert mean_loss(blocks) != pytest.approx(mean_loss(apart), rel=1e-3)


ROWS = [{"prompt": "007", "completion": "NA"}, {"prompt": "two, words", "completion": ""}]


def write(path, rows) -> None:
    """Rows in the format of the file's name, by hand or by pyarrow."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        sep = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [sep.join(f'"{value}"' if "," in value else value for value in row.values()) for row in rows]
        path.write_text("\n".join([sep.join(rows[0]), *lines]) + "\n")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, ending) -> None:
    write(tmp_path / f"rows{ending}", ROWS)
    assert list(read_files(str(tmp_path / f"rows{ending}"), "--train_file")) == ROWS


def test_a_folder_is_all_files_in_it(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.md").write_text("# One\n\nline\n")
    (tmp_path / "in" / "b.txt").write_text("two\nlines\n")
    (tmp_path / "image.png").write_text("no text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert sorted(read_files(str(tmp_path), "--train_file")["text"]) == ["# One\n\nline\n", "two\nlines\n"]
    write(tmp_path / "rows.csv", ROWS)
    with pytest.raises(InputError, match=r"the .csv files have the columns prompt, completion, the .md files text"):
        read_files(str(tmp_path), "--train_file")


def test_the_ends_of_few_documents_are_held_out(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)
    data = load_texts(DataArguments(train_file=str(tmp_path), validation_share=0.1), seed=0)
    assert data["train"]["text"][:] == ["a" * 90]
    assert data["validation"]["text"][:] == ["b" * 10]


def test_which_column_is_learnt() -> None:
    args = DataArguments()
    assert kind_of(["text", "id"], args) == TEXT
    assert kind_of(["prompt", "completion", "text"], args) == PAIRS
    assert kind_of(["messages", "text"], args) == CHATS
    assert kind_of(["prompt", "completion", "body"], replace(args, text_column="body")) == TEXT
    assert (
        kind_of(["instruction", "output"], replace(args, prompt_column="instruction", completion_column="output"))
        == PAIRS
    )
    with pytest.raises(InputError, match=r"the data has the columns instruction, output. Name what to learn"):
        kind_of(["instruction", "output"], args)


def test_a_sample_goes_on_from_what_is_not_learnt() -> None:
    assert beginning_of({"input_ids": [A, B, C, D], "labels": [LEFT_OUT, LEFT_OUT, C, D]}) == [A, B]
    assert beginning_of({"input_ids": list(range(40)), "labels": list(range(40))}) == list(range(24))
