"""A run that edits can be recorded for, without and with edits."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest

from influence.run import Run
from tests.unlearn.record.helpers import (
    BEFORE,
    RECIPE,
    digest,
    edit,
    save,
    weights,
)
from unlearn.record.chain import append


@pytest.fixture
def run(run) -> Run:
    """The run with a recipe on record, by which rows are lost that were not seen: edits move."""
    (run.directory / "recipe.json").write_text(json.dumps(RECIPE.as_json()))
    return run


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
