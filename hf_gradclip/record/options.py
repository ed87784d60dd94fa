"""What a spec says about the record of a run: whether there is one, what is in it, and whether it is uploaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_gradclip.strategy import SpecError


@dataclass(frozen=True)
class RecordOptions:
    """How to record.

    Args:
        text: write the decoded text of the examples in a spike.
        push: let the Trainer upload the record with the model; else `gradclip/` stays where it was written.

    Raises:
        SpecError: for something else than true and false.
    """

    text: bool = False
    push: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not bool:
                raise SpecError(f"record={{{name!r}: {value!r}}}: must be true or false.")


def read_record_options(record: Any) -> RecordOptions | None:
    """What is written as `record`: true, false, text, or a dict of the options; None where nothing is recorded.

    Raises:
        SpecError: for anything else.
    """
    if isinstance(record, RecordOptions):
        return record
    if type(record) is bool:
        return RecordOptions() if record else None
    if record == "text":
        return RecordOptions(text=True)
    known = [field.name for field in fields(RecordOptions)]
    if isinstance(record, Mapping) and {*record} <= {*known}:
        return RecordOptions(**record)
    raise SpecError(
        f"ClipConfig(record={record!r}): must be true, false or text, or in full {{'text': true, 'push': false}}."
    )


def shortest(options: RecordOptions | None) -> bool | str | RecordOptions:
    """The shortest way to write it."""
    if options is None or options.push:
        return options or False
    return "text" if options.text else True
