"""What strategies and presets are, for the terminal: rule, fields, state, cost, limits, paper. Needs no rich."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from importlib import resources

import torch

from hf_gradclip.config import ClipConfig
from hf_gradclip.spec import nearest, preset_names, strategy_class, strategy_names
from hf_gradclip.state import flatten
from hf_gradclip.strategy import SpecError, Strategy, describe, name_of, parts_of
from hf_gradclip.types import Layout

WIDTH = 80
_SECTIONS = re.compile(r"^(Args|Example|References|Raises|Attributes):$", re.MULTILINE)


def explain(name: str) -> str:
    """Everything about a strategy or a preset.

    Raises:
        SpecError: for a word that is neither.
    """
    if name in strategy_names():
        return _strategy(name)
    if name in preset_names():
        return _preset(name)
    known = [*strategy_names(), *preset_names()]
    raise SpecError(f"no strategy or preset is called {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")


def listing() -> str:
    """Every strategy with what it does and its fields, then every preset with what it is."""
    lines = ["Strategies:", ""]
    for name in strategy_names():
        cls = strategy_class(name)
        given = [f.name if f.default is MISSING else f"{f.name}={str(f.default).lower()}" for f in fields(cls)]  # type: ignore[arg-type]
        lines += [
            name,
            _hung((inspect.getdoc(cls) or "").splitlines()[0]),
            *([_hung(", ".join(given))] if given else []),
        ]
    lines += ["", "Presets:", ""]
    for name in preset_names():
        lines += [name, _hung(describe(ClipConfig.parse(name).gradient))]
    return "\n".join([*lines, "", "hf-gradclip explain NAME says more."])


def _strategy(name: str) -> str:
    cls = strategy_class(name)
    parts = _sections(inspect.getdoc(cls) or "")
    required = {f.name: 1.0 for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
    strategy = cls(**required)
    said = [f"{name}\n{'=' * len(name)}", "\n\n".join(map(_wrapped, parts[""].split("\n\n")))]
    said += [f"Fields\n{_indented(_with_defaults(cls, parts['Args']))}"] if "Args" in parts else ["No fields."]
    said.append(_wrapped(f"State: {_state(strategy)}"))
    said.append(_wrapped(f"Cost: {_cost(strategy)}"))
    said.append(_wrapped(f"Limits: {_limits(strategy)}"))
    said += [f"Example\n{_indented(parts['Example'])}"] if "Example" in parts else []
    said += [f"Paper\n{_hung(' '.join(parts['References'].split()))}"] if "References" in parts else []
    return "\n\n".join(said)


def _preset(name: str) -> str:
    text = (resources.files("hf_gradclip") / "presets" / f"{name}.yaml").read_text("utf-8")
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    strategy = ClipConfig.parse(name).gradient
    said = [f"{name} (a preset)\n{'=' * (len(name) + 11)}", _wrapped(comment)]
    said.append("\n+ ".join(describe(part) for part in parts_of(strategy)))
    said.append("\n".join(f"hf-gradclip explain {name_of(part)}" for part in parts_of(strategy)))
    return "\n\n".join(said)


def _sections(doc: str) -> dict[str, str]:
    """The parts of a docstring by their heading; "" is what comes before the first."""
    begin, *rest = _SECTIONS.split(doc)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return {"": begin.strip(), **{word: textwrap.dedent(body).strip() for word, body in pairs}}


def _with_defaults(cls: type[Strategy], text: str) -> str:
    """The lines about the fields, with their defaults after the names."""
    for f in fields(cls):  # type: ignore[arg-type]
        value = "no default" if f.default is MISSING else f"default {str(f.default).lower()}"
        text = re.sub(rf"^{f.name}:", f"{f.name} ({value}):", text, flags=re.MULTILINE)
    entries = re.split(r"\n(?=\S)", text)
    return "\n".join(textwrap.fill(" ".join(e.split()), WIDTH - 2, subsequent_indent="    ") for e in entries)


def _state(strategy: Strategy) -> str:
    """The numbers that a checkpoint keeps, for a model of S segments."""
    layout = Layout.of_parameters(("a", "b", "c"), [1, 1, 1], torch.device("cpu"))
    kept = flatten(strategy.init(layout))
    shown = [f"{key} ({_shape(value)})" for key, value in kept.items()]
    return ", ".join(shown) if shown else "none."


def _shape(value: torch.Tensor) -> str:
    sizes = ["S" if size == 3 else str(size) for size in value.shape]
    return " x ".join(sizes) if sizes else "one number"


def _cost(strategy: Strategy) -> str:
    needs = strategy.needs
    said = ["one read of the gradients"]
    said += ["one of the weights"] * needs.weights
    reductions = "two reductions" if needs.max_abs else "one reduction"
    said.append(f"{reductions} over ranks of a number per {'row' if needs.units else 'parameter'}")
    said += ["one of the loss"] * needs.loss
    return f"{', '.join(said)}; a write of what is clipped."


def _limits(strategy: Strategy) -> str:
    said = []
    if strategy.per_parameter:
        said.append("refused under FSDP1 and with fold=True, since it treats parameters apart")
    if strategy.bounds:
        if not strategy.per_parameter:
            said.append("refused with fold=True")
        said.append("last in a chain and without replay, since the norm after it is not known")
    elif strategy.needs.units is not None or strategy.needs.max_abs:
        said.append("no replay of a record, which holds norms by parameter")
    if strategy.skips or strategy.needs.units is not None:
        said.append("for gradients only, not for updates")
    return f"{'; '.join(said)}." if said else "none: it serves on every backend, for gradients and updates."


def _hung(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH)
