from __future__ import annotations

import json
import os

import pytest

from analysis.explorer import edits
from analysis.explorer.data import Explored
from analysis.explorer.sections import present
from analysis.explorer.texts import Texts
from influence.manifest import read_manifest
from tests.analysis.report.helpers import measured, with_evidence
from tests.unlearn.record.conftest import place  # noqa: F401 (a fixture)
from tests.unlearn.record.helpers import digest, edit
from unlearn.record.chain import append

LOSSES = {
    "edited": {"rows": 1, "before": 0.2, "after": 2.5, "target": 2.6},
    "retained": {"rows": 8, "before": 0.5, "after": 0.55, "change": 0.1},
    "heldout": {"rows": 4, "before": 3.0, "after": 3.1},
}
ROW = {"action": "remove", "before": 0.2, "after": 2.5, "target": 2.6, "base": 2.7}
METHOD = {"name": "re-linearised"}


def blocks(place):  # noqa: F811
    """Those of the section but for the answers in words."""
    return [each for each in edits.blocks(place.run) if each not in answers(place)]


def answers(place):  # noqa: F811
    return [each for each in edits.blocks(place.run) if each.get("text", "").startswith("Edit ")]


def states(place):  # noqa: F811
    table = blocks(place)[1]
    at = [each["label"] for each in table["columns"]].index("record")
    return [row[at] for row in table["rows"]]


def save(place, name: str, seed: int, before=None, **record):  # noqa: F811
    """An edit that is saved and appended."""
    kept = {"losses": LOSSES, "method": METHOD} | record
    folder = edit(place, name, seed=seed, before=before, **kept)
    append(place.run, folder)
    return folder


@pytest.fixture
def edited(place):  # noqa: F811
    """Two edits, one after the other, with what was measured of them."""
    by_row = [{"id": "row 1 äé東", "before": 0.9, "after": 0.1, "unseen": 0.15}]
    record = with_evidence(
        {"losses": LOSSES, "method": METHOD, "cost": {"total": 120.0}},
        measured(by_row=by_row),
        measured("membership", "not compared", (0.9, None, None), reason="too few rows"),
    )
    first = edit(place, "one", rows=[ROW | {"id": "row 1 äé東"}], **record)
    append(place.run, first)
    second = edit(place, "two", before=(first, digest(1)), seed=2, losses=LOSSES, method=METHOD)
    append(place.run, second)
    return place


def test_a_run_without_edits_has_nothing_to_show(place):  # noqa: F811
    assert blocks(place) == []


def test_what_each_edit_did(edited):
    said, table, plot, measured_, rows = blocks(edited)
    assert said["tone"] == "good"
    labels = [each["label"] for each in table["columns"]]
    first = dict(zip(labels[:7], table["rows"][0][:7], strict=True))
    assert first["no."] == 1
    assert first["by"] == "re-linearised"
    assert first["their loss before"] == 0.2
    assert states(edited) == ["verified"] * 2
    assert plot["series"][0]["x"] == pytest.approx([2.3, 2.3])
    assert plot["series"][0]["y"] == pytest.approx([10, 10])
    assert measured_["rows"][0][:3] == ["generations", "ROUGE-L recall", 3]
    assert measured_["rows"][1][-1] == "not compared (too few rows)"
    assert rows["rows"] == [["row 1 äé東", "remove", 0.2, 2.5, 2.6, 2.7, 0.9, 0.1, 0.15]]
    json.dumps(blocks(edited), allow_nan=False)


def test_the_newest_edits_are_answered_in_words_first(edited):
    """As the page on one edit does. A record that does not hold is said before them."""
    found = edits.blocks(edited.run)
    assert found[: len(answers(edited))] == answers(edited)
    newest, first = answers(edited)
    assert newest["text"].startswith("Edit 2: remove. ")
    assert "loss 2.50 against 2.60 expected" in first["text"]
    assert "was not measured" in first["text"]
    (edited.root / "two" / "adapter_model.safetensors").write_bytes(b"x")
    assert edits.blocks(edited.run)[0]["tone"] == "bad"
    assert len(answers(edited)) == 2


def test_a_changed_adapter_is_not_verified(edited):
    path = edited.root / "two" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    said, table, *_ = blocks(edited)
    assert said["tone"] == "bad"
    assert states(edited) == ["verified", "NOT verified"]
    assert table["rows"][1][4] == "re-linearised"  # its record is the one that was saved


def test_folders_are_told_apart_whose_names_begin_alike(place):  # noqa: F811
    """A damaged /e/edit10 says nothing of /e/edit1, and line 10 nothing of line 1."""
    folder, seed = save(place, "edit1", 1), 1
    for seed in range(2, 11):
        folder = save(place, f"edit{seed}", seed, before=(folder, digest(seed - 1)))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert folder.name == "edit10"
    assert states(place) == ["verified"] * 9 + ["NOT verified"]


def test_a_replaced_folder_shows_nothing_of_the_edit_that_replaced_it(place):  # noqa: F811
    """Its line says so, without that one's figures, and none of its sentences say that all holds."""
    save(place, "one", 1, rows=[ROW | {"id": "of the first"}])
    save(place, "one", 2, rows=[ROW | {"id": "of the second"}])
    said, table, *more = blocks(place)
    assert (said["tone"], "replaced" in said["text"]) == ("good", True)
    assert states(place) == ["replaced by no. 2", "verified"]
    labels = [each["label"] for each in table["columns"]]
    losses = [row[labels.index("their loss before")] for row in table["rows"]]
    assert losses == [None, 0.2]
    assert [block["title"] for block in more] == ["Edit 2: remove, re-linearised. Its rows"]


def test_nothing_is_verified_where_the_run_says_something_else_of_its_adapter(edited):
    """Every line and folder is as it was; the manifest names another adapter as the newest."""
    path = edited.run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["now"]["adapter"]["path"] += "-elsewhere"
    path.write_text(json.dumps(manifest))
    said, *_ = blocks(edited)
    assert said["tone"] == "bad"
    assert states(edited) == ["its files hold, the record of edits does not hold"] * 2


def test_a_later_edit_is_named_by_its_number(place):  # noqa: F811
    """Where the first line is gone it is not the place of its line; and no state vouches for it."""
    save(place, "first", 1)
    save(place, "one", 2)
    save(place, "one", 3)
    assert states(place) == ["verified", "replaced by no. 3", "verified"]
    lines = (place.run / "audit.jsonl").read_text().splitlines(keepends=True)
    (place.run / "audit.jsonl").write_text("".join(lines[1:]))
    assert all("the record of edits does not hold" in each for each in states(place))


def test_a_folder_that_cannot_be_reached_is_gone(edited, monkeypatch):
    real = os.stat

    def stat(path, **options):
        if str(path) == str(edited.root / "two"):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert states(edited) == ["verified", "its files are gone"]


def test_a_record_that_was_changed_shows_no_figure(edited):
    path = edited.root / "two" / "edit.json"
    path.write_text(path.read_text().replace("2.5", "9.5"))
    said, table, *_ = blocks(edited)
    assert said["tone"] == "bad"
    assert states(edited) == ["verified", "NOT verified"]
    labels = [each["label"] for each in table["columns"]]
    known = {
        label for label, value in zip(labels, table["rows"][1], strict=True) if value is not None
    }
    assert known == {"no.", "time", "what", "rows", "record", "folder"}


def test_no_line_of_a_broken_chain_is_called_verified(edited):
    lines = (edited.run / "audit.jsonl").read_bytes().splitlines(keepends=True)
    (edited.run / "audit.jsonl").write_bytes(lines[0])
    said, table, *_ = blocks(edited)
    assert (said["tone"], len(table["rows"])) == ("bad", 1)
    assert states(edited) == ["its files hold, the record of edits does not hold"]


@pytest.mark.parametrize("left", [b"", b'{"number": 1'])
def test_a_record_that_is_lost_is_said(edited, left):
    """With all its lines, or before the first one was whole: the page has a section on it."""
    (edited.run / "audit.jsonl").write_bytes(left)
    explored = Explored(edited.run, read_manifest(edited.run), Texts.named([]), Texts.named([]))
    assert "edits" in present(explored)
    (said,) = blocks(edited)
    assert said["tone"] == "bad"


def test_edits_that_are_saved_later_are_shown(edited):
    """The run's files are read when they are asked for."""
    one = edited.root / "two"
    for seed in (3, 4):
        one = save(edited, f"later {seed}", seed, before=(one, digest(seed - 1)))
    assert states(edited) == ["verified"] * 4


def test_an_edit_whose_folder_is_gone_still_has_its_line(edited):
    (edited.root / "two").rename(edited.root / "elsewhere")
    assert states(edited) == ["verified", "its files are gone"]


def test_a_damaged_record_is_said(edited):
    (edited.run / "audit.jsonl").write_text("nonsense\n")
    said, *_ = blocks(edited)
    assert said["tone"] == "bad"
    assert "does not hold" in said["text"]


def test_many_rows_are_cut_and_said_so(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr(edits, "ROWS", 1)
    rows = [ROW | {"id": "row 1 äé東"}, ROW | {"id": "b"}]
    append(place.run, edit(place, "one", rows=rows, losses=LOSSES, method=METHOD))
    found = blocks(place)[-1]
    assert found["title"].endswith("(the first 1 of 2)")
    assert len(found["rows"]) == 1
