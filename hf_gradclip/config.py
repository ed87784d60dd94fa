"""From what a person writes to strategies: a string, a number, a dict or a YAML file becomes a checked ClipConfig.

    None                          what `max_grad_norm` says
    "none"                        measure and log only
    1.0                           global_norm with that max_norm
    "zclip:z_threshold=3"         name[:key=value,...]
    "adagc+value:max_value=1"     a chain; `+` before a letter
    {"strategy": "zclip", ...}    one strategy, its fields beside it
    {"gradient": spec, "update": spec, ...}    a whole configuration; the same as YAML

A name is looked up as a strategy of this package, then a preset, then a YAML file, then the dotted path of a class.
"""

from __future__ import annotations

import difflib
import importlib
import numbers
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_gradclip import strategies as _strategies
from hf_gradclip.strategy import Chain, SpecError, Strategy, describe, name_of, parts_of

NONFINITE = ("skip", "raise", "pass")
_YAML = (".yaml", ".yml")
_CHAIN = re.compile(r"\+(?=\s*[A-Za-z])")


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
            fused optimizer and reads nothing.
        record: keep every step's norms and scales by parameter in `gradclip` in the run's output_dir; "text" also
            writes the decoded text of the examples in a spike.
        histogram_every: steps between two histograms of the norms by parameter, sent with the next log to the trackers
            that draw them (TensorBoard, Weights & Biases); 0 sends none.

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
    record: bool | str = False
    histogram_every: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.gradient, Strategy):
            raise SpecError(
                f"ClipConfig(gradient={self.gradient!r}): must be a Strategy. ClipConfig.parse reads specs."
            )
        if self.nonfinite not in NONFINITE:
            known = " or ".join(NONFINITE)
            raise SpecError(
                f"ClipConfig(nonfinite={self.nonfinite!r}): must be {known}.{_nearest(self.nonfinite, NONFINITE)}"
            )
        limit = self.max_consecutive_skips
        if type(limit) is not int or limit < 1:
            raise SpecError(
                f"ClipConfig(max_consecutive_skips={limit!r}): must be a whole number >= 1. The default is 20."
            )
        for name, usual in (("check_every", 100), ("histogram_every", 0)):
            every = getattr(self, name)
            if type(every) is not int or every < 0:
                raise SpecError(f"ClipConfig({name}={every!r}): must be a whole number >= 0. The default is {usual}.")
        if type(self.record) is not bool and self.record != "text":
            raise SpecError(f"ClipConfig(record={self.record!r}): must be true, false or text.")
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
                    "time an update is known. Put it under 'gradient', or use block_rms."
                )
            if part.skips:
                word = name_of(part)
                raise SpecError(
                    f"ClipConfig(update={word}): by the time an update is known the moments have moved, so a step "
                    f"cannot be left out. Put {word} under 'gradient'."
                )

    def __str__(self) -> str:
        update = f", update {describe(self.update)}" if self.update is not None else ""
        extra = "".join(f", {name}" for name, on in (("fold", self.fold), ("no skip_sync", not self.skip_sync)) if on)
        return f"{describe(self.gradient)}{update} (nonfinite={self.nonfinite}{extra})"

    def of_update(self) -> ClipConfig:
        """The configuration of the clipper for the updates.

        Raises:
            ValueError: if updates are not clipped.
        """
        if self.update is None:
            raise ValueError("ClipConfig.of_update(): update is None.")
        return replace(self, gradient=self.update, update=None, fold=False, skip_sync=True, check_every=0, record=False)

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
        record: bool | str | None = None,
        histogram_every: int | None = None,
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
            if update is not None:
                settings["update"] = _strategy(update)
        except RecursionError:
            raise SpecError(f"clip={_show(given)}: refers to itself. Write the strategy in it.") from None
        except SpecError as error:
            if isinstance(given, (str, int, float)):
                raise SpecError(f"clip={given!r}: {error}") from None
            if isinstance(given, Mapping) and not str(error).startswith("clip="):
                raise SpecError(f"clip={_show(given)}: {error}") from None
            raise
        except ValueError as error:  # a whole number of thousands of digits cannot even be shown
            raise SpecError(f"clip: a value is out of range ({error}).") from None
        given_apart = {
            "nonfinite": nonfinite,
            "max_consecutive_skips": max_consecutive_skips,
            "check_every": check_every,
            "fold": fold,
            "skip_sync": skip_sync,
            "record": record,
            "histogram_every": histogram_every,
        }
        return cls(**settings | {key: value for key, value in given_apart.items() if value is not None})


def strategy_names() -> list[str]:
    """The strategies of this package: the files of its folder."""
    return sorted(module.name for module in pkgutil.iter_modules(_strategies.__path__))


def preset_names() -> list[str]:
    """The presets of this package."""
    folder = resources.files("hf_gradclip") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def strategy_class(name: str) -> type[Strategy]:
    """The one Strategy of a file of the folder."""
    module = importlib.import_module(f"{_strategies.__name__}.{name}")
    return next(
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Strategy) and cls.__module__ == module.__name__
    )


def _settings(spec: Any) -> dict[str, Any]:
    """The fields of a ClipConfig that a spec gives."""
    if isinstance(spec, ClipConfig):
        return {f.name: getattr(spec, f.name) for f in fields(spec)}
    if isinstance(spec, Mapping) and "strategy" not in spec:
        known = [f.name for f in fields(ClipConfig)]
        for key in spec:
            if key not in known:
                raise SpecError(
                    f"clip={_show(spec)}: unknown key {key!r}.{_nearest(key, [*known, 'strategy'])} "
                    f"A whole configuration has {', '.join(known)}; one strategy has 'strategy' and its fields."
                )
        if "gradient" not in spec:
            raise SpecError(
                f"clip={_show(spec)}: says nothing about the gradient. Add 'gradient': 'adaptive', say, or 'none'."
            )
        places = {key: spec[key] for key in ("gradient", "update") if spec.get(key) is not None or key == "gradient"}
        return {**spec, **{key: _settings_of_place(key, value) for key, value in places.items()}}
    if isinstance(spec, str) and spec.strip().endswith(_YAML) and not _CHAIN.search(spec):
        return _settings(_read_yaml(Path(spec.strip())))
    return {"gradient": _strategy(spec)}


def _settings_of_place(place: str, spec: Any) -> Strategy:
    if spec is None:
        raise SpecError(f"{{{place!r}: None}}: must name a strategy. 'none' measures and logs only.")
    return _strategy(spec)


def _strategy(spec: Any) -> Strategy:
    if isinstance(spec, Strategy):
        return spec
    if isinstance(spec, bool):
        raise SpecError(f"{spec}: is no strategy. Write a name, a number or a dict; 'none' measures and logs only.")
    if isinstance(spec, numbers.Real):  # of NumPy too
        if spec == 0:
            raise SpecError("0: is no limit. To switch clipping off use clip='none'.")
        return _build("global_norm", {"max_norm": spec})
    if isinstance(spec, Mapping):
        values = dict(spec)
        name = values.pop("strategy", None)
        if not isinstance(name, str):
            raise SpecError(f"{_show(spec)}: 'strategy' must be a name. Known: {_known()}.")
        for key in values:
            if not isinstance(key, str):
                raise SpecError(f"{_show(spec)}: the key {key!r} must be a word.")
        return _build(name, values)
    if isinstance(spec, str):
        return _parse(spec)
    raise SpecError(f"clip={_show(spec)}: a {type(spec).__name__} is no spec. Write a name, a number or a dict.")


def _parse(text: str) -> Strategy:
    """`name[:key=value,...]`, chained with `+` before a letter."""
    parts = [_parse_one(part) for part in _CHAIN.split(text)]
    flat = [p for part in parts for p in (part.parts if isinstance(part, Chain) else (part,))]
    return Chain(tuple(flat)) if len(flat) > 1 else flat[0]


def _parse_one(text: str) -> Strategy:
    name, colon, rest = text.strip().partition(":")
    if not name:
        raise SpecError(f"{text!r}: a strategy needs a name. Known: {_known()}.")
    number = _literal(name)
    if isinstance(number, (int, float)) and not isinstance(number, bool) and not colon:
        return _strategy(number)
    values: dict[str, Any] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not key or not value:
            raise SpecError(f"{item!r} is not key=value. Write {name}:key=value,key=value.")
        if key in values:
            raise SpecError(f"{key} is given twice.")
        values[key] = _literal(value)
    return _build(name.strip(), values)


def _literal(text: str) -> Any:
    """true, false, none, inf, a number, else the word itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _build(name: str, values: dict[str, Any]) -> Strategy:
    """Look the name up and construct."""
    if name in strategy_names():
        return _construct(name, strategy_class(name), values)
    if name in preset_names():
        preset = yaml.safe_load((resources.files("hf_gradclip") / "presets" / f"{name}.yaml").read_text("utf-8"))
        return _from_file(name, preset, values)
    if name.endswith(_YAML):
        return _from_file(name, _read_yaml(Path(name)), values)
    if "." in name:
        return _construct(name, _import(name), values)
    raise SpecError(f"no strategy or preset is called {name!r}.{_nearest(name, _names())} Known: {_known()}.")


def _from_file(name: str, content: Any, values: dict[str, Any]) -> Strategy:
    """A strategy from a preset or YAML file, with keys that win over the file's."""
    if isinstance(content, Mapping) and "strategy" in content:
        return _strategy({**content, **values})
    if values:
        raise SpecError(f"{name} holds more than one strategy, so it takes no keys, and {sorted(values)} were given.")
    if isinstance(content, Mapping):
        raise SpecError(f"{name} holds a whole configuration and cannot be a part of another spec. Give it alone.")
    return _strategy(content)


def _construct(name: str, cls: type[Strategy], values: dict[str, Any]) -> Strategy:
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            has = f"It has {', '.join(known)}." if known else "It has no fields."
            if key in {f.name for f in fields(ClipConfig)}:
                has += f" {key} is of the whole configuration: {{'gradient': ..., {key!r}: ...}}."
            raise SpecError(f"{name} has no field {key!r}.{_nearest(key, known)} {has}")
    try:
        return cls(**values)
    except TypeError:
        missing = [f.name for f in fields(cls) if f.name not in values]  # type: ignore[arg-type]
        raise SpecError(
            f"{name} needs a value for {missing[0] if missing else known}. Write {name}:{missing[0]}=1."
        ) from None


def _import(path: str) -> type[Strategy]:
    if "," in path:
        name, _, rest = path.partition(",")
        raise SpecError(f"{path!r} is no strategy. After the name comes a colon: {name}:{rest}.")
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SpecError(
            f"{path!r} is no strategy, no preset, and cannot be imported ({error}). Known: {_known()}."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise SpecError(f"{path!r} is not a subclass of hf_gradclip.Strategy.")
    if cls is Chain:
        raise SpecError(f"{path!r}: a chain is written with +, as in adagc+value:max_value=1.")
    if cls.__abstractmethods__:
        raise SpecError(f"{path!r} is abstract: it lacks {', '.join(sorted(cls.__abstractmethods__))}.")
    if not is_dataclass(cls):
        raise SpecError(
            f"{path!r} is no dataclass. Put @dataclass(frozen=True) on it: its fields are its configuration."
        )
    return cls


def _read_yaml(path: Path) -> Any:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read {str(path)!r} ({error}).") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{str(path)!r} is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, (str, int, float, Mapping)) or isinstance(content, bool):
        raise SpecError(f"{str(path)!r} holds {_show(content)}, which is no spec.")
    if isinstance(content, str) and content.strip().endswith(_YAML):
        raise SpecError(f"{str(path)!r} points to another file. Write the strategy in it.")
    return _with_numbers(content)


def _with_numbers(content: Any) -> Any:
    """YAML 1.1 reads 1e-3 and inf as words; a spec means numbers."""
    if isinstance(content, Mapping):
        return {key: _with_numbers(value) for key, value in content.items()}
    if isinstance(content, str) and isinstance(number := _literal(content), float):
        return number
    return content


def _nearest(word: Any, known: Any) -> str:
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


def _names() -> list[str]:
    return strategy_names() + preset_names()


def _known() -> str:
    return ", ".join(_names())


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."
