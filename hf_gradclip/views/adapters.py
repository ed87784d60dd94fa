"""Which parameters belong to an adapter: LoRA and its kin, trained beside a layer that stays as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

NAMES = re.compile(
    r"lora_((embedding_)?[abe]|up|down|magnitude_vector)|(hada|lokr)_[wt]\d(_[ab])?|b?oft_[rs]|ia3_l|vera_lambda_[bd]",
    re.IGNORECASE,
)
"""What adapters of these kinds are called, by PEFT and by others."""
WHOLE = frozenset({"modules_to_save", "token_adapter", "trainable_tokens_delta"})
"""What PEFT lists among a layer's adapters though it is a layer of the model, or rows of one, trained as they are."""


def adapters_of(model: nn.Module | None, named: Sequence[tuple[str, Tensor]]) -> frozenset[str]:
    """The names of the parameters of adapters.

    A layer of PEFT says which of its modules and parameters are an adapter's. Where no layer says so, names tell those
    of the usual kinds.

    Args:
        model: whose layers are looked at; None goes by names alone.
        named: the trained parameters.
    """
    inside = {
        id(p)
        for layer in ([] if model is None else model.modules())
        for word in _said(layer) - WHOLE
        for p in _parameters(getattr(layer, word, None))
    }
    return frozenset(name for name, p in named if id(p) in inside or _has_name(name))


def _said(layer: nn.Module) -> set[str]:
    said = getattr(layer, "adapter_layer_names", ())
    return {word for word in said if isinstance(word, str)} if isinstance(said, (tuple, list)) else set()


def _parameters(found: object) -> Sequence[nn.Parameter]:
    if isinstance(found, nn.Module):
        return [*found.parameters()]
    return [found] if isinstance(found, nn.Parameter) else []


def _has_name(name: str) -> bool:
    parts = name.split(".")
    return WHOLE.isdisjoint(parts) and any(map(NAMES.fullmatch, parts))
