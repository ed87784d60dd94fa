"""Gradient clipping for people who train with Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.flags import ClipArguments
from hf_gradclip.functional import clip_grad_norm_
from hf_gradclip.strategy import Strategy
from hf_gradclip.version import __version__

if TYPE_CHECKING:
    from hf_gradclip.integrations.accelerate import attach
    from hf_gradclip.integrations.patch import patch, patch_all
    from hf_gradclip.integrations.trainer import GradClipMixin, GradClipTrainer

__all__ = [
    "ClipArguments",
    "ClipConfig",
    "Clipper",
    "GradClipMixin",
    "GradClipTrainer",
    "Strategy",
    "__version__",
    "attach",
    "clip_grad_norm_",
    "patch",
    "patch_all",
]

_HEAVY = {
    "GradClipTrainer": "trainer",
    "GradClipMixin": "trainer",
    "attach": "accelerate",
    "patch": "patch",
    "patch_all": "patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.integrations.{_HEAVY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
