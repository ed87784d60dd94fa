"""Which share of a training step is spent in clipping, and in recording it, in the main job as it stands.

    python scripts/bench_job.py --out benchmarks
    python scripts/bench_job.py --clip zclip agc --steps 200

Model, text, batch and optimizer are those of finetune.py without flags, in a plain loop. The strategies take turns, one
step each, so that all of them meet the same state of the machine; each has its own clipper and its own record, written
every ten of its steps. A step is the forward and backward pass, clipping with its record, and the optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import circumstances, hardware
from finetune import load_model, load_texts, load_tokenizer, parse, to_blocks
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed

from hf_gradclip import Clipper
from hf_gradclip.run.recording import Recording

DEFAULT = ("none", "global_norm:max_norm=1", "adaptive_norm", "adaptive", "zclip", "adagc", "agc")
UNTIMED = 2
COLUMNS = ("strategy", "steps", "step ms", "clipping ms", "clipping / step", "recording ms", "recording / step")


class Timed:
    """A strategy with its record, and the seconds they took, per step.

    Args:
        spec: what to clip by.
        model: whose gradients.
        folder: of the record.
    """

    def __init__(self, spec: str, model: torch.nn.Module, folder: str) -> None:
        self.spec = spec
        self._clipper = Clipper.for_model(model, spec)
        self._recording = Recording(folder, rank=0, together=False)
        self._recording.watch(self._clipper, [])
        self._recorded = 0.0
        recorder: Any = self._clipper.recorder
        recorder.add = self._watch(recorder.add)
        self.clipping: list[float] = []
        self.recording: list[float] = []
        self.steps: list[float] = []

    def clip(self, loss: torch.Tensor, lr: float) -> None:
        """Clip and record one step."""
        self._recorded = 0.0
        clipped = seconds(self._clipper.step)
        inside, self._recorded = self._recorded, 0.0
        self._recording.note(lr, loss)
        written = seconds(self._recording.flush)
        self.clipping.append(clipped - inside)
        self.recording.append(inside + written)

    def _watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> None:
            self._recorded += seconds(lambda: function(*args))

        return watched

    def row(self) -> dict[str, Any]:
        """Medians of the timed steps; of the record the mean, since it writes every ten steps only."""
        step = statistics.median(self.steps[UNTIMED:])
        clipping = statistics.median(self.clipping[UNTIMED:])
        recording = statistics.mean(self.recording[UNTIMED:])
        return {
            "strategy": self.spec,
            "steps": len(self.steps) - UNTIMED,
            "step_ms": 1e3 * step,
            "clipping_ms": 1e3 * clipping,
            "clipping_share": clipping / step,
            "recording_ms": 1e3 * recording,
            "recording_share": recording / step,
        }


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [row["strategy"], row["steps"], f"{row['step_ms']:.1f}", f"{row['clipping_ms']:.2f}"]
        cells += [f"{row['clipping_share']:.2%}", f"{row['recording_ms']:.2f}", f"{row['recording_share']:.2%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure; the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", nargs="+", default=list(DEFAULT), help="Strategies.")
    parser.add_argument("--steps", type=int, default=30, help="Timed steps of each.")
    parser.add_argument("--threads", type=int, default=1, help="Of torch.")
    parser.add_argument("--out", type=Path, default=None, help="A folder for the Markdown and JSON files.")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    _, data_args, args = parse([])
    set_seed(args.seed)
    texts = load_texts(data_args, args.seed)
    tokenizer = load_tokenizer(data_args, texts["train"][data_args.text_column])
    data = to_blocks(texts, tokenizer, data_args)["train"]
    model = load_model(data_args, tokenizer).train()
    size = args.per_device_train_batch_size
    loader = DataLoader(data, batch_size=size, shuffle=True, collate_fn=default_data_collator, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)
    batches = iter(loader)

    with tempfile.TemporaryDirectory() as folder:
        timed = [Timed(spec, model, f"{folder}/{i}") for i, spec in enumerate(options.clip)]
        for _ in range(options.steps + UNTIMED):
            for strategy in timed:
                start = time.perf_counter()
                loss = model(**next(batches)).loss
                loss.backward()
                strategy.clip(loss.detach(), args.learning_rate)
                optimizer.step()
                optimizer.zero_grad()
                strategy.steps.append(time.perf_counter() - start)

    rows = [strategy.row() for strategy in timed]
    elements = sum(p.numel() for p in model.parameters())
    tensors = len(list(model.parameters()))
    what = f"{elements:,} parameters in {tensors} tensors, batches of {size} x {len(data[0]['input_ids'])}"
    report = {**circumstances("bench_job", argv, torch.device("cpu"), "time.perf_counter"), "job": what, "rows": rows}
    print(f"\n{what}\n\n{table_of(rows)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = f"job_{hardware(torch.device('cpu'))[1]}_{report['date']}"
        facts = "\n".join(f"- {key}: {value}" for key, value in report.items() if key not in ("rows", "versions"))
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        text = f"# {stem}\n\n{facts}\n- versions: {versions}\n\n{table_of(rows)}\n"
        (options.out / f"{stem}.md").write_text(text, "utf-8")
        (options.out / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return report


if __name__ == "__main__":
    main()
