"""The clippers of an accelerator's models: made once, known by the model from then on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.refusals import refuse_second_engine
from hf_gradclip.run.startup import insist_on_one_layout
from hf_gradclip.run.updates import Updates
from hf_gradclip.run.wrapping import weakly
from hf_gradclip.views import view_of
from hf_gradclip.views.trainable import unwrap


class Clippers:
    """One clipper per model.

    Args:
        config: what to do.
        updates: of the run, where DeepSpeed's clipper of updates is added.
        loss: gives the loss of the step, reduced over ranks, to a clipper inside DeepSpeed's step.

    Attributes:
        seams: where the clipper is in a DeepSpeed engine; None without DeepSpeed.
        of_model: the clipper of a model as it was given, wrapped or not.
    """

    def __init__(self, config: ClipConfig, updates: Updates, loss: Callable[[], Tensor | None]) -> None:
        self._config = config
        self._updates = updates
        self._loss = loss
        self._pairs: list[tuple[weakref.ref[nn.Module], Clipper]] = []
        self.seams: Any = None
        self.of_model = WeakIdKeyDictionary()

    @property
    def made(self) -> list[Clipper]:
        """In the order in which they were made."""
        return [clipper for _, clipper in self._pairs]

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
            RuntimeError: if the ranks would not clip the same parameters by the same spec.
            UnsupportedBackendError: where DeepSpeed's settings, or a second engine, would leave something unclipped.
        """
        if accelerator.distributed_type.name == "DEEPSPEED":
            clipper = self._inside(model)
        else:
            scaler = accelerator.scaler
            guarded = scaler is not None and scaler.is_enabled()
            unscale = weakly(accelerator.unscale_gradients) if guarded else None
            clipper = Clipper(self._config, view_of(unwrap(model), unscale, guarded))
        insist_on_one_layout(clipper, accelerator.device)
        self._pairs.append((weakref.ref(unwrap(model)), clipper))
        return clipper

    def _inside(self, engine: Any) -> Clipper:
        """The clipper inside the step of a DeepSpeed engine."""
        from hf_gradclip.integrations.deepspeed import seams_of

        refuse_second_engine(self.seams is not None)
        self.seams = seams_of(engine, self._config, self._updates, self._loss)
        return self.seams.clipper

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration, see `Clipper.adopt`; not under DeepSpeed."""
        self._config = config
        for clipper in self.made:
            clipper.adopt(config)

    def forget(self) -> None:
        """Drop all of them."""
        self._pairs.clear()
        self.of_model = WeakIdKeyDictionary()
        self.seams = None
