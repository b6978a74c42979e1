"""Reading of files that may be damaged, and the JSON that hashes are taken of."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch

from influence.errors import StoreError
from unlearn.record import plain


def test_a_path_into_nested_objects():
    record = {"a": {"b": {"c": 3}}, "x": [1]}
    assert plain.value_at(record, "a.b.c") == 3
    for nowhere in ("a.b.d", "a.x.c", "x.y", "x.0", "a.b.c.d"):
        assert plain.value_at(record, nowhere) is None
    assert plain.value_at(None, "a") is None


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        (True, int, "a.b is True, expected a whole number"),
        (3, str, "a.b is 3, expected text"),
        ({}, list, "a.b is {}, expected a list"),
        (None, dict, "a.b is None, expected an object"),
    ],
)
def test_a_value_of_another_type_is_named(value, kind, sentence):
    with pytest.raises(StoreError) as caught:
        plain.typed_value_at({"a": {"b": value}}, "a.b", kind)
    assert str(caught.value) == sentence
    assert plain.typed_value_at({"a": {"b": kind()}}, "a.b", kind) == kind()


def test_canonical_json_is_one_text_for_an_object():
    one, other = {"b": [1, 2.5], "a": "é"}, {"a": "é", "b": [1, 2.5]}
    assert plain.canonical(one) == plain.canonical(other) == b'{"a":"\\u00e9","b":[1,2.5]}'


def test_what_json_cannot_hold_becomes_what_it_can():
    value = {
        "nan": float("nan"),
        "inf": [float("inf"), np.float64("-inf")],
        "array": np.array([1, 2]),
        "tensor": torch.tensor([[0.5]]),
        "pair": ("\ud800", True),
    }
    written = plain.json_value(value)
    assert written == {
        "nan": None,
        "inf": [None, None],
        "array": [1, 2],
        "tensor": [[0.5]],
        "pair": ["\\ud800", True],
    }
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_only_plain_files_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    assert plain.read_plain(path) == b"content"
    assert plain.sha256_of_file(path) == hashlib.sha256(b"content").hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        for read in (plain.read_plain, plain.sha256_of_file, plain.refuse_unless_plain):
            with pytest.raises(StoreError, match="it is no plain file"):
                read(other)
    with pytest.raises(FileNotFoundError):
        plain.read_plain(tmp_path / "nothing")


def test_an_object_and_nothing_else():
    assert plain.parse_object(b'{"a": 1}') == {"a": 1}
    for data in (b"[1]", b"null", b"{", b"\xff"):
        with pytest.raises(ValueError):
            plain.parse_object(data)


def test_reasons_and_values_are_short():
    assert plain.reason_of(FileNotFoundError(2, "No such file", "/x")) == "it is missing"
    assert plain.reason_of(RecursionError()) == "it is nested too deeply"
    assert plain.reason_of(PermissionError(13, "Permission denied")) == "Permission denied"
    assert plain.reason_of(KeyError()) == "KeyError"
    assert len(plain.reason_of(ValueError("x" * 1000))) == 400
    assert len(plain.shortened("x" * 1000)) <= 100
    assert plain.clipped("x" * 9, 8) == "xxxxx..."
