"""The loop that every sharded backend and one process run, the backends by name, and the scenarios of a launch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import hf_gradclip
from hf_gradclip.strategy import flatten
from tests.tiny import SkipThird, counting_data, tiny_llama

STRATEGIES = {
    "global_norm": "global_norm:max_norm=0.34",
    "value": "value:max_value=0.025",
    "param_norm": "param_norm:max_norm=0.25",
    "zclip": "zclip:warmup_steps=2,z_threshold=0.5,max_norm=0.34",
    "adagc": "adagc:warmup_steps=2,lambda_rel=1.01,max_norm=0.34",
}
STEPS = 8
RATE = 0.3


def batch(step: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's rows of a batch of 12; steps 5 and 6 repeat a batch, so that some norms rise and some fall."""
    rows = counting_data()[12 * (step % 6) : 12 * (step % 6) + 12][rank * 12 // world : (rank + 1) * 12 // world]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def fit(step: Any, model: torch.nn.Module, report: Any, rank: int, world: int, steps: range) -> dict[str, Any]:
    """Train; the norms, the share of tensors clipped in each step, and the final weights."""
    norms, rates = [], []
    for i in steps:
        norm = step(model(**batch(i, rank, world), use_extra=i % 2).loss)
        norms.append(float(norm) if norm is not None else None)
        rates.append(report().get("clip/tensor_rate", 0.0))
    return {"norms": norms, "rates": rates, "weights": whole_weights(model)}


class Model(torch.nn.Module):
    """The tiny Llama, and a layer that only every second step uses.

    `kind` is plain, lora (adapters train, the rest is frozen), tied (embedding and head are one) or groups (no weight
    decay on the vectors).
    """

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.llama: torch.nn.Module = tiny_llama(tied=kind == "tied")
        if kind == "lora":
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
    pieces = []
    for p in model.parameters():
        if hasattr(p, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([p]):
                pieces.append(p.detach().flatten().clone())
        else:
            pieces.append((p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().flatten().clone())
    return torch.cat(pieces)


def one_process(spec: str, kind: str = "plain") -> dict[str, Any]:
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

    return fit(step, model, clipper.report.scalars, 0, 1, range(STEPS))


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
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], **backend["fsdp"],
        )  # fmt: skip
        with fsdp_on_cpu():
            return Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=backend.get("mixed_precision"))
    unused = [DistributedDataParallelKwargs(find_unused_parameters=True)] if find_unused else None
    return Accelerator(cpu=True, kwargs_handlers=unused, mixed_precision=backend.get("mixed_precision"))


class Run:
    """A model prepared on a backend, clipped by a strategy through attach(), or not at all."""

    def __init__(self, backend: dict[str, Any], spec: str | None, lr: float = RATE, kind: str = "plain") -> None:
        self.accelerator = accelerator_for(backend, find_unused=kind == "unused")
        self.attachment = hf_gradclip.attach(self.accelerator, spec) if spec is not None else None
        model = Model(kind)
        self.before = whole_weights(model)
        self.model, self.optimizer = self.accelerator.prepare(model, model.optimizer(lr))
        if "fsdp" in backend:
            assert all(isinstance(p, DTensor) for p in self.model.parameters()), "sharded, not DDP under another name"

    def step(self, loss: torch.Tensor, limit: float | None = 1.0) -> torch.Tensor | None:
        self.accelerator.backward(loss)
        norm = None
        if limit is not None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            norm = self.accelerator.clip_grad_norm_(trainable, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def fit(self, steps: range = range(STEPS), limit: float | None = 1.0) -> dict[str, Any]:
        report = self.attachment.scalars if self.attachment is not None else dict
        rank, world = dist.get_rank(), dist.get_world_size()
        return fit(lambda loss: self.step(loss, limit), self.model, report, rank, world, steps)


def table(name: str) -> dict[str, Any]:
    """Every strategy on one backend."""
    found = {}
    for word, spec in STRATEGIES.items():
        run = Run(BACKENDS[name], spec)
        found[f"{name} {word}"] = {**run.fit(), "backend": run.attachment.clipper.view.backend}
    return found


def kinds(name: str) -> dict[str, Any]:
    """Frozen parameters, tied ones, one unused in some steps, two optimizer groups."""
    return {f"{name} {kind}": Run(BACKENDS[name], STRATEGIES["adagc"], kind=kind).fit() for kind in KINDS}


def engaged(name: str) -> dict[str, Any]:
    """SGD under a limit so tight that nothing may move, whatever DeepSpeed's own clip says."""
    backend = BACKENDS[name]
    variants = [{}, {"gradient_clipping": 0.0}, {"gradient_clipping": 1.0}, {"gradient_clipping": "auto"}]
    found = {}
    for more in variants if "deepspeed" in backend else [{}]:
        changed = {"deepspeed": {**backend["deepspeed"], **more}} if "deepspeed" in backend else backend
        run = Run(changed, "global_norm:max_norm=1e-12", lr=0.5)
        after = run.fit()["weights"]
        found[f"{name} {more.get('gradient_clipping', 'nothing')}"] = (after - run.before).abs().max().item()
    return found


def unhooked(name: str) -> dict[str, Any]:
    """The table's loop with the hook taken out: what the table's assertions must reject."""
    backend = (
        {"deepspeed": {**BACKENDS[name]["deepspeed"], "gradient_clipping": 0.0}} if "zero" in name else BACKENDS[name]
    )
    return {name: Run(backend, None).fit(limit=None if "zero" not in name else 1.0)}


def collectives(name: str) -> dict[str, Any]:
    """c10d operations per step: with a strategy, with one that needs max_abs, and without any clip call."""
    found = {}
    backend = BACKENDS[name]
    for word, spec in {"none": None, "global_norm": "zclip", "value": "value:max_value=0.025"}.items():
        run = Run(backend, spec)
        run.fit(range(1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_one = range(1, 3)
            for i in run_one:
                rank, world = dist.get_rank(), dist.get_world_size()
                run.step(run.model(**batch(i, rank, world), use_extra=0).loss, None if spec is None else 1.0)
        counts = {e.key: e.count for e in profile.key_averages() if e.key.startswith("c10d::")}
        found[f"{name} {word}"] = sum(counts.values()) / 2
    return found


def resume(name: str) -> dict[str, Any]:
    """10 steps against 5, a checkpoint, and 5 more in a new model."""
    folder = tempfile.mkdtemp() if dist.get_rank() == 0 else ""
    shared = [folder]
    dist.broadcast_object_list(shared)
    found = {}
    for word in ("zclip", "adagc"):
        spec, path = STRATEGIES[word], f"{shared[0]}/{word}"
        whole = Run(BACKENDS[name], spec)
        first = whole.fit(range(2, 7))
        whole.accelerator.save_state(path)
        dist.barrier()
        rest = whole.fit(range(7, 12))
        again = Run(BACKENDS[name], spec)
        again.accelerator.load_state(path)
        resumed = again.fit(range(7, 12))
        mine, theirs = (flatten(run.attachment.clipper.state) for run in (whole, again))
        found[f"{name} {word}"] = {
            "state": all(torch.equal(value, theirs[key]) for key, value in mine.items()),
            "norms": rest["norms"] == resumed["norms"],
            "weights": (rest["weights"] - resumed["weights"]).abs().max().item(),
            "rates": first["rates"] + rest["rates"],
            "saved": torch.load(f"{path}/gradclip.pt", weights_only=True),
        }
    return found


def bf16(name: str) -> dict[str, Any]:
    """global_norm in bf16 against the same backend's own clip at the same limit, and every strategy."""
    backend, found = BACKENDS[name], {}
    if "deepspeed" in backend:
        half = {"deepspeed": {**backend["deepspeed"], "bf16": {"enabled": True}, "gradient_clipping": 0.34}}
    else:
        half = {**backend, "mixed_precision": "bf16"}
        if "fsdp" in backend:
            half["fsdp"] = {"mixed_precision_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    found[f"{name} stock"] = Run(half, None).fit(limit=0.34)
    for word, spec in STRATEGIES.items():
        found[f"{name} {word}"] = Run(half, spec).fit()
    return found


def fp16(name: str) -> dict[str, Any]:
    """float16 under a dynamic loss scale that overflows at first, on a CPU that DeepSpeed must be told can do it."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    half = {"enabled": True, "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 1000}
    run = Run({"deepspeed": {**BACKENDS[name]["deepspeed"], "fp16": half}}, "global_norm:max_norm=0.34")
    norms, moved, scales = [], [], []
    for _ in range(7):
        before = whole_weights(run.model)
        norms.append(float(run.step(run.model(**batch(0, dist.get_rank(), dist.get_world_size()), use_extra=0).loss)))
        moved.append(not torch.equal(before, whole_weights(run.model)))
        scales.append(float(run.accelerator.deepspeed_engine_wrapped.engine.optimizer.loss_scale))
    counts = run.attachment.clipper.report.summary()
    return {name: {"norms": norms, "moved": moved, "scales": scales, "counts": counts}}


def skips(name: str) -> dict[str, Any]:
    """A step that a strategy skips, and one with a NaN on one rank: did anything move, and was it said?"""
    found = {}
    for word, spec in {"strategy": SkipThird(), "nan": "none"}.items():
        run = Run(BACKENDS[name], spec)
        moved, said, norms = [], [], []
        for i in range(5):
            before = whole_weights(run.model)
            loss = run.model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
            poisoned = word == "nan" and i == 2 and dist.get_rank() == 1
            norms.append(float(run.step(loss * float("nan") if poisoned else loss)))
            moved.append(not torch.equal(before, whole_weights(run.model)))
            said.append(run.accelerator.optimizer_step_was_skipped)
        counts = run.attachment.scalars()
        found[f"{name} {word}"] = {"moved": moved, "said": said, "norms": norms, "counts": counts}
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "round robin": deepspeed_config(2, zero={"round_robin_gradients": True}),
    "contiguous off": deepspeed_config(2, zero={"contiguous_gradients": False}),
    "overlap": deepspeed_config(2, zero={"overlap_comm": True}),
    "parameter offload": deepspeed_config(3, offload=True, zero={"offload_param": {"device": "cpu"}}),
    "stage 0": deepspeed_config(0),
    "bf16 float32 accumulation": deepspeed_config(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}),
}


def variants(name: str) -> dict[str, Any]:
    """adagc under settings that move the gradients elsewhere."""
    return {word: Run({"deepspeed": config}, STRATEGIES["adagc"]).fit() for word, config in VARIANTS.items()}


KINDS = ("lora", "tied", "unused", "groups")
SCENARIOS = {f.__name__: f for f in (table, kinds, engaged, unhooked, collectives, resume, bf16, fp16, skips, variants)}
