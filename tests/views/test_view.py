"""A view: where an optimizer finds a plan's numbers, what is refused, and what a rank adds to a sum.

Ranks are pretended: their collectives send nothing, so that what one rank adds can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_gradclip import Clipper, optim
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, NormStats
from hf_gradclip.views import UnsupportedBackendError, view_of
from hf_gradclip.views.ranks import Ranks

CPU = torch.device("cpu")


@pytest.fixture
def second_of_two() -> Iterator[None]:
    """This process is rank 1 of 2."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def spread(whole: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """The DTensor of a tensor that this rank has whole."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def filled(model: nn.Module) -> nn.Module:
    """The model with a gradient of different numbers everywhere."""
    for p in model.parameters():
        whole = torch.arange(1.0, p.numel() + 1).view(p.shape)
        p.grad = spread(whole, p.device_mesh, *p.placements) if isinstance(p, DTensor) else whole
    return model


class TestPlaces:
    def test_a_segment_for_each_parameter(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2))
        places = view_of(model).places()
        expected = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
        assert places == {id(p): (i, None) for i, p in enumerate(expected)}

    @pytest.mark.parametrize("axis", [0, 1])
    def test_the_units_of_each_parameter_that_is_cut(self, axis):
        """The numbers found at a parameter's places are those of its rows or columns."""
        model = filled(nn.ModuleDict({"a": nn.Linear(4, 3), "table": nn.Embedding(5, 2), "score": nn.Linear(3, 2)}))
        view = view_of(model)
        view.divide(Units(axis=axis))
        sums_S, places = view.measure(Needs()).sumsq_S, view.places()
        assert [first for first, _ in places.values()] == [0, (3, 4)[axis], (4, 5)[axis], (9, 10)[axis], (10, 11)[axis]]
        for name, p in model.named_parameters():
            first, units = places[id(p)]
            if name in ("a.bias", "score.weight", "score.bias"):
                assert units is None
                assert float(sums_S[first]) == pytest.approx(float(p.grad.square().sum()))
                continue
            kept = 0 if name == "table.weight" else axis
            assert units.kept == (kept,)
            assert units.segments.dtype == torch.int64
            assert int(units.segments[0]) == first
            np.testing.assert_allclose(sums_S[units.segments], p.grad.square().sum(1 - kept), rtol=1e-6)

    def test_one_unit_is_not_cut(self):
        layer = nn.Linear(4, 3)
        view = view_of(layer)
        view.divide(Units(vectors=True))
        assert view.places()[id(layer.bias)] == (3, None)

    def test_they_are_made_once_for_a_layout(self):
        model = nn.Sequential(nn.Embedding(5, 2))
        view = view_of(model)
        for units in (None, Units()):
            if units is not None:
                view.divide(units)
            known = view.places()
            assert view.layout is view.layout
            assert view.places() is known
        model[0].weight.data = torch.zeros(7, 2)
        assert len(view.layout) == 7
        assert view.places()[id(model[0].weight)][1].segments.tolist() == list(range(7))

    @pytest.mark.parametrize(
        ("axis", "shard", "expected"), [(0, 0, [3, 4]), (0, 1, [0, 1, 2, 3, 4]), (1, 0, [0, 1, 2]), (1, 1, [2])]
    )
    def test_the_units_of_a_shard(self, second_of_two, axis, shard, expected):
        """Of five rows and three columns the second of two ranks has the last two, or the last one."""
        mesh = init_device_mesh("cpu", (2,))
        weights = [nn.Parameter(spread(torch.zeros(5, 3), mesh, Shard(shard))) for _ in range(2)]
        view = view_of([("a.weight", weights[0]), ("b.weight", weights[1])])
        view.divide(Units(axis=axis))
        for i, weight in enumerate(weights):
            offset = i * (5, 3)[axis]
            first, units = view.places()[id(weight)]
            assert (first, units.kept) == (offset, (axis,))
            assert units.segments.tolist() == [offset + segment for segment in expected]


class TestRefused:
    """Where a rank would clip by a norm of its own."""

    @pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
    def test_parameters_of_fsdp1_without_their_model(self, second_of_two, original):
        model = FullyShardedDataParallel(nn.Sequential(nn.Linear(6, 4)), use_orig_params=original, device_id=CPU)
        message = r"(_flat_param|0\.weight) is a shard of FSDP1.*Use FSDP2.*FullyShardedDataParallel"
        with pytest.raises(UnsupportedBackendError, match=message):
            view_of(list(model.named_parameters()))
        with pytest.raises(UnsupportedBackendError, match=message):
            view_of(model.module)
        assert view_of(model).places().keys() == {id(p) for p in model.parameters()}

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: fully_shard(model),
            lambda model: parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()}),
        ],
        ids=["fully_shard", "parallelize_module"],
    )
    def test_parameters_that_were_sharded_later(self, second_of_two, change: Callable[[nn.Module], object]):
        model = nn.Sequential(nn.Linear(6, 4))
        clipper = Clipper.for_model(model, "global_norm")
        clipper.step()
        change(model)
        for _ in range(2):
            with pytest.raises(UnsupportedBackendError, match=r"0\.weight became a DTensor .*Make the clipper after"):
                clipper.step()
        Clipper.for_model(model, "global_norm").step()

    @pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
    def test_parameters_that_were_flattened_later(self, second_of_two, original):
        model = nn.Sequential(nn.Linear(6, 4))
        clipper = Clipper.for_model(model, "global_norm")
        FullyShardedDataParallel(model, use_orig_params=original, device_id=CPU)
        for _ in range(2):
            with pytest.raises(UnsupportedBackendError, match="is a shard of FSDP1"):
                clipper.step()

    @pytest.mark.parametrize("sharded", [False, True])
    @pytest.mark.parametrize(
        "make",
        [
            lambda model: Clipper.for_model(model, "global_norm"),
            lambda model: Clipper.for_model(model, "adaptive"),
            lambda model: optim.AdamW(model.named_parameters(), clip="adaptive_norm"),
        ],
        ids=["whole", "by unit", "an optimizer"],
    )
    def test_parameters_without_memory(self, second_of_two, make: Callable[[nn.Module], object], sharded):
        model = nn.Sequential(nn.Linear(6, 4, device="meta"), nn.Linear(4, 2, device="meta" if sharded else "cpu"))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(UnsupportedBackendError, match=r"0\.weight is on the meta device.* after to_empty\(\)"):
            make(model)
        make(model.to_empty(device="cpu"))

    def test_a_frozen_base_without_memory_is_none_of_ours(self):
        model = nn.Sequential(nn.Linear(6, 4, device="meta").requires_grad_(False), nn.Linear(4, 2))
        Clipper.for_model(model, "adaptive_norm").step()

    def test_units_of_fsdp1(self, second_of_two):
        view = view_of(FullyShardedDataParallel(nn.Linear(6, 4), device_id=CPU))
        with pytest.raises(UnsupportedBackendError, match=r"not known by unit\. Use FSDP2 or DDP"):
            view.divide(Units())


class TestRanks:
    def test_what_all_hold_is_added_by_the_first(self, second_of_two):
        """The second rank adds its shard, and nothing of a replica or a plain tensor."""
        mesh = init_device_mesh("cpu", (2,))
        layer = nn.Module()
        layer.plain = nn.Parameter(torch.zeros(3))
        layer.shard = nn.Parameter(spread(torch.zeros(4, 3), mesh, Shard(0)))
        layer.replica = nn.Parameter(spread(torch.zeros(4, 3), mesh, Replicate()))
        view = view_of(filled(layer))
        stats = view.measure(Needs(max_abs=True, weights=True))
        assert stats.sumsq_S.tolist() == [0, sum(i**2 for i in range(7, 13)), 0]
        assert stats.max_abs_S.tolist() == [3, 12, 12]
        assert stats.weight_sumsq_S.tolist() == [0, 0, 0]
        assert view.reductions(Needs()) == 1
        assert view.reductions(Needs(max_abs=True)) == 2

    def test_a_part_of_a_sum_is_added_up_first(self, second_of_two):
        mesh = init_device_mesh("cpu", (2,))
        weight = nn.Parameter(spread(torch.zeros(4, 3), mesh, Shard(0)))
        weight.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
        view_of([("weight", weight)]).measure(Needs())
        assert weight.grad.placements == (Shard(0),)

    def test_whole_parameters_that_fsdp2_shows_for_a_while_change_nothing(self, second_of_two):
        model = fully_shard(nn.Sequential(nn.Linear(6, 4)))
        view = view_of(model)
        known, shard = view.layout, model[0].weight
        model.unshard()
        assert not isinstance(model[0].weight, DTensor)
        assert view.layout is known
        model.reshard()
        assert model[0].weight is shard
        assert view.layout is known
        assert view.watched()[0] is shard

    def test_plain_parameters_beside_frozen_shards(self, second_of_two):
        mesh = init_device_mesh("cpu", (2,))
        frozen = nn.Parameter(spread(torch.zeros(4, 3), mesh, Shard(0)), requires_grad=False)
        trained = nn.Parameter(torch.zeros(3))
        assert float(view_of([("base", frozen), ("lora", trained)]).measure(Needs()).total) == 0

    def test_what_was_measured_is_left_as_it_is(self, second_of_two):
        view = view_of(filled(nn.Linear(2, 3)))
        local = view.measure(Needs(max_abs=True))
        before = [local.sumsq_S.clone(), local.max_abs_S.clone()]
        both = NormStats(local.sumsq_S, local.layout, local.max_abs_S, weight_sumsq_S=local.sumsq_S)
        reduced = Ranks(CPU).reduce(both, torch.tensor([True, False]))
        assert reduced.sumsq_S.tolist() == reduced.weight_sumsq_S.tolist() == [float(before[0][0]), 0]
        assert torch.equal(local.sumsq_S, before[0])
        assert torch.equal(local.max_abs_S, before[1])

    def test_the_replicas_of_plain_parameters(self, second_of_two):
        view = view_of(filled(nn.Linear(2, 3)))
        assert view.spread() is None, "nothing was measured"
        view.measure(Needs())
        assert float(view.spread()) == 0

    def test_one_process_has_none(self):
        view = view_of(filled(nn.Linear(2, 3)))
        view.measure(Needs())
        assert view.spread() is None
        assert view.reductions(Needs(max_abs=True)) == 0


class TestScale:
    def test_a_scaler_takes_its_scale_out_once(self):
        layer = filled(nn.Linear(2, 3))
        norm = float(torch.cat([p.grad.flatten() for p in layer.parameters()]).norm())
        calls: list[Tensor] = []

        def unscale() -> None:
            calls.append(torch._foreach_mul_([p.grad for p in layer.parameters()], 0.5))

        view = view_of(layer, unscale, guarded=True)
        assert view.guarded
        assert float(view.measure(Needs()).total) == pytest.approx(norm / 2)
        assert float(view.measure(Needs(), rescale=True).total) == pytest.approx(norm / 2)
        assert len(calls) == 1

    def test_weights_are_measured_without_units_too(self):
        layer = nn.Linear(2, 3)
        stats = view_of(layer).measure(Needs(weights=True))
        expected = [float(p.detach().square().sum()) for p in layer.parameters()]
        assert stats.weight_sumsq_S.tolist() == pytest.approx(expected)
        assert stats.sumsq_S.tolist() == [0, 0]

    def test_dropped_gradients_are_gone(self):
        view = view_of(layer := filled(nn.Linear(2, 3)))
        view.apply_(ClipPlan(torch.tensor(0.5)))
        assert layer.bias.grad.tolist() == [0.5, 1, 1.5]
        view.drop_()
        assert layer.weight.grad is layer.bias.grad is None
        assert not view.skipping
