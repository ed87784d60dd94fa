"""How a refusal reads: what it is, why, and what to use instead. Each integration has its rows in one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from hf_gradclip.views.view import UnsupportedBackendError


class Refusal(NamedTuple):
    """One row of a table.

    Args:
        found: whether it is so here.
        what: the setting, by the name that a person gave it.
        reason: a sentence, from after the colon on.
        instead: a sentence that says what to use.
    """

    found: bool
    what: str
    reason: str
    instead: str

    @property
    def text(self) -> str:
        """In one line."""
        return f"{self.what}: {self.reason} {self.instead}"


def refuse(rows: Iterable[Refusal]) -> None:
    """Stop at the first row that is found; a row after it is not looked at.

    Raises:
        UnsupportedBackendError: in the words of the row.
    """
    for row in rows:
        if row.found:
            raise UnsupportedBackendError(row.text)
