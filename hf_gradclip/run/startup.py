"""What is compared between ranks before the first step, and what a person should know before a run."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist

from hf_gradclip.clipper import Clipper
from hf_gradclip.device import local
from hf_gradclip.exempt import counts, exempt
from hf_gradclip.kernels import choice
from hf_gradclip.strategy import name_of, parts_of, warmup_of


def world_size() -> int:
    """Processes of this job, whatever Accelerate believes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def insist_on_one_layout(clipper: Clipper, device: torch.device) -> None:
    """Compare a hash of parameters, spec, and what judges and measures, over all ranks, once, before the first step.

    Raises:
        RuntimeError: on every rank, if one differs: their vectors would not add up.
    """
    if world_size() == 1:
        return
    layout = clipper.view.layout
    seen, language = clipper.seen(layout), _language_of(clipper)
    text = f"{clipper.config} {layout.names} {layout.numel_S.tolist()}"
    text += f" {seen.device.type} {seen.by_param.device.type} {language}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends.sum()) != 0:
        raise RuntimeError(
            f"Rank {dist.get_rank()} clips {len(layout)} segments by {clipper.config} with kernels in {language}, and "
            "another rank something else. All ranks must train the same parameters with the same spec, and measure "
            f"them alike: the same version of the package, and the same {choice.VARIABLE}."
        )


def _language_of(clipper: Clipper) -> str:
    """The language that serves the gradients of a clipper, checked now if it was not yet."""
    device, watched = clipper.view.layout.device, [local(p) for p in clipper.view.watched()]
    return (choice.whole(watched, device) if watched else choice.language_of(device)).name


def in_force(clipper: Clipper, world: int = 1, kind: str = "") -> str:
    """One line for the start of a run: strategy, backend, segments, what serves, what a step costs, what is exempt.

    Args:
        clipper: of the gradients.
        world: how many processes train.
        kind: what brings their gradients together, where there are several.
    """
    config, view = clipper.config, clipper.view
    needs, segments = config.gradient.needs, len(view.layout)
    ranks = f", {kind} x {world}" if world > 1 else ""
    language = _language_of(clipper).replace("torch", "plain torch")
    reads = 0 if config.nonfinite == "pass" or view.guarded or not config.skip_sync else 1
    sends = view.reductions(needs)
    numbers = segments * (2 if needs.weights else 1)
    sent = f"sends {numbers} numbers {'twice' if sends == 2 else 'once'}" if sends else "sends nothing"
    if needs.loss and world > 1:
        sent += " and the loss"
    left_alone = "; ".join(filter(None, (counts(config.gradient, view), exempt(config.gradient, view))))
    return (
        f"{clipper.prefix}: {config}; {view.backend}{ranks}, {segments} segments, "
        f"kernels in {language}; a step reads the gradients {'and the weights ' if needs.weights else ''}once, {sent}, "
        f"reads {reads} number{'s'[: reads != 1]} to the host"
        f"{'; the same again for the update' if config.update is not None else ''}"
        f"{left_alone and '; '}{left_alone}"
    )


def substitute_for(accelerator: Any) -> str:
    """Words for a launch that asked for sharding where Accelerate trains DDP in its place; "" where it does not."""
    asked = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
    for variable, kind in asked.items():
        if os.environ.get(variable, "").lower() in ("1", "true") and accelerator.distributed_type.name != kind:
            kind = accelerator.distributed_type.value
            if kind == "NO":
                return f"{variable} is set, but this is one process: nothing is sharded. Start it by accelerate launch."
            return (
                f"{variable} is set, but this run is {kind}: nothing is sharded. Without GPUs Accelerate shards under "
                "DeepSpeed only, with DS_ACCELERATOR=cpu and without ACCELERATE_USE_CPU."
            )
    return ""


def check_run(clipper: Clipper, steps: int | None) -> list[str]:
    """What a person should know before a run starts: warnings, in words."""
    warnings = []
    warmup = warmup_of(clipper.config.gradient)
    if steps is not None and 0 < steps < 2 * warmup:
        words = " + ".join(map(name_of, parts_of(clipper.config.gradient)))
        warnings.append(
            f"The run has {steps} steps and {words} warms up for {warmup} of them. "
            + (f"Set warmup_steps to {steps // 4} or less, or train longer." if steps >= 8 else "Train longer.")
        )
    half = sum(p.dtype == torch.float16 for p in clipper.view.watched())
    if half:
        warnings.append(
            f"{half} trainable parameters are float16: their gradients lose small values and overflow early. "
            "Load the model in float32 with fp16=True, or use bf16."
        )
    return warnings
