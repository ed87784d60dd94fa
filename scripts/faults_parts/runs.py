"""One run of a case on its backend, with a look at this process's memory after every step."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import hf_gradclip
from faults_parts.cases import STRATEGIES, WHEN, Case
from faults_parts.model import Fault, Net, batch
from hf_gradclip import optim
from hf_gradclip.clipper import Clipper, NonFiniteError
from hf_gradclip.device import local
from hf_gradclip.wrappers import innermost

RATE, DECAY, SCALE = 1e-2, 0.1, 1024.0
ROWS_OF_TRAINER = 6


@dataclass
class Looks:
    """What the memory of this process was after each step, and before the first; copies.

    Args:
        weights: of the parameters, as the optimizer has them.
        moments: whatever the optimizer keeps, by parameter and name.
    """

    weights: list[list[Tensor]]
    moments: list[dict[str, Tensor]]


class Watched:
    """A run that is under way.

    Args:
        case: what is run.
        rank: of this process.
        ranks: how many there are.

    Attributes:
        clippers: of the gradient and, where updates are clipped, of those; empty before the first step.
        scaler: of the loss, if there is one.
        error: what ended it; None where nothing did.
    """

    def __init__(self, case: Case, rank: int = 0, ranks: int = 1) -> None:
        self.case, self.rank, self.ranks = case, rank, ranks
        self.fault = Fault(case, rank, ranks)
        self.model = Net(case, self.fault)
        self.looks = Looks([], [])
        self.clippers: list[Clipper] = []
        self.scaler: Any = None
        self.error: Exception | None = None
        self.optimizer: Any = None
        self.memory: Callable[[], list[Tensor]] = self._of_groups

    def _of_groups(self) -> list[Tensor]:
        return [local(p.detach()) for group in innermost(self.optimizer).param_groups for p in group["params"]]

    def begin(self, step: int) -> None:
        """Before the forward pass of a step."""
        if not self.looks.weights:
            self.look()
        self.fault.active = step in WHEN[self.case.when]

    def look(self) -> None:
        """After a step."""
        self.looks.weights.append([weight.detach().clone() for weight in self.memory()])
        entries = enumerate(innermost(self.optimizer).state.values())
        found = {f"{i} {key}": value for i, state in entries for key, value in state.items()}
        self.looks.moments.append(
            {key: local(value.detach()).clone() for key, value in found.items() if torch.is_tensor(value)}
        )

    @property
    def reads_no_gradient(self) -> bool:
        """Whether nobody looks at the gradient: an optimizer with `update_clip` alone, in every second such case."""
        return self.case.backend == "plain" and self.case.clip == "update" and self.case.number % 2 == 0

    def spec(self) -> Any:
        """Of the case: the strategy for the gradient, or for the update of one that is only measured."""
        strategy = STRATEGIES[self.case.strategy]
        return strategy if self.case.clip == "gradient" else {"gradient": "none", "update": strategy}

    def adamw(self, **more: Any) -> Any:
        """The optimizer of the case."""
        kind: Any = torch.optim.AdamW if self.case.optimizer == "torch" else optim.AdamW
        return kind(self.model.named_parameters(), lr=RATE, weight_decay=DECAY, **more)


def run(case: Case, rank: int = 0, ranks: int = 1) -> Watched:
    """Train, with the fault in it, until the case is done or something ends it."""
    torch.manual_seed(case.number)
    watched = Watched(case, rank, ranks)
    steps = {"plain": _plain, "trainer": _trainer, "trainer bf16": _trainer}.get(case.backend, _accelerated)(watched)
    try:
        for _ in steps:
            watched.look()
    except NonFiniteError as error:
        watched.error = error
        watched.look()
    return watched


def _plain(watched: Watched) -> Iterator[None]:
    """A loop, with a clipper beside torch's optimizer, or in one of ours; of updates alone in every second case."""
    case, strategy = watched.case, STRATEGIES[watched.case.strategy]
    clipper: Clipper | None = None
    if case.optimizer == "torch":
        clipper = hf_gradclip.Clipper.for_model(watched.model, strategy)
        watched.optimizer = watched.adamw()
        watched.clippers = [clipper]
    elif case.clip == "gradient":
        watched.optimizer = watched.adamw(clip=strategy)
        watched.clippers = [watched.optimizer.clipper]
    else:
        watched.optimizer = watched.adamw(clip=None if watched.reads_no_gradient else "none", update_clip=strategy)
        found = watched.optimizer.clipper, watched.optimizer.update_clipper
        watched.clippers = [clipper for clipper in found if clipper is not None]
    for step in range(case.steps):
        watched.begin(step)
        loss = watched.model(**batch(step, 0))["loss"]
        loss.backward()
        if clipper is not None:
            clipper.step(loss)
            watched.optimizer.step()
        else:
            watched.optimizer.step(lambda loss=loss: loss)
        watched.optimizer.zero_grad()
        yield


def _trainer(watched: Watched) -> Iterator[None]:
    """The Trainer has the loop: it is run to its end, and looks by callbacks."""
    trainers = importlib.import_module("transformers")

    class Look(trainers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched.optimizer = trainer.optimizer
            watched.clippers = [c for c in (trainer.clipper, trainer.update_clipper) if c is not None]
            watched.begin(int(state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched.look()

    case = watched.case
    rows = [batch(step, 0) for step in range(case.steps)]
    data = [{key: value[i] for key, value in row.items()} for row in rows for i in range(ROWS_OF_TRAINER)]
    with tempfile.TemporaryDirectory() as folder:
        args = trainers.TrainingArguments(
            folder, max_steps=case.steps, per_device_train_batch_size=ROWS_OF_TRAINER, use_cpu=True, report_to="none",
            save_strategy="no", logging_steps=7, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=RATE,
            bf16=case.backend == "trainer bf16", seed=case.number, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = hf_gradclip.GradClipTrainer(
            watched.model, args, train_dataset=data, clip=watched.spec(), optimizers=(watched.adamw(), None),
            callbacks=[Look()],
        )  # fmt: skip
        trainer.remove_callback(trainers.PrinterCallback)
        trainer.train()
    yield from ()


def _accelerated(watched: Watched) -> Iterator[None]:
    """A loop on a backend of Accelerate, by attach()."""
    accelerator, model, optimizer, attachment = _prepared(watched)
    watched.optimizer = optimizer
    for step in range(watched.case.steps):
        watched.begin(step)
        accelerator.backward(model(**batch(step, watched.rank))["loss"])
        watched.clippers = [attachment.clipper, *attachment.updates.clippers]
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 7 == 6:
            attachment.scalars()
        yield


def _prepared(watched: Watched) -> tuple[Any, Any, Any, Any]:
    """Model and optimizer on the backend of the case, which is asserted to be in force."""
    sharded: Any = importlib.import_module("tests.integrations.sharded")
    backend = watched.case.backend
    if backend == "fsdp2":
        accelerator = _fsdp2(sharded)
    elif backend == "fp16 GradScaler":
        accelerator = sharded.accelerator_for({"mixed_precision": "fp16"})
        watched.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)  # Accelerate makes none on a CPU
        accelerator.scaler, accelerator.native_amp = watched.scaler, True
        watched.fault.loss_scale = watched.scaler.get_scale
    else:
        accelerator = sharded.accelerator_for(sharded.BACKENDS[backend])
    attachment = hf_gradclip.attach(accelerator, watched.spec())
    model, optimizer = accelerator.prepare(watched.model, watched.adamw())
    if backend == "fsdp2":
        assert all(isinstance(p, DTensor) for p in model.parameters()), "sharded, not DDP under another name"
    elif backend == "ddp":
        assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    elif backend.startswith("zero"):
        zero = model.optimizer
        assert model.zero_optimization_stage() == int(backend[-1])
        flats = zero.fp32_partitioned_groups_flat if backend == "zero3" else zero.single_partition_of_fp32_groups
        watched.memory = lambda: [*flats]
    return accelerator, model, optimizer, attachment


def _fsdp2(sharded: Any) -> Any:
    states: Any = importlib.import_module("accelerate.state")
    for state in (states.AcceleratorState, states.GradientState, states.PartialState):
        state._reset_state()
    accelerate: Any = importlib.import_module("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    with sharded.fsdp_on_cpu():
        return accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)


def start(backend: str) -> None:
    """What a process must do once before it runs cases of a backend on several ranks."""
    if backend.startswith("zero"):
        sharded: Any = importlib.import_module("tests.integrations.sharded")
        deepspeed: Any = importlib.import_module("deepspeed")
        sharded.without_shared_memory()
        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
