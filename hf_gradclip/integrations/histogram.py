"""Histograms of the norms by parameter, for the trackers that draw them."""

from __future__ import annotations

from typing import Any

from hf_gradclip.clipper import Clipper


def draw_histograms(trainer: Any, clipper: Clipper) -> None:
    """Send the norms of the last step to TensorBoard and Weights & Biases, if `histogram_every` steps have passed.

    Args:
        trainer: whose callbacks hold the trackers.
        clipper: of the run. One host read.
    """
    every, step = clipper.config.histogram_every, int(trainer.state.global_step)
    if not every or clipper.report.last is None or step - getattr(trainer, "_clip_histogram_at", 0) < every:
        return
    trainer._clip_histogram_at = step
    if not trainer.is_world_process_zero():
        return
    norms = clipper.report.last.by_param.norm_S.float().cpu().numpy()
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "tb_writer", None) is not None:
            callback.tb_writer.add_histogram("clip/param_norm", norms, step)
        if getattr(callback, "_wandb", None) is not None:
            callback._wandb.log({"clip/param_norm": callback._wandb.Histogram(norms), "train/global_step": step})
