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
    "adagc:warmup_steps=2",
    "autoclip",
    "global_norm:max_norm=0.01",
    "global_norm:max_norm=0.001,norm_type=inf",
    "param_norm:max_norm=0.01",
    "value:max_value=0.001",
    "agc:clip_factor=0.0001,include_1d=true",
    "block_rms:max_rms=0.001",
    "soft:max_norm=0.01",
    "skip_step",
    "zclip:warmup_steps=2 + agc",
]
STEPS = 5


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows of all lengths, one parameter above the size up to which gradients are copied together."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = nn.Sequential(nn.Linear(70, 48), nn.LayerNorm(48), nn.Linear(48, 2000), nn.Conv1d(3, 4, 2))
    return net.to(dtype)


def clipped(spec: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The gradients of all steps after clipping, and the report."""
    found: list[Tensor] = []
    net, generator = model(dtype), torch.Generator("cpu").manual_seed(1)
    clipper = Clipper.for_model(net, spec)
    for _ in range(STEPS):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(dtype) / 100
        clipper.step()
        clipper.load_state_dict(clipper.state_dict())
        found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    hf_gradclip.clip_grad_norm_(net.parameters(), 1e-3)
    found += [p.grad for p in net.parameters() if p.grad is not None]
    return found, clipper.report.scalars()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spec", SPECS)
def test_clipping(spec: str, dtype: torch.dtype) -> None:
    grads, report = clipped(spec, dtype)
    with torch.device("meta"):
        others, other = clipped(spec, dtype)
    assert all(map(torch.equal, grads, others))
    assert len(grads) == len(others)
    assert report == pytest.approx(other, nan_ok=True)


@pytest.mark.parametrize("options", [{"clip": "adaptive"}, {"update_clip": "block_rms:max_rms=0.001"}], ids=str)
@pytest.mark.parametrize("kind", [AdamW, RMSprop, SGD])
def test_optimizers(kind: type[torch.optim.Optimizer], options: Any) -> None:
    weights = []
    for device in ("cpu", "meta"):
        net, generator = model(), torch.Generator("cpu").manual_seed(1)
        with torch.device(device):
            optimizer = kind(net.parameters(), lr=1e-2, **options)
            for _ in range(STEPS):
                for p in net.parameters():
                    p.grad = torch.randn(p.shape, generator=generator, device="cpu")
                optimizer.step()
                optimizer.load_state_dict(optimizer.state_dict())
        weights.append(list(net.parameters()))
    assert all(map(torch.equal, *weights))


def test_tables_are_uploaded_from_the_host() -> None:
    with torch.device("meta"):
        assert table.upload([1, 2], torch.int64, torch.device("cpu")).tolist() == [1, 2]
