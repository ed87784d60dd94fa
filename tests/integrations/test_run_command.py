"""`hf-gradclip run`: a script that does not know us clips as if it were written for us, and keeps its exit status."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from hf_gradclip import ClipConfig, GradClipTrainer
from hf_gradclip.cli import main
from hf_gradclip.launch import NOTHING
from hf_gradclip.record.files import read_record
from hf_gradclip.run.environment import clip_of_environment
from hf_gradclip.strategy import SpecError
from tests.integrations.doors_main import CLIP
from tests.integrations.ranks import ACCELERATE
from tests.integrations.stock_main import STEPS

ROOT = Path(__file__).parents[2]
STOCK = Path(__file__).with_name("stock_main.py")
RUN = (sys.executable, "-m", "hf_gradclip", "run")


def equal(one: Any, other: Any) -> bool:
    """To the bit, through tensors, dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or one != one


def states(folder: Path) -> dict[str, Any]:
    """What is in the checkpoints of a run: the clip state, and the optimizer's with its moments."""
    names = ["gradclip.pt", "optimizer.pt", "optimizer.bin"]
    files = [file for file in sorted(folder.glob("*/**/*")) if file.name in names]
    return {str(file.relative_to(folder)): torch.load(file, weights_only=False) for file in files}


def logs(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: entry[key] for key in entry if "clip/" in key or "norm" in key} for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> dict[str, Path]:
    """What two ranks left behind: of a script that does not know us, and of one that does."""
    folder = tmp_path_factory.mktemp("doors")
    found = {name: folder / name for name in ("run", "ours")}
    for path in found.values():
        path.mkdir()
    command = [sys.executable, "-m", *ACCELERATE, "2", "-m", "hf_gradclip", "run", "--clip", CLIP, "--"]
    with (folder / "said").open("w+") as said:
        words = [*command, str(STOCK.with_name("doors_main.py")), str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, stdout=said, stderr=said, timeout=300, env=environment)
    assert done.returncode == 0, (folder / "said").read_text()[-6000:]
    return found


@pytest.mark.dist
class TestTwoRanks:
    def test_weights_and_logs(self, both):
        for rank in range(2):
            mine, ours = (torch.load(folder / f"log{rank}.pt") for folder in both.values())
            rates = [entry["clip/rate"] for entry in mine if "loss" in entry]
            assert len(rates) == STEPS
            assert 2 <= sum(rates) <= STEPS - 2, "some steps clip and some do not"
            assert equal(logs(mine), logs(ours))
            assert equal(*(torch.load(folder / f"weights{rank}.pt") for folder in both.values()))

    def test_states(self, both):
        mine, ours = map(states, both.values())
        assert {name.rpartition("/")[2] for name in mine} == {"gradclip.pt", "optimizer.pt", "optimizer.bin"}
        assert {"trainer/checkpoint-6/gradclip.pt", "loop/gradclip.pt"} <= {*mine}
        assert equal(mine, ours)
        assert not equal(mine["loop/gradclip.pt"], mine["trainer/checkpoint-12/gradclip.pt"])

    def test_the_weights_of_the_loop(self, both):
        from safetensors.torch import load_file

        mine, ours = (load_file(folder / "loop" / "model.safetensors") for folder in both.values())
        assert equal(mine, ours)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Any:
    """`hf-gradclip run` of a script in this process, which is as before afterwards."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(Trainer, "__init__", Trainer.__init__)
    monkeypatch.setattr(Accelerator, "prepare", Accelerator.prepare)
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.syspath_prepend(str(ROOT))
    from hf_gradclip.integrations import doors

    monkeypatch.setattr(doors, "_clip", functools.cache(doors._clip.__wrapped__))
    monkeypatch.setattr(doors, "_trainers", [])

    def go(script: str, *arguments: str, options: tuple[str, ...] = ("--clip", CLIP)) -> int:
        path = tmp_path / "script.py"
        path.write_text(script, "utf-8")
        return main(["run", *options, "--", str(path), *arguments])

    return go


LOOP = """
import torch
from accelerate import Accelerator
from tests.integrations.stock_main import Curve
accelerator = Accelerator(cpu=True, project_dir={folder!r})
{before}
model = Curve()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(3):
    accelerator.backward(model(torch.ones(2, 3), torch.ones(2, 2))["loss"])
    optimizer.step()
    optimizer.zero_grad()
moved = (torch.nn.utils.parameters_to_vector(Curve().parameters())
         - torch.nn.utils.parameters_to_vector(model.parameters())).norm().item()
with open({folder!r} + "/moved", "w") as file:
    print(moved, file=file)
"""


class TestStatus:
    def test_what_trains_nothing_is_3(self, run, tmp_path, capfd):
        assert run("import sys; open(sys.argv[1], 'w').write(__name__)", str(tmp_path / "seen")) == 3
        assert (tmp_path / "seen").read_text() == "__main__"
        assert NOTHING in capfd.readouterr().err

    def test_an_error_stays(self, run, capfd):
        with pytest.raises(ZeroDivisionError):
            run("1 / 0")
        assert NOTHING not in capfd.readouterr().err

    @pytest.mark.parametrize(("given", "status"), [("5", 5), ("'words'", "words")])
    def test_an_exit_stays(self, given, status, run):
        with pytest.raises(SystemExit) as end:
            run(f"import sys; sys.exit({given})")
        assert end.value.code == status

    @pytest.mark.parametrize("given", ["", "0", "None"])
    def test_an_exit_of_success_is_no_clip(self, given, run):
        assert run(f"import sys; sys.exit({given})") == 3

    def test_what_cannot_be_run(self, tmp_path, capsys):
        for words, said in (
            (["run"], "what shall be run"),
            (["run", "--clip", "zclip", "--", "-m"], "what shall be run"),
            (["run", "no_such_file.py"], "no_such_file.py: is no Python file here, and no command"),
            (["run", "-m", "no_such_module"], "-m no_such_module: there is no no_such_module to import"),
            (["run", "-m", "no_such_module.part"], "-m no_such_module.part: there is no no_such_module to import"),
            (["run", "--clip", "zclop", "--", str(STOCK)], "Did you mean zclip"),
        ):
            assert main(words) == 2
            assert said in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("command", "status"),
        [
            ("exit 5", 5),
            ("exit 0", 3),
            ("kill -9 $$", 137),
            ("kill $PPID; sleep 20 & wait", 143),
            ("trap 'exit 7' USR1; kill -USR1 $PPID; sleep 20 & wait", 7),
            ("kill -USR2 $PPID; sleep 20 & wait", 140),
        ],
        ids=["its own", "success", "killed", "ended with us", "told by a scheduler", "ended by it"],
    )
    def test_another_command(self, command, status, run):
        assert main(["run", "--", "sh", "-c", command]) == status

    def test_as_seen_from_outside(self, tmp_path):
        (tmp_path / "five.py").write_text("import sys; sys.exit(5)")
        (tmp_path / "nothing.py").write_text("")
        (tmp_path / "broken.py").write_text("1 / 0")
        commands = {("five.py",): 5, ("broken.py",): 1, ("-m", "nothing"): 3}
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen([*RUN, "--", *words], cwd=tmp_path, env=environment) for words in commands]
        assert [process.wait(100) for process in started] == [*commands.values()]


class TestLoops:
    def test_every_step_is_clipped(self, run, tmp_path):
        tight = ("--clip", "global_norm:max_norm=1e-3")
        assert run(LOOP.format(folder=str(tmp_path), before=""), options=tight) == 0
        assert 0 < float((tmp_path / "moved").read_text()) <= 3.001e-3

    def test_an_attachment_of_its_own_stays(self, run, tmp_path):
        own = "import hf_gradclip; hf_gradclip.attach(accelerator, 'global_norm:max_norm=1e-2', auto=True)"
        tight = ("--clip", "global_norm:max_norm=1e-6")
        assert run(LOOP.format(folder=str(tmp_path), before=own), options=tight) == 0
        assert 1e-3 < float((tmp_path / "moved").read_text()) <= 3.001e-2

    def test_a_record_is_complete_when_nobody_says_that_the_loop_is_over(self, run, tmp_path):
        script = LOOP.format(folder=str(tmp_path), before="")
        assert run(script, options=("--clip", "zclip", "--record", "true")) == 0
        assert read_record(tmp_path).step_T.tolist() == [1, 2, 3]

    def test_what_prepares_no_optimizer_is_left_alone(self, run):
        script = """
from accelerate import Accelerator
from tests.integrations.stock_main import Curve
accelerator = Accelerator(cpu=True)
accelerator.prepare(Curve())
assert "clip_grad_norm_" not in vars(accelerator)
"""
        assert run(script) == 3

    def test_a_clip_call_of_somebody_else_is_refused(self, run, tmp_path):
        theirs = "accelerator.clip_grad_norm_ = lambda *args: None"
        with pytest.raises(Exception, match=r"clip_grad_norm_ is already replaced, by __main__"):
            run(LOOP.format(folder=str(tmp_path), before=theirs))


TRAINER = """
import sys, torch
from transformers import PrinterCallback, Trainer
from tests.tiny import counting_data, tiny_llama, training_args
{more}
trainer = {make}(model=tiny_llama(), args=training_args(sys.argv[1], max_steps=6), train_dataset=counting_data(){extra})
trainer.remove_callback(PrinterCallback)
trainer.train()
torch.save([trainer.state.log_history, trainer.model.state_dict()], sys.argv[1] + "/found.pt")
"""


class TestTrainers:
    def found(self, run, tmp_path, more="", make="Trainer", extra="", status=0, **options):
        assert run(TRAINER.format(more=more, make=make, extra=extra), str(tmp_path), **options) == status
        log, weights = torch.load(tmp_path / "found.pt")
        return logs(log), weights

    def test_as_gradcliptrainer(self, run, tmp_path):
        spec = "zclip:warmup_steps=2,z_threshold=0.1"
        log, weights = self.found(run, tmp_path, options=("--clip", spec, "--record", "text"))
        from tests.tiny import train

        theirs = train(GradClipTrainer, clip=spec, max_steps=6)
        assert equal(weights, theirs.model.state_dict())
        assert equal(log, logs(theirs.state.log_history))
        assert 0 < sum(entry["clip/rate"] for entry in log) < 6
        assert len(read_record(tmp_path)) == 6

    def test_its_accelerator_is_not_of_a_loop(self, run, tmp_path):
        """One that clips by itself is left alone, and so is its accelerator: nothing is clipped by us."""
        more = """
class ClipsItself(Trainer):
    def _clip_grad_norm(self, model):
        assert "clip_grad_norm_" not in vars(self.accelerator)
        return torch.zeros(())
"""
        log, _ = self.found(run, tmp_path, more=more, make="ClipsItself", status=3)
        assert log == [{"grad_norm": 0.0}] * 6

    def test_a_clip_of_its_own_stays(self, run, tmp_path):
        log, _ = self.found(
            run,
            tmp_path,
            more="from hf_gradclip import GradClipTrainer",
            make="GradClipTrainer",
            extra=", clip='global_norm:max_norm=0.123'",
        )
        assert [entry["clip/threshold"] for entry in log] == [0.123] * 6

    def test_its_own_patch_all_counts(self, run, tmp_path):
        more = "import hf_gradclip; handle = hf_gradclip.patch_all(clip='global_norm:max_norm=0.123')"
        script = TRAINER.format(more=more, make="Trainer", extra="")
        script = script.replace("trainer.train()", "handle.undo(); trainer.train()")
        assert run(script, str(tmp_path)) == 0
        log, _ = torch.load(tmp_path / "found.pt")
        assert {entry["clip/threshold"] for entry in log if "loss" in entry} == {0.123}


def test_the_processes_of_a_script(tmp_path):
    """A child that trains, with workers of its own, clips, and no process says that nothing was clipped.

    A sitecustomize that was there is run in the child too, and neither framework is imported before the script asks.
    """
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text(
        "import os, pathlib, sys\n"
        "heavy = [name for name in ('torch', 'transformers', 'accelerate', 'hf_gradclip') if name in sys.modules]\n"
        "pathlib.Path(os.environ['SAID'], str(os.getpid())).write_text(repr(heavy))\n"
    )
    (tmp_path / "said").mkdir()
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys\n"
        "assert not {'transformers', 'accelerate'} & {*sys.modules}\n"
        "assert 'theirs' in sys.modules['sitecustomize'].__file__\n"
        "sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)\n"
    )
    environment = {**os.environ, "WORKERS": "2", "SAID": str(tmp_path / "said")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "theirs"), str(ROOT)])
    command = [*RUN, "--clip", CLIP, "--", str(script), str(STOCK), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert NOTHING not in done.stderr + done.stdout
    assert done.stderr.count("[hf_gradclip] clip: steps 12,") == 1, "of the Trainer"
    assert done.stderr.count("[hf_gradclip] clip: steps 24,") == 1, "of the loop"
    assert (tmp_path / "trainer" / "checkpoint-12" / "gradclip.pt").exists()
    assert [path.read_text() for path in (tmp_path / "said").iterdir()] == ["[]"] * 2, "of the parent and the child"


AUTO = f"""
import os, runpy, sys, transformers.trainer, accelerate
def seams():
    return transformers.Trainer.__init__, accelerate.Accelerator.prepare, [*sys.meta_path]
before = seams()
import hf_gradclip
hf_gradclip.GradClipTrainer, hf_gradclip.attach, hf_gradclip.patch_all
assert seams() == before
import hf_gradclip.auto
assert not any(map(lambda one, other: one is other, seams(), before))
runpy.run_path({str(STOCK)!r}, run_name="__main__")
"""


def test_auto_reads_the_variable(tmp_path):
    """In a process whose frameworks are there already, as in a notebook. A plain import patches nothing before."""
    spec = '{"gradient": "global_norm:max_norm=0.25", "check_every": 7}'
    environment = {**os.environ, "HF_GRADCLIP": spec, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", AUTO, str(tmp_path)]
    with (tmp_path / "said").open("w+") as said:
        idle = subprocess.Popen([*command[:2], "import hf_gradclip.auto"], env=environment, stderr=said)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert (done.returncode, idle.wait(200)) == (0, 0), done.stderr
    assert done.stderr.count("[hf_gradclip] clip: global_norm:max_norm=0.25") == 2
    assert NOTHING not in done.stderr
    assert f"hf_gradclip.auto: {NOTHING}" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("text", ["zclop", "", '{"gradient":', '{"gradient": "zclip", "recrod": true}'])
def test_a_wrong_variable_is_an_error_by_its_name(text, monkeypatch):
    monkeypatch.setenv("HF_GRADCLIP", text)
    with pytest.raises(SpecError, match=r"^HF_GRADCLIP="):
        clip_of_environment()


def test_the_variable():
    assert clip_of_environment() == ClipConfig.parse("adaptive")
