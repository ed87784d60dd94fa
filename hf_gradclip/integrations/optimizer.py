"""Clip what any optimizer does to the weights: its update is recovered from the weights before and after its step.

u = (w (1 - lr decay) - w') / lr, with the decay only where the optimizer applies it apart from the gradient. It costs
one copy of this process's weights, which becomes the update. The optimizers of hf_gradclip.optim need none of this:
they write their update where the gradient was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradclip.clipper import CLIP, NONFINITE, Clipper, NonFiniteError
from hf_gradclip.config import ClipConfig
from hf_gradclip.kernels.table import moved
from hf_gradclip.optim.clipped import PLACES, ClippedOptimizer, local
from hf_gradclip.report import announce, logger
from hf_gradclip.strategy import describe, parts_of
from hf_gradclip.types import ClipPlan
from hf_gradclip.views import view_of
from hf_gradclip.views.parameters import named_parameters
from hf_gradclip.views.view import UnsupportedBackendError

_DECOUPLED = ("AdamW", "Lion", "Muon", "Adafactor")
_COUPLED = ("SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD")


class Updates:
    """The update clippers of a run, one per optimizer.

    Args:
        config: of the run; its `update` is what is done.
        say: whether this process speaks.
    """

    def __init__(self, config: ClipConfig, say: bool) -> None:
        self._config = config
        self._say = say
        self._known: weakref.WeakKeyDictionary[Any, Clipper] = weakref.WeakKeyDictionary()
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._hooks: weakref.WeakKeyDictionary[Any, WeightDifference] = weakref.WeakKeyDictionary()

    @property
    def clippers(self) -> list[Clipper]:
        """In the order in which the optimizers came."""
        return list(self._known.values())

    def watch(self, optimizers: Iterable[Any], models: Iterable[nn.Module]) -> None:
        """Clip the updates of the optimizers that are new, as far as their parameters belong to the models.

        Raises:
            UnsupportedBackendError: by the optimizer's name, where its update cannot be clipped.
        """
        models = list(models)
        for optimizer in map(innermost, optimizers):
            size = sum(len(group["params"]) for group in optimizer.param_groups)
            if optimizer in self._known and self._sizes.get(optimizer, size) == size:
                continue
            refuse_own_clip(optimizer)
            if self._config.update is None:
                continue
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            named = [(name, p) for model in models for name, p in named_parameters(model) if id(p) in mine]
            if not any(p.requires_grad for _, p in named):
                continue  # its model is not prepared yet
            if any(type(module).__name__ == "FullyShardedDataParallel" for m in models for module in m.modules()):
                raise UnsupportedBackendError(
                    "clipping updates under FSDP1: its flat shards do not follow the parameters. Use FSDP2 "
                    "(fsdp_version: 2)."
                )
            place = self._let_go(optimizer)
            prefix = PLACES["update"] + (f"_{place}" if place else "")
            clipper = Clipper(self._config.of_update(), view_of(named), prefix)
            if isinstance(optimizer, ClippedOptimizer):
                optimizer.update_clipper = clipper
            else:
                self._hooks[optimizer] = WeightDifference(optimizer, clipper)
                self.say_cost(type(optimizer).__name__, sum(4 * local(p).numel() for p in clipper.view.watched()))
            self.add(optimizer, clipper)
            self._sizes[optimizer] = size

    def _let_go(self, optimizer: Any) -> int:
        """Stop watching an optimizer that got more parameters; its place among the optimizers."""
        if optimizer not in self._known:
            return len(self._known)
        logger.warning(
            "%s: has other parameters now, so the statistics of its updates start anew.", type(optimizer).__name__
        )
        if optimizer in self._hooks:
            self._hooks.pop(optimizer).remove()
        return list(self._known).index(optimizer)

    def add(self, owner: Any, clipper: Clipper) -> None:
        """Take in the clipper of an optimizer; its seam may be elsewhere."""
        self._known[owner] = clipper
        if self._say and (words := small_limit(owner, clipper)):
            logger.warning(words)

    def say_cost(self, name: str, size: int) -> None:
        """Once per optimizer: what the recovery keeps in memory. `size` is in bytes."""
        if self._say:
            announce(
                f"clip: updates of {name} are recovered from the weights before and after its step, which keeps a copy "
                f"of this process's weights ({size / 2**20:.1f} MiB). hf_gradclip.optim needs none."
            )

    def forget(self) -> None:
        """Let go of every optimizer: those that are still there are watched anew, with new statistics."""
        for optimizer in self._known:
            if isinstance(optimizer, ClippedOptimizer):
                optimizer.update_clipper = None
        for hook in self._hooks.values():
            hook.remove()
        self._known.clear()
        self._hooks.clear()

    def scalars(self) -> dict[str, float]:
        """The `clip_update/` values since the last call. One host read per optimizer."""
        found: dict[str, float] = {}
        for clipper in self.clippers:
            found |= clipper.report.scalars()
        return found


class WeightDifference:
    """Clips the updates of a torch optimizer around its step.

    Args:
        optimizer: with float32 or float64 weights, and a learning rate in its groups.
        clipper: over the optimizer's trainable parameters; its view is shown the update in the place of the gradient.

    Raises:
        UnsupportedBackendError: by the optimizer's name, where its update cannot be recovered.
    """

    def __init__(self, optimizer: Any, clipper: Clipper) -> None:
        refuse_recovery(optimizer, [p.dtype for p in clipper.view.watched()])
        self._name = type(optimizer).__name__
        self._clipper = clipper
        self._copies: dict[int, Tensor] = {}
        self._stepping: dict[int, tuple[float, float]] = {}
        self._segments: dict[tuple[int, ...], Tensor] = {}
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def remove(self) -> None:
        """Clip no longer."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Any, *_: Any) -> None:
        """Copy the weights that will move, into memory that is kept."""
        self._stepping = {}
        for group in optimizer.param_groups:
            rates = float(group["lr"]), decay_of(optimizer, group)
            for p in group["params"]:
                if p.grad is None or not p.requires_grad:
                    continue
                weight = local(p.detach())
                if id(p) not in self._copies:
                    self._copies[id(p)] = torch.empty_like(weight)
                self._copies[id(p)].copy_(weight)
                self._stepping[id(p)] = rates

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        """Turn the copies into updates, clip them where the gradients were, and take back what is too much."""
        if not any(lr for lr, _ in self._stepping.values()):
            return
        watched = self._clipper.view.watched()
        grads = [p.grad for p in watched]
        moving = [i for i, p in enumerate(watched) if id(p) in self._stepping]
        weights = [local(watched[i].detach()) for i in moving]
        updates = [self._copies[id(watched[i])] for i in moving]
        rates = [self._stepping[id(watched[i])] for i in moving]
        for update, weight, (lr, decay) in zip(updates, weights, rates, strict=True):
            recover_(update, weight, lr, decay)
        try:
            for p in watched:
                p.grad = None
            for i, update in zip(moving, updates, strict=True):
                watched[i].grad = like(watched[i], update)
            clip_moved(self._clipper, self._name, weights, updates, [lr for lr, _ in rates], self._places(moving))
        finally:
            for p, grad in zip(watched, grads, strict=True):
                p.grad = grad

    def _places(self, moving: list[int]) -> Tensor:
        key = tuple(moving)
        if key not in self._segments:
            self._segments = {key: torch.tensor(moving, device=self._clipper.view.layout.device)}
        return self._segments[key]


def small_limit(optimizer: Any, clipper: Clipper) -> str:
    """Words for a limit on the norm that an update of RMS 1, as Adam makes them, is far above; "" for none."""
    keys = set(optimizer.param_groups[0])
    if not {"betas", "alpha"} & keys or "lambd" in keys:  # ASGD has an alpha of another kind
        return ""
    numel_S = clipper.view.layout.numel_S
    for part in parts_of(clipper.config.gradient):
        limit = getattr(part, "max_norm", float("inf"))
        usual = float(numel_S.max() if part.per_parameter else numel_S.sum()) ** 0.5
        if 10 * limit < usual:
            when = "every step of the warm-up" if hasattr(part, "warmup_steps") else "every step"
            return (
                f"update={describe(part)!r}: max_norm={limit:g}, and the norm of an update of "
                f"{type(optimizer).__name__} is about the root of the number of weights, {usual:.4g} here. That cuts "
                f"{when}. Set max_norm to suit, or max_norm=inf where it is for the warm-up only."
            )
    return ""


def clip_moved(
    clipper: Clipper,
    name: str,
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    lrs: Sequence[float],
    segments: Tensor,
) -> bool:
    """Decide on updates that are in the weights already, and take back what is too much.

    Args:
        clipper: whose view shows the updates.
        name: of the optimizer, for messages.
        weights: after the step, flat or not.
        updates: of the same shapes.
        lrs: learning rate per entry.
        segments: the segment of each entry, int64, shape (len(weights),).

    Returns:
        Whether any weight was changed again, as far as is known without a read.

    Raises:
        NonFiniteError: for an update with a NaN or inf, unless the policy is "pass": it cannot be taken back.
    """
    decision, action = clipper.settle(clipper.decide())
    if action == NONFINITE and clipper.config.nonfinite != "pass":
        raise NonFiniteError(
            f"The update of {name} is NaN or inf, and is in the weights by now. The gradient was finite, so look at "
            "the moments and eps. Resume from the last checkpoint; nonfinite='pass' goes on regardless."
        )
    if action == CLIP:
        correct_(weights, updates, lrs, decision.plan, segments, len(clipper.view.layout), clipper.view.apply_)
    return action == CLIP


def recover_(copy: Tensor, weight: Tensor, lr: float, decay: float) -> None:
    """copy <- ((1 - lr decay) copy - weight) / lr: the weights before the step become its update; 0 where lr is 0."""
    if lr == 0:
        copy.zero_()
    else:
        copy.mul_(1 - lr * decay).sub_(weight).div_(lr)


def correct_(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    lrs: Sequence[float],
    plan: ClipPlan,
    segments: Tensor,
    size: int,
    apply_: Callable[[ClipPlan], None],
) -> None:
    """w' <- w' + lr (u - clip(u)) where the plan clips; a weight that it does not clip keeps every bit."""
    rate = moved(torch.tensor(lrs, dtype=torch.float32, device="cpu"), segments.device)
    rates = torch.where(plan.clipped_S.expand(size)[segments], rate, 0.0)
    there = {device: moved(rates, device) for device in {weight.device for weight in weights}}
    factors = [there[weight.device][i].to(weight.dtype) for i, weight in enumerate(weights)]
    for weight, update, factor in zip(weights, updates, factors, strict=True):
        weight.addcmul_(update, factor)
    apply_(plan)
    for weight, update, factor in zip(weights, updates, factors, strict=True):
        weight.addcmul_(update, factor, value=-1)


def like(parameter: Tensor, memory: Tensor) -> Tensor:
    """This process's memory as a tensor that can be the parameter's gradient."""
    if not hasattr(parameter, "device_mesh"):
        return memory
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        memory,
        parameter.device_mesh,
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def decay_of(optimizer: Any, group: dict[str, Any]) -> float:
    """The weight decay that the optimizer applies to the weights, times lr; 0 where it goes through the gradient."""
    decay = float(group.get("weight_decay") or 0.0)
    return decay if decay and _is_decoupled(optimizer, group) else 0.0


def _is_decoupled(optimizer: Any, group: dict[str, Any]) -> bool | None:
    """None where nobody says."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    if hasattr(optimizer, "adam_w_mode"):  # DeepSpeed's FusedAdam and DeepSpeedCPUAdam
        return bool(optimizer.adam_w_mode)
    name = type(optimizer).__name__
    return True if name in _DECOUPLED else False if name in _COUPLED else None


def refuse_own_clip(optimizer: Any) -> None:
    """Stop where an optimizer clips by itself and this integration would too.

    Raises:
        UnsupportedBackendError: with what to use instead.
    """
    if isinstance(optimizer, ClippedOptimizer) and optimizer.clips_itself:
        raise UnsupportedBackendError(
            f"hf_gradclip.optim.{type(optimizer).__name__}(clip=..., update_clip=...) under GradClipTrainer or "
            "attach(): both would clip. Leave them out of the optimizer and say "
            "clip={'gradient': ..., 'update': ...} in the Trainer or attach()."
        )


def refuse_recovery(optimizer: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Stop where an update cannot be told from the weights.

    Raises:
        UnsupportedBackendError: by the optimizer's name, with what to use instead.
    """
    name = type(optimizer).__name__
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise UnsupportedBackendError(
            f"clipping updates of {name}: its weights of training and of evaluation move apart, and only those of "
            "training would be limited. Clip the gradient alone, or use AdamW."
        )
    low = sorted({str(dtype) for dtype in dtypes if dtype not in (torch.float32, torch.float64)})
    if low:
        raise UnsupportedBackendError(
            f"clipping updates of {name} on {', '.join(low)} weights: an update is smaller than their rounding. Use "
            "float32 weights with bf16=True (autocast), or an optimizer of hf_gradclip.optim."
        )
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise UnsupportedBackendError(
                f"clipping updates of {name}(lr=None): it makes its own learning rate, so the update is not known. Set "
                "lr (Adafactor: relative_step=False)."
            )
        if group.get("weight_decay") and group.get("scale_parameter"):
            raise UnsupportedBackendError(
                f"clipping updates of {name}(scale_parameter=True, weight_decay={group['weight_decay']}): the decay "
                "is scaled too, so the update is not known. Set scale_parameter=False or weight_decay=0."
            )
        if group.get("weight_decay") and _is_decoupled(optimizer, group) is None:
            raise UnsupportedBackendError(
                f"clipping updates of {name}(weight_decay={group['weight_decay']}): is the decay a part of the "
                "gradient or apart from it? Put decoupled_weight_decay=True or False into its parameter groups."
            )
