"""What a checkpoint keeps of a clipper: the strategy's numbers, keyed by parameter name, and the count of skips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.budgets import Budgets
from hf_gradclip.spec import is_own, read_strategy
from hf_gradclip.strategy import Chain, SpecError, State, Strategy, describe, name_of, rebuild
from hf_gradclip.types import Layout

LATER = (".past.seen", ".past.logs", ".row")
"""Numbers that strategies keep which earlier versions of them did not; a state without them goes on with none seen."""


def begun(strategy: Strategy, layout: Layout) -> State:
    """The state before the first step.

    Raises:
        TypeError: by the strategy's name, for a state that no checkpoint could keep.
    """
    state = strategy.init(layout)
    try:
        flatten(state)
    except TypeError as error:
        raise TypeError(f"{name_of(strategy)}.init(): {error}") from None
    for _, part in _places(strategy):
        known = part.remembers_by
        if not (isinstance(known, tuple) and all(hasattr(part, field) for field in known)):
            raise TypeError(f'{name_of(part)}.remembers_by={known!r}: must be names of its fields, ("log_norm",) say.')
    return state


def packed(strategy: Strategy, layout: Layout, state: State, skips_in_a_row: int) -> dict[str, Any]:
    """A state as a dict of tensors on the CPU, words and numbers, loadable with `weights_only=True`."""
    return {
        "version": 1,
        "strategy": _kind(strategy),
        "spec": describe(strategy),
        "parts": _parts(strategy, flatten(state)),
        "names": list(layout.names),
        "state": {key: value.detach().cpu().clone() for key, value in flatten(state).items()},
        "skips_in_a_row": skips_in_a_row,
        **_groups(strategy, layout),
    }


def unpacked(saved: dict[str, Any], strategy: Strategy, layout: Layout) -> tuple[State | None, str]:
    """The state in what `packed` made, bit for bit, on the layout's device; or why it cannot be taken.

    Args:
        saved: of a checkpoint.
        strategy: that goes on with it.
        layout: whose parameters it must be of; in another order, numbers per parameter follow their names.

    Returns:
        The state, None if it cannot be taken; and one sentence that says what happens instead, "" if the state is
        taken as it is.
    """
    if not _is_readable(saved):
        return None, f"The saved clip state cannot be read, so {name_of(strategy)} starts anew."
    like = strategy.init(layout)
    mine = flatten(like)
    if why := _why_not(saved, strategy, layout, mine):
        return None, f"The checkpoint's clip state is {why}, so {describe(strategy)} starts anew."
    if broken := [key for key, value in saved["state"].items() if key in mine and _is_broken(value, mine[key])]:
        words = f"The checkpoint's clip state is damaged: {', '.join(broken)} cannot be so. {describe(strategy)}"
        return None, f"{words} starts anew."
    flat = {key: value.clone() for key, value in {**mine, **saved["state"]}.items()}
    if saved["names"] != list(layout.names):
        place = {name: i for i, name in enumerate(saved["names"])}
        for key, value in flat.items():
            if key.endswith("_S"):  # as ranks of the saved names: a group's own are in the order of the whole
                order = torch.tensor([place[name] for name in _names(strategy, key, layout)], device="cpu")
                flat[key] = value[order.argsort().argsort()]
    state = unflatten(like, {key: v.to(device=mine[key].device, dtype=mine[key].dtype) for key, v in flat.items()})
    if saved["spec"] != describe(strategy):
        return state, f"The checkpoint was made with {saved['spec']}; its statistics go on under {describe(strategy)}."
    return state, ""


def _groups(strategy: Strategy, layout: Layout) -> dict[str, Any]:
    """For parameters that are judged in groups, under "groups" the names in each, by its number; else nothing."""
    if not isinstance(strategy, Budgets):
        return {}
    parts = strategy.split(layout).layouts
    return {"groups": {str(i): sorted(part.names) for i, part in enumerate(parts) if part is not None}}


def _names(strategy: Strategy, key: str, layout: Layout) -> tuple[str, ...]:
    """Of which parameters a tensor of a state is, by its path in `flatten`."""
    return strategy.names_of(key, layout) if isinstance(strategy, Budgets) else layout.names


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by path: {"mean": ...}, or {"0.mean": ..., "1.gamma_S": ...} for a chain.

    Raises:
        TypeError: for a state with something else in it.
    """
    if isinstance(state, Tensor):
        return {prefix: state}
    if not isinstance(state, (tuple, list)):
        what = f"{type(state).__name__} at {prefix!r}" if prefix else type(state).__name__
        raise TypeError(f"a state is of tensors in (named) tuples, and this one has a {what}.")
    keys = getattr(state, "_fields", None) or range(len(state))
    flat: dict[str, Tensor] = {}
    for key, value in zip(keys, state, strict=True):
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(like: State, flat: dict[str, Tensor], prefix: str = "") -> State:
    """The inverse of `flatten`, with the structure of `like`.

    Raises:
        KeyError: if a tensor of `like` is not in `flat`.
    """
    if isinstance(like, Tensor):
        return flat[prefix]
    keys = getattr(like, "_fields", None) or range(len(like))
    values = [
        unflatten(value, flat, f"{prefix}.{key}" if prefix else str(key)) for key, value in zip(keys, like, strict=True)
    ]
    return rebuild(like, values)


def _is_readable(saved: Any) -> bool:
    """Whether everything is of the kind that `packed` makes, whatever its values."""
    if not isinstance(saved, dict) or not {"spec", "strategy", "names", "state"} <= set(saved):
        return False
    names, state, skips = saved["names"], saved["state"], saved.get("skips_in_a_row", 0)
    return (
        isinstance(saved["spec"], str)
        and isinstance(saved["strategy"], str)
        and isinstance(saved.get("parts", {}), dict)
        and all(isinstance(part, dict) for part in saved.get("parts", {}).values())
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(state, dict)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
        and type(skips) is int
        and skips >= 0
    )


def _is_broken(value: Tensor, like: Tensor) -> bool:
    """Whether a saved tensor is none of this state: of another kind, or not finite where a new one is.

    What a state remembers is finite; only what nothing was put in yet may be something else.
    """
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        return True
    if value.is_complex() or value.is_floating_point() != like.is_floating_point():
        return True
    if (value.dtype is torch.bool) != (like.dtype is torch.bool):
        return True
    if not value.is_floating_point():
        return False
    return bool(value.isnan().any() > like.isnan().any().cpu() or value.isinf().any() > like.isinf().any().cpu())


def _why_not(saved: dict[str, Any], strategy: Strategy, layout: Layout, mine: dict[str, Tensor]) -> str:
    """What a saved state is of that cannot be taken; "" if it can."""
    missing = {key for key in mine.keys() - saved["state"].keys() if not f".{key}".endswith(LATER)}
    others = saved["strategy"] != _kind(strategy) or missing or saved["state"].keys() - mine.keys()
    if others or _means_something_else(saved, _parts(strategy, mine)):
        return f"of {saved['spec']}"
    if set(saved["names"]) != set(layout.names):
        return "of other trainable parameters"
    if saved.get("groups", {}) != _groups(strategy, layout).get("groups", {}):
        return "of other groups of parameters"
    by_unit = any(
        key.endswith("_S") and len(value) != len(_names(strategy, key, layout)) for key, value in mine.items()
    )
    if by_unit and saved["names"] != list(layout.names):
        return "of the same parameters in another order"
    if any(saved["state"].get(key, value).shape != value.shape for key, value in mine.items()):
        return f"of {saved['spec']}, of another size"
    return ""


def _means_something_else(saved: dict[str, Any], parts: dict[str, dict[str, str]]) -> bool:
    """Whether a part that remembers something was another one, by its name or by what it says of its numbers.

    Earlier versions wrote no parts, but a spec.
    """
    theirs = saved.get("parts")
    if theirs is None and is_own(saved["spec"]):
        try:
            theirs = _parts(read_strategy(saved["spec"]), saved["state"])
        except SpecError:  # of fields that there are no more
            return False
    known = theirs or {}
    pairs = [(known.get(place, {}), part) for place, part in parts.items()]
    return any(was.get(field, value) != value for was, part in pairs for field, value in part.items())


def _parts(strategy: Strategy, flat: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """By place, of the parts that remember something, the name and the fields that say what that is."""
    return {
        place: {"strategy": name_of(part), **{field: str(getattr(part, field)) for field in part.remembers_by}}
        for place, part in _places(strategy)
        if any(key.startswith(f"{place}." if place else "") for key in flat)
    }


def _places(strategy: Strategy, place: str = "") -> Iterator[tuple[str, Strategy]]:
    """The parts of a strategy, each with the path of its state in `flatten`."""
    parts: Sequence[Strategy] = strategy.parts if isinstance(strategy, Chain) else ()
    if isinstance(strategy, Budgets):
        parts = [group.strategy for group in strategy.groups]
    if not parts:
        yield place, strategy
    for i, part in enumerate(parts):
        yield from _places(part, f"{place}.{i}" if place else str(i))


def _kind(strategy: Strategy) -> str:
    """What a checkpoint calls a strategy: several by their class, as the state says which parts there are."""
    several = isinstance(strategy, (Chain, Budgets))
    return f"{type(strategy).__module__}.{type(strategy).__qualname__}" if several else name_of(strategy)
