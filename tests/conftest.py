"""One thread per process: the models are tiny, and several processes with two threads each wait for each other.

Without a GPU Triton is imported as an interpreter, before anything else imports it: it reads TRITON_INTERPRET while its
own functions are defined. The variable is gone again afterwards, so that child processes compile.
"""

from __future__ import annotations

import importlib.util
import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    asked = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if asked is None:
        del os.environ["TRITON_INTERPRET"]
