"""The trainable parameters of a model, and whether they are still the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_

from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Some parameters of a model, those of one optimizer, say. The model tells which of them are heads and adapters.

    Args:
        model: the model, wrapped or not.
        named: its parameters with their names.
    """

    model: nn.Module
    named: Sequence[tuple[str, Tensor]]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.named)


Watched = nn.Module | Part | Sequence[tuple[str, Tensor]]
"""A model, some parameters of one, or named parameters of a model that is not known."""

_INNER = ("_orig_mod.", "_checkpoint_wrapped_module.")
_is_trained = attrgetter("requires_grad")


class Together(nn.ModuleDict):
    """Several models under their names, for one norm over all of them."""


class Trainable:
    """The trainable parameters of a model: a tied one once, a frozen or missing one as soon as it is trained.

    A look compares what is registered in each module with what was registered there at the last look, object by
    object, so it sees whatever was put in, replaced or taken out, however that was done. No Python runs per parameter:
    a look takes a tenth of a measurement where there are hundreds of small ones.

    Args:
        source: a model, wrapped by DDP or torch.compile, or not; or a part of one; or named parameters.

    Attributes:
        names: without the prefixes of wrappers.
        parameters: as many, in the model's order.

    Raises:
        ValueError: if no parameter is trainable.
    """

    names: tuple[str, ...]
    parameters: list[Tensor]

    def __init__(self, source: Watched) -> None:
        self._source = unwrap(source) if isinstance(source, nn.Module) else source
        self._take(self._walk(), set())

    @property
    def model(self) -> nn.Module | None:
        """Without its wrappers; None for named parameters alone."""
        if isinstance(self._source, Part):
            return unwrap(self._source.model)
        return self._source if isinstance(self._source, nn.Module) else None

    @property
    def known(self) -> list[str]:
        """The names of all parameters, frozen ones too; of a part those of its whole model."""
        named = self._named
        if isinstance(self._source, Part) and self.model is not None:
            named = [*named_parameters(self.model)]
        return [name for name, _ in named]

    def look(self) -> bool:
        """Look anew; whether other parameters are trainable now, or under other names.

        One that was frozen stays until another is unfrozen, so that freezing alone changes nothing. Where FSDP2 shows
        whole parameters for a while, in the place of its shards, nothing has changed until they are back.

        Raises:
            ValueError: if no parameter is trainable any more.
        """
        if not any(map(_is_trained, self._frozen)) and self._is_same():
            return False
        named = self._walk()
        if self._is_gathered(named):
            return False
        known = {*map(id, self.parameters)}
        if any(p.requires_grad and id(p) not in known for _, p in named):
            known = set()
        names, parameters = self.names, self.parameters
        self._take(named, known)
        return names != self.names or not all(map(is_, parameters, self.parameters))

    def _is_same(self) -> bool:
        """Whether every module has the modules and parameters registered that it had, and no other.

        Equality of dicts is decided in C by the identity of their modules. Tensors would be compared by their elements,
        so each place is looked up.
        """
        return (
            self._modules == self._known_modules
            and sum(map(len, self._registries)) == len(self._registered)
            and all(map(is_, map(dict.get, self._owners, self._keys), self._registered))
        )

    def _walk(self) -> list[tuple[str, Tensor]]:
        """The named parameters, as they are shown now."""
        return list(named_parameters(self._source) if isinstance(self._source, nn.Module) else self._source)

    def _is_gathered(self, named: list[tuple[str, Tensor]]) -> bool:
        """Whether a tensor of another mesh, or of none, is shown where there was a shard."""
        shown = dict(named)
        for name, p in self._named:
            mesh, now = getattr(p, "device_mesh", None), shown.get(name, p)
            if mesh is not None and now is not p and getattr(now, "device_mesh", None) != mesh:
                return True
        return False

    def _take(self, named: list[tuple[str, Tensor]], known: set[int]) -> None:
        """Take what is trainable of these parameters, or known, from here on."""
        trainable = [(name, p) for name, p in named if p.requires_grad or id(p) in known]
        if not trainable:
            asked = self._source if self.model is None else self.model
            raise ValueError(
                f"{type(asked).__name__} has no trainable parameter (requires_grad=True), so there is nothing to clip. "
                "Unfreeze or add some before training."
            )
        self.names = tuple(name for name, _ in trainable)
        self.parameters = [p for _, p in trainable]
        self._named = named
        taken = {*map(id, self.parameters)}
        self._frozen = [p for _, p in named if id(p) not in taken]
        self._remember()

    def _remember(self) -> None:
        """What is registered in each module now, for `_is_same`."""
        modules = [*self._source.modules()] if isinstance(self._source, nn.Module) else []
        self._modules = [module._modules for module in modules]
        self._known_modules = [dict(registry) for registry in self._modules]
        self._registries = [module._parameters for module in modules]
        self._owners = [registry for registry in self._registries for _ in registry]
        self._keys = [key for registry in self._registries for key in registry]
        self._registered = [parameter for registry in self._registries for parameter in registry.values()]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under a name without the prefixes that compilation and checkpointing put inside it."""
    for name, parameter in model.named_parameters():
        yield bare(name), parameter


def bare(name: str) -> str:
    """The name of a parameter or module without the prefixes that compilation and checkpointing put inside it."""
    for prefix in _INNER:
        name = name.replace(prefix, "")
    return name
