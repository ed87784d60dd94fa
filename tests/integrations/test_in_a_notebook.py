"""What the package says of itself where a person looks: names, versions, arguments, reprs, the report of a run."""

from __future__ import annotations

import ast
import base64
import importlib.metadata
import inspect
import pydoc
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

import hf_gradclip
from hf_gradclip import Clipper, GradClipMixin, GradClipTrainer, attach
from hf_gradclip.cli import main
from hf_gradclip.integrations import trainer as module
from tests.tiny import counting_data, tiny_llama, training_args

ROOT = Path(__file__).parents[2]
RECORDED = {"gradient": "global_norm:max_norm=0.5", "record": True}


def test_every_name_is_listed() -> None:
    assert {*hf_gradclip.__all__, "__version__"} <= {*dir(hf_gradclip)}
    assert "GradClipTrainer" in pydoc.render_doc(hf_gradclip)


def test_the_version_is_that_of_the_package(capsys) -> None:
    version = importlib.metadata.version("hf-gradclip")
    assert hf_gradclip.__version__ == version
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"hf-gradclip {version}\n"


def test_a_trainer_shows_the_arguments_of_its_own_kind() -> None:
    theirs = [*inspect.signature(Trainer).parameters]
    assert [*inspect.signature(GradClipTrainer).parameters] == [*theirs, "clip"]

    class Mine(Trainer):
        def __init__(self, *args, strength: float = 1.0, **kwargs) -> None:
            super().__init__(*args, **kwargs)

    class Clipped(GradClipMixin, Mine): ...

    class Below(Clipped):
        def __init__(self, wide: int) -> None:
            super().__init__()

    assert [*inspect.signature(Clipped).parameters] == ["args", "strength", "clip", "kwargs"]

    class Taken(Trainer):
        def __init__(self, model=None, clip: float = 1.0) -> None:
            super().__init__(model)

    class Both(GradClipMixin, Taken): ...

    assert [*inspect.signature(Both).parameters] == ["model", "clip"]
    assert [*inspect.signature(Below).parameters] == ["wide"]


def test_what_a_type_checker_sees_are_the_arguments_of_the_trainer() -> None:
    tree = ast.parse(inspect.getsource(module))
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GradClipTrainer")
    (init,) = (node for node in ast.walk(made) if isinstance(node, ast.FunctionDef))
    assert [argument.arg for argument in init.args.args] == [*inspect.signature(Trainer.__init__).parameters]
    assert [argument.arg for argument in init.args.kwonlyargs] == ["clip"]


def test_an_unknown_setting_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"nonfinit='skip'\): is no setting. Did you mean nonfinite\?"):
        Clipper.for_model(nn.Linear(2, 2), "adaptive", nonfinit="skip")


def test_reprs() -> None:
    accelerator = Accelerator(cpu=True)
    attachment = attach(accelerator, "global_norm:max_norm=0.01", auto=True)
    config = "global_norm:max_norm=0.01,norm_type=2 (nonfinite=skip)"
    assert repr(attachment) == f"LoopAttachment({config}, no model is prepared)"
    model = nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert "global_norm:max_norm=0.01" in repr(attachment)
    assert repr(attachment).endswith("segments) after 3 steps)")
    assert repr(attachment.clipper.report).startswith("ClipReport(clip, 3 steps;")


def test_a_summary_leaves_the_next_log_as_it_would_be() -> None:
    """Two clippers over the same gradients; of one the summary, the norms and the repr are asked for between."""
    found = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        for t in range(9):
            model(torch.randn(2, 4) * (float("nan") if t == 5 else 1)).square().sum().backward()
            clipper.step()
            model.zero_grad()
            if asks and t % 2:
                assert clipper.report.summary()["steps"] == t + 1 == clipper.report.steps
                assert len(clipper.report.norms()) == t + 1 - (t >= 5)
                repr(clipper.report)
        found.append((clipper.report.scalars(), clipper.report.summary(), clipper.report.scalars()))
    assert found[0] == found[1]
    assert found[0][0]["clip/rate"] > 0
    assert found[0][2] == {}


def trained(folder: Path, clip) -> GradClipTrainer:
    args = training_args(str(folder), max_steps=6)
    trainer = GradClipTrainer(model=tiny_llama(), args=args, train_dataset=counting_data(24), clip=clip)
    with pytest.raises(RuntimeError, match=r"clip_report\(\): no step was clipped yet. Call train\(\) first."):
        trainer.clip_report()
    trainer.train()
    return trainer


def images(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_the_report_of_a_run(tmp_path) -> None:
    report = trained(tmp_path, "global_norm:max_norm=0.5").clip_report()
    assert report.run is None
    assert report.summary["steps"] == 6 == len(report.norms)
    assert "clip: steps 6, clipped 3 (50.0%)" in repr(report)
    page = report._repr_html_()
    assert "clip: steps 6" in page
    (image,) = images(page)
    assert image.startswith(b"\x89PNG")


def test_the_report_of_a_recorded_run_says_what_its_page_says(tmp_path) -> None:
    report = trained(tmp_path, RECORDED).clip_report()
    assert "The gradient was clipped in 3 of 6 steps (50%)" in repr(report)
    assert [len(report.run.gradient), report.run.gradient.meta["spec"]] == [6, "global_norm:max_norm=0.5,norm_type=2"]
    assert len(images(report._repr_html_())) == 2


def test_a_notebook_without_matplotlib_shows_the_words(tmp_path, monkeypatch) -> None:
    report = trained(tmp_path, "adaptive").clip_report()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "clip: steps 6" in report._repr_html_()
    assert images(report._repr_html_()) == []


def test_the_report_of_a_run_of_peft_has_no_news_of_its_first_steps(tmp_path) -> None:
    """B is 0 until the rate rises, so that the gradient of A is exactly 0 in two steps: that is how LoRA begins."""
    args = training_args(str(tmp_path), max_steps=12, warmup_steps=4, learning_rate=1e-2)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = GradClipTrainer(model=model, args=args, train_dataset=counting_data(48), clip=RECORDED)
    trainer.train()
    report = trainer.clip_report()
    record = report.run.gradient
    zeros_P = (record.norm_TP == 0).sum(axis=0)
    assert {name.split(".")[-3]: int(count) for name, count in zip(record.names, zeros_P, strict=True)} == {
        "lora_A": 2,
        "lora_B": 0,
    }
    assert "exactly 0" not in repr(report)
    assert "base_model" not in repr(report)
