"""What a clipper decided, kept on the device until it is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_gradclip.types import ClipPlan, Layout, NormStats

_FOLD = 256


class Recorder:
    """Buffers every step of one clipper. Nothing is read to the host before `drain`.

    Args:
        clock: whose steps these are; None counts by itself. An update belongs to the step of its gradient.

    Attributes:
        step: the last optimizer step that was recorded; 1 is the first.
        layout: of what is buffered, one segment per parameter; None if that is nothing.
    """

    def __init__(self, clock: Recorder | None = None) -> None:
        self._clock = clock
        self._step = 0
        self._flags: dict[tuple[bool, torch.device, torch.dtype], Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        self.layout: Layout | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._folded: list[tuple[Tensor, Tensor, Tensor]] = []
        self._notes: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """See the class."""
        return self._step if self._clock is None else self._clock.step

    def __len__(self) -> int:
        return len(self._notes)

    def start_after(self, step: int) -> None:
        """Go on after a step, without what is buffered."""
        self._step = step
        self._clear()

    def add(self, stats: NormStats, plan: ClipPlan, finite: Tensor | bool, skipped: Tensor | bool) -> None:
        """Keep one step; `finite` and `skipped` are 0-d bools on the device, or bools where the host knows them."""
        before = stats.by_param
        scale_P = plan.scale_S
        if stats.layout.unit_S is not None:
            scale_P = (stats.scaled(plan.scale_S).by_param.sumsq_S / before.sumsq_S).sqrt()
        ratio = torch.where(before.sumsq_S > 0, scale_P, 1.0)
        threshold = before.sumsq_S.new_full((), float("nan")) if plan.threshold is None else plan.threshold
        bounded = self._flag(False, threshold) if plan.bound_S is None else (plan.bound_S < float("inf")).any()
        flags = (flag if isinstance(flag, Tensor) else self._flag(flag, threshold) for flag in (finite, skipped))
        small = torch.stack([stats.total, threshold, *flags, bounded])
        self._append(before.layout, (before.sumsq_S, ratio, small))

    def _flag(self, flag: bool, like: Tensor) -> Tensor:
        """A flag that the host knows as a number beside others, made once: a copy would make the device wait."""
        key = flag, like.device, like.dtype
        if key not in self._flags:
            self._flags[key] = like.new_full((), float(flag))
        return self._flags[key]

    def add_overflow(self, layout: Layout) -> None:
        """Keep a step that a loss scaler dropped before anything was measured."""
        unknown = torch.full((len(layout.names),), float("nan"), dtype=layout.dtype, device=layout.device)
        values = (float("inf"), float("nan"), 0.0, 1.0, 0.0)
        small = torch.stack([unknown.new_full((), value) for value in values])  # filled there: nobody waits for a copy
        self._append(layout.by_param, (unknown, torch.ones_like(unknown), small))

    def _append(self, layout: Layout, row: tuple[Tensor, Tensor, Tensor]) -> None:
        if self.layout is not None and self.layout.names != layout.names:
            self._clear()  # the set of trainable parameters changed; what was not written is of the old one
        self.layout = layout
        if self._clock is None:
            self._step += 1
        self._rows.append(row)
        self._notes.append({"step": self.step, "learning_rate": float("nan"), "loss": None})
        if len(self._rows) >= _FOLD:
            self._fold()

    def _fold(self) -> None:
        if self._rows:
            sumsq, scale, small = zip(*self._rows, strict=True)
            self._folded.append((torch.stack(sumsq), torch.stack(scale), torch.stack(small)))
            self._rows = []

    def note(self, learning_rate: Any, loss: Tensor | None) -> None:
        """What the loop knows of the step that was added last: a number or tensor, and a 0-d tensor."""
        if isinstance(learning_rate, Tensor):
            learning_rate = learning_rate.detach().clone()  # a scheduler writes into it
        if self._notes:
            self._notes[-1] |= {"learning_rate": learning_rate, "loss": loss}

    def losses(self) -> Tensor | None:
        """The losses of the buffered steps, float64, shape (T,), NaN where unknown; None if none is known."""
        known = [note["loss"] for note in self._notes if note["loss"] is not None]
        if not known:
            return None
        unknown = torch.full_like(known[0], float("nan"), dtype=torch.float32)
        return torch.stack([unknown if note["loss"] is None else note["loss"].float() for note in self._notes])

    def drain(self, losses: Tensor | None = None) -> dict[str, np.ndarray]:
        """The buffered steps as columns, see hf_gradclip.record.parts; empty if there are none. One host read.

        Args:
            losses: in the place of `self.losses()`: their mean over ranks, say.
        """
        if not self._notes:
            return {}
        self._fold()
        sumsq_TP, scale_TP, small = (torch.cat(blocks) for blocks in zip(*self._folded, strict=True))
        count, width = sumsq_TP.shape
        losses = self.losses() if losses is None else losses
        if losses is None:
            losses = small.new_full((count,), float("nan"))
        block = torch.cat([sumsq_TP.sqrt(), scale_TP, small, losses.to(small)[:, None]], dim=1)
        values = block.cpu().double().numpy()
        notes = self._notes
        self._clear()
        total, threshold, finite, skipped, bounded, loss = values[:, 2 * width :].T
        return {
            "step": np.array([note["step"] for note in notes], dtype=np.int64),
            "loss": loss,
            "learning_rate": np.array([float(note["learning_rate"]) for note in notes]),
            "norm": total,
            "threshold": threshold,
            "finite": finite > 0,
            "skipped": skipped > 0,
            "bounded": bounded > 0,
            "norms": values[:, :width].astype(np.float32),
            "scales": values[:, width : 2 * width].astype(np.float32),
        }
