"""The record of a run: which step, learning rate and loss a decision belongs to, and when it goes to disk.

Every rank buffers, since every rank decides from the same numbers; rank 0 writes. Each rank writes which examples it
held in a spike. Nothing that goes wrong with a file stops the run: it is said once, and the record ends there.
"""

from __future__ import annotations

import functools
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.record.files import FOLDER, read_record
from hf_gradclip.record.keeping import drop_after, is_taken, join_small, put_damaged_aside, take
from hf_gradclip.record.parts import parts_of, write_part
from hf_gradclip.record.spikes import drop_spikes_after, judged
from hf_gradclip.run.spikes import SpikeWatch, indices_of
from hf_gradclip.run.startup import world_size
from hf_gradclip.run.state import numbered
from hf_gradclip.say import announce, logger
from hf_gradclip.spec import is_own
from hf_gradclip.strategy import describe, warmup_of
from hf_gradclip.types import Layout

GRADIENT, UPDATE = "gradient", "update"
AT_ONCE = 10
MOST_HELD = 1000
"""Steps that are held at most where nobody asks for them to be written."""
STEP_NAME = "gradclip_record.json"


class Recording:
    """Records the clippers of a run.

    Args:
        output_dir: the record goes into `gradclip` in it.
        rank: of this process; 0 writes the record.
        together: whether every rank calls `flush` at the same steps, so that losses can be averaged.
        text_of: words for an example's index, for the spike files; None writes indices only.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], rank: int, together: bool, text_of: Callable[[int], str] | None = None
    ) -> None:
        self.folder = Path(output_dir) / FOLDER
        self._rank = rank
        self._together = together
        self._run = uuid.uuid4().hex
        self._spikes = SpikeWatch(self.folder, rank, text_of)
        self._clippers: dict[str, Clipper] = {}
        self._recorder = Recorder()
        self._losses: list[Tensor] = []
        self._examples: list[Any] = []
        self._ahead: list[Any] = []
        self._facts: dict[int, tuple[float, float]] = {}
        self._begun = False
        self._broken = False

    def watch(self, clipper: Clipper, updates: Sequence[Clipper]) -> None:
        """Record a clipper of gradients and, if there is one, the first of updates.

        Before another clipper of updates is recorded, what is buffered is written.
        """
        if updates and self._clippers.get(UPDATE) not in (None, updates[0]):
            self.flush(force=True)
        self._clippers = {GRADIENT: clipper}
        clipper.recorder = self._recorder
        if updates:
            self._clippers[UPDATE] = updates[0]
            if updates[0].recorder is None:
                updates[0].recorder = Recorder(clock=self._recorder)

    def before_step(self) -> None:
        """Before a step with other trainable parameters, or of other sizes, write what is buffered."""
        buffered = self._recorder.layout
        clipper = self._clippers[GRADIENT]
        if buffered is not None and buffered is not clipper.seen(clipper.view.layout).by_param:
            self.flush(force=True)

    def let_go(self) -> None:
        """Hold no clipper any longer; what they did is written, and what comes is another run."""
        self.flush(force=True)
        self._clippers.clear()
        self._begun = False

    def begin(self, *_: Any, **__: Any) -> None:
        """Start before the first step, unless `start_after` was called."""
        if not self._begun:
            self.start_after(0)

    def start_after(self, step: int) -> None:
        """Go on after a step: what the folder has of later ones is dropped; at 0 an old record is put aside.

        Every rank calls it, since every rank judges the coming norms by the same earlier ones.
        """
        self._begun = True
        for clipper in self._clippers.values():
            if clipper.recorder is not None:
                clipper.recorder.start_after(step)
        self._forget()
        self._spikes.start()
        if self._rank == 0:
            self._writing(lambda: self._clear_after(step))
        if world_size() > 1:
            shared: list[Any] = [self._run, self._spikes.norms]
            dist.broadcast_object_list(shared)
            self._run, norms = shared
            self._spikes.start(norms)

    def _clear_after(self, step: int) -> None:
        for kind in (GRADIENT, UPDATE) if step else ():
            for sentence in put_damaged_aside(self.folder, kind):
                logger.warning("record: %s", sentence)
        if step == 0 and parts_of(self.folder, GRADIENT):
            self._put_aside()
        take(self.folder, self._run)
        for kind in (GRADIENT, UPDATE):
            dropped = drop_after(self.folder, kind, step)
            if dropped and kind == GRADIENT:
                announce(f"record: {dropped} steps past the resumed step {step} are dropped; they are trained again.")
        drop_spikes_after(self.folder, step)
        if parts_of(self.folder, GRADIENT):
            record = read_record(self.folder)
            self._spikes.start(judged(record.norm_T, record.finite_T))

    def _put_aside(self) -> None:
        """A new run in an old folder: the old record stays, under another name."""
        number = 1
        while (old := self.folder.with_name(f"{FOLDER}.old{number}")).exists():
            number += 1
        self.folder.rename(old)
        announce(f"record: {self.folder} is of an earlier run; it is kept as {old.name}.")

    def add_batch(self, loss: Tensor, examples: Any) -> None:
        """What one micro-batch of the coming step had: its part of the step's loss, and its examples' indices."""
        self._losses.append(loss.detach())
        self._examples.append(examples)
        self._ahead = []

    def examples(self) -> list[int] | str:
        """The indices of the examples of the coming step, as far as it was told; reads them to the host."""
        return indices_of([*self._examples, *self._ahead])

    def expect(self, examples: Any) -> None:
        """The examples of a micro-batch whose loss comes later; DeepSpeed makes the step before that."""
        self._ahead = [examples]

    def note(self, learning_rate: Any, loss: Tensor | None = None) -> None:
        """The step that was decided on last: its learning rate; its loss, if `add_batch` was not told."""
        if self._losses:
            loss = self._losses[0] if len(self._losses) == 1 else sum(self._losses[1:], self._losses[0])
        self._recorder.note(learning_rate, loss)
        if not self._broken:
            self._spikes.hold(self._recorder.step, self._examples)
        self._forget()
        if len(self._recorder) >= MOST_HELD:
            self.flush()

    def _forget(self) -> None:
        self._losses, self._examples = [], []

    def flush(self, force: bool = False, alone: bool = False) -> None:
        """Write what is buffered, if it is much or must be now; look for spikes in it.

        What cannot be written is said once, and the run goes on: a rank that no longer writes still takes part in the
        mean over ranks.

        Args:
            force: however little it is.
            alone: other ranks may not come here, so nothing is averaged over them.
        """
        if len(self._recorder) >= AT_ONCE or force:
            self._flush(self._together and not alone)

    def _writing(self, write: Callable[[], None]) -> None:
        """Do something with files; after the first failure nothing more."""
        if self._broken:
            return
        try:
            write()
        except Exception as error:
            self._end(f"cannot be written ({error})")

    def _end(self, why: str) -> None:
        """Write nothing from now on, and say so."""
        self._broken = True
        self._spikes.start()
        logger.warning("record: %s %s. The run goes on without it.", self.folder, why)

    def finish(self) -> None:
        """Write the rest, and join what is small."""
        self.flush(force=True)
        if self._rank == 0:
            for kind in self._clippers:
                self._writing(functools.partial(join_small, self.folder, kind, at=2))

    def _flush(self, together: bool) -> None:
        if not self._broken and is_taken(self.folder, self._run):
            self._end("belongs to another run now, which was started with the same folder")
        for kind, clipper in self._clippers.items():
            recorder = clipper.recorder
            if recorder is None or not len(recorder):
                continue
            layout, losses = recorder.layout, recorder.losses()
            assert layout is not None
            if losses is not None and together and world_size() > 1:
                dist.all_reduce(losses)
                losses = losses / world_size()
            rows = recorder.drain(losses)
            if kind == GRADIENT:
                self._writing(functools.partial(self._spikes.look, rows, layout.names))
                facts = zip(rows["learning_rate"].tolist(), rows["loss"].tolist(), strict=True)
                self._facts |= dict(zip(rows["step"].tolist(), facts, strict=True))
            else:  # an update is decided on after the loop has said what it knows of the step
                nothing = (math.nan, math.nan)
                known = [self._facts.get(step, nothing) for step in rows["step"].tolist()]
                rows["learning_rate"], rows["loss"] = (np.array(column) for column in zip(*known, strict=True))
            if self._rank == 0:
                self._writing(functools.partial(self._write, kind, rows, self._meta(kind, clipper, layout)))
        self._facts = dict(list(self._facts.items())[-1:])  # the update of the last step may come later

    def _write(self, kind: str, rows: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        write_part(self.folder, kind, rows, meta)
        join_small(self.folder, kind)

    def save_step(self, folder: str, number: int = 0) -> None:
        """Write the rest, and how far the record is into a checkpoint of Accelerate, where it has this number."""
        self.flush(force=True)
        if self._rank == 0:
            path = Path(folder, numbered(STEP_NAME, number))
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps({"step": self._recorder.step}) + "\n", "utf-8")
            aside.replace(path)

    def load_step(self, folder: str, number: int = 0) -> None:
        """Go on where a checkpoint of Accelerate was, or say that its steps were not recorded.

        The file that rank 0 reads counts for every rank.
        """
        path = Path(folder, numbered(STEP_NAME, number))
        found: list[int | str] = [_step_in(path)]
        if world_size() > 1:
            dist.broadcast_object_list(found)
        (step,) = found
        if isinstance(step, str):
            if self._rank == 0:
                logger.warning("record: %s %s, so the recorded steps count from 1.", path, step)
            step = 0
        self.start_after(step)

    def _meta(self, kind: str, clipper: Clipper, layout: Layout) -> dict[str, Any]:
        spec = describe(clipper.config.gradient)
        foreign = {} if is_own(spec) else {"warmup": warmup_of(clipper.config.gradient)}  # whose code no reader runs
        return {
            "place": kind,
            "names": list(layout.names),
            "numel": layout.numel_S.tolist(),
            "spec": spec,
            "config": str(clipper.config),
            "backend": clipper.view.backend,
            "world": world_size(),
            **foreign,
        }


def _step_in(path: Path) -> int | str:
    """The step that a checkpoint was made after, or what is wrong with the file that says so."""
    try:
        step = json.loads(path.read_text("utf-8"))["step"]
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "is damaged"
    return step if type(step) is int and step >= 0 else "is damaged"
