"""ms-swift: `swift sft sft.yaml` by hf-gradclip run."""

from __future__ import annotations

from doors_parts.by_file import trained_by
from doors_parts.door import Door
from doors_parts.trainer_checks import checks_of

CONFIG = {
    "model": "{data}/model",
    "model_type": "llama",
    "template": "dummy",
    "dataset": ["{data}/sft.jsonl"],
    "tuner_type": "full",
    "torch_dtype": "float32",
    "use_hf": True,
    "use_cpu": True,
    "max_length": 128,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.01,
    "split_dataset_ratio": 0,
    "add_version": False,
    "report_to": "none",
}
TRAIN = {"sft": trained_by("ms-swift", CONFIG, {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0})}
DOOR = Door(
    name="ms-swift",
    packages=("ms-swift",),
    checks=checks_of(TRAIN["sft"], "swift sft"),
    shown=("ms-swift", "transformers", "trl", "accelerate", "torch"),
    constrained=False,
)
