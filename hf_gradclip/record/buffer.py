"""What a clipper decided, kept where it was until it is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_gradclip.types import ClipPlan, Layout, NormStats

_FOLD = 256


class Row(NamedTuple):
    """One step of P parameters, or T of them along a first axis; each where it was judged, on the host or a device.

    Args:
        before: sums of squares as measured, shape (P,).
        scale: of a plan by parameter, shape (P,), or 0-d for all.
        after: sums of squares that a plan by unit leaves, shape (P,); of any other plan `before`.
        small: total norm, threshold, whether it was finite, whether it was skipped; shape (4,).
        bounded: whether elements were bounded, 0-d.
        largest: the largest factor of any segment, 0-d.
    """

    before: Tensor
    scale: Tensor
    after: Tensor
    small: Tensor
    bounded: Tensor
    largest: Tensor


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
        self._rows: list[Row] = []
        self._folded: list[Row] = []
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
        after_P = None
        if stats.layout.unit_S is not None:
            after_P = stats.layout.over_params(stats.sumsq_S * plan.scale_S.square(), "sum")
        threshold = before.sumsq_S.new_full((), float("nan")) if plan.threshold is None else plan.threshold
        bounded = self._flag(False, threshold) if plan.bound_S is None else (plan.bound_S < float("inf")).any()
        flags = (flag if isinstance(flag, Tensor) else self._flag(flag, threshold) for flag in (finite, skipped))
        small = torch.stack([stats.total, threshold, *flags])
        scale_P = plan.scale_S if after_P is None else self._flag(True, threshold)
        row = Row(before.sumsq_S, scale_P, before.sumsq_S if after_P is None else after_P, small, bounded, plan.largest)
        self._append(before.layout, row)

    def _flag(self, flag: bool, like: Tensor) -> Tensor:
        """A flag that the host knows as a number beside others, made once: a copy would make the device wait."""
        key = flag, like.device, like.dtype
        if key not in self._flags:
            self._flags[key] = like.new_full((), float(flag))
        return self._flags[key]

    def add_overflow(self, layout: Layout) -> None:
        """Keep a step that a loss scaler dropped before anything was measured."""
        unknown = torch.full((len(layout.names),), float("nan"), dtype=layout.dtype, device=layout.device)
        values = (float("inf"), float("nan"), 0.0, 1.0)
        small = torch.stack([unknown.new_full((), value) for value in values])  # filled there: nobody waits for a copy
        zero = torch.zeros_like(small[0])
        self._append(layout, Row(unknown, torch.ones_like(unknown), unknown, small, zero, torch.ones_like(zero)))

    def _append(self, layout: Layout, row: Row) -> None:
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
            before, scale, after, small, bounded, largest = zip(*self._rows, strict=True)
            scale_TP = torch.stack([one.expand_as(whole) for one, whole in zip(scale, before, strict=True)])
            flags = torch.stack(bounded)[:, None], torch.stack(largest)[:, None]
            self._folded.append(Row(torch.stack(before), scale_TP, torch.stack(after), torch.stack(small), *flags))
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
        columns = [torch.cat(blocks) for blocks in zip(*self._folded, strict=True)]
        losses = self.losses() if losses is None else losses
        if losses is None:
            losses = columns[0].new_full((len(columns[0]),), float("nan"))
        before_TP, scale_TP, after_TP, small, bounded, largest, loss = _on_host([*columns, losses[:, None]])
        with np.errstate(divide="ignore", invalid="ignore"):  # what nothing was measured of is kept as it is
            left_TP = np.where(after_TP == before_TP, 1.0, np.sqrt(after_TP / before_TP))  # also where both are inf
            scale_TP = np.where(before_TP > 0, scale_TP * left_TP, 1.0)
        notes = self._notes
        self._clear()
        total, threshold, finite, skipped = small.T
        return {
            "step": np.array([note["step"] for note in notes], dtype=np.int64),
            "loss": loss[:, 0],
            "learning_rate": np.array([float(note["learning_rate"]) for note in notes]),
            "norm": total,
            "threshold": threshold,
            "finite": (finite > 0) | (np.isnan(finite) & np.isfinite(total)),  # NaN: nobody asked, the step is void
            "skipped": skipped > 0,
            "bounded": bounded[:, 0] > 0,
            "scale_max": largest[:, 0],
            "norms": np.sqrt(before_TP).astype(np.float32),
            "scales": scale_TP.astype(np.float32),
        }


def _on_host(columns: list[Tensor]) -> list[np.ndarray]:
    """Columns of numbers, shape (T, ...), as float64 of the host; those of a device come in one copy."""
    there = [column for column in columns if not column.is_cpu]
    if there:
        packed = torch.cat([column.to(there[0]) for column in there], dim=1).cpu()
        parts = iter(packed.split([column.shape[1] for column in there], dim=1))
        columns = [column if column.is_cpu else next(parts) for column in columns]
    return [column.double().numpy() for column in columns]
