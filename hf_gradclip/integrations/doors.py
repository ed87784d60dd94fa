"""What `hf-gradclip run` and `import hf_gradclip.auto` do to the Trainers and Accelerators of a script."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.accelerate import LoopAttachment, attach
from hf_gradclip.run.environment import CLIP, clip_of_environment
from hf_gradclip.strategy import describe

_trainers: list[weakref.ref[Any]] = []
"""Those that were made since, whose accelerators are not of a loop."""


@functools.cache
def _clip() -> ClipConfig:
    return clip_of_environment()


def trainer_init(init: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """`Trainer.__init__`, after which it clips, unless it does already or the script has its own `patch_all`."""
    from hf_gradclip.integrations.patch import is_in_force, patch_new  # here: a loop needs no transformers

    init(trainer, *args, **kwargs)
    _trainers[:] = [ref for ref in _trainers if ref() is not None] + [weakref.ref(trainer)]
    if not is_in_force():
        patch_new(trainer, _clip(), f"{CLIP}={describe(_clip().gradient)}")


def accelerator_prepare(prepare: Any, accelerator: Accelerator, *objects: Any, **kwargs: Any) -> Any:
    """`Accelerator.prepare`, before which it is attached where a script's own loop brings an optimizer.

    Its record goes into `gradclip` in the accelerator's project_dir, or where the process was started.
    """
    brings = any(_is_optimizer(thing) for thing in objects)
    if not brings or _is_attached(accelerator) or _is_of_a_trainer(accelerator):
        return prepare(accelerator, *objects, **kwargs)
    clip, folder = replace(_clip(), console=None), None  # a loop prints what it wants
    if clip.record:
        clip, folder = replace(clip, record=False), accelerator.project_dir or "."
    attachment = attach(accelerator, clip, auto=True, record=folder)
    weakref.finalize(accelerator, attachment.end)
    return accelerator.prepare(*objects, **kwargs)  # the attachment's, which comes here again


def _is_optimizer(thing: Any) -> bool:
    return isinstance(thing, torch.optim.Optimizer) or type(thing).__name__ == "DummyOptim"


def _is_attached(accelerator: Accelerator) -> bool:
    call = vars(accelerator).get("clip_grad_norm_")
    return isinstance(getattr(call, "__self__", None), LoopAttachment)


def _is_of_a_trainer(accelerator: Accelerator) -> bool:
    trainers = [trainer for ref in _trainers if (trainer := ref()) is not None]
    return any(getattr(trainer, "accelerator", None) is accelerator for trainer in trainers)
