"""What the model would lose without some rows, by small trainings, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

import influence
import unlearn
from influence.errors import InputError
from tests.conftest import rows, tokens_of
from tests.unlearn.difficulty.helpers import data, losses_of, plain_loss, trained, weights_of
from tests.unlearn.local_oracle import expected, nearest, train_afresh
from unlearn.retraining import local
from unlearn.retraining.recipe import Recipe

#: A training of few steps, whose draws a plain loop makes too.
RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=4, dropout=False, seed=3)
QUERIES = influence.examples_from_rows(rows(3, seed=1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Ten rows under the identity, in float64."""
    train = influence.examples_from_rows(data())
    folder = tmp_path_factory.mktemp("by-training") / "run"
    return influence.fit(trained(train), train, curvature=influence.Identity(), directory=folder)


def losses_after(run, rows_seen, whole, repeat, asked):
    """Mean losses of the tokens `asked` under a plain training on some rows, as of `whole`."""
    leaves, counts = weights_of(run.model), run.tokens.counts
    start = [w.detach().clone() for w in leaves]
    for w in leaves:
        w.requires_grad_(True)

    def loss_sum(i):
        return plain_loss(run.model, run.tokens[i]) * int(counts[i])

    train_afresh(leaves, loss_sum, counts.tolist(), rows_seen, whole, RECIPE, repeat)
    found = losses_of(run.model, asked)
    for w, values in zip(leaves, start, strict=True):
        w.requires_grad_(False)
        w.data, w.grad = values, None
    return found


def test_expected_losses_are_those_of_plain_trainings(plain, monkeypatch):
    """Two near rows; of the others two, drawn."""
    monkeypatch.setattr(local, "FEWEST_NEAR", 1)
    monkeypatch.setattr(local, "OTHERS", 2)
    run, gone = plain, [1, 6]
    found = unlearn.without(run, [run.train.ids[i] for i in gone], QUERIES, recipe=RECIPE)
    tokens = [item.input_ids.tolist() for item in run.tokens]
    asked = tokens_of(run.model, QUERIES)
    rest = [i for i in range(10) if i not in gone]
    near = nearest(tokens, gone, rest, 2)
    others = np.setdiff1d(rest, sorted(near))
    kept = [*near, *np.random.default_rng(0).permutation(others)[:2].tolist()]
    for name, items in (("removed", [run.tokens[i] for i in gone]), ("queries", asked)):
        now = losses_of(run.model, items)
        before = losses_after(run, [*kept, *gone], 10, 0, items)
        after = [losses_after(run, kept, 8, repeat, items) for repeat in range(2)]
        predictions = getattr(found, name)
        wanted = expected(now, before, after)
        np.testing.assert_allclose([each.predicted for each in predictions], wanted, rtol=1e-8)
        np.testing.assert_allclose([each.before for each in predictions], now, rtol=1e-10)
        for each in predictions:
            assert each.low <= each.predicted <= each.high
    assert [each.id for each in found.queries] == QUERIES.ids
    assert [each.id for each in found.removed] == [run.train.ids[i] for i in gone]
    assert found.attributes["near"] == len(near)
    trained_on = 2 * (len(kept) + 2 + 2 * len(kept))
    assert found.attributes["row_gradients"] == pytest.approx(trained_on + (5 * 5 + 3 * 2) / 3)


def test_without_queries_it_is_what_an_edit_expects(plain):
    """The same trainings, near rows and formula as of `unlearn.unseen`, and the same intervals."""
    from influence.cost import Cost
    from unlearn.record.change import plan
    from unlearn.record.version import version
    from unlearn.unseen import expected_losses

    ids = [plain.train.ids[i] for i in (2, 5)]
    found = unlearn.without(plain, ids, recipe=RECIPE)
    now = np.array([each.before for each in found.removed])
    change = plan(version(plain, "original"), ids)
    edit = expected_losses(change, RECIPE, now, np.zeros(0), Cost(), seed=0)
    low, high = edit.intervals()
    for name, wanted in (("predicted", edit.expected), ("low", low), ("high", high)):
        np.testing.assert_allclose(
            [getattr(each, name) for each in found.removed], wanted, rtol=1e-12
        )
    assert found.attributes["faithfulness"] == pytest.approx(edit.faithfulness)
    assert found.queries == ()


def test_the_model_is_afterwards_what_it_was(plain):
    before = plain.model.snapshot()
    unlearn.without(plain, [plain.train.ids[0]], QUERIES, recipe=RECIPE)
    assert (plain.model.snapshot() == before).all()


def test_rows_that_cannot_be_asked_about_are_refused(plain):
    for ids, sentence in (
        (["nobody"], "1 are no training row's .nobody."),
        ([], "no rows were named"),
        (plain.train.ids, "every training row was named"),
    ):
        with pytest.raises(InputError, match=sentence):
            unlearn.without(plain, ids, recipe=RECIPE)
