"""One step, one meaning: in C, in plain torch and in Triton the same weights, moments, counters and gradients.

The right values are the equations in float64 (tests/optim/reference.py), with the clip of the gradient before them and
the clip of the update after. Of 16-bit memory the result of one step is that of float32, rounded once.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import optim
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.operations import Language, WrittenError
from tests.kernels.languages import NAMES, serving
from tests.optim import reference
from tests.optim.reference import Arrays
from tests.tiny import FACTORS, Enlarge, turn_of

STEPS = 12
LR = 0.02
LOUD = {3: 6.0, 7: 9.0, 8: 4.0}
SHAPES = {"a": (6, 4), "b": (5,), "c": (3, 7), "d": ()}
MOMENTS = {
    "m": "exp_avg", "v": ("exp_avg_sq", "square_avg"), "mean": "grad_avg", "b": "momentum_buffer",
}  # fmt: skip
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], Any, float]] = {
    "AdamW": ("AdamW", {"weight_decay": 0.1}, lambda: reference.AdamW(decay=0.1), 0.8),
    "Adam": ("Adam", {"weight_decay": 0.1}, lambda: reference.Adam(decay=0.1), 0.8),
    "RMSprop": (
        "RMSprop",
        {"alpha": 0.9, "centered": True, "momentum": 0.5, "eps": 1e-2},
        lambda: reference.RMSprop(alpha=0.9, centered=True, momentum=0.5, eps=1e-2),
        3.0,
    ),
    "SGD momentum": (
        "SGD",
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        lambda: reference.SGD(momentum=0.9, dampening=0.3, decay=0.1),
        4.0,
    ),
    "Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, lambda: reference.SGD(momentum=0.9, nesterov=True), 8.0),
}
"""The optimizer, its options, its equations, and a limit of the RMS of an update that some are over."""
CLIPS = {
    "gradient": {"clip": "global_norm:max_norm=15"},
    "update": {"update_clip": "block_rms:max_rms={limit}"},
    "both": {"clip": "global_norm:max_norm=15", "update_clip": "block_rms:max_rms={limit}"},
    "bounded": {"clip": "value:max_value=2.5", "update_clip": "value:max_value={wide}"},
    "by unit": {"clip": "agc:clip_factor=2,eps=1"},
    "enlarged": {"clip": Enlarge(), "update_clip": Enlarge("tensor")},
}


def given_to(clips: dict[str, Any], limit: float) -> dict[str, Any]:
    """The options of an optimizer, with its own limit of updates."""
    return {
        key: spec.format(limit=limit, wide=2 * limit) if isinstance(spec, str) else spec for key, spec in clips.items()
    }


@pytest.fixture(params=NAMES)
def language(request: pytest.FixtureRequest) -> Iterator[Language]:
    with serving(request.param) as found:
        yield found


@pytest.fixture
def rules(language: Language, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rule of every step that this language makes, but for those of the check at first use."""
    seen: list[str] = []
    step_, check = language.step.step_, choice.check.check
    monkeypatch.setattr(language.step, "step_", lambda rule, *rest: (step_(rule, *rest), seen.append(rule.name)))
    monkeypatch.setattr(choice.check, "check", lambda *given: (check(*given), seen.clear()))
    return seen


def parameters(dtypes: dict[str, torch.dtype]) -> dict[str, nn.Parameter]:
    rng = np.random.default_rng(0)
    return {
        name: nn.Parameter(torch.from_numpy(np.asarray(rng.standard_normal(shape), np.float32)).to(dtypes[name]))
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> Arrays:
    """Noise, loud in some steps; `b` has none in every third step, `c` none before step 2."""
    rng = np.random.default_rng(1000 + step)
    made = {
        name: np.asarray(LOUD.get(step, 1.0) * rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()
    }
    return {n: g for n, g in made.items() if not (n == "b" and step % 3 == 2) and not (n == "c" and step < 2)}


def give(params: dict[str, nn.Parameter], grads: Arrays) -> None:
    for name, p in params.items():
        p.grad = torch.from_numpy(grads[name].copy()).to(p.dtype) if name in grads else None


def limits(clips: str, limit: float) -> tuple[reference.Clip, reference.Clip]:
    """The clips of gradient and update in float64."""
    nothing: reference.Clip = lambda x: x  # noqa: E731
    if clips == "bounded":
        return reference.value(2.5), reference.value(2 * limit)
    if clips == "enlarged":
        return reference.in_turn(FACTORS, lambda name: 0), reference.in_turn(FACTORS, turn_of)
    if clips == "by unit":
        return nothing, nothing  # of the weights as they are, see `by_rows`
    before = reference.global_norm(15) if clips != "update" else nothing
    return before, reference.block_rms(limit) if clips != "gradient" else nothing


def by_rows(g: Arrays, w: Arrays) -> Arrays:
    """agc with clip_factor 2 and eps 1: each row of a matrix by its weights; vectors are left alone."""
    found = dict(g)
    for name in g:
        if g[name].ndim == 2:
            norm = np.sqrt((g[name] ** 2).sum(1, keepdims=True))
            size = np.maximum(np.sqrt((w[name] ** 2).sum(1, keepdims=True)), 1.0)
            found[name] = g[name] * np.minimum(1.0, 2 * size / norm)
    return found


class PerParameter:
    """The equations for each parameter apart, since one without a gradient keeps its counter."""

    def __init__(self, make: Any) -> None:
        self.of = {name: make() for name in SHAPES}

    def update(self, g: Arrays, w: Arrays) -> Arrays:
        return {name: self.of[name].update({name: g[name]}, w)[name] for name in g}


def expected(make: Any, clips: str, limit: float, skipped: tuple[int, ...] = ()) -> tuple[Arrays, PerParameter, int]:
    """Weights and moments after the run, and in how many steps anything was clipped."""
    w = {name: p.detach().double().numpy() for name, p in parameters(dict.fromkeys(SHAPES, torch.float32)).items()}
    rules, (before, after), count = PerParameter(make), limits(clips, limit), 0
    for step in range(STEPS):
        if step in skipped:
            continue
        g = {name: np.float64(grad) for name, grad in gradients(step).items()}
        limited = by_rows(g, w) if clips == "by unit" else before(g)
        u = rules.update(limited, w)
        moved = after(u)
        count += bool(reference.changed(g, limited) or reference.changed(u, moved))
        w = reference.go(next(iter(rules.of.values())), w, moved, LR)
    return w, rules, count


def run(name: str, clips: str, params: dict[str, nn.Parameter], nan: tuple[int, ...] = ()) -> torch.optim.Optimizer:
    """Train; every step leaves `.grad` as it came, and one with a NaN moves nothing at all."""
    kind, options, _, limit = OPTIMIZERS[name]
    given = given_to(CLIPS[clips], limit)
    optimizer = getattr(optim, kind)(params.items(), lr=LR, **options, **given)
    for step in range(STEPS):
        grads = gradients(step)
        if step in nan:
            grads["a"][1, 1] = np.nan
        give(params, grads)
        before = snapshot(params, optimizer)
        optimizer.step()
        for name, p in params.items():
            assert (p.grad is None) == (name not in grads)
            if p.grad is not None:
                came = torch.from_numpy(grads[name]).to(p.dtype)
                torch.testing.assert_close(p.grad, came, rtol=0, atol=0, equal_nan=True)
        assert same_bits(before, snapshot(params, optimizer)) == (step in nan)
    return optimizer


def snapshot(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights, moments and counters."""
    return [p.detach().clone() for p in params.values()] + [
        value.clone() for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)
    ]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def assert_is(
    optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], w: Arrays, rules: PerParameter
) -> None:
    """Weights, moments and counters are those of the equations."""
    for name, p in params.items():
        np.testing.assert_allclose(p.detach().double().numpy(), w[name], rtol=1e-6, atol=1e-6, err_msg=name)
        entry, rule = optimizer.state[p], rules.of[name]
        if "step" in entry:
            assert entry["step"].item() == rule.t, name
        for key, names in MOMENTS.items():
            kept = [entry[n] for n in ((names,) if isinstance(names, str) else names) if n in entry]
            if kept:
                wanted = getattr(rule, key)[name]
                np.testing.assert_allclose(
                    kept[0].double().numpy(), wanted, rtol=2e-6, atol=1e-6, err_msg=f"{key} {name}"
                )


CASES = [
    pytest.param(language, name, clips, marks=[pytest.mark.slow] * (language == "Triton" and not few))
    for language in NAMES
    for name in OPTIMIZERS
    for clips in CLIPS
    for few in (name == "AdamW" or clips == "both",)
]
"""The interpreter takes seconds for each: in a plain run every optimizer and every clip once."""


@pytest.mark.parametrize(("language", "name", "clips"), CASES, indirect=["language"])
class TestFloat32:
    def test_is_the_equations(self, name: str, clips: str, language: Language, rules: list[str]) -> None:
        _, _, make, limit = OPTIMIZERS[name]
        w, wanted, clipped = expected(make, clips, limit)
        assert 2 <= clipped <= (STEPS - 2 if clips != "enlarged" else STEPS), clipped  # tensors take turns there
        params = parameters(dict.fromkeys(SHAPES, torch.float32))
        optimizer = run(name, clips, params)
        assert_is(optimizer, params, w, wanted)
        served = language.name == "torch" or clips != "by unit"  # the plan of agc is by unit: plain torch takes it
        assert len(rules) == (STEPS if served else 0)

    def test_a_float64_group_beside(self, name: str, clips: str, language: Language, rules: list[str]) -> None:
        """Which C and Triton do not take: the other parameters are still theirs."""
        _, _, make, limit = OPTIMIZERS[name]
        w, wanted, _ = expected(make, clips, limit)
        params = parameters({**dict.fromkeys(SHAPES, torch.float32), "c": torch.float64})
        optimizer = run(name, clips, params)
        assert_is(optimizer, params, w, wanted)
        served = language.name != "torch" and clips != "by unit"
        assert len(rules) == (STEPS if served else 0 if language.name != "torch" else 2 * STEPS - 2)


@pytest.mark.parametrize(
    ("language", "name", "clips"),
    [case for case in CASES if case.values[2] in ("update", "gradient", "both")],
    indirect=["language"],
)
def test_a_skipped_step_moves_nothing(name: str, clips: str, language: Language) -> None:
    """Because of its update where only that is clipped, else because of its gradient; the first step among them."""
    _, _, make, limit = OPTIMIZERS[name]
    skipped = (0, 5, 6)
    w, wanted, clipped = expected(make, clips, limit, skipped)
    assert 1 <= clipped <= STEPS - len(skipped) - 1, clipped
    params = parameters(dict.fromkeys(SHAPES, torch.float32))
    if clips == "update":
        for p in params.values():  # moments come into being before the update is known
            p.grad = None
    optimizer = run(name, clips, params, nan=skipped if clips != "update" else skipped[1:])
    if clips == "update":
        w, wanted, _ = expected(make, clips, limit, skipped[1:])
    assert_is(optimizer, params, w, wanted)
    place = optimizer.update_clipper if clips == "update" else optimizer.clipper
    assert place.report.summary()["skipped"] == (2 if clips == "update" else 3)


def rounded(x: Tensor, dtype: torch.dtype, truncated: bool) -> Tensor:
    """To 16 bits to nearest; bfloat16 is truncated by Triton's interpreter."""
    if truncated and dtype == torch.bfloat16:
        return (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype).float()


@pytest.mark.parametrize(
    ("language", "clips"),
    [*((name, clips) for name in ("C", "torch") for clips in ("gradient", "update", "both")), ("Triton", "both")],
    indirect=["language"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(
    name: str, clips: str, dtype: torch.dtype, language: Language, rules: list[str]
) -> None:
    """Each step as one in float32 from the same memory, whose weights and moments are rounded after it."""
    kind, options, _, limit = OPTIMIZERS[name]
    given = given_to(CLIPS[clips], limit)
    ours = parameters(dict.fromkeys(SHAPES, dtype))
    theirs = {key: nn.Parameter(p.detach().float()) for key, p in ours.items()}
    mine, exact = (getattr(optim, kind)(some.items(), lr=LR, **options, **given) for some in (ours, theirs))
    equal = count = 0
    for step in range(STEPS if language.name != "Triton" else 5):  # the interpreter is slow; the third step is loud
        give(ours, gradients(step))
        for key, p in ours.items():
            theirs[key].grad = None if p.grad is None else p.grad.float()
        mine.step()
        with serving("torch"):
            exact.step()
        for key, p in ours.items():
            here = {"weight": p.data, **mine.state[p]}
            there = {"weight": theirs[key].data, **exact.state[theirs[key]]}
            for word in here.keys() - {"step"}:
                wanted = rounded(there[word], dtype, language.name == "Triton")
                torch.testing.assert_close(here[word].float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
                equal += int((here[word].float() == wanted).sum())
                count += wanted.numel()
                there[word].copy_(here[word])
    if not (language.name == "Triton" and dtype == torch.bfloat16):  # the interpreter truncates what it reads, too
        assert equal >= 0.995 * count  # else a float32 just beside the middle of two was rounded the other way
    assert bool(rules) == (language.name != "C" or dtype == torch.bfloat16)


class TestPlainStep:
    """What the other languages keep in registers."""

    @pytest.mark.parametrize("clips", [{}, *CLIPS.values()])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_holds_the_temporaries_of_one_tensor(self, name: str, clips: dict[str, Any]) -> None:
        """However many parameters there are: the peak beside weights, gradients and moments is as of one of them."""
        kind, options, _, limit = OPTIMIZERS[name]
        given = given_to(clips, limit)
        peaks = []
        with serving("torch"):
            for count in (1, 12):
                params = [(f"p{i}", nn.Parameter(torch.randn(80, 1024))) for i in range(count)]
                optimizer = getattr(optim, kind)(params, lr=LR, **options, **given)
                for _, p in params:
                    p.grad = 9 * torch.randn_like(p)
                optimizer.step()  # the moments come into being
                peaks.append(peak_of(optimizer.step))
        one = 80 * 1024 * 4
        assert peaks[1] <= peaks[0] + 0.1 * one
        assert peaks[0] <= 6.1 * one


def peak_of(call: Any) -> int:
    """Bytes that a call holds at most beside what there was, as the profiler of torch saw memory come and go.

    Garbage of earlier tests goes first: freed while the call runs, it would be taken off the peak.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class TestSemantics:
    @pytest.mark.parametrize(("kind", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9, "dampening": 0.5})])
    def test_a_first_update_that_is_skipped_leaves_the_first_step_to_the_next(
        self, kind: str, options: dict[str, Any], language: Language
    ) -> None:
        """The first momentum is the gradient, without dampening; the first counter is 1."""
        found = []
        for first in (True, False):
            p = nn.Parameter(torch.ones(5))
            optimizer = getattr(optim, kind)([p], lr=0.1, update_clip="global_norm:max_norm=9", **options)
            for number in [float("nan")] * first + [1.0, 2.0]:
                p.grad = torch.full((5,), number)
                optimizer.step()
            found.append(p.detach())
        assert torch.equal(*found)

    def test_an_infinite_update_at_a_learning_rate_of_0_moves_no_weight(self, language: Language) -> None:
        p = nn.Parameter(torch.ones(5))
        optimizer = optim.SGD([p], lr=0.0, clip={"gradient": "none", "nonfinite": "pass"})
        p.grad = torch.full((5,), float("inf"))
        optimizer.step()
        assert torch.equal(p, torch.ones(5))

    def test_a_gradient_whose_sign_is_still_to_be_taken(self, language: Language) -> None:
        """As autograd leaves behind the conjugate of a complex number."""
        a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
        optimizer = optim.SGD([a, b], lr=0.1, clip="global_norm:max_norm=100")
        (torch.complex(a, b).conj() * (1 + 3j)).real.backward()
        assert b.grad.is_neg()
        optimizer.step()
        assert (a.item(), b.item()) == pytest.approx((0.9, 1.7))

    def test_a_variance_that_is_nearly_0_stays_above_it(self, language: Language) -> None:
        """Of gradients that hardly change, centered RMSprop finds one in the last digits of two averages."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(100, generator=generator)
        p = nn.Parameter(torch.zeros(100))
        optimizer = optim.RMSprop([p], lr=1e-5, centered=True)
        for _ in range(40 if language.name == "Triton" else 1500):
            p.grad = base * (1 + 1e-3 * torch.randn(100, generator=generator))
            optimizer.step()
        assert p.isfinite().all()

    def test_another_order_of_the_elements(self, language: Language, rules: list[str]) -> None:
        """Served where all tensors of a parameter have it, else by plain torch."""
        memory = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        found = []
        for layout in (torch.channels_last, torch.contiguous_format):
            p = nn.Parameter(memory.clone(memory_format=layout))
            optimizer = optim.AdamW([p], clip="global_norm:max_norm=1")
            for grad in (memory.contiguous(memory_format=torch.channels_last), memory, -memory):
                p.grad = grad.clone()
                optimizer.step()
            found.append(p.detach())
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
        assert len(rules) == (6 if language.name == "torch" else 1 + 2)

    def test_memory_on_another_device_is_left_to_torch(self, language: Language, rules: list[str]) -> None:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))]
        optimizer = optim.SGD(params, lr=0.1)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert params[0].tolist() == pytest.approx([0.9] * 3)

    def test_autograd_sees_the_writes(self, language: Language) -> None:
        p = nn.Parameter(torch.ones(4))
        optimizer = optim.AdamW([p], clip="global_norm:max_norm=1")
        p.grad = torch.ones(4)
        optimizer.step()
        before = p._version, optimizer.state[p]["exp_avg"]._version
        optimizer.step()
        assert p._version > before[0]
        assert optimizer.state[p]["exp_avg"]._version > before[1]

    def test_an_update_that_overflows_its_square_is_clipped(self, language: Language) -> None:
        """1e25 is finite, its square in float32 is not."""
        p = nn.Parameter(torch.zeros(3))
        optimizer = optim.SGD([p], lr=1.0, update_clip="global_norm:max_norm=1")
        p.grad = torch.tensor([1e25, 0.0, 0.0])
        optimizer.step()
        assert p.tolist() == pytest.approx([-1.0, 0.0, 0.0])

    def test_a_parameter_that_was_resized_is_said(self, language: Language) -> None:
        """Its moments are of other elements: torch would add what does not belong together, or a kernel read on."""
        p = nn.Parameter(torch.ones(4, 3))
        optimizer = optim.AdamW([("table", p)], clip="global_norm:max_norm=1", update_clip="block_rms:max_rms=0.1")
        for rows in (4, 6, 2):
            p.data = torch.ones(rows, 3)
            p.grad = torch.ones(rows, 3)
            if rows == 4:
                optimizer.step()
                continue
            with pytest.raises(ValueError, match=rf"shape \({rows}, 3\) and its first moment \(4, 3\): was it resized"):
                optimizer.step()
            assert torch.equal(p, torch.ones(rows, 3))


def test_nan_in_the_update_does_not_stay() -> None:
    """In plain torch, as in the others: one NaN under `update_clip` alone is one skipped step."""
    with serving("torch"):
        p = nn.Parameter(torch.ones(3))
        optimizer = optim.AdamW([p], update_clip="block_rms:max_rms=1")
        for i in range(30):
            p.grad = torch.full((3,), float("nan") if i == 3 else 1.0)
            optimizer.step()
        assert optimizer.update_clipper.report.summary()["skipped"] == 1
        assert optimizer.state[p]["step"].item() == 29
        assert p.isfinite().all()


def test_states_move_between_languages() -> None:
    """A run that changes the language in the middle ends where one that does not ends."""
    found = []
    for others in (("C", "C"), ("torch", "C"), ("C", "torch"), ("Triton", "torch")):
        params = parameters(dict.fromkeys(SHAPES, torch.float32))
        state: dict[str, Any] = {}
        for half, name in enumerate(others):
            with serving(name):
                optimizer = optim.AdamW(params.items(), lr=LR, clip="zclip:warmup_steps=3,z_threshold=0.5")
                if state:
                    optimizer.load_state_dict(state)
                for step in range(10 * half, 10 * half + 10):
                    give(params, gradients(step))
                    optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
        found.append({name: p.detach() for name, p in params.items()})
    for other in found[1:]:
        for name, p in other.items():
            torch.testing.assert_close(p, found[0][name], rtol=1e-6, atol=1e-6)


class TestFailure:
    """Kernels that fail before they wrote: plain torch goes on, said once, and every clipper decides once a step."""

    @pytest.mark.parametrize("fails", ["measure_update", "step_"])
    def test_plain_torch_goes_on(self, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
        spec, found = "zclip:warmup_steps=3,max_norm=inf,z_threshold=0.5", []
        for name in ("C", "torch"):
            with serving(name) as language, monkeypatch.context() as patch:
                calls, works = [], getattr(language.step, fails)

                def fail(*given: Any, calls: list[int] = calls, works: Any = works) -> Any:
                    calls.append(1)
                    if len(calls) > 7:
                        raise RuntimeError("no such device")
                    return works(*given)

                params = parameters(dict.fromkeys(SHAPES, torch.float32))
                optimizer = optim.AdamW(params.items(), lr=LR, clip=spec, update_clip=spec)
                if name == "C":
                    give(params, gradients(0))
                    optimizer.step()  # with the check at first use
                    patch.setattr(language.step, fails, fail)
                else:
                    give(params, gradients(0))
                    optimizer.step()
                for step in range(1, STEPS):
                    give(params, gradients(step))
                    optimizer.step()
                assert len(calls) == (8 if name == "C" else 0)
                found.append((params, optimizer.state_dict()["clip"]))
        assert caplog.text.count("no such device. Plain torch serves instead") == 1
        (params, clip), (others, other) = found
        for key, p in params.items():
            torch.testing.assert_close(p, others[key], rtol=1e-6, atol=1e-6)
        for place, value in other.items():
            torch.testing.assert_close(clip[place]["state"], value["state"], rtol=1e-5, atol=1e-6)

    def test_after_something_was_written_it_rises(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No second step on memory that is half stepped."""
        from hf_gradclip.kernels.c import library

        with serving("C") as language:
            p = nn.Parameter(torch.ones(5))
            optimizer = optim.SGD([p], lr=1.0, clip="global_norm:max_norm=100")
            p.grad = torch.ones(5)
            optimizer.step()
            call = library.call

            def half(name: str, *given: Any) -> None:
                call(name, *given)
                if name == "gradclip_step":
                    raise OSError("half way")

            monkeypatch.setattr(library, "call", half)
            with pytest.raises(WrittenError, match="half way"):
                optimizer.step()
            assert language.name == "C"
            assert p.tolist() == [-1.0] * 5
