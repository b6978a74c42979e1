"""HDF5 files that survive a kill at any moment.

Two ways of writing, both plain HDF5 to every reader:

* *Whole files* (factors, checkpoints) are written beside their final name and renamed, so a name
  always holds a complete file.
* *Row files* (gradients, scores) are laid out once, contiguously and at full size, closed, and
  renamed into place; rows are then written at the dataset's offset. HDF5's own metadata never
  changes again, so a process killed half-way leaves a valid file whose `/done` tells which rows
  count. Their space is reserved when they are laid out, so a disk cannot run full half-way.

Every file carries the digest of the run it belongs to; a foreign, damaged or truncated file is
refused by name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np

from influence.errors import MismatchError, StoreError

#: Arrays of at least so many bytes are mapped by `read_mapped`.
MAPPED_BYTES = 1 << 20


def write_file(
    path: Path,
    arrays: Mapping[str, np.ndarray] | None = None,
    *,
    attrs: Mapping[str, Any] | None = None,
    rows: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
    strings: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write a whole HDF5 file and move it into place atomically.

    `arrays` are stored as they are, `strings` as UTF-8, `rows` (`name: (shape, dtype)`) are laid
    out contiguously at full size for `open_rows`, reading as zeros until written.
    """
    partial = path.with_name(path.name + ".partial")
    needed = sum(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        for shape, dtype in (rows or {}).values()
    )
    needed += sum(array.nbytes for array in (arrays or {}).values())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise StoreError(
            f"{path} needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on its disk: "
            "free some space, choose another directory, or use --store features or none"
        )
    try:
        with h5py.File(partial, "w", libver=("earliest", "v110")) as file:
            for name, array in (arrays or {}).items():
                file.create_dataset(name, data=array)
            for name, values in (strings or {}).items():
                file.create_dataset(
                    name, data=list(values), dtype=h5py.string_dtype("utf-8"), shape=(len(values),)
                )
            for name, (shape, dtype) in (rows or {}).items():
                _create_contiguous(file, name, shape, dtype)
            file.attrs.update(dict(attrs or {}))
        with open(partial, "rb+") as handle:
            if rows and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, partial.stat().st_size)
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # ValueError: a text that HDF5 cannot hold
        partial.unlink(missing_ok=True)
        raise StoreError(f"{path} could not be written: {error}") from error


def _create_contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Lay a dataset out at full size, in one piece, without writing to it."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_obj_track_times(False)  # equal runs give equal files
    # the file is extended sparsely, which reads as zeros
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    h5py.h5d.create(
        file.id,
        name.encode(),
        h5py.h5t.py_create(np.dtype(dtype)),
        h5py.h5s.create_simple(shape),
        plist,
    )


def read(file: h5py.File | h5py.Group, name: str) -> np.ndarray:
    """A whole dataset of an open file as an array."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise StoreError(
            f"{file.file.filename} lacks {name}: it is damaged or was not written by this toolkit"
        )
    return dataset[()]


def read_mapped(file: h5py.File | h5py.Group, name: str) -> np.ndarray:
    """The same, but a large dataset is mapped: the operating system reads it when it is used, and
    may drop it again.

    What is written to the array stays in this process.
    """
    dataset = file.get(name)
    if isinstance(dataset, h5py.Dataset) and dataset.nbytes >= MAPPED_BYTES:
        offset = dataset.id.get_offset()
        if offset is not None:
            place, kind, shape = file.file.filename, dataset.dtype, dataset.shape
            return np.memmap(place, dtype=kind, mode="c", offset=offset, shape=shape)
    return read(file, name)


def read_group(file: h5py.File, name: str) -> dict[str, np.ndarray]:
    """Every dataset under a group, by its name in the group. Empty without such a group."""
    group = file.get(name)
    arrays: dict[str, np.ndarray] = {}

    def visit(key: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[key] = item[()]

    if isinstance(group, h5py.Group):
        group.visititems(visit)
    return arrays


def read_strings(file: h5py.File, name: str) -> list[str]:
    """A dataset of UTF-8 strings."""
    return [value.decode("utf-8") for value in read(file, name)]


class RowFile:
    """The rows `[n, ...]` of a dataset, read and written by offset.

    The dataset was laid out by `write_file(rows=...)`.

    For the large ones: rows that were read or written do not stay in this process's memory, as
    mapped ones would. The file is closed with the block, or with the last use of this: a deleted
    one that is still open would keep its space on the disk.
    """

    def __init__(self, path: Path, name: str, *, write: bool = False) -> None:
        self.shape, self.dtype, self._offset = _place(path, name)
        self._file = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._file)
        self._width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, indices: np.ndarray, rows: np.ndarray, column: int = 0) -> None:
        """Write `rows` [b, ...] at the positions `indices` [b], of a matrix from a column on."""
        for index, row in zip(
            indices.tolist(), np.ascontiguousarray(rows, dtype=self.dtype), strict=True
        ):
            data = memoryview(np.atleast_1d(row).data).cast("B")
            place = self._place_of(index, column)
            while len(data):  # one call writes at most 2 GB
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, ...]`, copied."""
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._fill(out, self._place_of(start))
        return out

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows `[b, ...]` in any order, copied."""
        return np.concatenate([self.read(index, index + 1) for index in indices.tolist()])

    def block(self, rows: slice, columns: slice) -> np.ndarray:
        """A block `[b, c]` of a dataset `[n, m]`, copied."""
        if (columns.start, columns.stop) == (0, self.shape[1]):
            return self.read(rows.start, rows.stop)
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for place, row in enumerate(range(rows.start, rows.stop)):
            self._fill(out[place], self._place_of(row, columns.start))
        return out

    def _place_of(self, row: int, column: int = 0) -> int:
        """Where a number lies in the file, in bytes."""
        return self._offset + row * self._width + column * self.dtype.itemsize

    def _fill(self, out: np.ndarray, place: int) -> None:
        """Read what lies from a place on, until an array is full."""
        data = memoryview(out.data).cast("B")
        while len(data):
            count = os.preadv(self._file, [data[: 1 << 30]], place)
            if count == 0:
                raise StoreError(
                    "a row file ends before its last row: it is truncated; fit the run again"
                )
            data, place = data[count:], place + count

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file)


def copy_rows(
    source: Path, target: Path, name: str, rows: np.ndarray, places: np.ndarray, each: int = 1
) -> None:
    """Copy `rows` [k] of a dataset to the `places` [k] of the same one of another file.

    `each` neighbours in the file make one row. What was copied is on the disk on return.
    """
    with RowFile(source, name) as read_from, RowFile(target, name, write=True) as written:
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            block = read_from.read(row * each, (row + 1) * each)
            written.write(np.arange(place * each, (place + 1) * each), block)
        written.flush()


@dataclass
class RowFiles:
    """The open row files of a pass.

    None where nothing is written.
    """

    gradients: RowFile | None = None
    done: RowFile | None = None
    sampled: RowFile | None = None

    def flush(self) -> None:
        """Wait until the rows are on disk.

        `done` last, which vouches for them.
        """
        for file in (self.gradients, self.sampled, self.done):
            if file is not None:
                file.flush()


def open_rows(path: Path, name: str, *, write: bool = False) -> np.ndarray:
    """Map a dataset laid out by `write_file(rows=...)` into memory, shape and type as stored."""
    shape, dtype, offset = _place(path, name)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r+" if write else "r", offset=offset, shape=shape)


def _place(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and byte offset of a contiguous dataset."""
    with open_file(path) as file:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise StoreError(
                f"{path} lacks {name}: it is damaged or was not written by this toolkit"
            )
        shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
    if offset is None and 0 not in shape:
        raise StoreError(
            f"{path}: {name} is not stored contiguously, so it was not written by this toolkit"
        )
    return shape, dtype, offset or 0


@contextmanager
def open_file(path: Path, *, run_digest: str | None = None) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, and insist that it belongs to a run if one is given."""
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except OSError as error:
        raise StoreError(
            f"{path} is damaged, truncated, or not an HDF5 file ({error}); move it away and run "
            "the command again"
        ) from error
    with file:
        if run_digest is not None:
            digest = file.attrs.get("run_digest")
            if digest != run_digest:
                raise MismatchError(
                    f"{path} belongs to another run (digest {str(digest)[:12]}, this run has "
                    f"{run_digest[:12]}): give the file of this run, or move the foreign one away "
                    "and run the command again"
                )
        yield file


@contextmanager
def only_writer(place: Path) -> Iterator[None]:
    """Hold the lock of a directory or file while writing to it.

    A second process is refused, not queued.

    The lock is the operating system's, on an empty file in its temporary folder: it ends with the
    process that holds it, also where that is killed.
    """
    key = hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:24]
    lock = Path(tempfile.gettempdir()) / f"lora-influence-{os.getuid()}-{key}.lock"
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(
                f"another process is writing to {place}: wait for it, or give another place"
            ) from None
        yield


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. A damaged file is a `StoreError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as `write_text` does, readable by people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, as it is, its folder too where it is missing; what was there stays until
    the text is whole on the disk.

    Raises `OSError` where the file cannot be written, and leaves nothing half written.
    """
    partial, data = path.with_name(path.name + ".partial"), text.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
