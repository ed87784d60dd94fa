"""What is wrong in a call is said in words: the call as it was typed, the value, the rule and the fix."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

import hf_gradclip
from hf_gradclip import Clipper, GradClipMixin, GradClipTrainer, attach, optim
from hf_gradclip.preview import preview
from hf_gradclip.record.files import read_record
from hf_gradclip.strategy import SpecError
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


def by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("how", [by_pickle, copy.deepcopy])
def test_a_clipper_that_is_copied_with_its_model_clips_the_copy(how) -> None:
    model, copied = how((MODEL, Clipper.for_model(MODEL, "global_norm:max_norm=1")))
    for p in (*MODEL.parameters(), *model.parameters()):
        p.grad = torch.full_like(p, 10.0)
    copied.step()
    assert float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1.0)
    assert all(bool((p.grad == 10).all()) for p in MODEL.parameters())


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


class TestWordsForSmallThings:
    @pytest.mark.parametrize("word", ["auto", "joint"])
    def test_a_switch_is_a_bool(self, word) -> None:
        with pytest.raises(SpecError, match=rf"attach\(accelerator, {word}='false'\): must be True or False"):
            hf_gradclip.attach(Accelerator(cpu=True), "adaptive", **{word: "false"})

    @pytest.mark.parametrize("what", [lambda m: m, lambda m: m.named_parameters()], ids=["a model", "named parameters"])
    def test_a_clip_call_takes_parameters(self, what) -> None:
        accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
        hf_gradclip.attach(accelerator, "adaptive")
        model = accelerator.prepare(model)
        for call in (accelerator.clip_grad_norm_, hf_gradclip.clip_grad_norm_):
            with pytest.raises(TypeError, match=r"must be parameters. Pass model.parameters\(\)"):
                call(what(model), 1.0)

    def test_a_scaler_is_a_scaler(self) -> None:
        with pytest.raises(TypeError, match=r"scaler=True\): must be your torch.amp.GradScaler"):
            Clipper.for_model(MODEL, "adaptive", scaler=True)

    @pytest.mark.parametrize(
        ("clip", "instead"),
        [
            ({}, "{'gradient': 'adaptive', 'record': True}"),
            ({"clip": "zclip"}, "{'gradient': 'zclip', 'record': True}"),
            ({"clip": {"gradient": 1.0, "fold": True}}, "{'gradient': 1.0, 'fold': True, 'record': True}"),
        ],
    )
    def test_a_word_of_the_configuration_beside_clip(self, clip, instead) -> None:
        """The report of a run without a record asks for a record, and a Trainer is where one looks for it."""
        with pytest.raises(TypeError) as error:
            hf_gradclip.GradClipTrainer(**clip, record=True)
        assert str(error.value) == f"GradClipTrainer(record=True): is a part of clip. Write clip={instead}."

    def test_a_word_that_a_trainer_takes_itself(self) -> None:
        class Recording(Trainer):
            def __init__(self, record: bool, **rest) -> None:
                self.own = record

        class Both(hf_gradclip.GradClipMixin, Recording): ...

        assert Both(clip="adaptive", record=True).own is True

    @pytest.mark.parametrize("word", [{"record": True}, {"histogram_every": 3}])
    def test_an_optimizer_records_nothing(self, word) -> None:
        with pytest.raises(SpecError, match=r"AdamW\(clip=..., .*there is no run here"):
            optim.AdamW(MODEL.parameters(), clip={"gradient": "zclip", **word})

    def test_preview_takes_a_strategy_and_losses_where_they_are_judged(self) -> None:
        with pytest.raises(TypeError, match=r"preview\('zclip', ...\): must be a strategy"):
            preview("zclip", [1.0])
        judges = hf_gradclip.ClipConfig.parse("skip_step:on=loss").gradient
        with pytest.raises(ValueError, match=r"judges the loss. Give losses, one per step"):
            preview(judges, [1.0], losses=[])

    def test_a_folder_with_the_records_of_several_models(self, tmp_path) -> None:
        accelerator, a, b = Accelerator(cpu=True), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        hf_gradclip.attach(accelerator, {a: "adaptive_norm", b: "none"}, auto=True, record=tmp_path)
        a, b, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1))
        accelerator.backward(b(a(torch.ones(1, 2))).sum())
        optimizer.step()
        accelerator.end_training()
        with pytest.raises(FileNotFoundError, match=r"holds no record .*, but these do: .*Linear .*Linear_2"):
            read_record(tmp_path)

    def test_a_chain_is_called_by_its_parts(self, caplog) -> None:
        model = torch.nn.Linear(2, 2)
        clipper = Clipper.for_model(model, "adaptive_norm+value:max_value=1")
        assert clipper.state_dict()["strategy"] == "hf_gradclip.strategy.Chain", "as in every checkpoint so far"
        model.extra = torch.nn.Linear(2, 2)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        clipper.step()
        assert "the statistics of adaptive_norm+value start anew" in caplog.text


@pytest.mark.parametrize("auto", [True, False])
def test_a_clip_of_elements_beside_the_strategy_is_said_once(auto, caplog) -> None:
    accelerator = Accelerator(cpu=True)
    attachment = attach(accelerator, "none", auto=auto)
    model = torch.nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        accelerator.backward(model(torch.ones(8, 4)).square().sum())
        accelerator.clip_grad_value_(model.parameters(), clip_value=1e-4)
        if not auto:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert attachment.scalars()["clip/norm_max"] <= 1e-4 * 20**0.5 * 1.001, "of what the loop left"
    said = [r.message for r in caplog.records if "clip_grad_value_" in r.message]
    assert len(said) == 1
    assert "clip_value=0.0001" in said[0]
    assert "+value:max_value=0.0001" in said[0]


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_a_clip_by_torch_before_ours_is_said_once(auto, clips, caplog) -> None:
    """Two micro-batches, and a mask between clip and step, are none."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    attach(accelerator, "none", auto=auto)
    model = torch.nn.Linear(4, 4)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(8, 4)).square().sum())
            if clips and accelerator.sync_gradients:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if not auto and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                model.weight.grad[0] = 0
            optimizer.step()
            optimizer.zero_grad()
    assert caplog.text.count("were changed in place after backward and before the clip") == int(clips)
