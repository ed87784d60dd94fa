"""Run by accelerate launch: scripts/finetune.py under DeepSpeed, which compiles nothing for it."""

from __future__ import annotations

import sys

from scripts import finetune
from tests.integrations.sharded import without_shared_memory

if __name__ == "__main__":
    without_shared_memory()
    finetune.main(sys.argv[1:])
