"""Who is told of the events of a clipper's steps, and what they may ask for."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.config import ClipConfig
from hf_gradclip.decision import LEAVE, NONFINITE, SKIP
from hf_gradclip.events import KINDS, UNKNOWN, Event, Handler, Rows, SpikeLimitError
from hf_gradclip.lowered import Lowered
from hf_gradclip.outlier import DEVIATIONS, Past, judge, nothing_seen
from hf_gradclip.reactions import LowerRate, Stop, written
from hf_gradclip.say import logger
from hf_gradclip.types import Layout, NormStats
from hf_gradclip.views.view import View

TOP = 10
MOST_UNREAD = 1000
"""Steps that wait to be read at most."""
_OF_NOTHING = Layout.of_parameters((), [], torch.device("cpu"))


class Events:
    """Watches the steps of one clipper.

    In a step that somebody reads, handlers are called before its gradients are touched. In one that nobody may wait for
    (policy "pass", a loss scaler or `skip_sync=False`, on a device) they are called when the report is read.

    Args:
        config: with the policy, and what is done by itself.

    Attributes:
        kinds: what is looked for; where there are several processes, what any of them looks for.
        of: the name of the model, where there are several.
        config: see above.
        examples: gives the examples of the step that is decided on; None where they are not known.
        agree: makes of what this process asks for what any asks for, and tells whether a handler failed elsewhere;
            None for a process by itself.
        agree_late: whether that is so of an event that came late, too: where every process reads the report.
        obey: called after the handlers, on every process, with what was asked for.
    """

    def __init__(self, config: ClipConfig) -> None:
        self.config = config
        self._handlers: dict[str, list[Handler]] = {kind: [] for kind in KINDS}
        lower = next((r for r in config.after_spike if isinstance(r, LowerRate)), None)
        self._rate = None if lower is None else Lowered(lower)
        self._stop = next((r for r in config.after_spike if isinstance(r, Stop)), None)
        self.kinds: set[str] = {"on_spike"} if config.after_spike else set()
        self.of = ""
        self.examples: Callable[[], list[int] | str] | None = None
        self.agree: Callable[[set[str], bool], bool] | None = None
        self.agree_late = False
        self.obey: Callable[[Event], Any] | None = None
        self.forget()

    def forget(self) -> None:
        """Start anew, with the same handlers."""
        self._past = nothing_seen(_OF_NOTHING)
        self._unread: list[tuple[int, NormStats, Any, Any, bool]] = []
        self._spikes: deque[int] = deque()
        self._step = 0
        if self._rate is not None:
            self._rate.left = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy hears nobody: whoever is called is of the run that it was made in."""
        alone = Events(self.config)
        alone._past, alone._spikes, alone._step = self._past, self._spikes, self._step
        if alone._rate is not None and self._rate is not None:
            alone._rate.left = self._rate.left
        return vars(alone)

    def hold(self, optimizers: Iterable[Any]) -> None:
        """Lower the learning rate of these optimizers, with wrappers or without, where that is asked for."""
        if self._rate is not None:
            for optimizer in optimizers:
                self._rate.hold(optimizer)

    def let_go(self) -> None:
        """Lower no rate any longer. Whoever goes on from this state begins where it was."""
        if self._rate is not None:
            self._rate.let_go()

    def hear(self, handlers: Mapping[str, Handler | None]) -> None:
        """Call these from now on.

        Args:
            handlers: by kind a function of an Event; None for nothing.

        Raises:
            TypeError: for something that cannot be called.
        """
        for kind, handler in handlers.items():
            if handler is None:
                continue
            if not callable(handler):
                raise TypeError(
                    f"{kind}={handler!r}: must be a function of one argument, the event. Write {kind}=print."
                )
            if handler not in self._handlers[kind]:
                self._handlers[kind].append(handler)
            self.kinds.add(kind)

    def judged(self, action: int, stats: NormStats, view: View) -> int:
        """Tell of a step before it is made.

        Args:
            action: LEAVE, CLIP, SKIP or NONFINITE.
            stats: what was measured.
            view: of the gradients. Where it is guarded, a norm that is not finite is a loss scaler's affair.

        Returns:
            The action; SKIP where a handler asked for it.
        """
        self._step += 1
        if action == NONFINITE and view.guarded:
            return action
        self._advance()
        return self._tell(self._step, action, stats, self.config.nonfinite == "skip", view.rows)

    def keep(self, stats: NormStats, finite: Any, skipped: Any, guarded: bool) -> None:
        """Tell of a step when it can be read: `finite` and `skipped` are bools on the device, or here.

        Args:
            stats: what was measured.
            finite: whether the norm is.
            skipped: whether the step is left out.
            guarded: see `judged`.
        """
        self._step += 1
        self._advance()
        self._unread.append((self._step, stats.by_param, finite, skipped, guarded))
        if len(self._unread) >= MOST_UNREAD:  # nobody asks for the report
            self.look()

    def start_after(self, step: int) -> None:
        """Count on from a step of the run."""
        self._step = step

    def pass_over(self) -> None:
        """Count a step that a loss scaler dropped before anything was measured."""
        self._step += 1

    def look(self) -> None:
        """Tell of the steps that nobody read until now. Reads them to the host."""
        unread, self._unread = self._unread, []
        for step, stats, finite, skipped, guarded in unread:
            skips = bool(skipped)
            action = NONFINITE if not bool(finite) else SKIP if skips else LEAVE
            if action != NONFINITE or not guarded:
                self._tell(step, action, stats, skips, None)

    def _tell(self, step: int, action: int, stats: NormStats, skips: bool, rows: Rows | None) -> int:
        """The rows can be read as long as nothing was done to the gradients; None for a step that is over."""
        late = rows is None
        norm = float(stats.total)
        kinds, z, threshold = [], math.nan, math.nan
        if action == NONFINITE:
            kinds, z = ["on_nonfinite"] + ["on_skip"] * skips, math.inf
        else:
            if "on_spike" in self.kinds:
                z, threshold = self._score(norm)
                kinds += ["on_spike"] * (z > DEVIATIONS)
            kinds += ["on_skip"] * (action == SKIP)
        wanted = [kind for kind in kinds if kind in self.kinds]
        if not wanted:
            return action
        tensors = _largest(stats)
        examples = UNKNOWN if late or self.examples is None else self.examples()
        for kind in wanted:
            event = Event(kind, step, norm, threshold, z, tensors, examples, late, self.of, _rows=rows)
            self._call(event)
            if "skip" in event.asked and not late and (action != NONFINITE or self.config.nonfinite == "pass"):
                action = SKIP
        return action

    def _advance(self) -> None:
        if self._rate is not None:
            self._rate.advance()

    def _score(self, norm: float) -> tuple[float, float]:
        """How far a norm stands out among those before it, 0 where it does not; and where standing out begins."""
        cap, begin, self._past = judge(self._past, torch.tensor(norm, dtype=torch.float64))
        median, limit = float(cap), float(begin)
        if math.isinf(median):
            return 0.0, limit
        return DEVIATIONS * math.log(norm / median) / math.log(limit / median), limit

    def _call(self, event: Event) -> None:
        """The handlers, the reactions, and what they ask for."""
        error: Exception | None = None
        try:
            for handler in self._handlers[event.kind]:
                handler(event)
        except Exception as raised:
            error = raised
        agree = self.agree if self.agree_late or not event.late else None
        failed = agree is not None and agree(event.asked, error is not None)
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(
                f"A handler of {event.kind} failed on another process in step {event.step}: see its log."
            )
        if event.kind == "on_spike":
            self._react(event)
        if self.obey is not None:
            self.obey(event)
        elif "stop" in event.asked:
            raise SpikeLimitError(
                f"{event}. Somebody asked to stop here (after_spike={written(self.config.after_spike)})."
            )

    def _react(self, event: Event) -> None:
        if self._rate is not None:
            self._rate.begin(self._step - event.step)
        if self._stop is not None:
            self._spikes.append(event.step)
            while self._spikes[0] <= event.step - self._stop.steps:
                self._spikes.popleft()
            if len(self._spikes) >= self._stop.spikes:
                event.asked.add("stop")
                logger.warning("after_spike=%s: %s. The run ends here.", written((self._stop,)), event)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, under "events"; empty where nothing is looked for."""
        if not self.kinds:
            return {}
        left = 0 if self._rate is None else self._rate.left
        past = {"seen": self._past.seen.clone(), "logs": self._past.logs.clone()}
        return {"events": {**past, "step": self._step, "left": left, "spikes": [*self._spikes]}}

    def load_state_dict(self, saved: Any) -> None:
        """Go on with what `state_dict` gave; from something else nothing is taken."""
        try:
            seen, logs, step, left, spikes = (
                saved["events"][key] for key in ("seen", "logs", "step", "left", "spikes")
            )
            sound = seen.shape == () and logs.shape == self._past.logs.shape and not bool(logs.isnan().any())
            sound = sound and all(type(number) is int and number >= 0 for number in (step, left, *spikes))
        except (TypeError, KeyError, AttributeError, ValueError):
            return
        if not sound:
            return
        self._past = Past(seen.to(self._past.seen), logs.to(self._past.logs))
        self._step, self._spikes = step, deque(spikes)
        if self._rate is not None:
            self._rate.left = left


def _largest(stats: NormStats) -> tuple[tuple[str, float], ...]:
    """The parameters with the largest shares of the squared norm; reads sums of squares to the host."""
    of = stats.by_param
    sumsq_P: Tensor = of.sumsq_S.double().cpu()
    if not bool(sumsq_P.isfinite().all()):
        sumsq_P = (~sumsq_P.isfinite()).double()
        return tuple((of.layout.names[i], 1.0) for i in sumsq_P.nonzero()[:TOP, 0].tolist())
    shares_P = sumsq_P / sumsq_P.sum().clamp(min=torch.finfo(torch.float64).tiny)
    found = shares_P.sort(descending=True, stable=True)
    pairs = zip(found.indices[:TOP].tolist(), found.values[:TOP].tolist(), strict=True)
    return tuple((of.layout.names[i], share) for i, share in pairs)
