"""Run by accelerate launch on two gloo ranks: DDP under the Trainer, and a plain loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import Trainer

import hf_gradclip
from hf_gradclip import GradClipMixin, GradClipTrainer
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.loops import batches
from tests.integrations.ranks import serve
from tests.integrations.recorded import RECORD, PoisonedTrainer, poisoned_data
from tests.tiny import logged, tiny_llama, train, weights_of

OPTIMIZERS = {"adamw_torch_fused": 3e-3, "adamw_torch": 3e-3, "sgd": 0.3, "rmsprop": 1e-3}
SPECS = ("global_norm:max_norm=0.1", "global_norm:max_norm=0.5")
ASKERS: dict[str, dict[str, Any]] = {
    "loss": {"clip": "skip_step:on=loss"},
    "on_spike": {"clip": "adaptive_norm", "on_spike": print},
    "after_spike": {"clip": {"gradient": "adaptive_norm", "after_spike": "lower_rate"}},
}
LIMIT = 0.38  # the global batch is twice that of one process, so the norms are smaller


def ranks_agree(weights: torch.Tensor) -> bool:
    both = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(both, weights)
    return torch.equal(*both)


def parity(optim: str) -> dict[str, Any]:
    """With each clip that is the stock Trainer's: how far apart the two runs are."""
    settings = {"optim": optim, "learning_rate": OPTIMIZERS[optim], "max_steps": 24}
    stock = train(Trainer, max_grad_norm=LIMIT, **settings)
    free = train(Trainer, max_grad_norm=0, **settings)
    found = {}
    for clip in (f"global_norm:max_norm={LIMIT}", None):
        limit = LIMIT if clip is None else 1.0
        ours = train(GradClipTrainer, clip=clip, max_grad_norm=limit, **settings)
        norms, theirs = torch.tensor(logged(ours)), torch.tensor(logged(stock))
        found[str(clip)] = {
            "world": ours.args.world_size,
            "norm": ((norms - theirs).abs() / theirs).max().item(),
            "weights": (weights_of(ours.model) - weights_of(stock.model)).abs().max().item(),
            "without": (weights_of(free.model) - weights_of(stock.model)).abs().max().item(),
            "clipped": int((theirs > LIMIT).sum()),
            "steps": len(theirs),
            "agree": ranks_agree(weights_of(ours.model)),
        }
    return found


def engaged() -> dict[str, Any]:
    """SGD under a limit so tight that nothing may move."""
    before = weights_of(tiny_llama())
    ours = train(GradClipTrainer, clip="global_norm:max_norm=1e-12", optim="sgd", learning_rate=0.5, max_steps=5)
    return {"moved": (weights_of(ours.model).double() - before.double()).abs().max().item()}


def nan_on_one_rank() -> dict[str, Any]:
    class Poisoned(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step in (8, 9) and self.args.process_index == 1 else loss

    class Ours(GradClipMixin, Poisoned):
        pass

    ours = train(Ours, clip="zclip:warmup_steps=5,z_threshold=1", max_steps=20)
    return {
        "skipped": sum(logged(ours, "clip/skipped")),
        "finite": bool(weights_of(ours.model).isfinite().all()),
        "agree": ranks_agree(weights_of(ours.model)),
        "clipped": sum(logged(ours, "clip/rate")[5:]),
    }


def loss_on_one_rank() -> dict[str, Any]:
    """At one step the loss of rank 1 is larger by a constant; both ranks must skip it."""

    class Offset(GradClipTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + 9.0 if self.state.global_step == 14 and self.args.process_index == 1 else loss

    ours = train(Offset, clip="skip_step:window=16,min_values=8,on=loss", max_steps=18)
    return {"skipped": logged(ours, "clip/skipped"), "agree": ranks_agree(weights_of(ours.model))}


def plain_loop() -> dict[str, Any]:
    """Each rank takes half of every batch; one process must come to the same weights."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, "adagc:warmup_steps=4")
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    half = slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2)
    norms = []
    for batch, _ in batches(20):
        accelerator.backward(model(**{key: value[half] for key, value in batch.items()}).loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "norms": norms,
        "weights": weights_of(model).tolist(),
        "names": list(attachment.clipper.state_dict()["names"]),
        "backend": accelerator.distributed_type.value,
    }


def two_models(joint: bool) -> tuple[list[torch.nn.Module], list[torch.optim.Optimizer], torch.Tensor]:
    """An encoder and a decoder with an optimizer for both or for each, and a batch of eight rows."""
    torch.manual_seed(3)
    models = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6)) for _ in range(2)]
    parts = [[*models[0].parameters(), *models[1].parameters()]] if joint else [m.parameters() for m in models]
    return models, [torch.optim.SGD(part, lr=0.1) for part in parts], torch.randn(8, 6)


def several(how: str) -> dict[str, Any]:
    """Two models under DDP, by one norm or each by its own spec; each rank takes half of every batch."""
    accelerator, joint = Accelerator(cpu=True), how == "joint"
    models, optimizers, x = two_models(joint)
    spec = SPECS[0] if joint else dict(zip(models, SPECS, strict=True))
    attachment = hf_gradclip.attach(accelerator, spec, joint=joint)
    a, b, *optimizers = accelerator.prepare(*models, *optimizers)
    half = x[4 * accelerator.process_index :][:4]
    for step in range(12):
        accelerator.backward(b(a(half)).square().mean() * (3.0 if step % 3 == 0 else 0.3))
        for parameters in [[*a.parameters(), *b.parameters()]] if joint else [a.parameters(), b.parameters()]:
            accelerator.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for model in (a, b) for p in model.parameters()])
    return {"weights": weights.tolist(), "scalars": attachment.scalars(), "backend": type(a).__name__}


def one_of_two_judges_the_loss() -> list[int]:
    """The steps that the judged model skips; the other is clipped first, and the loss stands out on rank 1 alone."""
    accelerator = Accelerator(cpu=True)
    models, optimizers, x = two_models(joint=False)
    specs = {models[0]: "skip_step:window=16,min_values=8,on=loss", models[1]: SPECS[1]}
    attachment = hf_gradclip.attach(accelerator, specs)
    a, b, *optimizers = accelerator.prepare(*models, *optimizers)
    skipped = []
    for step in range(12):
        loud = step == 10 and accelerator.process_index == 1
        accelerator.backward((b(a(x)).square().mean() * 0).add(1e3 if loud else 1 + 0.01 * step))
        for model in (b, a):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        if attachment.clipper_of(a).step_was_skipped:
            skipped.append(step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return skipped


def replicas_come_apart(every: str, when: str = "3") -> str:
    """Rank 1 changes its gradients after DDP has reduced them: nobody would notice but for the check."""
    steps = 0

    class Ours(GradClipTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            nonlocal steps
            steps += 1
            if self.state.global_step == int(when) and self.args.process_index == 1:
                next(model.parameters()).grad.mul_(1.01)
            return loss

    try:
        train(Ours, clip={"gradient": "zclip", "check_every": int(every)}, max_steps=8)
    except RuntimeError as error:
        return f"{error} In step {steps}."
    return "trained on"


def uneven() -> int:
    """Rank 1 has more batches; inside DDP's join rank 0 answers what DDP asks, and no collective of ours."""
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, "global_norm:max_norm=0.34", check_every=2)
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    steps = 0
    with model.join():  # accelerator.join_uneven_inputs does nothing without GPUs
        for batch, _ in batches(3 + 4 * accelerator.process_index):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


def uneven_and_asked(asker: str) -> str:
    """There a clip that asks the other rank is refused, on both."""
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, **ASKERS[asker])
    model = tiny_llama()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    batch, _ = next(iter(batches(1)))
    accelerator.backward(model(**batch).loss)
    model._join_config = model._join_config._replace(enable=True)  # as join() does, which is hard to leave by an error
    with pytest.raises(UnsupportedBackendError) as error:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    return str(error.value)


def different_specs() -> str:
    """What each rank says of the other's spec."""
    try:
        train(GradClipTrainer, clip="zclip" if dist.get_rank() == 0 else "adagc", max_steps=2)
    except RuntimeError as error:
        return str(error)
    return "trained on"


def recorded(folder: str = "recorded") -> dict[str, Any]:
    """Accumulation on two ranks, with poisoned examples."""
    settings = {"clip": RECORD, "max_steps": 60, "logging_steps": 6, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 1, "data": poisoned_data()}
    ours = train(PoisonedTrainer, output_dir=str(Path(sys.argv[1], folder)), **settings)
    poisoned, steps = getattr(ours, "poisoned_steps", []), ours.state.global_step
    return {"poisoned": poisoned, "steps": steps, "loss": logged(ours, "loss"), "norm": logged(ours)}


def full() -> dict[str, Any]:
    """The same with a disk that is full for rank 0."""
    with patch("hf_gradclip.run.recording.write_part", side_effect=OSError(28, "No space left on device")):
        return recorded("full")


SCENARIOS: dict[str, Callable[..., Any]] = {
    "parity": parity,
    "engaged": engaged,
    "nan": nan_on_one_rank,
    "apart": replicas_come_apart,
    "uneven": uneven,
    "asked": uneven_and_asked,
    "specs": different_specs,
    "loss": loss_on_one_rank,
    "loop": plain_loop,
    "several": several,
    "judged": one_of_two_judges_the_loss,
    "recorded": recorded,
    "full": full,
}
NAMES = (
    *(f"parity:{optim}" for optim in OPTIMIZERS), "engaged", "nan", "apart:4", "apart:0",
    "apart:100:0", "apart:100:7", "uneven", *(f"asked:{asker}" for asker in ASKERS), "specs", "loss", "loop",
    "several:joint", "several:each", "judged", "recorded", "full",
)  # fmt: skip


def scenario(name: str) -> Any:
    word, *rest = name.split(":")
    return SCENARIOS[word](*rest)


if __name__ == "__main__":
    serve(scenario)
