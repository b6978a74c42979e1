"""Matrices in files: blocks of them, and inverses made tile by tile, against whole ones."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from influence import matrix_file
from influence.errors import NumericalError, StoreError
from influence.matrix_file import LowerFile, LowerInverse, MatrixFile, invert_in_tiles, lay_out
from influence.store import write_file
from tests.watching import HeldBytes

SIZES, CPU = [1, 4, 5, 13], torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 4, and some rows at a time."""
    monkeypatch.setattr(matrix_file, "TILE", 4)
    monkeypatch.setattr(matrix_file, "BAND", 3)
    monkeypatch.setattr(matrix_file, "PANEL_BYTES", 300)


def positive(n: int, seed: int = 0) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(n, n + 2))
    return root @ root.T


def laid_out(folder, name: str, shape, kind=np.float64) -> MatrixFile:
    path = folder / f"{name}.h5"
    write_file(path, rows={"values": (shape, kind)})
    return MatrixFile(path, "values", write=True)


def lower_file(folder, name: str, n: int, kind=np.float64) -> LowerFile:
    path = folder / f"{name}.h5"
    write_file(path, rows={"values": (LowerFile.layout(n), kind)})
    return LowerFile(path, "values", n, write=True)


def test_blocks_are_those_that_were_put(tmp_path):
    file, values = laid_out(tmp_path, "a", (6, 9), np.float32), np.arange(54.0).reshape(6, 9)
    file.write(np.arange(6), values)
    file.write(np.array([4, 1]), -values[[0, 2], :2], 3)
    values[[4, 1], 3:5] = -values[[0, 2], :2]
    for rows, columns in ((slice(0, 6), slice(0, 9)), (slice(1, 5), slice(3, 4))):
        found = file.block(rows, columns)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values[rows, columns])
    joined = np.concatenate([part for _, part in file.panels(1, 5)])
    np.testing.assert_array_equal(joined, values[1:5])
    assert max(len(part) for _, part in laid_out(tmp_path, "b", (20, 25)).panels()) == 1


@pytest.mark.parametrize("n", SIZES)
def test_a_lower_triangle_takes_half_the_file(tmp_path, n):
    """And is read as it was put, block by block."""
    values = np.tril(np.random.default_rng(n).normal(size=(n, n))).astype(np.float32)
    file = lower_file(tmp_path, "lower", n, np.float32)
    assert file.dtype == np.float32
    assert LowerFile.layout(n)[0] <= n * (n + 3) / 2
    for column in range(0, n, 2):  # some columns at a time, and more than is stored
        file.write(np.arange(n)[::-1], values[::-1, column : column + 2], column)
    whole = slice(0, n)
    np.testing.assert_array_equal(np.tril(file.block(whole, whole)), values)
    some = slice(n // 2, n)
    np.testing.assert_array_equal(np.tril(file.block(some, some)), values[some, some])
    rows, joined = 0, np.zeros((n, n), np.float32)
    for place, part in file.panels():
        assert place.start == rows
        joined[place, : place.stop] = part
        rows = place.stop
    assert rows == n
    np.testing.assert_array_equal(joined, values)


def test_a_lower_triangle_of_other_rows_is_refused(tmp_path):
    file = lower_file(tmp_path, "lower", 7)
    assert len(file) == 7
    with pytest.raises(StoreError, match="the lower triangle of 8 rows"):
        LowerFile(tmp_path / "lower.h5", "values", 8)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("in_place", [True, False])
def test_an_inverse_in_tiles_is_the_dense_one(tmp_path, n, in_place):
    values = positive(n)
    source = lower_file(tmp_path, "source", n)
    source.write(np.arange(n), np.tril(values) + np.triu(np.full((n, n), np.nan), 1))  # never read
    target = source if in_place else lower_file(tmp_path, "target", n)
    expected = np.linalg.inv(0.3 * values + 0.7 * np.eye(n))
    found = invert_in_tiles(source, target, factor=0.3, ridge=0.7, refusal="no", device=CPU)
    np.testing.assert_allclose(found, np.diagonal(expected), rtol=1e-10)
    inverse = LowerInverse(target)
    rng, some = np.random.default_rng(1), np.array([n - 1, 0])
    asked = rng.normal(size=(3, n))
    np.testing.assert_allclose(inverse.apply(asked), asked @ expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(inverse.block(some), expected[np.ix_(some, some)], atol=1e-10)
    halves = inverse.halves(asked)
    np.testing.assert_allclose(halves @ halves.T, asked @ expected @ asked.T, atol=1e-9)


def test_a_matrix_that_is_not_positive_or_finite_is_refused(tmp_path):
    for name, wrong in (("a", -100.0), ("b", np.nan)):
        values = positive(9)
        values[7, 7] = wrong
        file = lower_file(tmp_path, name, 9)
        file.write(np.arange(9), values)
        refusal = "this is not positive"
        with pytest.raises(NumericalError, match=refusal):
            invert_in_tiles(file, file, factor=1.0, ridge=1.0, refusal=refusal, device=CPU)


@pytest.mark.slow
def test_no_more_than_some_tiles_are_ever_held(tmp_path, monkeypatch):
    """1 MB of tiles for matrices of 8 MB, as `tracemalloc` counts arrays, and torch's as they live."""
    import tracemalloc

    monkeypatch.setattr(matrix_file, "TILE", 100)
    monkeypatch.setattr(matrix_file, "PANEL_BYTES", 100_000)
    n = 1_000
    file = lower_file(tmp_path, "large", n)
    for start in range(0, n, 100):
        part = np.zeros((100, n))
        part[np.arange(100), np.arange(start, start + 100)] = 1.0
        file.write(np.arange(start, start + 100), part)
    target = lower_file(tmp_path, "inverse", n)
    with HeldBytes(least=1_000) as held:
        invert_in_tiles(file, target, factor=1.0, ridge=1.0, refusal="no", device=CPU)
    tracemalloc.start()
    diagonal = invert_in_tiles(file, file, factor=1.0, ridge=1.0, refusal="no", device=CPU)
    LowerInverse(file).apply(np.ones((2, n)))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(diagonal, 0.5)
    assert 0 < held.most < 1e6
    assert most < 1e6 < n**2 * 8 / 4


def test_no_room_is_said_with_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix_file, "directory_for", lambda *_: None)
    with pytest.raises(StoreError, match=r"0\.80 GB of disk are needed in .* or in"):
        lay_out(tmp_path, {"values": ((10_000, 10_000), np.float64)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_directory_without_room_gives_way_to_that_for_temporary_files(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    free = {tmp_path: 10, elsewhere: 1_000}

    class Usage:
        def __init__(self, place):
            self.free = free[place]

    monkeypatch.setattr("influence.matrix_file.shutil.disk_usage", Usage)
    assert matrix_file.directory_for(tmp_path, 5) == tmp_path
    assert matrix_file.directory_for(tmp_path, 500) == elsewhere
    assert matrix_file.directory_for(tmp_path, 5_000) is None


def test_what_a_killed_process_left_half_made_is_deleted_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine, other = matrix_file._machine(), "0" * 8
    names = [f"{mine}-{ended.pid}", f"{mine}-{os.getpid()}", f"{other}-{ended.pid}", f"{mine}-x"]
    files = [tmp_path / f"{matrix_file.MAKING}{name}-abc.h5" for name in names]
    for file in files:
        file.touch()
    made = lay_out(tmp_path, {"values": ((2, 2), np.float64)}, {})
    assert [file.exists() for file in files] == [False, True, True, True]
    assert made.name.startswith(f"{matrix_file.MAKING}{mine}-{os.getpid()}-")
