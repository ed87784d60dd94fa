"""What is wrong in a call is said in words: the call as it was typed, the value, the rule and the fix."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from hf_gradclip import Clipper, GradClipMixin, GradClipTrainer, attach
from tests.tiny import train, training_args

MODEL = torch.nn.Linear(3, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path):
    return GradClipTrainer(model=MODEL, args=training_args(str(tmp_path)))


def given(what: str, trainer: Trainer):
    things = {
        "parameters": lambda: MODEL.parameters(),
        "list": lambda: list(MODEL.parameters()),
        "tensor": lambda: MODEL.weight,
        "named": lambda: MODEL.named_parameters(),
        "model": lambda: MODEL,
        "optimizer": lambda: OPTIMIZER,
        "trainer": lambda: trainer,
        "accelerator": lambda: trainer.accelerator,
        "class": lambda: torch.nn.Linear,
        "word": lambda: "adaptive",
        "nothing": lambda: None,
    }
    return things[what]()


FOR_MODEL = "must be a model, a torch.nn.Module. "
ATTACH = "must be an accelerate.Accelerator. "


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("parameters", f"Clipper.for_model(<generator>): {FOR_MODEL}Parameters alone have no names"),
        ("list", f"Clipper.for_model(<list>): {FOR_MODEL}Parameters alone have no names"),
        ("tensor", f"Clipper.for_model(<Parameter>): {FOR_MODEL}Parameters alone have no names"),
        ("named", f"Clipper.for_model(<generator>): {FOR_MODEL}Pass the model itself, or list"),
        ("optimizer", f"Clipper.for_model(<SGD>): {FOR_MODEL}This is an optimizer. Pass the model"),
        ("trainer", f"Clipper.for_model(<GradClipTrainer>): {FOR_MODEL}This is a Trainer. GradClipTrainer("),
        (
            "accelerator",
            f"Clipper.for_model(<Accelerator>): {FOR_MODEL}This is an Accelerator. Use",
        ),
        ("class", f"Clipper.for_model(<Linear>): {FOR_MODEL}This is a class."),
        ("word", f"Clipper.for_model('adaptive'): {FOR_MODEL}Write Clipper.for_model(model, 'adaptive')"),
        ("nothing", f"Clipper.for_model(None): {FOR_MODEL}Write Clipper.for_model(model, 'adaptive')"),
    ],
)
def test_for_model(trainer, what, words) -> None:
    with pytest.raises(TypeError) as error:
        Clipper.for_model(given(what, trainer))
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    ("things", "shown"),
    [((MODEL,), "<Linear>"), ((MODEL, "adaptive"), "<Linear>, 'adaptive'"), (("zclip", MODEL), "'zclip', <Linear>")],
)
def test_a_clipper_of_a_model(things, shown) -> None:
    with pytest.raises(TypeError) as error:
        Clipper(*things)
    rule = "must be a ClipConfig and a view. For a model write Clipper.for_model(model, 'adaptive')."
    assert str(error.value) == f"Clipper({shown}): {rule}"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("trainer", f"attach(<GradClipTrainer>): {ATTACH}This is a Trainer. GradClipTrainer(..., clip='adaptive')"),
        ("model", f"attach(<Linear>): {ATTACH}This is a model. In a plain torch loop use Clipper.for_model(model"),
        ("optimizer", f"attach(<SGD>): {ATTACH}This is an optimizer. Pass the accelerator that prepared it"),
        ("parameters", f"attach(<generator>): {ATTACH}Write attach(accelerator, 'adaptive')"),
        ("word", f"attach('adaptive'): {ATTACH}Write attach(accelerator, 'adaptive')"),
    ],
)
def test_attach(trainer, what, words) -> None:
    with pytest.raises(TypeError) as error:
        attach(given(what, trainer))
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("record", [True, 1, ["runs"]])
def test_a_record_is_a_folder(record) -> None:
    with pytest.raises(ValueError, match=r"record=.*: must be a folder, .* Give record='a/folder'\.") as error:
        attach(Accelerator(cpu=True), record=record)
    assert f"attach(accelerator, record={record!r})" in str(error.value)


def test_no_record_is_no_record(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    accelerator = Accelerator(cpu=True)
    attach(accelerator, auto=True, record=False)
    model, optimizer = accelerator.prepare(MODEL, OPTIMIZER)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    accelerator.end_training()
    assert not list(tmp_path.iterdir())


class Mine(Trainer):
    pass


@pytest.mark.parametrize("base", [Trainer, Mine])
def test_a_mixin_behind_the_trainer(base) -> None:
    with pytest.raises(TypeError) as error:
        type("Late", (base, GradClipMixin), {})
    name = base.__name__
    assert str(error.value).startswith(f"class Late({name}, GradClipMixin): GradClipMixin must come before the Trainer")
    assert str(error.value).endswith(f"Write class Late(GradClipMixin, {name}).")
    for right in ((GradClipMixin, base), (GradClipTrainer,), (Mine, GradClipTrainer)):
        type("Right", right, {})


@pytest.mark.parametrize("clip", [None, "adaptive"])
@pytest.mark.parametrize(
    ("limit", "fix"), [("1.0", " Write max_grad_norm=1."), ("high", ""), ([1], ""), (float("nan"), "")]
)
def test_max_grad_norm_is_a_number(tmp_path, clip, limit, fix) -> None:
    with pytest.raises(ValueError, match="TrainingArguments") as error:
        GradClipTrainer(model=MODEL, args=training_args(str(tmp_path), max_grad_norm=limit), clip=clip)
    rule = "must be a number >= 0. 0 switches clipping off."
    assert str(error.value) == f"TrainingArguments(max_grad_norm={limit!r}): {rule}{fix}"


@pytest.mark.parametrize("settings", [{"max_steps": 8}, {"max_steps": -1, "num_train_epochs": 0.0625}])
def test_a_short_run_is_said_once_though_the_batch_size_is_found(caplog, settings) -> None:
    """Three tries, of 8 steps each; or of as many as an epoch of that batch size has."""
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    tries = []

    class Small(GradClipTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            tries.append(len(inputs["input_ids"]))
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = train(Small, clip="zclip", auto_find_batch_size=True, max_grad_norm=0.5, **settings)
    assert tries[:3] == [4, 3, 2]
    steps = trainer.state.max_steps
    assert [line for line in caplog.messages if "warms up" in line] == [
        f"The run has {steps} steps and zclip warms up for 25 of them. Set warmup_steps to {steps // 4} or less, or "
        "train longer."
    ]
    assert sum("is set and overruled by clip='zclip'" in line for line in caplog.messages) == 1


def test_as_many_parameters_of_another_size(caplog) -> None:
    model = torch.nn.Linear(3, 2)
    clipper = Clipper.for_model(model, "zclip")
    for size in (3, 4):
        model.weight = torch.nn.Parameter(torch.ones(2, size))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        clipper.step()
    assert caplog.messages[-1] == "The 2 trainable parameters changed (1 resized): the statistics of zclip start anew."


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda how: how.__name__)
def test_a_clipper_that_is_copied(how) -> None:
    """The copy would clip its own copy of the parameters, so it is an error, and what that says to do works."""
    clippers = [Clipper.for_model(MODEL, "zclip") for _ in range(2)]
    for p in MODEL.parameters():
        p.grad = torch.ones_like(p)
    clippers[0].step()
    with pytest.raises(TypeError, match=r"cannot be pickled or copied.*clipper\.state_dict\(\).*load_state_dict"):
        how(clippers[0])
    state = pickle.loads(pickle.dumps(clippers[0].state_dict()))
    assert clippers[1].load_state_dict(state) == ""
    assert clippers[1].state.seen == clippers[0].state.seen == 1


@pytest.mark.parametrize("loss", [0.5, 1, torch.tensor(0.5), torch.tensor([0.5])])
def test_a_loss_is_a_number_or_a_tensor_of_one(loss) -> None:
    clipper = Clipper.for_model(MODEL, "skip_step:on=loss,window=4,min_values=2")
    for i in range(6):
        for p in MODEL.parameters():
            p.grad = torch.ones_like(p)
        clipper.step(loss=loss if i < 5 else 1000 * float(loss))
        assert clipper.step_was_skipped == (i == 5), "a loss that jumps is judged"


@pytest.mark.parametrize(
    ("loss", "shown"), [("0.5", "'0.5'"), (torch.ones(4), "a tensor of shape (4,)"), ([0.5], "<list>")]
)
def test_a_loss_that_is_none(loss, shown) -> None:
    clipper = Clipper.for_model(MODEL, "skip_step:on=loss")
    with pytest.raises(TypeError) as error:
        clipper.step(loss=loss)
    assert str(error.value).startswith(f"clipper.step(loss={shown}): must be one number, the loss of the step.")
