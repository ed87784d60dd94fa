"""Which checkpoint a run goes on from: the newest that is whole, and why others are passed over.

A process that is killed while it saves leaves a folder that looks like a checkpoint. The Trainer writes the weights
first and trainer_state.json last, but other ranks, disks and rotations are not bound to that order, so every file is
looked at: that it is there, and that it ends where it says.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from finetune_parts.words import InputError, tell
from hf_gradclip.config import ClipConfig
from hf_gradclip.run.state import STATE_NAME, UPDATE_NAME
from hf_gradclip.state import flatten
from hf_gradclip.strategy import Strategy
from hf_gradclip.types import Layout

RECORD = "gradclip"
STATE = "trainer_state.json"
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
ARCHIVES = {".pt", ".pth", ".bin"}
ENGINE = "latest"
"""The file by which DeepSpeed names the folder of its newest state."""


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders that are named as checkpoints, the newest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def fault_of(folder: Path, states: Iterable[str] = ()) -> str | None:
    """What is missing from a checkpoint or broken in it; None where it is whole.

    Args:
        folder: the checkpoint.
        states: files of clip states that this run goes on from.
    """
    try:
        step = json.loads((folder / STATE).read_text("utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{STATE} is missing, which is written last"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} cannot be read"
    if folder.name.startswith("checkpoint-") and folder.name != f"checkpoint-{step}":
        return f"{STATE} is of step {step}"
    wanted = [*_wanted(folder), *(name for name in states if _was_clipped(folder, name)), *_random_numbers(folder)]
    for name in wanted:
        if not (folder / name).exists():
            return f"{name} is missing"
    return next((f"{path.relative_to(folder)} {fault}" for path in _files(folder) if (fault := _broken(path))), None)


def states_of(clip: ClipConfig | None, model: torch.nn.Module) -> list[str]:
    """The files of a checkpoint in which this way of clipping keeps something from one step to the next."""
    if clip is None:
        return []
    strategies = {STATE_NAME: clip.gradient, UPDATE_NAME: clip.update}
    return [name for name, strategy in strategies.items() if keeps_state(strategy, model)]


def keeps_state(strategy: Strategy | None, model: torch.nn.Module) -> bool:
    """Whether a strategy remembers anything from one step to the next."""
    if strategy is None:
        return False
    named = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    layout = Layout.of_parameters(tuple(named), list(named.values()), torch.device("cpu"))
    return bool(flatten(strategy.init(layout)))


def checkpoint_for(asked: str | None, output_dir: str, states: Iterable[str] = ()) -> str | None:
    """The checkpoint that --resume_from_checkpoint means; rank 0 looks, and all go on from the same.

    Args:
        asked: a folder; "true" for the newest whole one; None or "false" for none.
        output_dir: whose checkpoints "true" means.
        states: files of clip states that this run goes on from.

    Raises:
        InputError: for a folder that is no whole checkpoint.
    """
    if asked is None or asked.lower() == "false":
        return None
    found: list[Any] = [None]
    if asked.lower() == "true":
        found = [_newest_whole(Path(output_dir), list(states))]
    elif fault := fault_of(Path(asked), states):
        others = [path.name for path in checkpoints_in(Path(asked))]
        raise InputError(
            f"--resume_from_checkpoint {asked}: holds {', '.join(others)}. Give one of them."
            if others
            else f"--resume_from_checkpoint {asked}: {fault}. true takes the newest whole one of {output_dir}."
        )
    else:
        found = [asked]
    if torch.distributed.is_initialized():
        broadcast_object_list(found)
    return found[0]


def end_of_run(checkpoint: str, max_steps: int, epochs: float) -> str:
    """Words for a checkpoint after which nothing is left to train, "" for any other.

    The Trainer itself would make one more step.

    Args:
        checkpoint: to go on from.
        max_steps: of the run; where it is not above 0, `epochs` counts.
        epochs: of the run.
    """
    state = json.loads(Path(checkpoint, STATE).read_text("utf-8"))
    step, epoch = state["global_step"], float(state.get("epoch") or 0)
    if step < max_steps or (max_steps <= 0 and epoch < epochs):
        return ""
    flag, given = ("--max_steps", max_steps) if max_steps > 0 else ("--num_train_epochs", epochs)
    return f"{checkpoint} is of step {step}, where a run of {flag} {given:g} has ended. Raise it to train on."


def _newest_whole(output_dir: Path, states: list[str]) -> str | None:
    """Look from the newest on, and say what is passed over and what is taken."""
    every = checkpoints_in(output_dir)
    for path in every:
        fault = fault_of(path, states)
        if fault is None:
            tell(f"going on from {path}.")
            return str(path)
        tell(f"{path} is passed over: {fault}.")
    tell(
        f"--resume_from_checkpoint true: {output_dir} has no {'whole ' if every else ''}checkpoint. Starting at step 0."
    )
    return None


def _random_numbers(folder: Path) -> list[str]:
    """The files of random numbers of this job's ranks that an older checkpoint has: every rank writes its own."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    every = checkpoints_in(folder.parent)
    older = every[every.index(folder) + 1 :] if folder in every else []
    return [name for name in names if any((other / name).exists() for other in older)]


def _was_clipped(folder: Path, name: str) -> bool:
    """Whether its run kept such a state: another checkpoint has one, or the record or the log says so."""
    if any((other / name).exists() for other in checkpoints_in(folder.parent)):
        return True
    place, key = ("update-", "clip_update/") if name == UPDATE_NAME else ("gradient-", "clip/")
    if any((folder.parent / RECORD).glob(f"{place}*.parquet")):
        return True
    history = json.loads((folder / STATE).read_text("utf-8")).get("log_history", [])
    return any(word.startswith(key) for entry in history for word in entry)


def _wanted(folder: Path) -> Iterable[str]:
    """Files without which training cannot go on, by who saved: DeepSpeed, FSDP, or the Trainer alone."""
    if (folder / ENGINE).exists():
        yield (folder / ENGINE).read_text("utf-8").strip() or ENGINE
        return
    sharded = [path for path in folder.iterdir() if path.is_dir() and "_fsdp_" in path.name]
    if sharded:
        yield from (f"{path.name}/.metadata" for path in sharded)
        yield "optimizer_0/.metadata"
    else:
        index = next((name for name in INDICES if (folder / name).exists()), None)
        if index is None:
            fsdp = ["pytorch_model_fsdp.bin"] if (folder / "pytorch_model_fsdp.bin").exists() else []
            yield next((name for name in WEIGHTS if (folder / name).exists()), (fsdp or WEIGHTS)[0])
            yield "optimizer.bin" if fsdp else "optimizer.pt"
        else:
            try:
                yield from sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                yield f"what {index} should name"
            yield "optimizer.pt"
    yield "scheduler.pt"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _broken(path: Path) -> str | None:
    """What is wrong with one file; None for a sound one, and for kinds that cannot be judged."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        if path.suffix in ARCHIVES:
            with zipfile.ZipFile(path):
                return None
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        if path.suffix == ".distcp" and not path.stat().st_size:
            return "is empty"
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError):
        return "is cut short or damaged"
    return None
