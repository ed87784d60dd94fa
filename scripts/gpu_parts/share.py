"""Part `share`: which share of a training step of a Llama of 1.1B parameters is spent in clipping, by strategy.

A step is forward, backward, clip, and torch's fused AdamW, in bfloat16. The strategies take turns, one step each, so
that all meet the same state of the machine. The clip is timed on the device, from where its backward ends to where the
optimizer may begin; so what the device waits for the host in it counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmark import bind
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_parts.worker import Worker, given_up, serve
from hf_gradclip import Clipper
from hf_gradclip.record.buffer import Recorder

SPECS = {name: name for name in ("none", "global_norm:max_norm=1", "adaptive_norm", "adaptive")}
UNTIMED = 3


@dataclass
class Turn:
    """One way to clip, and the ms of its steps: of the clip on the device and on the host, and of the whole."""

    clip: Callable[[], Any]
    clips: list[float] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def model_of(w: Worker) -> tuple[LlamaForCausalLM, tuple[int, int]]:
    """The model, and the shape of a batch."""
    sizes = (64, 128, 2, 4, 2, 512) if w.tiny else (2048, 5632, 22, 32, 4, 32000)
    words = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(**dict(zip((*words, "vocab_size"), sizes, strict=True)), tie_word_embeddings=False)
    torch.manual_seed(0)
    with w.device():
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16), (2, 16) if w.tiny else (4, 512)


def share(w: Worker) -> None:
    """A row for each strategy."""
    device = w.device()
    model, shape = model_of(w)
    params = list(model.parameters())
    recorded = Clipper.for_model(model, "adaptive")
    recorded.recorder = Recorder()
    turns = {
        "no clipping": Turn(lambda: None),
        "torch clip_grad_norm_": Turn(bind(clip_grad_norm_, params, 1.0)),
        **{name: Turn(Clipper.for_model(model, spec).step) for name, spec in SPECS.items()},
        "adaptive, record": Turn(recorded.step),
    }
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=device)
    w.emit(model=f"{sum(p.numel() for p in params):,} parameters in {len(params)} tensors, batch {shape}")
    for turn in range(UNTIMED + (2 if w.tiny else 15)):
        for one in turns.values():
            taken = _step(model, tokens, optimizer, one.clip, device)
            if turn >= UNTIMED:
                for kept, ms in zip((one.clips, one.hosts, one.steps), taken, strict=True):
                    kept.append(ms)
        if turn > UNTIMED and w.late(3):
            break
    bare = statistics.median(turns["no clipping"].steps)
    for name, one in turns.items():
        clip, host, step = (statistics.median(kept) for kept in (one.clips, one.hosts, one.steps))
        w.emit(row=f"1B step, {name}", step_ms=step, clip_ms=clip, share=clip / step, host_ms=host,
               over_no_clipping=step / bare - 1, steps=len(one.steps), given_up=given_up())  # fmt: skip


def _step(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Any],
    device: torch.device,
) -> tuple[float, float, float]:
    """One step: ms of the clip on the device and on the host, and of everything."""
    marks = _Marks(device)
    marks.set()
    model(input_ids=tokens, labels=tokens).loss.backward()
    marks.set()
    start = time.perf_counter()
    clip()
    host = 1e3 * (time.perf_counter() - start)
    marks.set()
    optimizer.step()
    optimizer.zero_grad()
    marks.set()
    forward, clipping, rest = marks.between()
    return clipping, host, forward + clipping + rest


class _Marks:
    """Points in time on the device, or on the CPU; the ms between them."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._set: list[Any] = []

    def set(self) -> None:
        if not self._cuda:
            self._set.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._set.append(event)

    def between(self) -> list[float]:
        pairs = zip(self._set, self._set[1:], strict=False)
        if not self._cuda:
            return [1e3 * (last - first) for first, last in pairs]
        torch.cuda.synchronize()
        return [first.elapsed_time(last) for first, last in pairs]


if __name__ == "__main__":
    serve(share)
