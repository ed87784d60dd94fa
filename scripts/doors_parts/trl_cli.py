"""TRL's command line: `trl sft --config sft.yaml`, which runs its own script by `accelerate launch`."""

from __future__ import annotations

from doors_parts.by_file import trained_by
from doors_parts.door import Door
from doors_parts.trainer_checks import checks_of

CONFIG = {
    "model_name_or_path": "{data}/model",
    "datasets": [{"path": "json", "data_files": "{data}/sft.jsonl"}],
    "dtype": "float32",
    "bf16": False,
    "use_cpu": True,
    "learning_rate": 0.01,
    "per_device_train_batch_size": 4,
    "report_to": "none",
}
DOOR = Door(
    name="TRL's command line",
    packages=("trl",),
    checks=checks_of(trained_by("TRL's command line", CONFIG, {"optim": "sgd", "learning_rate": 1.0}), "trl sft"),
    shown=("trl", "transformers", "torch"),
)
