"""RMSprop: the gradient over the root of a moving average of its squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_gradclip.kernels.rule import Rule
from hf_gradclip.optim.counters import count_
from hf_gradclip.optim.groups import memory_of
from hf_gradclip.optim.optimizer import ClippedOptimizer
from hf_gradclip.optim.step import Made, Motion


class RMSprop(ClippedOptimizer):
    """torch.optim.RMSprop, arguments, state and arithmetic, with `clip=`, `update_clip=` and `bias_correction=`.

    w <- w - lr clip(u), u = g / (sqrt(v) + eps), or a momentum buffer of it. v starts at 0 and is not corrected for it,
    so the first update is sign(g) / sqrt(1 - alpha): 10 times a usual one for 0.99, and 3.2 times after ten steps. An
    update clip binds there; `bias_correction=True` removes it by v / (1 - alpha^t).

    Args:
        params: parameters, groups of them, or named parameters.
        lr: learning rate; >= 0.
        alpha: weight of the past in the average of squares; in [0, 1).
        eps: added to the denominator; >= 0.
        weight_decay: times the weight, added to the gradient after it was clipped; >= 0.
        momentum: of the normalised gradient; >= 0.
        centered: subtract the square of the average gradient from the average of squares.
        capturable, foreach, differentiable: as torch writes them into checkpoints; they choose nothing here.
        maximize: ascend.
        bias_correction: divide v by 1 - alpha^t, as Adam does; not with `centered`. torch's has no such option.
        clip: for the gradients; see ClippedOptimizer.
        update_clip: for the updates; see ClippedOptimizer.

    References:
        Hinton, "Neural Networks for Machine Learning", lecture 6, 2012; Graves, 2013, arXiv 1308.0850 (centered).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        bias_correction: bool = False,
        clip: Any = None,
        update_clip: Any = None,
    ) -> None:
        if centered and bias_correction:
            raise ValueError(
                "RMSprop(centered=True, bias_correction=True): the variance of the first gradient is 0, so the first "
                "update would be g / eps. Leave one of them out."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, clip, update_clip)

    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> Motion:
        states, begun = self._states_of(params)
        for p, state in zip(params, states, strict=True):
            self._begin(p, state, group)
        step_P = self._counters.of(params, states, self._reads)
        alpha = float(group["alpha"])
        corrected = group["bias_correction"]
        corrections = self._counters.corrections(step_P, 0.0, alpha, self._reads) if corrected else {}
        rule = Rule(
            "rmsprop",
            **self._numbers(group),
            past=group["momentum"],
            past2=alpha,
            fresh2=1 - alpha,
            eps=group["eps"],
            **corrections,
        )
        mean = "grad_avg" if group["centered"] else None
        buffer = "momentum_buffer" if group["momentum"] != 0 else None
        memory = memory_of(params, states, ("square_avg", mean, buffer))

        def done(made: Made) -> None:
            self.state.update(begun)
            count_(step_P, made)

        return Motion(rule, memory, done)

    def _begin(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Put in what a state lacks."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["square_avg"] = self._zeros(p)
        if group["momentum"] > 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = self._zeros(p)
        if group["centered"] and "grad_avg" not in state:
            state["grad_avg"] = self._zeros(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("momentum", 0)
            group.setdefault("centered", False)
            group.setdefault("bias_correction", self.defaults["bias_correction"])
