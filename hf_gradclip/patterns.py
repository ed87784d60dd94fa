"""Groups of parameters by patterns over their names."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass

from hf_gradclip.strategy import SpecError, Strategy, Units
from hf_gradclip.types import cached

REGEX = "re:"
REST = "rest"
"""The label of the group `*`."""
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Group:
    """The parameters whose names a pattern finds, and what clips them.

    Args:
        pattern: a glob for the whole name or for its tail after a dot, so that `embed*` finds
            `model.embed_tokens.weight`; or `re:` and a regular expression, which is searched for in the name.
        strategy: that judges them, as if they were the whole gradient.
        label: in the keys of the log, `clip/<label>/...`; "" makes it of the pattern.

    Raises:
        SpecError: for a pattern that cannot be, a label with other characters than letters, digits, `_`, `.` and `-`.
    """

    pattern: str
    strategy: Strategy
    label: str = ""

    def __post_init__(self) -> None:
        if not self.pattern or re.search(r"[;=\s]", self.pattern):
            raise SpecError(
                f"the pattern {self.pattern!r} must be a name without spaces, ';' and '=', in which * stands for "
                "anything. Write 'embed*', say."
            )
        if not self.label:
            object.__setattr__(self, "label", label_of(self.pattern))
        if not _LABEL.fullmatch(self.label):
            raise SpecError(
                f"the name {self.label!r} of the group {self.pattern!r} must be of letters, digits, '_', '.' and '-': "
                "it is a part of the logged keys."
            )
        try:
            _ = self._finder
        except re.error as error:
            raise SpecError(f"the pattern {self.pattern!r} is no regular expression ({error}).") from None

    @cached
    def _finder(self) -> re.Pattern[str]:
        if self.pattern.startswith(REGEX):
            return re.compile(self.pattern.removeprefix(REGEX))
        return re.compile(rf"(?:.*\.)?(?:{fnmatch.translate(self.pattern)})")

    def finds(self, name: str) -> bool:
        """Whether a parameter of this name is in the group, if no earlier one has taken it."""
        return (self._finder.search if self.pattern.startswith(REGEX) else self._finder.match)(name) is not None


def label_of(pattern: str) -> str:
    """The label of a group that was not given one."""
    if pattern == "*":
        return REST
    words = [word.strip("_") for word in re.findall(r"[A-Za-z0-9_]+", pattern.removeprefix(REGEX))]
    return "_".join(filter(None, words)) or "group"


@dataclass(frozen=True)
class UnitsByName(Units):
    """Which parameters are measured by unit where that differs by group.

    Args:
        groups: per group its pattern and what it asks for; None where its parameters stay whole.
    """

    groups: tuple[tuple[Group, Units | None], ...] = ()

    def of(self, name: str) -> Units | None:
        """See Units; the first pattern that finds the name decides."""
        return next((units for group, units in self.groups if group.finds(name)), None)
