"""A base that several processes hold between them: the same answers, from parts of its weights."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist

import influence
import influence.fitted_point as fitting
from influence import EKFAC, GGN, KFAC, Identity, Run, distributed, sharding
from influence.errors import AdapterError, InputError, ProcessError, ShortOfMemory
from influence.gradients import stream_gradients
from influence.halving import halve
from influence.loss import mean_losses
from tests.conftest import build_model, examples, tokens_of
from tests.helpers import save, statuses

N_ROWS = 13
KIND = {"layers": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
FIT = {"token_budget": 20, "path": (0.5, 0.9), "reduction": "example"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("shards")
    save(at, **KIND)
    return at


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Processes meet often, and at checkpoints."""
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0.01)


def loaded(folder: Path, **options):
    return influence.load(
        folder / "base", folder / "adapter", dtype="float64", device="cpu", **options
    )


def fit(folder: Path, directory: Path, curvature=None, *, shard: bool = False, **options) -> Run:
    return influence.fit(
        loaded(folder, shard=shard),
        examples(N_ROWS),
        directory=directory,
        curvature=curvature or EKFAC(),
        **(FIT | options),
    )


def answers(run: Run) -> dict[str, np.ndarray]:
    """What the four commands give, as arrays."""
    queries = examples(3, seed=9)
    scores = run.score(queries, per_token=True)
    found = {"scores": scores.values, "tokens": scores.tokens.values}
    found["additive"] = run.score(queries, credit="additive").values
    found["self"] = run.self_influence(credit="additive").values
    if not isinstance(run.specification, Identity):
        effect = run.without([run.train.ids[3], run.train.ids[4]], queries)
        losses = [each.predicted for each in (*effect.queries, *effect.removed)]
        found["without"] = np.array(losses)
    return found


def test_probe(folder, tmp_path):
    whole = fit(folder, tmp_path / "one")
    expected = answers(whole)
    def work(rank):
        run = fit(folder, tmp_path / "two", shard=True)
        np.savez(tmp_path / f"{rank}.npz", **answers(run))
    assert statuses(work, tmp_path, 2) == [0, 0]
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, value in expected.items():
            print(name, np.abs(found[name]-value).max()/np.abs(value).max())
