"""A strategy of its own for each group of parameters, by patterns over their names: budgets by name.

Under one limit for the whole gradient, one tensor that is far too large starves all others. Groups are judged apart,
from one measurement of all of them: one read of the gradients, one reduction over ranks, one read to the host.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_gradclip.patterns import REGEX, Group, UnitsByName, label_of
from hf_gradclip.strategy import Needs, SpecError, State, Stateless, Strategy, describe, parts_of
from hf_gradclip.types import ClipPlan, Layout, NormStats, cached


@dataclass(frozen=True)
class Split:
    """The segments of a layout by group.

    Args:
        layouts: of each group; None for one without parameters here.
        order_S: the segments, one group after another, int64, shape (S,).
        back_S: of each segment its place in `order_S`.
    """

    layouts: tuple[Layout | None, ...]
    order_S: Tensor
    back_S: Tensor

    def stats(self, whole: NormStats) -> list[NormStats | None]:
        """What was measured, of each group."""
        sizes = [0 if layout is None else len(layout) for layout in self.layouts]

        def parts(vector_S: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(sizes) if vector_S is None else vector_S[self.order_S].split(sizes)

        columns = [parts(whole.sumsq_S), parts(whole.max_abs_S), parts(whole.weight_sumsq_S)]
        return [
            None if layout is None else NormStats(sumsq_S, layout, largest_S, whole.loss, weight_S)
            for layout, sumsq_S, largest_S, weight_S in zip(self.layouts, *columns, strict=True)
        ]

    def joined(self, numbers: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """A number per segment, in the layout's order, of one per segment or for all of each group.

        Args:
            numbers: of each group with parameters; None where there is none, which is inf.
            like: gives dtype and device.
        """
        layouts = [layout for layout in self.layouts if layout is not None]
        there = [like.new_full((), torch.inf) if number is None else number.to(like) for number in numbers]
        return torch.cat([number.expand(len(layout)) for number, layout in zip(there, layouts, strict=True)])[
            self.back_S
        ]


@dataclass(frozen=True)
class Budgets(Strategy):
    """A strategy for each group of parameters, with a state of its own. The first pattern that finds a name wins.

    Args:
        groups: at least one. Every trainable parameter must be found by one of them.

    Raises:
        SpecError: for no group, one pattern or label twice, groups inside a group.

    References:
        Groups with limits of their own: Li, Wu, Chang, "AGGC", 2026, arXiv 2601.11864.
    """

    groups: tuple[Group, ...]

    per_parameter = True

    def __post_init__(self) -> None:
        if not self.groups:
            raise SpecError("{}: groups must hold a pattern and its strategy, as in {'embed*': 1.0, '*': 'adaptive'}.")
        for word in ("pattern", "label"):
            seen = [getattr(group, word) for group in self.groups]
            if twice := next((value for value in seen if seen.count(value) > 1), None):
                fix = "Leave one out." if word == "pattern" else "Give one of them a name: 'pattern as name'."
                raise SpecError(f"{describe(self)}: two groups have the {word} {twice!r}. {fix}")
        for group in self.groups:
            if isinstance(group.strategy, Budgets):
                raise SpecError(f"{group.pattern}: a group cannot hold groups. Write all of them in one row.")

    @cached
    def labels(self) -> tuple[str, ...]:
        """Of the groups, in order."""
        return tuple(group.label for group in self.groups)

    @cached
    def needs(self) -> Needs:
        """What any group needs; cut into units are the parameters of those that ask for it."""
        needs = [group.strategy.needs for group in self.groups]
        by_unit = any(need.units is not None for need in needs)
        units = tuple((group, need.units) for group, need in zip(self.groups, needs, strict=True))
        return Needs(
            max_abs=any(need.max_abs for need in needs),
            loss=any(need.loss for need in needs),
            units=UnitsByName(groups=units) if by_unit else None,
            weights=any(need.weights for need in needs),
        )

    def numbers_of(self, names: Sequence[str]) -> list[int | None]:
        """Of each name the number of its group; None where no pattern finds it."""
        return [next((i for i, group in enumerate(self.groups) if group.finds(name)), None) for name in names]

    def split(self, layout: Layout) -> Split:
        """The segments of a layout by group; computed once for each layout.

        Raises:
            SpecError: if a parameter is in no group.
        """
        kept: dict[Budgets, Split] = vars(layout).setdefault("splits", {})
        if self not in kept:
            kept[self] = self._split(layout)
        return kept[self]

    def _split(self, layout: Layout) -> Split:
        numbers = self.numbers_of(layout.names)
        self.insist_on_all([name for name, number in zip(layout.names, numbers, strict=True) if number is None])
        group_P = torch.tensor([number or 0 for number in numbers], dtype=torch.int64, device="cpu")
        param_S = layout.param_S.cpu()
        unit_S = None if layout.unit_S is None else layout.unit_S.cpu()
        numel_S, group_S = layout.numel_S.cpu(), group_P[param_S]
        order_S = group_S.argsort(stable=True)
        layouts: list[Layout | None] = []
        for i, group in enumerate(self.groups):
            mine_P, mine_S = (group_P == i).nonzero()[:, 0], (group_S == i).nonzero()[:, 0]
            place_P = torch.zeros_like(group_P).index_put((mine_P,), torch.arange(len(mine_P)))
            cut_S = None if unit_S is None or group.strategy.needs.units is None else unit_S[mine_S]
            part = Layout(
                tuple(layout.names[p] for p in mine_P.tolist()), numel_S[mine_S], place_P[param_S[mine_S]], cut_S
            )
            layouts.append(part.to(layout.device) if len(mine_P) else None)
        return Split(tuple(layouts), order_S.to(layout.device), order_S.argsort().to(layout.device))

    def insist_on_all(self, uncovered: Sequence[str]) -> None:
        """Stop where a trainable parameter is in no group.

        Raises:
            SpecError: with its name.
        """
        if uncovered:
            more = f" and {len(uncovered) - 3} more" if len(uncovered) > 3 else ""
            raise SpecError(
                f"{describe(self)}: no pattern finds {', '.join(uncovered[:3])}{more}, which would not be clipped. "
                "Add a group '*' for the rest: '*=adaptive', or '*=none' to leave it alone."
            )

    def insist_on_names(self, names: Sequence[str]) -> None:
        """Stop where a pattern finds no parameter of a model, trained or frozen, or stands behind `*`, which has all.

        `*` may find none that is left.

        Raises:
            SpecError: with the pattern and the nearest names.
        """
        for i, group in enumerate(self.groups):
            if i and self.groups[i - 1].pattern == "*":
                raise SpecError(
                    f"{describe(self)}: {group.pattern!r} stands behind '*', which has all parameters. Put it in front."
                )
            if group.pattern == "*" or any(map(group.finds, names)):
                continue
            bare = group.pattern.removeprefix(REGEX).strip("*")
            inside = [name for name in names if bare in name]
            tails = {tail: name for name in names for tail in _tails(name)}
            near = [tails[tail] for tail in difflib.get_close_matches(bare, tails, n=3, cutoff=0.5)]
            known = [*dict.fromkeys(inside + near)][:3]
            fix = f"Write {f'*{bare}*' if inside else known[0]!r}, or leave" if known else "Leave"
            raise SpecError(
                f"{describe(self)}: the pattern {group.pattern!r} finds no parameter. A glob must match a whole name, "
                f"or its tail after a dot. There are {', '.join(known or names[:3])}. {fix} group {i + 1} out."
            )

    def idle_among(self, names: Sequence[str]) -> list[str]:
        """The patterns whose parameters are all in groups before them; not those that find everything, for the rest."""
        numbers = self.numbers_of(names)
        idle = [group for i, group in enumerate(self.groups) if i not in numbers]
        return [group.pattern for group in idle if any(map(group.finds, names)) and not all(map(group.finds, names))]

    def init(self, layout: Layout) -> State:
        """A tuple with the state of each group; of one without parameters, nothing."""
        layouts = self.split(layout).layouts
        return tuple(
            Stateless() if part is None else group.strategy.init(part)
            for group, part in zip(self.groups, layouts, strict=True)
        )

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """Ask each group; the plan has a threshold where there is one group."""
        split = self.split(stats.layout)
        states = list(state)
        by_group = {}
        for i, (group, part) in enumerate(zip(self.groups, split.stats(stats), strict=True)):
            if part is not None:
                plan, states[i] = group.strategy.update(part, states[i])
                by_group[group.label] = part, plan
        plans = [plan for _, plan in by_group.values()]
        skips = [plan.skip for plan in plans if plan.skip is not None]
        bounds = [plan.bound_S for plan in plans]
        return ClipPlan(
            scale_S=split.joined([plan.scale_S for plan in plans], stats.sumsq_S),
            bound_S=split.joined(bounds, stats.sumsq_S) if any(bound is not None for bound in bounds) else None,
            threshold=plans[0].threshold if len(plans) == 1 else None,
            skip=torch.stack(skips).any() if skips else None,
            by_group=by_group,
        ), tuple(states)

    def _made_of(self) -> tuple[Strategy, ...]:
        return tuple(part for group in self.groups for part in parts_of(group.strategy))

    def _written(self, word: Callable[[Strategy], str]) -> str | None:
        written = []
        for group in self.groups:
            label = "" if group.label == label_of(group.pattern) else f" as {group.label}"
            written.append(f"{group.pattern}{label}={word(group.strategy)}")
        return ";".join(written)

    def names_of(self, key: str, layout: Layout) -> tuple[str, ...]:
        """Of which parameters a tensor of the state is, by its path in `flatten`."""
        part = self.split(layout).layouts[int(key.partition(".")[0])]
        return () if part is None else part.names


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
