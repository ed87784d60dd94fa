"""What is done at a norm that is not finite, and how many steps in a row may be skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.config import ClipConfig
from hf_gradclip.decision import LARGEST, NONFINITE, SKIP, Decision
from hf_gradclip.say import is_first, logger, now_and_then
from hf_gradclip.types import NormStats

LOOK_EVERY = 50
"""Steps between two looks at a limit that no step reads."""


class NonFiniteError(RuntimeError):
    """The gradient norm is NaN or inf, and the policy or the limit says to stop."""


class Guard:
    """Applies the policy of a configuration and counts skips, on the host or, where nobody reads, on the device.

    Args:
        config: with `nonfinite`, `max_consecutive_skips` and `skip_sync`.
        device: where the statistics are.
        guarded: whether somebody else skips a step with a non-finite gradient, a loss scaler.
        largest: see `largest_of`.

    Attributes:
        largest: a norm that is above it after clipping counts as not finite; inf where nobody here leaves such a step
            out.
        must_read: whether a step's action must come to the host, whatever the strategy wants.
        skips_in_a_row: on the host; a checkpoint keeps it. A step that is not skipped sets it to 0.
    """

    def __init__(self, config: ClipConfig, device: torch.device, guarded: bool, largest: float) -> None:
        self._largest = largest
        self.adopt(config, guarded)
        self.skips_in_a_row = self._skipped = 0
        self._since_look = 0
        self._unread = self._most = torch.zeros((), dtype=torch.int64, device=device)

    def follow(self, device: torch.device, guarded: bool, largest: float) -> None:
        """Go on with other parameters; the counts go on."""
        self._largest = largest
        self.adopt(self.config, guarded)
        self._unread, self._most = self._unread.to(device), self._most.to(device)

    def adopt(self, config: ClipConfig, guarded: bool) -> None:
        """Go on with another configuration; the counts go on."""
        self.config = config
        self.must_read = config.nonfinite != "pass" and not guarded
        self.largest = self._largest if self.must_read else math.inf

    def skips(self, action: int) -> bool:
        """Whether a step is left out that is SKIP or NONFINITE; counts it."""
        skipped = action == SKIP or self.config.nonfinite != "pass"
        if action == SKIP or self.config.nonfinite != "raise":  # which raises, and counts nothing
            self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        return skipped

    def insist(self, action: int, stats: NormStats, step: int, by: str) -> None:
        """Stop where the policy or the limit says so, after such a step was counted; else say now and then that it was.

        Args:
            action: SKIP or NONFINITE.
            stats: what was measured; it is read to the host where something is said.
            step: its number.
            by: who asked for SKIP.

        Raises:
            NonFiniteError: by policy "raise", or after `max_consecutive_skips` skipped steps in a row; with the
                parameters that hold a NaN or inf.
        """
        if action == NONFINITE and self.config.nonfinite == "raise":
            raise NonFiniteError(
                f"The gradient norm is {float(stats.total)} in step {step}, and nonfinite='raise'. {_culprits(stats)} "
                "Use nonfinite='skip' to leave such steps out."
            )
        if self.skips_in_a_row < self.config.max_consecutive_skips:
            if action == SKIP or self.config.nonfinite == "skip":
                self._say(action, stats, step, by)
            return
        why = "a NaN or inf norm" if action == NONFINITE else f"{by} asked for it"
        raise NonFiniteError(
            f"Step {step}: {self.skips_in_a_row} steps in a row were skipped (max_consecutive_skips="
            f"{self.config.max_consecutive_skips}), the last because of {why}. {_culprits(stats)} "
            "No weight has moved since. Lower the learning rate, look at the data of these steps, or raise it."
        )

    def _say(self, action: int, stats: NormStats, step: int, by: str) -> None:
        self._skipped += 1
        if not now_and_then(self._skipped) or not is_first():
            return
        why = _culprits(stats) if action == NONFINITE else f"{by} asked for it."
        logger.warning(
            "clip: step %d is skipped, its norm is %.4g. %s It is the %d. skipped step; the %d. is said next.",
            step,
            float(stats.total),
            why,
            self._skipped,
            2 * self._skipped,
        )

    def skips_unread(self, decision: Decision) -> Tensor:
        """Whether a step is skipped that the optimizer reads the flag of, 0-d bool on the device.

        It is counted there for `look`, unless it is void.
        """
        asked, finite, void = decision.plan.skip, decision.finite, decision.void
        if self.config.nonfinite == "pass":
            skipped = torch.zeros_like(finite) if asked is None else finite & asked
        else:
            skipped = ~finite if asked is None else ~finite | asked
        self._since_look += 1
        count = (self._unread + 1) * skipped
        self._unread = count if void is None else torch.where(void, self._unread, count)
        self._most = torch.maximum(self._most, self._unread)
        return skipped if void is None else skipped | void

    def in_a_row(self) -> int:
        """Skipped steps in a row up to now, for a checkpoint. A host read where nobody reads the steps."""
        return int(self._unread) if not self.config.skip_sync else self.skips_in_a_row

    def go_on(self, skips: int) -> None:
        """Go on after so many skipped steps in a row."""
        self.skips_in_a_row = skips
        self._unread = torch.full_like(self._unread, skips)

    def look_now_and_then(self) -> None:
        """After such a step was counted: `look` in every LOOK_EVERY-th, for a loop that never asks."""
        if self._since_look >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Stop if too many steps in a row were skipped unread since the last look. One host read.

        Raises:
            NonFiniteError: after `max_consecutive_skips` skipped steps in a row.
        """
        self._since_look = 0
        most, self._most = int(self._most), self._unread
        if most >= self.config.max_consecutive_skips:
            raise NonFiniteError(
                f"{most} steps in a row were skipped (max_consecutive_skips={self.config.max_consecutive_skips}) since "
                "the last look. No weight has moved in them. Lower the learning rate, look at the data, or raise it."
            )


def largest_of(params: Sequence[Tensor]) -> float:
    """The largest norm of a gradient whose square the second moments of these parameters hold; inf for float64."""
    return math.inf if params and all(p.dtype == torch.float64 for p in params) else LARGEST


def _culprits(stats: NormStats) -> str:
    """Which parameters hold a NaN or inf; reads to the host, on the way to an error."""
    broken = stats.layout.param_S[~stats.sumsq_S.isfinite()].unique().tolist()
    bad = [stats.layout.names[i] for i in broken]
    if not bad:
        return "Its square is more than the float32 of a second moment holds." if float(stats.total) > LARGEST else ""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"Not finite: {', '.join(bad[:5])}{more}."
