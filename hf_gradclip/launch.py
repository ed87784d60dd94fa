"""`hf-gradclip run`: somebody's script, whose Trainers and Accelerators clip by strategy. Nothing is installed.

A Python file or a module runs in this process, as `python` would run it; any other command in a process of its own.
The Python processes that either of them starts find `on_path/sitecustomize.py` on their PYTHONPATH.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import hf_gradclip.on_path
from hf_gradclip.config import ClipConfig
from hf_gradclip.on_path.hf_gradclip_imports import install
from hf_gradclip.run.environment import CLIP, SEEN

PASSED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT")
"""Signals that a command hears as if they had been sent to it, as far as the system has them."""
NOTHING_CLIPPED = 3
NOTHING = (
    "no step was clipped: none of a transformers.Trainer, and none of a loop that prepares its optimizer with "
    "accelerate.Accelerator. A plain torch loop needs hf_gradclip.Clipper."
)
EXAMPLE = "hf-gradclip run --clip adaptive -- script.py --its_flag 1"


def prepared(clip: str, record: str | None, command: Sequence[str]) -> Callable[[], int]:
    """A run of a command, ready to start.

    Args:
        clip: a spec.
        record: "true", "text" or "false"; None leaves it to the spec.
        command: a Python file, `-m` and a module, or what is on the PATH; and its arguments.

    Returns:
        What runs it, and gives its exit status; NOTHING_CLIPPED where that is 0 and no step was clipped.

    Raises:
        SpecError: for a wrong spec.
        ValueError: for a command that is none.
    """
    words = {"true": True, "false": False}
    config = ClipConfig.parse(clip, record=None if record is None else words.get(record, record))
    return functools.partial(_watched, json.dumps(config.to_dict()), _run_of(command))


def _run_of(command: Sequence[str]) -> Callable[[], int]:
    if not command or [*command] == ["-m"]:
        raise ValueError(f"what shall be run? Write {EXAMPLE}")
    if command[0] == "-m":
        if not _is_there(command[1]):
            raise ValueError(f"-m {command[1]}: there is no {command[1].partition('.')[0]} to import. Is it installed?")
        return functools.partial(_run_module, command[1], command[2:])
    name, arguments = command[0], command[1:]
    if name.endswith(".py") and os.path.isfile(name):
        return functools.partial(_run_file, name, arguments)
    found = shutil.which(name)
    if found is None:
        raise ValueError(f"{name}: is no Python file here, and no command. Write {EXAMPLE}")
    return functools.partial(_run_command, [found, *arguments])


def _is_there(module: str) -> bool:
    """Whether Python finds it, or the outermost package that it is in, as it will be run; nothing is imported."""
    path = sys.path
    sys.path = path if getattr(sys.flags, "safe_path", False) else [os.getcwd(), *path]
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    finally:
        sys.path = path


def _watched(clip: str, run: Callable[[], int]) -> int:
    """Run it with a spec for it and all that it starts, and look whether a step of any of them was clipped."""
    process, outer = os.getpid(), os.environ.get(SEEN)
    folder = tempfile.mkdtemp(prefix="hf_gradclip_")
    seen = Path(folder, "seen")
    mine = str(Path(hf_gradclip.on_path.__file__).parent)
    theirs = os.environ.get("PYTHONPATH")
    os.environ |= {CLIP: clip, SEEN: str(seen), "PYTHONPATH": f"{mine}{os.pathsep}{theirs}" if theirs else mine}
    try:
        status = run()
        if os.getpid() != process or status:  # a process that the script has forked is not asked
            return status
        if seen.exists():
            if outer:
                Path(outer).touch()
            return status
        print(f"hf-gradclip run: {NOTHING}", file=sys.stderr)
        return NOTHING_CLIPPED
    finally:
        if os.getpid() == process:
            shutil.rmtree(folder, ignore_errors=True)


def _run_file(name: str, arguments: Sequence[str]) -> int:
    sys.argv = [name, *arguments]
    return _run_here(lambda: runpy.run_path(name, run_name="__main__"), os.path.dirname(os.path.abspath(name)))


def _run_module(name: str, arguments: Sequence[str]) -> int:
    sys.argv = [name, *arguments]
    return _run_here(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), os.getcwd())


def _run_here(run: Callable[[], object], folder: str) -> int:
    """Run Python in this process; what it raises, and an exit status that is none of success, go on from here."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = folder
    install()
    try:
        run()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    return 0


def _run_command(words: Sequence[str]) -> int:
    """Run a command in a process of its own; its exit status, as a shell has it.

    It hears an interrupt from the terminal as this process does, which waits for it, and is sent what would end this
    one. A signal that is ignored here, as under nohup, is ignored there too.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        if number == signal.SIGINT:
            return
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    known = [getattr(signal, name) for name in PASSED_ON if hasattr(signal, name)]
    heard = [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, *heard)}
    try:
        child = subprocess.Popen(words)
        for number in early:
            child.send_signal(number)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
