"""The options that the optimizers of this folder take, and the rules for their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def insist_on_options(name: str, defaults: dict[str, Any]) -> None:
    """Check the defaults of an optimizer's groups.

    Args:
        name: of the optimizer, for messages.
        defaults: by option.

    Raises:
        ValueError: with the call, the value and the rule; for an option that chooses among torch's own implementations.
    """
    for key in ("foreach", "fused", "capturable", "differentiable"):
        if defaults.get(key) not in (None, False, key == "foreach"):
            raise ValueError(
                f"{name}({key}={defaults[key]}): is torch's; here the device and the dtype say what serves. Leave "
                f"{key} out, or use torch.optim.{name}."
            )
    for key, rule, text in _RULES:
        if key in defaults and not _holds(rule, defaults[key]):
            raise ValueError(f"{name}({key}={defaults[key]}): must be {text}.")


def _holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(rule(value))
    except TypeError:
        return False


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("lr", lambda v: v >= 0, ">= 0"),
    ("eps", lambda v: v >= 0, ">= 0"),
    ("weight_decay", lambda v: v >= 0, ">= 0"),
    ("momentum", lambda v: v >= 0, ">= 0"),
    ("dampening", lambda v: abs(v) < float("inf"), "a finite number"),
    ("alpha", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
)
