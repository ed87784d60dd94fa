"""Which of the values that clipping gives are logged, by the word after `clip/` or `clip_update/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_gradclip.strategy import SpecError

WORDS = (
    *("norm_mean", "norm_max", "norm_post", "scale", "scale_max", "threshold"),
    *("rate", "tensor_rate", "skipped", "nonfinite"),
)


def read_words(log: Any) -> tuple[str, ...]:
    """What is written as `log`: "all", "none", one word, several with commas, or a list.

    Raises:
        SpecError: for a word that there is not, or one that comes twice.
    """
    given = log
    if isinstance(log, str):
        log = WORDS if log == "all" else () if log == "none" else [word.strip() for word in log.split(",")]
    if not isinstance(log, Sequence) or any(word not in WORDS or log.count(word) > 1 for word in log):
        raise SpecError(f"ClipConfig(log={given!r}): must be all, none, or each once of {', '.join(WORDS)}.")
    return tuple(log)


def is_ours(key: str) -> bool:
    """Whether a logged key is of clipping."""
    prefix, _, word = key.rpartition("/")
    return prefix.startswith("clip") and word in WORDS


def pick(scalars: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Those of clipping that have one of these words, in their order, after what is not of clipping."""
    prefixes = dict.fromkeys(key.rpartition("/")[0] for key in scalars if is_ours(key))
    chosen = [f"{prefix}/{word}" for prefix in prefixes for word in words]
    rest = {key: value for key, value in scalars.items() if not is_ours(key)}
    return rest | {key: scalars[key] for key in chosen if key in scalars}
