"""No call of the kernels in C, however wrong, reads or writes memory that is not there: AddressSanitizer looks on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ["statistics", "apply_", "unit_sums", "unit_apply_", "measure_update", "step_"]
FLAGS = ["-shared", "-fPIC", "-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=500)


@pytest.fixture(scope="module")
def sanitizer() -> str:
    """The libraries that must be loaded before Python's first allocation, and torch's first exception."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    found = [run("gcc", f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libstdc++.so.6")]
    if not all(Path(name).is_absolute() for name in found):
        pytest.skip("needs the AddressSanitizer of gcc (libasan), and libstdc++")
    return " ".join(found)


@pytest.fixture(scope="module")
def compiled(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the library."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [str(ROOT / "hf_gradclip" / "kernels" / "c" / f"{name}.c") for name in ("whole", "units", "step")]
    more = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]  # as pyproject.toml has them
    done = run("gcc", *FLAGS, *more, *sources, "-o", str(folder / "sanitized_kernels.so"))
    assert done.returncode == 0, done.stderr
    return str(folder)


@pytest.fixture(scope="module")
def done(sanitizer: str, compiled: str) -> subprocess.CompletedProcess[str]:
    """The calls, and after them one that reads an element too many."""
    return run(
        sys.executable,
        *("-m", "tests.kernels.sanitized", compiled),
        LD_PRELOAD=sanitizer,
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
        PYTHONMALLOC="malloc",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )


def test_every_call_is_right_or_refused(done: subprocess.CompletedProcess[str]) -> None:
    assert done.stdout.startswith("{"), f"ended before the last call\n{done.stderr[-6000:]}"
    seen = json.loads(done.stdout.splitlines()[0])
    for name in OPERATIONS:
        assert seen[f"{name} right"] >= 40, seen
        assert seen[f"{name} refused by name"] >= 40, seen


def test_it_sees_an_element_too_many(done: subprocess.CompletedProcess[str]) -> None:
    assert len(done.stdout.splitlines()) == 1, "not before the last call, and not after it"
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "gradclip_measure" in done.stderr
