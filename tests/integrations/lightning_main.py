"""Lightning on several ranks, by `torchrun`. See test_lightning.py."""

from __future__ import annotations

import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from hf_gradclip.integrations.lightning import GradClip
from tests.integrations.lightning_runs import LOUD, Module, all_of, data, fit, same
from tests.integrations.ranks import serve

FOLDER, RANK, RANKS = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ZCLIP = "zclip:warmup_steps=2,z_threshold=0.5"


def run(clip: Any, module: Module | None = None, **settings: Any) -> Any:
    loader = data(rank=RANK, ranks=RANKS)
    settings = {"strategy": "ddp", "devices": RANKS, "use_distributed_sampler": False, **settings}
    return fit(FOLDER, clip, module, loader=loader, **settings)


def found(trainer: Any) -> dict[str, Any]:
    kept = trainer.watch.kept
    return {
        "kept": all_of(trainer),
        "state": str(trainer.clip.state_dict()),
        "summary": trainer.clip.clipper.report.summary(),
        "logged": {key: float(value) for key, value in trainer.callback_metrics.items()},
        "moved": [not same(before, after) for before, after in pairwise(kept)],
    }


def resumed() -> dict[str, Any]:
    settings = {"max_steps": -1}
    whole = run(ZCLIP, max_epochs=2, **settings)
    half = run(ZCLIP, max_epochs=1, **settings)
    half.save_checkpoint(FOLDER / "half.ckpt")
    rest = run(ZCLIP, max_epochs=2, resume=FOLDER / "half.ckpt", **settings)
    return {"whole": found(whole), "rest": found(rest)}


def asked() -> dict[str, Any]:
    clip = GradClip("none", on_spike=lambda event: event.skip_step()) if RANK else GradClip("none")
    return found(run(clip, Module(factors={LOUD - 1: 1e6})))


def apart() -> str:
    """Rank 1 changes its gradient after backward."""

    class Apart(Module):
        def on_after_backward(self) -> None:
            if RANK:
                for p in self.parameters():
                    p.grad *= 1.1

    try:
        run("adaptive", Apart())
    except RuntimeError as error:
        return str(error)
    return "nothing was said"


def scenario(name: str) -> Any:
    torch.set_num_threads(1)
    if name == "number":
        return found(run(2.0))
    if name == "accumulated":
        return found(run(2.0, accumulate_grad_batches=2, max_steps=6))
    if name == "zclip":
        return found(run(ZCLIP))
    if name == "nan":
        return found(run("none", Module(factors={LOUD - 1: math.nan} if RANK else {})))
    return {"resumed": resumed, "asked": asked, "apart": apart}[name]()


if __name__ == "__main__":
    serve(scenario)
