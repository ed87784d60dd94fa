"""What is right of a case, against what it left: words for everything that is not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from faults_parts.cases import AFTER, NOT_FINITE, STRATEGIES, WHEN, Case
from faults_parts.runs import SCALE, Watched
from hf_gradclip.state import flatten
from hf_gradclip.strategy import parts_of

LIMIT = 20
"""Steps skipped in a row after which a run stops: the default."""


def moved(watched: Watched) -> list[bool]:
    """Of each step whether any weight of this process did; decay moves them in every step that is made."""
    weights = watched.looks.weights
    return [not all(map(same, old, new)) for old, new in pairwise(weights)]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, where a NaN is one too."""
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (a, b)))


def found_on(watched: Watched) -> dict[str, Any]:
    """What the ranks must agree on, and whether anything moved here."""
    states = [{key: value.tolist() for key, value in flatten(clipper.state).items()} for clipper in watched.clippers]
    return {
        "moved": moved(watched),
        "error": None if watched.error is None else str(watched.error).split(".")[0],
        "counts": [_counts(clipper) for clipper in watched.clippers],
        "states": repr(states),
        "weights": repr([w.tolist() for w in watched.looks.weights[-1]]) if watched.case.backend == "ddp" else "",
    }


def _counts(clipper: Any) -> dict[str, float]:
    summary = clipper.report.summary()
    return {key: summary[key] for key in ("steps", "skipped", "nonfinite")}


def wrong(watched: Watched, everywhere: list[dict[str, Any]]) -> Iterator[str]:
    """In words what is not right.

    Args:
        watched: the run as this process saw it.
        everywhere: `found_on` of every rank.
    """
    case = watched.case
    steps = [any(step) for step in zip(*(found["moved"] for found in everywhere), strict=False)]
    for key in ("error", "counts", "states", "weights"):
        if any(found[key] != everywhere[0][key] for found in everywhere):
            yield f"ranks disagree on {key}: {[found[key] for found in everywhere] if key != 'states' else ''}"
    yield from _memory(watched)
    yield from _exact(watched)
    yield from _steps(case, steps, everywhere[0]["error"])
    yield from _counters(case, steps, everywhere[0]["counts"])
    if watched.scaler is not None and case.fault in NOT_FINITE:
        halved = torch.tensor(SCALE)
        for _ in WHEN[case.when]:
            halved = halved * 0.5
        if watched.scaler.get_scale() != float(halved):
            yield f"the loss scale is {watched.scaler.get_scale()}, torch's would be {float(halved)}"


def _memory(watched: Watched) -> Iterator[str]:
    """No weight, moment or state is ever something else than finite."""
    alone = watched.scaler is not None or watched.reads_no_gradient
    torchs = alone and watched.case.fault == "1e30"  # torch's own end: Adam's square is inf
    for step, (weights, moments) in enumerate(zip(watched.looks.weights, watched.looks.moments, strict=True)):
        if _ends_as_torchs(watched.case) and step > WHEN[watched.case.when].stop:
            break
        if not all(bool(weight.isfinite().all()) for weight in weights):
            yield f"a weight is not finite after step {step}"
            break
        bad = [key for key, moment in moments.items() if not bool(moment.isfinite().all())]
        if bad and not (torchs and all("exp_avg_sq" in key for key in bad)):
            yield f"{bad[0]} is not finite after step {step}"
            break
    for clipper in watched.clippers:
        fresh = flatten(clipper.config.gradient.init(clipper._layout))
        for key, value in flatten(clipper.state).items():
            if value.is_floating_point() and not bool((value.isfinite() | (value == fresh[key])).all()):
                yield f"the state {key} of {clipper.prefix} is not finite"


def _exact(watched: Watched) -> Iterator[str]:
    """A step that moves no weight moves no moment and no counter."""
    moments = watched.looks.moments
    for step, (went, old, new) in enumerate(zip(moved(watched), moments, moments[1:], strict=False)):
        if not went and (old.keys() != new.keys() or not all(same(old[key], new[key]) for key in old)):
            changed = [key for key in new if key not in old or not same(old[key], new[key])]
            yield f"step {step} moved no weight, but {changed[:2]}"
            return


def _ends_as_torchs(case: Case) -> bool:
    """Whether the loss scale was halved to 0: torch then divides by it, and nobody speaks of its weights any more."""
    return case.backend == "fp16 GradScaler" and case.fault in NOT_FINITE and case.when == "200 in a row"


def _chooses(case: Case) -> bool:
    """Whether the strategy may leave out a step that is finite."""
    return any(part.skips for part in parts_of(STRATEGIES[case.strategy]))


def _steps(case: Case, steps: list[bool], error: str | None) -> Iterator[str]:
    """Which steps were made, and what ended the run."""
    broken = WHEN[case.when]
    if _ends_as_torchs(case):
        steps, error = steps[: broken.stop], None
    for step, went in enumerate(steps):
        if step in broken and case.fault in NOT_FINITE and went:
            yield f"step {step} was made"
            break
        if not went and not _chooses(case) and (step not in broken or case.fault in ("subnormal", "zero")):
            yield f"step {step} was left out"
            break
    if error is not None:
        if any(steps[-LIMIT:]) or len(steps) < LIMIT or f"{LIMIT} steps in a row" not in error:
            yield f"ended after {len(steps)} steps: {error}"
        if not (len(broken) > 1 and broken.start <= len(steps) - LIMIT < broken.stop):
            yield f"ended after {len(steps)} steps"
        return
    if _ends_as_torchs(case):
        return
    if len(broken) > 1 and case.fault in NOT_FINITE:
        yield "200 in a row did not end it"
    if len(steps) != case.steps:
        yield f"{len(steps)} steps in the place of {case.steps}"
    within = AFTER if len(broken) > 1 and _chooses(case) else 2  # skip_step takes three for a change of level
    if not any(steps[-AFTER:][:within]):
        yield f"did not recover within {within} steps"


def _counters(case: Case, steps: list[bool], counts: list[dict[str, float]]) -> Iterator[str]:
    """Steps, skipped and not finite, of the gradient; an update is judged where its gradient went through."""
    if _ends_as_torchs(case):
        return
    out = steps.count(False)
    first, last = counts[0], counts[-1]
    if (first["steps"], first["skipped"]) != (len(steps), out):
        yield f"counts {first}, and of {len(steps)} steps {out} were left out"
    if case.fault in NOT_FINITE:
        broken = len([step for step in WHEN[case.when] if step < len(steps)])
        if first["nonfinite"] != broken:
            yield f"counts {first['nonfinite']} not finite of {broken}"
    elif not _chooses(case) and first["nonfinite"] != out:
        yield f"counts {first['nonfinite']} not finite, and {out} left out"
    if len(counts) > 1 and (last["steps"], last["skipped"], last["nonfinite"]) != (len(steps) - out, 0, 0):
        yield f"counts {last} of the updates, and {len(steps) - out} were made"
