"""Files that are whole, or valid at every moment, and never half written."""

from __future__ import annotations

import errno
import os

import h5py
import numpy as np
import pytest

from influence.errors import MismatchError, StoreError
from influence.store import (
    RowFile,
    copy_rows,
    open_file,
    open_rows,
    read_mapped,
    write_file,
    write_json,
    write_text,
)
from tests.helpers import contents


def test_row_files_are_valid_hdf5_at_every_moment(tmp_path):
    path = tmp_path / "rows.h5"
    write_file(
        path,
        attrs={"run_digest": "x"},
        rows={"rows": ((5, 3), np.float64), "done": ((5,), np.uint8)},
    )
    mapped, done = open_rows(path, "rows", write=True), open_rows(path, "done", write=True)
    assert mapped.shape == (5, 3)
    assert not mapped.any()
    mapped[2], done[2] = [1, 2, 3], 1
    with h5py.File(path) as file:  # while the maps are still open
        assert file["rows"][2].tolist() == [1, 2, 3]
        assert file["done"][()].tolist() == [0, 0, 1, 0, 0]
    with (
        pytest.raises(MismatchError, match=r"belongs to another run \(digest x, this run has y\)"),
        open_file(path, run_digest="y"),
    ):
        pass


def test_columns_of_all_rows_are_read_and_a_cut_file_is_named(tmp_path):
    path, values = tmp_path / "rows.h5", np.arange(60.0).reshape(5, 12)
    write_file(path, attrs={"run_digest": "d"}, rows={"rows": ((5, 12), np.float64)})
    with RowFile(path, "rows", write=True) as file:
        file.write(np.arange(5), values)
        np.testing.assert_array_equal(file.block(slice(0, len(file)), slice(3, 8)), values[:, 3:8])
        end = path.read_bytes().index(values[4].tobytes()) + values[4].nbytes
        os.truncate(path, end - 8)
        np.testing.assert_array_equal(file.block(slice(0, len(file)), slice(3, 8)), values[:, 3:8])
        with pytest.raises(StoreError, match="truncated"):
            file.block(slice(0, len(file)), slice(3, 12))


def test_a_chunked_dataset_is_not_mapped(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("rows", data=np.zeros((4, 4)), chunks=(2, 2))
    with pytest.raises(
        StoreError, match="rows is not stored contiguously, so it was not written by this toolkit"
    ):
        open_rows(tmp_path / "x.h5", "rows")


def test_a_failed_write_leaves_no_partial_file_and_the_old_one(tmp_path, monkeypatch):
    write_file(tmp_path / "x.h5", {"a": np.arange(3)})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"x.h5 could not be written: .*No space left on device"):
        write_file(tmp_path / "x.h5", {"a": np.arange(4)})
    assert contents(tmp_path) == before


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "new" / "list.csv"
    write_text(out, "é\r\n")
    assert out.read_bytes() == "é\r\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(out, "\ud800")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("influence.store.os.replace", full)
    for write, other in ((write_text, "other"), (write_json, {"a": "é"})):
        with pytest.raises(OSError, match="no space left"):
            write(out, other)
    assert out.read_bytes() == "é\r\n".encode()
    assert [path.name for path in out.parent.iterdir()] == ["list.csv"]


def test_large_arrays_are_mapped_and_outlive_their_file(tmp_path, monkeypatch):
    """What is written to them is not written to the file; a file that takes its place is no part of
    them.
    """
    monkeypatch.setattr("influence.store.MAPPED_BYTES", 100)
    path = tmp_path / "factors.h5"
    values = np.arange(60, dtype=np.float32).reshape(12, 5)
    write_file(path, {"leaf/0/wide": values, "small": values[:2]})
    with h5py.File(path, "a") as file:
        file.create_dataset("chunked", data=values, chunks=(3, 5))
    before = path.read_bytes()
    with open_file(path) as file:
        mapped, small = read_mapped(file, "leaf/0/wide"), read_mapped(file, "small")
        assert isinstance(mapped, np.memmap)
        assert not isinstance(small, np.memmap)
        np.testing.assert_array_equal(read_mapped(file, "chunked"), values)
        with pytest.raises(StoreError, match="lacks nothing"):
            read_mapped(file, "nothing")
    np.testing.assert_array_equal(mapped, values)
    np.testing.assert_array_equal(small, values[:2])
    mapped[3] = 0
    assert path.read_bytes() == before
    write_file(path, {"leaf/0/wide": -values})
    np.testing.assert_array_equal(mapped[4:], values[4:])


def test_rows_are_copied_to_their_places(tmp_path):
    for name in ("one", "other"):
        write_file(tmp_path / name, rows={"rows": ((8, 3), np.float32)})
    values = np.arange(24, dtype=np.float32).reshape(8, 3)
    with RowFile(tmp_path / "one", "rows", write=True) as file:
        file.write(np.arange(8), values)
    copy_rows(
        tmp_path / "one", tmp_path / "other", "rows", np.array([3, 0]), np.array([0, 2]), each=2
    )
    expected = np.zeros((8, 3))
    expected[[0, 1, 4, 5]] = values[[6, 7, 0, 1]]
    np.testing.assert_array_equal(open_rows(tmp_path / "other", "rows"), expected)


def test_a_row_file_that_nobody_uses_is_closed(tmp_path):
    """A matrix that was deleted with its last use must give its space on the disk back."""
    path = tmp_path / "rows.h5"
    write_file(path, rows={"rows": ((3, 2), np.float32)})
    file = RowFile(path, "rows")
    number = file._file
    assert os.path.samestat(os.fstat(number), path.stat())
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    with RowFile(path, "rows") as file:
        number = file._file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
