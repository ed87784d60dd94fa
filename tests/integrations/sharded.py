"""The loop that every sharded backend and one process run, and the backends by name."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import hf_gradclip
from hf_gradclip import optim
from hf_gradclip.views import view_of
from tests.tiny import Enlarge, counting_data, tiny_llama

STRATEGIES = {
    "global_norm": "global_norm:max_norm=0.34",
    "value": "value:max_value=0.025",
    "param_norm": "param_norm:max_norm=0.25",
    "zclip": "zclip:warmup_steps=2,z_threshold=0.5,max_norm=0.34",
    "adagc": "adagc:warmup_steps=2,lambda_rel=1.01,max_norm=0.34",
    "agc": "agc:clip_factor=0.2",
    "groups": "embed*=global_norm:max_norm=0.22;*self_attn*=agc:clip_factor=0.2;"
    "*mlp* as mlp=adagc:warmup_steps=2,lambda_rel=1.01;*=value:max_value=0.025",
}
OTHERS: dict[str, Any] = {
    "normalize": "normalize:max_scale=3",
    "percentile": "percentile:percentile=50,window=4",
    "mean_sigma": "mean_sigma:window=4,min_values=2,sigmas=0.2,min_sigma=0",
    "ada_clip": "ada_clip:gamma=0.9",
    "relative_value": "relative_value:factor=5",
    "enlarged": Enlarge("tensor"),
    "enlarged rows": Enlarge("row"),
}
"""These run where gradients are sharded in different ways, those of STRATEGIES everywhere and in bf16 too."""
ADAPTIVE = ("adaptive_norm", "adaptive_tensors", "adaptive")
"""These meet one loud batch, since they find nothing to do in a sound run so short."""
LOUD = {5: 50.0}
BY_TENSOR = ("adagc", "agc", "groups")
"""Those whose scales differ between tensors."""
STEPS = 8
RATE = 0.3

Parameters = list[torch.nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    # eps is large, so that a rounding of a gradient near zero is no update
    "adamw": lambda params: optim.AdamW(params, lr=3e-2, eps=1e-3, weight_decay=0.1),
    "adam": lambda params: optim.Adam(params, lr=3e-2, eps=1e-3, weight_decay=0.1),
    "rmsprop": lambda params: optim.RMSprop(params, lr=3e-3, eps=1e-3, weight_decay=0.1),
    "torchs": lambda params: torch.optim.AdamW(params, lr=3e-2, eps=1e-3, weight_decay=0.1),
    "momentum": lambda params: optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=0.1),
    "groups": lambda params: optim.AdamW(
        [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-2},
        ],
        lr=3e-2,
        eps=1e-3,
    ),
}
LIMITS = {
    "value:max_value": {"adamw": 0.9, "adam": 0.988, "rmsprop": 7, "momentum": 0.37},
    "global_norm:max_norm": {"adamw": 40, "adam": 50, "rmsprop": 190, "momentum": 4.8},
    "param_norm:max_norm": {"adamw": 22, "adam": 18, "rmsprop": 100, "momentum": 2},
    "block_rms:max_rms": {"adamw": 0.6, "adam": 0.985, "rmsprop": 4, "momentum": 0.36, "groups": 0.6},
}
UPDATES = {
    f"{optimizer} {field.partition(':')[0]}": (optimizer, f"{field}={limit}")
    for field, limits in LIMITS.items()
    for optimizer, limit in limits.items()
} | {
    "momentum mean_sigma": ("momentum", OTHERS["mean_sigma"]),
    "adamw normalize": ("adamw", OTHERS["normalize"]),
    "adamw percentile": ("adamw", OTHERS["percentile"]),
    "adamw ada_clip": ("adamw", OTHERS["ada_clip"]),
    "adamw relative_value": ("adamw", "relative_value:factor=1.5"),
    "adamw enlarged": ("adamw", Enlarge("tensor")),
    "torchs enlarged": ("torchs", Enlarge("tensor")),
}


UPDATES["adamw by group"] = (
    "adamw",
    "embed*=global_norm:max_norm=12;*mlp*=block_rms:max_rms=0.6;*=value:max_value=0.9",
)


def batch(step: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch of 12; steps 5 and 6 repeat a batch, so that some norms rise and some fall."""
    rows = counting_data()[12 * (step % 6) : 12 * (step % 6) + 12][rank * 12 // world : (rank + 1) * 12 // world]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def fit(
    step: Any,
    model: torch.nn.Module,
    report: Any,
    rank: int,
    world: int,
    steps: range,
    loud: dict[int, float] | None = None,
) -> dict[str, Any]:
    """Train; the norms, the share of tensors clipped in each step, and the final weights.

    The loss of a step in `loud` is so many times too large.
    """
    norms, rates = [], []
    for i in steps:
        norm = step(model(**batch(i, rank, world), use_extra=i % 2).loss * (loud or {}).get(i, 1.0))
        norms.append(float(norm) if norm is not None else None)
        rates.append(report().get("clip/tensor_rate", 0.0))
    return {"norms": norms, "rates": rates, "weights": whole_weights(model)}


class Model(torch.nn.Module):
    """The tiny Llama, and a layer that only every second step uses.

    `kind` is plain, lora or adapters (those train, the rest is frozen), tied (embedding and head are one)
    or groups (no weight decay on the vectors).
    """

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.llama: torch.nn.Module = tiny_llama(tied=kind == "tied")
        if kind in ("lora", "adapters"):
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(3)
            self.llama = get_peft_model(self.llama, LoraConfig(r=2, target_modules="all-linear"))
        self.extra = torch.nn.Linear(3, 5)

    def forward(self, use_extra: int, **rows: torch.Tensor) -> Any:
        output = self.llama(**rows)
        if self.kind == "unused" and use_extra:
            output.loss = output.loss + 0.1 * self.extra(output.logits[..., :3]).square().mean()
        elif self.kind != "unused":
            output.loss = output.loss + 0.0 * self.extra(output.logits[..., :3]).sum()
        return output

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self.kind != "groups":
            # ZeRO gives an unused parameter a zero gradient, under which momentum would coast on; torch gives None.
            return torch.optim.SGD(trainable, lr=lr, momentum=0.0 if self.kind == "unused" else 0.9)
        flat = [p for p in trainable if p.ndim < 2]
        deep = [p for p in trainable if p.ndim >= 2]
        groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "lr": lr / 2}]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def whole_weights(model: torch.nn.Module) -> torch.Tensor:
    """All parameters, gathered where they are sharded."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            named = list(model.named_parameters())
            return torch.cat([p.detach().flatten().clone() for name, p in named if "_flat_param" not in name])
    pieces = []
    for p in model.parameters():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                pieces.append(p.detach().flatten().clone())
        else:
            pieces.append((p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().flatten().clone())
    return torch.cat(pieces)


def warmed_up(step: Any, model: torch.nn.Module, optimizer: Any, report: Any, rank: int, world: int) -> dict[str, Any]:
    """Train with a learning rate that rises from 0; the share of updates clipped in each step, the final weights."""
    full, rates = [group["lr"] for group in optimizer.param_groups], []
    for i in range(STEPS):
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * min(i / 3, 1)
        step(model(**batch(i, rank, world), use_extra=0).loss)
        rates.append(report().get("clip_update/tensor_rate", 0.0))
    return {"rates": rates, "weights": whole_weights(model)}


def one_process_update(optimizer: str, spec: Any) -> dict[str, Any]:
    """The reference for updates: an optimizer of ours writes its update itself, whole batch, no hook."""
    model = Model()
    made: Any = OPTIMIZERS["adamw" if optimizer == "torchs" else optimizer](list(model.parameters()))
    made.update_clipper = hf_gradclip.Clipper(
        hf_gradclip.ClipConfig.parse(spec), view_of(list(model.named_parameters())), "clip_update"
    )

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        made.step()
        made.zero_grad()

    return warmed_up(step, model, made, made.update_clipper.report.scalars, 0, 1)


def one_process(spec: Any, kind: str = "plain", loud: dict[int, float] | None = None) -> dict[str, Any]:
    """The reference: plain torch, the whole batch."""
    model = Model(kind)
    optimizer = model.optimizer(RATE)
    clipper = hf_gradclip.Clipper.for_model(model, spec)

    def step(loss: torch.Tensor) -> torch.Tensor:
        loss.backward()
        norm = clipper.step()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return fit(step, model, clipper.report.scalars, 0, 1, range(STEPS), loud)


def without_shared_memory() -> None:
    """Let DeepSpeed start without its shared memory, which only inference uses, and which takes a minute to compile."""
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def deepspeed_config(stage: int, offload: bool = False, **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration for a client optimizer on the CPU."""
    zero: dict[str, Any] = {"stage": stage, **more.pop("zero", {})}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp1": {"fsdp": {"fsdp_version": 1, "use_orig_params": False}},
    "fsdp1_original_parameters": {"fsdp": {"fsdp_version": 1, "use_orig_params": True}},
    "fsdp2": {"fsdp": {}},
    "fsdp2_offload": {"fsdp": {"cpu_offload": CPUOffloadPolicy(pin_memory=False)}},
    "zero1": {"deepspeed": deepspeed_config(1)},
    "zero2": {"deepspeed": deepspeed_config(2)},
    "zero3": {"deepspeed": deepspeed_config(3, zero={"sub_group_size": 5000, "stage3_param_persistence_threshold": 0})},
    "zero2_offload": {"deepspeed": deepspeed_config(2, offload=True)},
    "zero3_offload": {"deepspeed": deepspeed_config(3, offload=True)},
}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Accelerate makes FSDP of accelerators only; here it takes the branch on gloo too."""
    init = AcceleratorState.__init__

    def forced(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            self.device = torch.device("cpu")  # not cpu:0, which FSDP1 takes for another device
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every later state copies it

    AcceleratorState.__init__ = forced
    try:
        yield
    finally:
        AcceleratorState.__init__ = init


def accelerator_for(backend: dict[str, Any], find_unused: bool = False) -> Accelerator:
    """A fresh Accelerator of a backend, in the process group that is already there."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    if "fsdp" in backend or PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._reset_state()  # the process group stays
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if "deepspeed" in backend:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        gloo = InitProcessGroupKwargs(backend="gloo")  # without it Accelerate counts one process on a CPU
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=backend["deepspeed"]), kwargs_handlers=[gloo])
    if "fsdp" in backend:
        plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], **{"fsdp_version": 2, **backend["fsdp"]},
        )  # fmt: skip
        with fsdp_on_cpu():
            return Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=backend.get("mixed_precision"))
    unused = [DistributedDataParallelKwargs(find_unused_parameters=True)] if find_unused else None
    return Accelerator(cpu=True, kwargs_handlers=unused, mixed_precision=backend.get("mixed_precision"))


def sharded(model: torch.nn.Module, settings: dict[str, Any]) -> bool:
    """Whether no rank holds a whole parameter."""
    if settings.get("fsdp_version") == 1:
        modules = FullyShardedDataParallel.fsdp_modules(model)
        return len(modules) == 3 and all(m._handle.uses_sharded_strategy and m.world_size == 2 for m in modules)
    return all(isinstance(p, DTensor) for p in model.parameters())


class Run:
    """A model prepared on a backend, clipped by a strategy through attach(), or not at all."""

    def __init__(
        self,
        backend: dict[str, Any],
        spec: Any,
        lr: float = RATE,
        kind: str = "plain",
        optimizer: Callable[[Parameters], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.accelerator = accelerator_for(backend, find_unused=kind == "unused")
        if "scaler" in backend:  # Accelerate makes none on a CPU
            self.accelerator.scaler, self.accelerator.native_amp = backend["scaler"], True
        self.attachment = hf_gradclip.attach(self.accelerator, spec) if spec is not None else None
        model = Model(kind)
        self.before = whole_weights(model)
        if backend.get("fsdp", {}).get("use_orig_params") is False:  # the optimizer is made of the flat parameters
            self.model = self.accelerator.prepare(model)
            self.optimizer = self.accelerator.prepare(torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9))
        else:
            made = model.optimizer(lr) if optimizer is None else optimizer(list(model.parameters()))
            self.model, self.optimizer = self.accelerator.prepare(model, made)
        if "fsdp" in backend:
            assert sharded(self.model, backend["fsdp"]), "sharded, not DDP under another name"

    def step(self, loss: torch.Tensor, limit: float | None = 1.0) -> torch.Tensor | None:
        self.accelerator.backward(loss)
        norm = None
        if limit is not None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            norm = self.accelerator.clip_grad_norm_(trainable, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def fit(
        self, steps: range = range(STEPS), limit: float | None = 1.0, loud: dict[int, float] | None = None
    ) -> dict[str, Any]:
        report = self.attachment.scalars if self.attachment is not None else dict
        rank, world = dist.get_rank(), dist.get_world_size()
        return fit(lambda loss: self.step(loss, limit), self.model, report, rank, world, steps, loud)
