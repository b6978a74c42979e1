"""Units: who is asked for, where their ascents end, which rows tell the damage."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import influence
from influence.errors import DataError, InputError, StoreError
from tests.conftest import rows, tokens_of
from tests.unlearn.difficulty.helpers import (
    ADAM,
    HOLDOUT,
    SHORT_ADAM,
    base_loss,
    check,
    data,
    equal,
    losses_of,
    plain_loss,
    weights_of,
)
from unlearn.difficulty import Protocol, measure, predict
from unlearn.difficulty.units import find_units
from unlearn.record.version import ORIGINAL, version


def unseen_oracle(run, removed, holdout=None) -> float:
    """The formula of `unlearn.unseen` by plain gradient products: identity curvature, lambda 1."""
    model, leaves = run.model, weights_of(run.model)
    gradients = []
    for item in run.tokens:
        for w in leaves:
            w.requires_grad_(True)
        loss = plain_loss(model, item) * int(item.supervised.sum())
        gradients.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, leaves)]))
        for w in leaves:
            w.requires_grad_(False)
    # the rows' weights, 1 / N_tok each, cancel
    products = (torch.stack(gradients) @ torch.stack(gradients).T).numpy()
    kept = [i for i in range(len(run.tokens)) if i not in removed]
    rho = 1.2
    if holdout is not None:
        items = list(tokens_of(model, holdout))
        rho = np.clip(
            losses_of(model, items).mean() / np.mean([base_loss(model, item) for item in items]),
            1,
            2,
        )
    expected = []
    for i in removed:
        excess = np.maximum(0, products[i] - np.median(products[i, kept])) ** 1.25
        now, base = losses_of(model, [run.tokens[i]])[0], base_loss(model, run.tokens[i])
        expected.append(now + max(0, rho * base - now) * excess[removed].sum() / excess.sum())
    return float(np.mean(expected))


def test_many_heldout_rows_are_thinned_evenly(run):
    many = influence.examples_from_rows(rows(40, seed=8))
    result = measure(run, ids=["r0-3"], protocol=SHORT_ADAM, sample_rows=2, holdout=many)
    assert result.heldout.shape == (1, 4, 16)
    all_losses = losses_of(run.model, tokens_of(run.model, many))
    np.testing.assert_allclose(result.heldout_before[[0, -1]], all_losses[[0, -1]])


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"ids": []}, InputError, "no row was given: name at least one"),
        ({"groups": {}}, InputError, "no row was given: name at least one"),
        (
            {"ids": "r0-1"},
            InputError,
            "ids 'r0-1' were given as one string; expected a list, as in \\['r0-1'\\]",
        ),
        (
            {"ids": ["r0-1", "r0-2", "r0-1"]},
            InputError,
            "ids are given more than once: 'r0-1'; name each row once",
        ),
        (
            {"ids": ["r0-1"], "groups": {"a": ["r0-1"]}},
            InputError,
            "ids and groups were given together",
        ),
        (
            {"groups": {"a": []}},
            InputError,
            "group 'a' is \\[\\]; expected a list of different ids, at least one",
        ),
        ({"groups": {"a": "r0-1"}}, InputError, "group 'a' is 'r0-1'; expected a list"),
        ({"groups": {"a": ["r0-1", "r0-1"]}}, InputError, "expected a list of different ids"),
        ({"ids": ["r0-77"]}, DataError, "no example has the id 'r0-77', among 10; the nearest are"),
        ({"groups": {"a": ["nobody"]}}, DataError, "no example has the id 'nobody'"),
        ({"sample_rows": 0}, InputError, "sample_rows 0 was given; expected at least 1"),
        (
            {"holdout": influence.examples_from_rows(rows(3))},
            InputError,
            "3 held-out rows are training rows",
        ),
        ({"holdout": influence.Examples()}, InputError, "the held-out file has no rows"),
    ],
)
@pytest.mark.parametrize("ask", [measure, predict])
def test_wrong_requests_are_refused_before_any_work(
    run, tmp_path, monkeypatch, ask, given, error, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "unlearn.difficulty.units.mean_losses", lambda *_, **__: pytest.fail("a forward ran")
    )
    with pytest.raises(error, match=sentence):
        ask(run, protocol=SHORT_ADAM, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [3, 9])
def test_the_unseen_target_is_the_estimate_of_each_unit_alone(run, tmp_path, count):
    plain = influence.fit(
        run.model, run.train, curvature=influence.Identity(), directory=tmp_path / "run"
    )
    holdout = influence.examples_from_rows(rows(count, seed=7))
    protocol = Protocol("adam", 3e-3, "unseen", 6)
    options = {"protocol": protocol, "holdout": holdout, "sample_rows": 2}
    enough = holdout if count >= 8 else None
    alone = measure(plain, ids=["r0-1", "r0-6"], **options)
    targets = [unseen_oracle(plain, [1], enough), unseen_oracle(plain, [6], enough)]
    check(alone, plain, [[1], [6]], protocol, holdout, targets)
    group = measure(plain, groups={"both": ["r0-1", "r0-6"]}, **options)
    target = unseen_oracle(plain, [1, 6], enough)
    assert abs(target - np.mean(targets)) > 1e-6
    check(group, plain, [[1, 6]], protocol, holdout, [target])


def test_a_group_of_all_rows_has_no_unseen_target(run):
    everyone = {"all": run.train.ids}
    with pytest.raises(InputError, match=r"'all' holds every training row.*take the target base"):
        measure(run, groups=everyone, protocol=Protocol(target="unseen"))
    assert len(find_units(run, None, everyone, Protocol(), None)) == 1


@pytest.fixture(scope="module")
def damaged(run, tmp_path_factory):
    """A run whose audit chain is no chain, beside the forecast and the measurement from before."""
    directory = tmp_path_factory.mktemp("damaged") / "run"
    sound = influence.fit(
        run.model, run.train, curvature=influence.Identity(), path=(1.0,), directory=directory
    )
    options = {"ids": ["r0-3", "r0-1"], "sample_rows": 2}
    before = {
        holdout: (
            predict(sound, protocol=ADAM, holdout=holdout, **options).table,
            measure(sound, protocol=SHORT_ADAM, holdout=holdout, **options),
        )
        for holdout in (None, HOLDOUT)
    }
    (directory / "audit.jsonl").write_text("this is no line of a chain\n")
    with pytest.raises(StoreError):
        version(sound, ORIGINAL)
    return sound, options, before


@pytest.mark.parametrize("holdout", [None, HOLDOUT], ids=["alone", "with held-out rows"])
def test_a_damaged_audit_chain_is_no_matter_to_the_target_base(damaged, holdout):
    """Whether held-out rows were trained on is a question to the rows' hashes alone."""
    run, options, before = damaged
    table, measured = before[holdout]
    again = predict(run, protocol=ADAM, holdout=holdout, **options).table
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    equal(measure(run, protocol=SHORT_ADAM, holdout=holdout, **options), measured)
    for ask in (predict, measure):  # a change is planned from a version, which the chain tells
        with pytest.raises(StoreError):
            ask(run, protocol=Protocol(target="unseen"), holdout=holdout, **options)


@pytest.mark.parametrize(
    ("holdout", "sentence"),
    [
        (data()[3:5], "2 held-out rows are training rows"),
        ([data()[2] | {"id": "another"}], "1 held-out rows are training rows"),
        ([], "the held-out file has no rows: give some, or leave it out"),
    ],
)
def test_held_out_rows_are_refused_by_their_contents_alone(damaged, holdout, sentence):
    run, options, _ = damaged
    examples = influence.examples_from_rows(holdout) if holdout else influence.Examples()
    for ask in (predict, measure):
        with pytest.raises(InputError, match=sentence):
            ask(run, holdout=examples, **options)


def test_units_can_be_selected(run):
    units = find_units(run, None, None, Protocol(), None, sample_rows=6)
    some = units.select(np.array([4, 1]))
    assert some.names == ("r0-4", "r0-1")
    assert [rows_.tolist() for rows_ in some.members] == [[4], [1]]
    for name in ("loss", "base_loss", "target", "excluded"):
        np.testing.assert_array_equal(getattr(some, name), getattr(units, name)[[4, 1]])
    np.testing.assert_array_equal(some.sample, units.sample)


def test_units_that_were_found_before_are_measured_and_forecast_as_they_are(run):
    options = {"protocol": SHORT_ADAM, "sample_rows": 2, "holdout": HOLDOUT}
    units = find_units(run, ["r0-3"], None, SHORT_ADAM, HOLDOUT, sample_rows=2)
    equal(
        measure(run, protocol=SHORT_ADAM, holdout=HOLDOUT, units=units),
        measure(run, ids=["r0-3"], **options),
    )
    pd.testing.assert_frame_equal(
        predict(run, protocol=SHORT_ADAM, units=units).table,
        predict(run, ids=["r0-3"], **options).table,
        check_exact=True,
    )
