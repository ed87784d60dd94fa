"""What a person writes for one strategy, or a chain of them: a number, a string, a dict, a preset or a YAML file.

See hf_gradclip.config, which reads whole configurations.
"""

from __future__ import annotations

import difflib
import importlib
import numbers
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_gradclip import strategies as _strategies
from hf_gradclip.grouped import is_grouped, read_groups, specs_in
from hf_gradclip.strategy import Chain, SpecError, Strategy
from hf_gradclip.yaml_file import load

_YAML = (".yaml", ".yml")
_CHAIN = re.compile(r"\+(?=\s*[A-Za-z])")


class UnknownFieldError(SpecError):
    """A strategy has no such field; `field` is the word that was written."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


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


def read_strategy(spec: Any) -> Strategy:
    """The strategy that is written.

    Raises:
        SpecError: with the part that is wrong, the rule and the fix.
    """
    if isinstance(spec, Strategy):
        return spec
    if isinstance(spec, bool):
        raise SpecError(f"{spec}: is no strategy. Write a name, a number or a dict; 'none' measures and logs only.")
    if isinstance(spec, numbers.Real):  # of NumPy too
        if spec == 0:
            raise SpecError("0: is no limit. To switch clipping off use clip='none'.")
        return _build("global_norm", {"max_norm": spec})
    if is_grouped(spec) and not is_file(spec):
        return read_groups(spec, read_strategy)
    if isinstance(spec, Mapping):
        values = dict(spec)
        name = values.pop("strategy", None)
        if not isinstance(name, str):
            raise SpecError(f"{shown(spec)}: 'strategy' must be a name. Known: {_known()}.")
        for key in values:
            if not isinstance(key, str):
                raise SpecError(f"{shown(spec)}: the key {key!r} must be a word.")
        return _build(name, values)
    if isinstance(spec, str):
        return _parse(spec)
    raise SpecError(f"a {type(spec).__name__} is no spec. Write a name, a number or a dict.")


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
        return read_strategy(number)
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
        preset = load((resources.files("hf_gradclip") / "presets" / f"{name}.yaml").read_text("utf-8"))
        return _from_file(name, preset, values)
    if name.endswith(_YAML):
        return _from_file(name, read_yaml(Path(name)), values)
    if "," in name:
        first, _, rest = name.partition(",")
        raise SpecError(f"{name!r} is no strategy. After the name comes a colon: {first}:{rest}.")
    if "." in name:
        return _construct(name, _import(name), values)
    if name in ("None", "null"):
        raise SpecError(
            f"{name!r} is text. To clip by max_grad_norm give no clip, in YAML `clip: null`; 'none' measures and never "
            "clips."
        )
    raise SpecError(f"no strategy or preset is called {name!r}.{nearest(name, _names())} Known: {_known()}.")


def _from_file(name: str, content: Any, values: dict[str, Any]) -> Strategy:
    """A strategy from a preset or YAML file, with keys that win over the file's."""
    if is_grouped(content) and not values:
        return read_strategy(content)
    if isinstance(content, Mapping) and "strategy" in content:
        return read_strategy({**content, **values})
    if values:
        what = f"{name} is {content}" if isinstance(content, str) else f"{name} holds more than one strategy"
        raise SpecError(
            f"{what}, so it takes no keys, and {', '.join(values)} came with it. Write the strategies that it holds, "
            "with the key at its own one."
        )
    if isinstance(content, Mapping):
        raise SpecError(f"{name} holds a whole configuration and cannot be a part of another spec. Give it alone.")
    return read_strategy(content)


def _construct(name: str, cls: type[Strategy], values: dict[str, Any]) -> Strategy:
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            has = f"It has {', '.join(known)}." if known else "It has no fields."
            raise UnknownFieldError(f"{name} has no field {key!r}.{nearest(key, known)} {has}", key)
    try:
        return cls(**values)
    except TypeError:
        missing = [f.name for f in fields(cls) if f.name not in values]  # type: ignore[arg-type]
        raise SpecError(
            f"{name} needs a value for {missing[0] if missing else known}. Write {name}:{missing[0]}=1."
        ) from None


def _import(path: str) -> type[Strategy]:
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        own = " For a class of your own put the folder of its file on PYTHONPATH." if missing else ""
        raise SpecError(
            f"{path!r} is no strategy, no preset, and cannot be imported ({error}).{own} Known: {_known()}."
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


def is_own(text: Any) -> bool:
    """Whether a spec is made of this package's strategies and presets alone: to read it opens and imports nothing."""
    if not isinstance(text, str):
        return False
    if is_grouped(text):
        return all(map(is_own, specs_in(text)))
    return {part.partition(":")[0].strip() for part in _CHAIN.split(text)} <= {*_names()}


def is_file(spec: Any) -> bool:
    """Whether a spec names one YAML file, and not a chain with a file in it."""
    return isinstance(spec, str) and spec.strip().endswith(_YAML) and not _CHAIN.search(spec)


def read_yaml(path: Path) -> Any:
    """What a file holds, with `inf` as a number, as in a string.

    Raises:
        SpecError: if it cannot be read or holds no spec.
    """
    try:
        content = load(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read {str(path)!r} ({error}).") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{str(path)!r} is not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, (str, int, float, Mapping)) or isinstance(content, bool):
        raise SpecError(f"{str(path)!r} holds {shown(content)}, which is no spec.")
    if isinstance(content, str) and content.strip().endswith(_YAML):
        raise SpecError(f"{str(path)!r} points to another file. Write the strategy in it.")
    return _with_numbers(content)


def _with_numbers(content: Any) -> Any:
    """YAML reads inf, and anything in quotes, as a word; a spec means a number."""
    if isinstance(content, Mapping):
        return {key: _with_numbers(value) for key, value in content.items()}
    if isinstance(content, str) and isinstance(number := _literal(content), float):
        return number
    return content


def nearest(word: Any, known: Any) -> str:
    """A question after the most similar known word, or nothing."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


def _names() -> list[str]:
    return strategy_names() + preset_names()


def _known() -> str:
    return ", ".join(_names())


def shown(value: Any) -> str:
    """As it was written, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"({type(value).__name__} with thousands of digits)"
    return text if len(text) < 200 else f"{text[:200]}..."
