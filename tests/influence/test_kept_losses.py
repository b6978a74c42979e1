"""The rows' losses along the path, kept and read again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.errors import MismatchError, StoreError
from influence.kept_losses import keep_losses, kept_losses
from influence.path_time import losses_along, path_record
from tests.conftest import build_model, examples, teach
from tests.oracles import plain_log_probs, plain_mean


def test_losses_are_read_by_id_and_another_runs_are_refused(tmp_path):
    assert kept_losses(tmp_path, "a", 3) == {}
    losses = np.arange(6.0).reshape(3, 2)
    keep_losses(tmp_path, "a", ["x", "y"], losses)
    found = kept_losses(tmp_path, "a", 3)
    assert list(found) == ["x", "y"]
    assert found["y"].tolist() == [1, 3, 5]
    with pytest.raises(MismatchError, match="belongs to another run"):
        kept_losses(tmp_path, "b", 3)
    with pytest.raises(StoreError, match=r"shape \[3, 2\], expected \[4, 2\]"):
        kept_losses(tmp_path, "a", 4)


def test_a_run_keeps_its_rows_losses_and_runs_the_missing_alone(tmp_path, monkeypatch):
    sites = {"layers": 1, "target_modules": ["q_proj"]}
    model = teach(build_model("llama", **sites), examples(6), steps=5)
    run = influence.fit(model, examples(6), directory=tmp_path / "run", path=(0.5, 1.0))
    kept, record = kept_losses(run.directory, run.digest, 4), path_record(run)
    losses = np.array([kept[id] for id in run.train.ids]).T
    weights = run.weights * run.tokens.counts
    means = losses @ weights / weights.sum()
    np.testing.assert_allclose(means, [record.base, record.adapter, *record.losses], rtol=1e-12)
    with torch.no_grad():
        here = [float(plain_mean(*plain_log_probs(model, item))) for item in run.tokens]
    np.testing.assert_allclose(losses[1], here, rtol=1e-10)
    np.testing.assert_array_equal(losses[3], losses[1])  # the last point is the adapter
    keep_losses(run.directory, run.digest, run.train.ids[:4], losses[:, :4] + 1)
    ran = []
    real = influence.path_time.mean_losses
    monkeypatch.setattr(
        "influence.path_time.mean_losses",
        lambda model, tokens, **o: ran.append(tokens.ids) or real(model, tokens, **o),
    )
    found = losses_along(run, np.arange(6))
    assert ran == [run.train.ids[4:]] * 3
    np.testing.assert_allclose(found[:, :4], losses[:, :4] + 1)
    np.testing.assert_allclose(found[:, 4:], losses[:, 4:], rtol=1e-12)
    assert list(kept_losses(run.directory, run.digest, 4)) == run.train.ids
