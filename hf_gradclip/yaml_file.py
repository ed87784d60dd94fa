"""YAML as people read it: `010` is ten, `1:30` is a word, `on` is a word, and `1e-3` is a number, as in YAML 1.2.

PyYAML reads YAML 1.1, where these are 8, 90, true and a word. Aliases are read as long as what they stand for, written
out, is of the size of a configuration.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST = 1000
"""Values that a file may hold, every alias written out."""

_TAG = "tag:yaml.org,2002:"
_OWN = ("int", "float", "bool", "timestamp")


class _Loader(yaml.SafeLoader):
    """Plain values by the rules of YAML 1.2, in decimal."""


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", loader.construct_scalar(node).lower()))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.removeprefix(_TAG) not in _OWN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _rule, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_rule})$"), list(_first))
_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "float", _float)


def load(text: str) -> Any:
    """What a text holds.

    Raises:
        yaml.YAMLError: if it is not YAML.
        ValueError: if it refers to itself, is too large, nested too deep, or gives a key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > LARGEST:
            raise ValueError(f"with every alias written out it holds more than {LARGEST} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node holds, with every alias written out; counted once per node, however often it is used."""
    if id(node) not in known:
        known[id(node)] = None
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise ValueError(f"{twice} is given twice")
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    size = known[id(node)]
    if size is None:
        raise ValueError("it refers to itself")
    return size
