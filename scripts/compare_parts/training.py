"""One training: everything that decides it, what is done to its data, and what it came to."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compare_parts.task import Batch, Task, rows_of
from compare_parts.tasks import TASKS
from hf_gradclip import Clipper, optim
from hf_gradclip.clipper import NonFiniteError

NOTHING = "none"
RATES = {
    "adamw": tuple(1e-3 * 2**i for i in range(-1, 6)),
    "rmsprop": tuple(1e-3 * 2**i for i in range(-3, 4)),
    "momentum": tuple(0.01 * 2**i for i in range(7)),
}
"""The learning rates that are tried first, by optimizer."""
FAULTS: dict[str, float] = {"sound": 1, "loud": 100, "tensor": 1000, "noise": 1, "one": 10_000, "level": 5, "labels": 1}
"""What may be wrong with data, and how many times too large something is then."""
BETA1, BETA2, WEIGHT_DECAY = 0.9, 0.99, 0.1
BROKEN = 0.05
RAMP = 0.05
UNBROKEN = 0.15
MEANS = 60
EVALUATED_AT_ONCE = 128


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: of TASKS.
        optimizer: of RATES.
        clip: how to clip the gradient, or gradient/update.
        lr: the highest learning rate, reached after a RAMP of the steps; a cosine to 0 follows.
        data: "sound", or what is wrong with so many batches as are BROKEN of the run, none of them in its first
            UNBROKEN: "loud" (their loss is too large), "tensor" (one tensor's gradient is too large, each time another
            one's), "noise" (random inputs and labels), "one" (the gradient of the first parameter, an embedding or the
            first layer, is too large), "labels" (each example has the labels of the one before it). "level" is the loss
            too large in every step from the middle on.
        seed: of weights and batches.
        steps: of the optimizer.
        beta2: of AdamW.
        weight_decay: of AdamW.
    """

    task: str
    optimizer: str
    clip: str
    lr: float
    data: str
    seed: int
    steps: int
    beta2: float = BETA2
    weight_decay: float = WEIGHT_DECAY


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Args:
        run: which.
        start: evaluation loss before the first step.
        end: the same at the end; None where it is not finite.
        losses: of the batches, at most MEANS means over as many stretches of the run; fewer of one that stopped.
        clipped: share of the steps whose gradient was clipped.
        update_clipped: share of the steps whose update was.
        skipped: steps that were left out.
        norm: median of the norms of the gradient before clipping; None for a run that stopped, or a row that was made
            before it was looked at.
        rise: how many times larger they became in the second half of the run.
    """

    run: Run
    start: float | None
    end: float | None
    losses: list[float]
    clipped: float
    update_clipped: float
    skipped: int
    norm: float | None = None
    rise: float | None = None


def places(clip: str) -> tuple[str, str]:
    """The spec for the gradient and the one for the update; no path can be in either."""
    gradient, _, update = clip.partition("/")
    return gradient, update or NOTHING


def optimizer_of(run: Run, model: torch.nn.Module) -> optim.ClippedOptimizer:
    """The optimizer, clipping updates if the run does."""
    _, update = places(run.clip)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spec = None if update == NOTHING else update
    if run.optimizer == "adamw":
        return optim.AdamW(named, run.lr, betas=(BETA1, run.beta2), weight_decay=run.weight_decay, update_clip=spec)
    if run.optimizer == "rmsprop":
        return optim.RMSprop(named, run.lr, update_clip=spec)
    return optim.SGD(named, run.lr, momentum=0.9, update_clip=spec)


def factor(step: int, steps: int) -> float:
    """Of the learning rate."""
    ramp = max(round(RAMP * steps), 1)
    return min((step + 1) / ramp, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, data: Batch) -> float | None:
    """Mean loss over the examples held out; None if it is not finite."""
    model.eval()
    size = min(EVALUATED_AT_ONCE, task.evaluated)
    parts = [rows_of(data, slice(i, i + size)) for i in range(0, task.evaluated, size)]
    loss = statistics.fmean(float(model(**part).loss) for part in parts)
    model.train()
    return loss if math.isfinite(loss) else None


def broken_steps(run: Run) -> set[int]:
    """Where its data is broken, from 0: the same for all runs of a seed and a length, whatever of FAULTS it is.

    But with "sound" no step is, and with "level" each one from the middle on.
    """
    if run.data == "sound":
        return set()
    if run.data == "level":
        return set(range(run.steps // 2, run.steps))
    first = math.ceil(UNBROKEN * run.steps)
    order = torch.randperm(run.steps - first, generator=torch.Generator().manual_seed(run.seed))
    return {first + place for place in order[: round(BROKEN * run.steps)].tolist()}


def spoilt(run: Run, batch: Batch, noise: Batch) -> Batch:
    """A broken step's batch, where it is the examples that are broken."""
    if run.data == "noise":
        return noise
    return {**batch, "labels": batch["labels"].roll(1, 0)} if run.data == "labels" else batch


def train(run: Run) -> Outcome:
    """Train, on one thread."""
    torch.set_num_threads(1)
    task, data = TASKS[run.task], TASKS[run.task].data()
    torch.manual_seed(run.seed)
    model = task.model().train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient, _ = places(run.clip)
    clipper = None if gradient == NOTHING else Clipper.for_model(model, gradient)
    optimizer = optimizer_of(run, model)
    drawn, broken, times = torch.Generator().manual_seed(run.seed), broken_steps(run), FAULTS[run.data]
    start, end = evaluate(model, task, data), None
    losses: list[float] = []
    norms: list[float] = []
    try:
        for step in range(run.steps):
            index = torch.randint(task.evaluated, len(data["labels"]), (task.batch_size,), generator=drawn)
            noise = task.noise(task.batch_size, drawn)
            which = int(torch.randint(len(parameters), (), generator=drawn))
            batch = rows_of(data, index)
            loss = model(**(spoilt(run, batch, noise) if step in broken else batch)).loss
            losses.append(float(loss.detach()))
            (loss * times if run.data in ("loud", "level") and step in broken else loss).backward()
            spike = {"tensor": which, "one": 0}.get(run.data)
            if spike is not None and step in broken and (grad := parameters[spike].grad) is not None:
                grad.mul_(times)
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
            for group in optimizer.param_groups:
                group["lr"] = run.lr * factor(step, run.steps)
            if clipper is not None:
                clipper.step(loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        end = evaluate(model, task, data)
    except NonFiniteError as error:
        print(f"{run}: {error}", file=sys.stderr)
    summary = clipper.report.summary() if clipper is not None else {}
    update = optimizer.update_clipper.report.summary() if optimizer.update_clipper is not None else {}
    skipped = int(summary.get("skipped", 0) + update.get("skipped", 0))
    means = [round(statistics.fmean(part), 4) for part in stretches(losses, run.steps)]
    shares = summary.get("rate", 0.0), update.get("rate", 0.0)
    return Outcome(run, start, end, means, *shares, skipped, *middle_and_rise(norms, run.steps))


def middle_and_rise(norms: Sequence[float], steps: int) -> tuple[float, float] | tuple[None, None]:
    """The median of a run's norms; and that of its last tenth by that of the tenth after its middle.

    None for a run that stopped, or whose medians are not finite or 0.
    """
    tenth = max(steps // 10, 1)
    parts = [norms, norms[steps - tenth : steps], norms[steps // 2 : steps // 2 + tenth]]
    if len(norms) < steps:
        return None, None
    whole, last, middle = map(statistics.median, parts)
    usual = all(0 < median < math.inf for median in (whole, last, middle))
    return (whole, last / middle) if usual else (None, None)


def stretch(steps: int, means: int) -> int:
    """How many steps each of at most so many means of a run is of."""
    return math.ceil(steps / means)


def stretches(losses: Sequence[float], steps: int) -> list[Sequence[float]]:
    """The losses of a run of so many steps in parts, as long as each other but for the last; fewer if it stopped."""
    size = stretch(steps, MEANS)
    return [losses[i : i + size] for i in range(0, len(losses), size)]
