"""A tool, the environment that it is tried in, and the commands that are run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

PARTS = Path(__file__).resolve().parent
INSIDE = PARTS / "inside"
"""Scripts that are run in an environment; beside no module that could hide what is installed there."""
ROOT = PARTS.parents[1]
SECONDS = 600
"""For one command of a check; an installation may take three times as long."""


class FailedError(RuntimeError):
    """A command did not do what it should; with the end of what it printed."""


class Row(NamedTuple):
    """One check of one tool."""

    tool: str
    versions: str
    check: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Room:
    """An environment, and a folder for what is run in it.

    Args:
        environment: a virtual environment.
        folder: where commands are run.
        variables: for the environment of every command.
    """

    environment: Path
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    def inside(self, name: str) -> Room:
        """The same environment, in a folder below."""
        return replace(self, folder=self.folder / name)

    def run(self, *words: str | Path, status: int = 0, seconds: float = SECONDS, **variables: str) -> str:
        """Run a command of the environment.

        Args:
            *words: the command and its arguments.
            status: the exit status that it should have.
            seconds: its limit.
            **variables: more of its environment.

        Returns:
            What it printed.

        Raises:
            FailedError: for another exit status, or where the time is up.
        """
        path = f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **quiet, "PATH": path, "VIRTUAL_ENV": str(self.environment), **self.variables, **variables}
        shown = " ".join(map(str, words))
        try:
            done = subprocess.run(
                [*map(str, words)],
                cwd=self.folder,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise FailedError(f"{shown}: not done in {seconds:.0f} s") from None
        except OSError as error:
            raise FailedError(f"{shown}: {error}") from None
        if done.returncode != status:
            raise FailedError(f"{shown}: exit {done.returncode}. {done.stdout[-2000:]}")
        return done.stdout

    def look(self, *words: str | Path) -> str:
        """What look.py, run in the environment, prints last."""
        return self.run("python", INSIDE / "look.py", *words).strip().splitlines()[-1]

    def versions(self, packages: Sequence[str]) -> str:
        """The versions of some packages, in words."""
        code = f"from importlib.metadata import version as v; print(', '.join(p + ' ' + v(p) for p in {[*packages]!r}))"
        return self.run("python", "-c", code).strip().splitlines()[-1]


@dataclass(frozen=True)
class Door:
    """A tool and how it is tried.

    Args:
        name: of the tool.
        packages: what pip is given beside this package.
        checks: by what is checked a function of a Room with an empty folder; it returns the figures, or raises.
        shown: packages whose versions are printed.
        constrained: whether all of constraints.txt holds; else only its torch does, for a tool that asks for others.
        extra: more words for pip.
    """

    name: str
    packages: Sequence[str]
    checks: Mapping[str, Callable[[Room], str]]
    shown: Sequence[str]
    constrained: bool = True
    extra: Sequence[str] = ()


def install(door: Door, work: Path) -> Path:
    """Make an environment with a tool and this package.

    The package is built from a copy, as a user would install it, so that nothing is written into the checkout.

    Raises:
        FailedError: with the end of what pip printed.
    """
    environment, copy = work / "env", work / "package"
    copy.mkdir()
    for name in ("hf_gradclip", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy / name)
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    torch = re.search(r"^torch==\S+$", constraints, re.MULTILINE)
    assert torch
    (work / "constraints.txt").write_text(constraints if door.constrained else torch[0], "utf-8")
    room = Room(environment, work)
    room.run(sys.executable, "-m", "venv", environment)
    words: list[str | Path] = ["-q", "-c", work / "constraints.txt", *door.extra, torch[0], *door.packages, copy]
    room.run("python", "-m", "pip", "install", *words, seconds=3 * SECONDS)
    return environment
