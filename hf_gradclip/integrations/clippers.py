"""The clippers of an accelerator's models: made once, known by the model from then on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.models import Models
from hf_gradclip.integrations.refusals import refuse_joint, refuse_second_engine
from hf_gradclip.run.hearing import Hearing
from hf_gradclip.run.startup import insist_on_one_layout
from hf_gradclip.run.unscaling import unscaling
from hf_gradclip.run.updates import Updates
from hf_gradclip.views import view_of
from hf_gradclip.views.trainable import Together, unwrap


class Clippers:
    """One clipper per model, or one for all of them.

    Args:
        models: what is done to which.
        updates: of the run, where DeepSpeed's clipper of updates is added.
        loss: gives the loss of the step, reduced over ranks, to a clipper inside DeepSpeed's step.
        hearing: who is told of their events.
        device: of the accelerator.

    Attributes:
        seams: where the clipper is in a DeepSpeed engine; None without DeepSpeed.
        of_model: the clipper of a model as it was given, wrapped or not.
    """

    def __init__(
        self,
        models: Models,
        updates: Updates,
        loss: Callable[[], Tensor | None],
        hearing: Hearing,
        device: torch.device,
    ) -> None:
        self._hearing = hearing
        self._device = device
        self._models = models
        self._updates = updates
        self._loss = loss
        self._pairs: list[tuple[weakref.ref[nn.Module], Clipper]] = []
        self._joint: Together | None = None
        self.seams: Any = None
        self.of_model = WeakIdKeyDictionary()

    @property
    def made(self) -> list[Clipper]:
        """In the order in which they were made."""
        return list(dict.fromkeys(clipper for _, clipper in self._pairs))

    @property
    def models(self) -> list[tuple[nn.Module, Clipper]]:
        """Those whose model is still there, with the model without its wrappers."""
        return [(model, clipper) for known, clipper in self._pairs if (model := known()) is not None]

    def known(self, model: nn.Module) -> Clipper | None:
        """The clipper of a model, wrapped or not; None if it has none yet."""
        clipper = self.of_model.get(model)
        if clipper is None:
            bare = unwrap(model)
            clipper = next((clipper for known, clipper in self._pairs if known() is bare), None)
            if clipper is not None:
                self.of_model[model] = clipper
        return clipper

    def make(self, model: nn.Module, accelerator: Any) -> Clipper:
        """A clipper for a model that has none, the same on all ranks.

        Raises:
            SpecError: for a model that is not named where models are.
            RuntimeError: if the ranks would not clip the same parameters by the same spec.
            UnsupportedBackendError: where DeepSpeed's settings, or a second engine, would leave something unclipped.
        """
        if accelerator.distributed_type.name == "DEEPSPEED":
            clipper = self._inside(model)
        else:
            clipper = self._beside(model, unwrap(model), accelerator)
        insist_on_one_layout(clipper, accelerator.device)
        self._pairs.append((weakref.ref(unwrap(model)), clipper))
        self.hear()
        if self._models.meet(len(self._pairs)):
            for known, of_known in self._pairs:
                if (named := known()) is not None:
                    of_known.prefix = of_known.report.prefix = self._models.prefix(named)
        return clipper

    def join(self, models: Sequence[nn.Module], accelerator: Any) -> Clipper | None:
        """One clipper for all models, the same on all ranks; None if it is known already.

        Raises:
            RuntimeError, UnsupportedBackendError: see `make`.
        """
        new = [model for model in models if self.known(model) is None]
        if not new:
            return None
        refuse_joint(accelerator.distributed_type.name == "DEEPSPEED", models)
        if self._joint is None:
            self._joint = self._models.together(new)
            clipper = self._beside(new[0], self._joint, accelerator)
        else:
            clipper = self.made[0]
            self._joint.update(dict(self._models.together(new).items()))
        insist_on_one_layout(clipper, accelerator.device)
        self._pairs += [(weakref.ref(unwrap(model)), clipper) for model in new]
        self.hear()
        return clipper

    def _beside(self, model: nn.Module, source: nn.Module, accelerator: Any) -> Clipper:
        """A clipper of a model's configuration for the `.grad` of what `source` has, beside an optimizer."""
        scaler = accelerator.scaler
        guarded = scaler is not None and scaler.is_enabled()
        unscale = unscaling(accelerator, source) if guarded else None
        return Clipper(self._models.of(model), view_of(source, unscale, guarded), self._models.prefix(model))

    def _inside(self, engine: Any) -> Clipper:
        """The clipper inside the step of a DeepSpeed engine."""
        from hf_gradclip.integrations.deepspeed import seams_of

        refuse_second_engine(self.seams is not None)
        self.seams = seams_of(engine, self._models.of(engine), self._updates, self._loss)
        return self.seams.clipper

    def hear(self) -> None:
        """Tell of the events of all of them to those who want to hear now; on every rank."""
        for model, clipper in self.models:
            self._hearing.begin(clipper, self._models.name(model) if self._models.several else "", self._device)

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration, see `Clipper.adopt`; not under DeepSpeed."""
        self._models.adopt(config)
        for clipper in self.made:
            clipper.adopt(config)

    def forget(self) -> None:
        """Drop all of them."""
        self._pairs.clear()
        self._joint = None
        self._models.forget()
        self.of_model = WeakIdKeyDictionary()
        self.seams = None
