"""Kinds of models, tiny and from a config, through the Trainer and in a loop: they learn, and the log names the groups.

Each is trained by three strategies and by groups of parameters with a strategy each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hf_gradclip
from hf_gradclip import GradClipTrainer
from tests.tiny import logged, train

VOCAB, LENGTH, ROWS, STEPS = 24, 8, 64, 16
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STRATEGIES = ("adaptive", "global_norm:max_norm=0.5", "adagc:warmup_steps=4")
KEYS = {"clip/norm_mean", "clip/norm_max", "clip/rate", "clip/tensor_rate", "clip/skipped", "clip/nonfinite"}


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Args:
        make: the model.
        row: an example by its number.
        groups: what clips it by name; the last is the rest.
        labels: of these groups.
        lr: at which it learns within STEPS.
    """

    make: Callable[[], nn.Module]
    row: Callable[[int], dict[str, torch.Tensor]]
    groups: str
    labels: tuple[str, ...]
    lr: float = 1e-2


def counting(i: int) -> torch.Tensor:
    return (torch.arange(LENGTH) + i) % VOCAB


def text(i: int) -> dict[str, torch.Tensor]:
    return {"input_ids": counting(i), "labels": counting(i)}


def masked(i: int) -> dict[str, torch.Tensor]:
    ids = counting(i)
    return {"input_ids": torch.where(torch.arange(LENGTH) == i % LENGTH, 0, ids), "labels": ids}


def labelled(i: int) -> dict[str, torch.Tensor]:
    return {"input_ids": counting(i), "labels": torch.tensor(int(i % VOCAB >= 12))}


def shifted(i: int) -> dict[str, torch.Tensor]:
    return {"input_ids": counting(i), "labels": counting(i + 1)}


def picture(i: int) -> dict[str, torch.Tensor]:
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) / 2
    return {"pixel_values": noise + (1 if i % 2 else -1), "labels": torch.tensor(i % 2)}


def with_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]))


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SMALL))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, num_local_experts=4, num_key_value_heads=2, **SMALL))


def bert(cls: type) -> Callable[[], nn.Module]:
    return lambda: cls(BertConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, **SMALL))


def bart() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": LENGTH}
    return BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, **sizes, **heads))


KINDS = {
    "causal": Kind(
        llama, text, "embed*=adaptive_norm;lm_head*=global_norm:max_norm=0.5;*=adaptive", ("embed", "lm_head", "rest")
    ),
    "GPT-2": Kind(
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2)),
        text,
        "wte*=global_norm:max_norm=0.5;*c_attn*=agc;*=adaptive_norm",
        ("wte", "c_attn", "rest"),
    ),
    "fused experts": Kind(
        mixtral,
        text,
        "*experts*=agc:clip_factor=0.05;*gate.*=global_norm:max_norm=0.1;*=adaptive_norm",
        ("experts", "gate", "rest"),
    ),
    "sequence classification": Kind(
        bert(BertForSequenceClassification),
        labelled,
        "*embeddings*=adaptive_norm;classifier*=global_norm:max_norm=0.5;*=adaptive",
        ("embeddings", "classifier", "rest"),
    ),
    "masked": Kind(
        bert(BertForMaskedLM), masked, "*embeddings*=adaptive_tensors;*=adagc:warmup_steps=4", ("embeddings", "rest")
    ),
    "seq2seq": Kind(
        bart,
        shifted,
        "re:encoder=adaptive_norm;re:decoder=global_norm:max_norm=0.5;*=adaptive_norm",
        ("encoder", "decoder", "rest"),
    ),
    "ViT": Kind(
        lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=2, **SMALL)),
        picture,
        "*patch_embeddings*=agc;classifier*=none;*=adaptive_norm",
        ("patch_embeddings", "classifier", "rest"),
    ),
    "LoRA": Kind(
        with_lora,
        text,
        "*lora_A*=adaptive_norm;*lora_B*=adaptive_tensors;*lm_head*=global_norm:max_norm=0.5;*=none",
        ("lora_A", "lora_B", "lm_head"),
        3e-2,
    ),
}  # fmt: skip


def assert_logged(losses: list[float], keys: set[str], labels: tuple[str, ...]) -> None:
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    assert keys >= KEYS
    named = {key.split("/")[1] for key in keys if key.startswith("clip/") and key.count("/") == 2}
    assert named == {*labels}
    for label in labels:
        assert {f"clip/{label}/norm_mean", f"clip/{label}/rate", f"clip/{label}/scale"} <= keys


@pytest.mark.parametrize("way", [*STRATEGIES, "groups"])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_learns_and_its_log_names_the_groups(name, way) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    clip = kind.groups if way == "groups" else way
    settings = {"max_steps": STEPS, "learning_rate": kind.lr, "optim": "adamw_torch", "lr_scheduler_type": "constant"}
    data = [kind.row(i) for i in range(ROWS)]
    trainer = train(GradClipTrainer, model=kind.make(), data=data, clip=clip, **settings)
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert_logged(logged(trainer, "loss"), keys, kind.labels if way == "groups" else ())
    assert trainer.clipper.report.summary()["nonfinite"] == 0


class Denoiser(nn.Module):
    """Guesses the noise in a picture, given how much of it there is."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Embedding(10, 8)
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1)
        self.mid_block = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(noisy) + self.time_embedding(time)[..., None, None]
        return self.conv_out(hidden + self.mid_block(hidden))


@pytest.mark.parametrize("way", [*STRATEGIES, "groups"])
def test_a_diffusion_loop_with_accelerate(way) -> None:
    torch.manual_seed(0)
    groups = "time_embedding*=adaptive_norm;conv_*=agc:clip_factor=0.1,include_head=true;*=adaptive_tensors"
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, groups if way == "groups" else way)
    model = Denoiser()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=2e-2))
    losses: list[float] = []
    keys: set[str] = set()
    for step in range(2 * STEPS):
        generator = torch.Generator().manual_seed(step)
        time, noise = (torch.randint(10, (32,), generator=generator), torch.randn(32, 1, 8, 8, generator=generator))
        share = (time / 10)[:, None, None, None]
        clean = torch.ones(32, 1, 8, 8) * (torch.arange(8) % 2 * 2 - 1)
        loss = (model((1 - share) * clean + share * noise, time) - noise).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        keys |= attachment.scalars().keys()
    assert_logged(losses, keys, ("time_embedding", "conv", "rest") if way == "groups" else ())
