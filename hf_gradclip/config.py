"""From what a person writes to strategies: a string, a number, a dict or a YAML file becomes a checked ClipConfig.

    None                          what `max_grad_norm` says
    "none"                        measure and log only
    1.0                           global_norm with that max_norm
    "zclip:z_threshold=3"         name[:key=value,...]
    "adagc+value:max_value=1"     a chain; `+` before a letter
    {"strategy": "zclip", ...}    one strategy, its fields beside it
    {"embed*": spec, "*": spec}   by name of parameters, see hf_gradclip.grouped; as text "embed*=spec;*=spec"
    {"gradient": spec, "update": spec, ...}    a whole configuration; the same as YAML

A name is looked up as a strategy of this package, then a preset, then a YAML file, then the dotted path of a class.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from hf_gradclip.grouped import is_grouped
from hf_gradclip.logged import WORDS, read_words
from hf_gradclip.reactions import Reaction, read_reactions, written
from hf_gradclip.record.options import RecordOptions, read_record_options, shortest
from hf_gradclip.spec import UnknownFieldError, is_file, nearest, read_strategy, read_yaml, shown
from hf_gradclip.strategy import SpecError, Strategy, describe, name_of, parts_of

NONFINITE = ("skip", "raise", "pass")


@dataclass(frozen=True)
class ClipConfig:
    """Everything that decides about clipping.

    Args:
        gradient: the strategy for the gradients.
        nonfinite: at a NaN or inf norm, after which nobody else skips the step: "skip" it exactly, "raise", or "pass"
            the gradients on as they are (what the stock Trainer does).
        max_consecutive_skips: skipped steps in a row after which training stops with an error; >= 1.
        check_every: steps between two checks that replicas hold the same gradients; 0 never checks.
        update: the strategy for what the optimizer makes of the gradients, before the learning rate and apart from
            decoupled weight decay; None leaves it alone.
        fold: hand the coefficient to torch's fused optimizer instead of writing the gradients.
        skip_sync: read a flag per step, so that schedulers wait for a skipped one; False hands the flag to torch's
            fused optimizer, or to one of hf_gradclip.optim, and reads nothing.
        record: keep every step's norms and scales by parameter in `gradclip` in the run's output_dir; "text" also
            writes the decoded text of the examples in a spike. In full {"text": true, "push": true}: a Trainer that
            uploads its output_dir leaves `gradclip` out unless `push` says that it goes along.
        histogram_every: steps between two histograms of the norms by parameter, sent with the next log to the trackers
            that draw them (TensorBoard, Weights & Biases); 0 sends none.
        after_spike: what is done by itself where the norm of the gradient stands out, see hf_gradclip.reactions; text
            in a spec: "lower_rate:factor=0.1,steps=50+stop:spikes=3,steps=100".
        log: which values of clipping are logged, by the word after `clip/`: "all", "none", or some of them in the order
            of their weight, "norm_mean,rate" or a list.
        console: how many of these, from the first on, the Trainer prints; None prints all.

    Raises:
        SpecError: for a value that breaks these rules.
    """

    gradient: Strategy
    nonfinite: str = "skip"
    max_consecutive_skips: int = 20
    check_every: int = 100
    update: Strategy | None = None
    fold: bool = False
    skip_sync: bool = True
    record: bool | str | RecordOptions = False
    histogram_every: int = 0
    after_spike: tuple[Reaction, ...] = ()
    log: tuple[str, ...] = WORDS
    console: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gradient, Strategy):
            raise SpecError(
                f"ClipConfig(gradient={self.gradient!r}): must be a Strategy. ClipConfig.parse reads specs."
            )
        if self.nonfinite not in NONFINITE:
            known = " or ".join(NONFINITE)
            raise SpecError(
                f"ClipConfig(nonfinite={self.nonfinite!r}): must be {known}.{nearest(self.nonfinite, NONFINITE)}"
            )
        for name in ("max_consecutive_skips", "check_every", "histogram_every", "console"):
            value = getattr(self, name)
            if isinstance(value, numbers.Integral) and not isinstance(value, bool):  # of NumPy too
                object.__setattr__(self, name, int(value))
        limit = self.max_consecutive_skips
        if type(limit) is not int or limit < 1:
            raise SpecError(
                f"ClipConfig(max_consecutive_skips={limit!r}): must be a whole number >= 1. The default is 20."
            )
        for name, usual in (("check_every", 100), ("histogram_every", 0)):
            every = getattr(self, name)
            if type(every) is not int or every < 0:
                raise SpecError(f"ClipConfig({name}={every!r}): must be a whole number >= 0. The default is {usual}.")
        object.__setattr__(self, "after_spike", read_reactions(self.after_spike))
        object.__setattr__(self, "log", read_words(self.log))
        if self.console is not None and (type(self.console) is not int or self.console < 0):
            raise SpecError(
                f"ClipConfig(console={self.console!r}): must be a whole number >= 0. None prints all that is logged."
            )
        object.__setattr__(self, "record", shortest(read_record_options(self.record)))
        for name in ("fold", "skip_sync"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"ClipConfig({name}={getattr(self, name)!r}): must be true or false.")
        if self.nonfinite == "raise" and not self.skip_sync:
            raise SpecError(
                "ClipConfig(nonfinite='raise', skip_sync=False): raising needs the flag that skip_sync=False does not "
                "read. Use nonfinite='skip', or skip_sync=True."
            )
        if self.update is not None:
            self._check_update(self.update)

    def _check_update(self, update: Strategy) -> None:
        if not isinstance(update, Strategy):
            raise SpecError(f"ClipConfig(update={update!r}): must be a Strategy. ClipConfig.parse reads specs.")
        for part in parts_of(update):
            if part.needs.units is not None:
                raise SpecError(
                    f"ClipConfig(update={name_of(part)}): it goes by units and their weights, which have moved by the "
                    "time the update of most optimizers is known. Put it under 'gradient', or use block_rms."
                )
            if part.skips:
                word = name_of(part)
                raise SpecError(
                    f"ClipConfig(update={word}): by the time the update of most optimizers is known the moments "
                    f"have moved, so a step cannot be left out. Put {word} under 'gradient'."
                )

    def __str__(self) -> str:
        update = f", update {describe(self.update)}" if self.update is not None else ""
        extra = "".join(f", {name}" for name, on in (("fold", self.fold), ("no skip_sync", not self.skip_sync)) if on)
        extra += f", after_spike={written(self.after_spike)}" if self.after_spike else ""
        return f"{describe(self.gradient)}{update} (nonfinite={self.nonfinite}{extra})"

    def to_dict(self) -> dict[str, Any]:
        """The configuration in values that JSON and YAML take, for a tracker say; `parse` makes it of them again."""
        update = None if self.update is None else describe(self.update)
        record = asdict(self.record) if isinstance(self.record, RecordOptions) else self.record
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {
            "gradient": describe(self.gradient),
            "update": update,
            "record": record,
            "after_spike": written(self.after_spike) or None,
            "log": "all" if self.log == WORDS else list(self.log),
        }

    def of_update(self, skip_sync: bool = True) -> ClipConfig:
        """The configuration of the clipper for the updates.

        Args:
            skip_sync: False where the optimizer reads on the device whether an update is skipped.

        Raises:
            ValueError: if updates are not clipped.
        """
        if self.update is None:
            raise ValueError("ClipConfig.of_update(): update is None.")
        alone = replace(self, gradient=self.update, update=None, fold=False, skip_sync=skip_sync)
        return replace(alone, check_every=0, record=False, after_spike=())

    @classmethod
    def parse(
        cls,
        spec: Any,
        *,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
        max_consecutive_skips: int | None = None,
        check_every: int | None = None,
        update: Any = None,
        fold: bool | None = None,
        skip_sync: bool | None = None,
        record: Any = None,
        histogram_every: int | None = None,
        after_spike: Any = None,
        log: Any = None,
        console: int | None = None,
    ) -> ClipConfig:
        """Read a spec as described at the top of this file.

        Args:
            spec: None, str, number, dict, Strategy or ClipConfig.
            max_grad_norm: what `None` stands for: global_norm with that limit, or "none" for 0. With it a non-finite
                norm is passed on, as in the stock Trainer.
            nonfinite: overrides the spec's policy.
            max_consecutive_skips: overrides the spec's limit.
            check_every: overrides the spec's interval.
            update: a spec for the updates; overrides the spec's.
            fold: overrides the spec's.
            skip_sync: overrides the spec's.
            record: overrides the spec's.
            histogram_every: overrides the spec's.
            after_spike: overrides the spec's.
            log: overrides the spec's.
            console: overrides the spec's.

        Raises:
            SpecError: for anything that is not a spec; no other exception.
        """
        if spec is None:
            if max_grad_norm is None:
                raise SpecError(
                    "clip=None: means what max_grad_norm says, and there is none here. Try clip='adaptive'."
                )
            given: Any = {"gradient": max_grad_norm or "none", "nonfinite": "pass"}
        else:
            given = spec
        try:
            settings = _settings(given)
        except RecursionError:
            raise SpecError(f"clip={shown(given)}: refers to itself. Write the strategy in it.") from None
        except SpecError as error:
            raise SpecError(_with_call(given, error)) from None
        except ValueError:
            raise SpecError(f"clip={shown(given)}: {_DIGITS}") from None
        if update is not None:
            settings["update"] = _settings_of_place("update", update)
        given_apart = {
            "nonfinite": nonfinite,
            "max_consecutive_skips": max_consecutive_skips,
            "check_every": check_every,
            "fold": fold,
            "skip_sync": skip_sync,
            "record": record,
            "histogram_every": histogram_every,
            "after_spike": after_spike,
            "log": log,
            "console": console,
        }
        apart = {key: value for key, value in given_apart.items() if value is not None}
        try:
            return cls(**settings | apart)
        except SpecError as error:
            raise SpecError(_with_call(given, error) if is_file(given) and not apart else str(error)) from None
        except ValueError:
            raise SpecError(f"clip={shown(given)}: {_DIGITS}") from None


Clip: TypeAlias = str | float | Mapping[Any, Any] | ClipConfig | Strategy | None
"""What a person writes as `clip`."""


_DIGITS = "a whole number of thousands of digits is no value. Write inf where no limit is meant."
"""Python refuses to show one."""


def _with_call(given: Any, error: SpecError) -> str:
    """What is wrong, behind the call as it was typed."""
    text = str(error)
    is_made = isinstance(given, (ClipConfig, Strategy))
    return text if is_made or text.startswith("clip=") else f"clip={shown(given)}: {text}"


def _settings(spec: Any) -> dict[str, Any]:
    """The fields of a ClipConfig that a spec gives."""
    if isinstance(spec, ClipConfig):
        return {f.name: getattr(spec, f.name) for f in fields(spec)}
    if isinstance(spec, Mapping) and "strategy" not in spec and not is_grouped(spec):
        known = [f.name for f in fields(ClipConfig)]
        for key in spec:
            if key not in known:
                raise SpecError(
                    f"clip={shown(spec)}: unknown key {key!r}.{nearest(key, [*known, 'strategy'])} "
                    f"A whole configuration has {', '.join(known)}; one strategy has 'strategy' and its fields."
                )
        if "gradient" not in spec:
            raise SpecError(
                f"clip={shown(spec)}: says nothing about the gradient. Add 'gradient': 'adaptive', say, or 'none'."
            )
        places = {key: spec[key] for key in ("gradient", "update") if spec.get(key) is not None or key == "gradient"}
        return {**spec, **{key: _settings_of_place(key, value) for key, value in places.items()}}
    if is_file(spec):
        return _settings(read_yaml(Path(spec.strip())))
    return {"gradient": _strategy(spec)}


def _settings_of_place(place: str, spec: Any) -> Strategy:
    if spec is None:
        raise SpecError(f"{{{place!r}: None}}: must name a strategy. 'none' measures and logs only.")
    try:
        return _strategy(spec)
    except SpecError as error:
        raise SpecError(f"{place}={shown(spec)}: {error}" if place == "update" else str(error)) from None


def _strategy(spec: Any) -> Strategy:
    known = [f.name for f in fields(ClipConfig)]
    try:
        return read_strategy(spec)
    except UnknownFieldError as error:
        if error.field not in known:
            raise
        fix = f"{{'gradient': ..., {error.field!r}: ...}}" if error.field != "gradient" else "{'gradient': ...} alone"
        raise SpecError(f"{error} {error.field} is of the whole configuration: {fix}.") from None
