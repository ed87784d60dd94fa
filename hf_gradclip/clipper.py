"""Measure once, decide on a small vector, apply once: the step that every integration runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_gradclip import kernels
from hf_gradclip.config import Clip, ClipConfig
from hf_gradclip.decision import CLIP, LEAVE, NONFINITE, SKIP, Decision, Measure, Outcome, Taker, as_loss, judge
from hf_gradclip.exempt import exempt, idle, refuse_idle
from hf_gradclip.fold import Fold
from hf_gradclip.guard import Guard, NonFiniteError, largest_of
from hf_gradclip.misuse import insist_on_model, insist_on_parts, is_scaling
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.report import ClipReport
from hf_gradclip.say import is_first, logger
from hf_gradclip.seat import brought, seen_by
from hf_gradclip.settings import LoopSettings, split
from hf_gradclip.state import begun, packed, unpacked
from hf_gradclip.strategy import State, name_of, parts_of
from hf_gradclip.suits import refuse_in_a_loop, refuse_unsuited
from hf_gradclip.types import Layout
from hf_gradclip.views import view_of
from hf_gradclip.views.view import View
from hf_gradclip.watching import Events

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CLIP", "LEAVE", "NONFINITE", "SKIP", "Clipper", "Decision", "NonFiniteError", "Outcome"]


class Clipper:
    """Clips the gradients that a view shows, by the strategy of a configuration, and keeps the strategy's state.

    In a plain torch loop::

        clipper = Clipper.for_model(model, "adaptive")
        loss.backward()
        norm = clipper.step()
        optimizer.step()

    The same clipper clips updates: shown in the place of the gradients (run/weight_difference.py), or measured by an
    optimizer and given to `decide`.

    Args:
        config: what to do; of it `update` is not looked at, see `ClipConfig.of_update`.
        view: where the gradients are.
        prefix: of the keys of a report; an attribute too.
        squared: whether somebody may keep squares of what is clipped, as Adam does of gradients; an attribute too.

    Attributes:
        steps: how many were decided on since this was made or reset.
        recorder: is given every step, where somebody has put one here.
        withheld: set where no optimizer will be called for a step that is skipped; its gradients stay then.

    Raises:
        UnsupportedBackendError, SpecError: see `refuse_unsuited` and `refuse_idle`.
    """

    def __init__(
        self,
        config: ClipConfig,
        view: View = None,  # type: ignore[assignment]
        prefix: str = "clip",
        squared: bool = True,
    ) -> None:
        insist_on_parts(config, view)
        self.config = config
        self._show(view)
        self.withheld = False
        self.recorder: Recorder | None = None
        self._fold: Fold | None = None
        self.events = Events(config)
        self.prefix, self.squared = prefix, squared
        self.reset()

    @classmethod
    def for_model(
        cls,
        model: nn.Module | list[tuple[str, nn.Parameter]],
        spec: Clip = "adaptive",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: Any = None,
        **settings: Unpack[LoopSettings],
    ) -> Clipper:
        """A clipper for the `.grad` of a model's trainable parameters.

        Args:
            model: any module, wrapped by DDP or torch.compile or not, sharded by FSDP2 or tensor parallelism or not.
            spec: see hf_gradclip.config.
            optimizer: which `fold=True`, `skip_sync=False` and `after_spike="lower_rate"` need, and nothing else does.
            scaler: your GradScaler, if there is one; an overflow is then its own, and no skip that counts.
            **settings: `nonfinite`, `max_consecutive_skips`, `fold`, `skip_sync`, `after_spike`, which win over the
                spec; `on_spike`, `on_skip` and `on_nonfinite`, functions of an Event.

        Raises:
            TypeError: for something else than a model, or than a function; for an unknown keyword.
            SpecError: for a wrong spec; for one with an `update`, which only the optimizer can clip.
            UnsupportedBackendError: where `fold=True` or `skip_sync=False` cannot be exact.
            ValueError: if nothing is trainable.
        """
        insist_on_model(model)
        of_config, handlers = split(settings)
        config = ClipConfig.parse(spec, **of_config)
        refuse_in_a_loop(config, optimizer)
        clipper = cls(config, view_of(model, guarded=is_scaling(scaler)))
        clipper.events.hear(handlers)
        clipper.events.hold([optimizer] if optimizer is not None else [])
        if config.fold or not config.skip_sync:
            clipper.fold_into(optimizer)
        return clipper

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was left out; with `skip_sync=False` this is a host read."""
        return bool(self._skipped)

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
        if self._fold is not None:
            self._fold.let_go()
        self._fold = Fold(optimizer, self.view, config.gradient, scale=config.fold, skip=not config.skip_sync)

    def let_go(self) -> None:
        """Leave the optimizers as they would be: none takes a coefficient or a flag, and no rate is lowered."""
        if self._fold is not None:
            self._fold.let_go()
            self._fold = None
        self.events.let_go()

    def _show(self, view: View) -> None:
        """Take a view, divided as the strategy needs it."""
        refuse_unsuited(self.config.gradient, view)
        if (units := self.config.gradient.needs.units) is not None:
            view.divide(units)
        refuse_idle(self.config.gradient, view)
        self.view = view

    def turn_to(self, view: View) -> None:
        """Clip what another view shows from now on. The strategy starts anew; report, events and counts go on.

        Raises:
            UnsupportedBackendError, SpecError: as where a clipper is made.
        """
        self._show(view)
        self._go_on(view.layout)

    def reset(self) -> None:
        """Forget everything: the strategy's state, the counters, the report."""
        self.steps = 0
        self.events.forget()
        layout = self.view.layout
        self.guard = Guard(self.config, layout.device, self.view.guarded, math.inf)
        self._start_anew(layout)
        self.report = ClipReport(self._layout.by_param.device, self._layout.dtype, self.prefix, self.events.look)

    def _start_anew(self, layout: Layout) -> None:
        """Forget what was learnt of other parameters; the report and the guard know the run so far."""
        self._measured = layout
        largest = largest_of(self.view.watched()) if self.squared else math.inf
        self.guard.follow(layout.device, self.view.guarded, largest)
        self._layout = self.seen(layout)
        self.state: State = begun(self.config.gradient, self._layout)
        self._skipped: bool | Tensor = False

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration. The strategy starts anew, the report goes on."""
        self.config = self.events.config = config
        self.guard.adopt(config, self.view.guarded)
        self._layout = self.seen(self._measured)
        self.report.move_to(self._layout.by_param.device, self._layout.dtype)
        self.state = begun(config.gradient, self._layout)

    def seen(self, layout: Layout) -> Layout:
        """What the strategy sees in the place of a layout of the view: the same, or parts of it, on the host."""
        strategy = self.config.gradient
        asked = self.guard.must_read or any(part.skips for part in parts_of(strategy))
        return seen_by(strategy, layout, asked and self.config.skip_sync)

    def __repr__(self) -> str:
        words = exempt(self.config.gradient, self.view)
        return f"Clipper({self.config}, {self.view.backend}, {len(self._layout)} segments{words and ', '}{words})"

    def step(self, loss: Tensor | float | None = None, to: Taker | None = None) -> Tensor:
        """Clip the gradients, between backward and `optimizer.step()`.

        Args:
            loss: of this step, 0-d or a number, for strategies that judge it; the same on every rank.
            to: an optimizer that clips as it reads, and leaves the gradients alone; None writes them.

        Returns:
            The 2-norm of the whole gradient before clipping, 0-d, on the device.

        Raises:
            NonFiniteError: by policy "raise", or after `max_consecutive_skips` skipped steps in a row.
        """
        outcome = self.settle(self.decide(loss))
        self.apply_(outcome, to)
        return outcome.norm

    @torch.no_grad()
    def decide(
        self,
        loss: Tensor | float | None = None,
        measure: Measure | None = None,
        rescale: bool = False,
        void: Tensor | None = None,
    ) -> Decision:
        """Measure and decide; keep the strategy's new state where the norm is finite. On a device without a host read.

        Args:
            loss: see `step`.
            measure: gives the statistics, reduced over ranks, of what is to be clipped; None takes the view's.
            rescale: see View.measure; done in every step where nobody reads whether a square overflowed.
            void: see Decision; only with `skip_sync=False`.

        Raises:
            ValueError: if the strategy judges the loss and none is given.
        """
        strategy = self.config.gradient
        measure = self.view.measure if measure is None else measure
        rescale = rescale or (not self.config.skip_sync and kernels.squares_overflow(self._layout.device))
        stats = measure(strategy.needs, rescale)
        layout = stats.layout
        if layout is not self._measured:
            self._follow(layout)
        if strategy.needs.loss:
            stats = replace(stats, loss=as_loss(loss, layout, strategy))
        stats = brought(strategy, stats, self._layout)
        plan, found, self.state = judge(strategy, stats, self.state, void, self.guard.largest)
        return Decision(stats, plan, found, measure, layout.device, void)

    def settle(self, decision: Decision) -> Outcome:
        """Read the action where it matters, guard against non-finite norms, count the step; raises as `step` does."""
        self.steps += 1
        if not self.config.skip_sync:
            return self._settle_unread(decision)
        needed = self.guard.must_read or decision.plan.skip is not None
        if isinstance(decision.found, Tensor) and not needed:  # the plan is exact, whatever the action is
            self._count(decision, decision.found, ~decision.found if self.view.guarded else False)
            self._skipped = False
            return decision.outcome(decision.plan)
        action = int(decision.action)  # the one host read of a step, unless `brought` was it
        if action == NONFINITE and bool(decision.stats.total.isinf()):  # only the squares may have overflowed
            again = self.decide(decision.stats.loss, decision.measure, rescale=True)
            if bool(again.stats.total < math.inf):
                decision, action = again, int(again.action)
        told = self.events.judged(action, decision.stats, self.view) if self.events.kinds else action
        if told in (SKIP, NONFINITE):
            by = name_of(self.config.gradient) if told == action else "a handler"
            return self._leave_out(decision, told, by, finite=action != NONFINITE)
        self._skipped, self.guard.skips_in_a_row = False, 0
        self._count(decision, finite=True, skipped=False, clipped=decision.clipped_by(action))
        return decision.outcome(decision.plan if action == CLIP else None)

    def _leave_out(self, decision: Decision, action: int, by: str, finite: bool) -> Outcome:
        """A step that is skipped, as somebody asked for, or whose NaN or inf is passed on."""
        overflow = action == NONFINITE and self.view.guarded  # the loss scaler's, which has a limit of its own
        self._skipped = skipped = overflow or self.guard.skips(action)
        self._count(decision, finite=finite, skipped=skipped, clipped=False)
        if not overflow:
            self.guard.insist(action, decision.stats, self.steps, by)
        return decision.outcome(skipped=skipped, drop=skipped and not overflow and not self.withheld)

    def _settle_unread(self, decision: Decision) -> Outcome:
        """The optimizer reads the flag itself: count on the device, and look at the limit now and then."""
        self._skipped = skip = self.guard.skips_unread(decision)
        self._count(decision, decision.counted, skip)
        self.guard.look_now_and_then()
        return decision.outcome(decision.plan, skip=skip)

    def apply_(self, outcome: Outcome, to: Taker | None = None) -> None:
        """Do to the view's gradients what is left of a step: scale and bound them, hand it over, or drop them."""
        if self._fold is not None:
            self._fold.hand(outcome)
        if to is not None:
            to.take(outcome.plan, self.view)
        if outcome.drop:
            self.view.drop_()
        elif to is None and outcome.plan is not None and not self.config.fold:
            self.view.apply_(outcome.plan)

    def check_skips(self) -> None:
        """With `skip_sync=False`, stop, as `step` does, if too many steps in a row were skipped. One host read."""
        if not self.config.skip_sync:
            self.guard.look()

    def count_overflow(self) -> None:
        """Count a step that a loss scaler dropped before anything was measured."""
        self._skipped, self.steps = True, self.steps + 1
        self.report.add_overflow()
        self.events.pass_over()
        if self.recorder is not None:
            self.recorder.add_overflow(self._layout.by_param)

    def _count(
        self, decision: Decision, finite: Tensor | bool, skipped: Tensor | bool, clipped: bool | None = None
    ) -> None:
        self.report.add(decision.stats, decision.plan, finite, skipped, clipped)
        if self.events.kinds and isinstance(finite, Tensor):
            self.events.keep(decision.stats, finite, skipped, self.view.guarded)
        if self.recorder is not None:
            self.recorder.add(decision.stats, decision.plan, finite, skipped)

    def _follow(self, layout: Layout) -> None:
        """Start the strategy anew for other parameters, and say which."""
        strategy = name_of(self.config.gradient)
        logger.warning("%s: the statistics of %s start anew.", layout.changed_from(self._measured), strategy)
        self._go_on(layout)
        if self._fold is not None:
            self._fold.insist(self.view)
        if words := idle(self.config.gradient, self.view):
            logger.warning(words)

    def _go_on(self, layout: Layout) -> None:
        self._start_anew(layout)
        self.report.move_to(self._layout.by_param.device, self._layout.dtype)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, on the CPU, loadable with `weights_only=True`; keyed by parameter name.

        Events that nobody has read yet are told first, so that the state has every step.
        """
        self.events.look()
        kept = packed(self.config.gradient, self._layout, self.state, self.guard.in_a_row())
        return {**kept, **self.events.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> str:
        """Take the state of a checkpoint, bit for bit, or start anew. Why is said in a warning on the first process.

        Returns:
            "" if the state was taken as it is, else the sentence that was said.
        """
        words = self.take_state(saved)
        if words and is_first():
            logger.warning("%s: %s", self.prefix, words)
        return words

    def take_state(self, saved: dict[str, Any]) -> str:
        """The same for whoever says the sentence: `load_state_dict` without the warning."""
        state, words = unpacked(saved, self.config.gradient, self._layout)
        if state is None:
            self.reset()
        else:
            self.state = state
            self.guard.go_on(int(saved.get("skips_in_a_row", 0)))
        self.events.load_state_dict(saved)
        return words
