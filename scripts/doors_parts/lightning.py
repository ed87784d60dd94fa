"""Lightning: GradClip as a callback in a file of LightningCLI."""

from __future__ import annotations

import csv
from pathlib import Path

from doors_parts.door import INSIDE, Door, Room
from doors_parts.trainer_checks import STRATEGY, insist

BATCHES = 8
KEPT = "state_dict,optimizer_states,callbacks"
"""Of a checkpoint: weights, optimizer, and what GradClip keeps."""
FILE = """
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  devices: {devices}
  strategy: {strategy}
  default_root_dir: {root}
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {root}, name: log, version: 0}}
  callbacks:
    - class_path: hf_gradclip.integrations.lightning.GradClip
      init_args: {{clip: "{clip}"}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {root}, filename: "{{epoch}}", save_top_k: -1, save_on_train_epoch_end: true}}
model:
  sgd: {sgd}
"""


def fit(
    room: Room, name: str, clip: str, epochs: int = 1, sgd: bool = False, ranks: int = 1, resume: Path | None = None
) -> Path:
    """Run the CLI; its folder, with `start.pt` and a checkpoint `epoch=N.ckpt` of each epoch."""
    root = room.folder / name
    root.mkdir()
    strategy = "ddp" if ranks > 1 else "auto"
    given = {"root": root, "clip": clip, "epochs": epochs, "devices": ranks, "strategy": strategy}
    (root / "config.yaml").write_text(FILE.format(**given, sgd=str(sgd).lower()), "utf-8")
    words: list[str | Path] = ["python", INSIDE / "lightning_main.py", "fit", "--config", root / "config.yaml"]
    words += ["--ckpt_path", resume] if resume is not None else []
    room.run(*words)
    return root


def engaged(room: Room) -> str:
    """A tiny limit moves nothing under SGD, and none moves much."""
    found = {}
    for clip in ("1e-12", "none"):
        root = fit(room, clip, clip, sgd=True)
        found[clip] = float(room.look("moved", f"{root}/start.pt::state_dict", f"{root}/epoch=0.ckpt::state_dict"))
    insist(found["1e-12"] < 1e-9 and found["none"] > 1e-4, f"weights moved by {found}")
    return f"weights move by {found['1e-12']:.2g}, without a limit by {found['none']:.2g}"


def goes_on(room: Room, ranks: int = 1) -> str:
    """Logs, state in the checkpoint, and a run that is resumed from it, which goes on to the bit."""
    whole = fit(room, "whole", STRATEGY, epochs=2, ranks=ranks)
    rest = fit(room, "rest", STRATEGY, epochs=2, ranks=ranks, resume=whole / "epoch=0.ckpt")
    with open(whole / "log" / "version_0" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("clip/rate")]
    clipped = sum(float(row["clip/rate"]) > 0 for row in rows)
    insist(0 < clipped < len(rows) == 2 * BATCHES // ranks, f"clipped in {clipped} of {len(rows)} logs")
    found = room.look("same", f"{whole}/epoch=1.ckpt::{KEPT}", f"{rest}/epoch=1.ckpt::{KEPT}")
    insist(found == "same", f"resumed: {found}")
    keys = [key for key in rows[0] if key.startswith("clip")]
    return f"{len(keys)} keys logged, clipped in {clipped} of {len(rows)} steps; all of it resumed to the bit"


DOOR = Door(
    name="Lightning",
    packages=("lightning", "jsonargparse[signatures]"),
    checks={
        "a tiny limit": engaged,
        "logs, checkpoint, resume": goes_on,
        "the same on two ranks of DDP": lambda room: goes_on(room, ranks=2),
    },
    shown=("lightning", "torch"),
)
