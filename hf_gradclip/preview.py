"""What a strategy makes of made-up norms, without a model: to try one out, and for the examples of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hf_gradclip.misuse import shown
from hf_gradclip.strategy import Strategy, describe
from hf_gradclip.types import Layout, NormStats

Norms = float | Sequence[float]
"""Of one step: the norm of one parameter, or of several."""


def preview(
    strategy: Strategy,
    norms: Sequence[Norms],
    *,
    numel: int = 1,
    weights: Norms = 1.0,
    losses: Sequence[float] | None = None,
) -> list[float | list[float] | None]:
    """The norms after clipping, step by step, for a strategy that starts with the first of them.

    Args:
        strategy: what decides; one that goes by unit sees each parameter as one unit.
        norms: per step the norm of the gradient of one parameter, or of several.
        numel: elements of each parameter.
        weights: the norm of the weights of each parameter, the same in every step.
        losses: per step the loss, for a strategy that judges it.

    Raises:
        TypeError: for something else than a strategy.
        ValueError: without losses for a strategy that judges them.

    Returns:
        Per step the norm of what is left, to 4 digits; a list where the step was one; None for a step that is skipped.
        Where a strategy bounds elements, they are taken to be of one size.

    Example:
        >>> preview(GlobalNorm(max_norm=1.0), [0.5, 2.0, [3.0, 4.0]])
        [0.5, 1.0, [0.6, 0.8]]
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"preview({shown(strategy)}, ...): must be a strategy, as ClipConfig.parse(spec).gradient is one."
        )
    if strategy.needs.loss and (losses is None or len(losses) < len(norms)):
        raise ValueError(f"preview({describe(strategy)}, ...): judges the loss. Give losses, one per step.")
    after: list[float | list[float] | None] = []
    width = max((len(step) for step in norms if isinstance(step, Sequence)), default=1)
    layout = Layout.of_parameters(tuple(map(str, range(width))), [numel] * width, torch.device("cpu"))
    if strategy.needs.units is not None:
        layout = replace(layout, unit_S=torch.ones(width, dtype=torch.bool))
    state = strategy.init(layout)
    for i, step in enumerate(norms):
        given = list(step) if isinstance(step, Sequence) else [step]
        norm_S = torch.tensor(given + [0.0] * (width - len(given)), dtype=layout.dtype)
        size_S = torch.as_tensor(weights, dtype=layout.dtype).expand(width)
        loss = None if losses is None else torch.tensor(losses[i], dtype=layout.dtype)
        stats = NormStats(norm_S.square(), layout, norm_S.abs() / numel**0.5, loss, size_S.square())
        plan, state = strategy.update(stats, state)
        if plan.skip is not None and bool(plan.skip):
            after.append(None)
            continue
        norm_S = norm_S * plan.scale_S
        if plan.bound_S is not None:
            norm_S = torch.minimum(norm_S, plan.bound_S * numel**0.5)
        left = [float(f"{number:.4g}") for number in norm_S.tolist()[: len(given)]]
        after.append(left if isinstance(step, Sequence) else left[0])
    return after
