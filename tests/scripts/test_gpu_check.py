"""The check for a GPU, rehearsed on the CPU: every part runs, what fails costs only itself, and the time box holds.

The package is found by PYTHONPATH alone in the parts, as on a machine where it is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, signal, subprocess, sys, time
lines = open(sys.argv[sys.argv.index("--lines") + 1], "a", buffering=1)
print('{"row": "found before", "ms": 1.5}', file=lines)
"""
FAKE = {
    "crashing": "print('about to crash', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "hanging": """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print('{"row": "child", "pid": %d}' % child.pid, file=lines)
print('{"row": "cut in the mid', end="", file=lines, flush=True)
time.sleep(120)
""",
    "sound": """print('{"row": "another", "FAILED": "ValueError: on purpose"}', file=lines)""",
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_check")


@pytest.fixture
def fakes(script, monkeypatch, tmp_path) -> ModuleType:
    """The script with parts that crash, hang, and end."""
    for name, text in FAKE.items():
        (tmp_path / f"{name}.py").write_text(BEGIN + text, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seconds = {"crashing": 60, "hanging": 3, "sound": 60}
    monkeypatch.setattr(script, "PARTS", {name: script.Part(name, limit) for name, limit in seconds.items()})
    return script


def rehearsed(script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict, str]:
    """What was written, and what was printed last; no row failed."""
    found = script.main(["--out", str(folder), "--cpu-rehearsal", *words])
    printed = capsys.readouterr().out
    assert script.failed(found) == [], (folder / "check.log").read_text("utf-8")[-6000:]
    assert json.loads((folder / "check.json").read_text("utf-8")) == found
    assert len(list(folder.iterdir())) <= 8
    assert printed.endswith(script.headline(found) + "\n")
    assert len(script.headline(found)) < 12_000
    text = (folder / "check.txt").read_text("utf-8")
    for part in found["parts"].values():
        assert part["status"] == "ok"
        assert part["lines"]
        assert all(line["row"] in text for line in part["lines"] if "row" in line)
    return found["parts"], script.headline(found)


def test_a_rehearsal(script, tmp_path, capsys) -> None:
    """Of four parts; the others take longer, or run scripts that have tests of their own."""
    words = ["env", "counts", "share", "sweep"]
    parts, headline = rehearsed(script, tmp_path / "out", capsys, "--only", ",".join(words))
    assert list(parts) == words
    assert "REHEARSAL ON A CPU" in headline

    counted = {line["row"]: line for line in parts["counts"]["lines"]}
    assert counted["clip adaptive"]["aten_ops"] > counted["clip none"]["aten_ops"] > 0
    assert all(f"  {row}" in headline for row in counted)

    shares = {line["row"].removeprefix("1B step, "): line for line in parts["share"]["lines"] if "row" in line}
    assert set(shares) >= {"no clipping", "none", "global_norm:max_norm=1", "adaptive_norm", "adaptive"}
    for row in shares.values():
        assert row["share"] == pytest.approx(row["clip_ms"] / row["step_ms"])
        assert f"{row['share']:.2%}" in headline
    assert shares["no clipping"]["clip_ms"] < min(shares[name]["clip_ms"] for name in ("none", "adaptive"))

    assert len(parts["sweep"]["lines"]) == 6


@pytest.mark.slow
def test_a_whole_rehearsal(script, tmp_path, capsys) -> None:
    parts, headline = rehearsed(script, tmp_path / "out", capsys, "--minutes", "12")
    assert list(parts) == list(script.PARTS)
    assert parts["pytest"]["lines"][-1]["failed"] == 0
    assert re.search(r"copy \(read \+ write\) +ms [\d.e-]+ +TB_per_s", headline)
    for words in (
        "timings: ms",
        "job bf16 adaptive: ",
        "job bf16 stock Trainer: ",
        "bench_clip",
        "optim.AdamW clip=zclip",
    ):
        assert words in headline


def test_what_crashes_or_hangs_costs_only_itself(fakes, tmp_path, capsys) -> None:
    found = fakes.main(["--out", str(tmp_path / "out")])
    parts = found["parts"]
    assert [part["status"] for part in parts.values()] == ["exit -11", "time box", "ok"]
    for part in parts.values():
        assert part["lines"][0] == {"row": "found before", "ms": 1.5}
    assert 3 <= parts["hanging"]["seconds"] < 15
    (_, child) = parts["hanging"]["lines"]  # without the line that was cut
    with pytest.raises(ProcessLookupError):
        _look_for(child["pid"])
    assert fakes.failed(found) == ["crashing", "sound: another"]
    printed = capsys.readouterr().out
    assert "crashing exit -11, hanging time box, sound ok" in printed
    assert "crashing said last: about to crash" in printed
    assert "FAILED sound: another: ValueError: on purpose" in printed


def _look_for(process: int) -> None:
    """Raise ProcessLookupError once it has ended; an orphan that nobody waits for counts as ended."""
    for _ in range(50):
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
        time.sleep(0.1)


def test_the_whole_has_a_time_box(fakes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fakes, "LEAST", 1)
    monkeypatch.setattr(fakes, "SPARE", 5)
    monkeypatch.setitem(fakes.PARTS, "hanging", fakes.Part("hanging", 300))
    start = time.monotonic()
    found = fakes.main(["--out", str(tmp_path / "out"), "--minutes", "0.12", "--skip", "crashing"])
    assert time.monotonic() - start < 60 * 0.12 + 1
    assert [part["status"] for part in found["parts"].values()] == ["time box", "no time left"]


def test_an_unknown_part_is_refused(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script.main(["--only", "env,swep"])
    assert "swep: no such part. There are env, pytest" in capsys.readouterr().err


def test_the_headline_is_short_and_begins_with_what_failed(script) -> None:
    bad = {"row": "x" * 100, "FAILED": "y" * 1000}
    line = {"row": "llama1b bf16, clips: clip zclip", "ms_idle": 1.0, "ms_behind": 1.0, "host_ms": 1.0, "x_floor": 1.0}
    parts = {"timings": {"status": "exit 1", "seconds": 1.0, "lines": [*[line] * 500, bad]}}
    text = script.headline({"commit": "abc", "rehearsal": False, "parts": parts})
    assert len(text) < 12_000
    assert text.index("FAILED timings: xxx") < text.index("clip zclip")
    assert text.endswith("the rest is in check.txt\n")


def test_plain_datasets_make_the_same_blocks_as_datasets(script) -> None:
    finetune, plain = importlib.import_module("finetune"), importlib.import_module("gpu_parts.plain_datasets")
    _, args, _ = finetune.parse(["--block_size", "16", "--vocab_size", "300"])
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 5 for i in range(20)]
    tokenizer = finetune.load_tokenizer(args, texts)
    made = []
    for there in (plain, importlib.import_module("datasets")):
        data = there.DatasetDict(train=there.Dataset.from_dict({"text": texts}))
        blocks = finetune.to_blocks(data, tokenizer, args)["train"]
        made.append([len(blocks), blocks.column_names, blocks[3], list(blocks.select(range(2)))])
    assert made[0] == made[1]
    assert made[0][0] > 3
    split = plain.Dataset.from_dict({"text": texts}).train_test_split(0.1, seed=0)
    assert sorted([*split["train"]["text"], *split["test"]["text"]]) == sorted(texts)
    assert len(split["test"]) == 2


@pytest.mark.gpu
def test_behind_a_backlog_the_time_of_the_host_does_not_count(script) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    benchmark, device = importlib.import_module("benchmark"), torch.device("cuda", 0)
    times = [benchmark.Stopwatch(device, 1, ms).both(lambda: time.sleep(0.01)) for ms in (0.0, 100.0)]
    assert all(host >= 10 for _, host in times)
    assert times[0][0] >= 9
    assert times[1][0] < 2
