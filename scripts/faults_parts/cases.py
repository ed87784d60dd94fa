"""Which cases: an array in which every pair of levels meets on every backend, and more of them on the cheapest."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from hf_gradclip.config import ClipConfig
from hf_gradclip.spec import preset_names, strategy_class, strategy_names
from hf_gradclip.strategy import Strategy, parts_of

FAULTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e30": 1e30, "subnormal": 1e-40, "zero": 0.0}
"""What the broken elements of a gradient are."""
NOT_FINITE = ("nan", "inf", "-inf")
WHERE = ("one element", "one tensor", "one rank", "all ranks")
"""One element and one tensor are of the last rank; one rank is every tensor of it."""
WHEN = {"step 1": range(1), "warm-up": range(3, 4), "mid-run": range(20, 21), "200 in a row": range(6, 206)}
"""In which steps, counted from 0."""
WARMUP = 8
"""Steps of a warm-up, of every strategy that has one."""
AFTER = 10
"""Sound steps at the end of every run."""
BACKENDS = ("plain", "trainer", "trainer bf16", "fp16 GradScaler", "ddp", "fsdp2", "zero2", "zero3")
ONE_PROCESS = BACKENDS[:4]
CLIPS = ("gradient", "update")
OPTIMIZERS = ("torch", "ours")
LIMITS = {
    "global_norm": {"max_norm": 0.3},
    "param_norm": {"max_norm": 0.1},
    "value": {"max_value": 0.02},
    "block_rms": {"max_rms": 0.5},
    "soft": {"max_norm": 0.3},
}
"""Of strategies whose limit has no default."""
TOGETHER = {
    "skip_step on both": "skip_step:on=both",
    "skip_step+zclip": f"skip_step+zclip:warmup_steps={WARMUP}",
    "groups": f"embed*=global_norm:max_norm=0.1;*0*=adaptive_norm;*=adagc:warmup_steps={WARMUP}",
}


def strategies() -> dict[str, Strategy]:
    """Every strategy and preset of the package, and some together; a warm-up is short."""
    made: dict[str, Strategy] = {}
    for name in strategy_names():
        cls: Any = strategy_class(name)
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        made[name] = cls(**{**dict.fromkeys(needed, 1.0), **LIMITS.get(name, {})})
    made |= {name: ClipConfig.parse(name).gradient for name in preset_names()}
    made |= {name: ClipConfig.parse(spec).gradient for name, spec in TOGETHER.items()}
    return {name: _short(strategy) for name, strategy in made.items()}


def _short(strategy: Strategy) -> Strategy:
    known: Any = strategy
    return replace(known, warmup_steps=WARMUP) if hasattr(strategy, "warmup_steps") else strategy


STRATEGIES = strategies()
FACTORS: dict[str, Sequence[str]] = {
    "fault": tuple(FAULTS),
    "where": WHERE,
    "when": tuple(WHEN),
    "strategy": tuple(STRATEGIES),
    "clip": CLIPS,
    "optimizer": OPTIMIZERS,
}


@dataclass(frozen=True)
class Case:
    """One run with a fault in it.

    Args:
        number: of the case; it is the seed of its model too.
        backend: of BACKENDS.
        fault: of FAULTS.
        where: of WHERE.
        when: of WHEN.
        strategy: of STRATEGIES.
        clip: whether that clips the gradient, or the update of a gradient that is only measured.
        optimizer: torch's AdamW, or that of hf_gradclip.optim.
    """

    number: int
    backend: str
    fault: str
    where: str
    when: str
    strategy: str
    clip: str
    optimizer: str

    @property
    def steps(self) -> int:
        """How many the run has, if nothing stops it."""
        return WHEN[self.when].stop + AFTER


def is_possible(backend: str, row: Mapping[str, str]) -> bool:
    """Whether a row, or what there is of it, can be: some strategies do not clip updates, and a loop cannot."""
    if row.get("clip") == "update":
        if backend == "plain" and row.get("optimizer") == "torch":
            return False
        if "strategy" in row:
            parts = parts_of(STRATEGIES[row["strategy"]])
            return not any(part.skips or part.needs.units is not None for part in parts)
    return True


Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(row: Mapping[str, str]) -> Iterator[Pair]:
    """Each two of its levels."""
    yield from itertools.combinations(sorted(row.items()), 2)


def every_pair(factors: Mapping[str, Sequence[str]], possible: Callable[[Mapping[str, str]], bool]) -> set[Pair]:
    """All that can be."""
    found = set()
    for a, b in itertools.combinations(sorted(factors), 2):
        found |= {((a, x), (b, y)) for x in factors[a] for y in factors[b] if possible({a: x, b: y})}
    return found


def covering(
    factors: Mapping[str, Sequence[str]],
    possible: Callable[[Mapping[str, str]], bool],
    rng: random.Random,
    once: Sequence[str] = (),
) -> list[dict[str, str]]:
    """Rows in which every pair of levels meets: greedily, the level with the most pairs that are new comes first.

    Args:
        factors: the levels of each.
        possible: whether a row can be, or the part of one that there is yet.
        rng: decides between equals.
        once: factors whose levels need only be met, with whatever.
    """
    left = {pair for pair in every_pair(factors, possible) if not {name for name, _ in pair} & {*once}}
    left |= {((name, level), (name, level)) for name in once for level in factors[name]}
    rows: list[dict[str, str]] = []
    while left:
        row: dict[str, str] = dict(rng.choice(sorted(left)))
        others = [name for name in factors if name not in row]
        rng.shuffle(others)
        for name in others:
            may = [level for level in factors[name] if possible({**row, name: level})]
            new = [
                sum(tuple(sorted([(name, level), item])) in left for item in [(name, level), *row.items()])
                for level in may
            ]
            row[name] = rng.choice([level for level, count in zip(may, new, strict=True) if count == max(new)])
        rows.append(row)
        left -= {*pairs_of(row), *((item, item) for item in row.items())}
    return rows


def cases(seed: int, count: int, deep: bool = False) -> list[Case]:
    """The cases of a seed: the array of each backend, and different others on `plain` until there are so many.

    Args:
        seed: of all that is drawn.
        count: the least number of cases.
        deep: whether each strategy meets every level on every backend, and not on `plain` alone.
    """
    rng, rows = random.Random(seed), []
    for backend in BACKENDS:

        def possible(row: Mapping[str, str], backend: str = backend) -> bool:
            return is_possible(backend, row)

        once = () if deep or backend == "plain" else ("strategy",)
        rows += [(backend, row) for row in covering(FACTORS, possible, rng, once)]
    known = {tuple(sorted(row.items())) for backend, row in rows if backend == "plain"}
    while len(rows) < count:
        row = {name: rng.choice(levels) for name, levels in FACTORS.items()}
        key = tuple(sorted(row.items()))
        if is_possible("plain", row) and key not in known:
            known.add(key)
            rows.append(("plain", row))
    return [Case(number, backend, **row) for number, (backend, row) in enumerate(rows)]
