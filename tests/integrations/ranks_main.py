"""Run on two ranks: scenarios of which some fail, for the test of the harness."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from tests.integrations.ranks import serve


def scenario(name: str) -> int:
    """The sum of 1 over the ranks; or a failure on rank 1, while rank 0 waits for it; or the death of both."""
    if name == "one rank fails" and dist.get_rank() == 1:
        raise ValueError("only here")
    if name == "dies":
        os.abort()
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    serve(scenario)
