"""Clipping in tools that other people wrote, each in an environment of its own, by the tool's own command.

    python scripts/doors.py --out doors.md
    python scripts/doors.py lightning --env lightning=ENV      an environment that is there already, and stays

A tool is a module of doors_parts/ with a DOOR. One after another an environment is made, the tool and this package are
installed in it in the versions of constraints.txt, a tiny model is trained, and the environment is deleted. What is
checked of each: a limit of 1e-12 moves nothing under SGD, and without it the weights move; logs; state in a checkpoint;
a resumed run that goes on to the bit. What is printed last is a table. The exit status is 1 if a check failed or a tool
could not be installed. Nothing here is run by pytest.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from doors_parts.door import Door, FailedError, Room, Row, install

SCRIPTS = Path(__file__).resolve().parent
WRITTEN = {path.stem: path.read_text("utf-8") for path in sorted((SCRIPTS / "doors_parts").glob("*.py"))}
TOOLS = [name for name, text in WRITTEN.items() if "\nDOOR = " in text]


def tried(door: Door, room: Room) -> list[Row]:
    """Run the checks of one tool; a check that fails costs the others nothing."""
    versions = room.versions(door.shown)
    rows = []
    for name, check in door.checks.items():
        began, inside = time.monotonic(), room.inside(re.sub(r"\W+", "_", name))
        inside.folder.mkdir()
        try:
            found, passed = check(inside), True
        except (FailedError, AssertionError) as error:
            found, passed = " ".join(str(error).split())[-400:] or "an assertion", False
        rows.append(Row(door.name, versions, name, passed, found))
        words = "" if passed else "FAILED: "
        print(f"[{time.monotonic() - began:4.0f} s] {door.name}: {name}: {words}{found}", flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| tool | check | | found |", "|---|---|---|---|"]
    lines += [f"| {r.tool} ({r.versions}) | {r.check} | {'ok' if r.passed else 'FAILED'} | {r.found} |" for r in rows]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Read the command line, and try the tools."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help=f"Of {', '.join(TOOLS)}; all, if left out.")
    parser.add_argument("--out", type=Path, help="A file for the table.")
    parser.add_argument("--env", action="append", default=[], help="TOOL=FOLDER: an environment that is there.")
    parser.add_argument("--keep", type=Path, help="A folder for environments and runs, which stay there.")
    args = parser.parse_args(argv)
    if unknown := sorted({*args.tools} - {*TOOLS}):
        parser.error(f"{', '.join(unknown)}: no such tool. There are {', '.join(TOOLS)}.")
    there = dict(words.split("=", 1) for words in args.env)
    rows: list[Row] = []
    for tool in args.tools or TOOLS:
        door: Door = import_module(f"doors_parts.{tool}").DOOR
        work = Path(tempfile.mkdtemp(prefix=f"door_{tool}_", dir=args.keep))
        try:
            environment = Path(there[tool]) if tool in there else install(door, work)
            (work / "runs").mkdir()
            rows += tried(door, Room(environment, work / "runs"))
        except FailedError as error:
            rows.append(Row(door.name, "", "installed", False, " ".join(str(error).split())[-400:]))
        finally:
            if args.keep is None:
                shutil.rmtree(work, ignore_errors=True)
        if args.out is not None:
            args.out.write_text(table(rows), "utf-8")
    print(f"\n{table(rows)}", end="")
    return rows


if __name__ == "__main__":
    sys.exit(not all(row.passed for row in main()))
