"""What `agc` leaves alone of a model, in words; where that is everything it would clip nothing."""

from __future__ import annotations

import torch.distributed as dist

from hf_gradclip.say import logger
from hf_gradclip.strategies.agc import AGC
from hf_gradclip.strategies.none import NoClip
from hf_gradclip.strategy import SpecError, Strategy, describe, name_of, parts_of
from hf_gradclip.views.view import View

SHOWN = 3
"""Heads that are named; of more there is a count."""


def refuse_idle(strategy: Strategy, view: View) -> None:
    """Stop where nothing would ever be clipped; where another strategy of the chain still clips, warn.

    Args:
        strategy: what clips.
        view: divided as it asks for.

    Raises:
        SpecError: if `agc` leaves every trainable parameter alone, and no other strategy is there.
    """
    words = idle(strategy, view)
    if words and not _others(strategy):
        raise SpecError(words)
    if words and (not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0):
        logger.warning(words)


def idle(strategy: Strategy, view: View) -> str:
    """Words for an `agc` that leaves every trainable parameter alone; "" where it can clip something."""
    part, names = _agc(strategy), view.layout.names
    if part is None or len(view.uncut) < len(names):
        return ""
    use = [f"include_{word}=true" for word, found in (("1d", _vectors(view)), ("head", view.heads)) if found]
    others = _others(strategy)
    use.append(f"{'+'.join(others)} alone" if others else "adaptive_norm, which clips the whole gradient")
    return (
        f"{describe(part)}: clips nothing here. All {len(names)} trainable parameters are left alone: "
        f"{_left(view)}. Use {' or '.join(use)}."
    )


def exempt(strategy: Strategy, view: View) -> str:
    """Words for the start of a run: what `agc` leaves alone; "" for other strategies."""
    part = _agc(strategy)
    if part is None or (part.include_1d and part.include_head):
        return ""
    words = _left(view) or "nothing"
    if not view.heads and not part.include_head:
        words += "; it found no trained head, so it clips every matrix"
    return f"{name_of(part)} leaves alone {words}"


def _agc(strategy: Strategy) -> AGC | None:
    return next((part for part in parts_of(strategy) if isinstance(part, AGC)), None)


def _others(strategy: Strategy) -> list[str]:
    """The strategies of a chain that clip, `agc` apart."""
    return [name_of(part) for part in parts_of(strategy) if not isinstance(part, (AGC, NoClip))]


def _left(view: View) -> str:
    heads, vectors, words = view.heads, len(_vectors(view)), []
    if heads:
        shown = [_head(name, parameters) for name, parameters in list(heads.items())[:SHOWN]]
        more = f" and {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
        words.append(f"{'the head' if len(heads) == 1 else f'{len(heads)} heads'} ({', '.join(shown)}{more})")
    if vectors:
        words.append(f"{vectors} vector{'s'[: vectors != 1]}")
    return " and ".join(words)


def _head(name: str, parameters: tuple[str, ...]) -> str:
    """The name of a head, and of the embedding that it is tied to."""
    layers = (parameter.rpartition(".")[0] for parameter in parameters)
    others = {layer for layer in layers if layer != name and not layer.startswith(f"{name}.")}
    return f"{name}, tied to {' and '.join(sorted(others))}" if others else name


def _vectors(view: View) -> list[str]:
    """The parameters that are left whole and belong to no head."""
    heads = {name for names in view.heads.values() for name in names}
    return [name for name in view.uncut if name not in heads]
