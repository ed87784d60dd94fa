"""The fault matrix: its arrays have every pair, its judge sees what is wrong, and a sample of its cases is right."""

from __future__ import annotations

import importlib
import itertools
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEED = 1
"""Printed by a test that fails: its cases are `python scripts/faults.py --seed 1 --only NUMBER`."""


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    names = ("cases", "runs", "right", "worker")
    return SimpleNamespace(**{name: importlib.import_module(f"faults_parts.{name}") for name in names})


def test_every_pair_of_levels_meets(parts) -> None:
    """Against all pairs there are, but for updates where a strategy or a loop cannot clip them."""
    given = parts.cases.cases(SEED, 0)
    factors = {"backend": parts.cases.BACKENDS, **parts.cases.FACTORS}
    met = {
        ((a, getattr(case, a)), (b, getattr(case, b))) for case in given for a, b in itertools.combinations(factors, 2)
    }
    missing = [
        (a, x, b, y)
        for a, b in itertools.combinations(factors, 2)
        for x in factors[a]
        for y in factors[b]
        if ((a, x), (b, y)) not in met
    ]
    refused = {"agc", "adaptive", "skip_step", "skip_step on both", "skip_step+zclip"}
    assert {(x, y) for _, x, _, y in missing} == {(name, "update") for name in refused}
    assert len(missing) == 5
    assert {case.strategy for case in given} > {"none", "adaptive_norm", "adaptive", "zclip_paper"}


def test_the_same_seed_gives_the_same_cases(parts) -> None:
    given = parts.cases.cases(SEED, 3000)
    assert given == parts.cases.cases(SEED, 3000)
    assert given != parts.cases.cases(SEED + 1, 3000)
    assert len({replace(case, number=0) for case in given if case.backend == "plain"}) > 2700
    assert len(given) == 3000


@pytest.mark.parametrize("backend", ["plain", "trainer"])
def test_a_sample_is_right(parts, backend) -> None:
    given = [case for case in parts.cases.cases(SEED, 3000) if case.backend == backend]
    some = random.Random(SEED).sample(given, {"plain": 10, "trainer": 2}[backend])
    found = [(case, line["wrong"]) for case in some if (line := parts.worker.judged(case))["wrong"]]
    assert not found, f"seed {SEED}"
    assert len({case.fault for case in some}) > 1


def judge(parts, watched) -> str:
    return "; ".join(parts.right.wrong(watched, [parts.right.found_on(watched)]))


def test_the_judge_sees_what_is_wrong(parts) -> None:
    case = parts.cases.Case(3, "plain", "nan", "one element", "mid-run", "none", "gradient", "torch")
    watched = parts.runs.run(case)
    assert judge(parts, watched) == ""
    looks = watched.looks
    at = parts.cases.WHEN["mid-run"].start + 1
    kept = looks.weights[at][0]
    looks.weights[at][0] = kept + 1
    assert "step 20 was made" in judge(parts, watched)
    looks.weights[at][0] = kept * float("nan")
    assert "a weight is not finite after step 21" in judge(parts, watched)
    looks.weights[at][0] = kept
    key = next(key for key in looks.moments[at] if "exp_avg_sq" in key)
    looks.moments[at][key] = looks.moments[at][key] * 2
    assert "step 20 moved no weight, but" in judge(parts, watched)
    looks.moments[at][key] = torch.full_like(looks.moments[at][key], float("inf"))
    assert "exp_avg_sq is not finite" in judge(parts, watched)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nonfinite": "pass"}, "is not finite"),
        ({"max_consecutive_skips": 50}, "ended after 56 steps"),
        ({}, ""),
    ],
)
def test_a_run_without_its_guard_is_wrong(parts, change, words, monkeypatch) -> None:
    case = parts.cases.Case(2, "plain", "inf", "one tensor", "200 in a row", "adaptive_norm", "gradient", "torch")
    for_model = parts.runs.Clipper.for_model
    monkeypatch.setattr(parts.runs.Clipper, "for_model", lambda *given: for_model(*given, **change))
    found = judge(parts, parts.runs.run(case))
    assert (words in found) if words else not found
