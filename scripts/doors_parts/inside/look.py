"""Run in an environment of doors.py: look at what a tool has written, and print one line.

A and B are folders with safetensors, such files, or files of torch; FILE::a,b takes only what is under a or b in one.

look.py moved A B          the largest difference of any weight between two folders or files
look.py same A B           "same", or which tensor is not the same to the bit
look.py logged STATE       the keys that a trainer_state.json logged
look.py clipped STATE      how many of its logs hold a step that was clipped
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def tensors(path: str) -> dict[str, torch.Tensor]:
    """By name what a file of torch or of safetensors holds, or the model files of a folder; of nested ones the path."""
    path, _, keys = path.partition("::")
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.safetensors")) or sorted(place.glob("pytorch_model*.bin"))
        assert files, f"{place}: no weights are in it"
        return {f"{f.relative_to(place)}:{key}": t for f in files for key, t in tensors(str(f)).items()}
    if place.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(place)
    held = torch.load(place, map_location="cpu", weights_only=True)
    return dict(flat("", [held[key] for key in keys.split(",")] if keys else held))


def flat(name: str, thing: Any) -> Any:
    """Every tensor and number in nested containers, with its path."""
    if isinstance(thing, dict):
        thing = thing.items()
    elif isinstance(thing, (list, tuple)):
        thing = enumerate(thing)
    elif torch.is_tensor(thing):
        return [(name, thing)]
    else:
        return [(name, torch.tensor(thing, dtype=torch.float64))] if isinstance(thing, (int, float)) else []
    return [pair for key, value in thing for pair in flat(f"{name}/{key}", value)]


def moved(a: str, b: str) -> str:
    """The largest difference of any weight."""
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys(), f"{sorted(one.keys() ^ two.keys())[:3]} are in one of them only"
    return f"{max(float((one[key].double() - two[key].double()).abs().max()) for key in one):.3g}"


def same(a: str, b: str) -> str:
    """Whether all are the same to the bit."""
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys(), f"{sorted(one.keys() ^ two.keys())[:3]} are in one of them only"
    other = [key for key in one if not torch.equal(one[key], two[key])]
    return f"other: {len(other)} of {len(one)}, {other[0]}" if other else "same"


def logged(path: str) -> str:
    """The keys of all training logs."""
    entries = json.loads(Path(path).read_text("utf-8"))["log_history"]
    return " ".join(sorted({key for entry in entries for key in entry if key.startswith("clip")}))


def clipped(path: str) -> str:
    """How many training logs there are with something clipped, of how many."""
    entries = json.loads(Path(path).read_text("utf-8"))["log_history"]
    rates = [entry["clip/rate"] for entry in entries if "clip/rate" in entry]
    return f"{sum(rate > 0 for rate in rates)} of {len(rates)}"


if __name__ == "__main__":
    words: dict[str, Callable[..., str]] = {"moved": moved, "same": same, "logged": logged, "clipped": clipped}
    print(words[sys.argv[1]](*sys.argv[2:]))
