"""LLaMA-Factory: `llamafactory-cli train sft.yaml` by hf-gradclip run, for SFT and for DPO."""

from __future__ import annotations

from doors_parts.by_file import trained_by
from doors_parts.door import Door, Room
from doors_parts.trainer_checks import checks_of

SECTION = "LLaMA-Factory"
CONFIG = {
    "model_name_or_path": "{data}/model",
    "do_train": True,
    "finetuning_type": "full",
    "dataset_dir": "{data}",
    "template": "default",
    "cutoff_len": 128,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "fp16": False,
}
SGD = {"optim": "sgd", "learning_rate": 1.0}
TRAIN = {
    "SFT": trained_by(SECTION, {**CONFIG, "stage": "sft", "dataset": "sft"}, SGD),
    "DPO": trained_by(SECTION, {**CONFIG, "stage": "dpo", "dataset": "dpo"}, SGD),
}


def without_sound(room: Room) -> str:
    """Take out what does not load beside a torch that was built for the CPU.

    The tool needs torchaudio and torchvision for sounds and pictures only, but imports the former: an empty module
    stands in.
    """
    room.run("python", "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchvision")
    next(room.environment.glob("lib/python3*/site-packages")).joinpath("torchaudio.py").touch()
    return room.versions(("llamafactory", "transformers", "trl", "accelerate"))


DOOR = Door(
    name="LLaMA-Factory",
    packages=("llamafactory",),
    checks={"installed": without_sound, **checks_of(TRAIN["SFT"], "SFT"), **checks_of(TRAIN["DPO"], "DPO")},
    shown=("torch",),
    constrained=False,
)
