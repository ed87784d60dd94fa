"""What DeepSpeed settings are refused at start-up, by name and with a way out; and the probe of its attributes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import verify_ninja_availability

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from hf_gradclip import ClipConfig
from hf_gradclip.integrations.deepspeed import seams_of
from hf_gradclip.integrations.deepspeed_refusals import refuse_settings
from hf_gradclip.run.updates import Updates
from hf_gradclip.views.view import UnsupportedBackendError

pytestmark = pytest.mark.deepspeed
SKIP = ClipConfig.parse("zclip")


def engine(
    name: str = "DeepSpeedZeroOptimizer",
    kind: str = "DeepSpeedEngine",
    nvme: str = "",
    ranks: int = 1,
    experts: bool = False,
    **zero: Any,
) -> Any:
    """A stand-in with the attributes that a refusal looks at."""
    optimizer = type(name, (), zero)()
    offload = {word: SimpleNamespace(device=SimpleNamespace(value="nvme" if nvme == word else "cpu")) for word in "op"}
    members = {
        "optimizer": optimizer,
        "mp_world_size": ranks,
        "has_moe_layers": experts,
        "zero_offload_optimizer": lambda self: offload["o"],
        "zero_offload_param": lambda self: offload["p"],
    }
    return type(kind, (), members)()


def test_ninja_comes_with_it() -> None:
    """DeepSpeed compiles at its start; the launches of the tests leave that out, see `without_shared_memory`."""
    verify_ninja_availability()


def test_a_plain_setting_passes() -> None:
    refuse_settings(engine(), SKIP)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (engine(kind="PipelineEngine"), "pipeline parallelism.*Use ZeRO without a pipeline"),
        (engine(ranks=2), "tensor parallelism.*Use ZeRO alone"),
        (engine(zenflow=True), "ZenFlow.*Use plain optimizer offload"),
        (engine("SuperOffloadOptimizer_Stage3"), "SuperOffload.*Use plain optimizer offload"),
        (engine(nvme="o"), 'NVMe offload.*Use offload to "cpu"'),
        (engine(nvme="p"), 'NVMe offload.*Use offload to "cpu"'),
        (engine(compute_grad_norm=False), "compute_grad_norm=false.*Use compute_grad_norm=true"),
        (engine("DeepSpeedZeroOptimizer_Stage3", experts=True), "mixture of experts.*Use a model without"),
        (engine(use_muon=True), "Muon.*Use another optimizer"),
        (engine(torch_autocast_gradscaler=object()), "torch_autocast with a GradScaler.*Use torch_autocast in bf16"),
        (engine("FP16_UnfusedOptimizer"), "ZeRO stage 0 in bf16 or fp16.*Use stage 1, or float32"),
    ],
    ids=lambda value: value.split(".*")[0] if isinstance(value, str) else "",
)
def test_refused_by_name(found, words) -> None:
    with pytest.raises(UnsupportedBackendError, match=words):
        refuse_settings(found, SKIP)


def test_pass_is_refused_where_zero_skips_itself() -> None:
    with pytest.raises(UnsupportedBackendError, match=r"nonfinite='pass' under DeepSpeed ZeRO.*Use nonfinite='skip'"):
        refuse_settings(engine(), ClipConfig.parse("zclip", nonfinite="pass"))


def test_a_release_without_the_seams_is_named() -> None:
    found = engine(scaled_global_norm=None, clip_grad=0.0)
    found.module = torch.nn.Linear(2, 2)
    with pytest.raises(
        UnsupportedBackendError, match=r"DeepSpeed 0\.\d+\.\d+.*has no unscale_and_clip_grads.*constraints"
    ):
        seams_of(found, SKIP, Updates(SKIP, say=False))
