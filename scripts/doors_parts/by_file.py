"""Tools that are driven by a command and a YAML file: trained by the lines that docs/tools.md prints."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from doors_parts.door import INSIDE, ROOT, FailedError, Room
from doors_parts.trainer_checks import STEPS, Run, Train

PAGE = ROOT / "docs" / "tools.md"
PRINTED_CLIP = "adaptive"
ALONE = {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
"""For the tools: what is installed, on the CPU, and nobody is told."""
OURS = re.compile(r"^hf-gradclip run .*? -- ")


class Lines(NamedTuple):
    """What a section of the page prints: a command, and what it adds to the tool's own YAML file (nothing for none)."""

    command: str
    added: dict[str, Any]

    def by(self, clip: str) -> Lines:
        """The same lines with another clip in the place of the printed one.

        Raises:
            FailedError: if they name none.
        """
        command = self.command.replace(f"--clip {PRINTED_CLIP} ", f"--clip {shlex.quote(clip)} ")
        added = {key: clip if key == "clip" else value for key, value in self.added.items()}
        if self[:] == (command, added):
            raise FailedError(f"{self.command}: nowhere is {PRINTED_CLIP} asked for")
        return Lines(command, added)

    def without(self) -> Lines:
        """The tool by itself."""
        return Lines(OURS.sub("", self.command), {})

    def words(self) -> list[str]:
        """The command in words."""
        return shlex.split(self.command)

    def file(self) -> str:
        """The name of the YAML file."""
        return next(word for word in self.words() if word.endswith((".yaml", ".yml")))


def printed(section: str) -> Lines:
    """The lines of a section of docs/tools.md.

    Raises:
        FailedError: if there is no such section, or no command in it.
    """
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)) if found else {}
    if "sh" not in blocks:
        raise FailedError(f"{PAGE.name}: has no section {section} with a command")
    return Lines(blocks["sh"].strip(), yaml.safe_load(blocks.get("yaml", "")) or {})


def trained_by(section: str, config: Mapping[str, Any], sgd: Mapping[str, Any]) -> Train:
    """A Train (see trainer_checks) of a tool.

    Args:
        section: of docs/tools.md, whose lines are run.
        config: what is in the tool's YAML file beside them; `{data}` stands for the folder of inside/material.py.
        sgd: what is in it where the run is one by SGD with a learning rate of 1.
    """

    def train(room: Room, run: Run) -> Path:
        data = material(room)
        settings: dict[str, Any] = dict(config) | (dict(sgd) if run.sgd else {})
        settings |= {"output_dir": str(run.out), "max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1}
        if run.resume is not None:
            settings["resume_from_checkpoint"] = str(run.resume)
        lines = printed(section)
        lines = lines.without() if run.clip == "none" else lines.by(run.clip)
        start(room, lines, json.loads(json.dumps(settings).replace("{data}", str(data))))
        return data / "model"

    return train


def start(room: Room, lines: Lines, config: Mapping[str, Any], status: int = 0) -> str:
    """Write the tool's YAML file and run its command; what it printed."""
    text = yaml.safe_dump({**config, **lines.added}, sort_keys=False)
    room.folder.joinpath(lines.file()).write_text(text, "utf-8")
    return replace(room, variables={**room.variables, **ALONE}).run(*lines.words(), status=status)


def material(room: Room) -> Path:
    """The folder with model and data, made where it is not there yet."""
    data = room.folder / "data"
    if not data.exists():
        room.run("python", INSIDE / "material.py", data)
    return data
