"""Which parameters belong to an adapter: LoRA and its kin, trained beside a layer that stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

LORA = "lora_"
"""What the names of LoRA's weights begin with, whoever wrote it: lora_A, lora_b, lora_embedding_A."""
WHOLE = "modules_to_save"
"""What PEFT lists among a layer's adapters though it is a layer of the model, trained whole."""


def adapters_of(model: nn.Module | None, named: Sequence[tuple[str, Tensor]]) -> frozenset[str]:
    """The names of the parameters of adapters.

    Each layer of PEFT says which of its modules and parameters are an adapter's; a name tells those of LoRA.

    Args:
        model: whose layers are looked at; None goes by names alone.
        named: the trained parameters.
    """
    inside = {
        id(p)
        for layer in ([] if model is None else model.modules())
        for word in getattr(layer, "adapter_layer_names", ())
        if word != WHOLE
        for p in _parameters(getattr(layer, word, None))
    }
    return frozenset(name for name, p in named if id(p) in inside or _is_lora(name))


def _parameters(found: object) -> Sequence[nn.Parameter]:
    if isinstance(found, nn.Module):
        return [*found.parameters()]
    return [found] if isinstance(found, nn.Parameter) else []


def _is_lora(name: str) -> bool:
    return any(part.lower().startswith(LORA) for part in name.split("."))
