"""The steps that are counted and timed: clips, optimizers that clip, and what torch has in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench_step import RATE, then
from benchmark import Workload, bind
from torch.nn.utils import clip_grad_norm_

from hf_gradclip import Clipper, optim
from hf_gradclip.record.buffer import Recorder

Step = Callable[[], Any]

ZCLIP = "zclip:warmup_steps=2,max_norm=inf"
CLIPS = {
    "none": "none",
    "global_norm": "global_norm:max_norm=1",
    "zclip": ZCLIP,
    "adaptive_norm": "adaptive_norm",
    "adagc": "adagc:warmup_steps=2,max_norm=inf",
    "agc": "agc",
    "adaptive": "adaptive",
}
UPDATE = "block_rms:max_rms=1"


def cases(work: Workload) -> Iterator[tuple[str, Callable[[], Step]]]:
    """The name of every step, and what makes it with states of its own."""
    params, named = list(work.params), list(work.named_parameters())

    def clip(spec: str, record: bool = False, **settings: Any) -> Step:
        made = Clipper.for_model(work, spec, **settings)
        if record:
            made.recorder = Recorder()
        return made.step

    def torch_step(**kind: Any) -> Step:
        return then(bind(clip_grad_norm_, params, 1.0), torch.optim.AdamW(params, lr=RATE, **kind).step)

    def before_torch(spec: str, **settings: Any) -> Step:
        made = torch.optim.AdamW(params, lr=RATE, fused=True)
        return then(Clipper.for_model(work, spec, optimizer=made, **settings).step, made.step)

    def own(spec: str | None, update: str | None = None) -> Step:
        return optim.AdamW(named, lr=RATE, clip=spec, update_clip=update).step

    yield "torch clip_grad_norm_", lambda: bind(clip_grad_norm_, params, 1.0)
    for name, spec in CLIPS.items():
        yield f"clip {name}", partial(clip, spec)
    yield "clip zclip, pass", partial(clip, ZCLIP, nonfinite="pass")
    yield "clip zclip, record", partial(clip, ZCLIP, record=True)
    yield "torch clip + fused AdamW", partial(torch_step, fused=True)
    yield "clip zclip + torch fused AdamW", partial(before_torch, ZCLIP)
    yield "clip zclip, fold, no skip_sync + torch fused AdamW", partial(before_torch, ZCLIP, fold=True, skip_sync=False)
    yield "optim.AdamW no clip", partial(own, None)
    yield "optim.AdamW clip=zclip", partial(own, ZCLIP)
    yield "optim.AdamW clip=zclip, update=block_rms", partial(own, ZCLIP, UPDATE)
    yield "optim.SGD momentum clip=zclip", lambda: optim.SGD(named, lr=RATE, momentum=0.9, clip=ZCLIP).step
