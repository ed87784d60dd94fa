"""The clippers of updates of a run: which optimizer has one, and when it needs another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.device import local
from hf_gradclip.optim.optimizer import PLACES, ClippedOptimizer
from hf_gradclip.run.advice import small_limit
from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.run.weight_difference import WeightDifference
from hf_gradclip.say import announce, logger
from hf_gradclip.views import view_of
from hf_gradclip.views.trainable import Part, named_parameters
from hf_gradclip.wrappers import innermost


@dataclass
class Known:
    """An optimizer whose updates are clipped.

    Args:
        clipper: of the updates.
        stepped: the parameters that the optimizer had; None where somebody else sees to it.
        hook: what recovers them; None where the optimizer tells them itself.
    """

    clipper: Clipper
    stepped: list[Tensor] | None = None
    hook: WeightDifference | None = None


class Updates:
    """The update clippers of a run, one per optimizer.

    Args:
        config: of the run; its `update` is what is done.
        say: whether this process speaks.
        called: gives a model's name; those of parameters begin with it where an optimizer steps several models.

    Attributes:
        settled: False after `watch` where an optimizer has no trainable parameter of a model yet: watch it again.
    """

    def __init__(
        self, config: ClipConfig, say: bool, called: Callable[[nn.Module], str] = lambda model: type(model).__name__
    ) -> None:
        self.settled = True
        self._config = config
        self._say = say
        self._called = called
        self._of: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()

    @property
    def clippers(self) -> list[Clipper]:
        """In the order in which the optimizers came."""
        return [known.clipper for known in self._of.values()]

    def of(self, clipper: Clipper) -> list[Clipper]:
        """Those whose optimizers step what a clipper of gradients clips."""
        mine = {*map(id, clipper.view.watched())}
        return [update for update in self.clippers if any(id(p) in mine for p in update.view.watched())]

    def watch(self, optimizers: Iterable[Any], models: Iterable[nn.Module]) -> None:
        """Clip the updates of the optimizers that are new or have other parameters, as far as those are of the models.

        Raises:
            UnsupportedBackendError: by the optimizer's name, where its update cannot be clipped.
        """
        models, self.settled = list(models), True
        for optimizer in map(innermost, optimizers):
            stepped, known = stepped_by(optimizer), self._of.get(optimizer)
            if known is not None and (known.stepped is None or are_same(known.stepped, stepped)):
                continue
            refuse_own_clip(optimizer)
            if self._config.update is None:
                continue
            named = self._named_of(optimizer, models)
            if not any(p.requires_grad for _, p in named):
                self.settled = False
                continue
            _refuse_flat(models)
            if known is not None:
                _let_go(optimizer, known)
            self._take(optimizer, named, stepped)

    def _named_of(self, optimizer: Any, models: Iterable[nn.Module]) -> Part | list[tuple[str, Tensor]]:
        """The parameters of some models that an optimizer steps, trainable or not; of one model as a part of it."""
        mine = {*map(id, stepped_by(optimizer))}
        found: list[tuple[nn.Module, list[tuple[str, Tensor]]]] = []
        for model in models:
            if named := [(name, p) for name, p in named_parameters(model) if id(p) in mine]:
                found.append((model, [*named]))
        if len(found) == 1:
            return Part(*found[0])
        return [(f"{self._called(model)}.{name}", p) for model, named in found for name, p in named]

    def _take(self, optimizer: Any, named: Part | list[tuple[str, Tensor]], stepped: list[Tensor]) -> None:
        """Make a clipper for these parameters of an optimizer, in the place of an earlier one."""
        order = list(self._of)
        number = order.index(optimizer) if optimizer in self._of else len(order)
        prefix = PLACES["update"] + (f"_{number}" if number else "")
        config = self._config.of_update(self._config.skip_sync or not isinstance(optimizer, ClippedOptimizer))
        clipper, hook = Clipper(config, view_of(named), prefix, squared=False), None
        if isinstance(optimizer, ClippedOptimizer):
            optimizer.update_clipper = clipper
        else:
            hook = WeightDifference(optimizer, clipper)
            self.say_cost(type(optimizer).__name__, sum(4 * local(p).numel() for p in clipper.view.watched()))
        self.add(optimizer, clipper, stepped, hook)

    def add(
        self,
        owner: Any,
        clipper: Clipper,
        stepped: list[Tensor] | None = None,
        hook: WeightDifference | None = None,
    ) -> None:
        """Take in the clipper of an optimizer.

        Args:
            owner: the optimizer.
            clipper: of its updates.
            stepped: see Known.
            hook: see Known.
        """
        self._of[owner] = Known(clipper, stepped, hook)
        if self._say and (words := small_limit(owner, clipper)):
            logger.warning(words)

    def say_cost(self, name: str, size: int) -> None:
        """Once per optimizer: what the recovery keeps in memory. `size` is in bytes."""
        if self._say:
            announce(
                f"clip: updates of {name} are recovered from the weights before and after its step, which keeps a copy "
                f"of this process's weights ({size / 2**20:.1f} MiB). hf_gradclip.optim needs none."
            )

    def release(self) -> None:
        """Clip no longer; what the clippers know stays."""
        for optimizer, known in self._of.items():
            if isinstance(optimizer, ClippedOptimizer):
                optimizer.update_clipper = None
            if known.hook is not None:
                known.hook.remove()

    def forget(self) -> None:
        """Let go of every optimizer: those that are still there are watched anew, with new statistics."""
        self.release()
        self._of.clear()

    def scalars(self) -> dict[str, float]:
        """The `clip_update/` values since the last call. One host read per optimizer."""
        found: dict[str, float] = {}
        for clipper in self.clippers:
            clipper.check_skips()
            found |= clipper.report.scalars()
        return found


def stepped_by(optimizer: Any) -> list[Tensor]:
    """The parameters that an optimizer steps, trainable or not, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def _let_go(optimizer: Any, known: Known) -> None:
    """Stop clipping by an earlier set of parameters."""
    logger.warning(
        "%s: has other parameters now, so the statistics of its updates start anew.", type(optimizer).__name__
    )
    if known.hook is not None:
        known.hook.remove()


def refuse_own_clip(optimizer: Any) -> None:
    """Stop where an optimizer clips by itself and this integration would too.

    Raises:
        UnsupportedBackendError: with what to use instead.
    """
    own = Refusal(
        isinstance(optimizer, ClippedOptimizer) and optimizer.clips_itself,
        f"hf_gradclip.optim.{type(optimizer).__name__}(clip=..., update_clip=...) under GradClipTrainer or attach()",
        "both would clip.",
        "Leave them out of the optimizer and say clip={'gradient': ..., 'update': ...} in the Trainer or attach().",
    )
    refuse([own])


def _refuse_flat(models: Iterable[nn.Module]) -> None:
    flat = Refusal(
        any(type(module).__name__ == "FullyShardedDataParallel" for model in models for module in model.modules()),
        "clipping updates under FSDP1",
        "its flat shards do not follow the parameters.",
        "Use FSDP2 (fsdp_version: 2).",
    )
    refuse([flat])
