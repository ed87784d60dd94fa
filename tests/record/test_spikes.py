"""Spikes: the score against the definition in plain Python, and the file."""

from __future__ import annotations

import json
import math
import random
import statistics

import numpy as np
import pytest

from hf_gradclip.record.spikes import FLOOR, LEAST, LIMIT, WINDOW, describe_spike, find_spikes, robust_z, write_spike


def noisy(n: int, spread: float = 0.3, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [math.exp(generator.gauss(-1, spread)) for _ in range(n)]


def by_hand(norm: float, before: list[float]) -> float:
    logs = [math.log(n) for n in before]
    middle = statistics.median(logs)
    return (math.log(norm) - middle) / (1.4826 * statistics.median(abs(x - middle) for x in logs))


def test_the_score_is_its_definition() -> None:
    before = noisy(WINDOW)
    for norm in (0.01, 0.4, 5.0):
        assert robust_z(norm, before) == pytest.approx(by_hand(norm, before), rel=1e-12)
    assert robust_z(5.0, [1e9] * 50 + before) == robust_z(5.0, before), "only the window counts"


def test_norms_that_say_nothing_do_not_count() -> None:
    before = noisy(30)
    assert robust_z(5.0, [0.0, math.nan, math.inf, *before]) == robust_z(5.0, before)
    assert robust_z(5.0, before[: LEAST - 1]) == 0
    assert robust_z(math.nan, before) == math.inf
    assert robust_z(0.0, before) == 0


def test_a_smooth_run_has_no_spikes_in_its_ripples() -> None:
    before = [1.0] * 50
    assert robust_z(1.2, before) == pytest.approx(math.log(1.2) / FLOOR)
    assert not find_spikes([1.2, 1.3], before)


def test_noise_has_no_spikes_and_a_spike_is_found_where_it_is() -> None:
    norms = noisy(2000)
    assert not find_spikes(norms, [])
    norms[700] *= 50
    norms[701] *= 50
    assert [spike.row for spike in find_spikes(norms, [])] == [700, 701], "a spike does not hide the next"
    assert all(spike.z > LIMIT for spike in find_spikes(norms, []))
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
    [spike] = find_spikes([5.0], [0.1] * LEAST)
    write_spike(tmp_path, {**describe_spike(spike, columns, names), "rank": 0, "examples": [7]}, rank=0)
    found = json.loads((tmp_path / "spikes" / "step_41.json").read_text())
    assert found["step"] == 41
    assert found["z"] == pytest.approx(math.log(50) / FLOOR)
    assert (found["norm"], found["loss"], found["threshold"]) == (5.0, 2.5, None)
    assert found["examples"] == [7]
    assert len(found["tensors"]) == 10
    assert [tensor["name"] for tensor in found["tensors"][:2]] == ["p2", "p0"]
    total = (norms[0].astype(np.float64) ** 2).sum()
    assert found["tensors"][0]["share"] == pytest.approx(16 / total, rel=1e-6)

    spike = find_spikes([math.nan], [0.1] * LEAST)[0]
    nan = describe_spike(type(spike)(row=1, z=spike.z), columns, names)
    assert nan["tensors"][0] == {"name": "p0", "norm": None, "share": 1.0}, "the tensor with the NaN has all of it"
    write_spike(tmp_path, nan, rank=3)
    assert "NaN" not in (tmp_path / "spikes" / "step_42_rank3.json").read_text(), "NaN is no JSON"
