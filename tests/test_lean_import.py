"""`import hf_gradclip` is light: no framework, no Triton, no CUDA; and every name it promises is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_gradclip

HEAVY = ("transformers", "accelerate", "deepspeed", "trl", "triton", "peft", "datasets", "pyarrow", "lightning")

SCRIPT = f"""
import json, sys
import torch
before = set(sys.modules)
import hf_gradclip
hf_gradclip.ClipConfig.parse("adaptive+value:max_value=1")
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps({{"heavy": sorted(new & set({HEAVY!r})), "cuda": torch.cuda.is_initialized(),
                   "ours": "hf_gradclip" in new}}))
"""


def run(script: str) -> dict:
    root = Path(hf_gradclip.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout)


def test_nothing_heavy_is_loaded():
    assert run(SCRIPT) == {"heavy": [], "cuda": False, "ours": True}


def test_the_test_sees_a_heavy_import():
    assert run(SCRIPT.replace("import hf_gradclip\n", "import hf_gradclip, accelerate\n"))["heavy"] != []


@pytest.mark.parametrize("name", sorted({*hf_gradclip.__all__} - {"__version__"}))
def test_every_public_name_is_there(name):
    value = getattr(hf_gradclip, name)
    assert callable(value)
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Cliper'"):
        hf_gradclip.Cliper  # noqa: B018
