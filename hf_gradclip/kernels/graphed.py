"""A function of a few small vectors as one launch: a CUDA graph of it, made once and replayed.

A decision is some thirty to a hundred operations on vectors of a few hundred numbers. On a GPU the host spends longer
on launching them than the device on running them. `HF_GRADCLIP_GRAPH=1` replaces them by three launches: copy the
arguments to where the graph reads them, replay it, copy its results to where the next replay does not write.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.types import Layout

VARIABLE = "HF_GRADCLIP_GRAPH"
CALLS_BEFORE = 3  # by which everything that allocates or compiles has done so

logger = logging.getLogger("hf_gradclip")

Tree = Any
"""Tensors in tuples, dicts and dataclasses; None, a Layout and the like are not looked into."""
Replay = Callable[[], None]


class Graphed:
    """`function`, which is pure, reads nothing to the host and keeps its structure, as a graph where that is asked for.

    The graph is of tensors of certain shapes. It is made again when these or the layout change, and checked against the
    function once, the only time that the host waits. Where it cannot be made or is wrong, the function serves.

    Args:
        function: of trees of tensors, on one device, to a tree of tensors.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._asked = _asked()
        self._calls = 0
        self._made_for: object = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._like: Tree = None
        self._replay: Replay | None = None

    def __call__(self, *arguments: Tree) -> Tree:
        """The function's result."""
        if not self._asked:
            return self._function(*arguments)
        inputs = list(leaves(arguments))
        if not inputs or not _captures(inputs[0].device):
            return self._function(*arguments)
        kind = [(x.shape, x.dtype) for x in inputs], [id(layout) for layout in _layouts(arguments)]
        if kind != self._made_for:
            self._made_for, self._calls, self._replay = kind, 0, None
        if self._replay is None:
            self._calls += 1
            result = self._function(*arguments)
            if self._calls == CALLS_BEFORE:
                self._make(arguments, inputs, result)
            return result
        return self._run(inputs)

    def _make(self, arguments: Tree, inputs: list[Tensor], result: Tree) -> None:
        """Capture, and compare with the result that is known."""
        try:
            self._inputs = [x.clone() for x in inputs]

            def call() -> Tree:  # from new trees each time: what a tree keeps of an earlier call is not in a graph
                return self._function(*filled(arguments, iter(self._inputs)))

            self._replay, made = capture(call, inputs[0].device)
            self._like, self._outputs = made, list(leaves(made))
            found, known = list(leaves(self._run(inputs))), list(leaves(result))
            if len(found) != len(known) or not all(map(_equal, found, known)):
                raise RuntimeError("the graph gives other numbers than the function it was made of")
        except Exception as error:
            self._asked, self._replay = False, None
            said = " ".join(str(error).split())[:300]
            logger.warning(
                "%s=1: no CUDA graph of a decision: %s. Its operations are launched one by one.", VARIABLE, said
            )

    def _run(self, inputs: list[Tensor]) -> Tree:
        assert self._replay is not None
        _copy(self._inputs, inputs)
        self._replay()
        results = [torch.empty_like(output) for output in self._outputs]
        _copy(results, self._outputs)
        return filled(self._like, iter(results))


def capture(function: Callable[[], Tree], device: torch.device) -> tuple[Replay, Tree]:
    """A CUDA graph of a function without arguments: what replays it, and the result that each replay overwrites."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads may load data meanwhile; torch's own stream for this is of the device that captured first
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            result = function()
    return graph.replay, result


def _asked() -> bool:
    wanted = os.environ.get(VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={wanted}: must be 0 or 1.")
    return wanted == "1"


def _captures(device: torch.device) -> bool:
    """Whether a graph can be made and replayed here: on CUDA, and not inside another capture."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for part in _parts(tree):
            yield from leaves(part)


def filled(tree: Tree, values: Iterator[Tensor]) -> Tree:
    """A tree of this structure with other tensors."""
    if isinstance(tree, Tensor):
        return next(values)
    parts = [filled(part, values) for part in _parts(tree)]
    if isinstance(tree, dict):
        return dict(zip(tree, parts, strict=True))
    if isinstance(tree, tuple):
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if parts:
        return replace(tree, **dict(zip((f.name for f in fields(tree)), parts, strict=True)))
    return tree


def _parts(tree: Tree) -> Sequence[Tree]:
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, tuple):
        return tree
    if is_dataclass(tree) and not isinstance(tree, Layout):
        return [getattr(tree, f.name) for f in fields(tree)]
    return ()


def _layouts(tree: Tree) -> Iterator[Layout]:
    if isinstance(tree, Layout):
        yield tree
    for part in _parts(tree):
        yield from _layouts(part)


def _copy(to: list[Tensor], source: Sequence[Tensor]) -> None:
    """One launch per dtype."""
    for dtype in {x.dtype for x in to}:
        pairs = [(x, y) for x, y in zip(to, source, strict=True) if x.dtype == dtype]
        torch._foreach_copy_([x for x, _ in pairs], [y for _, y in pairs])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and bool(torch.eq(a, b).logical_or(a.isnan() & b.isnan()).all())
