"""Which versions of other packages serve: an environment for each row, and a part of the tests in it.

    python scripts/versions.py
    python scripts/versions.py --row accelerate-1.11 deepspeed-0.18 --part core trainer
    python scripts/versions.py --row trl-1.9 --over .venv    only what differs is installed, over an environment

A row is constraints.txt with some packages at other versions. Its environment is made anew, in a folder for passing
files, and removed when its tests have run; what pip cannot bring together is a row too, with pip's words. The table has
the counts of passed tests, and the names of those that failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS: dict[str, dict[str, str]] = {
    "pinned": {},
    "accelerate-1.11": {"accelerate": "1.11.0"},
    "trl-1.9": {"trl": "1.9.0"},
    "deepspeed-0.18": {"deepspeed": "0.18.9"},
    "transformers-5.24": {"transformers": "5.24.0", "peft": ">=0.21"},
    "oldest": {
        "torch": "2.8.0",
        "transformers": "5.3.0",
        "accelerate": "1.12.0",
        "triton": ">=3.4",
        "huggingface-hub": ">=1.31",
        "tokenizers": ">=0.22",
    },
    "torch-2.14": {"torch": "2.14.1", "triton": "3.8.0"},
    "torch-2.15": {"torch": "2.15.0", "triton": ">=3.8"},
}
"""By name the packages that are not as constraints.txt has them: a version, or `>=` and one."""
EXTRAS = {"oldest": "[deepspeed,lightning,peft,report,trl]"}
"""Where a row cannot have all of `test`: torch 2.8 brings a triton that is older than the extra `triton` asks for."""
TOOLS = ("hypothesis", "lion-pytorch", "playwright", "pytest", "pytest-timeout", "pytest-xdist", "tensorboard")
"""What runs the tests there."""
_CORE = "test_clipper.py test_config.py test_budgets.py strategies optim/test_torch.py"
_TRAINER = "test_trainer.py test_parity.py test_checkpoints.py"
_TRL = "test_patch.py test_recorded_examples.py test_flags.py"
PARTS: dict[str, list[str]] = {
    "core": [f"tests/{name}" for name in _CORE.split()],
    "trainer": [f"tests/integrations/{name}" for name in _TRAINER.split()],
    "trl": [f"tests/integrations/{name}" for name in _TRL.split()],
    "ddp": ["tests/integrations/test_ddp.py", "tests/integrations/test_sharded.py"],
    "zero": ["tests/integrations/test_sharded_zero.py"],
}
LAST = re.compile(r"^=*\s*(?:.*?\b)?(?=\d+ (?:passed|failed|error))(.*) in [\d.]+s", re.MULTILINE)
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
MOST_NAMES = 4


@dataclass
class Row:
    """What came of one environment.

    Args:
        name: of ROWS.
        versions: of the packages that are installed.
        why: pip's words, where they could not be; "" else.
        counts: by part, how many tests passed and how many did not; None where pytest itself failed.
        failed: the names of tests that did not pass.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    why: str = ""
    counts: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def constraints(text: str, changes: dict[str, str]) -> str:
    """constraints.txt with other versions of some packages."""
    kept = [line for line in text.splitlines() if line.partition("==")[0].strip() not in changes]
    added = [f"{name}{version if version[0] in '<>=' else f'=={version}'}" for name, version in changes.items()]
    return "\n".join([*kept, *added]) + "\n"


def read(said: str) -> tuple[tuple[int, int] | None, list[str]]:
    """What pytest said at its end: how many passed, how many did not, and their names."""
    found = LAST.findall(said)
    if not found:
        return None, []
    numbers = {word.rstrip("s"): int(count) for count, word in COUNT.findall(found[-1])}
    bad = numbers.get("failed", 0) + numbers.get("error", 0)
    return (numbers.get("passed", 0), bad), FAILED.findall(said)


def wanted(name: str, folder: Path, over: Path | None) -> list[str]:
    """The words for `pip install` in a new environment.

    Args:
        name: of ROWS.
        folder: of the environment; constraints.txt is written there.
        over: another one, whose packages count as installed; None installs all.
    """
    if over is not None:
        (there,) = over.glob("lib/python*/site-packages")
        (here,) = folder.glob("lib/python*/site-packages")
        here.joinpath("over.pth").write_text(f"{there.resolve()}\n", "utf-8")
    limits, changes = folder / "constraints.txt", ROWS[name]
    limits.write_text(constraints((ROOT / "constraints.txt").read_text("utf-8"), changes), "utf-8")
    newer = [f"{key}{version}" for key, version in changes.items() if version[0] in "<>="]
    tools = TOOLS if name in EXTRAS else ()
    return ["-c", str(limits), "-e", f"{ROOT}{EXTRAS.get(name, '[test]')}", *tools, *newer]


def run(name: str, parts: Sequence[str], over: Path | None = None) -> Row:
    """Make the environment of a row, and run parts of the tests in it."""
    row = Row(name)
    with tempfile.TemporaryDirectory(prefix="versions_") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        install = [python, "-m", "pip", "install", "-q", *wanted(name, Path(folder), over)]
        made = subprocess.run(install, capture_output=True, text=True, check=False)
        if made.returncode:
            row.why = " ".join(made.stderr.split())[-300:]
            return row
        asked = ["torch", "transformers", "accelerate", "deepspeed", "trl", "peft"]
        code = f"import importlib.metadata as m; print(*[f'{{p}}={{m.version(p)}}' for p in {asked}])"
        listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        row.versions = dict(pair.split("=", 1) for pair in listed.split())
        bin_first = f"{Path(folder, 'bin')}{os.pathsep}{os.environ['PATH']}"
        settings = {
            **os.environ,
            "PATH": bin_first,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        for part in parts:
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARTS[part]]
            said = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False).stdout
            row.counts[part], failed = read(said)
            row.failed += failed
            print(f"{name}, {part}: {row.counts[part]} {' '.join(failed[:MOST_NAMES])}", file=sys.stderr, flush=True)
    return row


def table(rows: Sequence[Row], parts: Sequence[str]) -> str:
    """The rows as Markdown: passed, or passed and failed, of each part."""
    lines = [f"| versions | {' | '.join(parts)} | what fails |", "|---" * (len(parts) + 2) + "|"]
    for row in rows:
        shown = [_count(row.counts.get(part)) for part in parts]
        versions = ", ".join(f"{name} {version}" for name, version in row.versions.items()) or row.name
        names = [name.rpartition("::")[2] for name in row.failed]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        why = f"does not install: {row.why}" if row.why else ", ".join(names[:MOST_NAMES]) + more
        lines.append(f"| {versions} | {' | '.join(shown)} | {why} |")
    return "\n".join(lines)


def _count(found: tuple[int, int] | None) -> str:
    if found is None:
        return "-"
    return f"{found[0]} passed" + (f", {found[1]} failed" if found[1] else "")


def main(argv: Sequence[str] | None = None) -> str:
    """Run the rows; the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=list(ROWS), help="Which versions.")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS), help="Which tests.")
    parser.add_argument("--over", type=Path, help="An environment with this package's extra `test`.")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    text = table([run(name, args.part, args.over) for name in args.row], args.part)
    print(text)
    return text


if __name__ == "__main__":
    main()
