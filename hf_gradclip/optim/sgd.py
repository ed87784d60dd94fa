"""SGD: the gradient, or momentum, heavy-ball or Nesterov's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_gradclip.kernels.rule import Rule
from hf_gradclip.optim.groups import memory_of
from hf_gradclip.optim.optimizer import ClippedOptimizer
from hf_gradclip.optim.step import Made, Motion


class SGD(ClippedOptimizer):
    """torch.optim.SGD, arguments, state and arithmetic, with `clip=` and `update_clip=`.

    w <- w - lr clip(u), u = b with b <- momentum b + (1 - dampening) g, or g + momentum b for Nesterov. With clipped
    gradients of norm c a step is at most lr c / (1 - momentum) long, with clipped updates lr c.

    Args:
        params: parameters, groups of them, or named parameters.
        lr: learning rate; >= 0.
        momentum: weight of the past; >= 0.
        dampening: of the gradient's share in the momentum.
        weight_decay: times the weight, added to the gradient after it was clipped; >= 0.
        nesterov: look ahead; needs momentum > 0 and dampening 0.
        maximize: ascend.
        foreach, differentiable, fused: as torch writes them into checkpoints; they choose nothing here.
        clip: for the gradients; see ClippedOptimizer.
        update_clip: for the updates; see ClippedOptimizer.

    Raises:
        ValueError: for nesterov without momentum, or with dampening.

    References:
        Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep learning", 2013.
    """

    squares = False  # momentum is of the gradient itself

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        clip: Any = None,
        update_clip: Any = None,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"SGD(nesterov=True, momentum={momentum}, dampening={dampening}): needs momentum > 0 and dampening = 0."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, clip, update_clip)
        for group in self.param_groups:
            self._insist(group)

    def _insist(self, group: dict[str, Any]) -> None:
        """The first momentum is the gradient, and nobody on the host may know which step is the first.

        Raises:
            ValueError: where it is not the momentum after 0, too.
        """
        if group["momentum"] and group["dampening"] and not self._reads:
            raise ValueError(
                f"SGD(momentum={group['momentum']}, dampening={group['dampening']}) with skip_sync=False: where the "
                "first step is skipped, with dampening the momentum cannot begin at 0. Set dampening=0, or use "
                "skip_sync=True."
            )

    def _rule(self, group: dict[str, Any], params: list[Tensor]) -> Motion:
        numbers = self._numbers(group)
        self._insist(group)
        if group["momentum"] == 0:
            memory = memory_of(params, [{}] * len(params), (None, None, None))
            return Motion(Rule("sgd", **numbers), memory, lambda _: None)
        fresh = [self.state[p].get("momentum_buffer") is None for p in params]
        buffers = [
            self._zeros(p) if new else self.state[p]["momentum_buffer"] for p, new in zip(params, fresh, strict=True)
        ]

        def keep(made: Made) -> None:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

        gain = 1 - float(group["dampening"])
        rule = Rule(
            "nesterov" if group["nesterov"] else "sgd",
            **numbers,
            past=group["momentum"],
            terms=None if gain == 1 else [(1.0 if new else gain, 1.0) for new in fresh],
        )
        memory = memory_of(params, [{"momentum_buffer": b} for b in buffers], ("momentum_buffer", None, None))
        return Motion(rule, memory, keep)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)
            group.setdefault("fused", None)
