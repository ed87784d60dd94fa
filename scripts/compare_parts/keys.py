"""What a row is kept by: all that decides how a run differs from others, and nothing that trains them all alike."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import sys
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

from compare_parts import task as task_module
from compare_parts import training
from compare_parts.tasks import TASKS
from compare_parts.training import Run, places
from hf_gradclip import budgets, outlier, patterns
from hf_gradclip.spec import read_strategy
from hf_gradclip.strategy import Strategy, describe, parts_of
from hf_gradclip.views import adapters, heads, units


def key_of(run: Run) -> str:
    """The run with the fields of its strategies, the settings, and the code of its task, its data and its clip."""
    task = TASKS[run.task]
    strategies = [read_strategy(spec) for spec in places(run.clip)]
    modules = [task_module, sys.modules[task.data.__module__], *task.uses]
    modules += [module for strategy in strategies for module in modules_of(strategy)]
    settings = [training.RAMP, training.BETA1 if run.optimizer == "adamw" else 0.0]
    if run.data != "sound":
        settings += [training.FAULTS[run.data], training.BROKEN, training.UNBROKEN]
    text = json.dumps([asdict(replace(run, clip=described(run.clip))), settings, [code_of(m) for m in modules]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def described(clip: str) -> str:
    """A clip with all of its fields, so that two spellings of one are the same."""
    return "/".join(describe(read_strategy(spec)) for spec in places(clip))


def modules_of(strategy: Strategy) -> list[ModuleType]:
    """Where it is decided what a strategy does."""
    own = [sys.modules[type(part).__module__] for part in parts_of(strategy)]
    rules = [budgets, patterns] * isinstance(strategy, budgets.Budgets)
    rules += [outlier] * any("outlier" in code_of(module) for module in own)
    rules += [heads, adapters, units] * (strategy.needs.units is not None)
    return own + rules


@functools.cache
def code_of(module: ModuleType) -> str:
    """The source of a module without comments and docstrings, the same under Python 3.11 to 3.13."""
    return json.dumps(_bare(ast.parse(inspect.getsource(module))))


def _bare(node: Any) -> Any:
    """A node by its kind and its fields; those that are empty are left out, as versions do not agree on them."""
    if isinstance(node, ast.AST):
        fields = {name: _bare(value) for name, value in ast.iter_fields(node)}
        return [type(node).__name__, {name: value for name, value in fields.items() if value not in ([], "None")}]
    return [_bare(line) for line in node if not _is_docstring(line)] if isinstance(node, list) else repr(node)


def _is_docstring(line: Any) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
