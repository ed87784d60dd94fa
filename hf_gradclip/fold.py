"""Hand a step's coefficient and skip flag to a fused optimizer, instead of writing gradients or reading a flag.

torch's fused optimizers read two attributes that `GradScaler` sets on them: they divide every gradient by `grad_scale`
as they read it, and do nothing at all where `found_inf` is 1. Both stay on the device.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from hf_gradclip.decision import Outcome
from hf_gradclip.device import number_on
from hf_gradclip.strategy import SpecError, Strategy, name_of, parts_of
from hf_gradclip.views.view import UnsupportedBackendError, View

FUSED = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)


class Fold:
    """The coming step of one fused optimizer. What is handed over is taken back after every step.

    Args:
        optimizer: torch's fused AdamW, Adam, SGD or Adagrad, or for `skip` alone one of hf_gradclip.optim, which
            `heed`s it; over all parameters of the view.
        view: where the gradients are.
        strategy: what decides.
        scale: hand over the coefficient; else the gradients are written as usual.
        skip: hand over the skip flag; else a skipped step has no gradients.

    Raises:
        SpecError: for a strategy whose plan is not one number, or without an optimizer.
        UnsupportedBackendError: for another optimizer, or where something else sets the two attributes.
    """

    def __init__(self, optimizer: Any, view: View, strategy: Strategy, scale: bool, skip: bool) -> None:
        self.scale = scale
        self.skip = skip
        self._refuse(optimizer, view, strategy)
        self._optimizer = weakref.ref(optimizer)
        self._device = view.layout.device
        self._hook = None if _heeds(optimizer) else optimizer.register_step_post_hook(_take_back)

    def let_go(self) -> None:
        """Leave the optimizer as it would be."""
        if self._hook is not None:
            self._hook.remove()
            _take_back(self._optimizer())

    def hand(self, outcome: Outcome) -> None:
        """Give the optimizer what this step needs."""
        skip = outcome.skip
        scale = outcome.plan.scale_S if outcome.plan is not None else torch.ones_like(outcome.norm)
        if self.scale and scale.ndim:
            raise SpecError("fold=True: the strategy gave a scale per parameter, where one number is needed.")
        if (optimizer := self._optimizer()) is None:
            return  # nobody is left to step
        if self.scale:
            optimizer.grad_scale = number_on(self._device, scale.reciprocal().float())
        if self.skip and skip is not None and _heeds(optimizer):
            optimizer.heed(skip)
        elif self.skip and skip is not None:
            _start_momentum(optimizer)
            optimizer.found_inf = skip.float()

    def _refuse(self, optimizer: Any, view: View, strategy: Strategy) -> None:
        word = "fold=True" if self.scale else "skip_sync=False"
        instead = "fold=False" if self.scale else "skip_sync=True"
        if self.scale:
            for part in (strategy, *parts_of(strategy)):
                if part.per_parameter or part.bounds:
                    raise SpecError(
                        f"fold=True with {name_of(part)}: a fused optimizer takes one number for all gradients. "
                        "Use a strategy of the whole gradient (adaptive_norm, global_norm), or fold=False."
                    )
        if optimizer is None:
            raise SpecError(f"{word}: needs the optimizer. Write Clipper.for_model(model, spec, optimizer=optimizer).")
        kind = type(optimizer)
        fused = kind in FUSED and all(group.get("fused") for group in optimizer.param_groups)
        if not fused and (self.scale or not _heeds(optimizer)):
            known = ", ".join(cls.__name__ for cls in FUSED)
            ours = "" if self.scale else ", or one of hf_gradclip.optim"
            raise UnsupportedBackendError(
                f"{word} with {kind.__module__}.{kind.__qualname__}: must be torch.optim's {known} with fused=True "
                f"(optim='adamw_torch_fused' in the Trainer){ours}, which read it on the device. Use {instead}."
            )
        if self.skip and any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
            raise UnsupportedBackendError(
                f"{word} with SGD(momentum=..., dampening=...): where the first step is skipped, with dampening the "
                f"momentum cannot begin at 0. Set dampening=0, or use {instead}."
            )
        if view.guarded:
            raise UnsupportedBackendError(
                f"{word} under a GradScaler: it skips steps by a flag of its own. Use bf16, or {instead}."
            )
        self._insist(optimizer, view)

    def insist(self, view: View) -> None:
        """Look again where other parameters are trained now.

        Raises:
            UnsupportedBackendError: if the optimizer does not hold all of them.
        """
        if (optimizer := self._optimizer()) is not None:
            self._insist(optimizer, view)

    def _insist(self, optimizer: Any, view: View) -> None:
        word, instead = ("fold=True", "fold=False") if self.scale else ("skip_sync=False", "skip_sync=True")
        mine = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        theirs = {id(p) for p in view.watched()}
        if mine != theirs:
            raise UnsupportedBackendError(
                f"{word}: the optimizer steps {len(mine)} parameters and the gradient is of {len(theirs)}. One "
                f"optimizer must hold all trainable parameters. Use {instead}."
            )


def _heeds(optimizer: Any) -> bool:
    """Whether an optimizer is given the flag by a call, and not by attributes that torch's kernels read."""
    return hasattr(optimizer, "heed")


def _start_momentum(optimizer: Any) -> None:
    """Let momentum begin at 0, which is what torch's first step makes of it: one that is skipped there leaves it as
    whatever was in the memory."""
    if type(optimizer) is torch.optim.SGD:
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _take_back(optimizer: Any, *_: Any) -> None:
    for name in ("grad_scale", "found_inf"):
        if hasattr(optimizer, name):
            delattr(optimizer, name)
