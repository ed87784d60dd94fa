"""Run by `hf-gradclip run` on two ranks: what a script makes that does not know us, and one that does.

python doors_main.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.integrations import stock_main

CLIP = "zclip:warmup_steps=3,z_threshold=0.5"


def main() -> None:
    folder = Path(sys.argv[1])
    stock_main.main(folder / "run")

    from hf_gradclip import GradClipTrainer, attach  # not before

    stock_main.main(
        folder / "ours", lambda accelerator: attach(accelerator, CLIP, auto=True), cls=GradClipTrainer, clip=CLIP
    )


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
