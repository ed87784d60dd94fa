"""One thread per process: the models are tiny, and several processes with two threads each wait for each other.

Without a GPU Triton is imported as an interpreter, before anything else imports it: it reads TRITON_INTERPRET while its
own functions are defined. The variable is gone again afterwards, so that child processes compile.

Which language serves is chosen anew for each test, so that none inherits what another one asked for or gave up.

What is there once all tests are collected stays to the end, and the garbage collector need not look through it again:
a Trainer calls for it in every run.

Files that start processes come first. With `-n 2 --dist loadfile` a file is one worker's, and the short ones are left
to even out the end.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    asked = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if asked is None:
        del os.environ["TRITON_INTERPRET"]


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist begins with the files that have the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("dist") or item.path.parent.name == "scripts"}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """Only the choice: what was checked stays checked."""
    yield
    from hf_gradclip.kernels import choice

    choice.language_of.cache_clear()
    choice._given_up.clear()
