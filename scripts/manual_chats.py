"""Chats from the manual that every Python brings along: a question about a function, and what its docstring says.

    python scripts/manual_chats.py chats.jsonl
    accelerate launch scripts/finetune.py --clip adaptive --model_name_or_path MODEL --train_file chats.jsonl --lora_r 8

A line is {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}; the answer is the first paragraph.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    *(
        "builtins",
        "os",
        "os.path",
        "pathlib",
        "itertools",
        "functools",
        "collections",
        "re",
        "json",
        "random",
        "shutil",
    ),
    *("math", "statistics", "datetime", "time", "subprocess", "threading", "socket", "struct", "string", "textwrap"),
    *(
        "csv",
        "decimal",
        "fractions",
        "heapq",
        "bisect",
        "operator",
        "inspect",
        "logging",
        "tempfile",
        "zipfile",
    ),
)
SHORTEST, LONGEST = 30, 400
"""Characters of an answer."""


def documented() -> Iterator[tuple[str, str]]:
    """Names with the first paragraph of their docstrings, each paragraph once."""
    seen: set[str] = set()
    for module in map(importlib.import_module, MODULES):
        things = {f"{module.__name__}.{name}": thing for name, thing in vars(module).items() if name[:1] != "_"}
        for kind in [
            thing for thing in things.values() if inspect.isclass(thing) and thing.__module__ == module.__name__
        ]:
            things |= {f"{kind.__qualname__}.{name}": part for name, part in vars(kind).items() if name[:1] != "_"}
        for name, thing in things.items():
            answer = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
            if callable(thing) and SHORTEST <= len(answer) <= LONGEST and answer not in seen:
                seen.add(answer)
                yield name.removeprefix("builtins."), answer


def chats() -> list[dict[str, list[dict[str, str]]]]:
    """The questions and answers, in an order that is always the same for one Python."""
    found = [
        {
            "messages": [
                {"role": "user", "content": f"What does {name} do in Python?"},
                {"role": "assistant", "content": answer},
            ]
        }
        for name, answer in documented()
    ]
    random.Random(0).shuffle(found)
    return found


def main(argv: list[str] | None = None) -> None:
    """Write the chats, a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="Where to write.")
    file = parser.parse_args(argv).file
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats()]
    file.write_text("".join(lines), "utf-8")
    print(f"{len(lines)} chats in {file}")


if __name__ == "__main__":
    main()
