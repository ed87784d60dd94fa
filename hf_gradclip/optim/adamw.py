"""AdamW and Adam: an update from two moments, the second one in the denominator."""

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


class _Moments(ClippedOptimizer):
    """u = m_hat / (sqrt(v_hat) + eps)."""

    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> Motion:
        states, begun = self._states_of(params)
        for p, state in zip(params, states, strict=True):
            self._begin(p, state, group["amsgrad"])
        step_P = self._counters.of(params, states, self._reads)
        beta1, beta2 = map(float, group["betas"])
        rule = Rule(
            "adam",
            **self._numbers(group),
            past=beta1,
            fresh=1 - beta1,
            past2=beta2,
            fresh2=1 - beta2,
            eps=group["eps"],
            **self._counters.corrections(step_P, beta1, beta2, self._reads),
        )
        largest = "max_exp_avg_sq" if group["amsgrad"] else None
        memory = memory_of(params, states, ("exp_avg", "exp_avg_sq", largest))

        def done(made: Made) -> None:
            self.state.update(begun)
            count_(step_P, made)

        return Motion(rule, memory, done)

    def _begin(self, p: Tensor, state: dict[str, Any], amsgrad: bool) -> None:
        """Put in what a state lacks."""
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = self._zeros(p)
            state["exp_avg_sq"] = self._zeros(p)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = self._zeros(p)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("fused", None)
            group.setdefault("decoupled_weight_decay", self.defaults["decoupled_weight_decay"])


class AdamW(_Moments):
    """torch.optim.AdamW, arguments, state and arithmetic, with `clip=` and `update_clip=`.

    w <- w (1 - lr weight_decay) - lr clip(u), u = m_hat / (sqrt(v_hat) + eps). Weight decay is outside the clip.

    Args:
        params: parameters, groups of them, or named parameters.
        lr: learning rate; >= 0.
        betas: of the two moments; each in [0, 1).
        eps: added to the denominator; >= 0.
        weight_decay: decoupled, times lr; >= 0.
        amsgrad: use the largest second moment so far.
        maximize: ascend.
        foreach, capturable, differentiable, fused: as torch writes them into checkpoints; they choose nothing here.
        clip: for the gradients; see ClippedOptimizer.
        update_clip: for the updates; see ClippedOptimizer.

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip: Any = None,
        update_clip: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, clip, update_clip)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also with a state of Adam, as in torch


class Adam(_Moments):
    """torch.optim.Adam, arguments, state and arithmetic, with `clip=` and `update_clip=`.

    As AdamW, with weight decay added to the gradient after it was clipped, and so inside the update that
    `update_clip` limits, unless `decoupled_weight_decay`.

    Args:
        params: parameters, groups of them, or named parameters.
        lr: learning rate; >= 0.
        betas: of the two moments; each in [0, 1).
        eps: added to the denominator; >= 0.
        weight_decay: times the weight, added to the gradient; >= 0.
        amsgrad: use the largest second moment so far.
        foreach, capturable, differentiable, fused: as torch writes them into checkpoints; they choose nothing here.
        maximize: ascend.
        decoupled_weight_decay: decay the weights as AdamW does.
        clip: for the gradients; see ClippedOptimizer.
        update_clip: for the updates; see ClippedOptimizer.

    References:
        Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        clip: Any = None,
        update_clip: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, clip, update_clip)
