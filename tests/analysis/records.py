"""Records made by hand, and by a clipper on gradients of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_gradclip import Clipper
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.record.files import FOLDER, Record, read_record
from hf_gradclip.record.parts import write_part
from hf_gradclip.strategy import describe

LORA_NAMES = tuple(
    f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{factor}.default.weight"
    for i in (0, 1)
    for factor in "AB"
)
NAMES = ("embed.weight", "layers.0.up.weight", "layers.0.down.weight", "head.weight")


def norms_of(steps: int = 120, seed: int = 0) -> np.ndarray:
    """Norms by parameter, shape (steps, 4), around 0.3, with spikes at the steps 60 and 90."""
    rng = np.random.default_rng(seed)
    norms = 0.3 * np.exp(0.15 * rng.standard_normal((steps, len(NAMES))))
    norms[[60, 90]] *= 12
    return norms


def record_by_hand(norms: np.ndarray, scales: np.ndarray | None = None, **changes: Any) -> Record:
    """A record of these norms by parameter, not clipped unless `scales` say so."""
    steps = len(norms)
    columns: dict[str, Any] = {
        "names": tuple(f"p{i}" for i in range(norms.shape[1])) if norms.shape[1] != len(NAMES) else NAMES,
        "numel_P": np.full(norms.shape[1], 100),
        "step_T": np.arange(1, steps + 1),
        "loss_T": np.linspace(5, 3, steps),
        "learning_rate_T": np.full(steps, 1e-3),
        "norm_T": np.sqrt((norms.astype(np.float64) ** 2).sum(axis=1)),
        "threshold_T": np.full(steps, np.nan),
        "scale_max_T": np.ones(steps) if scales is None else scales.max(axis=1),
        "finite_T": np.isfinite(norms).all(axis=1),
        "skipped_T": ~np.isfinite(norms).all(axis=1),
        "bounded_T": np.zeros(steps, dtype=bool),
        "norm_TP": norms.astype(np.float32),
        "scale_TP": np.ones(norms.shape, dtype=np.float32) if scales is None else scales.astype(np.float32),
        "meta": {"version": 1, "place": "gradient", "spec": "none", "config": "none", "backend": "by hand", "world": 1},
    }
    return Record(**columns | changes)


def save(record: Record, output_dir: Path, place: str = "gradient") -> None:
    """Write a record into an output_dir."""
    meta = {**record.meta, "place": place, "names": list(record.names), "numel": record.numel_P.tolist()}
    write_part(output_dir / FOLDER, place, record.of(slice(None)), meta)


def recorded(spec: str, output_dir: Path, norms: np.ndarray | None = None, loss: float | None = None) -> Record:
    """What a clipper recorded over random gradients of these norms; one step has a NaN."""
    norms = norms_of() if norms is None else norms
    torch.manual_seed(0)
    model = nn.ParameterDict({name.replace(".", "_"): torch.zeros(10, 10) for name in NAMES})
    clipper = Clipper.for_model(model, spec)
    clipper.recorder = Recorder()
    for t, row in enumerate(norms):
        for p, norm in zip(model.values(), row, strict=True):
            grad = torch.randn(10, 10)
            p.grad = grad * (norm / grad.norm())
        if t == 33:
            p.grad[0, 0] = float("nan")
        clipper.step(None if loss is None else torch.tensor(loss + 0.01 * (t % 7)))
        clipper.recorder.note(1e-3, None if loss is None else torch.tensor(loss + 0.01 * (t % 7)))
    layout = clipper.view.layout
    meta = {"place": "gradient", "names": list(layout.names), "numel": layout.numel_S.tolist()}
    meta |= {"spec": describe(clipper.config.gradient), "config": str(clipper.config), "backend": "test", "world": 1}
    write_part(output_dir / FOLDER, "gradient", clipper.recorder.drain(), meta)
    return read_record(output_dir)
