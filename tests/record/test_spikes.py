"""Spikes: the score against the definition in plain Python, and the file."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from hf_gradclip.record.spikes import describe_spike, find_spikes, write_spike
from tests.strategies.past import Past


def noisy(n: int, spread: float = 0.3, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [math.exp(generator.gauss(-1, spread)) for _ in range(n)]


def by_hand(norms: list[float], before: list[float]) -> list[tuple[int, float]]:
    """Rows and scores: 5 where a norm begins to stand out, inf where it is not finite."""
    past, found = Past(), []
    for row, norm in enumerate([*before, *norms], -len(before)):
        m, r = past.ordinary()
        z = math.inf if not math.isfinite(norm) else 5 * (math.log(norm) - m) / r if norm > 0 else -math.inf
        if len(past.logs) >= 2 and row >= 0 and z > 5:
            found.append((row, z))
        if math.isfinite(norm):
            past(norm)
    return found


def found_in(norms: list[float], before: list[float]) -> list[tuple[int, float]]:
    return [(spike.row, spike.z) for spike in find_spikes(norms, before)]


def test_the_score_is_its_definition() -> None:
    """With spikes from the third step on, spikes among spikes, a second kind of batch, and a level that grows."""
    norms = noisy(900)
    for row, factor in {2: 40, 6: 9, 15: 7, 16: 7, 300: 6, 301: 30, 302: 30, 303: 30, 304: 30, 305: 30}.items():
        norms[row] *= factor
    norms[500:600:7] = [4 * norm for norm in norms[500:600:7]]
    norms[700:] = [norm * 1.03**i for i, norm in enumerate(norms[700:])]
    for start in (0, 3, 40, 302, 650):
        wanted = by_hand(norms[start:], norms[:start])
        assert [row for row, _ in found_in(norms[start:], norms[:start])] == [row for row, _ in wanted]
        assert found_in(norms[start:], norms[:start]) == [(row, pytest.approx(z, rel=1e-9)) for row, z in wanted]
    assert 8 < len(wanted := by_hand(norms, [])) < 20
    assert {2, 301, 302, 303} <= {row for row, _ in wanted}


def test_64_norms_before_are_enough() -> None:
    norms = noisy(300)
    norms[200] *= 50
    assert found_in(norms[150:], norms[86:150]) == found_in(norms[150:], norms[:150])


def test_norms_that_say_nothing_do_not_count() -> None:
    before, silent = noisy(30), [0.0, math.nan, math.inf]
    assert found_in([5.0], [*silent, *before, *silent]) == found_in([5.0], before) != []
    assert found_in([0.0, 0.0], before) == []
    assert found_in([math.nan, 0.3, math.inf], before) == [(0, math.inf), (2, math.inf)]
    assert found_in([0.0, 1.0, math.nan, 50.0], []) == [], "two must be known"
    assert [row for row, _ in found_in([1.0, math.nan, 0.0, 1.1, 50.0], [])] == [4]


def test_a_smooth_run_has_no_spikes_in_its_ripples() -> None:
    """What is not three times as high is none, however smooth the run."""
    before = [1.0] * 50
    assert found_in([1.2, 2.0, 2.99], before) == []
    assert found_in([3.01], before) == [(0, pytest.approx(5 * math.log(3.01) / math.log(3)))]
    assert found_in([7.9], before[:15]) == [], "eight times in the first 16"
    assert found_in([8.1], before[:15]) == [(0, pytest.approx(5 * math.log(8.1) / math.log(8)))]


def test_noise_has_no_spikes_and_a_spike_is_found_where_it_is() -> None:
    norms = noisy(2000)
    assert not find_spikes(norms, [])
    norms[700] *= 50
    norms[701] *= 50
    assert [spike.row for spike in find_spikes(norms, [])] == [700, 701], "a spike does not hide the next"
    assert all(spike.z > 5 for spike in find_spikes(norms, []))
    parts = [
        spike.row + start for start in range(0, 2000, 10) for spike in find_spikes(norms[start:][:10], norms[:start])
    ]
    assert parts == [700, 701], "found the same whatever the parts"


def test_the_file_of_a_spike(tmp_path) -> None:
    norms = np.array([[3.0, 0.0, 4.0, *[1e-3] * 9], [math.nan, *[1.0] * 11]], dtype=np.float32)
    columns = {
        "step": np.array([41, 42]),
        "norm": np.array([5.0, math.nan]),
        "loss": np.array([2.5, math.nan]),
        "learning_rate": np.array([1e-3, 1e-3]),
        "threshold": np.array([math.nan, 0.5]),
        "norms": norms,
    }
    names = [f"p{i}" for i in range(12)]
    [spike] = find_spikes([5.0], [0.1] * 20)
    write_spike(tmp_path, {**describe_spike(spike, columns, names), "rank": 0, "examples": [7]}, rank=0)
    found = json.loads((tmp_path / "spikes" / "step_41.json").read_text())
    assert found["step"] == 41
    assert found["z"] == pytest.approx(5 * math.log(50) / math.log(3))
    assert (found["norm"], found["loss"], found["threshold"]) == (5.0, 2.5, None)
    assert found["examples"] == [7]
    assert len(found["tensors"]) == 10
    assert [tensor["name"] for tensor in found["tensors"][:2]] == ["p2", "p0"]
    total = (norms[0].astype(np.float64) ** 2).sum()
    assert found["tensors"][0]["share"] == pytest.approx(16 / total, rel=1e-6)

    spike = find_spikes([math.nan], [0.1] * 20)[0]
    nan = describe_spike(type(spike)(row=1, z=spike.z), columns, names)
    assert nan["tensors"][0] == {"name": "p0", "norm": None, "share": 1.0}, "the tensor with the NaN has all of it"
    write_spike(tmp_path, nan, rank=3)
    assert "NaN" not in (tmp_path / "spikes" / "step_42_rank3.json").read_text(), "NaN is no JSON"


def test_the_latest_files_are_kept_of_each_rank(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hf_gradclip.record.spikes.KEPT", 3)
    (tmp_path / "spikes").mkdir()
    (tmp_path / "spikes" / "step_1_notes.json").write_text("{}")
    for step in (7, 9, 10, 100, 98):
        for rank in (0, 1, 11):
            write_spike(tmp_path, {"step": step}, rank)
    kept = {"step_1_notes.json"} | {f"step_{s}{end}.json" for s in (10, 98, 100) for end in ("", "_rank1", "_rank11")}
    assert {path.name for path in (tmp_path / "spikes").iterdir()} == kept
