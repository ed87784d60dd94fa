"""The step that the optimizers of this folder share: clip, find the direction, clip it, go along it.

An optimizer says in which direction u it would go; here w <- w (1 - lr decay) - lr clip(u). With an update clipper u is
written where the gradient was, so that the same Clipper measures, decides and applies; without one the direction goes
straight into the weights, as in torch's foreach optimizers. All arithmetic is on this process's memory: of a DTensor
on its shard, whose moments are DTensors too.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.kernels.rule import Memory, Rule
from hf_gradclip.optim import fused
from hf_gradclip.report import logger
from hf_gradclip.strategy import SpecError, describe, flatten
from hf_gradclip.views import view_of
from hf_gradclip.views.parameters import writable

PLACES = {"gradient": "clip", "update": "clip_update"}


class Direction(NamedTuple):
    """u = numerator / denominator * factor, one entry per parameter; no denominator where it is 1."""

    numerators: list[Tensor]
    denominators: list[Tensor] | None
    factors: list[float]


class ClippedOptimizer(Optimizer, ABC):
    """An optimizer that clips its gradients and its updates.

    A step in Triton (on a GPU) or in C (on a CPU) clips what it reads, so that `.grad` still holds the gradient as it
    came (where all groups step so), and a step that is skipped because of its update leaves the moments as they were
    too; see hf_gradclip.optim.fused. The foreach form, which serves elsewhere, leaves the clipped gradient, or the
    clipped update, in `.grad`.

    Args:
        params: as in torch.optim; named parameters (`model.named_parameters()`) keep their names in the clip state.
        defaults: of the parameter groups, with the keys of torch's optimizer of the same name.
        clip: a spec for the gradients (see hf_gradclip.config), or a whole configuration; None leaves them alone.
        update_clip: a spec for the updates: what is subtracted before the learning rate and apart from decoupled
            weight decay. None leaves them alone.

    Attributes:
        clipper: of the gradients, with state and report; None without `clip`.
        update_clipper: of the updates; None without `update_clip`. GradClipTrainer and `attach` set it.

    Raises:
        SpecError: for a wrong spec.
        ValueError: for an option that only torch's own implementation has, or a learning rate on another device.
    """

    clipper: Clipper | None = None
    update_clipper: Clipper | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], clip: Any, update_clip: Any) -> None:
        name = type(self).__name__
        for key in ("foreach", "fused", "capturable", "differentiable"):
            if defaults.get(key) not in (None, key == "foreach"):
                raise ValueError(
                    f"{name}({key}={defaults[key]}): only the foreach form exists here. Leave {key} out, or use "
                    f"torch.optim.{name}."
                )
        for key, rule, text in _RULES:
            if key in defaults and not _holds(rule, defaults[key]):
                raise ValueError(f"{name}({key}={defaults[key]}): must be {text}.")
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
        if config.fold or not config.skip_sync:
            raise SpecError(
                f"{type(self).__name__}(clip={clip!r}): fold and skip_sync=False are for torch's fused optimizers. "
                "Leave them out."
            )
        configs = {} if clip is None else {"gradient": config}
        return configs if config.update is None else {**configs, "update": config.of_update()}

    def _make_clippers(self) -> None:
        named = named_of(self.param_groups)
        self._watched = [p for _, p in named]
        made = {place: Clipper(config, view_of(named), PLACES[place]) for place, config in self._specs.items()}
        self.clipper = made.get("gradient", self.clipper)
        self.update_clipper = made.get("update", self.update_clipper)

    @abstractmethod
    def _direct(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> Direction:
        """Advance the moments of some parameters by their gradients; the direction to go.

        Args:
            group: the hyperparameters.
            params: the keys of `self.state`.
            grads: this process's memory of their gradients, coupled decay already in; a numerator may be one of them.
        """

    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> tuple[Rule, Memory] | None:
        """The same for a step in Triton or C, where moments and counters do not move yet; None has the foreach form."""
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss again, as in torch.optim.

        Returns:
            What the closure returns.

        Raises:
            NonFiniteError: by the policy of the configuration.
            ValueError: without a closure, if `clip` judges the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._specs and not self._watches_all():
            logger.warning("%s: the set of parameters changed, so the clip state starts anew.", type(self).__name__)
            self._make_clippers()
        self._settle()
        found = fused.kernels_of(self)
        plan = after = None
        if self.clipper is not None:
            if loss is None and self.clipper.config.gradient.needs.loss:
                raise ValueError(
                    f"{type(self).__name__}(clip={describe(self.clipper.config.gradient)!r}): judges the loss, so give "
                    "step() a closure that computes it."
                )
            judged = loss if isinstance(loss, Tensor) else None
            if found is None:
                self.clipper.step(loss=judged)
            else:
                plan = self.clipper.plan(loss=judged)

        groups = self.param_groups
        if found is not None:
            groups, after = fused.step_(self, found, plan)
            if groups and self.clipper is not None and plan is not None:
                self.clipper.view.apply_(plan)

        written = []
        for group in groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = self._decayed(group, params)
            direction = self._direct(group, params, grads)
            if self.update_clipper is None:
                _go(group, params, direction)
            else:
                write_(grads, direction, zero=float(group["lr"]) == 0.0)
                written.append((group, params, grads))
        if written and self.update_clipper is not None:
            if after is not None:
                self.update_clipper.view.apply_(after)
            elif any(float(group["lr"]) != 0.0 for group, _, _ in written):
                self.update_clipper.step()
                if self.update_clipper.step_was_skipped:
                    return loss
            for group, params, grads in written:
                _go(group, params, Direction(grads, None, [1.0] * len(grads)))
        return loss

    def _settle(self) -> None:
        """Add up over ranks the gradients that are parts of a sum: sequence parallelism leaves some so.

        Raises:
            ValueError: for a gradient that is not taken, before anything has changed.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if hasattr(p.grad, "placements"):
                    from hf_gradclip.views.dtensor import settle_placements

                    settle_placements(p)
                if p.grad is not None:
                    local(p.grad)

    def _watches_all(self) -> bool:
        """False after a group was added, or a wrapper (FSDP2 by Accelerate) put other parameters into the groups."""
        params = [p for group in self.param_groups for p in group["params"]]
        return len(params) == len(self._watched) and all(map(operator.is_, params, self._watched))

    def _decayed(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The gradients' memory with `maximize` and coupled weight decay in; theirs to write if updates are clipped."""
        if self.update_clipper is not None:
            for p in params:
                writable(p)  # a gradient with gaps is replaced now, not between writing the update and clipping it
        grads = [local(p.grad) for p in params if p.grad is not None]
        decay = 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]
        if not group["maximize"] and decay == 0:
            return grads
        if self.update_clipper is None:
            grads = [grad.clone() for grad in grads]
        if group["maximize"]:
            torch._foreach_neg_(grads)
        if decay != 0:
            torch._foreach_add_(grads, [local(p) for p in params], alpha=decay)
        return grads

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """What every rule has."""
        return {
            "lr": float(group["lr"]),
            "decay": float(group["weight_decay"]),
            "decoupled": bool(group.get("decoupled_weight_decay")),
            "maximize": bool(group["maximize"]),
        }

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
                clipper.load_state_dict(state["_clip"].get(place, {}))
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].cpu()  # as below
        for entry in self.state.values():
            if torch.is_tensor(step := entry.get("step")):
                entry["step"] = step.cpu()  # a fused or capturable optimizer keeps it on the device

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; with a stateful `clip` or `update_clip` a third key, `clip`, which torch.optim ignores."""
        saved = super().state_dict()
        clippers = self._own()
        if any(flatten(clipper.state) for clipper in clippers.values()):
            saved["clip"] = {place: clipper.state_dict() for place, clipper in clippers.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state of this optimizer or of torch.optim's of the same name; says what a clip state lacks."""
        super().load_state_dict(state_dict)
        for place, clipper in self._own().items():
            if place in state_dict.get("clip", {}):
                message = clipper.load_state_dict(state_dict["clip"][place])
                if message:
                    logger.warning("%s: %s", type(self).__name__, message)
            elif flatten(clipper.state):
                clipper.reset()
                logger.warning("%s: the state has no clip state of the %s; it starts anew.", type(self).__name__, place)

    def _own(self) -> dict[str, Clipper]:
        """The clippers that the constructor was asked for."""
        clippers = {"gradient": self.clipper, "update": self.update_clipper}
        return {place: clipper for place, clipper in clippers.items() if clipper is not None and place in self._specs}


def _go(group: dict[str, Any], params: list[Tensor], direction: Direction) -> None:
    """w <- w (1 - lr decay) - lr u."""
    lr = float(group["lr"])
    weights = [local(p) for p in params]
    if group.get("decoupled_weight_decay") and group["weight_decay"] != 0:
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    factors = [-lr * factor for factor in direction.factors]
    if direction.denominators is not None:
        torch._foreach_addcdiv_(weights, direction.numerators, direction.denominators, factors)
    elif len(set(factors)) == 1:
        torch._foreach_add_(weights, direction.numerators, alpha=factors[0])
    else:
        for weight, numerator, factor in zip(weights, direction.numerators, factors, strict=True):
            weight.add_(numerator, alpha=factor)


def write_(grads: list[Tensor], direction: Direction, zero: bool) -> None:
    """Put the update where the gradient was; `zero` where the learning rate is 0 and nothing will move."""
    if zero:
        torch._foreach_zero_(grads)
        return
    if direction.numerators is not grads:
        torch._foreach_copy_(grads, direction.numerators)
    if direction.denominators is not None:
        torch._foreach_div_(grads, direction.denominators)
    if any(factor != 1.0 for factor in direction.factors):
        torch._foreach_mul_(grads, direction.factors)


def local(tensor: Tensor | None) -> Tensor:
    """This process's memory of a tensor: of a DTensor its shard.

    Raises:
        ValueError: for a sparse or complex one.
    """
    assert tensor is not None
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.is_sparse or tensor.is_complex():
        kind = "sparse gradients" if tensor.is_sparse else "complex parameters"
        raise ValueError(f"hf_gradclip.optim does not take {kind}. Use the optimizer of torch.optim, with Clipper.")
    return tensor


def memory_of(params: list[Tensor], states: list[dict[str, Any]], moments: tuple[str | None, ...]) -> Memory:
    """This process's memory of some parameters, their gradients and up to three moments, by their keys in the state."""
    kept = [[None if key is None else local(state[key]) for state in states] for key in moments]
    return Memory([local(p) for p in params], [local(p.grad) for p in params], *kept)


def named_of(groups: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The parameters of some groups with their names, or their numbers where they came without."""
    named: list[tuple[str, Tensor]] = []
    for group in groups:
        numbers = [str(len(named) + i) for i in range(len(group["params"]))]
        named += zip(group.get("param_names", numbers), group["params"], strict=True)
    return named


def _holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(rule(value))
    except TypeError:
        return False


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("lr", lambda v: v >= 0, ">= 0"),
    ("eps", lambda v: v >= 0, ">= 0"),
    ("weight_decay", lambda v: v >= 0, ">= 0"),
    ("momentum", lambda v: v >= 0, ">= 0"),
    ("dampening", lambda v: abs(v) < float("inf"), "a finite number"),
    ("alpha", lambda v: 0 <= v < 1, "in [0, 1)"),
    ("betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)"),
)
