"""Which functions of hf_gradclip run in one step, how often, and how long the step takes on the host.

    python scripts/profile_step.py
    python scripts/profile_step.py --step zero2 --names

| step | what is counted |
|---|---|
| `trainer` | a training step of GradClipTrainer on the CPU, clip="zclip": a Llama of 2 layers, 21 tensors |
| `zero2` | the same with DeepSpeed ZeRO-2 on one rank, which decides and steps inside backward |
| `fused` | `step()` of hf_gradclip.optim.AdamW, clip="zclip", update_clip="global_norm": 4 tensors |

Counted are the calls (`sys.setprofile`, in the thread that trains) of functions whose file lies in the folder of the
imported package, whatever its modules are called. Comprehensions, generator expressions, lambdas and module bodies,
whose names begin with `<`, count for nothing. A training step lasts from the Trainer's `on_step_begin` to its
`on_step_end`.

The step is steady: the warm-up of the strategy is over and every batch is the same, so the norms hardly move and no
gradient is clipped. Then every second step has a ten times larger loss, whose gradient is clipped. Eleven steps of each
case are counted, one by one. Shown is the step with the most calls, and the least number of calls beside it: where the
gradients have moved in memory, which is chance under ZeRO, tables of their addresses are made anew. Without the
compiled kernels for the CPU other functions run, and the numbers are others.

The times are medians of the steady steps, without the profiler: of clip and optimizer step alone, and of the whole
training step, forward and backward included.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import hf_gradclip

PACKAGE = str(Path(hf_gradclip.__file__).parent) + os.sep
CLIP = "zclip"
WARMUP, TIMED, COUNTED = 40, 100, 11
FIRST = WARMUP + TIMED
LAST = FIRST + 2 * COUNTED
LOUDER = 10.0
RATE = 1e-6
VOCABULARY = 67
QUIET_WORD, LOUD_WORD = "nothing clips", "clips"


@dataclass(frozen=True)
class Function:
    """A function of the package: its place, its length in lines, and how often it was called."""

    place: str
    lines: int
    calls: int


@dataclass
class Profile:
    """What was found of one kind of step.

    Args:
        step: the word of the command line.
        steps: of each case the functions that were called, one list for each counted step.
        clip_ms: the times of clip and optimizer step.
        whole_ms: the times of the whole training step; empty where that is the same.
    """

    step: str
    steps: dict[str, list[list[Function]]] = field(default_factory=dict)
    clip_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)

    def add(self, step: int, functions: list[Function]) -> None:
        """Keep what was counted in a step."""
        self.steps.setdefault(LOUD_WORD if is_loud(step) else QUIET_WORD, []).append(functions)

    def fullest(self, case: str) -> list[Function]:
        """The functions of the step with the most calls."""
        return max(self.steps[case], key=calls_of)


class Counting:
    """Counts the calls of the package's functions between `start` and `stop`."""

    def __init__(self) -> None:
        self._calls: Counter[CodeType] = Counter()

    def _see(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            self._calls[code] += 1

    def start(self) -> None:
        """From here on."""
        sys.setprofile(self._see)

    def stop(self) -> list[Function]:
        """Up to here; the functions, those called most first."""
        sys.setprofile(None)
        found = []
        for code, calls in self._calls.items():
            name = getattr(code, "co_qualname", code.co_name)
            place = f"{code.co_filename.removeprefix(PACKAGE)}:{name}"
            found.append(Function(place, len(inspect.getsourcelines(code)[0]), calls))
        return sorted(found, key=lambda function: (-function.calls, function.place))


def calls_of(functions: Sequence[Function]) -> int:
    """How many calls there were."""
    return sum(function.calls for function in functions)


def files_of(functions: Sequence[Function]) -> set[str]:
    """The files in which some functions are."""
    return {function.place.partition(":")[0] for function in functions}


def profile_trainer(step: str = "trainer", **settings: Any) -> Profile:
    """A training step of GradClipTrainer; see the top of this file."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

    profile = Profile(step)

    class Watched(hf_gradclip.GradClipTrainer):
        """Makes one loss larger, and times clip and optimizer step."""

        since = 0.0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * (LOUDER if is_loud(self.state.global_step) else 1.0)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_deepspeed_enabled:
                self.time_engine(self.model_wrapped)
            loss = super().training_step(*args, **kwargs)
            self.since = time.perf_counter()
            return loss

        def time_engine(self, engine: Any) -> None:
            """DeepSpeed clips and steps inside backward."""
            if "step" in vars(engine):
                return
            inner = engine.step

            def timed(*args: Any, **kwargs: Any) -> Any:
                since = time.perf_counter()
                found = inner(*args, **kwargs)
                if is_timed(self.state.global_step):
                    profile.clip_ms.append(1e3 * (time.perf_counter() - since))
                return found

            engine.step = timed

    class Watch(TrainerCallback):
        """Times the steady steps, and counts in those after them."""

        since = 0.0
        counting = Counting()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.since = time.perf_counter()
            if state.global_step >= FIRST:
                self.counting = Counting()
                self.counting.start()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if is_timed(state.global_step) and not trainer.is_deepspeed_enabled:
                profile.clip_ms.append(1e3 * (time.perf_counter() - trainer.since))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun = state.global_step - 1
            if begun >= FIRST:
                profile.add(begun, self.counting.stop())
            elif is_timed(begun):
                profile.whole_ms.append(1e3 * (time.perf_counter() - self.since))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    row = torch.arange(16) % VOCABULARY
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=LAST,
            per_device_train_batch_size=4,
            learning_rate=RATE,
            logging_steps=10 * LAST,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        data: Any = [{"input_ids": row, "labels": row.clone()}] * (4 * LAST)
        trainer = Watched(LlamaForCausalLM(config), args, train_dataset=data, callbacks=[Watch()], clip=CLIP)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return profile


def profile_zero2() -> Profile:
    """A training step under DeepSpeed ZeRO-2 on one rank; see the top of this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in here.items()} | {"DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    try:
        return profile_trainer("zero2", deepspeed=config)  # use_cpu would train plain DDP
    finally:
        torch.distributed.destroy_process_group()


def profile_fused() -> Profile:
    """A step of AdamW with a clip for the gradient and one for the update; see the top of this file."""
    from hf_gradclip import optim

    profile = Profile("fused")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = optim.AdamW(model.named_parameters(), lr=RATE, clip=CLIP, update_clip="global_norm")
    batch = torch.randn(8, 32)
    for i in range(LAST):
        (model(batch).square().mean() * (LOUDER if is_loud(i) else 1.0)).backward()
        if i >= FIRST:
            counting = Counting()
            counting.start()
            optimizer.step()
            profile.add(i, counting.stop())
        else:
            since = time.perf_counter()
            optimizer.step()
            if is_timed(i):
                profile.clip_ms.append(1e3 * (time.perf_counter() - since))
        optimizer.zero_grad()
    return profile


def is_timed(step: int) -> bool:
    """Whether a step, counted from 0, is one whose time is taken."""
    return WARMUP <= step < FIRST


def is_loud(step: int) -> bool:
    """Whether a step, counted from 0, is one whose gradient is clipped."""
    return step >= FIRST and (step - FIRST) % 2 == 1


STEPS: dict[str, Callable[[], Profile]] = {
    "trainer": lambda: profile_trainer(use_cpu=True),
    "zero2": profile_zero2,
    "fused": profile_fused,
}


def profile_of(step: str) -> Profile:
    """Profile one kind of step in this process, which must not have trained before."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return STEPS[step]()


COLUMNS = ("step", "case", "calls", "least", "functions", "files", "median lines", "clip + step ms", "whole step ms")


def rows_of(profile: Profile) -> list[tuple[str, ...]]:
    """A line of the table for each case."""
    clip, whole = (f"{statistics.median(ms):.3f}" if ms else "-" for ms in (profile.clip_ms, profile.whole_ms))
    rows: list[tuple[str, ...]] = []
    for case, steps in profile.steps.items():
        functions = profile.fullest(case)
        counts = (str(calls_of(functions)), str(min(map(calls_of, steps))), str(len(functions)))
        lines = f"{statistics.median(function.lines for function in functions):g}"
        times = (clip, whole) if case == QUIET_WORD else ("-", "-")
        rows.append((profile.step, case, *counts, str(len(files_of(functions))), lines, *times))
    return rows


def table_of(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table that can also be read as it is."""
    lines = [COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def names_of(profile: Profile) -> str:
    """The functions by calls: calls where nothing clips, calls where it clips, lines, place."""
    cases = [{function.place: function for function in profile.fullest(case)} for case in (QUIET_WORD, LOUD_WORD)]
    lines = [f"{profile.step}: calls where {QUIET_WORD}, where it {LOUD_WORD}, lines, function"]
    for place in dict.fromkeys([*cases[0], *cases[1]]):
        first, second = (case.get(place, Function(place, 0, 0)) for case in cases)
        lines.append(f"{first.calls:5} {second.calls:5} {max(first.lines, second.lines):5}  {place}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Profile]:
    """Profile the chosen steps, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs="+", choices=list(STEPS), default=list(STEPS), help="which; all if left out")
    parser.add_argument("--names", action="store_true", help="also list the functions by calls")
    args = parser.parse_args(argv)
    profiles = []
    for step in args.step:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            profiles.append(pool.apply(profile_of, (step,)))
    print(table_of([row for profile in profiles for row in rows_of(profile)]))
    if args.names:
        for profile in profiles:
            print(f"\n{names_of(profile)}")
    return profiles


if __name__ == "__main__":
    main()
