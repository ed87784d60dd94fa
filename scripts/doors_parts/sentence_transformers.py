"""sentence-transformers: its trainers by the mixin, by `patch`, and by `hf-gradclip run`."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from doors_parts.door import INSIDE, ROOT, Door, Room
from doors_parts.trainer_checks import STEPS, Run, checks_of, insist


def train(way: str, cross: bool, room: Room, run: Run) -> Path:
    """Run st_main.py; the weights before training."""
    words: list[str | Path] = [
        INSIDE / "st_main.py",
        run.out,
        "--steps",
        str(STEPS),
        *["--cross"] * cross,
        *["--sgd"] * run.sgd,
    ]
    words += ["--resume", run.resume] if run.resume is not None else []
    if way == "run":
        room.run("hf-gradclip", "run", "--clip", run.clip, "--", *words, "--way", "stock")
    else:
        room.run("python", *words, "--way", way, "--clip", run.clip)
    return run.out.parent / "start"


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import st_main as st
model = st.SentenceTransformer(str(st.made(Path("start").resolve(), False)))
settings = {"max_steps": 3, "report_to": "none", "use_cpu": True, "optim": "sgd", "learning_rate": 1.0}
args = st.SentenceTransformerTrainingArguments("out", **settings)
names = {"model": model, "args": args, "dataset": st.pairs(False), "loss": st.MultipleNegativesRankingLoss(model)}
before = [p.detach().clone() for p in model.parameters()]
exec(Path(sys.argv[2]).read_text("utf-8"), names)
print(max(float((p - q).abs().max()) for p, q in zip(model.parameters(), before)))
"""


def page(room: Room) -> str:
    """The block of docs/other-trainers.md, with a tiny limit."""
    text = (ROOT / "docs" / "other-trainers.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "SentenceTransformerTrainer" in block]
    room.folder.joinpath("block.py").write_text(block.replace('"adaptive"', "1e-12"), "utf-8")
    room.folder.joinpath("page.py").write_text(SCRIPT, "utf-8")
    moved = float(room.run("python", "page.py", INSIDE, "block.py").strip().splitlines()[-1])
    insist(moved < 1e-9, f"weights move by {moved}")
    return f"weights move by {moved:.2g}"


DOOR = Door(
    name="sentence-transformers",
    packages=("sentence-transformers",),
    checks={
        **checks_of(functools.partial(train, "mixin", False), "GradClipMixin"),
        **checks_of(functools.partial(train, "patch", False), "patch"),
        **checks_of(functools.partial(train, "run", True), "hf-gradclip run, CrossEncoder"),
        "the page": page,
    },
    shown=("sentence-transformers", "transformers", "torch"),
)
