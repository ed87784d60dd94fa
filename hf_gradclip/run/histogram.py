"""Histograms of the norms by parameter, for the trackers that draw them: TensorBoard and Weights & Biases."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from hf_gradclip.clipper import Clipper

NAME = "clip/param_norm"


class Histograms:
    """Sends a histogram with a log, when enough steps have passed since the last one.

    Args:
        every: steps; 0 sends none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._sent_at = 0

    def send(self, clipper: Clipper, step: int, boards: Iterable[Any], runs: Iterable[Any]) -> None:
        """Send the norms of the last step, if it is time. One host read then.

        Args:
            clipper: of the run.
            step: of the run.
            boards: TensorBoard's `SummaryWriter`s.
            runs: of Weights & Biases, or its module.
        """
        if step < self._sent_at:
            self._sent_at = 0  # a new run
        if not self._every or step - self._sent_at < self._every or clipper.report.last is None:
            return
        self._sent_at = step
        norms = clipper.report.last.by_param.norm_S.float().cpu().numpy()
        for board in boards:
            board.add_histogram(NAME, norms, step)
        for run in runs:
            run.log({NAME: sys.modules["wandb"].Histogram(norms), "train/global_step": step})
