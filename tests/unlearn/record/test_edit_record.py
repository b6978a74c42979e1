"""The record as a value: read back as written, refused by name, and extended in one place."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest

from analysis.report.reading import read_edit_record
from influence.errors import StoreError
from tests.unlearn.record.helpers import edit, problems
from unlearn.record import edit_record
from unlearn.record.chain import append
from unlearn.record.declared import LATER, nothing
from unlearn.record.edit_record import (
    AgreementRecord,
    EditRecord,
    Guard,
    MethodRecord,
    RowRecord,
    facts_of,
)
from unlearn.record.folder import seal
from unlearn.record.verify import verify

CLASSES = [
    kind
    for _, kind in inspect.getmembers(edit_record, inspect.isclass)
    if dataclasses.is_dataclass(kind)
]


def whole() -> dict:
    """A record in which no value is null that may be another one, as JSON."""
    losses = {"rows": 2, "before": 0.2, "after": 4.6}
    steps = {"step": 1, "length": 0.1, "radius": 0.2, "predicted": 0.9, "measured": 0.8}
    steps |= {"accepted": True, "forget": 1.5, "learn": 0.7, "retained": 0.2, "damage": 0.01}
    row = {"id": "a", "action": "remove", "before": 0.2, "after": 4.6, "target": 4.7, "base": 4.9}
    row |= {"share": 0.5, "low": 4.1, "high": 5.3}
    row |= {"extraction_before": 0.9, "extraction_after": 0.1, "rank": 0.4}
    changed = row | {"id": "b", "action": "relabel", "old_before": 0.3, "old_after": 4.0}
    values = {"before": 0.9, "after": 0.3, "unseen": 0.28}
    measured = {"name": "generations", "unit": "ROUGE-L recall", "rows": 2, "heldout": 400}
    measured |= values | {"difference": 0.02, "low": -0.1, "high": 0.15, "margin": 0.1}
    measured |= {"verdict": "not settled", "reason": "none", "by_row": [{"id": "a"} | values]}
    request = {"id": "a", "action": "remove", "content_before": "8" * 16, "content_after": None}
    return {
        "format": 1,
        "kind": "mixed",
        "created": "2026-11-21T12:00:00Z",
        "versions": {"torch": "2.13.0"},
        "run": {"path": "/run", "digest": "1" * 64},
        "base": {"path": "/base", "digest": "2" * 64},
        "adapter": {
            "before": {"path": "/adapter", "digest": "3" * 64},
            "after": {"digest": "4" * 64},
        },
        "data": {"before": "5" * 64, "after": "6" * 64, "rows_before": 12, "rows_after": 11},
        "tokenizer": {"digest": "7" * 64},
        "requests": [
            request,
            request | {"id": "b", "action": "relabel", "content_after": "9" * 16},
        ],
        "lineage": {"edits": 2, "removed": ["a"], "changed": ["b"]},
        "method": {"name": "one-shot", "until": "expected", "seed": 0, "lambda": [0.1, 0.2]},
        "residual": {
            "solver": 3e-7,
            "tolerance": 1e-5,
            "objective": {"before": 0.012, "after": 0.0031, "rows": 32},
        },
        "stopped": "one step",
        "reached": True,
        "steps": [steps],
        "delta": {"norm": 1.3, "relative": 0.083},
        "losses": {
            "edited": losses | {"target": 4.7, "predicted": 3.9},
            "retained": losses | {"change": 0.03, "standard_error": 0.006, "predicted": 0.19},
            "heldout": losses | {"predicted": 4.9, "source": "/holdout.jsonl"},
        },
        "rows": [row, changed | {"old_target": 4.8}],
        "comparable": {"source": "held-out rows", "rows": 400},
        "guard": {"max_damage": 0.1, "damage": 0.03, "since_the_fit": 0.05, "passed": True}
        | {"forced": False},
        "expected": {"loss": 4.7, "low": 4.3, "high": 5.1, "faithfulness": 0.98}
        | {"share": 1.0, "trainings": 3}
        | {"near": 16, "others": 20, "recipe": {"lr": 1e-3, "epochs": 4}, "row_gradients": 450},
        "evidence": {"models": 2, "level": 0.9, "resamples": 2000, "seed": 0}
        | {"probes": "/probes.jsonl", "measurements": [measured]},
        "shipped": {"dtype": "bfloat16", "edited_before": 0.2, "edited_after": 4.5}
        | {"retained_before": 0.2, "retained_after": 0.3, "kept": 0.97},
        "cost": {"row_gradients": 800, "row_forwards": 1200, "total": 1200.0, "seconds": 94.2}
        | {"retraining": 60000, "ratio": 0.02},
        "agreement": {"adapter": "/x", "edited": 4.6, "retained": 0.2, "heldout": 4.8}
        | {"kl": {"edited": 0.1}},
        "files": {"adapter_model.safetensors": "9" * 64},
    }


def paths(value, at=()):
    """Every place in a record."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(part, (*at, key))


def changed(record: dict, path: tuple, value) -> dict:
    """The record with another value at a place."""
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return record


def without(record: dict, path: tuple) -> dict:
    """The record without a key."""
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return record


# ---- written and read ----------------------------------------------------------------------------


def test_a_record_is_written_as_it_was_read_keys_and_order():
    record = whole()
    read = EditRecord.from_json(record)
    assert json.dumps(read.as_json()) == json.dumps(record)
    assert EditRecord.from_json(read.as_json()) == read
    assert EditRecord.salvaged(record) == read


def test_values_are_where_the_file_has_them():
    record = EditRecord.from_json(whole())
    assert record.losses.retained.before == 0.2
    assert record.adapter.after.digest == "4" * 64
    assert record.guard.since_the_fit == 0.05
    assert [row.old_before for row in record.rows] == [None, 0.3]
    assert record.method.settings["seed"] == 0
    assert record.lineage.removed == ("a",)
    assert (record.expected.loss, record.expected.recipe["epochs"]) == (4.7, 4)
    assert [(row.low, row.high) for row in record.rows] == [(4.1, 5.3)] * 2


def test_every_field_is_in_the_whole_record():
    """So that the tests here are of all fields."""
    keys = {path[-1] for path in paths(whole()) if path}
    fields = {part.name for kind in CLASSES for part in dataclasses.fields(kind)}
    assert fields - keys == {"settings"}


def test_every_field_says_what_it_means():
    """A comment `#:` stands above each: it is the documentation of the file."""
    source = inspect.getsource(edit_record)
    lines = source.splitlines()
    bare = [
        f"{node.name}.{part.target.id}"
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.AnnAssign)
        if not lines[part.lineno - 2].strip().startswith("#: ")
    ]
    assert bare == []


def test_an_object_that_is_null_reads_as_nothing_and_is_written_as_null():
    for path in ("run", "guard", "cost", "delta", "residual", "data", "lineage"):
        record = changed(whole(), (path,), None)
        read = EditRecord.from_json(record)
        assert getattr(read, path) is nothing(type(getattr(read, path)))
        assert read.as_json() == record
    read = EditRecord.from_json(changed(whole(), ("losses", "retained"), None))
    assert read.losses.retained.before is None


@pytest.mark.parametrize("part", ["expected", "evidence", "shipped"])
def test_what_was_not_needed_or_could_not_be_is_null(part):
    """As in a record of a version before it."""
    for record in (changed(whole(), (part,), None), without(whole(), (part,))):
        read = EditRecord.from_json(record)
        assert getattr(read, part) is None
        assert read.as_json() == changed(whole(), (part,), None)


def test_a_removed_row_has_no_keys_of_old_content():
    row = RowRecord(**{**whole()["rows"][0], "old_before": None})
    assert "old_before" not in row.as_json()
    forecast = dataclasses.replace(row, action="correct", after=None)
    assert forecast.as_json()["old_before"] is None
    assert list(forecast.as_json())[-3:] == ["old_before", "old_after", "old_target"]


def test_force_is_the_only_thing_that_saving_changes():
    record = EditRecord.from_json(whole())
    forced = record.saved(forced=True).as_json()
    assert forced == changed(whole(), ("guard", "forced"), True)


def test_files_have_no_key_before_the_seal():
    record = dataclasses.replace(EditRecord.from_json(whole()), files=None)
    assert "files" not in record.as_json()


# ---- refused, by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("kind",), 3, "kind is a number; expected a text"),
        (("kind",), None, "kind is null; expected a text"),
        (("losses",), None, "losses is null; expected an object"),
        (
            ("losses", "retained", "before"),
            "x",
            "losses.retained.before is a text; expected a number",
        ),
        (("guard", "passed"), 1, "guard.passed is a number; expected true or false"),
        (("rows",), {}, "rows is an object; expected a list"),
        (("rows", 1, "base"), True, "rows[1].base is true or false; expected a number or null"),
        (("rows", 1, "old_after"), [], "rows[1].old_after is a list; expected a number or null"),
        (("cost", "total"), 1e301, "cost.total is a number; expected a number or null"),
        (("requests", 0), None, "requests[0] is null; expected an object"),
        (("files",), [], "files is a list; expected an object"),
        (("format",), 2, "format is 2, this version reads 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_is_and_what_was_expected(path, value, sentence):
    with pytest.raises(StoreError) as caught:
        EditRecord.from_json(changed(whole(), path, value))
    assert sentence in str(caught.value)


def test_null_nan_and_infinity_are_taken_where_numbers_are():
    for value in (None, math.nan, -math.inf):
        read = EditRecord.from_json(changed(whole(), ("losses", "edited", "after"), value))
        assert read.losses.edited.after is value


#: Keys that no record had at first, and those that only some rows have.
MAY_LACK = {
    ("lineage",),
    ("reached",),
    ("guard", "since_the_fit"),
    ("residual", "objective", "rows"),
    ("losses", "retained", "predicted"),
    ("losses", "heldout", "predicted"),
    *(("steps", 0, key) for key in ("step", "radius", "forget", "learn", "retained", "damage")),
    *((part,) for part in ("expected", "evidence", "shipped")),
    *((part, key) for part in ("expected", "evidence", "shipped") for key in whole()[part]),
    *(path for path in paths(whole()) if path[:2] == ("evidence", "measurements") and path[3:]),
    *(("rows", row, key) for row in (0, 1) for key in ("share", "low", "high")),
    *(("rows", 1, key) for key in ("old_before", "old_after", "old_target")),
}


@pytest.mark.parametrize("path", sorted(MAY_LACK, key=str), ids=str)
def test_keys_that_were_added_later_may_lack(path):
    """Records from before them still read."""
    EditRecord.from_json(without(whole(), path))
    if path[-1] not in ("old_before", "old_after"):  # which the page has always checked
        EditRecord.from_json(changed(whole(), path, "of another type"))


def test_every_other_key_that_is_missing_is_named():
    free = {"versions", "files", "lineage", "format"}
    for path in paths(whole()):
        if not path or path in MAY_LACK or isinstance(path[-1], int):
            continue
        if path[-2:-1] in (("kl",), ("recipe",)):
            continue
        if path[0] in free and path not in (("versions",), ("files",)):
            continue
        if path[0] == "method" and path[1:] not in ((), ("name",)):
            continue  # the settings are each method's own
        with pytest.raises(StoreError, match=rf"the key .*{path[-1]} is missing"):
            EditRecord.from_json(without(whole(), path))


def test_whatever_stands_in_a_record_is_salvaged_without_an_error():
    for record in (None, [], 3, {}, {"run": 3, "rows": [1], "method": [], "requests": {}}):
        read = EditRecord.salvaged(record)
        assert (read.run.path, read.adapter.after.digest, read.rows) == (None, None, ())
    for path in paths(whole()):
        for value in (None, True, 10**400, "text", [], [1], {}, {"a": [None]}):
            if path:
                EditRecord.salvaged(changed(whole(), path, value))


def test_what_a_line_of_the_chain_repeats():
    assert facts_of(whole()) == {
        "kind": "mixed",
        "ids": ["a", "b"],
        "adapter_before": "3" * 64,
        "adapter_after": "4" * 64,
        "run": "1" * 64,
    }
    for path, sentence in (
        (("run", "digest"), "run.digest is 3, expected text"),
        (("requests",), "requests is 3, expected a list"),
        (("format",), "format is 3, this version reads 1"),
    ):
        with pytest.raises(StoreError) as caught:
            facts_of(changed(whole(), path, 3))
        assert str(caught.value) == sentence


def test_a_comparison_and_a_method_from_what_others_made():
    comparison = AgreementRecord.of({"adapter": "/x", "edited": 4.6, "kl": {"edited": 0.1}})
    assert (comparison.edited, comparison.heldout) == (4.6, None)
    assert MethodRecord.of({"name": "npo", "lr": 1e-4}).name == "npo"


# ---- one place -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WiderGuard(Guard):
    """The guard with one key more."""

    worst_row: float | None = dataclasses.field(metadata=LATER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WiderRecord(EditRecord):
    """The record with that guard."""

    guard: WiderGuard


def test_a_new_key_is_a_declaration_and_a_value(place):
    """It is then written, read, checked and verified; a record from before it still reads."""
    old = EditRecord.from_json(whole())
    guard = WiderGuard(**vars(old.guard), worst_row=0.7)
    written = WiderRecord(**{**vars(old), "guard": guard}).as_json()
    assert written["guard"]["worst_row"] == 0.7
    assert WiderRecord.from_json(written).guard.worst_row == 0.7
    assert WiderRecord.from_json(whole()).guard.worst_row is None
    folder = edit(place, "wider")
    stored = json.loads((folder / "edit.json").read_text())
    seal(folder, written | {key: stored[key] for key in ("run", "adapter")})
    append(place.run, folder)
    assert verify(place.run, apply=True).passed
    assert json.loads((folder / "edit.json").read_text())["guard"]["worst_row"] == 0.7
    assert read_edit_record(folder).guard.damage == 0.03
    path = folder / "edit.json"
    path.write_text(path.read_text().replace('"worst_row": 0.7', '"worst_row": 0.6'))
    assert f"{path}: its sha256 is" in problems(place.run)


def test_the_format_is_said_once():
    root = Path(edit_record.__file__).parents[2]
    files = [*(root / "unlearn").rglob("*.py"), *(root / "analysis" / "report").rglob("*.py")]
    assigned = [
        path.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "FORMAT" and isinstance(node.ctx, ast.Store)
        if path.parent.name in ("record", "report")
    ]
    assert assigned == ["edit_record.py"]
