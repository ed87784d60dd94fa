"""What Triton compiles of the calls of our launchers for an H100 or H200 (sm_90). No GPU is needed, and none is used.

The launchers run as they do on a GPU, on tensors of the CPU, and hand Triton their own arguments: which are pointers,
which are missing, which numbers are compiled in. Triton stops before the launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PRELUDE = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class H200:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

found = {}

def compile_only(self, *args, **options):
    kernel = run(self, *args, **(options | {"warmup": True}))
    name = f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}"
    found.setdefault(case, {})[name] = kernel.asm["ptx"]

driver.set_active(H200())
run, JITFunction.run = JITFunction.run, compile_only
CPU = torch.device("cpu")
"""


@cache
def compiled(script: str) -> dict[str, dict[str, str]]:
    """What a script launches: by what its variable `case` was, the PTX of each kernel by file and name.

    In a process of its own, where nothing has put Triton in the interpreter.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    whole = f"{PRELUDE}{script}\nprint(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, cwd=root, env=env)
    if done.returncode and "No module named 'triton'" in done.stderr:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
