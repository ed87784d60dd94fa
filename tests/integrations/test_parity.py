"""Features of the Trainer, each against the stock Trainer with the same limit, in runs where some steps clip."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from hf_gradclip import GradClipTrainer
from tests.integrations.loops import StopAt
from tests.tiny import counting_data, logged, tiny_llama, training_args, weights_of

OURS, STOCK, FREE = "ours", "stock", "free"
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""The setting's name, which is the second in transformers 5.3."""


def run(
    who: str,
    limit: float,
    folder: Path | None = None,
    cls: type[Trainer] | None = None,
    callbacks: Any = (),
    resume: Any = None,
    model: Any = None,
    **changes: Any,
) -> Trainer:
    """A run of ours, of the stock Trainer, or of that without a limit, with a data set to evaluate on."""
    cls = cls or (GradClipTrainer if who == OURS else Trainer)
    extra = {"clip": f"global_norm:max_norm={limit}"} if who == OURS else {}
    rows = changes.pop("rows", 512)
    settings = {"max_steps": 24, **changes, "max_grad_norm": 0 if who == FREE else 1.0 if who == OURS else limit}
    with tempfile.TemporaryDirectory() as own:
        trainer = cls(
            model=model or tiny_llama(),
            args=training_args(str(folder or own), **settings),
            train_dataset=counting_data(rows),
            eval_dataset=counting_data(n=16, seed=5),
            callbacks=list(callbacks),
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def insist_on_parity(ours: Trainer, stock: Trainer, free: Trainer, limit: float) -> None:
    """The same norms and weights; and the limit matters: some steps are above it, some below."""
    norms = torch.tensor(logged(stock))
    assert len(norms) > 5
    assert 0 < int((norms > limit).sum()) < len(norms)
    torch.testing.assert_close(torch.tensor(logged(ours)), norms, rtol=1e-5, atol=0)
    assert (weights_of(ours.model) - weights_of(stock.model)).abs().max() < 1e-5
    assert (weights_of(stock.model) - weights_of(free.model)).abs().max() > 1e-4


FEATURES: dict[str, dict[str, Any]] = {
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "activation checkpointing": {CHECKPOINTING: True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "an uneven last batch": {"rows": 50, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 4},
    "a last batch alone": {"rows": 68, "gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 4},
}


def median(free: Trainer) -> float:
    """A limit that half of the steps of a run without one are above."""
    return float(torch.tensor(logged(free)).median())


@pytest.mark.parametrize("feature", FEATURES)
def test_trains_like_the_stock_trainer(feature) -> None:
    torch.compiler.reset()
    settings = FEATURES[feature]
    free = run(FREE, 0.0, **settings)
    limit = median(free)
    ours, stock = run(OURS, limit, **settings), run(STOCK, limit, **settings)
    insist_on_parity(ours, stock, free, limit)
    plain = run(STOCK, limit, rows=settings.get("rows", 512))
    same = feature in ("torch_compile", "activation checkpointing")
    assert ((weights_of(plain.model) - weights_of(stock.model)).abs().max() < 1e-4) == same, "it does what it says"


def test_auto_find_batch_size() -> None:
    """A batch of eight and one of four are too large."""

    def small(cls: type[Trainer]) -> type[Trainer]:
        class Small(cls):
            def training_step(self, model, inputs, *args, **kwargs):
                if len(inputs["input_ids"]) > 2:
                    raise RuntimeError("CUDA out of memory. Tried to allocate a lot.")
                return super().training_step(model, inputs, *args, **kwargs)

        return Small

    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    free = run(FREE, 0.0, cls=small(Trainer), **settings)
    limit = median(free)
    ours, stock = (
        run(OURS, limit, cls=small(GradClipTrainer), **settings),
        run(STOCK, limit, cls=small(Trainer), **settings),
    )
    assert stock._train_batch_size == ours._train_batch_size == 2
    insist_on_parity(ours, stock, free, limit)


SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 8,
    "eval_steps": 8,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
}
"""The largest loss is called the best, so that the best model is not the last one."""


class TestCheckpoints:
    def test_load_best_model_at_end(self, tmp_path) -> None:
        free = run(FREE, 0.0, tmp_path / FREE, **SAVING)
        limit = median(free)
        ours, stock = (run(who, limit, tmp_path / who, **SAVING) for who in (OURS, STOCK))
        insist_on_parity(ours, stock, free, limit)
        assert ours.state.best_global_step == stock.state.best_global_step == 8

    def test_early_stopping(self, tmp_path) -> None:
        runs: dict[str, Trainer] = {}
        for who in (FREE, OURS, STOCK):
            limit = 0.0 if who == FREE else median(runs[FREE])
            stop = EarlyStoppingCallback(early_stopping_patience=1)
            runs[who] = run(who, limit, tmp_path / who, callbacks=[stop], **SAVING)
        insist_on_parity(runs[OURS], runs[STOCK], runs[FREE], limit)
        assert runs[OURS].state.global_step == runs[STOCK].state.global_step == 16

    @pytest.mark.parametrize("way", [(OURS, STOCK), (STOCK, OURS)], ids=["ours to stock", "stock to ours"])
    def test_a_resume_by_the_other(self, way, tmp_path) -> None:
        free = run(FREE, 0.0)
        limit = median(free)
        first, then = way
        run(first, limit, tmp_path, callbacks=[StopAt(9)])
        other = run(then, limit, tmp_path, resume=str(tmp_path / "checkpoint-9"), model=tiny_llama(seed=9))
        whole = run(STOCK, limit)
        insist_on_parity(other, whole, free, limit)
        assert (tmp_path / "checkpoint-9" / "gradclip.pt").exists() == (first == OURS)
