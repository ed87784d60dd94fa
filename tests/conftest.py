"""One thread per process: the models are tiny, and several processes with two threads each wait for each other."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
