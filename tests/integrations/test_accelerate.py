"""attach(): a plain Accelerate loop clipped by strategy, against the same loop clipped by torch."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

import hf_gradclip
from hf_gradclip.integrations.refusals import refuse_unsupported
from hf_gradclip.state import flatten
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.loops import batches
from tests.tiny import tiny_llama, weights_of

LIMIT = 0.5


@pytest.fixture(autouse=True)
def _fresh_state(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def make(seed: int = 0, lr: float = 0.3, **kwargs):
    model = tiny_llama(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return Accelerator(cpu=True, **kwargs), model, optimizer, scheduler


def loop(accelerator, model, optimizer, scheduler=None, n=30, clip=True, poison=(), limit=LIMIT):
    norms = []
    for batch, factor in batches(n, poison):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss * factor)
            if clip and accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), limit)))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("accumulation", "limit"), [(1, 0.5), (3, 0.35)])
def test_a_loop_trains_like_accelerates_own_clip(when, accumulation, limit) -> None:
    accelerator, model, optimizer, _ = make(gradient_accumulation_steps=accumulation)
    prepared = accelerator.prepare(model, optimizer)
    theirs = loop(accelerator, *prepared, limit=limit)

    accelerator, model, optimizer, _ = make(gradient_accumulation_steps=accumulation)
    if when == "before":
        attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={limit}")
    model, optimizer = accelerator.prepare(model, optimizer)
    if when == "after":
        attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={limit}")
    ours = loop(accelerator, model, optimizer, limit=limit)

    assert len(ours) == 30 // accumulation
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights_of(model), weights_of(prepared[0]), rtol=0, atol=1e-5)
    clipped = sum(norm > limit for norm in theirs)
    assert 0 < clipped < len(theirs)
    scalars = attachment.scalars()
    assert scalars["clip/rate"] == pytest.approx(clipped / len(theirs))
    assert attachment.scalars() == {}, "nothing since"


def test_clipping_is_engaged() -> None:
    accelerator, model, optimizer, _ = make(lr=0.5)
    before = weights_of(model)
    hf_gradclip.attach(accelerator, "global_norm:max_norm=1e-12")
    model, optimizer = accelerator.prepare(model, optimizer)
    loop(accelerator, model, optimizer, n=5)
    bound = 0.5e-12 * sum(sum(0.9**k for k in range(i + 1)) for i in range(5))
    assert (weights_of(model).double() - before.double()).abs().max() <= bound


def test_auto_clips_without_a_call_and_a_missing_call_is_an_error() -> None:
    results = []
    for auto in (False, True):
        accelerator, model, optimizer, _ = make()
        attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=auto)
        model, optimizer = accelerator.prepare(model, optimizer)
        loop(accelerator, model, optimizer, clip=not auto)
        results.append(weights_of(model))
        assert attachment.clipper.report.summary()["steps"] == 30
    assert torch.equal(*results)

    accelerator, model, optimizer, _ = make()
    hf_gradclip.attach(accelerator, "zclip")
    model, optimizer = accelerator.prepare(model, optimizer)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"attach\(accelerator, 'zclip'\).*without accelerator\.clip_grad_norm_"):
        loop(accelerator, model, optimizer, n=1, clip=False)
    assert torch.equal(weights_of(model), before)


def test_auto_reaches_an_optimizer_prepared_by_hand() -> None:
    accelerator, model, optimizer, _ = make()
    before = weights_of(model)
    hf_gradclip.attach(accelerator, "global_norm:max_norm=1e-12", auto=True)
    model, optimizer = accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer)
    loop(accelerator, model, optimizer, n=3, clip=False)
    assert (weights_of(model) - before).abs().max() <= 3e-12


def test_a_nan_batch_is_skipped_and_the_scheduler_waits() -> None:
    accelerator, model, optimizer, scheduler = make()
    attachment = hf_gradclip.attach(accelerator, "zclip:warmup_steps=5")
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loop(accelerator, model, optimizer, scheduler, n=20, poison=(7, 8))
    assert scheduler.scheduler.last_epoch == 18
    assert weights_of(model).isfinite().all()
    assert attachment.scalars()["clip/skipped"] == 2
    assert not accelerator.optimizer_step_was_skipped

    loop(accelerator, model, optimizer, scheduler, n=1, poison=(0,))
    assert accelerator.optimizer_step_was_skipped


def test_state_goes_with_the_checkpoint(tmp_path, caplog) -> None:
    spec = "zclip:warmup_steps=5,z_threshold=1"
    accelerator, model, optimizer, _ = make()
    attachment = hf_gradclip.attach(accelerator, spec)
    model, optimizer = accelerator.prepare(model, optimizer)
    loop(accelerator, model, optimizer, n=15)
    accelerator.save_state(str(tmp_path / "with"))
    norms = loop(accelerator, model, optimizer, n=15)
    state, weights = attachment.clipper.state, weights_of(model)
    assert 0 < attachment.clipper.report.summary()["clipped"] < 30

    _fresh()
    accelerator, model, optimizer, _ = make(seed=5)
    attachment = hf_gradclip.attach(accelerator, spec)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(tmp_path / "with"))
    assert loop(accelerator, model, optimizer, n=15) == norms
    assert torch.equal(weights_of(model), weights)
    mine, theirs = flatten(attachment.clipper.state), flatten(state)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert "starts anew" not in caplog.text


def _fresh() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_checkpoint_made_without_us_still_loads(tmp_path, caplog) -> None:
    accelerator, model, optimizer, _ = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    loop(accelerator, model, optimizer, n=3)
    accelerator.save_state(str(tmp_path))
    weights = weights_of(model)

    _fresh()
    accelerator, model, optimizer, _ = make(seed=5)
    hf_gradclip.attach(accelerator, "adagc")
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(weights_of(model), weights)
    assert "gradclip.pt is missing" in caplog.text


def test_two_models_have_two_states() -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, "zclip")
    models = [torch.nn.Linear(3, 1), torch.nn.Linear(4, 1)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    models[0], models[1], *optimizers = accelerator.prepare(*models, *optimizers)
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        for _ in range(i + 1):
            accelerator.backward(model(torch.ones(2, model.in_features)).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert [int(attachment.clipper_of(m).state.seen) for m in models] == [1, 2]
    with pytest.raises(ValueError, match="2 prepared models"):
        attachment.clipper  # noqa: B018


def test_two_optimizers_share_one_clip_call() -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, "zclip")
    model = torch.nn.Linear(3, 2)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    model, *optimizers = accelerator.prepare(model, *optimizers)
    for _ in range(3):
        accelerator.backward(model(torch.ones(2, 3)).sum())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert int(attachment.clipper.state.seen) == 3


def test_a_part_of_the_parameters_is_refused(caplog) -> None:
    accelerator, model, optimizer, _ = make()
    hf_gradclip.attach(accelerator, "adaptive")
    model, optimizer = accelerator.prepare(model, optimizer)
    batch, _ = next(iter(batches(1)))
    accelerator.backward(model(**batch).loss)
    with pytest.raises(
        ValueError, match=r"clip_grad_norm_\(2 trainable parameters\).*one prepared model, which have \[21\]"
    ):
        accelerator.clip_grad_norm_(list(model.parameters())[:2], 1.0)
    accelerator.clip_grad_norm_(model.parameters(), 0.25)
    assert "clip_grad_norm_(max_norm=0.25): the strategy decides" in caplog.text


def test_a_clip_call_before_anything_is_prepared_says_so() -> None:
    accelerator, model, *_ = make()
    hf_gradclip.attach(accelerator, "adaptive")
    with pytest.raises(
        ValueError, match=r"clip_grad_norm_\(21 trainable parameters\): no model was prepared yet\. Call"
    ):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)


def test_a_second_patch_is_refused() -> None:
    accelerator, *_ = make()
    hf_gradclip.attach(accelerator, "adaptive")
    with pytest.raises(UnsupportedBackendError, match="already replaced"):
        hf_gradclip.attach(accelerator, "adagc")


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        (DistributedType.MEGATRON_LM, "Set its clip_grad"),
        (DistributedType.XLA, "Use the backend's own clipping"),
    ],
)
def test_backends_are_refused_by_name(kind, instead) -> None:
    class Stub:
        __module__ = Accelerator.__module__
        distributed_type = kind
        parallelism_config = None

    with pytest.raises(UnsupportedBackendError, match=rf"{kind.value}.*{instead}"):
        refuse_unsupported(Stub())


@pytest.mark.parametrize("axis", ["cp_size", "sp_size", "pp_size"])
def test_parallel_axes_are_refused_by_name(axis) -> None:
    stub = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, parallelism_config=SimpleNamespace(**{axis: 2}))
    with pytest.raises(UnsupportedBackendError, match=rf"ParallelismConfig\({axis}=2\).*Use {axis}=1"):
        refuse_unsupported(stub)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_does_not_shard_as_it_was_asked_is_said(variable, monkeypatch, caplog) -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, "none")
    assert "nothing is sharded" not in caplog.text
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv(variable, "true")
    hf_gradclip.attach(accelerator, "none")
    assert f"{variable} is set, but this is one process: nothing is sharded." in caplog.text


def test_ranks_that_do_not_know_of_each_other_are_refused(monkeypatch) -> None:
    accelerator, *_ = make()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedBackendError, match=r"WORLD_SIZE=2.*2 separate runs.*ACCELERATE_USE_CPU=true"):
        hf_gradclip.attach(accelerator, "adaptive")
