"""Saving an edit: what is written, what is never written over, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import influence
import unlearn
from influence.adapter import weight_key
from influence.errors import InputError, MismatchError, WorkError
from influence.row_files import read_examples
from influence.run import Run
from tests.conftest import rows
from tests.helpers import contents, untouched, write_rows
from tests.influence.toy_loading import resized, saved_with_head
from tests.unlearn.edits.helpers import ANSWERS, edit_of
from tests.unlearn.record.helpers import RECIPE
from unlearn.record import chain
from unlearn.record import save as saving
from unlearn.record.verify import verify
from unlearn.record.version import version


@pytest.fixture(scope="module")
def made(fitted_folder, tmp_path_factory):
    """The edit of two removed rows as one of a test's own copy of the run.

    It is made once: what is tested with it is how edits are saved.
    """
    directory = tmp_path_factory.mktemp("edited") / "run"
    shutil.copytree(fitted_folder.path / "run", directory)
    (directory / "recipe.json").write_text(json.dumps(RECIPE.as_json()))
    edit = edit_of(Run.open(directory, model=fitted_folder.model))

    def of(run):
        place = replace(edit.record.run, path=str(run.directory))
        change = replace(edit.change, version=version(run))
        return replace(edit, change=change, record=replace(edit.record, run=place))

    return of


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def test_a_saved_edit_is_an_adapter_that_peft_loads_and_merges(run, fitted_folder, tmp_path):
    at, model = fitted_folder
    inputs = [at / "base", at / "adapter"]
    before = [hashes(folder) for folder in inputs]
    edit = edit_of(run, relabel=ANSWERS, remove=["r0-1"])
    out = edit.save(tmp_path / "out")
    assert [hashes(folder) for folder in inputs] == before
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(at / "base", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(out)).eval()
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        with torch.no_grad():
            plain = loaded(input_ids=ids).logits
            merged = loaded.merge_and_unload()(input_ids=ids).logits
            with model.at(edit.theta):
                expected = model.model(input_ids=ids).logits
            assert not torch.allclose(expected, model.model(input_ids=ids).logits, atol=1e-4)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    again = influence.load(at / "base", out, device="cpu")
    assert again.adapter_digest == edit.report["adapter"]["after"]["digest"]
    assert torch.equal(again.snapshot(), edit.theta)


def test_old_plus_delta_is_new_bit_for_bit(run, fitted_folder, tmp_path):
    edit = edit_of(run)
    out = edit.save(tmp_path / "out")
    old, delta, new = (
        load_file(folder / name)
        for folder, name in (
            (fitted_folder.path / "adapter", "adapter_model.safetensors"),
            (out, "delta.safetensors"),
            (out, "adapter_model.safetensors"),
        )
    )
    assert (
        old.keys()
        == delta.keys()
        == new.keys()
        == {weight_key(leaf) for leaf in run.model.space.leaves}
    )
    for key in old:
        assert torch.equal(old[key] + delta[key], new[key])
        assert delta[key].any()
    assert unlearn.verify(run.directory, apply=True).passed


KEYS = [
    "format",
    "kind",
    "created",
    "versions",
    "run",
    "base",
    "adapter",
    "data",
    "tokenizer",
    "requests",
    "method",
    "residual",
    "stopped",
    "steps",
    "delta",
    "losses",
    "rows",
    "comparable",
    "guard",
    "expected",
    "cost",
    "agreement",
    "files",
]


PARTS = {
    "run": "path digest",
    "base": "path digest",
    "adapter": "before after",
    "data": "before after rows_before rows_after",
    "method": "name curvature geometry damping points lambda solver steps until seed",
    "residual": "solver tolerance objective",
    "delta": "norm relative",
    "losses": "edited retained heldout",
    "guard": "max_damage damage passed forced",
    "cost": "row_gradients row_forwards total seconds retraining ratio",
    "comparable": "source rows",
    "expected": "loss low high faithfulness share trainings near others recipe row_gradients",
}


LOSSES = {
    "edited": "rows before after target predicted",
    "retained": "rows before after change standard_error",
    "heldout": "rows before after source",
}


def test_the_record_has_every_key_that_is_promised(run, tmp_path):
    holdout = read_examples(write_rows(tmp_path / "heldout.jsonl", rows(5, seed=9)))
    edit = edit_of(run, relabel=ANSWERS, remove=["r0-1"], holdout=holdout)
    out = edit.save(tmp_path / "out")
    record = json.loads(
        (out / "edit.json").read_text(encoding="utf-8"),
        parse_constant=lambda name: pytest.fail(name),
    )
    assert set(KEYS) <= set(record)
    for key, names in PARTS.items():
        assert set(names.split()) <= set(record[key]), key
    for key, names in LOSSES.items():
        assert set(names.split()) <= set(record["losses"][key]), key
    step = "step length radius predicted measured accepted forget"
    assert all(set(step.split()) <= set(entry) for entry in record["steps"])
    row = "id action before after target base low high extraction_before extraction_after rank"
    assert all(set(row.split()) <= set(entry) for entry in record["rows"])
    assert [entry["id"] for entry in record["rows"]] == ["r0-1", "r0-2", "r0-5"]
    assert all(0 <= entry["rank"] <= 1 for entry in record["rows"])
    assert all({"old_before", "old_after"} <= set(entry) for entry in record["rows"][1:])
    assert record["losses"]["heldout"]["source"] == str(tmp_path / "heldout.jsonl")
    assert record["data"]["rows_before"] - record["data"]["rows_after"] == 1
    files = {name: value for name, value in hashes(out).items() if name != "edit.json"}
    assert record["files"] == files
    assert "changed_rows.jsonl" in files
    assert record["run"]["digest"] == run.digest


def test_changed_rows_are_kept_and_removed_ones_are_not(run, tmp_path):
    gone = run.train[1]
    edit = edit_of(run, relabel=ANSWERS, remove=["r0-1"], correct={"r0-7": {"prompt": "old cats"}})
    out = edit.save(tmp_path / "out")
    for name, data in contents(out).items():
        for text in (gone.prompt + gone.completion, json.dumps(gone.prompt)[1:-1] + '"'):
            assert text.encode() not in data, name
    again = read_examples(out / "changed_rows.jsonl")
    assert again.ids == ["r0-2", "r0-5", "r0-7"]
    assert [row.content_hash for row in again] == [
        request["content_after"]
        for request in edit.report["requests"]
        if request["action"] != "remove"
    ]
    assert again[0].completion == ANSWERS["r0-2"]
    assert (again[2].prompt, again[2].completion) == ("old cats", run.train[7].completion)
    later = edit_of(run, remove=["r0-9"]).save(
        tmp_path / "second"
    )  # tells all rows that are changed by then
    assert read_examples(later / "changed_rows.jsonl").ids == ["r0-2", "r0-5", "r0-7"]
    only = edit_of(run, remove=["r0-9"], start="original").save(tmp_path / "third")
    assert not (only / "changed_rows.jsonl").exists()


def test_two_edits_from_one_start_do_not_undo_one_another(run, tmp_path):
    first, other = edit_of(run, remove=["r0-1"]), edit_of(run, remove=["r0-2"])
    first.save(tmp_path / "one")
    with (
        untouched(tmp_path),
        pytest.raises(MismatchError, match=r"another edit was saved .* while this one was made"),
    ):
        other.save(tmp_path / "other")
    assert version(run).removed == {"r0-1"}
    edit_of(run, remove=["r0-2"], start="original").save(tmp_path / "branch")  # asked for
    assert unlearn.verify(run.directory, apply=True).passed


def test_recorded_edits_and_the_rows_are_never_overwritten(run, tmp_path):
    at = tmp_path / "edits"
    edit_of(run, remove=["r0-1"]).save(at / "one")
    again = edit_of(run, remove=["r0-2"])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    for place, sentence in (
        (at, "holds, or lies in"),
        (at / "one" / "in", "holds, or lies in"),
        (tmp_path / "notes", "other"),
    ):
        with untouched(tmp_path), pytest.raises(InputError, match=sentence):
            again.save(place, overwrite=True)


def test_the_guard_refuses_to_save_and_force_saves_and_says_so(run, tmp_path):
    edit = edit_of(run, steps=1, damping="abs:1e-2", max_damage=0.01)
    assert not edit.passed
    assert edit.report["guard"]["damage"] > 0.01
    with (
        untouched(tmp_path),
        pytest.raises(
            WorkError,
            match=r"raises the retained rows.* nothing was written\. Ask for less .*--force",
        ),
    ):
        edit.save(tmp_path / "out")
    out = edit.save(tmp_path / "out", force=True)
    guard = json.loads((out / "edit.json").read_text())["guard"]
    assert (guard["passed"], guard["forced"]) == (False, True)
    assert guard["damage"] == edit.report["losses"]["retained"]["change"]
    fine = edit_of(run, remove=["r0-5"], start="original").save(tmp_path / "fine", force=True)
    guard = json.loads((fine / "edit.json").read_text())["guard"]
    assert (guard["passed"], guard["forced"]) == (True, False)


def fail(*_arguments, **_options):
    raise OSError("the disk is full")


@pytest.mark.parametrize("broken", ["save_file", "seal", "replace"])
def test_a_failed_save_leaves_nothing_and_the_next_one_works(
    run, made, tmp_path, monkeypatch, broken
):
    edit, out, real = made(run), tmp_path / "out", os.replace
    places = {"save_file": (saving, "save_file", fail), "seal": (saving, "seal", fail)}
    move = lambda a, b: fail() if Path(b) == out else real(a, b)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(*places.get(broken, (os, "replace", move)))
        with untouched(run.directory), pytest.raises(OSError, match="the disk is full"):
            edit.save(out)
    assert not out.exists()
    assert chain.entries(run.directory) == []
    assert edit.save(out) == out
    assert unlearn.verify(run.directory, apply=True).passed
    assert not out.with_name("out.partial").exists()
    assert len(chain.entries(run.directory)) == 1


@pytest.mark.parametrize("moment", ["seal", "replace"])
def test_a_killed_save_leaves_no_directory_and_the_next_one_works(run, made, tmp_path, moment):
    edit, out, real = made(run), tmp_path / "out", os.replace
    child = os.fork()
    if child == 0:  # dies before pytest could see anything of it
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        if moment == "seal":
            saving.seal = die
        else:
            os.replace = lambda a, b: die() if Path(b) == out else real(a, b)
        try:
            edit.save(out)
        finally:
            os._exit(3)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not out.exists()
    assert edit.save(out) == out
    assert unlearn.verify(run.directory).passed


def test_a_save_whose_audit_line_could_not_be_written_can_be_done_again(
    run, made, tmp_path, monkeypatch
):
    edit, out = made(run), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(saving, "append", fail)
        with pytest.raises(OSError, match="the disk is full"):
            edit.save(out)
    edit.save(out)
    assert unlearn.verify(run.directory).passed


def test_what_is_there_is_overwritten_only_when_asked(run, made, tmp_path):
    first = made(run).save(tmp_path / "out")
    again = edit_of(run, remove=["r0-5"], start="original")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is not empty: give another directory, or --overwrite"),
    ):
        again.save(first)
    (tmp_path / "file").write_text("mine")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is a file; an adapter is a directory"),
    ):
        again.save(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    edit_of(run, remove=["r0-6"], start="original").save(tmp_path / "empty")
    (first / "mine.txt").write_text("mine")
    assert again.save(first, overwrite=True) == first
    assert not (first / "mine.txt").exists()
    assert json.loads((first / "edit.json").read_text())["requests"][0]["id"] == "r0-5"
    assert unlearn.verify(run.directory).passed
    assert version(run).removed == {"r0-5"}


def test_sources_are_never_written_over(run, made, fitted_folder):
    edit = made(run)
    at = fitted_folder.path
    for place in (run.directory, at / "adapter", at / "base", at, run.directory.parent):
        with (
            untouched(run.directory, at),
            pytest.raises(
                InputError, match=r"is, or holds, or lies in .* which the edit is made from"
            ),
        ):
            edit.save(place, overwrite=True)


@pytest.mark.parametrize("inside", ["run", "base", "adapter"])
def test_nothing_is_written_inside_a_source(run, made, tmp_path, monkeypatch, inside):
    place = run.directory if inside == "run" else tmp_path / inside
    place.mkdir(exist_ok=True)
    if inside != "run":
        source = replace(getattr(run.manifest, inside), path=str(place))
        run.manifest = replace(run.manifest, **{inside: source})
    edit = made(run)
    with pytest.raises(InputError, match="the edit is made from"):
        edit.save(place / "out")


def test_a_place_through_a_link_or_dots_is_the_same_place(run, made, fitted_folder, tmp_path):
    edit = made(run)
    (tmp_path / "link").symlink_to(fitted_folder.path / "adapter")
    for place in (tmp_path / "link", fitted_folder.path / "base" / ".." / "adapter"):
        with (
            untouched(fitted_folder.path),
            pytest.raises(InputError, match="which the edit is made from"),
        ):
            edit.save(place, overwrite=True)


def test_the_manifest_knows_the_chain_and_where_the_run_now_stands(run, tmp_path):
    edit = edit_of(run)
    out = edit.save(tmp_path / "out")
    manifest = json.loads((run.directory / "manifest.json").read_text())
    line = json.loads((run.directory / "audit.jsonl").read_text())
    assert manifest["audit"] == {"entries": 1, "head": line["hash"]}
    assert manifest["now"] == {
        "adapter": {"path": str(out), "digest": edit.report["adapter"]["after"]["digest"]},
    }
    assert line["edit"] == str(out)
    again = Run.open(run.directory, model=run.model)
    assert again.score(again.train[:2]).values.shape == (
        2,
        12,
    )  # the run is still of the adapter it was fitted on


def test_what_others_wrote_to_the_manifest_since_stays(run, made, tmp_path):
    """A calibration by another process, and a key that this version does not know."""
    edit = made(run)
    path = run.directory / "manifest.json"
    calibration = {"raw ekfac mean:0.1 at 0.6": {"factor": 2.0, "source": "another process"}}
    others = {"calibration": calibration, "unknown": {"of": "another version"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    edit.save(tmp_path / "out")
    manifest = json.loads(path.read_text())
    assert {key: manifest[key] for key in others} == others


def test_an_ancestor_is_not_overwritten(run, tmp_path):
    one = edit_of(run, remove=["r0-1"]).save(tmp_path / "one")
    edit_of(run, remove=["r0-2"]).save(tmp_path / "two")
    third = edit_of(run, remove=["r0-4"])
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    with pytest.raises(InputError, match="was made from the adapter in "):
        third.save(tmp_path / "one", overwrite=True)
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    assert version(run).removed == {"r0-1", "r0-2"}


@pytest.mark.parametrize("count", [0, 27], ids=["head", "resized"])
def test_an_edit_keeps_the_base_weights_of_the_file(tmp_path, count):
    if count:
        base, adapter, _ = resized(tmp_path, False, count)
    else:
        base, adapter, _ = saved_with_head(tmp_path, True)
    data = influence.read_examples(write_rows(tmp_path / "rows.jsonl", rows(8)))
    loaded = influence.load(base, adapter, device="cpu")
    run = influence.fit(loaded, data, directory=tmp_path / "run", path=(1.0,))
    edit = unlearn.remove(run, [run.train.ids[0]], until="steps=1", max_damage=10)
    out = edit.save(tmp_path / "edited")
    assert set(load_file(out / "adapter_model.safetensors")) == set(
        load_file(adapter / "adapter_model.safetensors")
    )
    again = influence.load(base, out, device="cpu")
    assert again.base_digest == loaded.base_digest
    assert torch.equal(again.snapshot(), edit.theta)
    assert verify(run.directory, apply=True).passed
