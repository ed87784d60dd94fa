"""`agc` scales each unit by min(1, clip_factor * max(|w|, eps) / |g|), against numpy in float64, unit by unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_gradclip import ClipConfig, Clipper
from hf_gradclip.strategy import SpecError
from tests.tiny import tiny_llama

FACTOR, EPS = 0.05, 1e-3


class Experts(nn.Module):
    """Fused experts as in transformers: (experts, out, in), or (experts, in, out) where `is_transposed`."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.weight = nn.Parameter(torch.randn(3, 5, 4))
        self.weight_bias = nn.Parameter(torch.randn(3, 4))


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({
        "linear": nn.Linear(6, 7),
        "columns": Conv1D(5, 4),
        "embedding": nn.Embedding(9, 3),
        "conv1d": nn.Conv1d(3, 4, 2),
        "conv2d": nn.Conv2d(3, 4, 2),
        "bilinear": nn.Bilinear(3, 4, 5),
        "transposed": nn.ConvTranspose2d(3, 4, 2),
        "experts": Experts(False),
        "transposed_experts": Experts(True),
        "lm_head": nn.Linear(4, 2),
    })  # fmt: skip
    with torch.no_grad():
        model["linear"].weight[2] = 0.0  # only eps lets it move
    return model


OTHER_AXES = {
    "linear.weight": (1,), "columns.weight": (0,), "embedding.weight": (1,), "conv1d.weight": (1, 2),
    "conv2d.weight": (1, 2, 3), "transposed.weight": (0, 2, 3), "bilinear.weight": (1, 2), "experts.weight": (2,),
    "transposed_experts.weight": (1,),
}  # fmt: skip
"""Per cut parameter the axes within a unit."""


def clipped(gradient: np.ndarray, weight: np.ndarray, axes: Any) -> np.ndarray:
    norm = np.sqrt((gradient**2).sum(axis=axes, keepdims=True))
    limit = FACTOR * np.maximum(np.sqrt((weight**2).sum(axis=axes, keepdims=True)), EPS)
    return gradient * np.where(norm > limit, limit / np.where(norm > 0, norm, 1), 1)


def set_gradients(model: nn.Module, size: float = 0.06) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random gradients, the first units of each tensor 1000 times smaller; (gradient, weight) in float64."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * size
        p.grad.view(-1)[: p.numel() // 3] *= 1e-3
    return {name: (p.grad.double().numpy(), p.detach().double().numpy()) for name, p in model.named_parameters()}


def check(model: nn.Module, before: dict[str, Any], axes: dict[str, Any], spec: str) -> int:
    """Clip, compare every parameter; how many were changed."""
    norm = Clipper.for_model(model, spec).step()
    assert norm.item() == pytest.approx(np.sqrt(sum((g**2).sum() for g, _ in before.values())), rel=1e-6)
    changed = 0
    for name, p in model.named_parameters():
        gradient, weight = before[name]
        expected = clipped(gradient, weight, axes[name]) if name in axes else gradient
        np.testing.assert_allclose(p.grad.double().numpy(), expected, rtol=1e-6, atol=1e-12, err_msg=name)
        changed += int(not np.array_equal(expected, gradient))
    return changed


def test_every_kind_of_layer_by_its_own_units() -> None:
    model = layers()
    before = set_gradients(model)
    assert check(model, before, OTHER_AXES, f"agc:clip_factor={FACTOR}") == len(OTHER_AXES)
    row = model["linear"].weight.grad[2].double().norm().item()
    assert row == pytest.approx(FACTOR * EPS, rel=1e-6)


def test_a_row_below_the_limit_keeps_every_bit() -> None:
    model = nn.Linear(8, 2, bias=False)
    model.weight.grad = torch.stack([torch.full((8,), 1e-7), torch.ones(8)])
    before = model.weight.grad.clone()
    Clipper.for_model(model, "agc").step()
    assert torch.equal(model.weight.grad[0], before[0])
    assert not torch.equal(model.weight.grad[1], before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_other_dtypes(dtype) -> None:
    """To the rounding of one multiplication; a complex element is a pair of numbers."""
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": torch.randn(40, 300).to(dtype), "t": torch.randn(5, 7).to(dtype).t()})
    for p in model.values():
        p.grad = (torch.randn(p.shape) * torch.linspace(0.001, 0.1, p.shape[0])[:, None]).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = {}
    for name, p in model.items():
        g, w = p.grad.to(wide), p.detach().to(wide)
        limit = FACTOR * w.abs().square().sum(1, keepdim=True).sqrt().clamp(min=EPS)
        norm = g.abs().square().sum(1, keepdim=True).sqrt()
        assert 0 < (norm > limit).sum() < len(norm)
        expected[name] = torch.where(norm > limit, g * (limit / norm), g)
    Clipper.for_model(model, f"agc:clip_factor={FACTOR}").step()
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    for name, p in model.items():
        difference = (p.grad.to(wide) - expected[name]).abs()
        assert (difference <= rounding * expected[name].abs() + 1e-7 * (dtype == torch.float16)).all(), name


def test_what_is_asked_for_is_clipped_too() -> None:
    model = layers()
    before = set_gradients(model)
    vectors = {name: None for name, p in model.named_parameters() if p.ndim == 1 or name.endswith("bias")}
    axes = OTHER_AXES | vectors | {"lm_head.weight": (1,)}
    spec = f"agc:clip_factor={FACTOR},include_1d=true,include_head=true"
    assert check(model, before, axes, spec) > len(OTHER_AXES)


def test_an_explicit_axis() -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict({"a": torch.randn(5, 4), "experts": torch.randn(2, 5, 4)})
    before = set_gradients(model)
    check(model, before, {"a": (0,), "experts": (1,)}, f"agc:clip_factor={FACTOR},unit_axis=1")


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    tokens = torch.randint(0, 60, (2, 12))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))


@pytest.mark.parametrize(
    ("make", "kept", "left"),
    [
        (tiny_llama, {"q_proj": (1,), "embed_tokens": (1,)}, ("lm_head", "norm")),
        (lambda: tiny_llama(tied=True), {"q_proj": (1,)}, ("embed_tokens", "norm")),
        (gpt2, {"c_attn.weight": (0,), "wpe": (1,)}, ("wte", "ln_", "bias")),
        (mixtral, {"gate_up_proj": (2,), "down_proj": (2,)}, ("lm_head",)),
    ],
    ids=["llama", "tied", "gpt2", "mixtral"],
)
def test_models_of_transformers(make, kept, left) -> None:
    """The outputs of every layer as the model stores them; the head alone, though it be the embedding."""
    model = make()
    before = gradients_of(model)
    Clipper.for_model(model, "agc:clip_factor=1e-4").step()
    for name, p in model.named_parameters():
        if any(word in name for word in left):
            assert torch.equal(p.grad, before[name]), name
        for word, axes in kept.items():
            if word in name:
                norm = p.grad.double().square().sum(axes).sqrt()
                limit = 1e-4 * p.detach().double().square().sum(axes).sqrt().clamp(min=EPS)
                whole = before[name].double().square().sum(axes).sqrt()
                torch.testing.assert_close(norm, torch.minimum(whole, limit), rtol=1e-6, atol=1e-15)
                assert (whole > limit).any()


def test_in_a_chain_the_other_parts_see_parameters() -> None:
    """A norm by parameter after the rows, an element bound at the end; in float64 by hand."""
    model = layers()
    before = set_gradients(model)
    Clipper.for_model(model, f"agc:clip_factor={FACTOR}+param_norm:max_norm=0.2+value:max_value=0.03").step()
    for name, p in model.named_parameters():
        gradient, weight = before[name]
        expected = clipped(gradient, weight, OTHER_AXES[name]) if name in OTHER_AXES else gradient
        norm = float(np.sqrt((expected**2).sum()))
        expected = expected * (0.2 / norm if norm > 0.2 else 1.0)
        np.testing.assert_allclose(
            p.grad.double().numpy(), expected.clip(-0.03, 0.03), rtol=2e-6, atol=1e-12, err_msg=name
        )


def test_the_report_counts_tensors_and_not_rows() -> None:
    model = layers()
    set_gradients(model)
    clipper = Clipper.for_model(model, f"agc:clip_factor={FACTOR}")
    clipper.step()
    assert clipper.report.scalars()["clip/tensor_rate"] == len(OTHER_AXES) / len(list(model.parameters()))


def test_squares_that_overflow_are_clipped_by_their_rows() -> None:
    model = nn.Linear(4, 3, bias=False)
    model.weight.grad = torch.tensor([[1e25] * 4, [1.0] * 4, [0.0] * 4])
    weight = model.weight.detach().double().numpy()
    expected = clipped(model.weight.grad.double().numpy(), weight, (1,))
    Clipper.for_model(model, f"agc:clip_factor={FACTOR}").step()
    np.testing.assert_allclose(model.weight.grad.double().numpy(), expected, rtol=1e-6)


def test_two_ways_of_cutting_and_updates_are_refused() -> None:
    with pytest.raises(SpecError, match="cut in one way only"):
        ClipConfig.parse("agc:unit_axis=0+agc:unit_axis=1")
    with pytest.raises(SpecError, match=r"update=agc.*block_rms"):
        ClipConfig.parse("adaptive", update="agc")


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(9, 3, sparse=True)})
    model["tokens"](torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"tokens.weight has a sparse gradient.*sparse=False"):
        Clipper.for_model(model, "agc").step()
