"""Part `pytest`: the tests that are marked `gpu`, in as many processes as pytest-xdist, if it is here, gives."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from gpu_parts.worker import ROOT, Worker, serve

OPTIONS = "addopts=--strict-markers -ra --import-mode=importlib"  # pyproject's, but with plugins that may be missing


def marked(w: Worker) -> None:
    """Run them; a line for each that fails, and the counts."""
    report, printed = w.out / "pytest_gpu.xml", w.work / "pytest.out"
    report.unlink(missing_ok=True)
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-v", "-o", OPTIONS, "-m", "gpu", *files, "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "--durations=8", "--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", "75"]
    if importlib.util.find_spec("xdist") is not None and not w.tiny:
        command += ["-n", "4"]  # compiles in four processes
    with printed.open("wb") as sink:
        try:
            done = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, timeout=w.left()).returncode
        except subprocess.TimeoutExpired:
            done = 124
    text = printed.read_text("utf-8", errors="replace")
    print(text[-60_000:])
    if done not in (0, 1, 124):
        w.emit(row="pytest", FAILED=f"exit {done}: {' '.join(text.split())[-300:]}")
    w.emit(pytest_exit=done, last=" ".join(text.strip().splitlines()[-1:])[:200])
    if report.exists():
        _read(w, report)
    else:  # its time was up
        w.emit(**Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", text)))
        for line in re.findall(r"^.*\b(?:FAILED|ERROR) .*$", text, re.MULTILINE)[:20]:
            w.emit(row=line[-66:], FAILED="see check.log")


def _read(w: Worker, report: Path) -> None:
    counts = Counter(passed=0, failed=0, skipped=0)
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = next((found for found in map(case.find, ("failure", "error")) if found is not None), None)
        counts["failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if bad is not None:
            said = " ".join((bad.get("message") or bad.text or "").split())[:400]
            w.emit(row=f"{case.get('classname')}.{case.get('name')}"[-66:], FAILED=said)
    w.emit(**counts)


if __name__ == "__main__":
    serve(marked)
