"""A default device that is not the gradients' changes nothing: `torch.set_default_device("cuda")` is for new tensors.

The default device here is "meta", where a tensor that was made on it by accident has no numbers to compute with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_gradclip
from hf_gradclip import Clipper
from hf_gradclip.kernels import table
from hf_gradclip.optim import SGD, AdamW, RMSprop

SPECS = [
    "zclip:warmup_steps=2",
    "adagc:warmup_steps=2,lambda_rel=1.5,max_norm=inf",
    "autoclip",
    "global_norm:max_norm=6",
    "global_norm:max_norm=0.1,norm_type=inf",
    "param_norm:max_norm=6",
    "value:max_value=0.1",
    "agc:clip_factor=0.5,eps=0.1",
    "block_rms:max_rms=0.03",
    "soft:max_norm=6",
    "skip_step:window=5,min_values=2,sigmas=3",
    "zclip:warmup_steps=2 + agc:clip_factor=0.3,eps=0.1",
]
STEPS = 12
LARGE = (4, 7, 10)
ALWAYS = "soft"  # scales every step


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows of all lengths, one parameter above the size up to which gradients are copied together."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = nn.Sequential(nn.Linear(70, 48), nn.LayerNorm(48), nn.Linear(48, 2000), nn.Conv1d(3, 4, 2))
    return net.to(dtype)


def set_gradients(net: nn.Module, step: int) -> list[Tensor]:
    """Noise, six times as large in some steps; the gradients as they are before clipping."""
    generator = torch.Generator("cpu").manual_seed(step)
    size = 0.06 if step in LARGE else 0.01
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p.dtype) * size
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def clipped(spec: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], int]:
    """The gradients of all steps after clipping, the report, and how many steps were changed or dropped."""
    found: list[Tensor] = []
    changed = 0
    net = model(dtype)
    clipper = Clipper.for_model(net, spec)
    for step in range(STEPS):
        before = set_gradients(net, step)
        clipper.step()
        clipper.load_state_dict(clipper.state_dict())
        after = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        changed += not (len(after) == len(before) and all(map(torch.equal, after, before)))
        found += after
    before = set_gradients(net, STEPS)
    hf_gradclip.clip_grad_norm_(net.parameters(), 1e-3)
    found += [p.grad for p in net.parameters() if p.grad is not None]
    assert not any(map(torch.equal, found[-len(before) :], before))
    return found, clipper.report.scalars(), changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPECS)
def test_clipping(spec: str, dtype: torch.dtype) -> None:
    grads, report, changed = clipped(spec, dtype)
    assert changed == STEPS if spec.startswith(ALWAYS) else 0 < changed < STEPS
    with torch.device("meta"):
        others, other, _ = clipped(spec, dtype)
    assert all(map(torch.equal, grads, others))
    assert len(grads) == len(others)
    assert report == pytest.approx(other, nan_ok=True)


def fitted(kind: type[torch.optim.Optimizer], device: str, options: dict[str, Any]) -> list[Tensor]:
    """The weights after all steps."""
    net = model()
    with torch.device(device):
        optimizer = kind(net.parameters(), lr=1e-2, **options)
        for step in range(STEPS):
            set_gradients(net, step)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    return list(net.parameters())


@pytest.mark.parametrize(
    "options", [{"clip": "zclip:warmup_steps=2"}, {"update_clip": "block_rms:max_rms=0.03"}], ids=str
)
@pytest.mark.parametrize("kind", [AdamW, RMSprop, SGD])
def test_optimizers(kind: type[torch.optim.Optimizer], options: Any) -> None:
    weights = fitted(kind, "cpu", options)
    assert all(map(torch.equal, weights, fitted(kind, "meta", options)))
    apart = [(a - b).abs().max().item() for a, b in zip(weights, fitted(kind, "cpu", {}), strict=True)]
    assert min(apart) > 1e-4, "the clip acts"


def test_tables_are_uploaded_from_the_host() -> None:
    with torch.device("meta"):
        assert table.upload([1, 2], torch.int64, torch.device("cpu")).tolist() == [1, 2]
