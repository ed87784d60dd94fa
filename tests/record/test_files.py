"""The record's files: as pyarrow reads them, and readable after a crash between any two operations on files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_gradclip.record import parts as parts_
from hf_gradclip.record.files import read_record
from hf_gradclip.record.keeping import drop_after, join_small
from hf_gradclip.record.parts import write_part

NAMES = ["a.weight", "b.weight", "b.bias"]
META = {"names": NAMES, "numel": [6, 4, 2], "place": "gradient", "spec": "none", "world": 1}


def rows(first: int, last: int, width: int = 3) -> dict[str, np.ndarray]:
    """Steps `first` to `last`, each value a function of its step."""
    step = np.arange(first, last + 1)
    nan = np.full(len(step), np.nan)
    return {
        "step": step,
        "loss": 1 / step,
        "learning_rate": step * 1e-4,
        "norm": np.sqrt(step),
        "threshold": np.where(step % 2, 0.5, nan),
        "scale_max": 1 + step / 8,
        "finite": step % 7 != 0,
        "skipped": step % 7 == 0,
        "bounded": step % 5 == 0,
        "norms": (step[:, None] + np.arange(width) / 8).astype(np.float32),
        "scales": 1 / (step[:, None] + np.arange(width)).astype(np.float32),
    }


def fill(folder: Path, parts: int, size: int = 3, start: int = 1) -> None:
    for i in range(parts):
        first = start + i * size
        write_part(folder, "gradient", rows(first, first + size - 1), META)


def steps_in(folder: Path) -> list[int]:
    return read_record(folder).step_T.tolist()


def test_a_part_as_pyarrow_reads_it(tmp_path) -> None:
    write_part(tmp_path / "gradclip", "gradient", rows(8, 21), META)
    [path] = (tmp_path / "gradclip").iterdir()
    assert path.name == "gradient-000000008-000000021.parquet"
    table = pq.ParquetFile(path).read()
    for name, wanted in rows(8, 21).items():
        got = np.array(table[name].to_pylist())
        tolerance = 1e-7 if name in ("loss", "learning_rate") else 0
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=0, err_msg=name)
    assert json.loads(table.schema.metadata[b"hf_gradclip"]) == {"version": 1, **META}
    kinds = {name: str(table.schema.field(name).type) for name in ("step", "loss", "norm", "finite")}
    assert kinds == {"step": "int64", "loss": "float", "norm": "double", "finite": "bool"}
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for name in ("norms.list.element", "scales.list.element", "norm", "loss"):
        assert "BYTE_STREAM_SPLIT" in columns[name].encodings
        assert columns[name].compression == "ZSTD"


def test_what_was_written_is_read(tmp_path) -> None:
    fill(tmp_path / "gradclip", parts=4)
    for run in (tmp_path, tmp_path / "gradclip", str(tmp_path)):
        record = read_record(run)
        wanted = rows(1, 12)
        assert record.names == tuple(NAMES)
        assert record.numel_P.tolist() == [6, 4, 2]
        assert record.meta["spec"] == "none"
        np.testing.assert_array_equal(record.step_T, wanted["step"])
        np.testing.assert_array_equal(record.norm_T, wanted["norm"])
        np.testing.assert_array_equal(record.threshold_T, wanted["threshold"])
        np.testing.assert_array_equal(record.scale_max_T, wanted["scale_max"])
        np.testing.assert_array_equal(record.norm_TP, wanted["norms"])
        np.testing.assert_array_equal(record.scale_TP, wanted["scales"])
        np.testing.assert_array_equal(record.skipped_T, wanted["skipped"])


def test_a_part_of_before_the_largest_scale_was_kept(tmp_path) -> None:
    """It is that of any parameter there; what is joined with it, or comes after it, is as it was written."""
    fill(tmp_path, parts=2)
    first, _ = sorted(tmp_path.iterdir())
    table = pq.read_table(first)
    pq.write_table(table.drop_columns(["scale_max"]), first)
    wanted = rows(1, 6)["scale_max"]
    wanted[:3] = rows(1, 3)["scales"].max(axis=1)
    np.testing.assert_array_equal(read_record(tmp_path).scale_max_T, wanted)
    join_small(tmp_path, "gradient", at=2)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(read_record(tmp_path).scale_max_T, wanted)


def test_many_small_parts_become_few(tmp_path) -> None:
    for i in range(400):
        write_part(tmp_path, "gradient", rows(10 * i + 1, 10 * i + 10), META)
        join_small(tmp_path, "gradient")
    assert len(list(tmp_path.iterdir())) < 30
    assert steps_in(tmp_path) == [*range(1, 4001)]
    np.testing.assert_array_equal(read_record(tmp_path).norm_TP, rows(1, 4000)["norms"])


class CrashError(Exception):
    pass


class CrashAt:
    """Stops before the n-th operation that changes the folder: a write, a rename or a deletion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.left = n
        for owner, name in ((pq, "write_table"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))

    def guarded(self, original):
        def call(*args, **kwargs):
            if self.left == 0:
                raise CrashError
            self.left -= 1
            return original(*args, **kwargs)

        return call


def crash_everywhere(tmp_path, monkeypatch, prepare, change, then) -> int:
    """`change` a fresh folder with a crash before its 1st, 2nd, ... operation; how many operations it has."""
    for n in range(200):
        folder = tmp_path / str(n)
        prepare(folder)
        whole = True
        with monkeypatch.context() as patch:
            CrashAt(patch, n)
            try:
                change(folder)
            except CrashError:
                whole = False
        then(folder)
        if whole:
            return n
    raise AssertionError("never got through")


def test_a_crash_while_joining_loses_and_doubles_nothing(tmp_path, monkeypatch) -> None:
    def then(folder: Path) -> None:
        assert steps_in(folder) == [*range(1, 61)]
        np.testing.assert_array_equal(read_record(folder).norm_TP, rows(1, 60)["norms"])
        write_part(folder, "gradient", rows(61, 63), META)  # the run goes on
        join_small(folder, "gradient")
        assert steps_in(folder) == [*range(1, 64)]

    operations = crash_everywhere(
        tmp_path, monkeypatch, lambda f: fill(f, parts=20), lambda f: join_small(f, "gradient"), then
    )
    assert operations == 22  # write aside, rename, 20 deletions


@pytest.mark.parametrize("step", [0, 7, 30, 44, 60])
def test_a_crash_while_dropping_can_be_repeated(tmp_path, monkeypatch, step) -> None:
    """Joined and small parts, and small ones left over from a joining that crashed."""

    def prepare(folder: Path) -> None:
        fill(folder, parts=20)
        kept = {p.name: p.read_bytes() for p in folder.iterdir() if int(p.name[9:18]) in (7, 28, 43, 58)}
        join_small(folder, "gradient")
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        fill(folder, parts=3, start=61)
        assert steps_in(folder) == [*range(1, 70)]

    def then(folder: Path) -> None:
        if any(folder.glob("*.parquet")):
            found = steps_in(folder)
            assert found == sorted(set(found))
            assert set(range(1, step + 1)) <= set(found), "what is kept is never missing"
        drop_after(folder, "gradient", step)  # the next start
        fill(folder, parts=2, start=step + 1)
        assert steps_in(folder) == [*range(1, step + 7)]

    crash_everywhere(tmp_path, monkeypatch, prepare, lambda f: drop_after(f, "gradient", step), then)


def test_parameters_that_came_later_have_no_norm_before(tmp_path) -> None:
    write_part(tmp_path, "gradient", rows(1, 3, width=2), {**META, "names": NAMES[1:], "numel": [4, 2]})
    write_part(tmp_path, "gradient", rows(4, 5), META)
    record = read_record(tmp_path)
    assert record.names == ("b.weight", "b.bias", "a.weight")
    assert record.numel_P.tolist() == [4, 2, 6]
    np.testing.assert_array_equal(record.norm_TP[:3, :2], rows(1, 3, width=2)["norms"])
    assert np.isnan(record.norm_TP[:3, 2]).all()
    np.testing.assert_array_equal(record.norm_TP[3:], rows(4, 5)["norms"][:, [1, 2, 0]])


def test_parts_of_changed_parameters_are_joined(tmp_path) -> None:
    write_part(tmp_path, "gradient", rows(1, 3, width=2), {**META, "names": NAMES[1:], "numel": [4, 2]})
    fill(tmp_path, parts=19, start=4)
    before = read_record(tmp_path)
    join_small(tmp_path, "gradient")
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(read_record(tmp_path).norm_TP, before.norm_TP)


def test_places_are_apart(tmp_path) -> None:
    write_part(tmp_path, "gradient", rows(1, 4), META)
    write_part(tmp_path, "update", rows(2, 3), {**META, "place": "update"})
    assert read_record(tmp_path, "update").step_T.tolist() == [2, 3]
    drop_after(tmp_path, "update", 0)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    with pytest.raises(FileNotFoundError, match="no record of the update"):
        read_record(tmp_path, "update")


def test_words_for_nothing_and_for_later_versions(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no record"):
        read_record(tmp_path)
    write_part(tmp_path, "gradient", rows(1, 2), {**META, "version": parts_.VERSION + 1})
    with pytest.raises(ValueError, match="a later version"):
        read_record(tmp_path)
