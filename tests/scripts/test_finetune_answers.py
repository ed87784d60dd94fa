"""finetune.py on prompts with completions, end to end, at a size that takes seconds."""

from __future__ import annotations

import json
import re

import pytest
import torch
from finetune_parts.command_line import LORA_RATE
from finetune_parts.flags import DataArguments
from finetune_parts.model import load_model, load_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gradclip.record.files import read_record
from scripts import manual_chats
from tests.scripts.test_finetune import ROOT, script

FLAGS = "--clip zclip:warmup_steps=3,z_threshold=0.5,max_norm=4 --num_train_epochs 2 --vocab_size 300 --logging_steps 5"
FLAGS += " --per_device_train_batch_size 16 --save_strategy no --disable_tqdm true --sample_tokens 6 --eval_steps 50"


@pytest.mark.parametrize("packing", ["false", "true"])
def test_the_loss_is_that_of_the_completions(tmp_path, capsys, packing) -> None:
    """What the run says of the held-out completions is their mean log-likelihood in float64, told token by token."""
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}, I think."} for i in range(180)]
    for name, some in (("train", rows[20:]), ("held_out", rows[:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "held_out.jsonl")]
    more = ["--per_device_eval_batch_size", "32", "--packing", packing, "--block_size", "64"]
    out = tmp_path / "out"
    metrics = script().main([*FLAGS.split(), *files, *more, "--output_dir", str(out)])

    model = AutoModelForCausalLM.from_pretrained(out).double()
    tokenizer = AutoTokenizer.from_pretrained(out)
    losses = []
    for row in rows[:20]:
        prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            odds = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses += [-float(odds[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.5
    assert metrics["epoch"] == 2
    steps = len(read_record(out).step_T)
    assert steps == (20 if packing == "false" else metrics["clip/steps"])
    assert 0 < metrics["clip/clipped"] < steps

    said = capsys.readouterr().out
    first = {"false": rows[:1], "true": rows[:20]}[packing]  # packed, a longer one may come first
    for when in ("before", "after"):
        found = re.search(rf"^{when} training: '(.*)' goes on with '.+'$", said, re.MULTILINE)
        assert found[1] in [row["prompt"] for row in first]
    assert said.endswith(f"what clipping did: hf-gradclip report {out}\n")


def test_the_readmes_two_lines_of_chats(tmp_path, monkeypatch) -> None:
    """As printed, with a small model and fewer chats: adapters learn, at the rate of adapters, for one epoch."""
    lines = re.findall(r"^.*chats\.jsonl.*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    chats = manual_chats.chats()[:60]
    monkeypatch.setattr(manual_chats, "chats", lambda: chats)
    manual_chats.main(lines[0].split()[2:])
    tokenizer = load_tokenizer(DataArguments(vocab_size=300), [json.dumps(chats)])
    load_model(DataArguments(), tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    more = ["--disable_tqdm", "true", "--logging_steps", "1", "--sample_tokens", "0"]
    words = lines[1].replace("MODEL", "model").split()[3:]
    metrics = script().main([*words, *more])
    history = json.loads((tmp_path / "outputs/finetune/metrics.json").read_text())
    assert history == metrics
    assert metrics["epoch"] == 1
    assert metrics["clip/steps"] == 8, "57 chats are learnt, eight a step"
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    rates = read_record(tmp_path / "outputs/finetune").learning_rate_T
    assert max(rates) == pytest.approx(LORA_RATE)
    adapters = load_file("outputs/finetune/adapter_model.safetensors")
    assert any(float(weight.abs().max()) > 0 for name, weight in adapters.items() if "lora_B" in name)
    assert "assistant:" in (tmp_path / "outputs/finetune/chat_template.jinja").read_text()
