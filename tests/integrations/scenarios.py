"""What the ranks of a launch run: each scenario takes a backend's name and gives what it found, by key."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_gradclip
from hf_gradclip import optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.record.files import read_record
from hf_gradclip.state import flatten
from hf_gradclip.views.view import UnsupportedBackendError
from hf_gradclip.wrappers import innermost
from tests.integrations.sharded import (
    ADAPTIVE,
    BACKENDS,
    LOUD,
    OPTIMIZERS,
    OTHERS,
    RATE,
    STEPS,
    STRATEGIES,
    UPDATES,
    Model,
    Parameters,
    Run,
    accelerator_for,
    batch,
    deepspeed_config,
    fit,
    warmed_up,
    whole_weights,
)
from tests.tiny import SkipThird

OFFLOADED = ("global_norm", "value", "agc", "groups")
"""One number for all, one for each element, one for each row, and all of it: what they share is where gradients are."""


def table(name: str) -> dict[str, Any]:
    """Every strategy on one backend; with offload, which costs seconds for each, those of OFFLOADED."""
    found = {}
    for word in OFFLOADED if "offload" in name and "zero" in name else STRATEGIES:
        spec = STRATEGIES[word]
        run = Run(BACKENDS[name], spec)
        found[word] = {**run.fit(), "backend": run.attachment.clipper.view.backend}
    return found


THIRDS = ("global_norm", "agc", "groups", "percentile", "enlarged rows")


def thirds(name: str) -> dict[str, Any]:
    """What three ranks may cut elsewhere: one number, rows, tensors, groups."""
    return {word: Run(BACKENDS[name], (STRATEGIES | OTHERS)[word]).fit() for word in THIRDS}


def others(name: str) -> dict[str, Any]:
    """The other strategies on one backend; and one that makes larger, in a step of ours that clips as it reads."""
    found = {word: Run(BACKENDS[name], spec).fit() for word, spec in OTHERS.items()}
    run = Run(BACKENDS[name], OTHERS["enlarged"], optimizer=lambda params: optim.SGD(params, lr=RATE, momentum=0.9))
    return found | {"enlarged taken": run.fit()}


def loud(name: str) -> dict[str, Any]:
    """The adaptive rules on one backend, with one loud batch."""
    return {word: Run(BACKENDS[name], word).fit(loud=LOUD) for word in ADAPTIVE}


def kinds(name: str) -> dict[str, Any]:
    """Frozen parameters, adapters that `adaptive` leaves whole, tied ones, one unused in some steps, two groups."""
    return {kind: Run(BACKENDS[name], clip, kind=kind).fit(loud=loud) for kind, (clip, loud) in KINDS.items()}


def engaged(name: str) -> dict[str, Any]:
    """SGD under a limit so tight that nothing may move, whatever DeepSpeed's own clip says."""
    backend = BACKENDS[name]
    variants = [{}, {"gradient_clipping": 0.0}, {"gradient_clipping": 1.0}, {"gradient_clipping": "auto"}]
    found = {}
    for more in variants if "deepspeed" in backend else [{}]:
        changed = {"deepspeed": {**backend["deepspeed"], **more}} if "deepspeed" in backend else backend
        run = Run(changed, "global_norm:max_norm=1e-12", lr=0.5)
        after = run.fit(range(3))["weights"]
        found[str(more.get("gradient_clipping", "nothing"))] = (after - run.before).abs().max().item()
    return found


def unhooked(name: str) -> dict[str, Any]:
    """The table's loop with the hook taken out: what the table's assertions must reject."""
    backend = (
        {"deepspeed": {**BACKENDS[name]["deepspeed"], "gradient_clipping": 0.0}} if "zero" in name else BACKENDS[name]
    )
    return Run(backend, None).fit(limit=None if "zero" not in name else 1.0)


def collectives(name: str) -> dict[str, Any]:
    """c10d operations per step: with a strategy, with one that needs max_abs, and without any clip call."""
    found = {}
    backend = BACKENDS[name]
    words = {"global_norm": "zclip", "value": "value:max_value=0.025", "agc": "agc", "adaptive": "adaptive"}
    specs: dict[str, Any] = {"none": None, **{word: {"gradient": gradient} for word, gradient in words.items()}}
    specs["update"] = {"gradient": "zclip", "update": "block_rms"}
    for word, spec in specs.items():
        run = Run(backend, None if spec is None else {**spec, "check_every": 0})  # replicas are compared in step 2
        run.fit(range(1))
        with Counting() as counting:
            for i in range(1, 3):
                rank, world = dist.get_rank(), dist.get_world_size()
                run.step(run.model(**batch(i, rank, world), use_extra=0).loss, None if spec is None else 1.0)
        found[word] = counting.count / 2
    return found


class Counting(TorchDispatchMode):
    """Counts the collectives that are sent off, from Python or from inside torch."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            self.count += 1
        return func(*args, **(kwargs or {}))


RESUMED: dict[str, Any] = {
    "zclip": STRATEGIES["zclip"],
    "adagc": STRATEGIES["adagc"],
    "adaptive": "adaptive",
    "groups": STRATEGIES["groups"],
    "update": {"gradient": STRATEGIES["zclip"], "update": "adagc:warmup_steps=2,max_norm=2"},
}


def resumed_on(name: str) -> list[str]:
    """The rows of a backend; on ZeRO-3, which takes seconds for each, those whose states have every shape there is."""
    return ["zclip", "groups", "update"] if name == "zero3" else list(RESUMED)


def states(run: Run) -> dict[str, torch.Tensor]:
    """The state of every clipper of a run."""
    clippers = [run.attachment.clipper, *run.attachment.updates.clippers]
    return {f"{i} {key}": value for i, c in enumerate(clippers) for key, value in flatten(c.state).items()}


def resume(name: str) -> dict[str, Any]:
    """10 steps against 5, a checkpoint, and 5 more in a new model."""
    folder, found = shared_folder(), {}
    for word in resumed_on(name):
        spec = RESUMED[word]
        path = f"{folder}/{word}"
        whole = Run(BACKENDS[name], spec)
        first = whole.fit(range(2, 7))
        whole.accelerator.save_state(path)
        dist.barrier()
        rest = whole.fit(range(7, 12))
        again = Run(BACKENDS[name], spec)
        again.accelerator.load_state(path)
        resumed = again.fit(range(7, 12))
        mine, theirs = (states(run) for run in (whole, again))
        found[word] = {
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
    found["stock"] = Run(half, None).fit(limit=0.34)
    for word in OFFLOADED if name == "zero3" else STRATEGIES:
        found[word] = Run(half, STRATEGIES[word]).fit()
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
    return {"norms": norms, "moved": moved, "scales": scales, "counts": counts}


def skips(name: str) -> dict[str, Any]:
    """A step that a strategy skips, and one with a NaN on one rank: did anything move, and was it said?"""
    found = {}
    cases = {f"{word} {kind}": (word, kind) for word in ("strategy", "nan") for kind in ("sgd", *STEPPED)}
    for case, (word, kind) in cases.items():
        if word == "strategy" and kind != "sgd":
            continue
        run = Run(BACKENDS[name], SkipThird() if word == "strategy" else "none", optimizer=STEPPED.get(kind))
        moved, said, norms, kept = [], [], [], True
        for i in range(5):
            before, inside = whole_weights(run.model), snapshot(run)
            loss = run.model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
            poisoned = word == "nan" and i == 2 and dist.get_rank() == 1
            norms.append(float(run.step(loss * float("nan") if poisoned else loss)))
            moved.append(not torch.equal(before, whole_weights(run.model)))
            said.append(run.accelerator.optimizer_step_was_skipped)
            if i == 2:
                kept = len(inside) > 0 and all(map(torch.equal, inside, snapshot(run)))
        counts = run.attachment.scalars()
        found[case] = {"moved": moved, "said": said, "norms": norms, "counts": counts, "kept": kept}
    return found


def policies(name: str) -> dict[str, Any]:
    """In bf16, NaN on one rank from the third step on: which step stops the run, and with which words."""
    backend = {"deepspeed": {**BACKENDS[name]["deepspeed"], "bf16": {"enabled": True}}}
    found = {}
    for word, more in {"raise": {"nonfinite": "raise"}, "limit": {"max_consecutive_skips": 3}}.items():
        run, said = Run(backend, {"gradient": STRATEGIES["zclip"], **more}), ""
        for i in range(8):
            before = whole_weights(run.model)
            loss = run.model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
            try:
                run.step(loss * float("nan") if i >= 2 and dist.get_rank() == 1 else loss)
            except NonFiniteError as error:
                said = str(error)
                break
        found[word] = {"step": i, "said": said, "moved": not torch.equal(before, whole_weights(run.model))}
    return found


STEPPED: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "ours": lambda params: optim.AdamW(params, lr=1e-2),
}


def snapshot(run: Run) -> list[torch.Tensor]:
    """Every moment and counter of the optimizer, as this rank holds it."""
    tensors = [v for entry in innermost(run.optimizer).state.values() for v in entry.values() if torch.is_tensor(v)]
    return [(t.to_local() if isinstance(t, DTensor) else t).clone() for t in tensors]


def poisoned(name: str) -> dict[str, Any]:
    """50 batches of which 3 are NaN on one rank, against the 47 others, at a constant learning rate."""
    runs = {}
    for word in ("seen", "never seen"):
        run = Run(BACKENDS[name], "zclip:warmup_steps=5,z_threshold=0.5", optimizer=STEPPED["adamw"])
        rank, world = dist.get_rank(), dist.get_world_size()
        for i in range(50):
            bad = i in (12, 25, 40)
            if bad and word == "never seen":
                continue
            loss = run.model(**batch(i, rank, world), use_extra=0).loss
            run.step(loss * float("nan") if bad and rank == 1 else loss)
        runs[word] = {"weights": whole_weights(run.model), "counts": run.attachment.clipper.report.summary()}
    return runs


def folded(name: str) -> dict[str, Any]:
    """The coefficient and the skip flag through a fused optimizer, plan and flag through one of ours, against the same
    run without; step 2 has a NaN."""
    found = {}
    unread = {"skip_sync": False}
    words = {
        "plain": {},
        "folded": {"fold": True},
        "unread": {"fold": True, **unread},
        "taken": {},
        "taken unread": unread,
    }
    for word, more in words.items():
        spec = {"gradient": STRATEGIES["zclip"], **more}
        run = Run(BACKENDS[name], spec, optimizer=STEPPED["ours" if "taken" in word else "fused adamw"])
        assert (run.attachment._steps_of.taker(run.attachment.clipper) is not None) == ("taken" in word)
        kept = True
        for i in range(STEPS):
            loss = run.model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
            before = [whole_weights(run.model), *snapshot(run)]
            run.step(loss * float("nan") if i == 2 and dist.get_rank() == 1 else loss)
            if i == 2:
                kept = all(map(torch.equal, before, [whole_weights(run.model), *snapshot(run)]))
        counts = run.attachment.scalars()
        found[word] = {"weights": whole_weights(run.model), "counts": counts, "kept": kept}
    return found


def swap(name: str) -> str:
    """An optimizer of ours where Accelerate would put another one in its place."""
    config = {**BACKENDS[name]["deepspeed"], "zero_force_ds_cpu_optimizer": True}
    try:
        Run({"deepspeed": config}, "zclip", optimizer=OPTIMIZERS["momentum"])
    except UnsupportedBackendError as error:
        return str(error)
    return "prepared"


def updates_on(name: str) -> list[str]:
    """The rows of a backend: all; on ZeRO-3, which takes seconds for each, every optimizer and every strategy once."""
    if "offload" in name:
        return [word for word in UPDATES if word.startswith("groups")]
    few = ("block_rms", "mean_sigma")
    return [word for word in UPDATES if name != "zero3" or word.startswith("adamw") or word.endswith(few)]


def updates(name: str) -> dict[str, Any]:
    """Every optimizer and a strategy for its update, on one backend; with offload two optimizer groups only."""
    found = {}
    for word in updates_on(name):
        optimizer, spec = UPDATES[word]
        run = Run(BACKENDS[name], {"gradient": "none", "update": spec}, optimizer=OPTIMIZERS[optimizer])
        rank, world = dist.get_rank(), dist.get_world_size()
        found[word] = warmed_up(run.step, run.model, run.optimizer, run.attachment.scalars, rank, world)
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


def flat(name: str) -> dict[str, Any]:
    """Every strategy under FSDP1: what it did, or the words with which it was refused."""
    found: dict[str, Any] = {}
    for word, spec in {**STRATEGIES, **{word: OTHERS[word] for word in FLAT_TOO}}.items():
        try:
            run = Run(BACKENDS[name], spec)
            found[word] = {**run.fit(), "backend": run.attachment.clipper.view.backend}
        except UnsupportedBackendError as error:
            found[word] = str(error)
    return found


def scaled(name: str) -> dict[str, Any]:
    """The table's steps under a loss scale, with one more before the sixth whose loss is too large on one rank."""
    found = {}
    for word in ("zclip", "adagc"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
        run = Run({**BACKENDS[name], "mixed_precision": "fp16", "scaler": scaler}, STRATEGIES[word])
        first = run.fit(range(5))
        state = {key: value.clone() for key, value in flatten(run.attachment.clipper.state).items()}
        weights, scale = whole_weights(run.model), scaler.get_scale()
        loss = run.model(**batch(5, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
        norm = float(run.step(loss * 1e38 if dist.get_rank() == 1 else loss))
        after = flatten(run.attachment.clipper.state)
        overflow = {
            "norm": norm,
            "state": all(torch.equal(value, after[key]) for key, value in state.items()),
            "moved": not torch.equal(weights, whole_weights(run.model)),
            "said": run.accelerator.optimizer_step_was_skipped,
            "scales": [scale, scaler.get_scale()],
            "counts": run.attachment.scalars(),
        }
        rest = run.fit(range(5, STEPS))
        joined = {key: first[key] + rest[key] for key in ("norms", "rates")}
        found[word] = {**joined, "weights": rest["weights"], "overflow": overflow}
    return found


def accumulated(name: str) -> dict[str, Any]:
    """A clip call after every one of two micro-batches, of a strategy and of the backend itself."""
    config = {**BACKENDS[name]["deepspeed"], "gradient_accumulation_steps": 2, "gradient_clipping": 0.278}
    found = {}
    for word, spec in {"ours": "global_norm:max_norm=0.278", "stock": None}.items():
        run = Run({"deepspeed": config}, spec)
        run.accelerator.gradient_accumulation_steps = 2
        norms = []
        for i in range(12):
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(
                    run.model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
                )
                norm = run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
                norms.append(None if norm is None else float(norm))
                run.optimizer.step()
                run.optimizer.zero_grad()
        found[word] = {"norms": norms, "weights": whole_weights(run.model)}
    return found


def noted(name: str) -> dict[str, Any]:
    """What is recorded where nobody calls for a clip: `auto=True`, under an engine that steps in backward."""
    folder = shared_folder()
    accelerator = accelerator_for(BACKENDS[name])
    attachment = hf_gradclip.attach(accelerator, STRATEGIES["zclip"], auto=True, record=folder)
    model = Model()
    model, optimizer = accelerator.prepare(model, model.optimizer(RATE))
    losses = []
    for i in range(STEPS):
        loss = model(**batch(i, dist.get_rank(), dist.get_world_size()), use_extra=0).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        attachment.scalars()
    attachment.finish()  # not end_training, which would end the process group
    dist.barrier()
    record = read_record(folder)
    return {"losses": losses, "record": record.loss_T, "rates": record.learning_rate_T, "steps": record.step_T}


def reacts(name: str) -> dict[str, Any]:
    """A linear regression under SGD, with two steps that are skipped, and a spike after which the rate is lower."""
    accelerator = accelerator_for({"deepspeed": deepspeed_config(int(name.removeprefix("zero")))})
    clip = {"gradient": "none", "update": "none", "after_spike": "lower_rate:factor=0.01,steps=3"}
    attachment = hf_gradclip.attach(accelerator, clip)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    norms, updates = [], []
    for i in range(24):
        factor = {5: float("nan"), 6: float("nan"), 20: 1000.0}.get(i, 1.0)
        accelerator.backward(model(torch.ones(2, 4)).mean() * factor)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        norms.append(attachment.clipper.report.scalars().get("clip/norm_mean"))
        updates.append(attachment.updates.clippers[0].report.scalars().get("clip_update/norm_mean"))
    return {"norms": norms, "updates": updates, "scheduled": scheduler.scheduler.last_epoch}


def lacking(name: str) -> dict[str, Any]:
    """A checkpoint without a clip state on rank 1 alone: does the run go on as where both have it?"""
    folder, found = shared_folder(), {}
    run = Run(BACKENDS[name], STRATEGIES["adagc"])
    run.fit(range(6))
    run.accelerator.save_state(folder)
    dist.barrier()
    without = tempfile.mkdtemp()
    shutil.copytree(folder, without, dirs_exist_ok=True)
    Path(without, "gradclip.pt").unlink()
    partial = without if dist.get_rank() == 1 else folder
    for word, path in {"whole": folder, "lacking": partial, "without": without}.items():
        run = Run(BACKENDS[name], STRATEGIES["adagc"])
        run.accelerator.load_state(path)
        rest = run.fit(range(6, 10))
        both = [torch.empty_like(rest["weights"]) for _ in range(2)]
        dist.all_gather(both, rest["weights"])
        found[word] = {**rest, "agree": torch.equal(*both)}
    return found


def looked(name: str) -> dict[str, Any]:
    """The table's zclip; between backward and clip a layer is made, and FSDP2 shows whole weights of the root group."""
    run, rank, world = Run(BACKENDS[name], STRATEGIES["zclip"]), dist.get_rank(), dist.get_world_size()
    groups = [module for module in run.model.modules() if hasattr(module, "reshard")]
    whole = []

    def step(loss: torch.Tensor) -> torch.Tensor | None:
        run.accelerator.backward(loss)
        torch.nn.Linear(1, 1)
        with torch.no_grad():
            run.model(**batch(0, rank, world), use_extra=0)
        whole.append(not all(isinstance(p, DTensor) for p in run.model.parameters()))
        norm = run.attachment.clip(run.model)
        for module in groups:
            module.reshard()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return norm

    return {**fit(step, run.model, run.attachment.scalars, rank, world, range(STEPS)), "whole": whole}


def shared_folder() -> str:
    """A new folder that every rank knows."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    return folder[0]


FLAT_TOO = ("mean_sigma", "normalize")
KINDS: dict[str, Any] = dict.fromkeys(("lora", "tied", "unused", "groups"), (STRATEGIES["adagc"], None))
KINDS["adapters"] = ("adaptive", LOUD)
"""The clip of each, and its loud batch."""
SCENARIOS = {
    f.__name__: f
    for f in (
        table, thirds, others, loud, kinds, engaged, unhooked, collectives, resume, bf16, fp16, skips, variants,
        poisoned, updates, folded, flat, scaled, swap, accumulated, noted, lacking, looked, policies, reacts,
    )
}  # fmt: skip
