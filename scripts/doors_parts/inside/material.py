"""Run in an environment of doors.py: a model, a tokenizer and data on which a tool trains in seconds.

material.py FOLDER

The transformers of that environment writes what it will read. Nothing is fetched.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
EXAMPLES = 64
PREFERENCE = {"query": "input", "chosen": "chosen", "rejected": "rejected"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def questions() -> list[tuple[str, str, str]]:
    """A question, a right answer and a wrong one, of each example."""
    pairs = [((7 * n) % 23, (5 * n) % 19) for n in range(EXAMPLES)]
    return [(f"What is {a} plus {b}?", f"It is {a + b}.", f"I do not know {b}.") for a, b in pairs]


def make(folder: Path) -> None:
    """Write `model`, and the same data as each tool reads them, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = questions()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" ".join(texts) for texts in asked], vocab_size=400, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=128
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    def said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    rows = [{"messages": [said("user", q), said("assistant", right)]} for q, right, _ in asked]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    alpaca = [{"instruction": q, "input": "", "output": right} for q, right, _ in asked]
    (folder / "alpaca.json").write_text(json.dumps(alpaca), "utf-8")
    preferred = [
        {"conversation": [said("user", q)], "chosen": said("assistant", right), "rejected": said("assistant", wrong)}
        for q, right, wrong in asked
    ]
    (folder / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferred), "utf-8")
    compared = [{"instruction": q, "input": "", "chosen": right, "rejected": wrong} for q, right, wrong in asked]
    (folder / "compared.json").write_text(json.dumps(compared), "utf-8")
    described = {
        "sft": {"file_name": "alpaca.json"},
        "dpo": {"file_name": "compared.json", "ranking": True, "columns": {"prompt": "instruction"} | PREFERENCE},
    }
    (folder / "dataset_info.json").write_text(json.dumps(described), "utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
