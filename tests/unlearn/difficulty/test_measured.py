"""What ascent costs a row, against a plain torch.optim loop on the PEFT model's own weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.errors import InputError
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, rows
from tests.unlearn.difficulty.helpers import (
    SHORT_ADAM,
    SHORT_SGD,
    SMALL,
    base_loss,
    check,
    losses_of,
    same,
    trained,
)
from unlearn.difficulty import LEVELS, Measured, Protocol, measure
from unlearn.difficulty.units import ALONE
from unlearn.retraining.recipe import Recipe


@pytest.mark.parametrize("protocol", [SHORT_ADAM, SHORT_SGD], ids=["adam", "sgd"])
def test_rows_equal_a_plain_loop_row_by_row(run, protocol):
    result = measure(run, protocol=protocol, **SMALL)
    assert result.names == tuple(run.train.ids)
    assert result.levels.tolist() == list(LEVELS) == [0.25, 0.5, 0.75, 1.0]
    assert np.isfinite(result.steps).sum() >= 3  # both kinds are there
    assert np.isinf(result.steps).sum() >= 2
    check(result, run, [[i] for i in range(len(run.train))], protocol)
    assert result.protocol == protocol.record()


@pytest.mark.parametrize("protocol", [SHORT_ADAM, SHORT_SGD], ids=["adam", "sgd"])
def test_groups_equal_a_plain_loop_over_their_mean_loss(run, protocol):
    groups = {
        "pair": ["r0-3", "r0-1"],
        "with the twin's words": ["r0-2", "r0-5", "r0-7"],
        "one": ["r0-6"],
    }
    result = measure(run, groups=groups, protocol=protocol, **SMALL)
    assert result.names == tuple(groups)
    check(result, run, [[run.train.index(id) for id in ids] for ids in groups.values()], protocol)


def test_own_rows_and_their_word_for_word_copies_do_not_count_in_the_damage(run):
    result = measure(run, ids=["twin", "r0-2", "r0-0"], protocol=SHORT_ADAM, sample_rows=10)
    assert sorted(result.sample) == sorted(run.train.ids)  # as many as there are
    unknown = np.isnan(result.retained[:, 0])
    assert [[id for id, no in zip(result.sample, row, strict=True) if no] for row in unknown] == [
        ["r0-2", "twin"],
        ["r0-2", "twin"],
        ["r0-0"],
    ]
    assert np.isnan(result.retained[0]).all(0).sum() == 2
    everyone = measure(
        run,
        groups={"all": run.train.ids},
        protocol=Protocol("adam", 0.01, steps=60),
        sample_rows=10,
    )
    assert np.isfinite(everyone.steps[0])
    assert np.isnan(everyone.damage[0])  # nobody is left to tell it


def test_a_row_at_its_target_from_the_start_costs_nothing(run):
    """An adapter that learnt nothing leaves some rows above the base's loss."""
    untrained = build_model(
        "gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"], seed=3, std=0.5
    )
    with run.model.at(untrained.snapshot()):
        losses = losses_of(run.model, run.tokens)
        base_losses = np.array([base_loss(run.model, item) for item in run.tokens])
        result = measure(run, protocol=SHORT_ADAM, **SMALL)
    at_target = np.flatnonzero(base_losses < losses)
    assert 0 < len(at_target) < 10
    assert (result.target < result.start).nonzero()[0].tolist() == at_target.tolist()
    assert (result.steps[at_target] == 0).all()
    assert np.abs(result.curve[at_target]).max() < 1e-12
    assert np.abs(result.area[at_target]).max() < 1e-12
    unchanged = np.broadcast_to(result.heldout_before, (len(at_target), 4, 3))
    np.testing.assert_allclose(result.heldout[at_target], unchanged)
    assert np.isnan(result.losses[at_target, 1:]).all()


def test_a_row_that_does_not_get_there_is_known_as_far_as_it_got(run, measured):
    short = measure(run, protocol=Protocol("adam", 3e-3, steps=5), **SMALL)
    assert np.isinf(short.steps).all()
    assert np.isnan(short.damage).all()
    assert np.isnan(short.area).all()
    assert np.isnan(short.heldout_damage).all()
    partly = np.isfinite(short.curve[:, 0])
    assert partly.any()
    np.testing.assert_allclose(short.curve[partly, 0], measured.curve[partly, 0])
    assert np.isfinite(short.losses).all()


def test_area_and_heldout_damage_by_hand():
    """Means of two counted rows 1, 2, 4, 8 at quarters: 0.25 (0.5 + 1.5 + 3 + 6) = 2.75."""
    retained = np.array([[[0.0, 2.0, np.nan], [1, 3, np.nan], [5, 3, np.nan], [8, 8, np.nan]]])
    nothing = np.zeros(1)
    result = Measured(
        ("a",),
        nothing,
        nothing,
        nothing,
        np.zeros((1, 1)),
        np.array(LEVELS),
        retained,
        np.array([[[9.0, 9], [9, 9], [9, 9], [3, 6]]]),
        np.zeros(3),
        np.array([1.0, 2.0]),
        ("x", "y", "z"),
        {},
    )
    assert result.curve.tolist() == [[1, 2, 4, 8]]
    assert result.damage.tolist() == [8]
    assert result.area.tolist() == [2.75]
    assert result.heldout_damage.tolist() == [3]


def test_chunks_and_the_other_rows_that_are_asked_change_nothing(run, measured):
    alone = measure(run, ids=["r0-4", "r0-1"], protocol=SHORT_ADAM, **SMALL)
    same(measured, alone, [4, 1], rtol=1e-8, atol=1e-10)
    one = ALONE * 8 * run.model.space.size
    four = measure(run, ids=run.train.ids[3:7], protocol=SHORT_ADAM, memory=one, **SMALL)
    same(measured, four, slice(3, 7), rtol=1e-8, atol=1e-10)


def test_the_run_and_its_model_are_left_alone(run, measured):
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    theta, flags = (
        run.model.snapshot(),
        [parameter.requires_grad for parameter in run.model.model.parameters()],
    )
    measure(run, ids=["r0-4"], protocol=SHORT_ADAM, **SMALL)
    assert torch.equal(run.model.snapshot(), theta)
    assert {
        path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()
    } == before
    assert [parameter.requires_grad for parameter in run.model.model.parameters()] == flags


def test_the_sample_follows_the_seed_and_does_not_depend_on_what_is_asked(run, measured):
    assert measure(run, ids=["r0-4"], protocol=SHORT_ADAM, **SMALL).sample == measured.sample
    assert len(set(measured.sample)) == 6
    samples = {
        measure(run, ids=["r0-4"], protocol=SHORT_ADAM, sample_rows=3, seed=s).sample
        for s in range(4)
    }
    assert len(samples) > 1


def test_without_heldout_rows_there_is_no_heldout_damage(run, tmp_path):
    for out in (None, tmp_path / "m.h5"):
        result = measure(run, ids=["r0-3"], protocol=SHORT_ADAM, sample_rows=2, out=out)
        assert result.heldout.shape == (1, 4, 0)
        assert np.isnan(result.heldout_damage).all()
        assert np.isfinite(result.damage).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_half_precision_adapters_move_at_the_default_rate(tmp_path, dtype):
    """Steps of 1e-4 are lost in the parameters' own type.

    The neighbours of 0.3 are 0.002 (bfloat16) or 0.0002 (float16) away. The targets are far off:
    trainings at a high rate know nothing of a row that they did not see.
    """
    model = influence.from_peft(
        add_lora(build_base("gpt2", layers=1).to(dtype)).to(dtype), build_tokenizer()
    )
    train = influence.examples_from_rows(rows(3))
    run = influence.fit(
        model, train, directory=tmp_path / "run", curvature=influence.Identity(), store="never"
    )
    recipe = Recipe(lr=0.03, epochs=30, batch_size=1, dropout=False)
    protocol = Protocol(steps=60, target="unseen", recipe=recipe)
    result = measure(run, protocol=protocol, sample_rows=2)
    going = result.target > result.start + 0.5
    assert going.any()
    rise = result.losses[going]
    first = [row[np.isfinite(row)] for row in rise]
    assert all(row[-1] - row[0] > 0.02 for row in first)
    assert all(np.unique(row).size > 5 for row in first)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("m.json", "m.json was given for measurements; they are written as HDF5"),
        ("m", "name a file that ends in .h5"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_any_work(
    run, tmp_path, monkeypatch, out, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "unlearn.difficulty.units.shared_losses", lambda *_, **__: pytest.fail("a forward ran")
    )
    with pytest.raises(InputError, match=sentence.replace(".", r"\.")):
        measure(run, protocol=SHORT_ADAM, out=out)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_one_training_row_can_be_measured(tmp_path):
    train = influence.examples_from_rows(rows(1))
    run = influence.fit(trained(train, 5), train, directory=tmp_path / "run", store="never")
    result = measure(run, protocol=SHORT_ADAM)
    assert np.isfinite(result.losses[0, :2]).all()
    assert np.isnan(result.damage).all()  # the sample is the row itself


def test_an_ascent_that_blows_up_is_told_and_not_raised(run):
    for optimizer in ("sgd", "adam"):
        result = measure(
            run, ids=["r0-0", "r0-4"], protocol=Protocol(optimizer, 1e200, steps=4), sample_rows=2
        )
        assert result.steps.shape == (2,)
        assert (np.isinf(result.steps) | (result.steps <= 1)).all()
