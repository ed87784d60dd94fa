"""A clip state with the right keys and wrong values is not taken: the strategy starts anew, and says so."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from hf_gradclip import Clipper, GradClipTrainer
from hf_gradclip.state import flatten
from tests.integrations.loops import StopAt
from tests.tiny import train

STRATEGIES = [
    "zclip",
    "adagc:warmup_steps=5",
    "autoclip",
    "skip_step",
    "adaptive_norm",
    "adaptive_tensors",
    "none+zclip",
]


def trained(spec: str, steps: int = 20) -> tuple[Clipper, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    clipper = Clipper.for_model(model, spec)
    for _ in range(steps):
        clip(clipper, model)
    return clipper, model


def clip(clipper: Clipper, model: torch.nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    clipper.step()


def keys_of(spec: str, floating: bool = True) -> list[str]:
    clipper, _ = trained(spec, 0)
    return [key for key, value in flatten(clipper.state).items() if value.is_floating_point() == floating]


FLOATS = [(spec, key) for spec in STRATEGIES for key in keys_of(spec)]
WHOLE = [(spec, key) for spec in STRATEGIES for key in keys_of(spec, floating=False)]


def is_refused(spec: str, saved: dict, words: str) -> None:
    clipper, model = trained(spec, 0)
    fresh = {key: value.clone() for key, value in flatten(clipper.state).items()}
    message = clipper.load_state_dict(saved)
    assert words in message
    assert message.endswith("starts anew.")
    assert clipper.guard.skips_in_a_row == 0
    assert all(torch.equal(value, fresh[key]) for key, value in flatten(clipper.state).items())
    clip(clipper, model)
    assert all(value.isfinite().any() for value in flatten(clipper.state).values())


@pytest.mark.parametrize(("spec", "key"), FLOATS)
def test_nan(spec, key) -> None:
    saved = trained(spec)[0].state_dict()
    assert trained(spec, 0)[0].load_state_dict(saved) == "", "whole it is taken"
    saved["state"][key].view(-1)[0] = math.nan
    is_refused(spec, saved, f"The checkpoint's clip state is damaged: {key} cannot be so.")


@pytest.mark.parametrize(("spec", "key"), [case for case in FLOATS if case[1].endswith(("mean", "var"))])
def test_inf_where_a_new_state_is_finite(spec, key) -> None:
    saved = trained(spec)[0].state_dict()
    saved["state"][key].view(-1)[0] = math.inf
    is_refused(spec, saved, f"The checkpoint's clip state is damaged: {key} cannot be so.")


@pytest.mark.parametrize(("spec", "key"), FLOATS + WHOLE)
@pytest.mark.parametrize("kind", ["complex", "sparse", "meta", "other"])
def test_tensors_of_another_kind(spec, key, kind) -> None:
    saved = trained(spec)[0].state_dict()
    value = saved["state"][key]
    other = torch.int64 if value.is_floating_point() else torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {
            "complex": value.to(torch.complex64),
            "sparse": value.to_sparse(),
            "meta": value.to("meta"),
            "other": value.nan_to_num(posinf=0).to(other) if value.is_floating_point() else value.to(other),
        }
    saved["state"][key] = made[kind]
    is_refused(spec, saved, f"The checkpoint's clip state is damaged: {key} cannot be so.")


@pytest.mark.parametrize(
    "change",
    [
        {"names": 3},
        {"names": None},
        {"names": {"0.weight": 1}},
        {"names": [1, 2, 3, 4]},
        {"state": None},
        {"state": []},
        {"state": {"mean": 1.0}},
        {"state": {1: torch.ones(())}},
        {"spec": 5},
        {"strategy": None},
        {"skips_in_a_row": "3"},
        {"skips_in_a_row": -1},
        {"skips_in_a_row": float("nan")},
        {"skips_in_a_row": None},
    ],
    ids=str,
)
def test_values_of_another_kind(change) -> None:
    saved = {**trained("zclip")[0].state_dict(), **change}
    is_refused("zclip", saved, "The saved clip state cannot be read, so zclip starts anew.")


@pytest.mark.parametrize("saved", [None, 5, [], "state"])
def test_what_is_no_dict(saved) -> None:
    is_refused("zclip", saved, "The saved clip state cannot be read, so zclip starts anew.")


@pytest.mark.parametrize("change", ["nan", "words"])
def test_a_run_goes_on_beside_it(tmp_path, caplog, change) -> None:
    settings = {"clip": "zclip:warmup_steps=5", "max_steps": 20}
    train(GradClipTrainer, callbacks=[StopAt(10)], output_dir=str(tmp_path), **settings)
    path = tmp_path / "checkpoint-10" / "gradclip.pt"
    saved = torch.load(path, weights_only=True)
    if change == "nan":
        saved["state"]["mean"].fill_(math.nan)
    else:
        saved["names"] = 3
    torch.save(saved, path)
    resumed = train(GradClipTrainer, resume=str(path.parent), **settings)
    words = {"nan": "is damaged: mean cannot be so", "words": "cannot be read, so zclip"}[change]
    assert f"gradclip.pt: The {'checkpoint' if change == 'nan' else 'saved'}" in caplog.text
    assert words in caplog.text
    assert int(resumed.clipper.state.seen) == 10
    assert resumed.clipper.state.mean.isfinite()
