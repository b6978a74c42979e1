"""The record of edits: every change is found and named, every kill is survived, nothing hostile stops a verification."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from influence.adapter import weight_key
from influence.errors import InputError, MismatchError, StoreError
from influence.manifest import AuditRecord
from tests.conftest import build_model, examples, fit_end
from unlearn.record import chain, plain
from unlearn.record import folder as checks
from unlearn.record.chain import append, entries
from unlearn.record.folder import seal
from unlearn.record.verify import render, verify

KEYS = [
    f"base_model.model.layers.{layer}.q_proj.lora_{side}.weight"
    for layer in range(2)
    for side in "AB"
]
BEFORE = "b" * 64


def digest(number: int) -> str:
    """Stands for an adapter's digest: the record's word, which only a loaded model could check."""
    return f"{number:064x}"


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(3, 2, generator=generator) for key in KEYS}


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = checks.WEIGHTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "rank_pattern": {}}
    (folder / checks.CONFIG).write_text(json.dumps(config))


def edit(
    place: SimpleNamespace,
    name: str,
    *,
    before: tuple[Path, str] | None = None,
    seed: int = 1,
    **record,
) -> Path:
    """A sealed edit directory that no model was needed for."""
    old, old_digest = before or (place.adapter, BEFORE)
    folder = place.root / name
    delta = {key: 0.01 * value for key, value in weights(100 + seed).items()}
    save(
        folder, {key: value + delta[key] for key, value in load_file(old / checks.WEIGHTS).items()}
    )
    save_file(delta, folder / checks.DELTA)
    (folder / "README.md").write_text("an edited adapter")
    full = {
        "format": 1,
        "kind": "remove",
        "run": {"path": str(place.run), "digest": place.digest},
        "adapter": {
            "before": {"path": str(old), "digest": old_digest},
            "after": {"digest": digest(seed)},
        },
        "requests": [
            {
                "id": f"row {seed} äé東",
                "action": "remove",
                "content_before": "0" * 16,
                "content_after": None,
            }
        ],
        "losses": {"edited": {"before": 0.25, "after": float("nan"), "target": float("inf")}},
    }
    seal(folder, full | record)
    return folder


@pytest.fixture
def place(tmp_path) -> SimpleNamespace:
    """An adapter and a run whose manifest holds what the record of edits reads."""
    identity = {"adapter": BEFORE, "base": "c" * 64, "points": [{"scale": 0.4}]}
    number = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    run = tmp_path / "run"
    run.mkdir()
    nowhere = {"path": None, "digest": "d" * 64}
    sizes = {"rows": 1, "tokens": 2, "supervised_tokens": 1}
    manifest = {
        "format": 2,
        "digest": number,
        "complete": True,
        "identity": identity,
        "base": nowhere,
        "adapter": nowhere | {"parameters": 24},
        "data": nowhere | sizes,
        "tokenizer": {"digest": "e" * 64},
        "objective": {"reduction": "token", "max_length": None, "N_tok": 1},
        "curvature": {"name": "identity"},
        "damping": "mean:0.1",
        "points": [{"label": "0.4", "share": 1.0, "scale": 0.4, "digest": None}],
        "geometry": "raw",
        "optimizer": None,
        "store": "auto",
        "disk_budget": 1.0,
        "seed": 0,
        "token_budget": 1,
        "dtype": "float32",
        "versions": {},
        "created": "2026-11-21T00:00:00Z",
        "other": "kept",
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    save(tmp_path / "adapter", weights(0))
    return SimpleNamespace(
        root=tmp_path,
        run=run,
        adapter=tmp_path / "adapter",
        digest=number,
        chain=run / "audit.jsonl",
    )


@pytest.fixture
def three(place) -> SimpleNamespace:
    """Three edits; the third starts from what the second made."""
    first, second = edit(place, "first", seed=1), edit(place, "second", seed=2)
    for folder in (first, second):
        append(place.run, folder)
    third = edit(place, "third", before=(second, digest(2)), seed=3)
    append(place.run, third)
    place.edits = [first, second, third]
    return place


def problems(*arguments, **options) -> str:
    found = verify(*arguments, **options)
    assert found.passed == (not found.problems)
    return "\n".join(found.problems)


def lines(place) -> list[bytes]:
    return place.chain.read_bytes().splitlines(keepends=True)


def refuses_to_append(place) -> bool:
    """Whether nothing goes into the chain as it is."""
    before = place.chain.read_bytes()
    folder = edit(place, "one more", seed=9)
    with pytest.raises(StoreError):
        append(place.run, folder)
    return place.chain.read_bytes() == before


def forge(place, entry: dict, **changes) -> None:
    """A chain of one line that says something else, with every hash and the manifest computed again to fit."""
    forged = {key: value for key, value in (entry | changes).items() if key != "hash"}
    forged["hash"] = hashlib.sha256(plain.canonical(forged)).hexdigest()
    place.chain.write_bytes(plain.canonical(forged) + b"\n")
    chain._settle(place.run, 1, forged["hash"], forged)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- the format ----------------------------------------------------------------------------------------------


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


def test_a_sound_history_passes_and_is_told(three):
    before = snapshot(three.root)
    found = verify(three.run, apply=True)
    assert found.passed
    assert found.notes == []
    text = render(found)
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
    found = verify(place.run)
    assert found.passed
    assert found.checked == []
    assert "no edits yet" in found.notes[0]
    assert entries(place.run) == []


def test_seal_writes_json_that_everything_reads(place):
    folder = place.root / "sealed"
    save(folder, weights(1))
    (folder / "edit.json.partial").write_text("left by a kill")
    values = {
        "n": np.float32("nan"),
        "list": (np.int64(3), torch.tensor([1.0, float("-inf")])),
        "id": "\ud800 é",
    }
    sealed = seal(folder, values)
    text = (folder / "edit.json").read_text(encoding="utf-8")
    assert sealed == json.loads(text, parse_constant=lambda _: pytest.fail("not JSON"))
    assert {key: sealed[key] for key in values} == {
        "n": None,
        "list": [3, [1.0, None]],
        "id": "\\ud800 é",
    }
    assert list(sealed["files"]) == [checks.CONFIG, checks.WEIGHTS]
    assert not (folder / "edit.json.partial").exists()


def test_seal_refuses_what_it_cannot_vouch_for(place):
    for make in (
        Path.mkdir,
        lambda path: path.symlink_to(place.adapter / checks.WEIGHTS),
        os.mkfifo,
    ):
        folder = place.root / f"odd {make}".replace("/", " ")
        save(folder, weights(1))
        make(folder / "odd")
        with pytest.raises(InputError, match=r"odd is no plain file"):
            seal(folder, {})


# ---- every change is found and named -------------------------------------------------------------------------


def flips(path: Path, positions=None):
    """Each byte of a file changed in turn; the file is whole again afterwards."""
    data = path.read_bytes()
    for at in range(len(data)) if positions is None else positions:
        for flip in (1, 0x20, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at:][1:])
            yield at
    path.write_bytes(data)


def test_every_byte_of_a_line_counts(place):
    append(place.run, edit(place, "first", seed=1))
    append(place.run, edit(place, "second", seed=2))
    cut = len(lines(place)[0])
    for at in flips(place.chain):
        found = verify(place.run)
        assert any(f"{place.chain} line {1 + (at >= cut)}" in text for text in found.problems), at
    assert verify(place.run).passed


def test_every_byte_of_a_record_counts(place):
    folder = edit(place, "first", seed=1)
    append(place.run, folder)
    for _ in flips(folder / "edit.json"):
        text = problems(place.run)
        assert text.startswith(f"{folder / 'edit.json'}: its sha256 is")
        assert "line 1 recorded" in text
    assert verify(place.run).passed


def test_every_file_of_an_edit_counts(place):
    folder = edit(place, "first", seed=1)
    append(place.run, folder)
    files = [path for path in folder.iterdir() if path.name != "edit.json"]
    assert len(files) == 4
    for path in files:
        size = path.stat().st_size
        for _ in flips(path, {0, 1, 7, 8, 9, size // 2, size - 2, size - 1}):
            assert f"{path}: its sha256 is" in problems(place.run)
            assert f"{path}: its sha256 is" in problems(adapter=folder)
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert f"{path}: its sha256 is" in problems(place.run)
        path.unlink()
        assert f"{path}: it is missing" in problems(place.run)
        path.write_bytes(data)
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


def test_a_cut_tail_is_found_at_every_byte(three):
    data, cut = three.chain.read_bytes(), len(lines(three)[0])
    for size in range(cut, len(data)):
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
    """A line whose hash was computed again after the change: the next line, or the manifest, does not follow."""
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


def test_the_record_must_say_what_the_line_says(place):
    """A line and a record that agree by sha256 but not in what they say can only be forged; it is found."""
    folder = edit(place, "first", seed=1)
    entry = append(place.run, folder)
    for key, value in {
        "kind": "relabel",
        "ids": [],
        "adapter_after": "x",
        "adapter_before": BEFORE[:-1],
    }.items():
        forge(place, entry, **{key: value})
        assert f"{folder / 'edit.json'}: {key} is" in problems(place.run)


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


def test_files_beside_the_recorded_ones(place):
    folder = edit(place, "first", seed=1)
    append(place.run, folder)
    for name in (
        "adapter_model.bin",
        "training_args.bin",
        "x.pkl",
        "tokenizer.json",
        "modeling.py",
        "ADAPTER_x.json",
    ):
        (folder / name).write_bytes(b"")
        assert f"{folder / name} is not in the record, and loaders" in problems(place.run)
        (folder / name).unlink()
    (folder / "notes.txt").write_text("mine")
    found = verify(place.run)
    assert found.passed
    assert found.notes == [
        f"{folder / 'notes.txt'} is not in the record; no loader of the adapter reads it"
    ]


# ---- sequences and places ------------------------------------------------------------------------------------


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


def test_a_directory_that_is_gone_or_was_moved(three):
    moved = three.root / "elsewhere"
    three.edits[1].rename(moved)
    text = problems(three.run)
    assert f"line 2: its adapter was saved at {three.edits[1]}" in text
    assert "--adapter DIR checks one that was moved" in text
    for options in ({"adapter": moved}, {"run_directory": three.run, "adapter": moved}):
        found = verify(**options, apply=True)
        assert found.passed, found.problems
        assert found.notes == [f"line 2 was saved at {three.edits[1]} and is checked at {moved}"]
        assert "bit for bit" in found.checked[-1]


def test_an_adapter_without_its_run(three):
    record = (three.edits[0] / "edit.json").read_bytes()
    three.run.rename(three.root / "run elsewhere")
    found = verify(adapter=three.edits[0])
    assert found.passed
    assert "nothing vouches for it itself: give --run RUN" in found.notes[0]
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
    found = verify(place.run, apply=True)
    assert found.passed
    assert found.notes == [
        f"line 1: the edit of line 2 replaced its directory {place.root / 'same'}"
    ]


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


# ---- kills and company ---------------------------------------------------------------------------------------


def test_a_kill_at_every_byte_of_an_append(place):
    append(place.run, edit(place, "first", seed=1))
    second, third = edit(place, "second", seed=2), edit(place, "third", seed=3)
    before, manifest = place.chain.read_bytes(), (place.run / "manifest.json").read_bytes()
    append(place.run, second)
    whole = place.chain.read_bytes()
    for size in range(len(before) + 1, len(whole)):
        place.chain.write_bytes(whole[:size])
        (place.run / "manifest.json").write_bytes(manifest)
        assert problems(place.run).startswith(f"{place.chain} line 2 is unfinished")
        assert len(entries(place.run)) == 1
        if size % 50 == 0 or size == len(whole) - 1:
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
    """A real one: the process ends by SIGKILL, twice; the lock ends with it, nothing is counted twice or lost."""
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
    found = verify(place.run)
    assert found.passed
    assert "line 2 is complete, and" in found.notes[0]
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


# ---- old + delta = new ---------------------------------------------------------------------------------------


def reseal(folder: Path) -> None:
    seal(folder, json.loads((folder / "edit.json").read_text()))


@pytest.mark.parametrize("file", [checks.DELTA, checks.WEIGHTS])
def test_apply_finds_one_changed_bit(place, file):
    """Also where everything was sealed again after the change, so that every sha256 fits."""
    folder = edit(place, "first")
    shutil.move(place.run, place.root / "gone")
    assert verify(adapter=folder, apply=True).passed
    tensors = load_file(folder / file)
    tensors[KEYS[2]][1, 1] *= 1.5
    save_file(tensors, folder / file)
    reseal(folder)
    assert verify(adapter=folder).passed
    text = problems(adapter=folder, apply=True)
    assert f"{folder / checks.WEIGHTS}: {KEYS[2]}: 1 of 6 entries are not old + delta" in text
    assert text.count("\n") == 0


def test_apply_tells_minus_zero_from_zero(place):
    """By the rule of IEEE addition -0 + 0 is 0, so a new adapter with -0 there was not made by this delta."""
    old = weights(0)
    old[KEYS[0]][0, 0] = -0.0
    save(place.adapter, old)
    folder = edit(place, "first")
    delta, new = load_file(folder / checks.DELTA), load_file(folder / checks.WEIGHTS)
    delta[KEYS[0]][0, 0], new[KEYS[0]][0, 0] = 0.0, 0.0
    save_file(delta, folder / checks.DELTA)
    save_file(new, folder / checks.WEIGHTS)
    reseal(folder)
    found = checks.Verification()
    checks._check_delta(found, folder, record, "it")
    assert found.passed
    new[KEYS[0]][0, 0] = -0.0
    save_file(new, folder / checks.WEIGHTS)
    checks._check_delta(found, folder, str(place.adapter), "it")
    assert "1 of 6 entries" in found.problems[0]


def test_apply_adds_in_the_type_of_the_delta(place):
    """An old adapter kept in bfloat16 is loaded as float32, moved there and saved there."""
    half = {key: value.bfloat16() for key, value in weights(0).items()}
    save(place.adapter, half)
    folder = edit(place, "first")  # bfloat16 + float32 is float32
    assert load_file(folder / checks.WEIGHTS)[KEYS[0]].dtype == torch.float32
    append(place.run, folder)
    assert verify(place.run, apply=True).passed
    rounded = {key: value.bfloat16() for key, value in load_file(folder / checks.WEIGHTS).items()}
    save_file(rounded, folder / checks.WEIGHTS)
    assert "its type is torch.bfloat16 and the delta's torch.float32" in problems(
        place.run, apply=True
    )


def test_apply_finds_missing_matrices_other_shapes_and_other_scalings(place):
    folder = edit(place, "first")
    append(place.run, folder)
    tensors = load_file(folder / checks.DELTA)
    del tensors[KEYS[0]]
    tensors[KEYS[1]] = torch.zeros(2, 2)
    tensors[KEYS[2]] = torch.zeros(3, 2, dtype=torch.int64)
    save_file(tensors, folder / checks.DELTA)
    config = json.loads((folder / checks.CONFIG).read_text()) | {"lora_alpha": 8}
    (folder / checks.CONFIG).write_text(json.dumps(config))
    text = problems(place.run, apply=True)
    assert f"{folder / checks.DELTA} lacks {KEYS[0]}" in text
    assert f"{KEYS[1]}: its shapes are (3, 2) before, (2, 2) of the delta, (3, 2) after" in text
    assert f"{KEYS[2]}: its type is torch.float32 and the delta's torch.int64" in text
    assert f"{folder / checks.CONFIG}: lora_alpha is 8, before the edit it was 4" in text


def test_apply_without_the_old_adapter(place):
    folder = edit(place, "first")
    append(place.run, folder)
    (place.adapter / checks.WEIGHTS).rename(place.adapter / "adapter_model.bin")
    assert "the adapter before the edit" in problems(place.run, apply=True)
    assert "pickled weights (.bin) are never loaded" in problems(place.run, apply=True)
    shutil.rmtree(place.adapter)
    assert verify(place.run).passed
    text = problems(place.run, apply=True)
    assert f"line 1: the adapter before the edit, '{place.adapter}', cannot be read" in text
    nowhere = edit(
        SimpleNamespace(**vars(place) | {"adapter": folder}),
        "second",
        adapter={"before": {"path": None, "digest": BEFORE}, "after": {"digest": digest(2)}},
    )
    append(place.run, nowhere)
    assert (
        "line 2: the adapter before the edit, None, cannot be read: its place was not recorded"
        in problems(place.run, apply=True)
    )


def test_a_hub_id_is_fetched_by_the_adapter_module(place, monkeypatch):
    folder = edit(
        place,
        "first",
        adapter={"before": {"path": "o/a", "digest": BEFORE}, "after": {"digest": digest(1)}},
    )
    append(place.run, folder)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: {"o/a": place.adapter}[name]
    )
    assert verify(place.run, apply=True).passed


def test_an_edit_of_a_real_adapter(tmp_path):
    """The digests of a real run and PEFT's own files, in the order of the library: move, save, seal, append, verify."""
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"], dtype=torch.float32)
    model.model.save_pretrained(tmp_path / "adapter")
    run = fit_end(model, examples(4), directory=tmp_path / "run")
    old, out = model.snapshot(), tmp_path / "out"
    delta = 0.01 * torch.randn(len(old), generator=torch.Generator().manual_seed(0))
    with model.moved(delta):
        model.model.save_pretrained(out)
        after = model.adapter_digest
    leaves = zip(model.space.leaves, model.space.split(delta), strict=True)
    save_file(
        {weight_key(leaf): matrix.contiguous() for leaf, matrix in leaves}, out / checks.DELTA
    )
    adapter = {
        "before": {"path": str(tmp_path / "adapter"), "digest": model.adapter_digest},
        "after": {"digest": after},
    }
    record = {
        "format": 1,
        "kind": "remove",
        "run": {"path": str(run.directory), "digest": run.digest},
    }
    seal(out, record | {"adapter": adapter, "requests": [{"id": "r0-1"}]})
    append(run.directory, out)
    found = verify(run.directory, apply=True)
    assert found.passed, found.problems
    assert "bit for bit, in 4 matrices" in found.checked[-1]
    assert verify(run.directory, adapter=out).passed
    again = fit_end(
        model, examples(4), directory=tmp_path / "run"
    )  # a finished fit keeps the record
    assert again.manifest.audit == AuditRecord(1, entries(run.directory)[0]["hash"])


# ---- hostile files -------------------------------------------------------------------------------------------

HOSTILE = {
    "empty": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "UTF-16": '{"number": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep but complete": b'{"format":1,"number":' + b"[" * 900 + b"]" * 900 + b"}",
    "huge number": b'{"number":' + b"9" * 5000 + b"}",
    "long number": b'{"format":1,"number":' + b"9" * 4300 + b"}",
    "infinite": b'{"number":1e999,"format":NaN}',
    "list": b"[1,2]",
    "null": b"null",
    "surrogate": b'{"kind":"\\ud800","format":1}',
    "control": b'{"\\u001b[2J":"\\u202e","format":1}',
    "nul path": b'{"format":1,"run":{"path":"a\\u0000b","digest":"x"},"files":{"a\\u0000b":3}}',
    "wrong types": b'{"format":1,"kind":[],"requests":{"id":1},"adapter":3,"run":[],"files":[1]}',
}


def replaced(path: Path, how: str) -> None:
    """Something in place of a file that is no file."""
    path.unlink(missing_ok=True)
    if how == "directory":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.parent / "nowhere")


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
            found = verify(**options, apply=True)
            assert any(str(path) in text for text in found.problems)
            text = render(found)
            assert text.encode().decode() == text
            assert all(c.isprintable() or c == "\n" for c in text)
    path.write_bytes(good)
    for how in ("directory", "loop", "pipe", "device", "nothing"):
        replaced(path, how)
        for options in (
            {"run_directory": place.run},
            {"run_directory": place.run, "adapter": folder},
        ):
            found = verify(**options, apply=True)
            assert any(str(path) in text for text in found.problems), (how, found.problems)
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
    found = verify(place.run, apply=True)
    assert not found.passed
    assert "line 1" in found.problems[0]
    text = render(found)
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


def test_a_record_names_no_file_outside_its_directory(place):
    folder = edit(place, "first")
    record = json.loads((folder / "edit.json").read_text())
    outside = hashlib.sha256((place.adapter / checks.CONFIG).read_bytes()).hexdigest()
    for name in (
        "../adapter/adapter_config.json",
        str(place.adapter / checks.CONFIG),
        "..",
        "",
        "edit.json",
    ):
        text = json.dumps(record | {"files": record["files"] | {name: outside}})
        (folder / "edit.json").write_text(text)
        assert f"{folder / 'edit.json'}: files names" in problems(adapter=folder)
    del record["files"][checks.WEIGHTS]
    (folder / "edit.json").write_text(json.dumps(record))
    text = problems(adapter=folder)
    assert f"it records no {checks.WEIGHTS}" in text


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
