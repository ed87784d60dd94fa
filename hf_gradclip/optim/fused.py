"""The step of an optimizer of this folder in Triton or in C: clip, moments and weights of a group in one call.

The clippers decide as ever; what they decided is done to each gradient as the step reads it, and to each update before
it is added to its weight. The gradients are not written. What the kernels do not serve is left to the foreach form.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from hf_gradclip import kernels
from hf_gradclip.clipper import Clipper
from hf_gradclip.kernels.rule import Memory, Rule
from hf_gradclip.kernels.table import upload
from hf_gradclip.types import ClipPlan, NormStats


class Steps(Protocol):
    """What is used of an optimizer."""

    param_groups: list[dict[str, Any]]
    clipper: Clipper | None
    update_clipper: Clipper | None

    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> tuple[Rule, Memory] | None: ...


@dataclass(frozen=True)
class Job:
    """One group's step.

    Args:
        group: the hyperparameters.
        rule: what to compute.
        memory: on what.
        places: per parameter its segment for the gradient's clipper and for the update's.
    """

    group: dict[str, Any]
    rule: Rule
    memory: Memory
    places: tuple[tuple[int, int], ...]


def kernels_of(optimizer: Steps) -> ModuleType | None:
    """The kernels, if they can clip as this optimizer's clippers do: with numbers per parameter, on one device."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not params or (found := kernels.step_kernels(params)) is None:
        return None
    devices = {p.device for p in params}
    for clipper in (optimizer.clipper, optimizer.update_clipper):
        if clipper is not None:
            layout, places = clipper.view.layout, _places(clipper)
            devices.add(layout.device)
            if layout.unit_S is not None or not all(id(p) in places for p in params):
                return None
    return found if len(devices) == 1 else None


@_disable_dynamo  # an address is not a number of a graph
def step_(optimizer: Steps, found: ModuleType, plan: ClipPlan | None) -> tuple[list[dict[str, Any]], ClipPlan | None]:
    """Step every group that the kernels serve, unless the updates' clipper skips the step.

    Args:
        optimizer: whose gradients are there.
        found: the kernels.
        plan: for the gradients.

    Returns:
        The groups that are still to step, of which nothing was written, and the plan for their updates if one was made.
    """
    jobs, left = _jobs(optimizer, found)
    clipper, after = optimizer.update_clipper, None
    if clipper is not None:
        if left:
            return optimizer.param_groups, None  # an update is measured in one way for all parameters
        if any(job.rule.lr != 0.0 for job in jobs):
            try:
                local = _measured(clipper, found, jobs, plan)
            except Exception as error:
                kernels.give_up(error, clipper.view.layout.device)
                return optimizer.param_groups, None
            after = clipper.plan(local=local)
            if clipper.step_was_skipped:
                return [], after
    for i, job in enumerate(jobs):
        try:
            found.step_(job.rule, job.memory, job.places, plan, after)
        except Exception as error:
            kernels.give_up(error, job.memory.weights[0].device)
            return left + [job.group for job in jobs[i:]], after
        kernels.written([tensor for column in job.memory._replace(grads=()) for tensor in column])
        job.rule.done()
    return left, after


def _jobs(optimizer: Steps, found: ModuleType) -> tuple[list[Job], list[dict[str, Any]]]:
    """What the kernels serve, and the groups that they do not."""
    first, second = _places(optimizer.clipper), _places(optimizer.update_clipper)
    jobs, left = [], []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        made = optimizer._rule(group, params)
        if made is None or not found.serves(made[1]):
            left.append(group)
        else:
            places = tuple([(first.get(id(p), 0), second.get(id(p), 0)) for p in params])
            jobs.append(Job(group, *made, places))
    return jobs, left


def _measured(clipper: Clipper, found: ModuleType, jobs: list[Job], plan: ClipPlan | None) -> NormStats:
    """The statistics of this process's updates; 0 where the learning rate is 0 and nothing will move."""
    layout = clipper.view.layout
    sumsq_S = torch.zeros(len(layout), dtype=layout.dtype, device=layout.device)
    max_S = torch.zeros_like(sumsq_S)
    for job in jobs:
        if job.rule.lr != 0.0:
            sums, largest = found.measure(job.rule, job.memory, job.places, plan)
            index = upload([place for _, place in job.places], torch.int64, layout.device)
            sumsq_S.index_copy_(0, index, sums.to(sumsq_S))
            max_S.index_copy_(0, index, largest.to(max_S))
    return NormStats(sumsq_S, layout, max_S)


def _places(clipper: Clipper | None) -> dict[int, int]:
    """Of each parameter, by its id, the segment."""
    watched: list[Tensor] = [] if clipper is None else list(clipper.view.watched())
    return {id(p): i for i, p in enumerate(watched)}
