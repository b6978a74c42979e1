"""Versions of an adapter: edits after edits, from the original, and of damaged folders."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unlearn
from influence.errors import InputError, MismatchError, StoreError
from influence.loss import mean_losses
from influence.run import Run
from influence.tokens import tokenize
from tests.helpers import contents
from tests.unlearn.edits.helpers import ANSWERS, edit_of
from unlearn.record.version import version


def test_the_folders_of_earlier_edits_may_go(run, tmp_path):
    """Erasure must not be held up by the record.

    A row that is relabelled first and removed later is nowhere after that.
    """
    first = edit_of(run, relabel=ANSWERS).save(tmp_path / "first")
    second = edit_of(run, remove=["r0-2"]).save(tmp_path / "second")
    shutil.rmtree(first)
    now = version(run)
    assert now.removed == {"r0-2"}
    assert now.changed == set(ANSWERS) - {"r0-2"}
    assert now.path == str(second)
    assert all(ANSWERS["r0-2"].encode() not in data for data in contents(second).values())
    edit_of(run, remove=["r0-9"]).save(tmp_path / "third")
    assert any("first" in problem for problem in unlearn.verify(run.directory).problems)


def test_a_second_edit_starts_from_the_first(run, tmp_path):
    first = edit_of(run, remove=["r0-1"], relabel=ANSWERS)
    first.save(tmp_path / "one")
    reopened = Run.open(run.directory, model=run.model)
    for opened in (run, reopened):
        start = version(opened)
        assert torch.equal(start.theta, first.theta)
        assert start.rows.ids == [id for id in run.train.ids if id != "r0-1"]
        assert start.removed == {"r0-1"}
        assert start.changed == set(ANSWERS)
        assert start.edits == 1
        assert start.rows[start.rows.index("r0-2")].completion == ANSWERS["r0-2"]
        tokens = tokenize(start.rows, opened.model.tokenizer)
        for row, expected in zip(start.tokens, tokens, strict=True):
            np.testing.assert_array_equal(row.input_ids, expected.input_ids)
        np.testing.assert_allclose(start.weights, 1 / run.manifest.objective.N_tok)
    with pytest.raises(
        InputError,
        match=r"'r0-1' was removed by an earlier edit .*start from an adapter before that edit",
    ):
        edit_of(reopened, remove=["r0-1"])
    with pytest.raises(InputError, match="relabel of 'r0-2' changes nothing"):
        edit_of(reopened, relabel={"r0-2": ANSWERS["r0-2"]})
    second = edit_of(reopened, remove=["r0-4"])
    assert second.report["adapter"]["before"] == {
        "path": str(tmp_path / "one"),
        "digest": first.report["adapter"]["after"]["digest"],
    }
    assert second.report["data"]["before"] == first.report["data"]["after"]
    second.save(tmp_path / "two")
    assert unlearn.verify(run.directory, apply=True).passed
    assert version(reopened).removed == {"r0-1", "r0-4"}
    assert version(reopened).edits == 2
    assert version(reopened, tmp_path / "one").removed == {"r0-1"}
    assert version(reopened, "original").edits == 0


def test_relabelling_back_is_an_edit_of_its_own(run, tmp_path):
    there = edit_of(run, relabel=ANSWERS, steps=1)
    there.save(tmp_path / "there")
    back = edit_of(
        run, relabel={id: run.train[run.train.index(id)].completion for id in ANSWERS}, steps=1
    )
    assert back.report["data"]["after"] == run.train.digest
    assert (
        back.delta + there.delta
    ).norm() > 1e-3 * there.delta.norm()  # not the way back: losses are not quadratic
    back.save(tmp_path / "back")
    now = version(run)
    assert now.rows == run.train
    assert now.changed == set(ANSWERS)
    assert unlearn.verify(run.directory).passed


def test_the_original_can_be_edited_again(run, tmp_path):
    edit_of(run, remove=["r0-1"]).save(tmp_path / "one")
    for start in ("original", run.manifest.adapter.path):
        other = edit_of(run, remove=["r0-1"], start=start)
        assert other.report["data"]["rows_before"] == 12
        assert other.report["adapter"]["before"]["digest"] == run.manifest.adapter.digest
    other.save(tmp_path / "two")
    assert version(run).edits == 1
    assert unlearn.verify(run.directory, apply=True).passed
    assert version(run, tmp_path / "one").path == str(tmp_path / "one")


def test_an_edit_that_moves_nothing_still_takes_its_rows_out(run, tmp_path):
    low = float(mean_losses(run.model, run.tokens.select([1])).min())
    still = edit_of(run, remove=["r0-1"], until=f"loss={low / 2}")
    assert not still.delta.any()
    out = still.save(tmp_path / "still")
    assert version(run).removed == {"r0-1"}
    assert torch.equal(version(run).theta, run.model.snapshot())
    assert (
        load_file(out / "delta.safetensors").keys()
        == load_file(out / "adapter_model.safetensors").keys()
    )
    assert unlearn.verify(run.directory, apply=True).passed
    edit_of(run, remove=["r0-4"]).save(tmp_path / "next")
    assert version(run).removed == {"r0-1", "r0-4"}
    edit_of(run, remove=["r0-4"], start="original").save(tmp_path / "branch")
    assert version(run).removed == {
        "r0-4"
    }  # started before the still edit, though the adapter is the same
    assert unlearn.verify(run.directory, apply=True).passed


@pytest.mark.parametrize("what", ["adapter_model.safetensors", "edit.json", "gone"])
def test_a_damaged_earlier_edit_cannot_be_built_on(run, tmp_path, what):
    out = edit_of(run).save(tmp_path / "out")
    if what == "gone":
        shutil.rmtree(out)
    else:
        data = bytearray((out / what).read_bytes())
        data[-9] ^= 1
        (out / what).write_bytes(bytes(data))
    with pytest.raises(
        (StoreError, MismatchError), match=r"edit 1 cannot be followed: .*Restore its folder"
    ):
        version(run)
    assert not unlearn.verify(run.directory).passed
    assert version(run, "original").edits == 0


def test_a_manifest_that_knows_an_edit_the_chain_does_not_is_a_problem(run, tmp_path):
    edit_of(run, remove=["r0-1"]).save(tmp_path / "out")
    (run.directory / "audit.jsonl").unlink()
    path = run.directory / "manifest.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in json.loads(path.read_text()).items() if key != "audit"}
        )
    )
    assert any("taken away" in problem for problem in unlearn.verify(run.directory).problems)
