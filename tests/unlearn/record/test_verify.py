"""Verification: what is said of sound, moved and missing edits; nothing hostile stops it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from influence.errors import InputError, StoreError
from tests.unlearn.record.helpers import (
    BEFORE,
    HOSTILE,
    edit,
    forge,
    problems,
    replaced,
    snapshot,
)
from unlearn.record import folder as checks
from unlearn.record.chain import append, entries
from unlearn.record.verify import render, verify


def test_a_sound_history_passes_and_is_told(three):
    before = snapshot(three.root)
    result = verify(three.run, apply=True)
    assert result.passed
    assert result.notes == []
    text = render(result)
    assert (
        "3 lines, each unchanged and following the one before; head "
        + entries(three.run)[-1]["hash"]
        in text
    )
    assert (
        text.count("files have the sha256 that was recorded, its record is the one of the chain")
        == 3
    )
    assert text.count("bit for bit, in 4 matrices") == 3
    assert text.endswith("\nverified")
    assert snapshot(three.root) == before


def test_no_edits_yet(place):
    result = verify(place.run)
    assert result.passed
    assert result.checked == []
    assert "no edits yet" in result.notes[0]
    assert entries(place.run) == []


# ---- places --------------------------------------------------------------------------------------


def test_a_directory_that_is_gone_or_was_moved(three):
    moved = three.root / "elsewhere"
    three.edits[1].rename(moved)
    text = problems(three.run)
    assert f"line 2: its adapter was saved at {three.edits[1]}" in text
    assert "--adapter DIR checks one that was moved" in text
    for options in ({"adapter": moved}, {"run_directory": three.run, "adapter": moved}):
        result = verify(**options, apply=True)
        assert result.passed, result.problems
        assert result.notes == [f"line 2 was saved at {three.edits[1]} and is checked at {moved}"]
        assert "bit for bit" in result.checked[-1]


def test_an_adapter_without_its_run(three):
    record = (three.edits[0] / "edit.json").read_bytes()
    three.run.rename(three.root / "run elsewhere")
    result = verify(adapter=three.edits[0])
    assert result.passed
    assert "nothing vouches for it itself: give --run RUN" in result.notes[0]
    (three.edits[0] / "edit.json").write_bytes(record.replace(b'"remove"', b'"relabel"'))
    assert verify(adapter=three.edits[0]).passed  # which is what the note says
    text = problems(three.root / "run elsewhere", adapter=three.edits[0])
    assert f"{three.edits[0] / 'edit.json'}: its sha256 is" in text


def test_an_adapter_of_no_line(three):
    stranger = edit(three, "stranger", seed=5)
    assert f"no line of {three.chain} records {stranger / 'edit.json'}" in problems(
        adapter=stranger
    )
    (stranger / "edit.json").unlink()
    assert f"{stranger / 'edit.json'}: it is missing" in problems(adapter=stranger)
    (three.edits[0] / "edit.json").unlink()  # its place still tells the line
    assert f"{three.edits[0] / 'edit.json'}: it is missing" in problems(
        three.run, adapter=three.edits[0]
    )


def test_the_record_names_a_run_that_is_another_now(place):
    folder = edit(place, "first", seed=1)
    append(place.run, folder)
    shutil.copytree(folder, place.root / "copy")
    path = place.run / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"complete": False}))
    assert (
        f"{folder / 'edit.json'} names the run {place.run}: the fit in {place.run} is unfinished"
        in problems(adapter=folder)
    )
    identity = {"adapter": BEFORE, "seed": 1}
    number = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"identity": identity, "digest": number}))
    assert f"line 1: it is of run {place.digest}" in problems(adapter=folder)
    with pytest.raises(StoreError, match="was the run fitted anew"):
        entries(place.run)


def test_a_directory_that_a_later_edit_replaced(place):
    append(place.run, edit(place, "same", seed=1))
    append(place.run, edit(place, "same", seed=2))
    result = verify(place.run, apply=True)
    assert result.passed
    assert result.notes == [
        f"line 1: the edit of line 2 replaced its directory {place.root / 'same'}"
    ]
    assert (result.replaced, result.damaged) == ({1: 2}, set())


def test_the_lines_are_told_whose_directories_do_not_hold(three):
    """By their places, whatever their directories are called."""
    folders = [Path(entry["edit"]) for entry in entries(three.run)]
    (folders[0] / checks.WEIGHTS).write_bytes(b"x")
    shutil.rmtree(folders[2])
    assert verify(three.run).damaged == {1, 3}


def test_wrong_calls(place):
    for options in (
        {},
        {"run_directory": place.root / "nothing"},
        {"run_directory": place.adapter},
    ):
        with pytest.raises(InputError):
            verify(**options)
    with pytest.raises(InputError, match="there is no adapter directory"):
        verify(place.run, adapter=place.root / "nothing")
    with pytest.raises(InputError, match="is not a run directory"):
        entries(place.root)
    with pytest.raises(InputError, match="is not a run directory"):
        append(place.root, edit(place, "first"))


# ---- hostile files -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["chain", "manifest", "record", "config", "weights", "delta"])
def test_hostile_content_is_a_problem_that_names_the_file(place, what):
    folder = edit(place, "first")
    append(place.run, folder)
    names = {
        "record": "edit.json",
        "config": checks.CONFIG,
        "weights": checks.WEIGHTS,
        "delta": checks.DELTA,
    }
    path = {"chain": place.chain, "manifest": place.run / "manifest.json"}.get(
        what
    ) or folder / names[what]
    good = path.read_bytes()
    for content in HOSTILE.values():
        path.write_bytes(content + b"\n")
        for options in ({"run_directory": place.run}, {"adapter": folder}):
            if what == "manifest":
                try:
                    assert str(path) in problems(**options)
                except InputError as error:  # JSON, but of no finished run
                    assert str(path) in str(error)  # noqa: PT017
                continue
            result = verify(**options, apply=True)
            assert any(str(path) in text for text in result.problems)
            text = render(result)
            assert text.encode().decode() == text
            assert all(c.isprintable() or c == "\n" for c in text)
    path.write_bytes(good)
    for how in ("directory", "loop", "pipe", "device", "nothing"):
        replaced(path, how)
        for options in (
            {"run_directory": place.run},
            {"run_directory": place.run, "adapter": folder},
        ):
            result = verify(**options, apply=True)
            assert any(str(path) in text for text in result.problems), (how, result.problems)
        shutil.rmtree(path) if how == "directory" else path.unlink()
    path.write_bytes(good)
    assert verify(place.run, apply=True).passed


def test_hostile_records_that_the_chain_vouches_for(place):
    """Whatever stands in a record whose line is right: a finding, never an exception."""
    folder = edit(place, "first")
    entry = append(place.run, folder)
    for content in HOSTILE.values():
        (folder / "edit.json").write_bytes(content)
        forge(place, entry, record=hashlib.sha256(content).hexdigest())
        assert str(folder / "edit.json") in problems(place.run, apply=True)


@pytest.mark.parametrize(
    "where", ["/no/such\x00place", "/" + "x" * 5000, "/\ud800", "relative", "", "/dev/zero"]
)
def test_hostile_places(place, where):
    entry = append(place.run, edit(place, "first"))
    forge(place, entry, edit=where, ids=["\x1b[2J\u202e\ud800\nverified"])
    result = verify(place.run, apply=True)
    assert not result.passed
    assert "line 1" in result.problems[0]
    text = render(result)
    text.encode()
    assert "\x1b" not in text
    assert "\nverified" not in text


def test_nesting_at_the_edge_of_what_can_be_read(place):
    """A value that can just be parsed may be too deep to be shown."""
    folder = edit(place, "first")
    append(place.run, folder)
    for depth in range(600, 1000):
        content = b'{"format":' + b"[" * depth + b"]" * depth + b"}"
        place.chain.write_bytes(content + b"\n")
        (folder / "edit.json").write_bytes(content)
        assert f"{place.chain} line 1" in problems(place.run)
        assert str(folder / "edit.json") in problems(adapter=folder)
        with pytest.raises(StoreError, match=r"audit\.jsonl line 1"):
            append(place.run, folder)


def test_what_may_not_be_read_is_named(place, monkeypatch):
    folder = edit(place, "first")
    append(place.run, folder)
    real = Path.stat
    for path in (
        place.chain,
        place.run / "manifest.json",
        folder / "edit.json",
        folder / checks.WEIGHTS,
    ):

        def refused(self, *, path=path, **options):
            if self == path:
                raise PermissionError(13, "Permission denied")
            return real(self, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", refused)
            text = problems(place.run)
        assert str(path) in text
        assert "Permission denied" in text
