"""Runs, records and audit chains that were written before the packages were put in folders open and verify.

`written_before/` was made by commit 0fba0b1 on 2026-11-28: a base and an adapter of a few thousand weights, a run at two
points with scores and self-influences, and three edits of it, one after the other: a removal with held-out rows, a
relabelling, and two steps of NPO.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import influence
import unlearn
from influence import Run
from influence.scorefile import Scores
from influence.store import open_file, read
from unlearn.record.edit_record import EditRecord
from unlearn.record.version import version

MADE = Path(__file__).parent / "written_before"
EDITS = ("removed", "relabelled", "npo")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy to work on, at another place than it was written."""
    folder = tmp_path_factory.mktemp("before") / "made"
    shutil.copytree(MADE, folder)
    return folder


@pytest.fixture(scope="module")
def run(place) -> Run:
    model = influence.load(place / "base", place / "adapter", device="cpu")
    train = influence.read_examples(place / "train.jsonl")
    return Run.open(place / "run", model=model, train=train)


def test_the_run_opens_and_scores_as_it_did(run, place):
    stored = Scores.load(place / "run" / "scores.h5")
    queries = influence.read_examples(place / "queries.jsonl")
    now = run.score(queries, credit="additive")
    np.testing.assert_allclose(now.values, stored.values, rtol=1e-5, atol=1e-8)
    same = {"curvature", "damping", "points", "calibration", "run_digest", "measurement"}
    assert all(np.array_equal(now.attributes[key], stored.attributes[key]) for key in same)
    with open_file(place / "run" / "scores.h5") as file:
        influences = read(file, "self_influence")
    np.testing.assert_allclose(
        run.self_influence(credit="additive").values, influences, rtol=1e-5, atol=1e-8
    )


def test_the_score_file_is_taken_for_the_very_same_request(run, place):
    """What is compared are its attributes: none has changed its name or its words."""
    queries = influence.read_examples(place / "queries.jsonl")
    before = (place / "run" / "scores.h5").read_bytes()
    run.score(queries, out=place / "run" / "scores.h5", credit="additive")
    assert (place / "run" / "scores.h5").read_bytes() == before


def test_the_manifest_is_read_and_would_be_written_as_it_is(run):
    record = json.loads((MADE / "run" / "manifest.json").read_text())
    assert run.manifest.as_json() == record
    assert run.manifest.calibration
    assert run.manifest.audit is not None
    assert run.manifest.audit.entries == len(EDITS)
    assert run.manifest.now is not None
    assert run.manifest.now.adapter.path.endswith("npo")


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_verifies_where_it_lies_now(place, name):
    found = unlearn.verify(place / "run", adapter=place / name)
    assert found.passed, found.problems
    damaged = place.parent / f"damaged-{name}"
    shutil.copytree(place / name, damaged)
    weights = damaged / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert not unlearn.verify(place / "run", adapter=damaged).passed


@pytest.mark.parametrize("name", EDITS)
def test_every_record_is_read_and_would_be_written_as_it_is(name):
    text = json.loads((MADE / name / "edit.json").read_text())
    record = EditRecord.from_json(text)
    written = record.as_json()
    # keys that came later are null, and nothing else differs
    assert [written.pop(key) for key in ("expected", "shipped", "evidence")] == [None] * 3
    for row in written["rows"]:
        assert (row.pop("low"), row.pop("high")) == (None, None)
    assert written == text
    assert record.losses.retained.before > 0


def test_the_move_on_record_leads_from_one_adapter_to_the_next(place):
    old, delta, new = (
        load_file(folder / name)
        for folder, name in (
            (place / "adapter", "adapter_model.safetensors"),
            (place / "removed", "delta.safetensors"),
            (place / "removed", "adapter_model.safetensors"),
        )
    )
    assert all(torch.equal(old[key] + delta[key], new[key]) for key in new)


def test_the_chain_says_where_its_edits_were(run):
    """The folders that it names are gone, and the sentence says so: no version is made up."""
    with pytest.raises(influence.errors.StoreError, match="edit 3 cannot be followed"):
        version(run)
    assert version(run, "original").edits == 0


@pytest.mark.parametrize("name", ["ekfac", "ggn"])
def test_a_fit_that_was_killed_before_goes_on_and_is_the_whole_one(place, tmp_path, capsys, name):
    """The checkpoint's sums have the same names and units: a resumed trace is a whole one."""
    model = influence.load(place / "base", place / "adapter", device="cpu")
    train = influence.read_examples(place / "train.jsonl")
    curvature = {"ekfac": influence.EKFAC(), "ggn": influence.GGN()}[name]
    options = {"path": (1.0,), "curvature": curvature, "token_budget": 20, "store": "never"}
    whole = influence.fit(model, train, directory=tmp_path / "whole", **options)
    capsys.readouterr()
    resumed = influence.fit(model, train, directory=place / f"unfinished-{name}", **options)
    assert "resuming at batch" in capsys.readouterr().err
    eigenvalues = [run.curvature().mean_eigenvalues() for run in (resumed, whole)]
    torch.testing.assert_close(*eigenvalues, rtol=1e-6, atol=0)
