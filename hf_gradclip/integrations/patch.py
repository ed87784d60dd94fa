"""A Trainer that somebody else has made clips by strategy: one of them, or all that are made from now on."""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any

import transformers
from transformers import Trainer

from hf_gradclip.config import Clip, ClipConfig
from hf_gradclip.integrations.console import restore
from hf_gradclip.integrations.trainer import GradClipMixin
from hf_gradclip.integrations.trainer_recording import RecordCallback
from hf_gradclip.misuse import shown
from hf_gradclip.run.refusal import Refusal
from hf_gradclip.run.tested import insist_on_hooks
from hf_gradclip.run.wrapping import wrap_class
from hf_gradclip.say import logger
from hf_gradclip.spec import shown as written
from hf_gradclip.views.view import UnsupportedBackendError

SEAMS = ("_clip_grad_norm", "_get_grad_norm")
"""The Trainer's methods that GradClipMixin takes over."""


def patch(trainer: Trainer, clip: Clip = "adaptive") -> Patch:
    """Let a Trainer that is there already clip by a strategy, before its `train()`.

    It gets what GradClipMixin gives to a subclass: the strategy, its logs, the record, its state in checkpoints, which
    load in a GradClipTrainer and the other way round. Its class becomes one of the same name below its own class and
    GradClipMixin.

        patch(trainer, clip="adaptive")
        trainer.train()

    Args:
        trainer: of transformers, or of a class below it.
        clip: see hf_gradclip.config; None means what `max_grad_norm` says.

    Returns:
        A handle: `handle.undo()` gives the Trainer its class back, and so does the end of `with patch(...)`.

    Raises:
        TypeError: for something else than a Trainer.
        SpecError: for a wrong spec.
        UnsupportedBackendError: for a Trainer whose class has a `_clip_grad_norm` of its own, and where GradClipTrainer
            would stop.
        RuntimeError: for one that has a clip already, or is training.
    """
    if not isinstance(trainer, Trainer):
        instead = "Make the Trainer first, or use patch_all()." if isinstance(trainer, type) else "Pass a Trainer."
        raise TypeError(f"patch({shown(trainer)}): must be a transformers.Trainer. {instead}")
    insist_on_hooks("transformers", transformers.__version__, Trainer)
    name = type(trainer).__name__
    if (own := _own_seam(trainer)) is not None:
        raise UnsupportedBackendError(own.text)
    if isinstance(trainer, GradClipMixin) and (trainer._clip_spec is not None or trainer._clip_attachment is not None):
        raise RuntimeError(
            f"patch({name}): it clips by clip={_as_typed(trainer._clip_spec)} already. Undo that patch first "
            "(handle.undo()), or leave clip= out where it is made."
        )
    if trainer.is_in_train:
        raise RuntimeError(f"patch({name}): training has begun, and its optimizer is prepared. Patch before train().")
    return Patch(trainer, clip)


def patch_all(clip: Clip = "adaptive") -> PatchAll:
    """Let every Trainer that is made from now on clip by a strategy, whatever its class and whoever makes it.

    A Trainer with a `clip=` of its own keeps it. One whose class has a `_clip_grad_norm` of its own is named in a
    warning and left alone. Where several of these are in force the last one counts.

        patch_all(clip="adaptive")
        somebody_elses_main()

    Args:
        clip: see hf_gradclip.config; None means what `max_grad_norm` says.

    Returns:
        A handle: after `handle.undo()`, or the end of `with patch_all(...)`, Trainers are made as before. Those made in
        between keep their clip.

    Raises:
        SpecError: for a wrong spec, at once.
    """
    if clip is not None:
        ClipConfig.parse(clip)
    return PatchAll(clip)


class Patch:
    """One Trainer that clips by a strategy; see `patch`."""

    def __init__(self, trainer: Any, clip: Any) -> None:
        self._trainer = trainer
        self._class = type(trainer)
        if not isinstance(trainer, GradClipMixin):
            trainer.__class__ = _clipping(trainer.__class__)
        trainer._clip_spec = clip
        try:
            trainer._admit(trainer._parse_clip())
        except Exception:
            self._give_back()
            raise

    def undo(self) -> None:
        """Give the Trainer its class back; a second call does nothing.

        Raises:
            RuntimeError: while it trains.
            UnsupportedBackendError: after a training under DeepSpeed, whose engine keeps the clip.
        """
        trainer = self._trainer
        if trainer is None:
            return
        if trainer.is_in_train:
            raise RuntimeError(f"patch({type(trainer).__name__}).undo(): it is training. Undo after train().")
        if trainer._clip_attachment is not None:
            trainer._clip_attachment.release()
            trainer.pop_callback(RecordCallback)
            restore(trainer.callback_handler.callbacks)
        self._give_back()

    def _give_back(self) -> None:
        trainer, self._trainer = self._trainer, None
        for name in [name for name in vars(trainer) if name in _ATTRIBUTES]:
            delattr(trainer, name)
        trainer.__class__ = self._class

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class PatchAll:
    """All Trainers from now on; see `patch_all`."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        _in_force.append(self)
        if len(_in_force) == 1:
            _wrapped.append(wrap_class(Trainer, "__init__", _make))

    def undo(self) -> None:
        """Patch no further Trainer; a second call does nothing."""
        if self in _in_force:
            _in_force.remove(self)
            if not _in_force:
                _wrapped.pop()()

    def __enter__(self) -> PatchAll:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


_in_force: list[PatchAll] = []
_wrapped: list[Any] = []


def is_in_force() -> bool:
    """Whether a `patch_all` is, so that it says what a new Trainer does."""
    return bool(_in_force)


def _make(init: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    init(trainer, *args, **kwargs)
    if _in_force:
        patch_new(trainer, _in_force[-1]._clip, f"patch_all(clip={_as_typed(_in_force[-1]._clip)})")


def patch_new(trainer: Trainer, clip: Any, call: str) -> None:
    """Patch a Trainer that was just made, unless it has a clip or clips itself.

    Args:
        trainer: after `Trainer.__init__`, perhaps not yet after that of its own class.
        clip: see hf_gradclip.config.
        call: who asks for it, for the warning.
    """
    if isinstance(trainer, GradClipMixin) and trainer._clip_spec is not None:
        return
    if (own := _own_seam(trainer)) is not None:
        if trainer.args.process_index == 0:
            logger.warning("%s leaves one Trainer alone. %s", call, own.text)
        return
    Patch(trainer, clip)


def _own_seam(trainer: Any) -> Refusal | None:
    """The refusal of a Trainer that takes a seam for itself; None for one that does not."""
    for seam in SEAMS:
        owner = next((cls for cls in type(trainer).__mro__ if seam in vars(cls)), None)
        if seam in vars(trainer) or owner not in (Trainer, GradClipMixin):
            where = owner if owner is not None and seam not in vars(trainer) else type(trainer)
            return Refusal(
                True,
                f"{where.__module__}.{where.__qualname__}.{seam}",
                "this Trainer clips or measures by a method of its own, which a patch would hide.",
                "Remove that method, or put GradClipMixin into the class by hand, where you decide which comes first.",
            )
    return None


_ATTRIBUTES = frozenset(name for cls in GradClipMixin.__mro__ for name in vars(cls) if name.startswith("_clip_"))


@functools.cache
def _clipping(cls: Any) -> Any:
    """The class below `cls` and GradClipMixin that goes by the name of `cls`."""
    body: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__", "__init__")}
    body |= {"_clip_class": cls, "__reduce_ex__": _reduce}
    return types.new_class(cls.__name__, (GradClipMixin, cls), exec_body=lambda space: space.update(body))


def _reduce(trainer: Any, protocol: Any) -> Any:
    """As any object is pickled, but by the class that can be imported."""
    patched = trainer.__class__
    reduced = super(patched, trainer).__reduce_ex__(protocol)
    make, args = reduced[:2]
    if make is not copyreg.__newobj__ or args[0] is not patched:  # type: ignore[attr-defined]
        return reduced
    return (_again, (patched._clip_class, *args[1:]), *reduced[2:])


def _again(cls: type, *args: Any) -> Any:
    patched = _clipping(cls)
    return patched.__new__(patched, *args)


def _as_typed(clip: Any) -> str:
    return written(str(clip)) if isinstance(clip, ClipConfig) else written(clip)
