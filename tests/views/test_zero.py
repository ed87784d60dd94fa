"""Pieces of a ZeRO optimizer: a made-up one of two parts, whose numbers are worked out by hand.

Real ones are in tests/integrations.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan
from hf_gradclip.views.partitions import KINDS
from hf_gradclip.views.view import View
from hf_gradclip.views.zero import of_updates, zero_view

SCALE = 8.0


@pytest.fixture
def made() -> Iterator[tuple[nn.Module, Any, View]]:
    """Rank 1 of 2 in stage 3: of 3 x 2 weights the last 3 in one part, of 3 biases the last in another, and padding."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    layer = nn.Linear(2, 3)
    for p in layer.parameters():
        p.ds_numel, p.ds_shape = p.numel(), p.shape
    weight, bias = layer.weight, layer.bias
    grads = [torch.tensor([1.0, 2.0, 3.0]) * SCALE, torch.tensor([4.0, 99.0]) * SCALE]
    zero = SimpleNamespace(
        fp16_groups=[[weight], [bias]],
        grad_position={0: [0, 0, 3], 1: [1, 0, 2]},
        get_param_id=lambda p: 0 if p is weight else 1,
        averaged_gradients={i: [grad] for i, grad in enumerate(grads)},
        fp32_partitioned_groups_flat=[SimpleNamespace(grad=grad, data=grad / SCALE) for grad in grads],
        sub_group_to_group_id={0: 0, 1: 0},
        offload_optimizer=False,
        dp_process_group=dist.group.WORLD,
        loss_scale=SCALE,
    )
    kind = KINDS["DeepSpeedZeroOptimizer_Stage3"]
    yield layer, zero, zero_view(layer, zero, kind, torch.device("cpu"), guarded=True)
    dist.destroy_process_group()


def test_the_loss_scale_is_taken_out_of_gradients_alone(made):
    _, zero, view = made
    stats = view.measure(Needs(max_abs=True, weights=True))
    assert stats.layout is view.layout
    assert stats.layout.numel_S.tolist() == [6, 3]
    assert stats.sumsq_S.tolist() == stats.weight_sumsq_S.tolist() == [14, 16]
    assert stats.max_abs_S.tolist() == [3, 4]
    assert view.measure(Needs(), rescale=True).sumsq_S.tolist() == pytest.approx([14, 16])
    assert view.loss_scale == SCALE
    zero.loss_scale = SCALE / 2
    assert view.measure(Needs()).sumsq_S.tolist() == [4 * 14, 4 * 16]
    assert view.guarded
    assert (view.reductions(Needs()), view.reductions(Needs(max_abs=True))) == (1, 2)


def test_units_that_are_here_only_in_part(made):
    """The last 3 of 3 x 2 weights are one of the second row, and the third row."""
    _, zero, view = made
    view.divide(Units())
    assert view.measure(Needs(max_abs=True)).sumsq_S.tolist() == [0, 1, 4 + 9, 16]
    view.apply_(ClipPlan(torch.tensor([9.0, 0.5, 0.25, 1.0])), part=0)
    assert zero.fp32_partitioned_groups_flat[0].grad.tolist() == [SCALE * x for x in (0.5, 0.5, 0.75)]


def test_a_plan_is_applied_part_by_part(made):
    _, zero, view = made
    first, second = (flat.grad for flat in zero.fp32_partitioned_groups_flat)
    view.apply_(ClipPlan(torch.tensor([0.5, 0.25])), part=1)
    assert first.tolist() == [8, 16, 24]
    assert second.tolist() == [8, 99 * SCALE], "the padding is left alone"
    view.apply_(ClipPlan(torch.tensor(0.5), bound_S=torch.tensor([8.0, 9.0])))
    assert first.tolist() == [4, 8, 8]
    assert second.tolist() == [4, 99 * SCALE]


def test_a_skip_is_left_to_whoever_steps(made):
    _, zero, view = made
    view.drop_()
    assert view.skipping
    assert zero.averaged_gradients[0][0] is not None
    assert not view.watched()
    assert not view.places()


def test_updates_are_measured_where_they_were_put(made):
    _, _, view = made
    seen, moved = of_updates(view)
    assert moved.gradients.weights(1).tolist() == [4, 99]
    assert seen.measure(Needs()).sumsq_S.tolist() == [0, 0]
    moved.memory[1] = torch.tensor([5.0, 77.0])
    assert seen.measure(Needs()).sumsq_S.tolist() == [0, 25], "no loss scale is in them"
    seen.apply_(ClipPlan(torch.tensor(0.2)))
    assert moved.memory[1].tolist() == pytest.approx([1, 77])
    assert not seen.guarded


def test_what_an_optimizer_lacks_is_named(made):
    _, zero, _ = made
    assert {name: kind.of for name, kind in KINDS.items()} == {name: name for name in KINDS}
    missing = KINDS["DeepSpeedZeroOptimizer_Stage3"].missing(zero)
    assert missing == ["_get_norm_groups", "unscale_and_clip_grads", "_optimizer_step", "step", "clip_grad"]
