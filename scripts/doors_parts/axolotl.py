"""Axolotl: the plugin and `clip:` in its YAML file, by `axolotl train`, for SFT and for DPO."""

from __future__ import annotations

from doors_parts.by_file import printed, start, trained_by
from doors_parts.door import Door, Room
from doors_parts.trainer_checks import checks_of, insist

SECTION = "Axolotl"
CONFIG = {
    "base_model": "{data}/model",
    "dataset_prepared_path": "{data}/prepared",
    "sequence_len": 128,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw_torch",
    "learning_rate": 0.01,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "val_set_size": 0,
}
SFT = [{"path": "{data}/sft.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}]
DPO = [
    {
        "path": "{data}/dpo.jsonl",
        "ds_type": "json",
        "split": "train",
        "type": "chat_template.default",
        "field_messages": "conversation",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    }
]
SGD = {"optimizer": "sgd", "learning_rate": 1.0}


def wrong(room: Room) -> str:
    """A wrong `clip:` ends Axolotl with one line where it reads its file; the launcher adds that it ended."""
    said = start(room, printed(SECTION).by("adaptve"), {**CONFIG, "datasets": SFT, "max_steps": 1}, status=1)
    before, _, line = said.partition("\nClipPlugin: ")
    insist("Did you mean adaptive?" in line.splitlines()[0], said[-400:])
    insist("Traceback" not in before, "a traceback before the line")
    return line.split(" Known:")[0]


TRAIN = {
    "SFT": trained_by(SECTION, {**CONFIG, "datasets": SFT}, SGD),
    "DPO": trained_by(SECTION, {**CONFIG, "datasets": DPO, "rl": "dpo"}, SGD),
}
DOOR = Door(
    name="Axolotl",
    packages=("axolotl",),
    checks={
        **checks_of(TRAIN["SFT"], "SFT"),
        **checks_of(TRAIN["DPO"], "DPO"),
        "a wrong clip": wrong,
    },
    shown=("axolotl", "transformers", "trl", "accelerate", "torch"),
    constrained=False,
)
