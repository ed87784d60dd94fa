"""The step that the optimizers of this folder share: decide on the gradients, on the updates, and go.

    plan  = decide on the gradients                       skipped: nothing moves
    rules = what the optimizer computes, a `_rule` for each group
    after = decide on the updates, which are measured     skipped: nothing moves
    step: w <- w (1 - lr decay) - lr clip(u), where u comes of the clipped gradient and the moments

With `skip_sync=False` a skip is a flag on the device, which goes with the step: its kernels then write nothing.
In every language a gradient is clipped as it is read and never written, so that `.grad` stays as it came. All
arithmetic is on this process's memory: of a DTensor on its shard, whose moments are DTensors too.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.decision import Decision
from hf_gradclip.optim.counters import Counters, on_host
from hf_gradclip.optim.gradients import settle_
from hf_gradclip.optim.groups import named_of, stepped_of
from hf_gradclip.optim.options import insist_on_options
from hf_gradclip.optim.step import Job, Jobs, Motion, measured, step_
from hf_gradclip.optim.taken import Taken, ids_of
from hf_gradclip.say import logger
from hf_gradclip.state import flatten
from hf_gradclip.strategy import Needs, SpecError, describe
from hf_gradclip.suits import refuse_a_record
from hf_gradclip.types import ClipPlan, NormStats
from hf_gradclip.views import view_of
from hf_gradclip.views.view import View

PLACES = {"gradient": "clip", "update": "clip_update"}


class ClippedOptimizer(Optimizer, ABC):
    """An optimizer that clips its gradients and its updates.

    A step leaves `.grad` as it came. One that is skipped, because of its gradient or of its update, moves no weight,
    moment or counter.

    Args:
        params: as in torch.optim; named parameters (`model.named_parameters()`) keep their names in the clip state.
        defaults: of the parameter groups, with the keys of torch's optimizer of the same name.
        clip: a spec for the gradients (see hf_gradclip.config), or a whole configuration; None leaves them alone. With
            `skip_sync=False` in it no host reads whether a step is skipped, for its gradient or its update.
        update_clip: a spec for the updates: what is subtracted before the learning rate and apart from decoupled
            weight decay. None leaves them alone.

    Attributes:
        clipper: of the gradients, with state and report; None without `clip`.
        update_clipper: of the updates; None without `update_clip`. GradClipTrainer and `attach` set it.
        squares: whether a moment holds squares of the gradient.
        taken: what `take` was given for the coming step.
        heeded: what `heed` was given for it.

    Raises:
        SpecError: for a wrong spec.
        ValueError: for an option that only torch's own implementation has, a learning rate on another device, or
            SGD's dampening with `skip_sync=False`.
    """

    squares: ClassVar[bool] = True
    clipper: Clipper | None = None
    update_clipper: Clipper | None = None
    taken: Taken | None = None
    heeded: Tensor | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], clip: Any, update_clip: Any) -> None:
        name = type(self).__name__
        insist_on_options(name, defaults)
        self._specs = self._configs(clip, update_clip)
        super().__init__(params, defaults)
        for lr in (group["lr"] for group in self.param_groups):
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                raise ValueError(
                    f"{name}(lr=<tensor on {lr.device}>): every step would wait for the device to read it. Give a "
                    "number, or a tensor on the CPU."
                )
        self._make_clippers()

    @property
    def clips_itself(self) -> bool:
        """Whether `clip` or `update_clip` was given to the constructor."""
        return bool(self._specs)

    def _configs(self, clip: Any, update_clip: Any) -> dict[str, ClipConfig]:
        """The configuration of each place that is clipped."""
        if clip is None and update_clip is None:
            return {}
        config = ClipConfig.parse("none" if clip is None else clip, update=update_clip)
        if config.fold:
            raise SpecError(
                f"{type(self).__name__}(clip={clip!r}): fold is for torch's fused optimizers, and this one clips as it "
                "reads. Leave it out."
            )
        if config.after_spike:
            raise SpecError(
                f"{type(self).__name__}(clip=..., after_spike=...): when the norm is known its step has begun. Use "
                "Clipper.for_model(..., optimizer=optimizer), GradClipTrainer or attach()."
            )
        refuse_a_record(f"{type(self).__name__}(clip=...", config)
        configs = {} if clip is None else {"gradient": config}
        return configs if config.update is None else {**configs, "update": config.of_update(config.skip_sync)}

    def _make_clippers(self) -> None:
        named = named_of(self.param_groups)
        self._watched: list[Tensor] = []  # where this fails, so does the next step
        self._jobs, self._counters = Jobs(), Counters()
        made = self._own()
        for place, config in self._specs.items():
            if place in made:
                made[place].turn_to(view_of(named))
            else:
                made[place] = Clipper(config, view_of(named), PLACES[place], self.squares and place == "gradient")
        self.clipper = made.get("gradient", self.clipper)
        self.update_clipper = made.get("update", self.update_clipper)
        self._watched = [p for _, p in named]

    @abstractmethod
    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> Motion:
        """What the optimizer does to some parameters that have a gradient.

        Args:
            group: the hyperparameters.
            params: of the group, the keys of `self.state`.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again, as in torch.optim.

        Returns:
            What the closure returns.

        Raises:
            NonFiniteError: by the policy of the configuration.
            ValueError: without a closure, if `clip` judges the loss; for a gradient that is not taken.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._specs and not self._watches_all():
            logger.warning("%s: the set of parameters changed, so the clip state starts anew.", type(self).__name__)
            self._make_clippers()
        settle_(stepped_of(self.param_groups))
        plan = after = skip = None
        if self.clipper is None:
            if (taken := self.taken) is not None:
                taken.insist(type(self).__name__, ids_of(self.param_groups))
                plan, self.taken = taken.plan, None
            jobs = self._prepared(None if taken is None else taken.view)
            skip, self.heeded = self.heeded, None
        else:
            decision, jobs = self._decide(self._judged(loss))
            outcome = self.clipper.settle(decision)
            if outcome.skipped:
                return loss
            plan, skip = outcome.plan, outcome.skip
        if self.update_clipper is not None and any(job.rule.lr != 0 for job in jobs):
            measure = measured(self.update_clipper, jobs, plan)
            outcome = self.update_clipper.settle(self.update_clipper.decide(measure=measure, void=skip))
            if outcome.skipped:
                return loss
            after, skip = outcome.plan, outcome.skip
        step_(jobs, plan, after, skip)
        return loss

    def take(self, plan: ClipPlan | None, view: View) -> None:
        """Clip the gradients of the coming step as they are read, by a plan that somebody else has decided on.

        Args:
            plan: for the gradients; None leaves them as they are.
            view: of the gradients.
        """
        self.taken = Taken(plan, view)

    def heed(self, skip: Tensor) -> None:
        """Leave the coming step out where this flag of the device is true, 0-d bool: no host waits for it."""
        self.heeded = skip

    @property
    def _reads(self) -> bool:
        """Whether the host knows which step is skipped; else the counters are beside the parameters."""
        return self.heeded is None if self.clipper is None else self.clipper.config.skip_sync

    def _prepared(self, view: View | None) -> list[Job]:
        """What there is to do, with everything that no plan decides made ready; `view` is of the clipped gradients."""
        return self._jobs.of(self.param_groups, self._rule, view, self.update_clipper)

    def _decide(self, loss: Tensor | None) -> tuple[Decision, list[Job]]:
        """Decide on the gradients, and prepare the step while they are measured, before anybody waits for a device."""
        assert self.clipper is not None
        view = self.clipper.view
        jobs: list[Job] = []

        def measure(needs: Needs, rescale: bool) -> NormStats:
            stats = view.measure(needs, rescale)
            if not jobs:
                jobs.extend(self._prepared(view))
            return stats

        return self.clipper.decide(loss, measure), jobs

    def _judged(self, loss: Any) -> Any:
        """The loss for a strategy that judges it; else only where it is a tensor, for the record."""
        assert self.clipper is not None
        if not self.clipper.config.gradient.needs.loss:
            return loss if isinstance(loss, Tensor) else None
        if loss is None:
            raise ValueError(
                f"{type(self).__name__}(clip={describe(self.clipper.config.gradient)!r}): judges the loss, so give "
                "step() a closure that computes it."
            )
        return loss

    def _watches_all(self) -> bool:
        """False after a group was added, or a wrapper (FSDP2 by Accelerate) put other parameters into the groups."""
        params = stepped_of(self.param_groups)
        return len(params) == len(self._watched) and all(map(operator.is_, params, self._watched))

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """What every rule has."""
        return {
            "lr": float(group["lr"]),
            "decay": float(group["weight_decay"]),
            "decoupled": bool(group.get("decoupled_weight_decay")),
            "maximize": bool(group["maximize"]),
        }

    def _states_of(self, params: list[Tensor]) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """The states of some parameters, and those of them that a step begins, to be kept when it is done; one that is
        skipped begins none."""
        states: list[dict[str, Any]] = [self.state.get(p) or {} for p in params]
        return states, {p: state for p, state in zip(params, states, strict=True) if not state}

    def _zeros(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def __getstate__(self) -> dict[str, Any]:
        clip = {place: clipper.state_dict() for place, clipper in self._own().items()}
        return {**super().__getstate__(), "_specs": self._specs, "_clip": clip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "_clip"})
        if "_clip" in state:  # a copy
            self._make_clippers()
            for place, clipper in self._own().items():
                clipper.take_state(state["_clip"].get(place, {}))
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].cpu()  # as below
        for entry in self.state.values():
            if torch.is_tensor(step := entry.get("step")):
                entry["step"] = step.cpu()  # a fused or capturable optimizer keeps it on the device

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; where `clip` or `update_clip` has a state also a key `clip`, which torch.optim ignores."""
        saved = super().state_dict()
        saved["state"] = on_host(saved["state"])
        clippers = self._own()
        if any(flatten(clipper.state) or clipper.guard.in_a_row() for clipper in clippers.values()):
            saved["clip"] = {place: clipper.state_dict() for place, clipper in clippers.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of this optimizer or of torch.optim's of the same name; says what a clip state lacks."""
        super().load_state_dict(state_dict)
        for place, clipper in self._own().items():
            if place in state_dict.get("clip", {}):
                message = clipper.take_state(state_dict["clip"][place])
                if message:
                    logger.warning("%s: %s", type(self).__name__, message)
            elif flatten(clipper.state):
                clipper.reset()
                logger.warning("%s: the state has no clip state of the %s; it starts anew.", type(self).__name__, place)

    def _own(self) -> dict[str, Clipper]:
        """The clippers that the constructor was asked for."""
        made = {"gradient": self.clipper, "update": self.update_clipper}
        return {place: clipper for place, clipper in made.items() if clipper and place in self._specs}
