"""Run on four ranks: HSDP, tensor parallel, FSDP x TP through Clipper, sequence parallel through AdamW."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from hf_gradclip import Clipper, optim
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.ranks import serve

STRATEGIES = {
    "global_norm": "global_norm:max_norm=10",
    "value": "value:max_value=4",
    "param_norm": "param_norm:max_norm=9",
    "zclip": "zclip:warmup_steps=2,z_threshold=0.5,max_norm=10",
    "adagc": "adagc:warmup_steps=2,lambda_rel=2,max_norm=10",
    "agc": "agc:clip_factor=3",
    "groups": "up*=agc:clip_factor=3;down*=param_norm:max_norm=9;head*=global_norm:max_norm=10;*=value:max_value=4",
}
LAYOUTS = ("hsdp", "tp", "fsdp_tp")
UNSETTLED = {"nothing clipped": {}, "update clipped": {"update_clip": "block_rms:max_rms=0.7"}}
FLAT = ("fsdp1", "fsdp1_original_parameters")
WHOLE = ("global_norm", "value", "zclip")
STEPS = 8
SCENARIOS = (*(f"{layout} {word}" for layout in LAYOUTS + FLAT for word in STRATEGIES), "spreads", "unsettled")
PARAMETERS = 12 + 56 + 54 + 21


class Block(torch.nn.Module):
    """A plain parameter, a layer split by columns, one split by rows, and an odd size that no rank count divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(6)
        self.up = torch.nn.Linear(6, 8)
        self.down = torch.nn.Linear(8, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


def rows(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    size = 1.0 + (step % 3)
    mine = slice(part * 8 // parts, (part + 1) * 8 // parts)
    return x[mine] * size, y[mine] * size


def fit(model: torch.nn.Module, spec: str, part: int = 0, parts: int = 1) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    clipper = Clipper.for_model(model, spec)
    norms, rates = [], []
    for step in range(STEPS):
        x, y = rows(step, part, parts)
        (model(x) - y).square().mean().mul(3).backward()
        norms.append(float(clipper.step()))
        rates.append(clipper.report.scalars()["clip/tensor_rate"])
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            whole = [p.detach().flatten().clone() for p in model.parameters()]
        return {"norms": norms, "rates": rates, "weights": torch.cat(whole)[:PARAMETERS]}
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {"norms": norms, "rates": rates, "weights": torch.cat([w.detach().flatten() for w in weights])}


def split(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def laid_out(layout: str) -> tuple[torch.nn.Module, int, int]:
    """The model under a layout, and which part of the batch this rank takes."""
    model = Block()
    if layout in FLAT:
        flat = FullyShardedDataParallel(model, use_orig_params=layout != "fsdp1", device_id=torch.device("cpu"))
        return flat, dist.get_rank(), 4
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
        return model, dist.get_rank(), 4
    if layout == "tp":  # the plain parameters are replicas on every rank
        split(model, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))
        return model, 0, 1
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    split(model, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    return model, mesh["dp"].get_local_rank(), 2


def unsettled(options: dict[str, Any], mesh: DeviceMesh | None = None) -> torch.Tensor:
    """The weights of a layer whose gradients are parts of a sum, each rank's over its part of the sequence."""
    torch.manual_seed(0)
    model = torch.nn.LayerNorm(6)
    if mesh is not None:
        parallelize_module(model, mesh, SequenceParallel(sequence_dim=0))
    optimizer = optim.AdamW(model.parameters(), lr=0.05, eps=1e-3, **options)
    for step in range(STEPS):
        x, size = torch.randn(8, 6) + 1, 1.0 + (step % 3)
        loss = (size * model(x if mesh is None else distribute_tensor(x, mesh, [Shard(0)]))).exp().mean()
        (loss if mesh is None else loss.full_tensor()).backward()
        assert mesh is None or model.weight.grad.placements == (Partial(),)
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([w.detach() for w in weights])


def spreads() -> dict[str, list[float | None]]:
    """What a replica check sees after two steps: as they are, and after one rank of four has changed a gradient."""
    found: dict[str, list[float | None]] = {}
    for layout in LAYOUTS:
        model, part, parts = laid_out(layout)
        clipper = Clipper.for_model(model, "none")
        found[layout] = []
        for changed in (False, True):
            x, y = rows(0, part, parts)
            (model(x) - y).square().mean().backward()
            if changed and dist.get_rank() == 3:
                for p in model.parameters():
                    (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).mul_(1.01)
            clipper.step()
            spread = clipper.view.spread()
            if spread is not None:
                dist.all_reduce(spread, dist.ReduceOp.MAX)
            found[layout].append(None if spread is None else float(spread))
            model.zero_grad()
    return found


def scenario(name: str) -> Any:
    """What one strategy did under a layout, or the words with which it was refused; or one of the other two."""
    if name == "spreads":
        return spreads()
    if name == "unsettled":
        line = init_device_mesh("cpu", (4,))
        return {word: unsettled(options, line) for word, options in UNSETTLED.items()}
    layout, word = name.split()
    model, part, parts = laid_out(layout)
    assert layout in FLAT or any(isinstance(p, DTensor) for p in model.parameters())
    try:
        return fit(model, STRATEGIES[word], part, parts)
    except UnsupportedBackendError as error:
        return str(error)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve(scenario)
