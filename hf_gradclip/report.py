"""What is logged: meters that count where a step is judged, and the one place that reads a device's to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_gradclip.meters import Meters, applied, read_rows, row_of, tensors_in
from hf_gradclip.tally import Tally
from hf_gradclip.types import ClipPlan, NormStats

_FOLD = 512
MOST_UNREAD = 1000
"""Steps that wait to be read at most: a loop that asks for nothing shall not fill the memory."""
OF_THE_STEP = ("skipped", "nonfinite")
"""What is of a step, and of no group of parameters."""


class ClipReport:
    """Counts every step where it is judged; what is on a device is read once per log.

    The keys are stable. Norms are of the whole gradient in its own units; "since" means since the last read.

    | key | meaning |
    |---|---|
    | `clip/norm_mean`, `clip/norm_max` | pre-clip norm over the finite steps since |
    | `clip/norm_post` | norm after clipping, last applied step; absent where elements were bounded |
    | `clip/scale` | norm out / norm in, last applied step; absent where elements were bounded |
    | `clip/scale_max` | the largest factor on any segment, last applied step; only where it is above 1 |
    | `clip/threshold` | the norm (or value) at which the last finite step began to clip; only where it is one number |
    | `clip/rate` | share of the steps since in which a segment was scaled down or bounded, or that somebody skipped |
    | `clip/tensor_rate` | share of the tensor-steps since in which any part of the tensor was scaled down or bounded |
    | `clip/skipped`, `clip/nonfinite` | steps since that did not reach the optimizer, that had a NaN or inf |
    | `clip/<label>/...` | the same of a group of parameters, but for the last two |

    Attributes:
        last: what was measured in the last step; None before the first.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        prefix: str = "clip",
        before_read: Callable[[], None] | None = None,
    ) -> None:
        self._before_read = before_read
        self.prefix = prefix
        self._at: Meters = {}
        self._tally = Tally()
        self.last: NormStats | None = None
        self._groups: dict[str, ClipReport] = {}
        self._place(device, dtype)
        self._clear()

    def _place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._nan = torch.full_like(self._zero, float("nan"))

    def _clear(self) -> None:
        self._steps = self._tensor_steps = 0
        self._counts = dict.fromkeys(("clipped", "tensors", "skipped", "nonfinite"), 0)
        self._clipped: list[Tensor] = []
        self._unsure: list[Tensor] = []
        self._unread: list[tuple[Tensor, ...]] = []
        self._unread_TK: list[Tensor] = []
        self._at = dict.fromkeys(self._at, self._nan)
        self._applied: tuple[NormStats, ClipPlan] | None = None
        self._norms: list[Tensor] = []

    def move_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Go on with the run on another device. One host read."""
        if device != self.device or dtype != self._zero.dtype:
            self._absorb()
            self._place(device, dtype)
            self._at = {}
            self._clear()
        for report in self._groups.values():
            report.move_to(device, dtype)

    def _group(self, label: str) -> ClipReport:
        """The report of a group of parameters, from its first step on."""
        if label not in self._groups:
            report = self._groups[label] = ClipReport(self.device, self._zero.dtype)
            report._tally.warned_zero = True  # one group may well be still, as LoRA's A is at first
        return self._groups[label]

    def add(
        self,
        stats: NormStats,
        plan: ClipPlan,
        finite: Tensor | bool,
        skipped: Tensor | bool,
        clipped: bool | None = None,
    ) -> None:
        """Count one step.

        Args:
            stats: what was measured.
            plan: what was decided.
            finite: whether the norm was finite, 0-d bool on the device; or a bool where the host knows it. On a device
                NaN where nobody asked, since the step was left out before.
            skipped: whether the step was skipped, in the same way.
            clipped: whether anything is scaled down or bounded; None where the host does not know.
        """
        self.last = stats
        self._steps += 1
        self._tensor_steps += len(stats.layout.names)
        if isinstance(finite, Tensor) or isinstance(skipped, Tensor):
            self._unread.append(row_of(stats, plan, finite, skipped, self._zero, self._nan))
            if len(self._unread) >= _FOLD:
                self._fold_unread()
        else:
            self._add_known(stats, plan, finite, skipped, clipped)
        if len(self._norms) >= _FOLD:
            self._norms = [torch.cat([norm.view(-1) for norm in self._norms])]
        for label, (part, decided) in plan.by_group.items():
            self._group(label).add(part, decided, finite, skipped)
        if self._steps >= MOST_UNREAD:
            self._absorb()

    def _add_known(self, stats: NormStats, plan: ClipPlan, finite: bool, skipped: bool, clipped: bool | None) -> None:
        """The same on the host: what only the last step is asked for waits until somebody asks."""
        self._norms.append(stats.total if finite else self._nan)
        self._counts["nonfinite"] += not finite
        self._counts["skipped"] += skipped
        if finite and plan.threshold is not None:
            self._at["threshold"] = plan.threshold
        if finite and not skipped:
            self._applied = stats, plan
        elif finite:
            self._counts["clipped"] += 1  # by its strategy, which left the step out
        if clipped:
            self._counts["clipped"] += 1
            self._clipped.append(tensors_in(plan, stats.layout))
            if len(self._clipped) >= _FOLD:
                self._clipped = [torch.stack(self._clipped).sum()]
        elif clipped is None and finite and not skipped:
            self._unsure.append(tensors_in(plan, stats.layout))
            if len(self._unsure) >= _FOLD:
                self._settle_unsure()

    def _fold_unread(self) -> None:
        """Join the rows of many steps; nobody reads them."""
        if self._unread:
            columns = [torch.stack(column).to(self._zero) for column in zip(*self._unread, strict=True)]
            self._unread_TK.append(torch.stack(columns, dim=1))
            self._unread = []

    def _settle_unsure(self) -> None:
        """Count the steps of which nobody has looked whether anything was clipped. One host read."""
        if self._unsure:
            tensors = torch.stack(self._unsure).cpu()
            self._unsure = []
            self._clipped.append(tensors.sum().to(self._zero))
            self._counts["clipped"] += int((tensors > 0).sum())

    def add_overflow(self) -> None:
        """Count a step that a loss scaler dropped before anything was measured."""
        self._steps += 1
        self._counts["skipped"] += 1
        self._counts["nonfinite"] += 1
        self._norms.append(self._nan)
        for report in self._groups.values():
            report.add_overflow()

    def scalars(self) -> dict[str, float]:
        """The keys above, since the last call; empty if no step was counted. One host read, and one for each group."""
        if self._before_read is not None:
            self._before_read()
        shown = {f"{self.prefix}/{key}": value for key, value in self._since().items()}
        for label, report in self._groups.items():
            found = {key: value for key, value in report._since().items() if key not in OF_THE_STEP}
            shown |= {f"{self.prefix}/{label}/{key}": value for key, value in found.items()}
        return shown

    def _since(self) -> dict[str, float]:
        """What was counted since the last read, without prefix."""
        sums = self._drain()
        if not (steps := sums["steps"]):
            return {}
        mean = sums["norm_sum"] / sums["norms"] if sums["norms"] else None
        shown = {"norm_mean": mean, "norm_max": sums.get("norm_max"), "norm_post": sums.get("norm_post")}
        if sums.get("norm_in"):
            shown["scale"] = sums["norm_post"] / sums["norm_in"]
        if sums.get("scale_max", 1.0) > 1:
            shown["scale_max"] = sums["scale_max"]
        shown["threshold"] = sums.get("threshold")
        shown["rate"] = sums["clipped"] / steps
        shown["tensor_rate"] = sums["tensors"] / max(sums["tensor_steps"], 1)
        shown["skipped"], shown["nonfinite"] = float(sums["skipped"]), float(sums["nonfinite"])
        return {key: value for key, value in shown.items() if value is not None and value == value}

    def summary(self) -> dict[str, float]:
        """The whole run on this process: steps, clipped, rate, skipped, nonfinite, norm_median, norm_max, threshold.

        The median is of all norms, or in a long run of every second, fourth, eighth ... of them. What is logged next
        is what it would have been.
        """
        self._absorb()
        return self._tally.summary()

    def norms(self) -> list[float]:
        """The finite norms of the run on this process, in their order; in a long run as many as the median is of."""
        self._absorb()
        return self._tally.norms.kept

    @property
    def steps(self) -> int:
        """How many were counted in the whole run."""
        return self._tally.run["steps"] + self._steps

    def __repr__(self) -> str:
        return (
            f"ClipReport({self.prefix}, {self.steps} steps; summary() is of all, scalars() of those since the last log)"
        )

    def closing_line(self) -> str:
        """`in_words` at the end of a run; what comes is counted anew."""
        for report in (self, *self._groups.values()):
            report._drain()
        return self.in_words()

    def in_words(self) -> str:
        """The whole run on this process."""
        run = self.summary()
        text = (
            f"{self.prefix}: steps {run['steps']:.0f}, clipped {run['clipped']:.0f} ({run['rate']:.1%}), "
            f"skipped {run['skipped']:.0f}, non-finite {run['nonfinite']:.0f}"
        )
        if "norm_median" in run:
            text += f"; norm: median {run['norm_median']:.4g}, largest {run['norm_max']:.4g}"
            text += f", threshold at the end {run['threshold']:.4g}" if "threshold" in run else ""
        if self._groups:
            rates = [f"{label} {report.summary()['rate']:.1%}" for label, report in self._groups.items()]
            text += f"; clipped by group: {', '.join(rates)}"
        return text

    def _drain(self) -> dict[str, float]:
        """What was counted since the last call, which is forgotten."""
        self._absorb()
        return self._tally.since()

    def _absorb(self) -> None:
        """Read everything to the host at once."""
        if not self._steps:
            return
        self._settle_unsure()
        self._fold_unread()
        if self._applied is not None:
            self._at |= applied(*self._applied)
        clipped = torch.stack([count.to(self._zero) for count in self._clipped]).sum() if self._clipped else self._zero
        parts = [torch.stack([clipped.to(self._zero), *self._at.values()])]
        parts += [torch.cat([norm.view(-1) for norm in part]) for part in (self._norms, self._unread_TK) if part]
        tensors, *values = torch.cat(parts).tolist()
        read: dict[str, float] = {**self._counts, **dict(zip(self._at, values, strict=False))}
        read["tensors"] += tensors
        values = values[len(self._at) :]
        count = sum(norm.numel() for norm in self._norms)
        finite = [norm for norm in values[:count] if norm == norm] + read_rows(values[count:], read)
        self._tally.add({**read, "steps": self._steps, "tensor_steps": self._tensor_steps}, finite)
        self._clear()
