"""Run on two ranks: scripts/finetune.py under FSDP2, with Accelerate's FSDP branch forced on gloo."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import hf_gradclip
from scripts import finetune
from tests.integrations.sharded import fsdp_on_cpu


class AssertSharded(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters()), "sharded, not DDP under another name"
        print("every parameter is a DTensor", flush=True)


class Sharded(hf_gradclip.GradClipTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, callbacks=[AssertSharded()], **kwargs)


if __name__ == "__main__":
    finetune.GradClipTrainer = Sharded
    with fsdp_on_cpu():
        finetune.main(sys.argv[1:])
    dist.destroy_process_group()
