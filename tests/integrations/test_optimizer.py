"""Updates of any optimizer, clipped through the weight difference: against a twin without the hook, in float64."""

from __future__ import annotations

import copy
import logging
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

import hf_gradclip
from hf_gradclip import ClipConfig, Clipper, GradClipTrainer, optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.integrations.refusals import refuse_swap
from hf_gradclip.run.weight_difference import WeightDifference
from hf_gradclip.views import view_of
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.loops import StopAt, batches
from tests.tiny import counting_data, logged, tiny_llama, train, training_args, weights_of


@pytest.fixture(autouse=True)
def _fresh(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Lion(torch.optim.Optimizer):
    """An optimizer that torch does not have; sign of an average, decoupled decay."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((0.9 * mean + 0.1 * p.grad).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 0.01)


class Fixed(Lion):
    """With a decay of pytorch_optimizer's `fixed_decay=True`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.param_groups[0]["fixed_decay"] = True


class Unheard(Lion):
    """One whose name says nothing about its decay."""


class Averaging(Lion):
    """One with other weights in evaluation than in training, as schedule-free optimizers have."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def apart(lion: Lion) -> Lion:
    """With the decay of lion_pytorch's `decoupled_weight_decay=True`."""
    lion.decoupled_wd = True
    return lion


SHAPES = ((6, 5), (4, 3))
MAKE = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, weight_decay=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-1),
    "Muon": lambda params: torch.optim.Muon(params, lr=1e-2, weight_decay=0.1),
    "Adafactor of torch": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Adafactor of transformers": lambda params: transformers.Adafactor(
        params, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1
    ),
    "Lion": lambda params: Lion(params, lr=1e-2, weight_decay=0.1),
}
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del MAKE["Muon"]
DECOUPLED = ("AdamW fused", "NAdam", "Muon", "Adafactor of transformers", "Lion")
RULES = {
    "value": lambda u, c: {k: v.clamp(-c, c) for k, v in u.items()},
    "global_norm": lambda u, c: scaled(u, c, torch.cat([v.flatten() for v in u.values()]).norm()),
    "param_norm": lambda u, c: {k: v * min(1.0, c / (float(v.norm()) + 1e-6)) for k, v in u.items()},
}
FIELDS = {"value": "max_value", "global_norm": "max_norm", "param_norm": "max_norm"}


def scaled(u: dict[int, Tensor], limit: float, norm: Tensor) -> dict[int, Tensor]:
    return {key: value * min(1.0, limit / (float(norm) + 1e-6)) for key, value in u.items()}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def clipper_of(params: list[nn.Parameter], spec: str) -> Clipper:
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return Clipper(ClipConfig.parse(spec), view_of(named), "clip_update")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAKE)
def test_every_optimizer_against_a_twin_without_the_hook(name, rule) -> None:
    """w <- w (1 - lr decay) - lr clip(u), u from the twin's weights in float64; the limit is a median of its sizes."""
    sizes = [max(u_sizes(u)[rule]) for u in updates_of(name)]
    limit = sorted(sizes)[len(sizes) // 2] * 0.999
    params = parameters()
    optimizer, clipper = MAKE[name](params), clipper_of(params, f"{rule}:{FIELDS[rule]}={limit}")
    WeightDifference(optimizer, clipper)
    rates = []
    for step in range(12):
        twin = [nn.Parameter(p.detach().clone()) for p in params]
        other = MAKE[name](twin)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        lr, decay = rate_and_decay(name, optimizer, step)
        for group in [*optimizer.param_groups, *other.param_groups]:
            group["lr"] = lr
        before = [p.detach().double() for p in params]
        for group in (params, twin):
            set_gradients(group, step)
        mine = [p.grad.clone() for p in params]
        other.step()
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, mine, strict=True)), "gradients come back"

        shrunk = [w * (1 - lr * decay) for w in before]
        u = {i: (shrunk[i] - twin[i].detach().double()) / lr for i in range(2)} if lr else {0: before[0] * 0}
        for i, clipped in (RULES[rule](u, limit) if lr else {}).items():
            torch.testing.assert_close(params[i].detach().double(), shrunk[i] - lr * clipped, rtol=0, atol=1e-6)
        rates.append(clipper.report.scalars().get("clip_update/rate"))
        if not rates[-1]:
            assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True)), (
                "what is not clipped keeps its bits"
            )
    assert rates[0] is None, "at a learning rate of 0 nothing is measured"
    if name not in ("Muon", "Lion"):  # all their updates are of one size
        assert 0.0 in rates
    assert 1.0 in rates


def rate_and_decay(name: str, optimizer: Any, step: int) -> tuple[float, float]:
    group = optimizer.param_groups[0]
    full = group.setdefault("full_lr", group["lr"])
    return full * min(step / 3, 1), (group.get("weight_decay") or 0.0) if name in DECOUPLED else 0.0


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * (1 + (step % 4))


def updates_of(name: str) -> list[list[Tensor]]:
    """What the optimizer does when nobody clips."""
    params = parameters()
    optimizer = MAKE[name](params)
    lr = optimizer.param_groups[0]["lr"]
    kept = 1 - lr * rate_and_decay(name, optimizer, 3)[1]
    found = []
    for step in range(1, 12):
        before = [p.detach().clone() for p in params]
        set_gradients(params, step)
        optimizer.step()
        found.append([(kept * a - b.detach()) / lr for a, b in zip(before, params, strict=True)])
    return found


def u_sizes(u: list[Tensor]) -> dict[str, list[float]]:
    return {
        "value": [float(v.abs().max()) for v in u],
        "global_norm": [float(torch.cat([v.flatten() for v in u]).norm())],
        "param_norm": [float(v.norm()) for v in u],
    }


SPEC = {"gradient": "zclip:warmup_steps=4,z_threshold=1", "update": "block_rms:max_rms=0.7"}


def fit(make: Any, spec: Any) -> tuple[Tensor, dict[str, float]]:
    """A plain Accelerate loop of 20 steps with a learning rate that rises from 0: its weights and its scalars."""
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1))
    attachment = hf_gradclip.attach(accelerator, spec)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for batch, _ in batches(20):
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return weights_of(model), attachment.scalars()


@pytest.mark.parametrize(
    ("name", "limit", "theirs_only"), [("AdamW", 0.7, {"fused": True}), ("Adam", 0.7, {}), ("SGD", 0.5, {})]
)
def test_recovered_and_written_updates_agree(name, limit, theirs_only, caplog) -> None:
    spec = {**SPEC, "update": f"block_rms:max_rms={limit}"}
    settings = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 1e-2}
    settings["weight_decay"] = 0.1
    theirs, scalars = fit(lambda params: getattr(torch.optim, name)(params, **settings, **theirs_only), spec)
    assert f"updates of {name} are recovered from the weights" in caplog.text
    caplog.clear()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    ours, _ = fit(lambda params: getattr(optim, name)(params, **settings), spec)
    assert "recovered" not in caplog.text
    assert (theirs - ours).abs().max() < 1e-6
    assert 0 < scalars["clip_update/tensor_rate"] < 1


def test_parameters_of_no_prepared_model_are_named(caplog) -> None:
    accelerator, model, stranger = Accelerator(cpu=True), tiny_llama(), nn.Parameter(torch.ones(2))
    hf_gradclip.attach(accelerator, "zclip")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD([stranger], lr=0.1))
    optimizer.step()
    assert "belong to no prepared model" not in caplog.text, "it has no gradient"
    stranger.grad = torch.ones(2)
    optimizer.step()
    assert "optimizer.step() of SGD: its parameters belong to no prepared model" in caplog.text


@pytest.mark.parametrize("late", ["unfrozen", "added"])
@pytest.mark.parametrize("ours", [True, False])
def test_updates_of_what_trains_later_are_clipped_too(late, ours, caplog) -> None:
    limit, make = 1e-6, optim.AdamW if ours else torch.optim.AdamW
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hf_gradclip.attach(accelerator, {"gradient": "none", "update": f"block_rms:max_rms={limit}"}, auto=True)
    params = list((model if late == "unfrozen" else model[1]).parameters())
    model[0].requires_grad_(False)
    model, optimizer = accelerator.prepare(model, make(params, lr=0.1, weight_decay=0.0))
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
            if late == "added":
                optimizer.optimizer.add_param_group({"params": list(model[0].parameters())})
        before = [p.detach().double() for p in model.parameters()]
        accelerator.backward(model(torch.randn(8, 4)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        moved = [
            float((p.detach().double() - b).square().mean().sqrt())
            for p, b in zip(model.parameters(), before, strict=True)
        ]
        assert max(moved) <= 0.1 * limit * 1.5, "to the rounding of float32 weights"
        assert [rms > 0 for rms in moved] == [step >= 2, step >= 2, True, True]


@pytest.mark.parametrize("ours", [True, False])
def test_updates_of_as_many_other_parameters_are_clipped_too(ours, caplog) -> None:
    """An optimizer that goes on to the next layer, as in training layer by layer."""
    limit, make = 1e-6, optim.AdamW if ours else torch.optim.AdamW
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hf_gradclip.attach(accelerator, {"gradient": "none", "update": f"block_rms:max_rms={limit}"}, auto=True)
    model, optimizer = accelerator.prepare(model, make(model[0].parameters(), lr=0.1, weight_decay=0.0))
    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["params"] = list(model[1].parameters())
        before = [p.detach().double() for p in model.parameters()]
        accelerator.backward(model(torch.randn(8, 4)).square().sum())
        optimizer.step()
        model.zero_grad()
        pairs = zip(model.parameters(), before, strict=True)
        moved = [float((p.detach().double() - b).square().mean().sqrt()) for p, b in pairs]
        assert max(moved) <= 0.1 * limit * 1.5, "to the rounding of float32 weights"
        assert [rms > 0 for rms in moved] == [step < 3, step < 3, step >= 3, step >= 3]
    assert "has other parameters now, so the statistics of its updates start anew" in caplog.text


def test_a_skipped_step_has_no_update() -> None:
    params = parameters()
    optimizer, clipper = MAKE["AdamW fused"](params), clipper_of(params, "zclip")
    WeightDifference(optimizer, clipper)
    set_gradients(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert clipper.report.summary()["steps"] == 1


def test_a_nan_update_stops_the_run() -> None:
    params = parameters()
    optimizer = torch.optim.Adam(params, lr=1e-2, eps=0.0)
    WeightDifference(optimizer, clipper_of(params, "zclip"))
    set_gradients(params, 1)
    params[0].grad[0] = 0.0
    with pytest.raises(
        NonFiniteError, match=r"The update of Adam is NaN or inf, and is in the weights.*moments and eps"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.SGD([nn.Parameter(torch.ones(2).bfloat16())], lr=1), "SGD on torch.bfloat16 weights.*bf16=True"),
        (transformers.Adafactor([nn.Parameter(torch.ones(2))], lr=None), r"Adafactor\(lr=None\).*relative_step=False"),
        (
            Unheard([nn.Parameter(torch.ones(2))], lr=1, weight_decay=0.1),
            r"Unheard\(weight_decay=0.1\).*decoupled_weight",
        ),
        (
            transformers.Adafactor(
                [nn.Parameter(torch.ones(2))], lr=1, relative_step=False, scale_parameter=True, weight_decay=0.1
            ),
            r"Adafactor\(scale_parameter=True, weight_decay=0.1\).*scale_parameter=False",
        ),
        (
            apart(Lion([nn.Parameter(torch.ones(2))], lr=1, weight_decay=0.1)),
            r"Lion\(decoupled_weight_decay=True, .* out",
        ),
        (
            Fixed([nn.Parameter(torch.ones(2))], lr=1, weight_decay=0.1),
            r"Fixed\(fixed_decay=True, .* Leave fixed_decay out",
        ),
        (Averaging([nn.Parameter(torch.ones(2))], lr=1), "Averaging.*of evaluation.*Clip the gradient alone"),
    ],
)
def test_refused_by_name(optimizer, words) -> None:
    params = optimizer.param_groups[0]["params"]
    with pytest.raises(UnsupportedBackendError, match=words):
        WeightDifference(optimizer, clipper_of(params, "zclip"))


@pytest.mark.parametrize(
    ("make", "rule", "said"),
    [
        (torch.optim.AdamW, "zclip:max_norm=1", True),
        (optim.AdamW, "global_norm:max_norm=1", True),
        (torch.optim.RMSprop, "adagc:max_norm=1", True),
        (torch.optim.AdamW, "zclip", False),
        (torch.optim.AdamW, "block_rms", False),
        (torch.optim.AdamW, "global_norm:max_norm=100", False),
        (torch.optim.SGD, "zclip", False),
    ],
)
def test_a_limit_far_below_every_update_is_said(make, rule, said, caplog) -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(200, 200)  # 40,200 weights: an update of norm 200
    hf_gradclip.attach(accelerator, {"gradient": "none", "update": rule}, auto=True)
    accelerator.prepare(model, make(model.parameters(), lr=1e-3))
    assert ("about the root of the number of weights, 200" in caplog.text) == said


def test_an_optimizer_that_clips_itself_is_refused() -> None:
    accelerator, model = Accelerator(cpu=True), tiny_llama()
    hf_gradclip.attach(accelerator, "zclip")
    optimizer = optim.AdamW(model.parameters(), update_clip="block_rms")
    with pytest.raises(UnsupportedBackendError, match=r"AdamW\(clip=\.\.\., update_clip=\.\.\.\).*both would clip"):
        accelerator.prepare(model, optimizer)


@pytest.mark.parametrize(
    ("device", "force", "refused"), [("cpu", True, True), ("cpu", False, False), ("none", True, False)]
)
def test_a_swap_for_deepspeed_cpu_adam_is_refused(device, force, refused) -> None:
    """Accelerate puts DeepSpeedCPUAdam in the place of any optimizer, whatever it is."""
    ours = optim.SGD([nn.Parameter(torch.ones(2))], lr=1)
    zero = {"stage": 2, "offload_optimizer": {"device": device}}
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero, "zero_force_ds_cpu_optimizer": force})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    refuse_swap(accelerator, torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1))
    if not refused:
        refuse_swap(accelerator, ours)
        return
    with pytest.raises(
        UnsupportedBackendError, match=r"optim\.SGD with offload_optimizer.*zero_force_ds_cpu_optimizer"
    ):
        refuse_swap(accelerator, ours)


@pytest.mark.parametrize("by", ["scaler", "skip_sync"])
def test_a_step_that_a_fused_optimizer_leaves_out_by_a_flag_has_no_update(by) -> None:
    """Its weights stand still, which is not an update of minus the decay. The other optimizer is not called at all."""
    spec: dict[str, Any] = {"gradient": "none", "update": "normalize"}
    spec |= {"skip_sync": False} if by == "skip_sync" else {}
    norms: dict[bool, list[float | None]] = {True: [], False: []}
    for fused in (True, False):
        accelerator = Accelerator(cpu=True, mixed_precision="fp16" if by == "scaler" else None)
        if by == "scaler":
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
            accelerator.native_amp = True
        attachment = hf_gradclip.attach(accelerator, spec if fused else {**spec, "skip_sync": True}, auto=True)
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        model, optimizer = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
        )
        for step in range(8):
            accelerator.backward(model(torch.ones(4, 16) * (1 + step % 3)).float().square().mean())
            if step in (0, 3, 4):
                model.weight.grad[0, 0] = float("inf" if by == "scaler" else "nan")
            before = model.weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(before, model.weight) == (step in (0, 3, 4))
            (update,) = attachment.updates.clippers
            norms[fused].append(update.report.scalars().get("clip_update/norm_mean"))
    assert [norm is None for norm in norms[True]] == [step in (0, 3, 4) for step in range(8)]
    known = [[norm for norm in norms[fused] if norm is not None] for fused in (True, False)]
    assert known[0] == pytest.approx(known[1], rel=1e-3)


def test_the_trainer_clips_logs_and_resumes_updates(tmp_path) -> None:
    clip = {
        "gradient": "zclip:warmup_steps=5,z_threshold=1",
        "update": "autoclip:percentile=50,window=8",
    }
    settings = {"clip": clip, "max_steps": 24, "learning_rate": 1e-2, "warmup_steps": 4}
    whole = train(GradClipTrainer, **settings)
    rates = logged(whole, "clip_update/rate")
    assert len(rates) == 23, "nothing is measured at the first step, whose learning rate is 0"
    assert 0 < sum(rates[6:]) < 17
    assert len(logged(whole, "clip_update/threshold")) == 23

    train(GradClipTrainer, callbacks=[StopAt(12)], output_dir=str(tmp_path), **settings)
    checkpoint = tmp_path / "checkpoint-12"
    assert {"gradclip.pt", "gradclip_update.pt"} <= {file.name for file in checkpoint.iterdir()}
    resumed = train(GradClipTrainer, resume=str(checkpoint), model=tiny_llama(seed=9), **settings)
    assert torch.equal(weights_of(whole.model), weights_of(resumed.model))
    assert logged(whole, "clip_update/threshold") == logged(resumed, "clip_update/threshold")

    (checkpoint / "gradclip_update.pt").unlink()
    lost = train(GradClipTrainer, resume=str(checkpoint), model=tiny_llama(seed=9), **settings)
    assert not torch.equal(weights_of(whole.model), weights_of(lost.model)), "without the file the run differs"


@pytest.mark.parametrize("ours", [False, True])
def test_a_second_train_has_one_update_clipper(ours) -> None:
    """A second train() with a new optimizer starts anew, and clips each update once."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = GradClipTrainer(
            model=tiny_llama(),
            args=training_args(folder, max_steps=4, lr_scheduler_type="constant"),
            train_dataset=counting_data(),
            clip={"gradient": "none", "update": "block_rms:max_rms=0.5"},
            optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 1e-2}) if ours else None,
        )
        first = trainer.create_optimizer()
        trainer.train()
        assert trainer.update_clipper.report.summary()["steps"] == 4
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
    assert trainer.update_clipper.report.summary()["steps"] == 4
    assert len(trainer._clip_attachment.updates.clippers) == 1
    keys = {key for entry in trainer.state.log_history for key in entry if key.startswith("clip_update")}
    assert {key.split("/")[0] for key in keys} == {"clip_update"}
    assert first is not None, "the old optimizer is still there"
