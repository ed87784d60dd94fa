"""Run on several ranks: many scenarios in one start, what rank 0 found to a file.

python -m torch.distributed.run --nproc_per_node 2 -m tests.integrations.sharded_main OUT table:ddp resume:zero2 ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from tests.integrations.scenarios import SCENARIOS

if __name__ == "__main__":
    out, *wanted = sys.argv[1:]
    if any("zero" in word for word in wanted):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    found: dict[str, dict[str, Any]] = {}
    for word in wanted:
        scenario, _, backend = word.partition(":")
        found.setdefault(scenario, {}).update(SCENARIOS[scenario](backend))
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()
