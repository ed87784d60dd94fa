"""Histograms of the norms by parameter, for the trackers that draw them: TensorBoard and Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hf_gradclip.clipper import Clipper

NAME = "param_norm"


class Histograms:
    """Sends a histogram with a log, when enough steps have passed since the last one.

    Args:
        every: steps; 0 sends none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._sent_at = 0

    def send(
        self, clippers: Sequence[Clipper], boards: Iterable[Any], runs: Iterable[Any], step: int | None = None
    ) -> None:
        """Send the norms of the last step, if it is time: those that are finite, at the next log if none is.

        One host read per clipper then. No tracker has a bin for NaN or inf, and they raise over one.

        Args:
            clippers: of the run.
            boards: TensorBoard's `SummaryWriter`s.
            runs: of Weights & Biases, or its module.
            step: of the run; None counts those of the clippers.
        """
        if step is None:
            step = max((clipper.steps for clipper in clippers), default=0)
        clippers = [clipper for clipper in clippers if clipper.report.last is not None]
        if step < self._sent_at:
            self._sent_at = 0  # a new run
        if not clippers or not self._every or step - self._sent_at < self._every:
            return
        sent = [self._send(clipper, boards, runs, step) for clipper in clippers]
        self._sent_at = step if any(sent) else self._sent_at

    def _send(self, clipper: Clipper, boards: Iterable[Any], runs: Iterable[Any], step: int) -> bool:
        """Whether there was a finite norm to send."""
        assert clipper.report.last is not None
        name = f"{clipper.report.prefix}/{NAME}"
        norms = clipper.report.last.by_param.norm_S.float().cpu().numpy()
        norms = norms[np.isfinite(norms)]
        if not len(norms):
            return False
        for board in boards:
            board.add_histogram(name, norms, step)
        for run in runs:
            run.log({name: sys.modules["wandb"].Histogram(norms), "train/global_step": step})
        return True
