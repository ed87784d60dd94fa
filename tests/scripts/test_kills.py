"""The kills: enough of them, of every kind; and a checkpoint that is not whole is passed over."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "gradclip.pt")


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**{name: importlib.import_module(f"kills_parts.{name}") for name in ("points", "run")})


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_points(parts, ranks) -> None:
    found = parts.points.points(ranks)
    assert len(set(map(str, found))) == len(found) == 20
    assert set(Counter(point.place for point in found)) == {"step", "save", "record"}
    assert sum(point.alone for point in found) == (0 if ranks == 1 else 5)
    assert not any(point.alone for point in found if point.place == "record"), "rank 0 writes it"


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    for name in FILES:
        torch.save({"step": step}, made / name)
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return made


BROKEN = [(name, how) for name in (*FILES, "trainer_state.json") for how in ("gone", "half")]
BROKEN += [("model.safetensors", "gone")]  # half of it: what is written after it would be missing too


@pytest.mark.parametrize(("name", "how"), BROKEN)
def test_what_is_not_whole_is_passed_over_and_named(parts, name, how, tmp_path, capsys) -> None:
    older, newer = checkpoint(tmp_path, 6), checkpoint(tmp_path, 12)
    assert parts.run.newest_whole(tmp_path, 1) == newer
    file = newer / name
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert parts.run.newest_whole(tmp_path, 1) == older
    assert "checkpoint-12 is passed over" in capsys.readouterr().out


def test_a_rank_that_left_nothing(parts, tmp_path) -> None:
    found = checkpoint(tmp_path, 6)
    assert "rng_state_0.pth is missing" in parts.run.what_lacks(found, 2)


def test_only_who_is_to_die_dies(parts, monkeypatch, tmp_path) -> None:
    killed = []
    monkeypatch.setattr(parts.points.os, "kill", lambda pid, signal: killed.append(pid))
    pids = [tmp_path / "0", tmp_path / "1"]
    for path, pid in zip(pids, ("11", "12"), strict=True):
        path.write_text(pid)
    point = parts.points.Point("step", 3, 1, alone=True)
    for rank in (0, 1):
        killer = parts.points.Killer(point, rank, 2, pids)
        for killer.step in (2, 3):
            killer.at(1)
    assert killed == [parts.points.os.getpid()]
    killer = parts.points.Killer(parts.points.Point("step", 3, 1), 0, 2, pids)
    killer.step = 3
    killer.at(0)
    assert len(killed) == 1
    killer.at(1)
    assert killed[1:3] == [11, 12]
