"""What is done by itself after a step whose norm stands out: `ClipConfig.after_spike`.

"lower_rate"                          with its defaults
"lower_rate:factor=0.1,steps=50"      name:key=value,...
"lower_rate+stop:spikes=3,steps=100"  both
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hf_gradclip.strategy import SpecError, check_types, require


@dataclass(frozen=True)
class LowerRate:
    """Multiply the learning rate by `factor` in the step that stands out, and in the ones after it.

    The factor is put in around `optimizer.step()` and taken out again, so that schedules go on as ever. A spike in that
    time begins it anew.

    Args:
        factor: in (0, 1).
        steps: how many in all; >= 1.
    """

    factor: float = 0.1
    steps: int = 50

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "factor", lambda v: 0 < v < 1, "must be between 0 and 1. The default is 0.1.")
        require(self, "steps", lambda v: v >= 1, "must be >= 1. The default is 50.")


@dataclass(frozen=True)
class Stop:
    """End the run when `spikes` of the last `steps` steps stand out.

    Under the Trainer as `control.should_training_stop` does; elsewhere with SpikeLimitError.

    Args:
        spikes: >= 1.
        steps: >= spikes.
    """

    spikes: int = 3
    steps: int = 100

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "spikes", lambda v: v >= 1, "must be >= 1. The default is 3.")
        require(self, "steps", lambda v: v >= 1, "must be >= 1. The default is 100.")
        words = f"must be >= spikes, which is {self.spikes}: fewer steps never hold so many."
        require(self, "steps", lambda v: v >= self.spikes, words)


Reaction = LowerRate | Stop
REACTIONS: dict[str, type[LowerRate | Stop]] = {"lower_rate": LowerRate, "stop": Stop}


def read_reactions(spec: Any) -> tuple[Reaction, ...]:
    """The reactions that are written.

    Raises:
        SpecError: for anything else, or one of a kind twice.
    """
    if spec is None:
        return ()
    given = spec.split("+") if isinstance(spec, str) else spec if isinstance(spec, (list, tuple)) else [spec]
    found = tuple(_read(part) for part in given)
    if len({*map(type, found)}) < len(found):
        raise SpecError(f"after_spike={spec!r}: one of a kind suffices. Leave the other out.")
    return found


def written(reactions: tuple[Reaction, ...]) -> str:
    """As text that `read_reactions` takes."""
    words = {kind: word for word, kind in REACTIONS.items()}
    shown = [(r, ",".join(f"{f.name}={getattr(r, f.name)!r}" for f in fields(r))) for r in reactions]
    return "+".join(f"{words[type(reaction)]}:{values}" for reaction, values in shown)


def _read(part: Any) -> Reaction:
    if isinstance(part, (LowerRate, Stop)):
        return part
    name, colon, rest = str(part).strip().partition(":")
    if not isinstance(part, str) or name not in REACTIONS:
        raise SpecError(f"after_spike={part!r}: must be {' or '.join(REACTIONS)}, with :key=value,... after it.")
    known = [field.name for field in fields(REACTIONS[name])]
    values: dict[str, Any] = {}
    for item in rest.split(",") if colon else []:
        key, _, value = (piece.strip() for piece in item.partition("="))
        if key not in known:
            raise SpecError(f"after_spike={part!r}: {name} has no field {key!r}. It has {', '.join(known)}.")
        try:
            values[key] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise SpecError(f"after_spike={part!r}: {key}={value} must be a number.") from None
    try:
        return REACTIONS[name](**values)
    except SpecError as error:
        raise SpecError(f"after_spike={part!r}: {error}") from None
