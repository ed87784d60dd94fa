"""An optimizer's step as jobs for the kernels: which parameters, which arithmetic, where their numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.clipper import Clipper
from hf_gradclip.decision import Measure
from hf_gradclip.device import moved, refuse_capture, upload
from hf_gradclip.kernels import Ready
from hf_gradclip.kernels.rule import ByAxes, Memory, Places, Rule
from hf_gradclip.strategy import Needs
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.view import View

KEPT = 64  # sets of parameters, for those without a gradient come and go


Segments = Mapping[int, tuple[int, ByAxes | None]]
"""Of each parameter of a view, by its id, the (first) segment and the units; see the `places` of a view."""

_NOWHERE: Segments = {}
Made = Tensor | int
"""How many steps a step is: 1, or where only the device knows whether it is skipped a bool there, 0-d."""


@dataclass(frozen=True)
class Job:
    """The step of parameters that have one dtype and one set of hyperparameters, on one device.

    Args:
        ready: which language serves, and what it has made ready.
        rule: what to compute.
        memory: on what.
        places: where each parameter finds its numbers.
        gradient: whether the plan for the gradients is of these parameters.
        update: whether that for the updates is.
        done: called after the step, to count it, see Made.
    """

    ready: Ready
    rule: Rule
    memory: Memory
    places: Places
    gradient: bool
    update: bool
    done: Callable[[Made], None]


class Motion(NamedTuple):
    """What an optimizer would do to some parameters; nothing has moved yet.

    Args:
        rule: the arithmetic.
        memory: on which tensors.
        done: called after the step, to advance counters and keep new moments; see Made.
    """

    rule: Rule
    memory: Memory
    done: Callable[[Made], None]


RuleOf = Callable[[dict[str, Any], list[Tensor]], Motion]
"""An optimizer's `_rule`: of a group and some of its parameters."""


@dataclass
class _Known:
    """Where some parameters find their numbers, and what the last step of them has made ready."""

    of_gradients: Segments
    of_updates: Segments
    places: Places
    ready: Ready | None = None


class Jobs:
    """Makes the jobs of an optimizer's steps, and keeps where its parameters find their numbers."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], _Known] = {}

    def of(
        self, groups: list[dict[str, Any]], rule_of: RuleOf, view: View | None, update_clipper: Clipper | None
    ) -> list[Job]:
        """What there is to do for the parameters that have a gradient; nothing has moved yet.

        Args:
            groups: of the optimizer.
            rule_of: its arithmetic.
            view: of the gradients, which has just measured them.
            update_clipper: of the updates.
        """
        of_gradients = _NOWHERE if view is None else view.places()
        of_updates = _NOWHERE
        if update_clipper is not None:
            update_clipper.view.watched()  # looks anew: a parameter may have been unfrozen since the last step
            of_updates = update_clipper.view.places()
        jobs = []
        for group in groups:
            alike: dict[tuple[torch.dtype, torch.device, bool, bool], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    key = p.dtype, p.device, id(p) in of_gradients, id(p) in of_updates
                    alike.setdefault(key, []).append(p)
            for (_, device, gradient, update), params in alike.items():
                refuse_capture("optimizer.step()", device)
                rule, memory, done = rule_of(group, params)
                segments = of_gradients if gradient else _NOWHERE, of_updates if update else _NOWHERE
                known = self._known_of(params, *segments)
                known.ready = kernels.prepare(rule, memory, known.places, known.ready)
                jobs.append(Job(known.ready, rule, memory, known.places, gradient, update, done))
        return jobs

    def _known_of(self, params: list[Tensor], of_gradients: Segments, of_updates: Segments) -> _Known:
        """What is kept of these parameters while they and their segments are the same."""
        ids = tuple(map(id, params))
        known = self._known.get(ids)
        if known is not None and known.of_gradients is of_gradients and known.of_updates is of_updates:
            return known
        units = tuple(of_gradients[i][1] if of_gradients else None for i in ids)
        places = Places(
            tuple(of_gradients[i][0] if of_gradients else 0 for i in ids),
            tuple(of_updates[i][0] if of_updates else 0 for i in ids),
            units if any(cut is not None for cut in units) else None,
        )
        if len(self._known) > KEPT:
            self._known.clear()
        self._known[ids] = known = _Known(of_gradients, of_updates, places)
        return known


def measured(clipper: Clipper, jobs: list[Job], plan: ClipPlan | None) -> Measure:
    """How to measure the updates of some jobs: 0 where the learning rate is 0 and nothing will move.

    Args:
        clipper: of the updates.
        jobs: of the step.
        plan: for the gradients.
    """

    local: list[NormStats] = []

    def measure(needs: Needs, rescale: bool) -> NormStats:
        # `rescale` asks for nothing new: the sums of updates are taken in float64 and do not overflow.
        if not local:
            local.append(_measured_here(clipper.view.here.layout, jobs, plan, needs))
        return clipper.view.reduce(local[0])

    return measure


def _measured_here(layout: Layout, jobs: list[Job], plan: ClipPlan | None, needs: Needs) -> NormStats:
    """The statistics of this process's updates alone."""
    moving = [job for job in jobs if job.rule.lr != 0 and job.update]
    places = [place for job in moving for place in job.places.update]
    found = []
    for job in moving:
        mine = plan if job.gradient else None
        found.append(kernels.measure_update(job.rule, job.memory, job.places, mine, job.ready))
    every = places == list(range(len(layout)))  # in their order: nothing is to be put anywhere
    index = None if every else upload(places, torch.int64, layout.device)

    def by_segment(numbers: list[Tensor]) -> Tensor:
        there = [moved(some, layout.device, layout.dtype) for some in numbers]
        if every:
            return there[0] if len(there) == 1 else torch.cat(there)
        zeros_S = torch.zeros(len(layout), dtype=layout.dtype, device=layout.device)
        return zeros_S if index is None or not there else zeros_S.index_copy_(0, index, torch.cat(there))

    max_S = by_segment([largest for _, largest in found]) if needs.max_abs else None
    return NormStats(by_segment([sums for sums, _ in found]), layout, max_S)


def step_(jobs: list[Job], plan: ClipPlan | None, after: ClipPlan | None, skip: Tensor | None = None) -> None:
    """Do all of them.

    Args:
        jobs: of the step.
        plan: for the gradients; None leaves them as they are.
        after: for the updates, in the same way.
        skip: whether nothing moves, 0-d bool, where only the device knows.
    """
    made: Made = 1 if skip is None else ~skip
    for job in jobs:
        mine = plan if job.gradient else None, after if job.update else None
        kernels.step_(job.rule, job.memory, job.places, *mine, skip, job.ready)
        job.done(made)
