"""Several models under one accelerator: what is done to which, what each is called, and one norm over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_gradclip.config import ClipConfig
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.trainable import Together, unwrap

SHARED = ("update", "fold", "skip_sync", "check_every", "record", "histogram_every")
"""What all configurations must agree in: it is of the optimizers, or of the run."""


class Models:
    """What is done to the models of an accelerator.

    Args:
        config: for every model; or one for each of them, by the model as it was before `prepare` or after it.
        joint: whether all models are clipped by one norm.

    Attributes:
        by_model: whether each is named.

    Raises:
        SpecError: if several configurations do not go together.
    """

    def __init__(self, config: ClipConfig | Mapping[nn.Module, ClipConfig], joint: bool = False) -> None:
        self.joint = joint
        self.by_model = not isinstance(config, ClipConfig)
        self._config: ClipConfig | None = None
        self._configs, self._names = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._many = False
        if isinstance(config, ClipConfig):
            self.configs = [config]
            return
        self.configs = list(config.values())
        self._many = len(config) > 1
        for model, own in config.items():
            if inside(model) in self._configs:
                raise SpecError(
                    f"attach(accelerator, {{model: spec, ...}}): {type(inside(model)).__name__} is named "
                    "twice, wrapped and unwrapped or before and after prepare. Name it once."
                )
            self._configs[inside(model)] = own
        self._insist()

    @classmethod
    def parse(cls, clip: Any, joint: bool, **settings: Any) -> Models:
        """Read what `attach` was given: a spec, or {model: spec}.

        Raises:
            SpecError: for a wrong spec, and where models and `joint` do not go together.
        """
        if not isinstance(clip, Mapping) or not any(isinstance(key, nn.Module) for key in clip):
            return cls(ClipConfig.parse(clip, **settings), joint)
        if strange := [key for key in clip if not isinstance(key, nn.Module)]:
            raise SpecError(
                f"attach(accelerator, {{..., {strange[0]!r}: ...}}): must be a model, as the other keys are."
            )
        if joint:
            raise SpecError(
                "attach(accelerator, {model: spec}, joint=True): one norm over all models has one spec. Give one spec, "
                "or leave joint out."
            )
        return cls({model: ClipConfig.parse(spec, **settings) for model, spec in clip.items()})

    @property
    def config(self) -> ClipConfig:
        """Of the run; with a configuration for each model, what they agree in counts."""
        return self.configs[0]

    @property
    def hears_loss(self) -> bool:
        """Whether a strategy judges the loss."""
        return any(config.gradient.needs.loss for config in self.configs)

    @property
    def several(self) -> bool:
        """Whether more than one is named."""
        return len(self.configs) > 1

    def of(self, model: nn.Module) -> ClipConfig:
        """The configuration of a model.

        Raises:
            SpecError: for one that is not named.
        """
        if not self.by_model:
            return self.config
        config = self._configs.get(inside(model))
        if config is None:
            raise SpecError(
                f"attach(accelerator, {{model: spec, ...}}): {type(inside(model)).__name__} was prepared, has "
                "trainable parameters, and is none of these models. Name it too, with 'none' if it shall not be "
                "clipped. (Models that come after free_memory() need an Accelerator of their own.)"
            )
        return config

    def absent(self, models: Iterable[nn.Module]) -> str:
        """Words for named models that are none of these; "" where all of them are there."""
        there = {*map(id, map(inside, models))}
        missing = [model for model in self._configs if id(model) not in there and _is_trained(model)]
        if not missing:
            return ""
        names = ", ".join(type(model).__name__ for model in missing)
        return f"attach(accelerator, {{model: spec, ...}}): {names} is named and was not prepared by the first step."

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration for every model."""
        self.configs = [config]

    def name(self, model: nn.Module) -> str:
        """What a model is called: its class, with a number where another has that name."""
        model = inside(model)
        if model not in self._names:
            sharded = any(cls.__name__ == "FSDPModule" for cls in type(model).__mro__)  # FSDP2 makes a class of its own
            kind = type(model).__name__.removeprefix("FSDP") if sharded else type(model).__name__
            taken = set(self._names.values())
            names = [kind, *(f"{kind}_{number}" for number in range(2, len(taken) + 3))]
            self._names[model] = next(name for name in names if name not in taken)
        return self._names[model]

    def prefix(self, model: nn.Module) -> str:
        """Of the logged values of a model: `clip` where there is one model, else `clip_` and its name."""
        return f"clip_{self.name(model)}" if self._many else "clip"

    def meet(self, number: int) -> bool:
        """So many models were prepared; whether each needs a name from now on, and did not before."""
        before, self._many = self._many, self._many or (number > 1 and not self.joint)
        return self._many and not before

    def together(self, models: Iterable[nn.Module]) -> Together:
        """One module with all models in it, under their names, for one norm over all of them."""
        return Together({self.name(model): unwrap(model) for model in models})

    def forget(self) -> None:
        """Other models may come."""
        self._names = WeakIdKeyDictionary()
        self._many = len(self.configs) > 1

    def _insist(self) -> None:
        for word in SHARED:
            values = [getattr(config, word) for config in self.configs]
            if any(value != values[0] for value in values):
                raise SpecError(
                    f"attach(accelerator, {{model: spec, ...}}): {word} is {' and '.join(map(repr, values))}, and must "
                    "be the same for all models. Only gradient, nonfinite and max_consecutive_skips may differ."
                )


def inside(model: nn.Module) -> nn.Module:
    """The model that was given to `prepare`, whatever it is wrapped in."""
    model = unwrap(model)
    while type(model).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        model = unwrap(model.module)  # type: ignore[arg-type]
    return model


def _is_trained(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())
