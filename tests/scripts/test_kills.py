"""The kills: enough of them, of every kind. What they go on from is in test_finetune_checkpoints.py."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # which the import sets: they are put back after the test
    kills = importlib.import_module("kills")
    return SimpleNamespace(points=importlib.import_module("kills_parts.points"), kills=kills)


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_points(parts, ranks) -> None:
    found = parts.points.points(ranks)
    assert len(set(map(str, found))) == len(found) == 20
    assert set(Counter(point.place for point in found)) == {"step", "save", "record"}
    assert sum(point.alone for point in found) == (0 if ranks == 1 else 5)
    assert not any(point.alone for point in found if point.place == "record"), "rank 0 writes it"


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


def test_a_checkpoint_that_is_not_the_same_is_said(parts, tmp_path) -> None:
    """One file of it has other bytes, one is not there; and of nothing nothing is said to be right."""
    wanted, folder = tmp_path / "wanted", tmp_path / "folder"
    last = f"checkpoint-{parts.points.STEPS}"
    for path in (wanted, folder):
        (path / last).mkdir(parents=True)
    assert parts.kills._unlike(folder, wanted) == ["there is no file to compare it by"]
    for name in ("gradclip.pt", "optimizer.pt", "model.safetensors"):
        (wanted / last / name).write_bytes(b"one")
        (folder / last / name).write_bytes(b"one")
    (wanted / "model.safetensors").write_bytes(b"one")
    (folder / last / "gradclip.pt").write_bytes(b"two")
    words = [f"{last}/gradclip.pt differs", "model.safetensors is missing"]
    assert parts.kills._unlike(folder, wanted) == words
