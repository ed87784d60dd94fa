"""`hf-gradclip watch`: what it shows of a record that grows, how late it is, and what it says without one."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerCallback

from hf_gradclip import GradClipTrainer
from hf_gradclip.analysis import watch as module
from hf_gradclip.analysis.watch import BARS, Watch, lines_of, watch
from hf_gradclip.cli import main
from hf_gradclip.record.files import FOLDER, Record
from hf_gradclip.record.keeping import join_small
from hf_gradclip.record.parts import write_part
from tests.analysis.records import NAMES, norms_of, record_by_hand
from tests.tiny import counting_data, tiny_llama, training_args


def grow(folder: Path, record: Record, first: int, last: int) -> None:
    """Write the steps from one to another, as a run does at a log."""
    meta = {**record.meta, "names": list(record.names), "numel": record.numel_P.tolist()}
    write_part(folder / FOLDER, "gradient", record.of(slice(first - 1, last)), meta)


def made(**changes) -> Record:
    norms = norms_of()
    norms[33, 2] = np.nan
    scales = np.where(np.arange(120) % 4 == 0, 0.5, 1.0)[:, None] * np.ones((1, 4))
    return record_by_hand(norms, scales, threshold_T=np.linspace(1, 2, 120), **changes)


def test_it_follows_a_record_that_grows(tmp_path) -> None:
    record, looks = made(), Watch(tmp_path)
    assert looks.look() is None
    for first, last in ((1, 20), (21, 55), (56, 120)):
        grow(tmp_path, record, first, last)
        seen = looks.look()
        np.testing.assert_array_equal(seen.run.gradient.norm_T, record.norm_T[:last])
        said = "\n".join(lines_of(seen, tmp_path, seen.written + 7, 80))
        assert f"step {last}, written 7 s ago" in said
        assert f"threshold {record.threshold_T[last - 1]:.4g} " in said
        assert f"loss           {BARS[-1]}" in said, "it falls all the time, so the first is the highest"
        assert f"{record.loss_T[last - 1]:.4g}, from {record.loss_T[last - 1]:.4g} to 5" in said
        assert f"clipped {(last + 3) // 4 / last:.1%} of all" in said
        assert f"NaN or inf {int(last > 33)}" in said
    assert "2 steps stand out by their norm" not in said
    assert re.search(
        rf"3 steps stand out by their norm; the last:\n  step 91  norm .*\n  step 61 .*\n  step 34 .*{NAMES[2]}", said
    )


def test_a_look_while_parts_are_joined(tmp_path) -> None:
    """Where a part is gone before it is read, what was seen before counts until the next look."""
    record, looks = made(), Watch(tmp_path)
    grow(tmp_path, record, 1, 20)
    grow(tmp_path, record, 21, 40)
    assert len(looks.look().run.gradient) == 40
    grow(tmp_path, record, 41, 60)
    (tmp_path / FOLDER / "gradient-000000061-000000080.parquet").write_bytes(b"half a file")
    assert len(looks.look().run.gradient) == 40
    (tmp_path / FOLDER / "gradient-000000061-000000080.parquet").unlink()
    join_small(tmp_path / FOLDER, "gradient", at=2)
    assert len(looks.look().run.gradient) == 60


def test_what_has_not_grown_is_not_read_again(tmp_path, monkeypatch) -> None:
    grow(tmp_path, made(), 1, 20)
    looks = Watch(tmp_path)
    first = looks.look()
    monkeypatch.setattr(module, "load_run", lambda _: pytest.fail("it was read again"))
    assert looks.look() is first


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, width) -> None:
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.default.weight\x1b[2J" for i in range(4)]
    meta = {**made().meta, "config": "zclip:" + ",".join(f"field{i}=1" for i in range(20))}
    grow(tmp_path, made(names=tuple(names), meta=meta), 1, 120)
    lines = lines_of(Watch(tmp_path).look(), tmp_path, 1e10, width)
    assert max(map(len, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert "base_model" not in "".join(lines)


def test_nothing_finite_and_nothing_known(tmp_path) -> None:
    record = record_by_hand(np.full((5, 4), np.nan), loss_T=np.full(5, np.nan), learning_rate_T=np.full(5, np.nan))
    grow(tmp_path, record, 1, 5)
    said = "\n".join(lines_of(Watch(tmp_path).look(), tmp_path, 0.0, 80))
    assert "NaN or inf 5" in said
    assert "loss" not in said


def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    said = capsys.readouterr().out
    assert "holds no record yet." in said
    assert "Waiting" not in said
    grow(tmp_path, made(), 1, 50)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "step 50, written 0 s ago" in capsys.readouterr().out
    assert main(["watch", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "hf-gradclip watch: needs rich: pip install 'hf_gradclip[report]'. Or look once: watch RUN --once.\n"
    for every in ("0", "inf", "1e30", "nan"):
        assert main(["watch", str(tmp_path), "--every", every]) == 2
        assert "must be seconds, above 0" in capsys.readouterr().err


def test_the_screen_is_drawn_anew(tmp_path, monkeypatch) -> None:
    """Between two looks the record grows, and an interrupt ends it in peace."""
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", "80")
    record, screen = made(), io.StringIO()
    grow(tmp_path, record, 1, 20)

    def rounds():
        yield 0
        grow(tmp_path, record, 21, 44)
        yield 1
        raise KeyboardInterrupt

    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    watch(tmp_path, every=0.01, once=False, rounds=rounds())
    said = screen.getvalue()
    assert said.index("step 20, written") < said.index("step 44, written")


class Look(TrainerCallback):
    """Looks at the record at every log of a run."""

    def __init__(self, folder: Path) -> None:
        self.looks, self.found = Watch(folder), []

    def on_log(self, args, state, control, **kwargs) -> None:
        if (seen := self.looks.look()) is not None:
            self.found.append((state.global_step, int(seen.run.gradient.step_T[-1]), seen))


def test_a_run_that_goes_on(tmp_path) -> None:
    """What a Trainer has written is seen while it trains, never more than it has done and at most two logs late."""
    look = Look(tmp_path)
    args = training_args(str(tmp_path), max_steps=45, logging_steps=10)
    clip = {"gradient": "global_norm:max_norm=0.5", "record": True}
    GradClipTrainer(
        model=tiny_llama(), args=args, train_dataset=counting_data(180), clip=clip, callbacks=[look]
    ).train()
    steps = [(done, seen) for done, seen, _ in look.found]
    assert steps[0][0] <= 20
    assert all(done - 20 <= seen <= done for done, seen in steps)
    assert len({seen for _, seen in steps}) >= 3
    assert look.looks.look().run.gradient.step_T[-1] == 45
    assert abs(look.looks.look().written - os.stat(tmp_path / FOLDER).st_mtime) < 60
