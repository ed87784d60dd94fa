"""What holds for any model, any gradients and any strategy: drawn, the same in every plain run.

HF_GRADCLIP_EXAMPLES=300 pytest tests/test_properties.py      more of them, another draw each time
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_gradclip import ClipConfig, Clipper
from hf_gradclip.analysis.replay import replay
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.record.files import read_record
from hf_gradclip.record.parts import write_part
from hf_gradclip.state import flatten
from hf_gradclip.strategy import Chain, SpecError, Strategy, describe, parts_of
from tests.strategies.test_contract import VARIANTS

MORE = os.environ.get("HF_GRADCLIP_EXAMPLES")
STEPS = 7
SHORT = {
    name: replace(strategy, warmup_steps=3) if hasattr(strategy, "warmup_steps") else strategy  # type: ignore[call-arg]
    for name, strategy in VARIANTS.items()
}
BY_WHOLE = {
    name: strategy
    for name, strategy in SHORT.items()
    if not any(part.per_parameter or part.needs.units for part in parts_of(strategy))
}
REPLAYED = {
    name: strategy
    for name, strategy in SHORT.items()
    if not any(p.bounds or p.needs.max_abs or p.needs.units or p.needs.weights for p in parts_of(strategy))
}
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def many(test: Any) -> Any:
    """Few examples, always the same; or as many as asked for."""
    few = settings(max_examples=8, derandomize=True, deadline=None, database=None)
    asked = settings(max_examples=int(MORE or 1), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return (asked if MORE else few)(test)


class Drawn(NamedTuple):
    """A model as tensors of some shapes, and what its gradients are in each step; None where there is none."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    layouts: dict[str, str]
    steps: list[dict[str, np.ndarray | None]]
    losses: list[float]


@st.composite
def drawn(draw: Any, dtypes: Sequence[torch.dtype] = DTYPES, broken: bool = True) -> Drawn:
    """Up to five tensors, seven steps; norms over twelve orders of magnitude, zeros, gaps, and NaN or inf."""
    shape = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=5))
    names = [f"layer_{i}" for i in range(len(shapes))]
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    level = draw(st.integers(-5, 4))
    steps: list[dict[str, np.ndarray | None]] = []
    for _ in range(STEPS):
        kind = draw(st.sampled_from(["usual"] * 8 + ["loud", "faint", "zero", "gap"] + ["nan", "inf"] * broken))
        size = 10.0 ** (level + {"loud": 3, "faint": -4}.get(kind, 0)) * (kind != "zero")
        grads: dict[str, np.ndarray | None] = {
            n: rng.standard_normal(s) * size for n, s in zip(names, shapes, strict=True)
        }
        if kind in ("nan", "inf"):
            grads[names[-1]] = np.full(shapes[-1], float(kind))
        if kind == "gap" and len(names) > 1:
            grads[names[0]] = None
        steps.append(grads)
    chosen = {name: draw(st.sampled_from(list(dtypes))) for name in names}
    layouts = {name: draw(st.sampled_from(["plain", "turned", "gaps"])) for name in names}
    losses = [float(rng.uniform(1, 2)) for _ in range(STEPS)]
    return Drawn(dict(zip(names, shapes, strict=True)), chosen, layouts, steps, losses)


def laid(array: np.ndarray, dtype: torch.dtype, how: str) -> Tensor:
    """These numbers in memory of their own: as they are, with the axes the other way round, or with gaps between."""
    tensor = torch.from_numpy(np.array(array)).to(dtype)
    if how == "turned" and tensor.ndim > 1:
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    if how == "gaps" and tensor.ndim > 0:
        wide = torch.full((*tensor.shape, 2), float("nan"), dtype=dtype)
        wide[..., 0] = tensor
        return wide[..., 0]
    return tensor


class Model(nn.Module):
    """The tensors of a draw, in some order."""

    def __init__(self, draw: Drawn, names: Sequence[str]) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        weights = {name: torch.from_numpy(rng.standard_normal(draw.shapes[name])) for name in draw.shapes}
        for name in names:
            self.register_parameter(name, nn.Parameter(weights[name].to(draw.dtypes[name])))

    def take(self, draw: Drawn, step: int) -> None:
        """Its gradients of a step."""
        for name, p in self.named_parameters():
            grad = draw.steps[step][name]
            p.grad = None if grad is None else laid(grad, p.dtype, draw.layouts[name])

    def grads(self) -> dict[str, np.ndarray]:
        """In float64, as they are now."""
        return {n: p.grad.double().numpy().copy() for n, p in self.named_parameters() if p.grad is not None}


def made(model: nn.Module, strategy: Any) -> Clipper:
    """A clipper; a draw in which there is nothing that a strategy could clip, and which it refuses, is none."""
    try:
        return Clipper.for_model(model, strategy)
    except SpecError as error:
        if "agc" not in str(error):
            raise
        reject()


def clipped(clipper: Clipper, model: Model, draw: Drawn, steps: range = range(STEPS)) -> list[dict[str, np.ndarray]]:
    """The gradients after each step; empty where it was left out."""
    found = []
    for step in steps:
        model.take(draw, step)
        clipper.step(draw.losses[step])
        found.append({} if clipper.step_was_skipped else model.grads())
    return found


def assert_alike(a: Sequence[dict], b: Sequence[dict], draw: Drawn, units: int = 2) -> None:
    """Step by step and tensor by tensor, to so many roundings of the dtype."""
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            rtol = units * ROUNDING[draw.dtypes[name]]
            tiny = float(torch.finfo(draw.dtypes[name]).tiny) * 2
            np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=tiny, err_msg=name)


def assert_left(norm: float | None, grads: dict[str, np.ndarray], draw: Drawn) -> None:
    """The gradients have the norm that the log says they were left with; it says none where elements were bounded."""
    if norm is not None:
        lost = sum(grads[key].size * float(torch.finfo(draw.dtypes[key]).tiny) for key in grads)
        left = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        rtol = 4 * max((ROUNDING[draw.dtypes[key]] for key in grads), default=0.0)
        np.testing.assert_allclose(left, norm, rtol=rtol, atol=2 * lost)


@many
@given(draw=drawn(), name=st.sampled_from(list(SHORT)))
def test_a_factor_is_in_0_to_its_limit(draw: Drawn, name: str) -> None:
    """Of every element; a step that is not finite is left out and changes nothing that the strategy keeps."""
    model = Model(draw, list(draw.shapes))
    clipper = made(model, SHORT[name])
    limit = max(getattr(part, "max_scale", 1.0) for part in parts_of(SHORT[name]))
    for step in range(STEPS):
        model.take(draw, step)
        before, kept = model.grads(), flatten(clipper.state)
        norm = float(clipper.step(draw.losses[step]))
        if not all(np.isfinite(grad).all() for grad in before.values()):
            assert clipper.step_was_skipped
            assert all(map(torch.equal, kept.values(), flatten(clipper.state).values()))
            continue
        exact = np.sqrt(sum((grad**2).sum() for grad in before.values()))
        assert norm == pytest.approx(exact, rel=1e-6)
        if clipper.step_was_skipped:
            assert any(part.skips for part in parts_of(SHORT[name]))
            continue
        after = model.grads()
        assert_left(clipper.report.scalars().get("clip/norm_post"), after, draw)
        for key, left in after.items():
            rounding = 1 + 2 * ROUNDING[draw.dtypes[key]]
            most = np.abs(before[key]) * (limit if np.isfinite(limit) else 1e300) * rounding
            assert (left * before[key] >= 0).all(), "no sign changes"
            assert (np.abs(left) <= most + 2 * float(torch.finfo(draw.dtypes[key]).tiny)).all()
            assert np.isfinite(left).all()


@many
@given(draw=drawn(), name=st.sampled_from(list(SHORT)), data=st.data())
def test_the_order_of_parameters_does_not_matter(draw: Drawn, name: str, data: Any) -> None:
    names = list(draw.shapes)
    other = data.draw(st.permutations(names))
    models = [Model(draw, order) for order in (names, other)]
    runs = [clipped(made(model, SHORT[name]), model, draw) for model in models]
    assert_alike(*runs, draw)


@many
@given(draw=drawn(dtypes=[torch.float32, torch.float64]), name=st.sampled_from(list(BY_WHOLE)), data=st.data())
def test_a_rule_for_the_whole_does_not_see_where_it_is_cut(draw: Drawn, name: str, data: Any) -> None:
    """Each tensor flat, against pieces of it, each a parameter of its own."""
    flat = {key: int(np.prod(shape)) for key, shape in draw.shapes.items()}
    cuts = {key: data.draw(st.integers(0, size)) for key, size in flat.items()}
    shapes, dtypes, steps = {}, {}, []
    for key, cut in cuts.items():
        for part, size in (("a", cut), ("b", flat[key] - cut)):
            if size:
                shapes[f"{key}_{part}"], dtypes[f"{key}_{part}"] = (size,), draw.dtypes[key]
    for grads in draw.steps:
        some = {}
        for key, grad in grads.items():
            pieces = (None, None) if grad is None else np.split(grad.reshape(-1), [cuts[key]])
            some |= {
                f"{key}_{part}": piece for part, piece in zip("ab", pieces, strict=True) if f"{key}_{part}" in shapes
            }
        steps.append(some)
    cut_up = Drawn(shapes, dtypes, dict.fromkeys(shapes, "plain"), steps, draw.losses)
    model, parts = Model(draw, list(draw.shapes)), Model(cut_up, list(shapes))
    whole = clipped(made(model, BY_WHOLE[name]), model, draw)
    pieces = clipped(made(parts, BY_WHOLE[name]), parts, cut_up)
    joined = [
        {
            key: np.concatenate([step[n] for n in (f"{key}_a", f"{key}_b") if n in step]).reshape(draw.shapes[key])
            for key in draw.shapes
            if any(f"{key}_{part}" in step for part in "ab")
        }
        for step in pieces
    ]
    assert_alike(whole, joined, draw)


def may_follow(name: str) -> bool:
    """Whether a strategy can be in a chain without leaving steps out, of which the second pass would not hear."""
    return not any(part.skips for part in parts_of(SHORT[name]))


@many
@given(
    draw=drawn(dtypes=[torch.float32, torch.float64], broken=False),
    first=st.sampled_from([n for n in SHORT if may_follow(n) and not any(p.bounds for p in parts_of(SHORT[n]))]),
    second=st.sampled_from([n for n in SHORT if may_follow(n)]),
)
def test_a_chain_is_one_pass_after_the_other(draw: Drawn, first: str, second: str) -> None:
    chain = Chain((*parts_of(SHORT[first]), *parts_of(SHORT[second])))
    one, two = Model(draw, list(draw.shapes)), Model(draw, list(draw.shapes))
    together = clipped(made(one, chain), one, draw)
    passes, apart = [made(two, SHORT[name]) for name in (first, second)], []
    for step in range(STEPS):
        two.take(draw, step)
        whole = two.grads()
        passes[0].step(draw.losses[step])
        left = two.grads()
        if all(map(judges, passes)) and any((left[key] != whole[key]).any() for key in whole):
            break  # what the first limits it may leave just where the second begins to, and rounding decides
        passes[1].step(draw.losses[step])
        apart.append(two.grads())
    assert_alike(together[: len(apart)], apart, draw, units=20)  # the second pass measures what was rounded


def judges(clipper: Clipper) -> bool:
    """Whether the strategy limits what stands out by the rule of adaptive_norm."""
    return any("logs" in key for key in flatten(clipper.state))


@many
@given(draw=drawn(), name=st.sampled_from(list(SHORT)), at=st.integers(0, STEPS), data=st.data())
def test_a_state_goes_round(draw: Drawn, name: str, at: int, data: Any) -> None:
    """Through a file, into a model in another order, and on, bit for bit where the order is the same."""
    names = list(draw.shapes)
    order = data.draw(st.sampled_from([names, names[::-1]]))
    first, second = Model(draw, names), Model(draw, order)
    one, two = (made(model, SHORT[name]) for model in (first, second))
    clipped(one, first, draw, range(at))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    units = any(part.needs.units is not None and flatten(part.init(one.view.layout)) for part in parts_of(SHORT[name]))
    words = two.load_state_dict(torch.load(file, weights_only=True))
    if words:
        assert units
        assert order != names
        return
    rest = [clipped(*pair, draw, range(at, STEPS)) for pair in ((one, first), (two, second))]
    if order == names:
        for a, b in zip(*rest, strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[key], b[key]) for key in a)
        assert all(map(torch.equal, flatten(one.state).values(), flatten(two.state).values()))
    else:
        assert_alike(*rest, draw)


def recorded(strategy: Strategy, draw: Drawn, folder: Any) -> Any:
    """The record of a run, through its file."""
    model = Model(draw, list(draw.shapes))
    clipper = made(model, strategy)
    clipper.recorder = Recorder()
    for step in range(STEPS):
        model.take(draw, step)
        clipper.step(draw.losses[step])
        clipper.recorder.note(1e-3, torch.tensor(draw.losses[step], dtype=torch.float64))
    numel = [int(np.prod(shape)) for shape in draw.shapes.values()]
    meta = {"place": "gradient", "names": list(draw.shapes), "numel": numel, "spec": describe(strategy)}
    write_part(folder / "gradclip", "gradient", clipper.recorder.drain(), meta)
    return read_record(folder)


@many
@given(draw=drawn(), name=st.sampled_from(list(REPLAYED)))
def test_a_replay_is_what_happened(draw: Drawn, name: str, tmp_path_factory: Any) -> None:
    """The scales, and which steps were left out; a record holds norms by parameter in float32."""
    strategy = ClipConfig.parse(describe(REPLAYED[name])).gradient
    assert strategy == REPLAYED[name]
    record = recorded(strategy, draw, tmp_path_factory.mktemp("run"))
    found = replay(record, strategy)
    known_TP = (record.finite_T & ~record.skipped_T)[:, None] & (record.norm_TP > 0)  # a scale of nothing is nothing
    np.testing.assert_allclose(found.scale_TP[known_TP], record.scale_TP[known_TP], rtol=1e-5)
    assert (found.skipped_T == (record.skipped_T & record.finite_T)).all()
    assert len(record) == STEPS
