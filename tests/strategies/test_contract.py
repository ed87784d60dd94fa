"""What every strategy of the folder keeps, tested the moment its file is saved.

The table is the folder itself. A field without a default gets 1.0; a new strategy needs no line here.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import MISSING, dataclass, fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_gradclip import ClipConfig, Clipper, Strategy
from hf_gradclip.spec import preset_names, strategy_class, strategy_names
from hf_gradclip.state import flatten
from hf_gradclip.strategy import Chain, Needs, SpecError, Stateless, describe
from hf_gradclip.types import ClipPlan, Layout, NormStats
from tests.strategies.sequence import SHAPES, Tiny, gradients, set_gradients

NAMES = strategy_names()
CPU = torch.device("cpu")
LOSS = torch.tensor(2.0)


def build(name: str, **values: object) -> Strategy:
    """The strategy with 1.0 for the fields that have no default."""
    cls = strategy_class(name)
    required = {f.name: 1.0 for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    return cls(**required | values)


def has(name: str, field: str) -> bool:
    return field in {f.name for f in fields(strategy_class(name))}


def short(name: str) -> Strategy:
    """The strategy with a warm-up of 3 steps, where it has one."""
    return build(name, warmup_steps=3) if has(name, "warmup_steps") else build(name)


VARIANTS = (
    {name: build(name) for name in NAMES}
    | {f"{name} after 3 steps": short(name) for name in NAMES if has(name, "warmup_steps")}
    | {f"{name} on the loss": build(name, on="both") for name in NAMES if has(name, "on")}
    | {f"preset {name}": ClipConfig.parse(name).gradient for name in preset_names()}
)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def strategy(request):
    return request.param


def stats_of(norms: list[float]) -> NormStats:
    """Segments of 4 elements with these 2-norms; the largest element is half the norm, the loss is the first norm.

    Each is a unit whose weights have a norm of 10.
    """
    norm_S = torch.tensor(norms, dtype=torch.float64)
    layout = Layout.of_parameters(tuple(f"p{i}" for i in range(len(norms))), [4] * len(norms), CPU)
    layout = dataclasses.replace(layout, unit_S=torch.ones(len(norms), dtype=torch.bool))
    return NormStats(norm_S.square(), layout, norm_S / 2, norm_S[0], torch.full_like(norm_S, 100.0))


def norms_of(step: int, segments: int) -> list[float]:
    """Around 1, another one for each step and segment, every 7th step 5 times as high."""
    return [(1 + 0.2 * math.sin(3 * step + 5 * i)) * (5 if step % 7 == 6 else 1) for i in range(segments)]


def after(strategy: Strategy, steps: int, segments: int) -> object:
    """The state after some steps."""
    state = strategy.init(stats_of([1.0] * segments).layout)
    for step in range(steps):
        _, state = strategy.update(stats_of(norms_of(step, segments)), state)
    return state


def copied(state: object) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in flatten(state).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, dtype and shape too."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def plan_tensors(plan: ClipPlan) -> dict[str, Tensor]:
    parts = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {key: value for key, value in parts.items() if isinstance(value, Tensor)}


class TestClass:
    def test_the_folder_is_not_empty(self):
        assert {"none", "global_norm", "value", "param_norm", "zclip", "adagc", "autoclip"} <= set(NAMES)
        assert {"adaptive_norm", "adaptive_tensors", "agc", "skip_step"} <= set(NAMES)

    def test_one_final_frozen_dataclass_per_file(self, name):
        cls = strategy_class(name)
        module = vars(__import__(cls.__module__, fromlist=["_"]))
        here = [
            v
            for v in module.values()
            if isinstance(v, type) and issubclass(v, Strategy) and v.__module__ == cls.__module__
        ]
        assert here == [cls]
        assert cls.__bases__ == (Strategy,), "a strategy subclasses Strategy and nothing else"
        assert cls.__subclasses__() == []
        assert is_dataclass(cls)
        assert cls.__dataclass_params__.frozen
        assert not cls.__abstractmethods__

    def test_its_fields_cannot_be_set(self, name):
        strategy = build(name)
        for field in fields(strategy):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(strategy, field.name, getattr(strategy, field.name))

    def test_the_docstring_explains_every_field(self, name):
        text = strategy_class(name).__doc__
        assert text
        assert not text.startswith(strategy_class(name).__name__ + "("), (
            "dataclass made this docstring, nobody wrote it"
        )
        for field in fields(strategy_class(name)):
            _, _, arguments = text.partition("Args:")
            assert f"\n        {field.name}: " in arguments

    def test_it_says_what_must_be_measured(self, strategy):
        assert isinstance(strategy.needs, Needs)
        assert isinstance(strategy.bounds, bool)


class TestSpec:
    def test_describe_parses_back(self, strategy):
        assert ClipConfig.parse(describe(strategy)).gradient == strategy

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_describe_parses_back_with_any_numbers(self, data):
        name = data.draw(st.sampled_from(NAMES))
        kinds = {float: st.floats(), int: st.integers(), str: st.text(max_size=8), bool: st.booleans()}
        kinds[type(None)] = st.none() | st.integers(-1, 2)
        values = {
            field.name: data.draw(kinds[type(getattr(build(name), field.name))])
            for field in fields(strategy_class(name))
            if data.draw(st.booleans())
        }
        try:
            strategy = build(name, **values)
        except SpecError:
            return
        assert ClipConfig.parse(describe(strategy)).gradient == strategy


class TestState:
    def test_a_named_tuple_of_tensors_on_the_layouts_device(self, strategy):
        layout = stats_of([1.0, 2.0, 3.0]).layout
        self.check(strategy.init(layout), isinstance(strategy, Chain))
        for tensor in flatten(strategy.init(layout)).values():
            assert tensor.device == layout.device

    def check(self, state: object, chain: bool) -> None:
        """Named tuples of tensors and of such named tuples; of a chain a tuple of the parts' states."""
        assert isinstance(state, tuple)
        assert hasattr(state, "_fields") != chain
        for value in state:
            if not isinstance(value, Tensor):
                self.check(value, False)

    def test_on_another_device(self, strategy):
        layout = Layout.of_parameters(("a", "b"), [3, 4], torch.device("meta"))
        assert all(tensor.device.type == "meta" for tensor in flatten(strategy.init(layout)).values())

    def test_only_fields_ending_in_s_depend_on_the_segments(self, strategy):
        three, seven = (flatten(strategy.init(stats_of([1.0] * n).layout)) for n in (3, 7))
        assert three.keys() == seven.keys()
        for field, a in three.items():
            b = seven[field]
            if field.endswith("_S"):
                assert (a.shape[0], b.shape[0]) == (3, 7), field
                assert a.shape[1:] == b.shape[1:], field
            else:
                assert a.shape == b.shape, field

    def test_update_keeps_type_shapes_and_dtypes(self, strategy):
        first, last = after(strategy, 0, 5), after(strategy, 20, 5)
        assert self.types(first) == self.types(last)
        last = flatten(last)
        for field, a in flatten(first).items():
            b = last[field]
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), field

    def types(self, state: object) -> object:
        return type(state), None if isinstance(state, Tensor) else [self.types(value) for value in state]


class TestUpdate:
    @pytest.mark.parametrize("steps", [0, 2, 40])
    def test_pure(self, strategy, steps):
        state, stats = after(strategy, steps, 4), stats_of(norms_of(6, 4))
        state_before, sumsq, largest = copied(state), stats.sumsq_S.clone(), stats.max_abs_S.clone()
        plan, new = strategy.update(stats, state)
        kept, plan_kept = copied(new), {key: value.clone() for key, value in plan_tensors(plan).items()}
        again, new_again = strategy.update(stats, state)
        assert same(copied(state), state_before)
        assert torch.equal(stats.sumsq_S, sumsq)
        assert torch.equal(stats.max_abs_S, largest)
        assert same(flatten(new_again), kept)
        assert same(plan_tensors(again), plan_kept)
        assert same(flatten(new), kept)

    @pytest.mark.parametrize("segments", [1, 300])
    def test_shapes_of_the_plan(self, strategy, segments):
        plan, _ = strategy.update(stats_of(norms_of(6, segments)), after(strategy, 30, segments))
        assert plan.scale_S.shape in ((), (segments,))
        assert plan.bound_S is None or plan.bound_S.shape == (segments,)
        assert plan.threshold is None or plan.threshold.shape == ()
        assert plan.skip is None or (plan.skip.shape, plan.skip.dtype) == ((), torch.bool)
        assert (plan.bound_S is not None) == strategy.bounds

    @pytest.mark.parametrize("segments", [1, 4, 300])
    @pytest.mark.parametrize("warm", [True, False])
    def test_scale_is_above_0_and_at_most_1_but_for_what_makes_larger(self, name, segments, warm):
        """With usual, tiny, huge and zero norms, of all segments and of one."""
        strategy = build(name) if warm else short(name)
        state = after(strategy, 0 if warm else 30, segments)
        odd = [[v] * segments for v in (0.0, 1e-12, 1.0, 1e30)]
        odd += [[v, *[1.0] * (segments - 1)] for v in (0.0, 1e-12, 1e30)]
        for norms in [*odd, *odd]:
            plan, state = strategy.update(stats_of(norms), state)
            assert plan.scale_S.isfinite().all(), norms
            assert (plan.scale_S > 0).all(), norms
            assert (plan.scale_S <= getattr(strategy, "max_scale", 1)).all(), norms
            assert plan.bound_S is None or (plan.bound_S > 0).all(), norms
            assert not any(tensor.isnan().any() for tensor in flatten(state).values()), norms

    def test_a_norm_far_below_all_others_is_left_alone(self, name):
        for strategy in (build(name), short(name)):
            plan, _ = strategy.update(stats_of([1e-3] * 4), after(strategy, 60, 4))
            if name == "soft":  # scales every step by design, a small norm hardly
                assert (plan.scale_S > 0.99).all()
                continue
            if name == "normalize":  # makes it larger by design, as far as may be
                assert (plan.scale_S == strategy.max_scale).all()
                continue
            assert not plan.clipped_S.any(), strategy
            assert (plan.scale_S == 1).all(), strategy

    @pytest.mark.parametrize("name", [name for name in NAMES if has(name, "max_norm")])
    def test_a_limit_of_inf_leaves_the_first_step_alone(self, name):
        strategy = build(name, max_norm=math.inf)
        for norm in (0.0, 1e-12, 1.0, 1e30):
            plan, _ = strategy.update(stats_of([norm] * 4), strategy.init(stats_of([1.0] * 4).layout))
            assert (plan.scale_S == 1).all(), norm

    def test_a_spike_is_clipped(self, name):
        """Not by `none`, nor by what compares elements with their own tensor; by every other one, whether it looks at
        the total or at the tensor, or the step is skipped.
        """
        plan, _ = short(name).update(stats_of([1e4, 1.0, 1.0]), after(short(name), 80, 3))
        assert bool(plan.clipped_S.expand(3)[0]) == (name not in ("none", "skip_step", "relative_value"))
        assert (plan.skip is not None and bool(plan.skip)) == (name == "skip_step")
        assert strategy_class(name).skips == (name == "skip_step")


class TestCheckpoint:
    @pytest.mark.parametrize("order", [list(SHAPES), list(reversed(SHAPES))], ids=["same order", "another order"])
    def test_bit_for_bit(self, strategy, order):
        """Through a file read with weights_only=True, also into a model that lists its parameters in another order."""
        run = gradients(steps=60)
        first = Tiny()
        saved_from = Clipper.for_model(first, strategy)
        for grads in run[:50]:
            set_gradients(first, grads)
            saved_from.step(LOSS)
        file = io.BytesIO()
        torch.save(saved_from.state_dict(), file)
        file.seek(0)

        model = Tiny({key: SHAPES[key] for key in order})
        taken = Clipper.for_model(model, strategy)
        assert taken.load_state_dict(torch.load(file, weights_only=True)) == ""
        a, b = flatten(saved_from.state), flatten(taken.state)
        assert a.keys() == b.keys()
        place = [order.index(key) for key in SHAPES]
        for key in a:
            there = b[key][place] if key.endswith("_S") else b[key]
            assert a[key].dtype == there.dtype
            assert torch.equal(a[key], there), key
        for grads in run[50:]:
            set_gradients(first, grads)
            set_gradients(model, grads)
            saved_from.step(LOSS)
            taken.step(LOSS)
            for key, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, first.get_parameter(key).grad, rtol=1e-6, atol=0)

    def test_the_file_does_not_change_when_training_goes_on(self, strategy):
        model = Tiny()
        clipper = Clipper.for_model(model, strategy)
        run = gradients(steps=60)
        for grads in run[:50]:
            set_gradients(model, grads)
            clipper.step(LOSS)
        saved = clipper.state_dict()["state"]
        before = {key: value.clone() for key, value in saved.items()}
        for grads in run[50:]:
            set_gradients(model, grads)
            clipper.step(LOSS)
        assert same(saved, before)


class HostReads(TorchDispatchMode):
    """Lists every operation that brings a number from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.device.type != "cpu" for t in inputs)
        read = func is torch.ops.aten._local_scalar_dense.default and on_device
        if read:
            self.reads.append(str(func))
        result = func(*args, **kwargs or {})
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if on_device and any(t.device.type == "cpu" for t in outputs):
            self.reads.append(str(func))
        return result


def decide_on_a_device(spec: object) -> list[str]:
    """Host reads of `decide` on a fake accelerator: no memory, so that a read cannot be answered, and raises.

    Without a driver, or in a torch that is not built for CUDA, a fake CUDA tensor cannot be indexed; the lazy device
    stands in for it there.
    """
    device = "cuda" if torch.cuda.is_available() else "lazy"
    with FakeTensorMode():
        model = nn.Module()
        model.register_parameter("weight", nn.Parameter(torch.empty(70, 80, device=device)))
        model.register_parameter("short", nn.Parameter(torch.empty(7, device=device, dtype=torch.bfloat16)))
        model.register_parameter("unused", nn.Parameter(torch.empty(3, device=device)))
        clipper = Clipper.for_model(model, spec)
        assert clipper.view.layout.device.type == device
        with HostReads() as mode:
            for _ in range(2):
                for parameter in (model.weight, model.short):
                    parameter.grad = torch.empty_like(parameter)
                decision = clipper.decide(loss=torch.empty((), device=device))
        assert decision.action.device.type == device
        assert all(tensor.device.type == device for tensor in flatten(clipper.state).values())
        return mode.reads


class TestNoHostRead:
    """Where nobody reads anyway: everything is judged where it was measured."""

    @pytest.fixture(autouse=True)
    def _judged_there(self, monkeypatch):
        monkeypatch.setattr("hf_gradclip.clipper.seen_by", lambda strategy, layout, read: layout)

    def test_decide_reads_nothing(self, strategy):
        assert decide_on_a_device(strategy) == []

    @pytest.mark.parametrize(
        ("how", "error"),
        [
            ("item", DataDependentOutputException),
            ("bool", DataDependentOutputException),
            ("tolist", DataDependentOutputException),
            ("index", DynamicOutputShapeException),
        ],
    )
    def test_the_ban_works_on_a_read(self, how, error):
        with pytest.raises(error):
            decide_on_a_device(Reading(how))

    @pytest.mark.parametrize("how", ["cpu", "copy"])
    def test_the_ban_works_on_a_copy_to_the_host(self, how):
        assert decide_on_a_device(Reading(how)) != []


@dataclass(frozen=True)
class Reading(Strategy):
    """Reads to the host, which no strategy may."""

    how: str

    needs = Needs()

    def init(self, layout: Layout) -> Stateless:
        return Stateless()

    def update(self, stats: NormStats, state: Stateless) -> tuple[ClipPlan, Stateless]:
        reads = {
            "item": lambda: stats.total.item(),
            "bool": lambda: bool(stats.total > 1),
            "tolist": lambda: stats.norm_S.tolist(),
            "index": lambda: stats.norm_S[stats.norm_S > 1],
            "cpu": lambda: stats.total.cpu(),
            "copy": lambda: torch.empty((), dtype=torch.float64).copy_(stats.total),
        }
        reads[self.how]()
        return ClipPlan(stats.sumsq_S.new_ones(())), state
