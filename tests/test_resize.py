"""A table of embeddings that grows and shrinks in mid-run: the Parameter stays, its memory is another one.

`resize_token_embeddings` replaces `.data`. What was counted of the old memory (rows, elements, addresses) must be
counted anew, for every strategy: a kernel that goes by the old count reads or writes what is not the table's.
"""

from __future__ import annotations

import logging
import re
import tempfile

import pytest
import torch
from torch import Tensor, nn
from transformers import PrinterCallback

from hf_gradclip import Clipper, GradClipTrainer
from hf_gradclip.spec import preset_names, strategy_names
from tests.kernels.languages import NAMES, serving
from tests.tiny import VOCAB, counting_data, tiny_llama, training_args

SPECS = {  # limits that the norms are above, so that the test fails where nothing clips
    "global_norm": "global_norm:max_norm=0.05",
    "zclip": "zclip:max_norm=0.05",
    "adagc": "adagc:max_norm=0.05",
    "block_rms": "block_rms:max_rms=1e-5",
    "value": "value:max_value=0.01",
    "param_norm": "param_norm:max_norm=0.05",
    "relative_value": "relative_value:factor=5",
    "skip_step": "skip_step:window=8,min_values=4",
    "agc": "agc:clip_factor=0.02,include_head=true",
    "agc of the head too": "agc:clip_factor=0.02,include_1d=true,include_head=true+value:max_value=0.01",
}
WORDS = sorted({*strategy_names(), *preset_names(), *SPECS})
BY_INTERPRETER = ("adaptive", "adagc", "agc of the head too", "block_rms", "value", "zclip")
"""In a plain run, one for each way in which a plan is applied: Triton's interpreter takes seconds for each word."""
SIZES = (VOCAB, VOCAB + 43, VOCAB + 40_000, VOCAB - 20, VOCAB)


def norm_of(model: nn.Module) -> float:
    grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return float(torch.cat(grads).norm())


def batch(step: int) -> dict[str, Tensor]:
    return {key: rows[None] % (VOCAB - 20) for key, rows in counting_data(8)[step].items()}


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    model(**batch(step)).loss.backward()


@pytest.mark.parametrize(
    ("word", "name"),
    [
        pytest.param(word, name, marks=[pytest.mark.slow] * (name == "Triton" and word not in BY_INTERPRETER))
        for word in WORDS
        for name in NAMES
    ],
)
def test_a_clipper(word: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The norm is torch's at every size, it is brought down, and the statistics start anew with words."""
    sizes, model = SIZES, tiny_llama()
    if name == "Triton":  # the interpreter is slow
        sizes = (VOCAB, VOCAB + 43, VOCAB - 20)
        del model.model.layers[1]
        model.config.num_hidden_layers = 1
    with serving(name):
        clipper = Clipper.for_model(model, SPECS.get(word, word))
        for i, size in enumerate(sizes):
            model.resize_token_embeddings(size)
            for step in range(2):
                backward(model, step)
                wanted = norm_of(model)
                assert clipper.step().item() == pytest.approx(wanted, rel=1e-6)
                post = clipper.report.scalars().get("clip/norm_post")  # not known where elements are bounded
                if post is None:
                    assert {"value", "relative_value", "ada_clip"} & {*re.split(r"[:+]", SPECS.get(word, word))}
                else:
                    assert post == pytest.approx(norm_of(model), rel=1e-5)
            assert caplog.text.count("resized): the statistics of ") == i
        assert clipper.report.summary()["steps"] == 2 * len(sizes)


@pytest.mark.parametrize("word", WORDS)
def test_a_trainer(word: str, caplog: pytest.LogCaptureFixture) -> None:
    """Train, resize, train again: an own optimizer without moments goes on."""
    seen: list[tuple[float, float]] = []

    class Watched(GradClipTrainer):
        def _clip_grad_norm(self, model: nn.Module) -> Tensor:
            wanted = norm_of(model)
            norm = super()._clip_grad_norm(model)
            seen.append((float(norm), wanted))
            return norm

    caplog.set_level(logging.WARNING, logger="hf_gradclip")
    model = tiny_llama()
    with tempfile.TemporaryDirectory() as folder:
        args = training_args(folder, max_steps=3, optim="sgd")
        trainer = Watched(model=model, args=args, train_dataset=counting_data(32), clip=SPECS.get(word, word))
        trainer.remove_callback(PrinterCallback)
        for size in (VOCAB, VOCAB + 300, VOCAB):
            model.resize_token_embeddings(size)
            trainer.train()
    assert len(seen) == 9
    for norm, wanted in seen:
        assert norm == pytest.approx(wanted, rel=1e-6)


def test_updates_of_any_optimizer() -> None:
    """What is kept of the weights before a step is of their new size, so the update is theirs and limited."""
    from accelerate import Accelerator

    from hf_gradclip import attach

    model = nn.Linear(3, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = Accelerator(cpu=True)
    attach(accelerator, {"gradient": "none", "update": "global_norm:max_norm=0.5"}, auto=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    for rows in (10, 6, 1, 12):
        model.weight.data = torch.zeros(rows, 3)
        model.zero_grad()
        accelerator.backward(model(torch.ones(2, 3)).sum() * 100)
        optimizer.step()
        assert model.weight.norm().item() == pytest.approx(0.5, rel=1e-5)
