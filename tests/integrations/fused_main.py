"""Run on two ranks: AdamW's step in Triton's interpreter on the shards of FSDP2.

With TRITON_INTERPRET=1 and HF_GRADCLIP_KERNELS=triton in the environment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_gradclip import optim
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.rule import Memory, Places
from tests.integrations.ranks import serve
from tests.kernels.languages import quicken

ADAGC = "adagc:warmup_steps=2,lambda_rel=1.01,max_norm=4"
BLOCK_RMS = "block_rms:max_rms=0.6"
RUNS: dict[str, dict[str, Any]] = {
    "without": {},
    "global_norm": {"clip": "global_norm:max_norm=4"},
    "adagc": {"clip": ADAGC},
    "block_rms": {"update_clip": BLOCK_RMS},
    "both": {"clip": ADAGC, "update_clip": BLOCK_RMS},
}
STEPS = 8  # the last one with a NaN, if anything is clipped
GROUPS = 2
CHUNK = 64  # elements, so that a shard takes several programs


class Net(torch.nn.Module):
    """Rows that two ranks cannot share evenly, and a head whose one row leaves nothing to the second rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(11, 17)
        self.head = torch.nn.Linear(17, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))


def rows(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a batch; every third one has a small gradient."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 11, generator=generator), torch.randn(8, 1, generator=generator)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    return x[mine], y[mine] * (1.0 + 2 * (step % 3))


def shard(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights, moments and counters, as this rank holds them."""
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [shard(tensor).clone() for tensor in (*weights, *state)]


def fit(model: Net, options: dict[str, Any], rank: int, world: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Train two groups; before the last step the last rank puts a NaN into its memory of one gradient.

    Returns:
        The optimizer; and the share of tensors clipped in each step by each clipper, whether each step was skipped,
        whether the last one left all as it was, and the weights.
    """
    matrices, vectors = [model.body.weight, model.head.weight], [model.body.bias]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 1e-2}]
    optimizer = optim.AdamW(groups, lr=3e-2, eps=1e-3, **options)  # a large eps: a rounding of 0 is no update
    made = {"clip": optimizer.clipper, "clip_update": optimizer.update_clipper}
    clippers = {prefix: clipper for prefix, clipper in made.items() if clipper is not None}
    rates: dict[str, list[float]] = {prefix: [] for prefix in clippers}
    skipped = []
    for step in range(STEPS):
        x, y = rows(step, rank, world)
        (model(x) - y).square().mean().backward()
        before = snapshot(optimizer)
        if clippers and step == STEPS - 1 and rank == world - 1:
            shard(model.body.weight.grad)[-1, -1] = float("nan")
        optimizer.step()
        for prefix, clipper in clippers.items():
            rates[prefix].append(clipper.report.scalars().get(f"{prefix}/tensor_rate", 0.0))
        skipped.append(any(clipper.step_was_skipped for clipper in clippers.values()))
        optimizer.zero_grad()
    kept = all(map(torch.equal, before, snapshot(optimizer)))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    weights = torch.cat([w.detach().flatten() for w in whole])
    return optimizer, {"rates": rates, "skipped": skipped, "kept": kept, "weights": weights}


def spy() -> dict[str, int]:
    """Counts, from here on, the launches of the kernels by name, and the groups that plain torch stepped."""
    from hf_gradclip.kernels.eager import step as plain
    from hf_gradclip.kernels.triton import step as triton

    weights, nothing = [torch.zeros(1)], [None]
    memory, places = Memory(weights, weights, nothing, nothing, nothing), Places((0,), (0,))
    assert choice.step(memory, places).step is triton  # the check at first use is not counted
    counts: dict[str, int] = {}

    def count(owner: Any, name: str, word: str) -> None:
        works = getattr(owner, name)

        def counted(*args: Any) -> Any:
            counts[word] = counts.get(word, 0) + 1
            return works(*args)

        setattr(owner, name, counted)

    count(triton, "step_", "step_")
    count(triton, "measure_update", "measure_update")
    count(plain, "step_", "plain step_")
    triton.CHUNK = CHUNK
    return counts


def scenario(name: str) -> dict[str, Any]:
    """One of RUNS on the shards of this rank."""
    COUNTS.clear()
    model = Net()
    fully_shard(model)
    optimizer, run = fit(model, RUNS[name], dist.get_rank(), dist.get_world_size())
    params = list(model.parameters())
    moments = [value for entry in optimizer.state.values() for key, value in entry.items() if key != "step"]
    run["counts"], run["given up"] = dict(COUNTS), list(choice._given_up.values())
    run["sharded"] = all(isinstance(tensor, DTensor) for tensor in (*params, *moments))
    run["sizes"] = [shard(p).numel() for p in params]
    return run


if __name__ == "__main__":
    dist.init_process_group("gloo")
    quicken()
    COUNTS = spy()
    serve(scenario)
