"""The versions of other packages that the tests pass with, and where hf_gradclip hooks into each.

A version outside the range is no error: it is said once, together with the hooks that were found. A hook that is
missing is one, in any version, since nothing would be clipped.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.say import logger


class Tested(NamedTuple):
    """One package.

    Args:
        first: the oldest version that the tests pass with, in two numbers.
        last: the newest one.
        hooks: the names of methods without which nothing would be clipped.
    """

    first: tuple[int, int]
    last: tuple[int, int]
    hooks: tuple[str, ...]


TESTED = {
    "torch": Tested((2, 8), (2, 15), ("register_step_pre_hook", "register_step_post_hook")),
    "transformers": Tested(
        (5, 3),
        (5, 24),
        (
            "_clip_grad_norm",
            "_get_grad_norm",
            "_prepare_for_training",
            "create_accelerator_and_postprocess",
            "_save_optimizer_and_scheduler",
            "_load_optimizer_and_scheduler",
        ),
    ),
    "accelerate": Tested((1, 11), (1, 15), ("clip_grad_norm_", "unscale_gradients", "prepare")),
    "deepspeed": Tested((0, 19), (0, 19), ()),  # views/partitions.py knows what it needs of each optimizer
}
"""By the name of the package."""


@functools.cache
def insist_on_hooks(package: str, version: str, owner: Any) -> None:
    """Warn of an untested version, once in a process. See `untested`.

    Raises:
        UnsupportedBackendError: where a hook is missing.
    """
    if words := untested(package, version, owner):
        logger.warning(words)


def untested(package: str, version: str, owner: Any) -> str:
    """Words for a version that no test was run with; "" for one that is tested.

    Args:
        package: of TESTED.
        version: what is installed.
        owner: the class that should have the hooks.

    Raises:
        UnsupportedBackendError: where it lacks one.
    """
    row = TESTED[package]
    name = getattr(owner, "__name__", type(owner).__name__)
    missing = [hook for hook in row.hooks if not callable(getattr(owner, hook, None))]
    oldest, newest = (".".join(map(str, pair)) for pair in (row.first, row.last))
    what = f"{package} {version}"
    refuse(
        [
            Refusal(
                bool(missing),
                what,
                f"{name} has no {', '.join(missing)}, where hf_gradclip hooks in.",
                f"Install {package} {oldest} to {newest}, or leave clip out.",
            )
        ]
    )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or row.first <= (int(numbers[1]), int(numbers[2])) <= row.last:
        return ""
    probed = f" Its hooks are there ({', '.join(row.hooks)})." if row.hooks else ""
    those = oldest if oldest == newest else f"{oldest} to {newest}"
    return f"{what}: hf_gradclip was tested with {those}.{probed} Compare a few steps with your own clip."
