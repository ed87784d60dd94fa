"""Events through Accelerate and the Trainer in one process; test_trainer_sharded.py has those of two ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

import hf_gradclip
from hf_gradclip import GradClipTrainer
from hf_gradclip.events import Event, SpikeLimitError
from tests.tiny import train

LOUD = {12: 100.0, 20: 80.0}


class Loud(GradClipTrainer):
    """Its loss is too large in some steps, by as much."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * LOUD.get(self.state.global_step, 1.0)


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(accelerator: Accelerator, model: nn.Module, optimizer: Any, i: int, clips: bool = True) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
    accelerator.backward(model(x).square().mean() * LOUD.get(i, 1.0))
    if clips:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class TestAccelerate:
    @pytest.mark.parametrize("auto", [False, True])
    def test_functions_hear_and_are_obeyed(self, auto) -> None:
        heard: list[Event] = []

        def on_spike(event: Event) -> None:
            heard.append(event)
            event.skip_step()

        accelerator = Accelerator(cpu=True)
        attachment = hf_gradclip.attach(accelerator, "none", auto=auto, on_spike=on_spike, on_skip=heard.append)
        model, optimizer = accelerator.prepare(*model_and_optimizer())
        for i in range(25):
            before = model.weight.detach().clone()
            step(accelerator, model, optimizer, i, clips=not auto)
            assert torch.equal(before, model.weight) == (i in LOUD)
            assert accelerator.optimizer_step_was_skipped == (i in LOUD)
        assert [(event.kind, event.step, event.of) for event in heard] == [("on_spike", 13, ""), ("on_spike", 21, "")]
        assert attachment.clipper.report.summary()["skipped"] == 2

    def test_several_models_are_named(self) -> None:
        heard: list[Event] = []
        accelerator = Accelerator(cpu=True)
        pairs = [model_and_optimizer(), model_and_optimizer()]
        models = [pair[0] for pair in pairs]
        hf_gradclip.attach(accelerator, dict.fromkeys(models, "adaptive_norm"), on_spike=heard.append)
        pairs = [accelerator.prepare(*pair) for pair in pairs]
        for i in range(15):
            for number, (model, optimizer) in enumerate(pairs):
                step(accelerator, model, optimizer, i if number else min(i, 11))
        assert [(event.step, event.of) for event in heard] == [(13, "Linear_2")]

    def test_the_rate_is_lowered_and_a_checkpoint_goes_on_with_it(self, tmp_path) -> None:
        def run(steps: range, folder: Path | None = None, save: int = -1) -> list[torch.Tensor]:
            accelerator = Accelerator(cpu=True)
            hf_gradclip.attach(accelerator, "adaptive_norm", after_spike="lower_rate:factor=0.01,steps=6")
            model, optimizer = accelerator.prepare(*model_and_optimizer())
            if folder is not None:
                accelerator.load_state(str(folder))
            weights = []
            for i in steps:
                step(accelerator, model, optimizer, i)
                assert optimizer.param_groups[0]["lr"] == 0.1
                weights.append(model.weight.detach().clone())
                if i == save:
                    accelerator.save_state(str(tmp_path))
            return weights

        whole = run(range(30), save=15)
        again = run(range(16, 30), tmp_path)
        assert all(map(torch.equal, whole[16:], again))
        moved = [float((a - b).norm()) for a, b in itertools.pairwise(whole)]
        usual = sorted(moved[:10])[5]
        assert all(moved[i - 1] < 0.05 * usual for i in range(12, 18)), "in the spike and the five after it"
        assert moved[17] > 0.1 * usual

    def test_too_many_spikes_end_the_loop(self) -> None:
        accelerator = Accelerator(cpu=True)
        hf_gradclip.attach(accelerator, {"gradient": "adaptive_norm", "after_spike": "stop:spikes=2,steps=20"})
        model, optimizer = accelerator.prepare(*model_and_optimizer())
        for i in range(20):
            step(accelerator, model, optimizer, i)
        with pytest.raises(SpikeLimitError, match="step 21 stands out"):
            step(accelerator, model, optimizer, 20)

    def test_an_error_of_a_handler_is_the_loops(self) -> None:
        def on_spike(event: Event) -> None:
            raise LookupError(f"step {event.step}")

        accelerator = Accelerator(cpu=True)
        hf_gradclip.attach(accelerator, "adaptive_norm", on_spike=on_spike)
        model, optimizer = accelerator.prepare(*model_and_optimizer())
        for i in range(12):
            step(accelerator, model, optimizer, i)
        with pytest.raises(LookupError, match="step 13"):
            step(accelerator, model, optimizer, 12)


class Hears(TrainerCallback):
    def __init__(self, **flags: bool) -> None:
        self.heard: list[tuple[str, int, Any]] = []
        self.flags = flags

    def _hear(self, control: Any, event: Event) -> None:
        self.heard.append((event.kind, event.step, event.examples))
        for flag, value in self.flags.items():
            setattr(control, flag, value)

    def on_spike(self, args: Any, state: Any, control: Any, event: Event, **kwargs: Any) -> None:
        self._hear(control, event)

    def on_nonfinite(self, args: Any, state: Any, control: Any, event: Event, **kwargs: Any) -> None:
        self._hear(control, event)


class TestTrainer:
    def test_control_is_obeyed_in_the_step(self, tmp_path) -> None:
        hears = Hears(should_save=True, should_training_stop=True)
        settings = {"max_steps": 30, "save_strategy": "no", "output_dir": str(tmp_path), "logging_steps": 100}
        trainer = train(Loud, clip="adaptive_norm", callbacks=[hears], **settings)
        assert [event[:2] for event in hears.heard] == [("on_spike", 13)]
        assert trainer.state.global_step == 13
        assert (tmp_path / "checkpoint-13").exists()

    def test_a_run_stops_after_too_many_spikes(self, caplog) -> None:
        clip = {"gradient": "adaptive_norm", "after_spike": "stop:spikes=2,steps=9"}
        trainer = train(Loud, clip=clip, max_steps=30)
        assert trainer.state.global_step == 21
        assert "after_spike=stop:spikes=2,steps=9: step 21 stands out" in caplog.text

    def test_events_come_without_clip_too_and_callbacks_that_do_not_want_them_are_left_alone(self) -> None:
        hears = Hears()
        train(Loud, callbacks=[hears, TrainerCallback()], max_steps=15)
        assert [event[:2] for event in hears.heard] == [("on_spike", 13)]
        assert hears.heard[0][2] == "unknown"

    def test_a_record_knows_the_examples(self, tmp_path) -> None:
        hears = Hears()
        clip = {"gradient": "adaptive_norm", "record": True}
        train(Loud, clip=clip, callbacks=[hears], max_steps=15, gradient_accumulation_steps=2, output_dir=str(tmp_path))
        ((_, step, examples),) = hears.heard
        spike = json.loads((tmp_path / "gradclip" / "spikes" / f"step_{step}.json").read_text())
        assert spike["examples"] == examples
        assert len(examples) == len({*examples}) > 4
