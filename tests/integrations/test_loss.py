"""skip_step on the loss, through the Trainer and a plain loop: the loss of all micro-batches and ranks."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

import hf_gradclip
from hf_gradclip import GradClipTrainer
from hf_gradclip.record.files import read_record
from tests.integrations.loops import batches
from tests.tiny import logged, tiny_llama, train, weights_of

SPEC = "skip_step:window=16,min_values=8,on=loss"


class Offset(GradClipTrainer):
    """At one step the loss is larger by a constant, so the gradient shows nothing."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + 9.0 if self.state.global_step == 14 else loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_whose_loss_stands_out_is_skipped(accumulation) -> None:
    settings = {"max_steps": 20, "gradient_accumulation_steps": accumulation}
    run = train(Offset, clip=SPEC, **settings)
    assert [step for step, skipped in enumerate(logged(run, "clip/skipped")) if skipped] == [14]
    assert run.lr_scheduler.last_epoch == 19
    blind = train(Offset, clip=SPEC.replace("loss", "norm"), **settings)
    assert sum(logged(blind, "clip/skipped")) == 0, "the norm says nothing"

    seen = run.clipper.state.losses[: int(run.clipper.state.losses_seen)]
    theirs = torch.tensor(logged(run, "loss"), dtype=torch.float64)
    mine = torch.cat([seen[4:], seen[:4]]) if len(theirs) > 16 else seen
    applied = torch.arange(4, 20) != 14  # the skipped one counts as the limit that it broke
    torch.testing.assert_close(mine[-16:][applied], theirs[-16:][applied], rtol=0, atol=6e-4)
    assert mine[-16:][~applied] < 0.5 * theirs[-16:][~applied]


def test_a_plain_loop_gives_the_mean_over_micro_batches() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    attachment = hf_gradclip.attach(accelerator, SPEC)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses = []
    for batch, _ in batches(8):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(float(loss))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    expected = torch.tensor(losses).view(4, 2).mean(1).double()
    torch.testing.assert_close(attachment.clipper.state.losses[:4], expected, rtol=1e-6, atol=0)


def test_a_last_step_of_fewer_micro_batches_has_their_mean(tmp_path) -> None:
    """Eleven batches are three windows of four, four and three; in the next epoch again."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, data = torch.nn.Linear(4, 1), torch.randn(22, 4, generator=torch.Generator().manual_seed(0))
    attachment = hf_gradclip.attach(accelerator, SPEC, auto=True, record=tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    windows, window = [], []
    for (x,) in (batch for _ in range(2) for batch in loader):
        with accelerator.accumulate(model):
            loss = (model(x) - 3).square().mean()
            window.append(float(loss))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            windows.append(window)
            window = []
    assert [len(window) for window in windows] == [4, 4, 3] * 2
    expected = torch.tensor([sum(window) / len(window) for window in windows]).double()
    torch.testing.assert_close(attachment.clipper.state.losses[:6], expected, rtol=1e-6, atol=0)
    accelerator.end_training()
    torch.testing.assert_close(torch.tensor(read_record(tmp_path).loss_T).double(), expected, rtol=1e-6, atol=0)


def test_a_torch_loop_must_give_the_loss() -> None:
    model = tiny_llama()
    clipper = hf_gradclip.Clipper.for_model(model, SPEC)
    before = weights_of(model)
    batch, _ = next(iter(batches(1)))
    loss = model(**batch).loss
    loss.backward()
    with pytest.raises(ValueError, match=r"skip_step:.*judges the loss: call clipper\.step\(loss=loss\)"):
        clipper.step()
    clipper.step(loss)
    assert torch.equal(before, weights_of(model))


@pytest.mark.parametrize("left_out", [1.0, float("nan")])
def test_the_loss_of_a_batch_that_the_loop_leaves_out_is_not_of_the_next_step(left_out) -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, SPEC, auto=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for i in range(14):
        loss = model(torch.ones(1, 2)).sum() * 0 + (left_out if i in (5, 9) else 1.0)
        accelerator.backward(loss)
        if i not in (5, 9):
            optimizer.step()
        optimizer.zero_grad()
    assert attachment.clipper.state.losses[:12].tolist() == [1.0] * 12
    assert attachment.clipper.report.summary()["skipped"] == 0
