"""Expected losses of rows that a model never saw: laws that they keep, and retrained adapters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

import influence
import unlearn.unseen as unseen
from influence.cost import Cost
from tests.conftest import examples, fit_end, tokens_of
from unlearn.record.change import plan
from unlearn.record.losses import measure
from unlearn.record.version import version
from unlearn.unseen import candidates, expected_losses, removed_shares


def fitted(model, folder, rows, **options):
    data = influence.examples_from_rows(rows)
    return fit_end(model, data, curvature=influence.EKFAC(), directory=folder / "run", **options)


@pytest.fixture(scope="module")
def kin(small, tmp_path_factory):
    """Six rows of the same kind as each other, and three copies of one more."""
    rows = [
        {"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in examples(6)
    ]
    copies = [
        {"id": f"copy-{i}", "prompt": "the red fox", "completion": " runs over a lazy dog"}
        for i in range(3)
    ]
    return fitted(small, tmp_path_factory.mktemp("kin"), rows + copies)


def expected_of(run, ids):
    change = plan(version(run), remove=ids)
    losses = measure(run.model, change.old).loss
    return expected_losses(change, losses, None, None, Cost())


def test_shares_are_in_zero_to_one_and_fall_where_a_copy_stays(kin):
    all_rows = [expected_of(kin, [id]) for id in kin.train.ids]
    values = np.concatenate([expected.shares for expected in all_rows])
    assert ((values >= 0) & (values <= 1)).all()
    alone, two = expected_of(kin, ["copy-0"]), expected_of(kin, ["copy-0", "copy-1"])
    three = expected_of(kin, ["copy-0", "copy-1", "copy-2"])
    assert alone.shares[0] < 0.45
    assert alone.shares[0] < two.shares[0] < three.shares[0]
    assert three.shares.min() > 0.8
    np.testing.assert_allclose(three.shares, three.shares[0], rtol=1e-8)
    assert (three.expected >= three.now - 1e-12).all()


def test_nothing_else_teaching_a_row_means_a_share_of_one(small, tmp_path):
    """All rows but two go: what the others teach them cannot be told from what is usual."""
    run = fitted(
        small,
        tmp_path,
        [{"id": str(i), "prompt": "the", "completion": " " + w} for i, w in enumerate("ab")],
    )
    expected = expected_of(run, ["0"])
    assert expected.shares[0] == 1
    np.testing.assert_allclose(
        expected.expected, np.maximum(expected.now, unseen.UNSEEN * expected.base), rtol=1e-12
    )


def test_shares_do_not_depend_on_the_order_of_the_rows_or_requests(kin, small, tmp_path):
    rows = [{"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in kin.train]
    turned = fitted(small, tmp_path, rows[::-1])
    ids = ["copy-1", "r0-2", "r0-5"]
    first = dict(zip(ids, expected_of(kin, ids).expected, strict=True))
    second = dict(zip(ids[::-1], expected_of(turned, ids[::-1]).expected, strict=True))
    for id in ids:
        assert first[id] == pytest.approx(second[id], rel=1e-8)


def test_the_base_losses_of_an_estimate_are_those_without_the_adapter(kin):
    expected = expected_of(kin, ["r0-1", "copy-2"])
    change = plan(version(kin), remove=["r0-1", "copy-2"])
    with kin.model.model.disable_adapter():
        np.testing.assert_allclose(expected.base, measure(kin.model, change.old).loss, rtol=1e-12)


def test_held_out_rows_tell_how_much_worse_than_the_base_an_unseen_row_is(kin):
    holdout = tokens_of(kin.model, examples(9, seed=8))
    change = plan(version(kin), remove=["r0-1"])
    losses = measure(kin.model, change.old).loss
    holdout_losses = measure(kin.model, holdout).loss
    expected = expected_losses(change, losses, holdout, holdout_losses, Cost())
    with kin.model.model.disable_adapter():
        base = measure(kin.model, holdout).loss.mean()
    assert expected.rho == pytest.approx(np.clip(holdout_losses.mean() / base, 1, unseen.LARGEST))
    few = expected_losses(change, losses, holdout[:5], holdout_losses[:5], Cost())  # too few
    assert few.rho == unseen.UNSEEN


@pytest.mark.slow
def test_expected_losses_forecast_retraining(testbed, tmp_path):
    """Against adapters retrained without random halves of the rows, and without one author."""
    model = influence.load(testbed / "base", testbed / "adapter")
    train = influence.read_examples(testbed / "train.jsonl")
    run = influence.fit(model, train, directory=tmp_path / "run")
    truth = np.load(testbed / "truth.npz", allow_pickle=False)
    masks, measured, start = truth["masks"][:16], truth["train_loss"][:16], version(run)
    now = measure(model, start.tokens).loss
    total, count, exact = np.zeros(len(train)), np.zeros(len(train)), np.zeros(len(train))
    for mask, losses in zip(masks, measured, strict=True):
        out = np.flatnonzero(~mask)
        change = plan(start, remove=[train.ids[i] for i in out])
        expected = expected_losses(change, now[out], None, None, Cost())
        total[out] += expected.expected
        exact[out] += losses[out]
        count[out] += 1
    forecast, truth_of_row = total / count, exact / count
    assert spearmanr(forecast, truth_of_row).statistic >= 0.6
    assert forecast.mean() == pytest.approx(truth_of_row.mean(), rel=0.25)
    author = [row.id for row in train if row.group == train[0].group]
    assert len(author) == 20
    change = plan(start, remove=author)
    expected = expected_losses(change, now[change.rows], None, None, Cost())
    assert expected.expected.mean() == pytest.approx(4.82, rel=0.1)


# ---- larger sets of rows -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups(small, tmp_path_factory):
    """Forty rows in groups of five."""
    rows = [
        {"id": row.id, "prompt": row.prompt, "completion": row.completion, "group": f"g{i // 5}"}
        for i, row in enumerate(examples(40))
    ]
    return fitted(small, tmp_path_factory.mktemp("groups"), rows)


def test_candidates_are_relatives_and_as_many_others(groups, monkeypatch):
    monkeypatch.setattr(unseen, "CANDIDATES", 16)
    change = plan(version(groups), remove=["r0-0", "r0-1", "r0-5"])
    rows, ordinary = candidates(change)
    mates = {2, 3, 4, 6, 7, 8, 9}  # the rest of both groups, and one more by its text
    assert len(rows) == len(set(rows.tolist())) == 16
    assert ordinary.sum() == 8
    assert mates < set(rows[~ordinary].tolist())
    assert not {0, 1, 5} & set(rows.tolist())
    monkeypatch.setattr(unseen, "CANDIDATES", 37)
    rows, ordinary = candidates(change)
    assert rows.tolist() == change.rest.tolist()
    assert ordinary.all()


def test_where_relatives_are_few_the_most_similar_text_fills_up(kin, monkeypatch):
    monkeypatch.setattr(unseen, "CANDIDATES", 4)
    rows, ordinary = candidates(plan(version(kin), remove=["copy-0"]))
    assert rows[~ordinary].tolist() == [kin.train.index("copy-1"), kin.train.index("copy-2")]


def test_rows_that_are_not_solved_get_the_mean_share_of_the_others(groups, monkeypatch):
    change = plan(version(groups), remove=[f"r0-{i}" for i in range(20)])
    whole = removed_shares(change, Cost())
    assert len(set(np.round(whole, 12))) == 20
    monkeypatch.setattr(unseen, "HELD_BYTES", 0)  # the fewest: 8 rows, evenly spaced
    some = removed_shares(change, Cost())
    solved = np.isclose(some, whole, rtol=1e-8)
    assert solved.sum() == unseen.FEWEST
    np.testing.assert_allclose(some[~solved], whole[solved].mean(), rtol=1e-8)


def test_the_cost_of_an_estimate_is_what_it_runs(groups):
    """The run has its gradients stored, so new contents are all that is run backward."""
    cost = Cost()
    change = plan(version(groups), remove=["r0-0"], relabel={"r0-9": " warm songs at dawn"})
    expected_losses(change, measure(groups.model, change.old).loss, None, None, cost)
    assert (cost.gradients, cost.forwards) == (1, 3)
