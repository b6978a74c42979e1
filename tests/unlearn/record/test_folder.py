"""The folder of an edit: its seal, every change of a file or record, and old + delta = new."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from influence.adapter import weight_key
from influence.errors import InputError
from influence.manifest import AuditRecord
from tests.conftest import build_model, examples, fit_end
from tests.unlearn.record.helpers import (
    BEFORE,
    KEYS,
    digest,
    edit,
    flips,
    forge,
    problems,
    reseal,
    save,
    weights,
)
from unlearn.record import folder as checks
from unlearn.record.chain import append, entries
from unlearn.record.folder import seal
from unlearn.record.verify import verify

# ---- the seal ------------------------------------------------------------------------------------


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


# ---- every change is found and named -------------------------------------------------------------


@pytest.mark.slow
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


def test_the_record_must_say_what_the_line_says(place):
    """A line and a record that agree by sha256 but not in what they say: it is found."""
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
    result = verify(place.run)
    assert result.passed
    assert result.notes == [
        f"{folder / 'notes.txt'} is not in the record; no loader of the adapter reads it"
    ]


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


# ---- old + delta = new ---------------------------------------------------------------------------


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
    """By IEEE addition -0 + 0 is 0, so an adapter with -0 there was not made by this delta."""
    old = weights(0)
    old[KEYS[0]][0, 0] = -0.0
    save(place.adapter, old)
    folder = edit(place, "first")
    delta, new = load_file(folder / checks.DELTA), load_file(folder / checks.WEIGHTS)
    delta[KEYS[0]][0, 0], new[KEYS[0]][0, 0] = 0.0, 0.0
    save_file(delta, folder / checks.DELTA)
    save_file(new, folder / checks.WEIGHTS)
    reseal(folder)
    result = checks.Verification()
    checks.check_delta(result, folder, str(place.adapter), "it")
    assert result.passed
    new[KEYS[0]][0, 0] = -0.0
    save_file(new, folder / checks.WEIGHTS)
    checks.check_delta(result, folder, str(place.adapter), "it")
    assert "1 of 6 entries" in result.problems[0]


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


def test_apply_holds_the_base_weights_beside_the_matrices_fast(place):
    """PEFT saves the head under an adapted one. Loaders take it, so an edit must leave it alone."""
    head, old = "base_model.model.lm_head.base_layer.weight", place.adapter / checks.WEIGHTS
    folder = edit(place, "first")
    append(place.run, folder)
    before, after = load_file(old), load_file(folder / checks.WEIGHTS)
    save_file(before | {head: torch.ones(2, 3)}, old)
    assert f"{folder / checks.WEIGHTS} lacks {head}" in problems(place.run, apply=True)
    save_file(after | {head: torch.ones(2, 3)}, folder / checks.WEIGHTS)
    assert head not in problems(place.run, apply=True)  # it says only that the file was changed
    save_file(after | {head: 2 * torch.ones(2, 3)}, folder / checks.WEIGHTS)
    assert f"{head} is not what it was before the edit" in problems(place.run, apply=True)
    save_file(before, old)
    assert f"{folder / checks.WEIGHTS} holds {head}, and" in problems(place.run, apply=True)


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
    """The digests of a real run and PEFT's own files: move, save, seal, append, verify."""
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
    result = verify(run.directory, apply=True)
    assert result.passed, result.problems
    assert "bit for bit, in 4 matrices" in result.checked[-1]
    assert verify(run.directory, adapter=out).passed
    again = fit_end(
        model, examples(4), directory=tmp_path / "run"
    )  # a finished fit keeps the record
    assert again.manifest.audit == AuditRecord(1, entries(run.directory)[0]["hash"])
