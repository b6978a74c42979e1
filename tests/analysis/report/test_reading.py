"""Which records are refused, and in which words."""

from __future__ import annotations

import copy
import re

import pytest

from analysis.report.reading import read_record
from influence.errors import InputError, StoreError
from tests.analysis.report.helpers import (
    made,
    paths,
    save,
)


def test_a_missing_key_is_named(tmp_path):
    whole = made()
    strict = [
        path
        for path in paths(whole)
        if path and isinstance(path[-1], str) and path[0] not in ("versions", "files")
    ]
    free = {"step", "radius", "forget", "retained", "curvature", "points", "until"}
    for path in strict:
        if path[-1] in free and path[0] in ("method", "steps"):
            continue
        record = copy.deepcopy(whole)
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        with pytest.raises(StoreError, match=re.escape(str(path[-1])) + " is missing"):
            read_record(save(tmp_path, record))


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        ("{", StoreError, "cannot be read"),
        ("[" * 100_000, StoreError, "nested too deeply"),
        ("[]", StoreError, "holds no JSON object"),
        ("\udcff", StoreError, "cannot be read"),
        ("{}", StoreError, "the key format is missing"),
        ('{"format": 2}', InputError, "has format 2; this version reads format 1"),
        ('{"format": "1"}', InputError, "has format 1; this version reads format 1"),
        ('{"format": true}', InputError, "has format True"),
        ('{"format": 1}', StoreError, "the key kind is missing"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, content, kind, sentence):
    (tmp_path / "edit.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(kind, match=re.escape(sentence)):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(requests=[], rows=[]), "requests is empty"),
        (lambda r: r.update(kind="erase"), "kind is 'erase'"),
        (lambda r: r["requests"][0].update(action="burn"), "requests[0].action is 'burn'"),
        (lambda r: r["rows"][1].update(action="burn"), "rows[1].action is 'burn'"),
        (
            lambda r: r["rows"][1].update(action="relabel"),
            "rows[1] is of the row 'b4', which requests does not name so",
        ),
        (lambda r: r["rows"][1].update(id="else"), "rows[1] is of the row 'else'"),
        (
            lambda r: r["rows"][1].update(id="a17"),
            "rows[1] is of the row 'a17', which rows named before",
        ),
        (
            lambda r: r["rows"][2].update(old_after="x"),
            "rows[2].old_after is a text; expected a number or null",
        ),
        (lambda r: r["guard"].update(passed=1), "guard.passed is a number; expected true or false"),
        (lambda r: r.update(rows={}), "rows is an object; expected a list"),
        (lambda r: r.update(losses=None), "losses is null; expected an object"),
        (lambda r: r["requests"][1].update(id=4), "requests[1].id is a number; expected a text"),
    ],
)
def test_a_record_that_contradicts_itself(tmp_path, change, sentence):
    record = made()
    change(record)
    with pytest.raises(StoreError, match=re.escape(sentence)):
        read_record(save(tmp_path, record))
