"""README.md, CONTRIBUTING.md and docs/ run as printed, and what they list is what the code has."""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer

import hf_gradclip.integrations.patch
import hf_gradclip.strategies
from hf_gradclip import ClipConfig, Clipper, GradClipTrainer
from hf_gradclip.cli import main
from hf_gradclip.spec import preset_names, strategy_class, strategy_names
from hf_gradclip.strategy import SpecError, describe
from tests.analysis.records import recorded
from tests.tiny import VOCAB, Enlarge, counting_data, tiny_llama, train, training_args, weights_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
DOCS = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
STEPS = 2


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two head lines."""
    table = re.search(rf"^## {heading}\n.*?((?:^\|[^\n]*\n)+)", text, re.MULTILINE | re.DOTALL)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def steep_llama() -> torch.nn.Module:
    """The tiny Llama with logits so large that every norm lies above 2."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model


def number_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What a reader is assumed to have: a fresh set for every block."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    rows_ = [{key: value.tolist() for key, value in row.items()} for row in counting_data(4 * STEPS)]
    model = steep_llama()
    return {
        "__name__": "readme",
        "model": model,
        "args": training_args(str(tmp_path), max_steps=STEPS),
        "dataset": Dataset.from_list(rows_),
        "tokenizer": number_tokenizer(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-3),
        "dataloader": DataLoader(Dataset.from_list(rows_).with_format("torch"), batch_size=4),
        "loss_of": lambda model, batch: model(**batch).loss,
    }


@pytest.fixture
def stepped_norms() -> Iterator[list[float]]:
    """The norm that each optimizer step sees, by torch in float64, whoever made the optimizer."""
    seen: list[float] = []

    def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad.double() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))

    handle = register_optimizer_step_pre_hook(record)
    yield seen
    handle.remove()


def clipper_in(names: dict[str, Any]) -> Clipper | None:
    """The clipper that a block made."""
    for key in ("trainer", "attachment"):
        if key in names:
            return names[key].clipper
    return names.get("clipper")


USES = dict(zip(("trainer", "trl", "accelerate", "torch", "function"), blocks(README, "python"), strict=True))
UPDATES = dict(zip(("trainer", "optimizer"), blocks(DOCS["updates"], "python"), strict=True))
DOORS = dict(zip(("patch", "patch_all", "flags"), blocks(DOCS["doors"], "python"), strict=True))
COMMANDS = [
    line
    for text in (README, *DOCS.values())
    for block in blocks(text, "sh")
    for line in block.splitlines()
    if line.startswith("hf-gradclip") and not line.startswith("hf-gradclip run")
]
RUNS = [
    line
    for text in (README, DOCS["doors"])
    for block in blocks(text, "sh")
    for line in block.splitlines()
    if "hf-gradclip run" in line or "hf_gradclip run" in line
]
(RECORD,) = blocks(DOCS["reference"], "python")


class TestUse:
    @pytest.mark.parametrize("name", USES)
    def test_every_step_is_clipped(self, name, names, stepped_norms):
        """By `adaptive`, which limits rows of so steep a model from the first step."""
        exec(compile(USES[name], f"README.md, {name}", "exec"), names)
        if name == "function":
            assert stepped_norms == pytest.approx([1.0] * STEPS, rel=1e-4)
            return
        summary = clipper_in(names).report.summary()
        assert (summary["steps"], summary["clipped"], summary["skipped"]) == (STEPS, STEPS, 0)
        assert max(stepped_norms) < 0.9 * summary["norm_median"]

    @pytest.mark.parametrize("name", USES)
    def test_every_step_is_clipped_at_a_number_that_is_written(self, name, names, stepped_norms):
        before = weights_of(names["model"])
        exec(compile(USES[name].replace('"adaptive"', "1.0"), f"README.md, {name}", "exec"), names)
        assert stepped_norms == pytest.approx([1.0] * STEPS, rel=1e-4)
        assert not torch.equal(weights_of(names["model"]), before)
        if name == "function":
            assert names["norm"] > 2
            return
        summary = clipper_in(names).report.summary()
        assert (summary["steps"], summary["clipped"], summary["skipped"]) == (STEPS, STEPS, 0)
        assert summary["norm_median"] > 2

    @pytest.mark.parametrize("name", DOORS)
    def test_every_step_is_clipped_behind_a_door(self, name, names, stepped_norms):
        """Their Trainer is the stock one, but for that of the flags."""
        exec(compile(DOORS[name].replace('"adaptive"', '"1.0"'), f"docs/doors.md, {name}", "exec"), names)
        for handle in [*hf_gradclip.integrations.patch._in_force]:
            handle.undo()
        assert stepped_norms == pytest.approx([1.0] * STEPS, rel=1e-4)
        assert names["trainer"].clipper.report.summary()["norm_median"] > 2

    @pytest.mark.parametrize("name", UPDATES)
    def test_every_update_is_clipped(self, name, names):
        """Both blocks clip gradient and update of each step, and the weights move."""
        before = weights_of(names["model"])
        exec(compile(UPDATES[name], f"docs/updates.md, {name}", "exec"), names)
        assert not torch.equal(weights_of(names["model"]), before)
        made = names["trainer"] if name == "trainer" else names["optimizer"]
        assert made.clipper.report.summary()["clipped"] == STEPS
        assert made.update_clipper.report.summary()["steps"] == STEPS

    def test_the_loop_with_a_scaler(self, names, stepped_norms, monkeypatch, tmp_path):
        """One step for two batches, clipped at a norm that is written; the state is saved."""
        monkeypatch.chdir(tmp_path)
        block = blocks(DOCS["other-trainers"], "python")[1].replace('"adaptive"', "1.0")
        exec(compile(block, "docs/other-trainers.md", "exec"), names)
        assert stepped_norms == pytest.approx([1.0] * (STEPS // 2), rel=1e-4)
        assert names["clipper"].report.summary()["norm_median"] > 2
        assert "clip" in torch.load("last.pt")

    def test_the_record_of_the_reference(self, names, stepped_norms, capsys):
        exec(compile(RECORD, "docs/reference.md", "exec"), names)
        assert names["record"].step_T.tolist() == [1, 2]
        scaled = names["record"].norm_TP * names["record"].scale_TP
        assert (scaled**2).sum(axis=1) ** 0.5 == pytest.approx(stepped_norms, rel=1e-5)

    def test_the_callback_and_the_file_of_the_events(self, tmp_path, capsys):
        names: dict[str, Any] = {}
        (block,) = blocks(DOCS["events"], "python")
        exec(compile(block, "docs/events.md", "exec"), names)
        (file := tmp_path / "clip.yaml").write_text(blocks(DOCS["events"], "yaml")[0])

        class Loud(GradClipTrainer):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs) * (1e6 if self.state.global_step == 8 else 1)

        settings = {"max_steps": 10, "save_strategy": "no", "output_dir": str(tmp_path)}
        trainer = train(Loud, clip=str(file), callbacks=[names["Careful"]()], **settings)
        assert "step 9 stands out: norm" in capsys.readouterr().out
        assert (tmp_path / "checkpoint-9").exists()
        assert trainer.clipper.report.summary()["skipped"] == 1

    def test_every_python_block_is_run(self):
        written = {name: len(blocks(text, "python")) for name, text in {"README": README, **DOCS}.items()}
        run = {"README": len(USES), "updates": len(UPDATES), "doors": len(DOORS), "events": 1, "reference": 1}
        run["writing-a-strategy"] = 2
        run["lightning"] = 2  # by integrations/test_lightning.py
        run["other-trainers"] = 2  # that of sentence-transformers by scripts/doors.py
        assert {name: count for name, count in written.items() if count} == run

    def test_the_entry_points_are_all_shown(self):
        shown = "".join(USES.values())
        for name in ("GradClipTrainer", "GradClipMixin", "attach", "Clipper", "clip_grad_norm_"):
            assert f"import {name}" in shown

    def test_the_two_commands(self):
        assert [block.strip() for block in blocks(README, "sh")][:2] == [
            "pip install -c constraints.txt -e . && accelerate launch scripts/finetune.py --clip adaptive",
            "pip install -c constraints.txt -e '.[test]' && pytest -n auto --dist loadfile",
        ]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_commands_on_a_recorded_run(self, command, tmp_path, capsys):
        recorded("zclip:warmup_steps=10", tmp_path)
        words = shlex.split(command.replace("outputs/finetune", str(tmp_path)).replace("RUN", str(tmp_path)))
        assert main(words[1:]) == 0
        assert capsys.readouterr().out

    @pytest.mark.parametrize("command", RUNS)
    def test_the_script_that_is_run(self, command, tmp_path, monkeypatch):
        """What comes after a launcher's own words: the script gets its arguments, and trains nothing."""
        (tmp_path / "package").mkdir()
        for path in (tmp_path / "train.py", tmp_path / "package" / "train.py"):
            path.write_text("import sys; open('given', 'w').write(' '.join(sys.argv[1:]))")
        monkeypatch.chdir(tmp_path)
        for name in ("argv", "path", "meta_path"):
            monkeypatch.setattr(sys, name, [*getattr(sys, name)])
        for cls, seam in ((Trainer, "__init__"), (Accelerator, "prepare")):
            monkeypatch.setattr(cls, seam, vars(cls)[seam])
        monkeypatch.setattr(os, "environ", {**os.environ})
        words = shlex.split(command)
        assert main(words[words.index("run") :]) == 3
        assert (tmp_path / "given").read_text() == "--learning_rate 1e-4"

    def test_every_other_command_is_run_elsewhere(self):
        """Two by the script that CI is, DeepSpeed's by tests/scripts/test_finetune.py, that of chats by
        tests/scripts/test_finetune_answers.py, a tool's by scripts/doors.py.
        """
        texts = (README, *(text for name, text in DOCS.items() if name != "tools"))
        lines = [line for text in texts for block in blocks(text, "sh") for line in block.splitlines()]
        others = [line for line in lines if line not in COMMANDS + RUNS]
        launched = "accelerate launch --config_file configs/accelerate/{}.yaml scripts/finetune.py --clip adagc"
        assert others == [
            "pip install -c constraints.txt -e . && accelerate launch scripts/finetune.py --clip adaptive",
            "pip install -c constraints.txt -e '.[test]' && pytest -n auto --dist loadfile",
            "python scripts/manual_chats.py chats.jsonl",
            "accelerate launch scripts/finetune.py --model_name_or_path MODEL --train_file chats.jsonl --lora_r 8 "
            "--num_train_epochs 1",
            "pip install -c constraints.txt -e '.[deepspeed]'",
            *(f"{launched.format(name)}:warmup_steps=20" for name in ("zero2", "zero3")),
            "HF_GRADCLIP=adagc:warmup_steps=20 python train.py",  # tests/integrations/test_run_command.py
        ]

    def test_every_tool_has_a_door(self):
        """The parts of scripts/doors.py name the sections of docs/tools.md, whose lines they run."""
        sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", DOCS["tools"], re.MULTILINE | re.DOTALL)
        parts = [path.read_text("utf-8") for path in (ROOT / "scripts" / "doors_parts").glob("*.py")]
        named = [heading for heading, text in sections if any(f'"{heading}"' in part for part in parts)]
        assert named == [heading for heading, text in sections if blocks(text, "sh")] != []

    @pytest.mark.parametrize("name", ["README", "CONTRIBUTING", *DOCS])
    def test_links_lead_somewhere(self, name):
        text = {"README": README, "CONTRIBUTING": CONTRIBUTING, **DOCS}[name]
        folder = ROOT / "docs" if name in DOCS else ROOT
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
        assert [link for link in links if not (folder / link).exists()] == []

    @pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
    def test_files_that_are_named_exist(self, text):
        named = set(re.findall(r"(?:configs|scripts|tests|hf_gradclip)/[\w/.]+\.(?:py|yaml)", text))
        named = {name for name in named if "growth" not in name}  # an example
        assert named
        assert [name for name in named if not (ROOT / name).exists()] == []


class TestTables:
    def test_every_spec_parses(self, tmp_path, monkeypatch):
        (tmp_path / "clip.yaml").write_text('{"gradient": "adagc:warmup_steps=20", "nonfinite": "pass"}')
        monkeypatch.chdir(tmp_path)
        lines = [re.split(r"\s{2,}", line)[0] for line in blocks(DOCS["choosing"], "text")[0].splitlines()]
        specs = [ast.literal_eval(line) for line in lines]
        assert len(specs) == 14
        configs = [ClipConfig.parse(spec, max_grad_norm=0.5) for spec in specs]
        shown = [str(config) for config in configs]
        assert shown[0] == "global_norm:max_norm=0.5,norm_type=2 (nonfinite=pass)"
        assert shown[1].startswith("none")
        assert "max_norm=1," in shown[2]
        assert configs[8].gradient == configs[3].gradient.__class__(z_threshold=3)
        assert shown[6].endswith("(nonfinite=pass)")
        assert configs[9].gradient.labels == ("embed", "rest")
        assert configs[10].max_consecutive_skips == 5
        assert (configs[13].record, configs[13].histogram_every) == (True, 100)

    def test_groups_are_the_same_in_a_file_and_in_a_line(self, tmp_path):
        (file := tmp_path / "clip.yaml").write_text(blocks(DOCS["choosing"], "yaml")[0])
        line = re.search(r'The same in one line: `"([^"]*)"`', DOCS["choosing"])
        assert ClipConfig.parse(str(file)) == ClipConfig.parse(line[1])

    def test_strategies_fields_and_defaults(self):
        table = {words(row[0])[0]: row[1] for row in rows(DOCS["choosing"], "Fields")}
        assert sorted(table) == strategy_names()
        assert sorted(words(row[0])[0] for row in rows(README, "Strategies")) == strategy_names()
        for name, cell in table.items():
            try:
                strategy = strategy_class(name)()
            except TypeError:
                (field,) = words(cell)
                assert "no default" in cell
                with pytest.raises(SpecError, match=f"needs a value for {field}"):
                    ClipConfig.parse(name)
                continue
            fields = "".join(words(cell)).replace(" ", "")
            assert describe(strategy) == (f"{name}:{fields}" if fields else name)

    def test_presets(self):
        text = DOCS["choosing"]
        line = text[text.index("Presets:") : text.index("are as published")]
        assert sorted(word for word in words(line) if word not in strategy_names()) == preset_names()

    def test_logged_keys(self):
        runs = [train(GradClipTrainer, clip=clip, max_steps=3) for clip in ("adaptive", Enlarge())]
        entries = [entry for trainer in runs for entry in trainer.state.log_history if "loss" in entry]
        logged = {key for entry in entries for key in entry}
        shown = {words(row[0])[0] for row in rows(DOCS["reference"], "What is logged")}
        assert shown == {key for key in logged if key.startswith("clip/")} | {"grad_norm"}

    def test_versions_are_those_of_the_constraints(self):
        pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
        section = README[README.index("Tested together") : README.index("The tests run on")].replace("\n", " ")
        shown = dict(re.findall(r"([a-z][\w-]*) (\d+\.\d+\.\d+)", section))
        assert len(shown) >= 9
        assert shown == {name: pinned[name] for name in shown}


class TestWritingAStrategy:
    """The example strategy: its file joins the folder from elsewhere, its test runs, and it works as an instance."""

    FILE, TEST = blocks(DOCS["writing-a-strategy"], "python")

    @pytest.fixture(autouse=True)
    def _in_the_folder(self, tmp_path, monkeypatch):
        (tmp_path / "growth.py").write_text(self.FILE, "utf-8")
        monkeypatch.setattr(hf_gradclip.strategies, "__path__", [*hf_gradclip.strategies.__path__, str(tmp_path)])
        yield
        sys.modules.pop("hf_gradclip.strategies.growth", None)
        vars(hf_gradclip.strategies).pop("growth", None)

    def test_its_own_test_passes(self):
        namespace: dict[str, Any] = {"__name__": "test_growth"}
        exec(compile(self.TEST, "docs/writing-a-strategy.md", "exec"), namespace)
        tests = [value for key, value in namespace.items() if key.startswith("test_")]
        assert tests
        for test in tests:
            test()

    def test_as_a_spec_and_as_an_instance(self):
        assert "growth" in strategy_names()
        strategy = strategy_class("growth")(factor=1.5)
        assert ClipConfig.parse("growth:factor=1.5").gradient == ClipConfig.parse(strategy).gradient == strategy
        with pytest.raises(SpecError, match=r"Growth\(factor=0\.5\): must be > 1"):
            ClipConfig.parse("growth:factor=0.5")

    def test_in_a_clipper(self):
        """Norms of 1, 4, 3: kept, cut to 2, then free up to 4."""
        model = torch.nn.Linear(4, 1, bias=False)
        clipper = Clipper.for_model(model, strategy_class("growth")(factor=2))
        out = []
        for norm in (1.0, 4.0, 3.0):
            model.weight.grad = torch.full((1, 4), norm / 2)
            assert clipper.step().item() == pytest.approx(norm)
            out.append(model.weight.grad.norm().item())
        assert out == pytest.approx([1.0, 2.0, 3.0], rel=1e-5)
        assert clipper.report.summary()["clipped"] == 1
