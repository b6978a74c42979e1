"""Damping rules scale with each block, and lambda is always positive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.curvature import dense
from influence.damping import Damping
from influence.errors import InputError
from tests.conftest import build_model, examples, fit_end
from tests.influence.toy_training import train, trainer_groups, write

ONE = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture
def small():
    """GPT-2 (no float32 inside), one layer, LoRA on its attention input and MLP output."""
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


def fitted(tmp_path, model, data, curvature, **options):
    return fit_end(model, data, curvature=curvature, directory=tmp_path / "run", **options)


def test_damping_rules_scale_with_each_block(tmp_path, small):
    run = fitted(tmp_path, small, examples(6), influence.EKFAC())
    ekfac = run.curvature()
    matrix = dense(ekfac)
    for leaf, mean, top in zip(
        small.space.leaves,
        run.operator(damping="mean:0.5").lam,
        run.operator(damping="top:0.5").lam,
        strict=True,
    ):
        eigenvalues = torch.linalg.eigvalsh(matrix[leaf.slice, leaf.slice])
        assert float(mean) == pytest.approx(0.5 * float(eigenvalues.mean()))
        assert float(top) == pytest.approx(0.5 * float(eigenvalues[-1]))
    assert run.operator(damping="abs:0.25").lam.tolist() == [0.25] * len(ekfac.blocks)


@pytest.mark.parametrize("text", ["mean:0", "abs:-1", "top:nan", "mean:inf"])
def test_zero_negative_or_infinite_damping_is_refused_with_the_reason(text):
    with pytest.raises(InputError, match="at least r\\^2 exact null directions per site"):
        Damping.parse(text)


@pytest.mark.parametrize("text", ["mean", "0.1", "median:1", "mean:x", ""])
def test_unreadable_damping_says_what_is_expected(text):
    with pytest.raises(InputError, match="expected mean:X, top:X, abs:X or time:T"):
        Damping.parse(text)


def test_a_fresh_adapter_gets_a_floor_and_a_warning(tmp_path, small):
    for site in small.sites:
        site.B.weight.data.zero_()
    with pytest.warns(UserWarning, match="curvature blocks are \\(nearly\\) zero"):
        run = fitted(tmp_path, small, examples(4), influence.EKFAC())
    with pytest.warns(UserWarning, match="nearly"):
        lam = run.operator().lam
    assert (lam > 0).all()
    with pytest.warns(UserWarning, match="nearly"):
        assert np.isfinite(run.score(examples(2, seed=1)).values).all()


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **ONE)


def test_time_is_one_over_the_total_learning_rate(tmp_path):
    model, data = build_model("gpt2", **ONE), examples(4)
    with pytest.raises(InputError, match="damping time was given"):
        fit_end(model, data, damping="time", directory=tmp_path / "none")
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    train(model, optimizer)
    folder = write(tmp_path / "bare", model, optimizer)
    with pytest.raises(InputError, match="damping time was given"):
        fit_end(model, data, damping="time", optimizer=folder, directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    log = {
        "global_step": 3,
        "log_history": [{"step": s, "learning_rate": r} for s, r in ((1, 0.7), (2, 0.5), (3, 0.2))],
    }
    folder = write(tmp_path / "logged", model, optimizer, log)
    for geometry in ("raw", "adam"):
        fitted = fit_end(
            model,
            data,
            damping="time",
            optimizer=folder,
            geometry=geometry,
            directory=tmp_path / geometry,
        )
        assert fitted.operator().lam.numpy() == pytest.approx(1 / 1.4, rel=1e-12)
    queries = examples(2, seed=1)
    scores = fitted.score(queries, damping="time:4")
    assert set(np.ravel(scores.attributes["lambda"])) == {0.25}
    np.testing.assert_array_equal(scores.values, fitted.score(queries, damping="abs:0.25").values)
    with pytest.raises(InputError, match="time"):
        fitted.score(queries, damping="time")
    for wrong in ("time:0", "time:-1", "time:inf", "time:nan"):
        with pytest.raises(InputError):
            fit_end(model, data, damping=wrong, directory=tmp_path / "none")
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damping", ["abs:0.123456789", "time:3.14159265"])
def test_the_damping_of_the_fit_is_kept_with_all_its_digits(model, tmp_path, damping):
    fitted = fit_end(model, examples(4), damping=damping, directory=tmp_path / "run")
    number = float(damping.partition(":")[2])
    expected = number if damping.startswith("abs") else 1 / number
    assert float(fitted.operator().lam[0]) == pytest.approx(expected, rel=1e-12)
