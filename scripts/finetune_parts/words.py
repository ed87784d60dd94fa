"""What finetune.py says: on rank 0, and where the input is wrong in one line without a traceback."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

BAD_INPUT = 2
NAME = "finetune.py"
SECONDS_FOR_RANK_0 = 15


class InputError(ValueError):
    """Something that was given cannot be served; the message is one line for a person."""


def is_rank_0() -> bool:
    """Whether this process speaks; known before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """Print a line, on rank 0."""
    if is_rank_0():
        print(line, flush=True)


def first_line(error: BaseException) -> str:
    """The error that lies at the bottom of a chain, in one line; the class where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def in_one_line(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of a library into an InputError.

    Args:
        what: the flag and its value, as typed.
        *kinds: which errors mean that this value is wrong.

    Raises:
        InputError: in the place of such an error.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{what}: {first_line(error)}") from error


def leave(message: str) -> NoReturn:
    """End this process with exit status 2: rank 0 says why, and the launcher's own table of failures has it too.

    A launcher ends all ranks when the first one ends, so the others leave rank 0 the time to speak. One that is not
    ended by then has an error of its own, and says it.

    Raises:
        SystemExit: always.
    """
    line = f"{NAME}: error: {' '.join(message.split())}"
    if not is_rank_0():
        time.sleep(SECONDS_FOR_RANK_0)
        line += f" (rank {os.environ['RANK']})"
    print(line, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": str(int(time.time()))}), "utf-8")
    raise SystemExit(BAD_INPUT)
