"""`skip_sync=False`: nobody reads on the host whether a step is skipped, and a skipped step still moves nothing.

Against the equations in float64, which leave the skipped steps out, and against the same run with a read. That no host
reads is counted on pretended CUDA tensors in tests/scripts/test_count_launches.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import Clipper, optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.kernels.operations import Language
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.kernels.languages import serving
from tests.optim import reference
from tests.optim.test_languages import (
    CLIPS,
    LR,
    SHAPES,
    STEPS,
    assert_is,
    expected,
    give,
    gradients,
    parameters,
    same_bits,
    snapshot,
)
from tests.optim.test_languages import OPTIMIZERS as DAMPED
from tests.optim.test_languages import language as language
from tests.tiny import SkipThird

OPTIMIZERS: dict[str, tuple[str, dict[str, Any], Any, float]] = {
    **DAMPED,
    "SGD momentum": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}, lambda: reference.SGD(0.9, decay=0.1), 4.0),
    "RMSprop corrected": (
        "RMSprop",
        {"alpha": 0.9, "bias_correction": True, "eps": 1e-2},
        lambda: reference.RMSprop(alpha=0.9, corrected=True, eps=1e-2),
        1.5,
    ),
}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SKIPPED = {"at the start": (0, 1, 2), "in the middle": (4, 5, 9), "in turns": (0, 2, 4, 6, 8)}


def made(name: str, clips: str, params: dict[str, nn.Parameter], **more: Any) -> optim.ClippedOptimizer:
    kind, options, _, limit = OPTIMIZERS[name]
    given: dict[str, Any] = {key: spec.format(limit=limit, wide=2 * limit) for key, spec in CLIPS[clips].items()}
    given["clip"] = {"gradient": given.get("clip", "none"), "skip_sync": False, **more}
    return getattr(optim, kind)(params.items(), lr=LR, **options, **given)


def floats() -> dict[str, nn.Parameter]:
    return parameters(dict.fromkeys(SHAPES, torch.float32))


def poisoned(step: int, nan: tuple[int, ...]) -> reference.Arrays:
    grads = gradients(step)
    if step in nan:
        grads["a"][1, 1] = np.nan
    return grads


def wanted(name: str, clips: str, skipped: tuple[int, ...]) -> Any:
    _, _, make, limit = OPTIMIZERS[name]
    return expected(make, clips, limit, skipped)


CASES = [
    pytest.param(language, name, clips, when, marks=[pytest.mark.slow] * (language == "Triton" and not few))
    for language, clips in (("C", "both"), ("torch", "both"), ("torch", "by unit"), ("Triton", "both"))
    for name in OPTIMIZERS
    for when in SKIPPED
    for few in (name == "AdamW" or when == next(iter(SKIPPED)),)
]
"""The interpreter takes seconds for each: in a plain run every optimizer once, and AdamW with every place of a skip."""


@pytest.mark.parametrize(("language", "name", "clips", "when"), CASES, indirect=["language"])
def test_is_the_equations_without_the_skipped_steps(name: str, clips: str, when: str, language: Language) -> None:
    skipped = SKIPPED[when]
    w, rules, clipped = wanted(name, clips, skipped)
    assert 1 <= clipped <= STEPS - len(skipped) - 1
    params = floats()
    optimizer = made(name, clips, params)
    for step in range(STEPS):
        give(params, poisoned(step, skipped))
        before = [p.detach().clone() for p in params.values()]
        optimizer.step()
        assert same_bits(before, [p.detach() for p in params.values()]) == (step in skipped)
    assert_is(optimizer, params, w, rules)
    counts = optimizer.clipper.report.summary()
    assert (counts["skipped"], counts["nonfinite"]) == (len(skipped), len(skipped))


@pytest.mark.parametrize(
    ("language", "dtype"),
    [("C", F32), ("C", BF16), ("torch", F32), ("torch", BF16), ("torch", F64), ("Triton", F32)],
    indirect=["language"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_run_with_a_read(name: str, dtype: torch.dtype, language: Language) -> None:
    """Weights, moments, counters and the states of both clips; where `SkipThird` asks for it the norm is finite."""
    kind, options, _, _ = OPTIMIZERS[name]
    found = []
    for sync in (True, False):
        params = parameters(dict.fromkeys(SHAPES, dtype))
        clip = {"gradient": SkipThird(), "skip_sync": sync}
        update = "zclip:warmup_steps=2,z_threshold=0.1,max_norm=inf"
        optimizer = getattr(optim, kind)(params.items(), lr=LR, **options, clip=clip, update_clip=update)
        for step in range(STEPS):
            give(params, poisoned(step, (5,)))
            optimizer.step()
        states = [optimizer.state[p] for p in params.values()]
        kept = [entry[key] for entry in states for key in sorted(entry)]
        clips = [
            *optimizer.clipper.state_dict()["state"].values(),
            *optimizer.update_clipper.state_dict()["state"].values(),
        ]
        found.append(([p.detach() for p in params.values()], kept, clips, optimizer))
    for mine, theirs in zip(found[0][:3], found[1][:3], strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12 if dtype == F64 else 0, atol=0)
    counts = [optimizer.clipper.report.summary() for *_, optimizer in found]
    assert counts[0] == pytest.approx(counts[1])
    assert counts[0]["skipped"] >= 2 > counts[0]["nonfinite"] == 1
    updates = [optimizer.update_clipper.report.summary() for *_, optimizer in found]
    assert 0 < updates[0]["clipped"] == updates[1]["clipped"]
    assert updates[1]["nonfinite"] == 0, "an update that nobody asked for is none that is not finite"
    assert updates[0]["norm_median"] == pytest.approx(updates[1]["norm_median"])


def test_an_update_that_is_not_finite_moves_nothing(language: Language) -> None:
    """The second momentum of 2e38 is beyond float32; each step that is made moves the weight by the limit, 1."""
    p = nn.Parameter(torch.zeros(1))
    clip = {"gradient": "none", "skip_sync": False}
    optimizer = optim.SGD([p], lr=0.5, momentum=0.9, clip=clip, update_clip="global_norm:max_norm=1")
    seen = []
    for number in (2e38, 2e38, 2e38, -2e38, 1.0):
        p.grad = torch.full((1,), number)
        optimizer.step()
        seen.append(p.item())
    assert seen == pytest.approx([-0.5, -0.5, -0.5, 0.0, 0.5], abs=1e-6)
    assert optimizer.update_clipper.report.summary()["skipped"] == 2
    assert optimizer.clipper.report.summary()["skipped"] == 0


@pytest.mark.parametrize("halves", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_either_way(name: str, halves: tuple[bool, bool]) -> None:
    """With a read or without, of a checkpoint of either, with skips before and after it."""
    skipped = (0, 1, 5, 6, 9)
    w, rules, _ = wanted(name, "both", skipped)
    params, saved = floats(), None
    for half, sync in enumerate(halves):
        optimizer = made(name, "both", params, skip_sync=sync)
        if saved is not None:
            optimizer.load_state_dict(saved)
        for step in range(6 * half, 6 * half + 6):
            give(params, poisoned(step, skipped))
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    assert_is(optimizer, params, w, rules)
    assert {key for entry in saved["state"].values() for key in entry} == {
        key for p in params.values() for key in optimizer.state[p]
    }
    kind, options, _, _ = OPTIMIZERS[name]
    torchs = getattr(torch.optim, kind)(params.values(), lr=LR, **{k: v for k, v in options.items() if k[:4] != "bias"})
    torchs.load_state_dict(saved)
    torchs.step()


def test_parameters_that_come_and_go_keep_their_counters() -> None:
    """Those without a gradient make no step, and vectors of counters are made anew."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([p, q], clip={"gradient": "none", "skip_sync": False})
    for both in (True, False, True, True):
        p.grad, q.grad = torch.ones(2), torch.ones(3) if both else None
        optimizer.step()
    assert (optimizer.state[p]["step"].item(), optimizer.state[q]["step"].item()) == (4, 3)


def test_too_many_skips_stop_a_loop_that_never_asks() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([p], clip={"gradient": "none", "skip_sync": False, "max_consecutive_skips": 5})
    p.grad = torch.full((2,), float("nan"))
    for _ in range(49):
        optimizer.step()
    with pytest.raises(NonFiniteError, match=r"50 steps in a row were skipped \(max_consecutive_skips=5\)"):
        optimizer.step()


def test_a_step_without_its_gradients_is_no_skip_of_its_update() -> None:
    """Between two updates that are skipped: the limit is of steps in a row that were asked."""
    p = nn.Parameter(torch.zeros(1))
    clip = {"gradient": "none", "skip_sync": False, "max_consecutive_skips": 3}
    optimizer = optim.SGD([p], lr=0.5, momentum=0.9, clip=clip, update_clip="global_norm:max_norm=1")
    for number in (2e38, 2e38, float("nan"), 2e38):
        p.grad = torch.full((1,), number)
        optimizer.step()
    optimizer.clipper.check_skips()
    optimizer.update_clipper.check_skips()
    optimizer.step()
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        optimizer.update_clipper.check_skips()


@pytest.mark.parametrize("spec", ["zclip:warmup_steps=3,z_threshold=0.5,max_norm=inf", "agc:clip_factor=2,eps=1"])
@pytest.mark.parametrize("takes", [True, False])
def test_a_clipper_beside_hands_the_flag_over(spec: str, takes: bool) -> None:
    """With the plan, or after gradients were written."""
    found = []
    for sync in (True, False):
        params = floats()
        model = nn.ParameterDict(params)
        optimizer = optim.AdamW(params.values(), lr=LR)
        clipper = Clipper.for_model(model, spec, optimizer=optimizer, skip_sync=sync)
        for step in range(STEPS):
            give(params, poisoned(step, (0, 5, 6)))
            clipper.step(to=optimizer if takes else None)
            if not (sync and clipper.step_was_skipped):
                optimizer.step()
        found.append(snapshot(params, optimizer))
        assert clipper.report.summary()["skipped"] == 3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-8)


class TestRefused:
    def test_dampening(self) -> None:
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        clip = {"gradient": "none", "skip_sync": False}
        with pytest.raises(ValueError, match=r"^SGD\(momentum=0.9, dampening=0.5\) with skip_sync=False: .*Set damp"):
            optim.SGD([p], momentum=0.9, dampening=0.5, clip=clip)
        optimizer = optim.SGD([p], momentum=0.9, clip=clip)
        optimizer.add_param_group({"params": [q], "dampening": 0.5})
        p.grad = q.grad = torch.ones(2)
        with pytest.raises(ValueError, match=r"Set dampening=0, or use skip_sync=True"):
            optimizer.step()
        assert p.tolist() == [1, 1]
        with pytest.raises(UnsupportedBackendError, match=r"with dampening the momentum cannot begin at 0"):
            Clipper.for_model(nn.ParameterList([p]), "none", optimizer=optim.SGD([p], 0.1, 0.9, 0.5), skip_sync=False)

    def test_fold(self) -> None:
        p = nn.Parameter(torch.ones(2))
        with pytest.raises(SpecError, match=r"this one clips as it reads\. Leave it out"):
            optim.SGD([p], clip={"gradient": "zclip", "fold": True})
        with pytest.raises(UnsupportedBackendError, match=r"fold=True with .*Use fold=False"):
            Clipper.for_model(nn.ParameterList([p]), "zclip", optimizer=optim.SGD([p]), fold=True)

    def test_an_optimizer_of_a_part(self) -> None:
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        with pytest.raises(UnsupportedBackendError, match="steps 1 parameters and the gradient is of 2"):
            Clipper.for_model(nn.ParameterList([p, q]), "zclip", optimizer=optim.SGD([p]), skip_sync=False)

    def test_raising(self) -> None:
        with pytest.raises(SpecError, match="raising needs the flag"):
            optim.SGD(
                [nn.Parameter(torch.ones(2))], clip={"gradient": "none", "nonfinite": "raise", "skip_sync": False}
            )


def test_states_move_between_languages_without_a_read() -> None:
    found: list[list[Tensor]] = []
    for others in (("C", "C"), ("torch", "C"), ("C", "Triton")):
        params, state = floats(), None
        for half, word in enumerate(others):
            with serving(word):
                optimizer = made("AdamW", "both", params)
                if state:
                    optimizer.load_state_dict(state)
                for step in range(6 * half, 6 * half + 6):
                    give(params, poisoned(step, (1, 7)))
                    optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
        found.append([p.detach() for p in params.values()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
