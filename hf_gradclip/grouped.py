"""What a person writes for groups of parameters, as text or as a dict: patterns, and what clips what they find.

"embed*=global_norm:max_norm=1;*lora_* as adapters=adaptive_norm;*=adaptive"
{"embed*": 1.0, "*lora_*": {"strategy": "adaptive_norm", "name": "adapters"}, "*": "adaptive"}
{"groups": {"head.weight": 1.0, ...}}    where no key has one of the characters of a pattern
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hf_gradclip.budgets import Budgets
from hf_gradclip.patterns import REGEX, Group
from hf_gradclip.strategy import SpecError, Strategy

WORD = "groups"
SETTINGS = (
    *("gradient", "nonfinite", "max_consecutive_skips", "check_every", "update", "fold", "skip_sync", "record"),
    *("histogram_every", "after_spike", "log", "console"),
)
"""The keys of a whole configuration, see ClipConfig: beside patterns they are one in the wrong place."""
_NAMED = re.compile(r"(.*\S)\s+as\s+(\S+)")


def is_grouped(spec: Any) -> bool:
    """Whether a text or a dict is of groups, and not of one strategy or a whole configuration."""
    if isinstance(spec, Mapping):
        return WORD in spec or any(_is_pattern(key) for key in spec)
    if not isinstance(spec, str):
        return False
    pattern, equals, _ = spec.partition(":")[0].partition("=")
    return spec.strip().startswith(REGEX) or ";" in spec or (bool(equals) and "," not in pattern)


def specs_in(text: str) -> list[str]:
    """The spec of each group of a text."""
    return [part.partition("=")[2] for part in text.split(";") if part.strip()]


def read_groups(spec: Any, read: Callable[[Any], Strategy]) -> Budgets:
    """The groups that are written.

    Args:
        spec: for which `is_grouped` is true.
        read: gives the strategy of a group's spec.

    Raises:
        SpecError: with the group that is wrong, the rule and the fix.
    """
    pairs = _pairs_of_text(spec) if isinstance(spec, str) else _pairs_of_dict(spec)
    groups = []
    for pattern, label, given in pairs:
        try:
            groups.append(Group(pattern, read(given), label))
        except SpecError as error:
            raise SpecError(f"group {pattern!r}: {error}") from None
    return Budgets(tuple(groups))


def _pairs_of_text(text: str) -> list[tuple[str, str, Any]]:
    pairs = []
    for part in filter(str.strip, text.split(";")):
        pattern, equals, given = (piece.strip() for piece in part.partition("="))
        if not equals or not given:
            raise SpecError(f"{part.strip()!r} is no group. Write pattern=strategy, as in embed*=adaptive_norm.")
        named = _NAMED.fullmatch(pattern)
        pairs.append((named[1], named[2], given) if named else (pattern, "", given))
    return pairs


def _pairs_of_dict(spec: Mapping[Any, Any]) -> list[tuple[str, str, Any]]:
    if WORD in spec:
        if others := [key for key in spec if key != WORD]:
            raise SpecError(f"{others[0]!r} beside {WORD!r}: groups stand alone. Write it in the group that it is for.")
        spec = spec[WORD]
        if not isinstance(spec, Mapping):
            raise SpecError(
                f"{WORD}={spec!r}: must hold patterns and their strategies, {{'embed*': 1.0, '*': 'adaptive'}}."
            )
    elif apart := [key for key in SETTINGS if key in spec]:
        rest = "" if apart[0] == "gradient" else f", {apart[0]!r}: ..."
        raise SpecError(
            f"{apart[0]!r} beside patterns: it is of the whole configuration, {{'gradient': {{'*': ...}}{rest}}}. "
            f"For a parameter of that name write {{'groups': {{{apart[0]!r}: ...}}}}."
        )
    pairs = []
    for pattern, given in spec.items():
        if not isinstance(pattern, str):
            raise SpecError(f"the pattern {pattern!r} must be a word. In YAML put it in quotes.")
        label = ""
        if isinstance(given, Mapping) and "name" in given:
            label = given["name"]
            given = {key: value for key, value in given.items() if key != "name"}
            if not isinstance(label, str):
                raise SpecError(f"group {pattern!r}: name={label!r} must be a word.")
            if given.keys() == {"clip"}:
                given = given["clip"]
        pairs.append((pattern, label, given))
    return pairs


def _is_pattern(key: Any) -> bool:
    return isinstance(key, str) and (key.startswith(REGEX) or bool(set("*?[.") & set(key)))
