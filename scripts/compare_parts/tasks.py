"""All tasks by name."""

from __future__ import annotations

from compare_parts import scratch, sentences, smollm2
from compare_parts.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (*scratch.TASKS, *smollm2.TASKS, *sentences.TASKS)}
