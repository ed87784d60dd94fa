"""Measure once, decide on a small vector, apply once: the step that every integration runs."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_gradclip.config import ClipConfig
from hf_gradclip.fold import Fold
from hf_gradclip.kernels.graphed import Graphed
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.report import ClipReport
from hf_gradclip.strategy import SpecError, State, Strategy, describe, flatten, name_of, parts_of, unflatten, where
from hf_gradclip.types import ClipPlan, NormStats
from hf_gradclip.views import view_of
from hf_gradclip.views.view import GradientView, UnsupportedBackendError

logger = logging.getLogger("hf_gradclip")

LEAVE, CLIP, SKIP, NONFINITE = range(4)


class NonFiniteError(RuntimeError):
    """The gradient norm is NaN or inf, and the policy or the limit says to stop."""


@dataclass(frozen=True)
class Decision:
    """What one step will do. All tensors are on the device.

    Args:
        stats: what was measured.
        plan: what to do; it touches nothing where the norm is not finite.
        finite: whether the total norm is finite, 0-d bool.
        action: LEAVE, CLIP, SKIP or NONFINITE, 0-d int64: the one number that a step may read.
        local: what the caller measured of this process, instead of the view.
    """

    stats: NormStats
    plan: ClipPlan
    finite: Tensor
    action: Tensor
    local: NormStats | None = None


class Clipper:
    """Clips the gradients that a view shows, by the strategy of a configuration, and keeps the strategy's state.

    In a plain torch loop::

        clipper = Clipper.for_model(model, "adaptive")
        loss.backward()
        norm = clipper.step()
        optimizer.step()

    The same clipper clips updates, where an optimizer has written them in the place of the gradients.

    Args:
        config: what to do; of it `update` is not looked at, see `ClipConfig.of_update`.
        view: where the gradients are.
        prefix: of the keys of the report.

    Attributes:
        recorder: is given every step, where somebody has put one here.

    Raises:
        UnsupportedBackendError: for a strategy by parameter where only the whole gradient is known.
    """

    def __init__(self, config: ClipConfig, view: GradientView, prefix: str = "clip") -> None:
        if view.whole_only:
            for part in parts_of(config.gradient):
                if part.per_parameter:
                    raise UnsupportedBackendError(
                        f"{name_of(part)} under FSDP1: its flat shards do not follow the parameters, so only the norm "
                        "of the whole gradient is known. Use FSDP2 (fsdp_version: 2), or zclip, global_norm or value."
                    )
        if (units := config.gradient.needs.units) is not None:
            view.divide(units)
        self.config = config
        self.view = view
        self.step_was_skipped = False
        self.recorder: Recorder | None = None
        self._prefix = prefix
        self._fold: Fold | None = None
        self._judge = Graphed(functools.partial(judge, config.gradient))
        self.reset()

    @classmethod
    def for_model(cls, model: nn.Module, spec: Any = "adaptive", *, optimizer: Any = None, **settings: Any) -> Clipper:
        """A clipper for the `.grad` of a model's trainable parameters.

        Args:
            model: any module, wrapped by DDP or torch.compile or not, sharded by FSDP2 or tensor parallelism or not.
            spec: see hf_gradclip.config.
            optimizer: which `fold=True` and `skip_sync=False` need, and nothing else does.
            **settings: `nonfinite`, `max_consecutive_skips`, `fold`, `skip_sync`; they win over the spec.

        Raises:
            SpecError: for a wrong spec; for one with an `update`, which only the optimizer can clip.
            UnsupportedBackendError: where `fold=True` or `skip_sync=False` cannot be exact.
            ValueError: if nothing is trainable.
        """
        config = ClipConfig.parse(spec, **settings)
        if config.update is not None:
            raise SpecError(
                f"Clipper.for_model(..., {describe(config.gradient)!r} with update={describe(config.update)!r}): an "
                "update is known to the optimizer only. Give hf_gradclip.optim.AdamW(..., update_clip=...), or use "
                "GradClipTrainer or attach()."
            )
        for word in ("record", "histogram_every"):
            if getattr(config, word):
                raise SpecError(
                    f"Clipper.for_model(..., {word}={getattr(config, word)!r}): there is no run here that could write "
                    f"it. Leave {word} out and log `clipper.report.scalars()`, or use GradClipTrainer or attach()."
                )
        clipper = cls(config, view_of(model))
        if config.fold or not config.skip_sync:
            clipper.fold_into(optimizer)
        return clipper

    @property
    def folds(self) -> bool:
        """Whether an optimizer takes numbers from this clipper."""
        return self._fold is not None

    def fold_into(self, optimizer: Any) -> None:
        """Let a fused optimizer take the coefficient (`fold=True`) and the skip flag (`skip_sync=False`).

        Raises:
            SpecError: for a strategy whose plan is not one number.
            UnsupportedBackendError: for an optimizer that cannot.
        """
        config = self.config
        self._fold = Fold(optimizer, self.view, config.gradient, scale=config.fold, skip=not config.skip_sync)

    def reset(self) -> None:
        """Forget everything: the strategy's state, the counters, the report."""
        self._layout = self.view.layout
        self.state: State = self.config.gradient.init(self._layout)
        self.report = ClipReport(self._layout.device, self._layout.dtype, self._prefix)
        self._skips_in_a_row = 0
        self._unread_skips = self._most_skips = torch.zeros((), dtype=torch.int64, device=self._layout.device)
        self.step_was_skipped = False

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration. The strategy starts anew, the report goes on."""
        self.config = config
        self.state = config.gradient.init(self._layout)
        self._judge = Graphed(functools.partial(judge, config.gradient))

    def __repr__(self) -> str:
        return f"Clipper({self.config}, {self.view.backend}, {len(self._layout)} segments)"

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> Tensor:
        """Clip the gradients, between backward and `optimizer.step()`.

        Args:
            loss: of this step, 0-d, for strategies that judge it; the same on every rank.

        Returns:
            The 2-norm of the whole gradient before clipping, 0-d, on the device.

        Raises:
            NonFiniteError: by policy "raise", or after `max_consecutive_skips` skipped steps in a row.
        """
        decision, action = self.settle(self.decide(loss=loss))
        if self._fold is not None:
            self._fold.hand(decision.plan, self._to_skip(decision))
        if action == CLIP and not self.config.fold:
            self.view.apply_(decision.plan)
        else:
            self._drop_skipped(action)
        return decision.stats.total

    @torch.no_grad()
    def plan(self, loss: Tensor | None = None, local: NormStats | None = None) -> ClipPlan:
        """`step` for an optimizer that clips as it reads: decides, counts, drops what is skipped, and writes nothing.

        Args:
            loss: as for `step`.
            local: what was measured of this process, with `max_abs_S`; None measures the gradients.

        Returns:
            What is still to do.

        Raises:
            NonFiniteError: as `step`.
        """
        decision, action = self.settle(self.decide(loss=loss, local=local))
        if action == CLIP:
            return decision.plan
        self._drop_skipped(action)
        return ClipPlan(torch.ones_like(decision.stats.total))

    def _drop_skipped(self, action: int) -> None:
        if self.step_was_skipped and (action == SKIP or not self.view.guarded):
            self.view.drop_()

    @torch.no_grad()
    def decide(self, rescale: bool = False, loss: Tensor | None = None, local: NormStats | None = None) -> Decision:
        """Measure and decide; keep the new state where the norm is finite. No host read.

        Args:
            rescale: see GradientView.measure.
            loss: see `step`.
            local: see `plan`.

        Raises:
            ValueError: if the strategy judges the loss and none is given.
        """
        layout = self.view.layout
        if layout is not self._layout:
            logger.warning(
                "The set of trainable parameters changed from %d to %d: the statistics of %s start anew.",
                len(self._layout.names),
                len(layout.names),
                name_of(self.config.gradient),
            )
            self.reset()
        needs = self.config.gradient.needs
        if local is None:
            stats = self.view.measure(needs, rescale)
        else:
            stats = self.view.reduce(local if needs.max_abs or rescale else replace(local, max_abs_S=None))
        if needs.loss:
            if loss is None:
                raise ValueError(
                    f"{describe(self.config.gradient)} judges the loss: call clipper.step(loss=loss). "
                    "Trainer and attach() do so by themselves."
                )
            stats = replace(stats, loss=loss.detach().to(device=layout.device, dtype=layout.dtype))
        plan, finite, action, self.state = self._judge(stats, self.state)
        return Decision(stats, plan, finite, action, local)

    def settle(self, decision: Decision) -> tuple[Decision, int]:
        """Read the action where it matters, guard against non-finite norms, count the step.

        Returns:
            The decision (measured again if only the squares had overflowed) and its action; CLIP where the action
            need not be read, since the plan is then exact without it.
        """
        guarded = self.view.guarded
        if not self.config.skip_sync:
            return decision, self._settle_unread(decision)
        on_cpu = decision.action.device.type == "cpu"
        policy_reads = self.config.nonfinite != "pass" and not guarded
        if not (on_cpu or policy_reads or decision.plan.skip is not None):
            self._count(decision, skipped=~decision.finite if guarded else torch.zeros_like(decision.finite))
            self.step_was_skipped = False
            return decision, CLIP

        action = int(decision.action)  # the one host read of a step
        if action == NONFINITE:
            again = self.decide(rescale=True, loss=decision.stats.loss, local=decision.local)
            if (action := int(again.action)) != NONFINITE:
                decision = again
        passed = action == NONFINITE and self.config.nonfinite == "pass" and not guarded
        self.step_was_skipped = action in (SKIP, NONFINITE) and not passed
        self._count(decision, skipped=torch.full_like(decision.finite, self.step_was_skipped))
        if action != NONFINITE or not guarded:
            self._guard(decision, action)
        return decision, action

    def _settle_unread(self, decision: Decision) -> int:
        """The optimizer reads the flag itself: count on the device; `check_skips` looks at the limit."""
        skipped = self._to_skip(decision)
        self._count(decision, skipped)
        self._unread_skips = torch.where(skipped, self._unread_skips + 1, 0)
        self._most_skips = torch.maximum(self._most_skips, self._unread_skips)
        self.step_was_skipped = False
        return CLIP

    def _to_skip(self, decision: Decision) -> Tensor:
        """Whether the optimizer must not step, 0-d bool, on the device."""
        return decision.action == SKIP if self.config.nonfinite == "pass" else decision.action >= SKIP

    def check_skips(self) -> None:
        """With `skip_sync=False`, stop if too many steps in a row were skipped since the last call. One host read.

        Raises:
            NonFiniteError: after `max_consecutive_skips` skipped steps in a row.
        """
        if self.config.skip_sync:
            return
        most, self._most_skips = int(self._most_skips), self._unread_skips
        if most >= self.config.max_consecutive_skips:
            raise NonFiniteError(
                f"{most} steps in a row were skipped (max_consecutive_skips={self.config.max_consecutive_skips}) since "
                "the last look. No weight has moved in them. Lower the learning rate, look at the data, or raise it."
            )

    def _count(self, decision: Decision, skipped: Tensor) -> None:
        self.report.add(decision.stats, decision.plan, decision.finite, skipped)
        if self.recorder is not None:
            self.recorder.add(decision.stats, decision.plan, decision.finite, skipped)

    def count_overflow(self) -> None:
        """Count a step that a loss scaler dropped before anything was measured."""
        self.step_was_skipped = True
        self.report.add_overflow()
        if self.recorder is not None:
            self.recorder.add_overflow(self._layout)

    def _guard(self, decision: Decision, action: int) -> None:
        if action == NONFINITE and self.config.nonfinite == "raise":
            raise NonFiniteError(
                f"The gradient norm is {float(decision.stats.total)}, and nonfinite='raise'. "
                f"{_culprits(decision.stats)} Use nonfinite='skip' to leave such steps out."
            )
        self._skips_in_a_row = self._skips_in_a_row + 1 if self.step_was_skipped else 0
        if self._skips_in_a_row >= self.config.max_consecutive_skips:
            why = "a NaN or inf norm" if action == NONFINITE else f"{name_of(self.config.gradient)} asked for it"
            raise NonFiniteError(
                f"{self._skips_in_a_row} steps in a row were skipped (max_consecutive_skips="
                f"{self.config.max_consecutive_skips}), the last because of {why}. {_culprits(decision.stats)} "
                "No weight has moved since. Lower the learning rate, look at the data of these steps, or raise it."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, on the CPU, loadable with `weights_only=True`; keyed by parameter name."""
        return {
            "version": 1,
            "strategy": name_of(self.config.gradient),
            "spec": describe(self.config.gradient),
            "names": list(self._layout.names),
            "state": {key: value.detach().cpu().clone() for key, value in flatten(self.state).items()},
            "skips_in_a_row": self._skips_in_a_row,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> str:
        """Take the state of a checkpoint, bit for bit, or start anew and say why.

        Returns:
            "" if the state was taken as it is, else one sentence that says what happened instead.
        """
        spec, word = describe(self.config.gradient), name_of(self.config.gradient)
        if not {"spec", "strategy", "names", "state"} <= set(saved):
            self.reset()
            return f"The saved clip state cannot be read, so {word} starts anew."
        restart = self._restart(saved)
        if restart:
            self.reset()
            return restart
        flat = {key: value.clone() for key, value in saved["state"].items()}
        if saved["names"] != list(self._layout.names):
            place = {name: i for i, name in enumerate(saved["names"])}
            order = torch.tensor([place[name] for name in self._layout.names], device="cpu")
            flat = {key: value[order] if key.endswith("_S") else value for key, value in flat.items()}
        mine = flatten(self.state)
        flat = {key: value.to(device=mine[key].device, dtype=mine[key].dtype) for key, value in flat.items()}
        self.state = unflatten(self.state, flat)
        self._skips_in_a_row = int(saved.get("skips_in_a_row", 0))
        if saved["spec"] != spec:
            return f"The checkpoint was made with {saved['spec']}; its statistics go on under {spec}."
        return ""

    def _restart(self, saved: dict[str, Any]) -> str:
        """Why a saved state cannot be taken; "" if it can."""
        word, mine = describe(self.config.gradient), flatten(self.state)
        if set(saved["state"]) != set(mine) or saved["strategy"] != name_of(self.config.gradient):
            return f"The checkpoint's clip state is of {saved['spec']}, so {word} starts anew."
        if set(saved["names"]) != set(self._layout.names):
            return f"The checkpoint's clip state is of other trainable parameters, so {word} starts anew."
        by_unit = any(key.endswith("_S") and len(value) != len(self._layout.names) for key, value in mine.items())
        if by_unit and saved["names"] != list(self._layout.names):
            return f"The checkpoint's clip state is of the same parameters in another order, so {word} starts anew."
        if any(saved["state"][key].shape != value.shape for key, value in mine.items()):
            return f"The checkpoint's clip state is of {saved['spec']}, of another size, so {word} starts anew."
        return ""


def judge(strategy: Strategy, stats: NormStats, state: State) -> tuple[ClipPlan, Tensor, Tensor, State]:
    """A step's plan, whether its norm is finite, its action, and the state to keep; see Decision. Pure."""
    plan, new = strategy.update(stats, state)
    finite = stats.total < float("inf")  # a norm is not negative, and NaN is below nothing; isfinite is four launches
    scale_S = torch.where(finite, plan.scale_S, 1.0)
    bound_S = None if plan.bound_S is None else torch.where(finite, plan.bound_S, float("inf"))
    plan = replace(plan, scale_S=scale_S, bound_S=bound_S)
    action = plan.clipped_S.any()  # as a number LEAVE or CLIP
    if plan.skip is not None:
        action = torch.where(plan.skip, SKIP, action)
    return plan, finite, torch.where(finite, action, NONFINITE), where(finite, new, state)


def _culprits(stats: NormStats) -> str:
    """Which parameters hold a NaN or inf; reads to the host, on the way to an error."""
    broken = stats.layout.param_S[~stats.sumsq_S.isfinite()].unique().tolist()
    bad = [stats.layout.names[i] for i in broken]
    if not bad:
        return ""
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"Not finite: {', '.join(bad[:5])}{more}."
