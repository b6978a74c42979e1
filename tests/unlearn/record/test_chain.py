"""The chain of edits: every change of a line is found and named, every kill is survived."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from influence.errors import MismatchError, StoreError
from tests.unlearn.record.helpers import (
    BEFORE,
    digest,
    edit,
    flips,
    forge,
    lines,
    problems,
    refuses_to_append,
)
from unlearn.record import chain, plain
from unlearn.record.chain import append, entries
from unlearn.record.verify import verify


def test_the_chain_is_what_its_description_says(three):
    """Computed again here from the description, sharing no code."""
    previous = "0" * 64
    for number, (raw, folder) in enumerate(zip(lines(three), three.edits, strict=True), 1):
        entry = json.loads(raw)
        assert (
            raw
            == json.dumps(entry, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
            + b"\n"
        )
        stated = entry.pop("hash")
        plain = json.dumps(entry, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        assert stated == hashlib.sha256(plain.encode()).hexdigest()
        record = (folder / "edit.json").read_bytes()
        assert entry.pop("time").endswith("Z")
        assert entry == {
            "number": number,
            "kind": "remove",
            "ids": [f"row {number} äé東"],
            "edit": str(folder),
            "record": hashlib.sha256(record).hexdigest(),
            "adapter_before": digest(2) if number == 3 else BEFORE,
            "adapter_after": digest(number),
            "run": three.digest,
            "previous": previous,
        }
        previous = stated
        files = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.iterdir()
            if p.name != "edit.json"
        }
        assert json.loads(record)["files"] == files
        assert list(files) != []
    manifest = json.loads((three.run / "manifest.json").read_text())
    assert manifest["audit"] == {"entries": 3, "head": previous}
    assert manifest["other"] == "kept"
    assert entries(three.run) == [json.loads(raw) for raw in lines(three)]


# ---- every change is found and named -------------------------------------------------------------


@pytest.mark.slow
def test_every_byte_of_a_line_counts(place):
    append(place.run, edit(place, "first", seed=1))
    append(place.run, edit(place, "second", seed=2))
    cut = len(lines(place)[0])
    for at in flips(place.chain):
        result = verify(place.run)
        assert any(f"{place.chain} line {1 + (at >= cut)}" in text for text in result.problems), at
    assert verify(place.run).passed


def test_every_byte_of_what_the_manifest_says_of_the_chain_counts(three):
    path = three.run / "manifest.json"
    text = path.read_text()
    start = text.index('"audit"')
    shown = (start + text[start:].index("entries"), start + text[start:].index("head"))
    for at in flips(
        path,
        [
            *range(shown[0], text.index("\n", shown[0])),
            *range(shown[1], text.index("\n", shown[1])),
        ],
    ):
        if json.loads(text) != _read(path):  # blanks between the tokens say nothing
            assert "manifest.json" in problems(three.run), at
    start = text.index(three.digest)
    for _ in flips(path, range(start, start + 64)):
        assert f"{path} is damaged" in problems(three.run)
    assert verify(three.run).passed


def _read(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


@pytest.mark.parametrize(
    "order", [[0, 1], [1, 2], [0, 2], [1, 0, 2], [2, 1, 0], [0, 0, 1, 2], [0, 1, 2, 2], [0], []]
)
def test_removed_reordered_and_repeated_lines(three, order):
    given = lines(three)
    three.chain.write_bytes(b"".join(given[i] for i in order))
    assert str(three.chain) in problems(three.run)
    with pytest.raises(StoreError, match=r"audit\.jsonl"):
        entries(three.run)
    assert refuses_to_append(three)


def test_a_missing_chain_is_a_problem(three):
    three.chain.unlink()
    assert "has 0 lines, and" in problems(three.run)


def places(start, stop, ends, stride):
    """Every so many of the sizes from `start` to `stop`, and all near to where a line ends."""
    return [
        size
        for size in range(start, stop)
        if (size - start) % stride == 0 or min(abs(size - end) for end in ends) < 4
    ]


#: Every byte is a slow test.
STRIDES = [7, pytest.param(1, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stride", STRIDES)
def test_a_cut_tail_is_found_at_every_byte(three, stride):
    data, cut = three.chain.read_bytes(), len(lines(three)[0])
    ends = [cut, cut + len(lines(three)[1]), len(data)]
    for size in places(cut, len(data), ends, stride):
        three.chain.write_bytes(data[:size])
        assert str(three.chain) in problems(three.run)
    three.chain.write_bytes(data[:-1])
    assert "line 3 has no end" in problems(three.run)
    assert refuses_to_append(three)


def test_bytes_after_the_last_line(three):
    data = three.chain.read_bytes()
    for more in (b"\n", b"{}\n", b" \n", b"\n\n"):
        three.chain.write_bytes(data + more)
        assert f"{three.chain} line 4" in problems(three.run)
        assert "a damaged line names was not checked" in verify(three.run).notes[0]
        assert refuses_to_append(three)


def test_a_line_that_was_forged_consistently(three):
    """A hash that was computed again after the change: what comes next does not follow."""
    for place in range(3):
        given = lines(three)
        entry = json.loads(given[place]) | {"ids": ["someone else"]}
        entry["hash"] = hashlib.sha256(
            plain.canonical({k: v for k, v in entry.items() if k != "hash"})
        ).hexdigest()
        three.chain.write_bytes(
            b"".join([*given[:place], plain.canonical(entry) + b"\n", *given[place + 1 :]])
        )
        text = problems(three.run)
        assert (f"line {place + 2}: it follows" if place < 2 else "line 3: its hash is") in text
        assert f"{three.edits[place] / 'edit.json'}: ids is" in text
        three.chain.write_bytes(b"".join(given))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"number": 2}, "its number is 2, expected 1"),
        ({"number": 0}, "its number is none of a line"),
        (
            {"number": 10**4300 - 1},
            "its number is none of a line",
        ),  # one more has too many digits to be printed
        ({"number": True}, "number is True, expected a whole number"),
        ({"previous": "1" * 64}, "it follows a line with hash 1111"),
        ({"adapter_before": "1" * 64}, "it starts from adapter 1111"),
        ({"run": "1" * 64}, "it is of run 1111"),
        ({"ids": [["a"]]}, "ids holds something else than text"),
        ({"note": "more"}, "it has an unknown key 'note'"),
        ({"edit": "out"}, "edit is 'out', expected an absolute path"),
    ],
)
def test_every_rule_of_a_line(place, changes, reason):
    """Each rule by itself: the hashes and the manifest were computed again after the change."""
    entry = append(place.run, edit(place, "first"))
    forge(place, entry)
    assert verify(place.run).passed
    forge(place, entry, **changes)
    assert f"{place.chain} line 1: {reason}" in problems(place.run)
    assert refuses_to_append(place)


# ---- appending -----------------------------------------------------------------------------------


def test_an_edit_starts_from_the_run_or_from_an_earlier_edit(three):
    folder = edit(three, "fourth", before=(three.edits[0], digest(77)), seed=4)
    with pytest.raises(StoreError, match=r"fourth.*neither the run's nor made by an earlier line"):
        append(three.run, folder)
    given = lines(
        three
    )  # a chain in which the third line comes second is wrong also where its hashes are not
    three.chain.write_bytes(given[0] + given[2])
    assert "neither the run's nor made by an earlier line" in problems(three.run)


def test_append_refuses_an_edit_that_is_not_as_sealed(place):
    folder = edit(place, "first", seed=1)
    (folder / "README.md").write_text("changed")
    with pytest.raises(StoreError, match=r"nothing was appended.*README.md: its sha256 is"):
        append(place.run, folder)
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match=r"edit.json cannot be recorded: it is missing"):
        append(place.run, folder)
    folder = edit(place, "foreign", run={"path": None, "digest": "f" * 64})
    with pytest.raises(MismatchError, match="is an edit of the run ffffffffffff"):
        append(place.run, folder)
    for record in ({"requests": [3]}, {"kind": None}, {"format": 2}, {"adapter": []}):
        with pytest.raises(StoreError, match=r"edit.json cannot be recorded: \w"):
            append(place.run, edit(place, "wrong", **record))
    assert not place.chain.exists()
    assert "audit" not in json.loads((place.run / "manifest.json").read_text())


# ---- kills and company ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", STRIDES)
def test_a_kill_at_every_byte_of_an_append(place, stride):
    append(place.run, edit(place, "first", seed=1))
    second, third = edit(place, "second", seed=2), edit(place, "third", seed=3)
    before, manifest = place.chain.read_bytes(), (place.run / "manifest.json").read_bytes()
    append(place.run, second)
    whole = place.chain.read_bytes()
    ends = [len(before), len(whole)]
    for size in places(len(before) + 1, len(whole), ends, stride):
        place.chain.write_bytes(whole[:size])
        (place.run / "manifest.json").write_bytes(manifest)
        assert problems(place.run).startswith(f"{place.chain} line 2 is unfinished")
        assert len(entries(place.run)) == 1
        if (size - len(before) - 1) % 49 == 0 or size == len(whole) - 1:
            append(place.run, third)
            assert [entry["edit"] for entry in entries(place.run)] == [
                str(place.root / "first"),
                str(third),
            ]
            assert verify(place.run).passed


def test_an_unfinished_first_line(place):
    place.chain.write_bytes(b'{"adapter_aft' + b"x" * 5000)  # more than the next line writes over
    assert f"{place.chain} line 1 is unfinished" in problems(place.run)
    append(place.run, edit(place, "first"))
    assert verify(place.run).passed


def test_a_kill_between_the_line_and_the_manifest(place, monkeypatch):
    """A real one: the process ends by SIGKILL, twice, and its lock with it.

    Nothing is counted twice or lost.
    """
    first, second, third = (
        edit(place, name, seed=seed) for seed, name in enumerate(("first", "second", "third"), 1)
    )
    append(place.run, first)

    def killed(folder: Path) -> None:
        chain._settle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        append(place.run, folder)

    def run(folder: Path) -> int | None:
        child = multiprocessing.get_context("fork").Process(target=killed, args=(folder,))
        child.start()
        child.join()
        return child.exitcode

    assert run(second) == -signal.SIGKILL
    result = verify(place.run)
    assert result.passed
    assert "line 2 is complete, and" in result.notes[0]
    assert run(third) == -signal.SIGKILL  # before its line: the manifest is settled first
    assert len(lines(place)) == 2
    assert append(place.run, second)["number"] == 2  # the same again adds nothing
    assert len(lines(place)) == 2
    assert verify(place.run).notes == []
    append(place.run, third)
    assert [entry["number"] for entry in entries(place.run)] == [1, 2, 3]
    assert verify(place.run).notes == []


def test_a_pending_line_is_settled_by_the_next_append(place, monkeypatch):
    folders = [edit(place, f"edit {seed}", seed=seed) for seed in range(1, 4)]
    real = chain._settle

    def fail(*_):
        raise KeyboardInterrupt

    for folder in folders:
        monkeypatch.setattr(chain, "_settle", fail)
        with pytest.raises(KeyboardInterrupt):
            append(place.run, folder)
        monkeypatch.setattr(chain, "_settle", real)
        append(place.run, folder)
    assert len(entries(place.run)) == 3
    given = lines(place)
    chain._settle(place.run, 1, json.loads(given[0])["hash"], json.loads(given[0]))
    assert "has 3 lines, and" in problems(place.run)  # two more than counted come from no kill
    chain._settle(place.run, 2, json.loads(given[0])["hash"], json.loads(given[0]))
    assert str(place.run / "manifest.json") in problems(place.run)


def test_a_full_disk_is_told_and_leaves_the_history_whole(place, monkeypatch):
    append(place.run, edit(place, "first", seed=1))
    folder = edit(place, "second", seed=2)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            StoreError, match=r"audit.jsonl could not be written: No space left on device"
        ):
            append(place.run, folder)
    assert verify(place.run).passed
    append(place.run, folder)
    assert len(entries(place.run)) == 2
    assert verify(place.run).notes == []


def test_two_processes_append_at_once(place):
    folders = [edit(place, f"edit {seed}", seed=seed) for seed in range(1, 13)]

    def work(mine: list[Path]) -> None:
        for folder in mine:
            append(place.run, folder)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work, args=(folders[start::2],)) for start in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert sorted(entry["edit"] for entry in entries(place.run)) == sorted(map(str, folders))
    assert verify(place.run).passed


def test_a_lock_that_stays_taken_is_an_error(place, monkeypatch):
    monkeypatch.setattr(chain, "PAUSE", 0.001)
    folder = edit(place, "first")
    with (
        chain.only_writer(place.chain),
        pytest.raises(StoreError, match="another process is writing to"),
    ):
        append(place.run, folder)
