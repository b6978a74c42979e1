"""Tables in CSV and Parquet: whole, quoted where they must be, and never over another file."""

from __future__ import annotations

import pandas as pd
import pytest

from influence.errors import InputError
from influence.tables import checked_table, write_table

TABLE = pd.DataFrame({"id": ["a", "b,c"], "score": [0.5, -1.25]})


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".CSV"])
def test_a_table_is_read_back_as_it_was(tmp_path, suffix):
    path = write_table(TABLE, tmp_path / f"t{suffix}")
    read = pd.read_parquet if suffix == ".parquet" else pd.read_csv
    pd.testing.assert_frame_equal(read(path), TABLE)
    assert [file.name for file in tmp_path.iterdir()] == [f"t{suffix}"]


def test_an_id_with_a_carriage_return_does_not_end_its_line(tmp_path):
    table = pd.DataFrame({"id": ["a\rb"], "score": [1.0]})
    text = write_table(table, tmp_path / "t.csv").read_bytes()
    assert text == b'"id","score"\n"a\rb",1.0\n'


def test_another_file_is_replaced_only_when_asked(tmp_path):
    path = write_table(TABLE, tmp_path / "t.csv")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"t\.csv exists: name another file, or give --overwrite"):
        write_table(TABLE[:1], path)
    assert path.read_bytes() == before
    assert len(pd.read_csv(write_table(TABLE[:1], path, overwrite=True))) == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("t.xlsx", "expected a name that ends in .csv or .parquet"),
        ("missing/t.csv", "there is no folder .*missing; make it, or name another"),
        ("folder.csv", "folder.csv is a folder; name a file"),
    ],
)
def test_places_that_cannot_hold_a_table(tmp_path, name, sentence):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=sentence):
        checked_table(tmp_path / name, overwrite=True)
