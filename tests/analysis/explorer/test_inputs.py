from __future__ import annotations

import math

import pytest

from analysis.explorer.inputs import (
    in_text,
    number,
    read_cleaning,
    read_difficulty,
    read_record,
)
from influence.errors import InputError


def test_the_cleaning_list(world):
    listed = read_cleaning(world.root / "clean")
    assert [each.id for each in listed] == ["row-3", "row-3", "row-9", "gone"]
    assert (listed[0].score, listed[2].score) == (0.97, None)
    assert dict(listed[0].others) == {"suggested": "remove"}
    assert dict(listed[1].others) == {"decision": "keep"}
    assert ([each.gain for each in listed], listed[2].evidence[0]) == (
        [0.02, None, None, None],
        "=",
    )
    assert read_cleaning(world.root / "clean" / "rows.csv") == listed


def test_cells_with_line_breaks_quotes_and_long_texts(tmp_path):
    evidence = 'a "quoted",\nbroken\r\nline ' + "x" * 300_000
    quoted = evidence.replace('"', '""')
    (tmp_path / "rows.csv").write_text(
        f'id,reason,score,evidence\n" =1+1",r,1,"{quoted}"\n', encoding="utf-8", newline=""
    )
    (row,) = read_cleaning(tmp_path)
    assert (row.id, row.evidence) == (" =1+1", evidence)


def test_ids_come_back_as_they_were(tmp_path):
    """An apostrophe before an id keeps a spreadsheet from running it; exactly one goes."""
    ids = ["'=1+1", "''quoted", "plain", "'"]
    lines = "".join(f"{id};r;1;e\r\n" for id in ids)
    text = "\ufeffid;reason;score;evidence\r\n" + lines  # as a spreadsheet saves it
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8", newline="")
    assert [each.id for each in read_cleaning(tmp_path)] == ["=1+1", "'quoted", "plain", ""]


def test_the_table_of_difficulty(world):
    found = read_difficulty(world.root / "difficulty.csv")
    assert found["row-0"]["steps"] == 1.5
    assert found["row-2"]["steps"] == math.inf
    assert found["row-1"]["recommended"] == "ascent"


@pytest.mark.parametrize(
    ("name", "content", "reader", "says"),
    [
        ("rows.csv", None, read_cleaning, "does not exist"),
        ("rows.csv", "id,reason\n1,2\n", read_cleaning, "lacks the columns 'score', 'evidence'"),
        ("d.csv", "id,loss\n1,2\n", read_difficulty, "lacks the columns 'steps', 'damage'"),
        ("d.parquet", "", read_difficulty, "expected a .csv"),
        ("d.csv", b"id,steps,damage\n\xff,1,2\n", read_difficulty, "cannot be read"),
    ],
)
def test_other_tables_are_refused(tmp_path, name, content, reader, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=says):
        reader(tmp_path if name == "rows.csv" else path)


def test_records(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(InputError, match=r"does not exist.*analysis lds"):
        read_record(path, ("lds",), "analysis lds --json")
    for content in ("[1]", "nonsense", '{"lds":'):
        path.write_text(content)
        with pytest.raises(InputError, match="no JSON object"):
            read_record(path, ("lds",), "analysis lds --json")
    path.write_text('{"lds": 1}')
    with pytest.raises(InputError, match="lacks low"):
        read_record(path, ("lds", "low"), "analysis lds --json")
    assert read_record(path, ("lds",), "analysis lds --json") == {"lds": 1}


def test_cells_and_numbers():
    assert [number(each) for each in ("", "x", "nan", "inf", "2.5")] == [None] * 4 + [2.5]
    assert number("inf", infinite=True) == math.inf
    assert (in_text("é"), in_text(["é"])) == ("é", '["é"]')
