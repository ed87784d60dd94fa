"""Run on several ranks: the scenarios of scenarios.py, each named with its backend, as in `table:ddp`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch.distributed as dist

from tests.integrations.ranks import serve
from tests.integrations.scenarios import SCENARIOS
from tests.integrations.sharded import without_shared_memory


def scenario(name: str) -> Any:
    word, _, backend = name.partition(":")
    return SCENARIOS[word](backend)


if __name__ == "__main__":
    if any("zero" in name for name in sys.argv[2:]):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        without_shared_memory()
        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    serve(scenario)
