"""What `agc` leaves alone of a model, in words; where that is everything it would clip nothing."""

from __future__ import annotations

from collections.abc import Sequence

from hf_gradclip.budgets import Budgets
from hf_gradclip.say import is_first, logger
from hf_gradclip.strategies.agc import AGC
from hf_gradclip.strategies.none import NoClip
from hf_gradclip.strategy import SpecError, Strategy, describe, name_of, parts_of
from hf_gradclip.views.heads import Heads
from hf_gradclip.views.view import View

SHOWN = 3
"""Heads that are named; of more there is a count."""


def refuse_idle(strategy: Strategy, view: View) -> None:
    """Stop where nothing would ever be clipped.

    Warn where another strategy of the chain still clips, but not where adapters are all that is trained, since then the
    chain wants it so; and where parameters have no names, by which to tell heads and adapters.

    Args:
        strategy: what clips.
        view: divided as it asks for.

    Raises:
        SpecError: if `agc` leaves every trainable parameter alone that it is for, and no other strategy is there.
    """
    for part, names in _by_group(strategy, view):
        words = _idle(part, names, view)
        if words and not _others(part):
            raise SpecError(words)
        words = words or _nameless(part, names)
        if words and is_first():
            logger.warning(words)


def idle(strategy: Strategy, view: View) -> str:
    """Words for an `agc` that leaves every trainable parameter alone; "" where it can clip something, or need not."""
    return " ".join(filter(None, (_idle(part, names, view) for part, names in _by_group(strategy, view))))


def exempt(strategy: Strategy, view: View) -> str:
    """Words for the start of a run: what `agc` leaves alone; "" for other strategies."""
    words = []
    for whole, names in _by_group(strategy, view):
        part = _agc(whole)
        if part is None or (part.include_1d and part.include_head and part.include_adapters):
            continue
        left, grouped = _left(names, view), isinstance(strategy, Budgets)
        if set(names) <= {*view.uncut}:
            left += ", all of its group" if grouped else ", all that is trained"
        elif not view.heads and not part.include_head and not grouped:
            others = "every other matrix" if view.adapters else "every matrix"
            left = f"{left or 'nothing'}; it found no trained head, so it clips {others}"
        words.append(f"{name_of(part)} leaves alone {left or 'nothing'}")
    return "; ".join(words)


def counts(strategy: Strategy, view: View) -> str:
    """Words for the start of a run: how many parameters are in each group; "" where there are no groups."""
    if not isinstance(strategy, Budgets):
        return ""
    sizes = [0 if part is None else len(part.names) for part in strategy.split(view.layout).layouts]
    found = [f"{label} {size}" for label, size in zip(strategy.labels, sizes, strict=True)]
    return f"parameters by group: {', '.join(found)}"


def _by_group(strategy: Strategy, view: View) -> list[tuple[Strategy, tuple[str, ...]]]:
    """Each strategy that is judged by itself, and the trained parameters that it is for."""
    if not isinstance(strategy, Budgets):
        return [(strategy, view.layout.names)]
    layouts = strategy.split(view.layout).layouts
    pairs = zip(strategy.groups, layouts, strict=True)
    return [(group.strategy, layout.names) for group, layout in pairs if layout is not None]


def _idle(strategy: Strategy, names: Sequence[str], view: View) -> str:
    part = _agc(strategy)
    if part is None or not set(names) <= {*view.uncut}:
        return ""
    others = _others(strategy)
    if others and view.adapters.intersection(names):  # as the preset `adaptive` has it; the start line says it
        return ""
    reasons = {_reasons(name, view) for name in names}
    least = sorted(these for these in reasons if not any({*fewer} < {*these} for fewer in reasons))
    use = [",".join(f"include_{word}=true" for word in these) for these in least]
    use.append(f"{'+'.join(others)} alone" if others else "adaptive_norm, which clips the whole gradient")
    return (
        f"{describe(part)}: clips nothing here. All {len(names)} trainable parameters are left alone: "
        f"{_left(names, view)}. Use {' or '.join(use)}."
    )


def _reasons(name: str, view: View) -> tuple[str, ...]:
    """Why a parameter is left alone, as the fields of `agc` are called."""
    found = {"1d": view.vectors, "head": _of_heads(view), "adapters": view.adapters}
    return tuple(word for word, names in found.items() if name in names)


def _nameless(strategy: Strategy, names: Sequence[str]) -> str:
    part = _agc(strategy)
    if part is None or (part.include_head and part.include_adapters) or not all(map(str.isdigit, names)):
        return ""
    return (
        f"{name_of(part)}: the parameters came without names, so that it cannot tell heads and adapters, and clips "
        "every matrix. Give named ones, as model.named_parameters() has them."
    )


def _agc(strategy: Strategy) -> AGC | None:
    return next((part for part in parts_of(strategy) if isinstance(part, AGC)), None)


def _others(strategy: Strategy) -> list[str]:
    """The strategies of a chain that clip, `agc` apart."""
    return [name_of(part) for part in parts_of(strategy) if not isinstance(part, (AGC, NoClip))]


def _left(names: Sequence[str], view: View) -> str:
    heads, adapters, vectors = _heads(names, view), len(_adapters(names, view)), len(_vectors(names, view))
    words = []
    if heads:
        shown = [_head(name, parameters) for name, parameters in list(heads.items())[:SHOWN]]
        more = f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
        words.append(f"{'the head' if len(heads) == 1 else f'{len(heads)} heads'} ({', '.join(shown)}{more})")
    if adapters:
        words.append(f"{adapters} weight{'s'[: adapters != 1]} of adapters")
    if vectors:
        words.append(f"{vectors} vector{'s'[: vectors != 1]}")
    return " and ".join(words)


def _heads(names: Sequence[str], view: View) -> Heads:
    """The heads with a parameter among these."""
    return {layer: parameters for layer, parameters in view.heads.items() if {*parameters} & {*names}}


def _head(name: str, parameters: tuple[str, ...]) -> str:
    """The name of a head, and of the embedding that it is tied to."""
    layers = (parameter.rpartition(".")[0] for parameter in parameters)
    others = {layer for layer in layers if layer != name and not layer.startswith(f"{name}.")}
    return f"{name}, tied to {' and '.join(sorted(others))}" if others else name


def _adapters(names: Sequence[str], view: View) -> frozenset[str]:
    """The weights of adapters among these that are left whole, but for those of a head's adapter."""
    return view.adapters.intersection(names) - _of_heads(view)


def _of_heads(view: View) -> set[str]:
    return {name for parameters in view.heads.values() for name in parameters}


def _vectors(names: Sequence[str], view: View) -> list[str]:
    """The parameters among these that are left whole and belong to no head and no adapter."""
    mine = {*names} - _of_heads(view) - view.adapters
    return [name for name in view.uncut if name in mine]
