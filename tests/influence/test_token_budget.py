"""Batches within a bound on memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence import Run, memory, token_budget
from influence.errors import InputError
from influence.memory import bounded
from influence.token_budget import bounded_budget, bytes_per_token, most_held
from tests.conftest import build_model, examples, tokens_of
from tests.influence.toy_runs import BUDGET, N_ROWS, fit, small_model

CPU = torch.device("cpu")


def test_the_most_that_is_held_is_counted_and_views_are_not():
    before = torch.zeros(50)

    def work():
        a = before + 1  # 200 bytes
        b = torch.cat([a, a, a])  # 600 more
        c = b[:10].reshape(2, 5).T
        a += 1
        del a, b, c  # nothing is left
        torch.zeros(100)  # 400

    assert most_held(work, CPU) == 800


def test_layers_and_the_vocabulary_count_for_a_token():
    """Twice the layers hold nearly twice as much; a row's own gradient is left out."""
    found = []
    for layers in (2, 4):
        model = build_model("llama", layers=layers, dtype=torch.float64)
        found.append(bytes_per_token(model, tokens_of(model, examples(4))))
    hidden = model.model.config.hidden_size
    assert found[0] > 2 * 8 * 8 * hidden  # some eight vectors of a layer are kept
    assert 1.4 < found[1] / found[0] < 2.1


def test_a_rows_own_gradient_is_no_tokens(monkeypatch):
    model = build_model("llama", layers=1, dtype=torch.float64)
    tokens, own = tokens_of(model, examples(4)), 8 * model.space.size
    longest = int(tokens.lengths.max())
    monkeypatch.setattr(token_budget, "most_held", lambda *_: own + 700 * longest)
    assert bytes_per_token(model, tokens) == 700


def test_a_bound_makes_batches_smaller_and_never_larger(monkeypatch, capfd):
    model = build_model("llama", layers=1, dtype=torch.float64)
    tokens = tokens_of(model, examples(4))
    each = bytes_per_token(model, tokens)
    monkeypatch.setattr(memory, "held_memory", lambda device=None: 0)
    assert bounded_budget(model, tokens, 1024) == 1024
    capfd.readouterr()
    with bounded(memory=100.5 * each / token_budget.SHARE / 1e9):
        assert bounded_budget(model, tokens, 1024) == 100
        assert "batches have at most 100 tokens, as --memory" in capfd.readouterr().err
        assert bounded_budget(model, tokens, 64) == 64
        with bounded(token_budget=33):
            assert bounded_budget(model, tokens, 64) == 33
    with bounded(memory=1e-9 * each / 10):
        assert bounded_budget(model, tokens, 64) == 1


def test_runs_are_opened_and_fitted_within_bounds(tmp_path, monkeypatch):
    model, train = small_model(), examples(N_ROWS)
    run = fit(tmp_path / "run")
    given = {"model": model, "train": train}
    queries = examples(3, seed=9)
    expected = run.score(queries).values
    with bounded(token_budget=11):
        other = Run.open(tmp_path / "run", **given)
        assert other.token_budget == 11
        np.testing.assert_allclose(other.score(queries).values, expected, rtol=1e-5)
        assert fit(tmp_path / "new", token_budget=None).manifest.token_budget == 11
    assert other.manifest.token_budget == BUDGET
    assert Run.open(tmp_path / "run", **given).token_budget == BUDGET
    each = bytes_per_token(model, run.tokens)
    monkeypatch.setattr(memory, "held_memory", lambda device=None: 0)
    small = 20.5 * each / token_budget.SHARE / 1e9
    bounded_run = fit(tmp_path / "bounded", token_budget=None, memory=small)
    assert bounded_run.manifest.token_budget == 20
    np.testing.assert_allclose(bounded_run.score(queries).values, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="memory -1"):
        fit(tmp_path / "refused", memory=-1.0)
