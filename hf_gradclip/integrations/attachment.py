"""The clippers of an accelerator, and the optimizer steps they guard; what a Trainer and a plain loop have in common.

A skipped step, the loss scale and the refusals are handled here, in one place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.histogram import Histograms
from hf_gradclip.integrations.loss import StepLoss
from hf_gradclip.integrations.marks import Marks
from hf_gradclip.integrations.optimizer import Updates, innermost
from hf_gradclip.integrations.recording import Recording
from hf_gradclip.integrations.refusals import refuse_swap, refuse_unsupported
from hf_gradclip.integrations.replicas import Replicas
from hf_gradclip.integrations.startup import in_force, insist_on_one_layout, substitute_for
from hf_gradclip.integrations.wrapping import weakly, wrap, wrap_step
from hf_gradclip.report import announce, logger
from hf_gradclip.views import view_of
from hf_gradclip.views.parameters import unwrap
from hf_gradclip.views.view import UnsupportedBackendError


class Attachment:
    """The clippers of an accelerator: one per prepared model, each with its own state.

    Args:
        accelerator: of this process.
        config: what to do.
        auto: clip before every optimizer step that no clip call preceded.
        recording: where every step is kept.
        missing: the error for a step that no clip call preceded; None lets it pass, since somebody else clips it.

    Raises:
        UnsupportedBackendError: see `refuse_unsupported`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: ClipConfig,
        auto: bool = False,
        recording: Recording | None = None,
        missing: str | None = None,
    ) -> None:
        refuse_unsupported(accelerator)
        self._is_main = accelerator.is_main_process
        if self._is_main and (words := substitute_for(accelerator)):
            logger.warning(words)
        self._accelerator = weakref.ref(accelerator)
        self.config = config
        self.auto = auto
        self._clippers: list[tuple[weakref.ref[nn.Module], Clipper]] = []
        self._missing = missing
        self._marks = Marks()
        self._of_optimizer: weakref.WeakKeyDictionary[Any, tuple[int, list[Clipper]]] = weakref.WeakKeyDictionary()
        self._seams: Any = None
        self.updates = Updates(config, say=self._is_main)
        self.recording = recording
        self.histograms = Histograms(config.histogram_every)
        self._replicas = Replicas(config.check_every)
        self._loss = StepLoss()
        self._loss_of_step: Tensor | None = None
        self._watch_accelerator()
        self._steps = 0
        self._paused = False
        self._finished = False
        self._said_stranger = False

    @property
    def accelerator(self) -> Accelerator:
        """Of this process; it holds the attachment, and not the other way round."""
        accelerator = self._accelerator()
        if accelerator is None:
            raise ReferenceError(
                "the Accelerator of this attachment is gone: keep it as long as you use the attachment."
            )
        return accelerator

    @property
    def clipper(self) -> Clipper:
        """The clipper of the one prepared model.

        Raises:
            ValueError: if no model, or more than one, was prepared.
        """
        if len(self._clippers) != 1:
            raise ValueError(
                f"attachment.clipper: there are {len(self._clippers)} prepared models with trainable parameters. "
                "Use attachment.clipper_of(model)."
            )
        return self._clippers[0][1]

    def scalars_of(self, clipper: Clipper) -> dict[str, float]:
        """The values of one clipper and of the updates since the last call.

        Raises:
            RuntimeError: if the replicas have come apart.
            NonFiniteError: with `skip_sync=False`, after too many skipped steps in a row.
        """
        self._replicas.insist()
        clipper.check_skips()
        if self.recording is not None:
            self.recording.flush()
        return clipper.report.scalars() | self.updates.scalars()

    def clipper_of(self, model: nn.Module) -> Clipper:
        """The clipper of a model, made at the first call. The model may be wrapped or not."""
        bare = unwrap(model)
        if (known := self._known(model)) is not None:
            return known
        if self.recording is not None and self._clippers:
            raise UnsupportedBackendError("record with two prepared models: one is recorded only. Leave record out.")
        clipper = self._make(model)
        insist_on_one_layout(clipper, self.accelerator.device)
        self._clippers.append((weakref.ref(bare), clipper))
        self._of_optimizer.clear()
        self._record(clipper)
        if self._is_main:
            announce(in_force(clipper, self.accelerator))
        return clipper

    def _record(self, clipper: Clipper) -> None:
        if self.recording is not None:
            self.recording.watch(clipper, self.updates.clippers)

    def _known(self, model: nn.Module) -> Clipper | None:
        bare = unwrap(model)
        return next((clipper for known, clipper in self._clippers if known() is bare), None)

    def _make(self, model: nn.Module) -> Clipper:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            from hf_gradclip.integrations.deepspeed import ZeroSeams

            if self._seams is not None:
                raise UnsupportedBackendError(
                    "DeepSpeed with two prepared engines: one accelerator clips one of them only. "
                    "Use an Accelerator per engine."
                )
            self._seams = ZeroSeams(model, self.config, self.updates, weakly(self._judged_loss))
            return self._seams.clipper
        scaler = self.accelerator.scaler
        guarded = scaler is not None and scaler.is_enabled()
        unscale = weakly(self.accelerator.unscale_gradients) if guarded else None
        return Clipper(self.config, view_of(unwrap(model), unscale, guarded))

    def finish(self) -> None:
        """At the end of a run, on every rank: write the rest of the record; rank 0 says what clipping did."""
        self._finished = True
        if self.recording is not None:
            self.recording.finish()
        if self._is_main:
            for clipper in (*(clipper for _, clipper in self._clippers), *self.updates.clippers):
                announce(clipper.report.closing_line())

    def forget(self) -> None:
        """Drop all clippers: the next call makes new ones."""
        self._clippers.clear()
        self._of_optimizer.clear()
        self._marks.clear()
        self.updates.forget()
        self._loss.forget()
        self._seams = None
        self._finished = False

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration, see `Clipper.adopt`; not under DeepSpeed."""
        self.config = config
        for _, clipper in self._clippers:
            clipper.adopt(config)

    def clip(self, model: nn.Module) -> Tensor | None:
        """Clip the gradients of one model; the norm before clipping, 0-d, on the device.

        Under DeepSpeed the step is done by now, and this is the norm that was decided on in it.
        """
        return self._clip(self.clipper_of(model))

    def _clip(self, clipper: Clipper) -> Tensor | None:
        if self._seams is not None:
            self._note_engine()
            return self._seams.norm  # decided and applied inside backward
        self._steps += 1
        self.watch_optimizers()
        self._record(clipper)
        norm = clipper.step(self._judged_loss(clipper))
        self._note()
        self._replicas.check(clipper.view, self._steps)
        self._marks.set(clipper, (o for o in self.accelerator._optimizers if clipper in self._clippers_of(o)))
        return norm

    def _note_engine(self) -> None:
        """Note the step that DeepSpeed took inside backward, once."""
        if self._seams is not None and self._seams.stepped:
            self._seams.stepped = False
            self._steps += 1
            self._note()

    def _judged_loss(self, clipper: Clipper | None = None) -> Tensor | None:
        """The loss of the step, reduced over ranks, where the strategy judges it; else it is for the record only."""
        judged = self.config.gradient.needs.loss
        self._loss_of_step = self._loss.reduced(clipper) if judged else self._loss.local(clipper)
        return self._loss_of_step if judged else None

    def _note(self) -> None:
        if self.recording is not None:
            groups = innermost(self.accelerator._optimizers[0]).param_groups if self.accelerator._optimizers else []
            self.recording.note(groups[0]["lr"] if groups else float("nan"), self._loss_of_step)

    def _clippers_of(self, optimizer: Any) -> list[Clipper]:
        """The clippers of the models whose parameters an optimizer steps."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known, clippers = self._of_optimizer.get(optimizer, (-1, []))
        if known != size:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            clippers = [
                clipper
                for model, clipper in self._clippers
                if any(id(p) in mine for p in getattr(model(), "parameters", list)())
            ]
            self._of_optimizer[optimizer] = (size, clippers)
        return clippers

    def watch_optimizers(self) -> None:
        """Wrap the step of every prepared optimizer once: a step must be clipped, and a skip must be seen."""
        if self._seams is not None:
            return  # DeepSpeed steps inside backward; the optimizer's own step does nothing
        for optimizer in self.accelerator._optimizers:
            if not hasattr(optimizer, "_gradclip_attachment"):
                wrap_step(optimizer, _step)
            optimizer._gradclip_attachment = self
        self.updates.watch(self.accelerator._optimizers, (m for ref, _ in self._clippers if (m := ref()) is not None))
        if self.config.fold or not self.config.skip_sync:
            self._fold()

    def _fold(self) -> None:
        """Tell every clipper of the one optimizer that takes its numbers."""
        for _, clipper in self._clippers:
            if clipper.folds:
                continue
            mine = [innermost(o) for o in self.accelerator._optimizers if clipper in self._clippers_of(o)]
            if mine:
                clipper.fold_into(mine[0])

    def _watch_accelerator(self) -> None:
        """Refuse a swap of our optimizer in `prepare`, and note the loss in `backward` where a strategy judges it."""
        wrap(self.accelerator, "prepare", before=self._refuse_swap)
        wrap(self.accelerator, "backward", before=self._before_backward)

    def _refuse_swap(self, *objects: Any, **_: Any) -> None:
        refuse_swap(self.accelerator, *objects)

    def _before_backward(self, loss: Tensor, **_: Any) -> None:
        self._marks.before_backward()
        if self.config.gradient.needs.loss or self.recording is not None:
            self._loss.add(loss, self.accelerator.gradient_accumulation_steps)
        if self.recording is not None:
            self.recording.begin()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While optimizer state is saved or loaded: torch may step once with zero gradients to make the state."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def before_step(self, optimizer: Any) -> bool:
        """Clip what was not yet clipped if `auto`, else insist that somebody did; whether the step is to be skipped.

        A step with a loss scaler is left to the scaler.
        """
        if self._paused:
            return False
        clippers = self._clippers_of(optimizer)
        if not clippers and not self._said_stranger:
            self._said_stranger = True
            logger.warning(
                "optimizer.step() of %s: its parameters belong to no prepared model, so nothing of it is clipped. "
                "Prepare the model too; under FSDP1 with flat parameters prepare it before the optimizer is made.",
                type(innermost(optimizer)).__name__,
            )
        for clipper in clippers:
            if self._marks.has(clipper, optimizer) or (len(clippers) > 1 and _is_idle(clipper)):
                continue
            if self.auto:
                self._clip(clipper)
            elif self._missing is not None:
                raise RuntimeError(self._missing)
        return optimizer.scaler is None and self._marks.skips(optimizer)

    def after_step(self, optimizer: Any) -> None:
        """Tell Accelerate, and so its schedulers, whether this step was skipped."""
        skipped = self._marks.take(optimizer)
        if skipped or optimizer.scaler is None:
            optimizer._is_overflow = skipped


def _is_idle(clipper: Clipper) -> bool:
    """Whether its model has no gradient: frozen, or not used in this step."""
    return all(p.grad is None for p in clipper.view.watched())


def _step(optimizer: Any, inner: Callable[..., Any], closure: Any) -> Any:
    """An optimizer's `step`, clipped before and reported after."""
    attachment: Attachment = optimizer._gradclip_attachment
    if not optimizer.gradient_state.sync_gradients:
        return inner(closure)
    skip = attachment.before_step(optimizer)  # its gradients are gone, yet some optimizers count steps without any
    result = None if skip else inner(closure)
    attachment.after_step(optimizer)
    return result
