"""Objects live as long as without us: a model goes with its last reference, a Trainer can be pickled before a run."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import PrinterCallback, Trainer, set_seed

import hf_gradclip
from hf_gradclip import Clipper, GradClipTrainer, optim
from tests.integrations.loops import batches
from tests.tiny import counting_data, tiny_llama, train, training_args, weights_of

CLIPS = {
    "zclip": "zclip:warmup_steps=2",
    "by tensor": "adagc:warmup_steps=2",
    "update": {"gradient": "zclip:warmup_steps=2", "update": "block_rms:max_rms=0.5"},
    "recorded": {"gradient": "zclip:warmup_steps=2", "record": True},
    "loss": "skip_step:window=16,min_values=8,on=loss",
    "none": None,
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only counted references keep anything alive."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def trained(cls: type[Trainer], **settings: Any) -> list[weakref.ref[Any]]:
    run = train(cls, max_steps=4, **settings)
    optimizer = run.optimizer.optimizer
    return [weakref.ref(run), weakref.ref(run.model), weakref.ref(optimizer), weakref.ref(run.accelerator)]


def looped(spec: Any, auto: bool = False) -> list[weakref.ref[Any]]:
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.ConstantLR(optimizer))
    attachment = hf_gradclip.attach(accelerator, spec, auto=auto)
    for batch, _ in batches(4):
        accelerator.backward(model(**batch).loss)
        if not auto:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert attachment.clipper.report.summary()["steps"] == 4
    return [weakref.ref(o) for o in (accelerator, model, optimizer, optimizer.optimizer, attachment)]


def bare(make: Callable[[Any], Any], **settings: Any) -> list[weakref.ref[Any]]:
    model = tiny_llama()
    optimizer = make(model.parameters())
    clipper = Clipper.for_model(model, **settings, optimizer=optimizer)
    for batch, _ in batches(4):
        model(**batch).loss.backward()
        clipper.step()
        optimizer.step()
        optimizer.zero_grad()
    return [weakref.ref(o) for o in (model, optimizer, clipper)]


RUNS: dict[str, Callable[[], list[weakref.ref[Any]]]] = {
    "the stock Trainer": lambda: trained(Trainer),
    **{f"Trainer {word}": lambda spec=spec: trained(GradClipTrainer, clip=spec) for word, spec in CLIPS.items()},
    "Trainer fused": lambda: trained(
        GradClipTrainer, clip={"gradient": "zclip", "fold": True}, optim="adamw_torch_fused"
    ),
    "loop": lambda: looped("zclip:warmup_steps=2"),
    "loop auto": lambda: looped("zclip:warmup_steps=2", auto=True),
    "loop update": lambda: looped({"gradient": "none", "update": "block_rms:max_rms=0.5"}),
    "clipper": lambda: bare(torch.optim.AdamW, spec="zclip"),
    "clipper fold": lambda: bare(
        lambda ps: torch.optim.AdamW(ps, fused=True), spec={"gradient": "zclip", "fold": True}
    ),
    "our optimizer": lambda: bare(lambda ps: optim.AdamW(ps, clip="zclip"), spec="none"),
}


@pytest.mark.parametrize("word", RUNS)
def test_what_nobody_refers_to_is_freed_at_once(no_collector, word) -> None:
    """On a GPU the memory of the model and of its moments would wait for the garbage collector otherwise."""
    left = [ref() for ref in RUNS[word]()]
    assert [type(o).__name__ for o in left if o is not None] == []


def test_a_step_after_the_accelerator_is_gone_says_so(no_collector) -> None:
    attachment = hf_gradclip.attach(Accelerator(cpu=True), "zclip")
    with pytest.raises(ReferenceError, match="the Accelerator of this attachment is gone: keep it"):
        attachment.watch_optimizers()


PICKLE = "import sys; from tests.integrations.test_lifetime import pickle_trainer; pickle_trainer(sys.argv[1])"
SPEC = {"gradient": "zclip:warmup_steps=4,z_threshold=1", "update": "block_rms:max_rms=0.9", "record": True}


def pickle_trainer(folder: str) -> None:
    args = training_args(folder, max_steps=12)
    run = GradClipTrainer(model=tiny_llama(), args=args, train_dataset=counting_data(), clip=SPEC)
    run.remove_callback(PrinterCallback)
    Path(folder, "trainer.pickle").write_bytes(pickle.dumps(run))


def test_a_trainer_that_was_pickled_clips_as_the_one_that_was_not(tmp_path) -> None:
    """A search by Ray sends the Trainer to its workers.

    In a process of its own, since Accelerate's state holds on to dataloaders of earlier runs, which no pickle takes.
    """
    (tmp_path / "sent").mkdir()
    subprocess.run([sys.executable, "-c", PICKLE, str(tmp_path / "sent")], check=True)
    run = pickle.loads((tmp_path / "sent" / "trainer.pickle").read_bytes())
    run.create_accelerator_and_postprocess()  # as a search does, and in a new Trainer a seed is set
    set_seed(run.args.seed)
    run.train()
    whole = train(GradClipTrainer, clip=SPEC, max_steps=12, output_dir=str(tmp_path / "kept"))
    assert torch.equal(weights_of(run.model), weights_of(whole.model))
    assert run.clipper.report.summary() == whole.clipper.report.summary()
    assert run.update_clipper.report.summary()["steps"] == 12
    free = train(Trainer, max_steps=12)
    assert not torch.equal(weights_of(run.model), weights_of(free.model))
    files = [sorted(f.name for f in (tmp_path / word / "gradclip").iterdir()) for word in ("sent", "kept")]
    assert files[0] == files[1]


def test_a_search_makes_a_new_clipper_per_trial_and_leaves_none(caplog, tmp_path) -> None:
    """What transformers' searches do: a new model and accelerator per trial, no model at the end."""
    run = GradClipTrainer(
        model_init=lambda: tiny_llama(),
        args=training_args(str(tmp_path), max_steps=12),
        train_dataset=counting_data(),
        clip="zclip:warmup_steps=4",
    )
    found = []
    for _ in range(2):
        run.create_accelerator_and_postprocess()
        assert run.clipper is None
        run.train()
        found.append((weights_of(run.model), run.clipper.report.summary()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert "starts anew" not in caplog.text
    run.model = run.model_wrapped = None
    assert run.clipper is None
