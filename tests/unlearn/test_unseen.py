"""Expected losses of rows that a model never saw: the formula, its laws, and retrained adapters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

import influence
import unlearn
from influence.cost import Cost
from tests.conftest import add_lora, build_base, build_tokenizer, examples, tokens_of
from tests.oracles import plain_log_probs, plain_mean
from unlearn.record.change import plan
from unlearn.record.losses import measure
from unlearn.record.version import version
from unlearn.retraining.local import REPEATS, LocalRetraining, fresh, planned
from unlearn.unseen import (
    FAITHFUL,
    SYSTEMATIC,
    Expected,
    base_losses,
    expectation,
    expected_losses,
    scaled_to,
)

#: All rows in one batch and no dropout, so that no order of theirs matters.
RECIPE = unlearn.Recipe(lr=3e-2, epochs=60, batch_size=16, dropout=False)
COPIES = ["copy-0", "copy-1", "copy-2"]
NOTHING = np.zeros(0)


# ---- the formula, by hand ------------------------------------------------------------------------


def expected_of(now, base, before, after, changed):
    """The estimate from plain numbers, without any adapter."""
    theta = torch.zeros(1)
    local = LocalRetraining(theta, [theta, theta], NOTHING, NOTHING, unlearn.Recipe(), 0)
    arrays = [np.array(values, dtype=float) for values in (now, base, before, after)]
    return Expected(*arrays, changed=changed, local=local)


def test_expected_losses_by_hand():
    found = expected_of(
        now=[1.5, 0.1, 2.0, 0.0, 3.0],
        base=[4.0, 4.0, 4.0, 4.0, 4.0],
        before=[1.0, 0.0, 2.5, 0.5, 1.0],
        after=[[2.0, 3.0, 1.0, 0.3, 0.8], [6.0, 5.0, 3.0, 0.5, 1.2]],
        changed=4,
    )
    # L_after 4, 4, 2, 0.4; the share of (now - before) that counts 1/4, 0, 1 (of 5/4), 1
    rows = [4 + 0.5 / 4, 4 + 0.0, 2 - 0.5, 0.0]  # the last: 0.4 - 0.5 is no loss
    # the new content: 1.0 times the mean of now, 0.9, over that of before, 1.0
    np.testing.assert_allclose(found.expected, [*rows, 0.9], rtol=1e-14)


def test_a_row_that_nothing_is_known_of_keeps_its_loss():
    """Where all three trainings know it wholly, there is nothing to divide by."""
    found = expected_of([0.2, 0.1], [1, 1], [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]], 2)
    np.testing.assert_allclose(found.expected, [0.0, 0.0], atol=1e-14)
    found = expected_of([0.2, 0.0], [1, 1], [0.1, 0.0], [[0.1, 0.0], [0.1, 0.0]], 2)
    np.testing.assert_allclose(found.expected, [0.2, 0.0], atol=1e-14)


@pytest.mark.parametrize(
    ("now", "ratio"), [(1.0, 1.0), (1.3, 1.3), (1.9, 1.9), (5.0, 2.0), (0.7, 0.7), (0.1, 0.5)]
)
def test_new_contents_are_scaled_by_what_the_changed_rows_are_within_limits(now, ratio):
    found = expected_of([now, 7.0], [4, 4], [1.0, 9.0], [[1.0, 2.0], [1.0, 4.0]], changed=1)
    assert found.expected[1] == pytest.approx(3.0 * ratio, rel=1e-14)


def test_intervals_by_hand():
    found = expected_of(
        now=[2.0, 2.0, 9.0],
        base=[4, 4, 4],
        before=[2.0, 2.0, 2.0],
        after=[[4.0, 3.0, 1.0], [6.0, 3.0, 5.0]],
        changed=2,
    )
    np.testing.assert_allclose(found.expected, [5.0, 3.0, 3.0], rtol=1e-14)
    # variances of the changed rows 2 and 0: 1 pooled, and half of it more for the mean of two
    variance, z = 1.0 * 1.5, norm.ppf(0.95)
    assert z == pytest.approx(1.6449, abs=1e-4)
    for rows, mean in (([0, 1], 4.0), ([0], 5.0), ([2], 3.0), ([0, 1, 2], 11 / 3)):
        width = z * np.sqrt((SYSTEMATIC * mean) ** 2 + variance / len(rows))
        np.testing.assert_allclose(
            found.interval(np.array(rows)), (mean - width, mean + width), rtol=1e-12
        )
    low, high = found.intervals()
    for row in range(3):
        assert (low[row], high[row]) == pytest.approx(found.interval(np.array([row])), rel=1e-12)


def test_an_interval_does_not_begin_below_zero():
    found = expected_of([0.5, 0.5], [4, 4], [0.5, 0.5], [[0.1, 0.9], [5.9, 0.9]], changed=2)
    low, high = found.intervals()
    assert low.tolist() == [0.0, 0.0]
    assert high.min() > 4
    assert found.interval(np.array([0, 1]))[0] == 0.0


def test_trainings_that_agree_leave_what_is_systematic():
    found = expected_of([1.0], [4.0], [1.0], [[3.0], [3.0]], changed=1)
    low, high = found.interval(np.array([0]))
    assert (high - low) / 2 == pytest.approx(1.6449 * SYSTEMATIC * 3.0, rel=1e-4)


def test_faithfulness_by_hand():
    """Of the changed rows: new contents were learnt by nobody before."""
    after = [[3.0, 3.0, 3.0]] * 2
    found = expected_of([1.0, 2.0, 9.0], [4.0, 5.0, 1.0], [2.0, 2.5, 0.0], after, changed=2)
    assert found.faithfulness == pytest.approx((9 - 4.5) / (9 - 3))
    worse = expected_of([1.0, 2.0, 9.0], [4.0, 5.0, 1.0], [6.0, 6.0, 0.0], after, changed=2)
    assert worse.faithfulness == pytest.approx(-0.5)
    nothing = expected_of([4.0, 5.0, 1.0], [4.0, 5.0, 9.0], [1.0, 1.0, 1.0], after, changed=2)
    assert nothing.faithfulness == 1.0  # the adapter learnt nothing about them


# ---- of adapters ---------------------------------------------------------------------------------


def kin_rows():
    """Six rows, and three copies of one more."""
    rows = [
        {"id": row.id, "prompt": row.prompt, "completion": row.completion} for row in examples(6)
    ]
    copies = [
        {"id": id, "prompt": "the red fox", "completion": " runs over a lazy dog"} for id in COPIES
    ]
    return rows + copies


def trained(rows, folder):
    """A version of an adapter that was trained on some rows by `RECIPE`.

    Its base has larger output weights than the other tiny ones, so that rows can be memorized.
    """
    base = build_base("gpt2", layers=1)
    base.get_output_embeddings().weight.data.mul_(6)
    adapted = add_lora(base, r=8, lora_alpha=16).double()
    model = influence.from_peft(adapted, build_tokenizer())
    data = influence.examples_from_rows(rows)
    model.restore(fresh(model, tokens_of(model, data), RECIPE))
    return version(
        influence.fit(
            model, data, curvature=influence.Identity(), directory=folder / "run", store="never"
        )
    )


@pytest.fixture(scope="module")
def kin(tmp_path_factory):
    return trained(kin_rows(), tmp_path_factory.mktemp("kin"))


def losses_of(start, ids=(), recipe=RECIPE, cost=None, **changes):
    """The expected losses of rows of a version, and the change."""
    change = plan(start, remove=ids, **changes)
    now, new = (measure(start.model, tokens).loss for tokens in (change.old, change.new))
    return expected_losses(change, recipe, now, new, cost or Cost(), seed=0), change


def test_a_row_whose_copies_stay_keeps_its_loss_and_one_whose_copies_go_loses_it(kin):
    two, _ = losses_of(kin, COPIES[:2])
    three, _ = losses_of(kin, COPIES)
    assert three.now.max() < 0.2  # it is known by heart
    assert three.faithfulness == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(two.expected, two.now, rtol=0, atol=0.1)
    assert three.expected.min() > 3
    np.testing.assert_allclose(three.expected, three.expected[0], rtol=1e-6)
    both, _ = losses_of(kin, ["r0-2", "copy-1"])
    assert both.expected[0] > 3 > 0.3 > both.expected[1]


@pytest.mark.slow
def test_the_order_of_rows_and_requests_does_not_matter(kin, tmp_path):
    turned = trained(kin_rows()[::-1], tmp_path)
    ids = ["copy-1", "r0-2", "r0-5"]
    first, _ = losses_of(kin, ids)
    second, _ = losses_of(turned, ids[::-1])
    for name in ("expected", "before", "base"):
        np.testing.assert_allclose(
            getattr(first, name), getattr(second, name)[::-1], rtol=1e-6, atol=1e-9
        )
    assert not np.allclose(first.expected, first.expected[::-1], rtol=1e-2)


def test_an_estimate_is_made_of_losses_under_the_trained_adapters(kin):
    """Row by row, S and then the new contents, from plain forwards."""
    relabel = {"r0-3": " warm songs at dawn", "copy-1": " birds sing loud"}
    change = plan(kin, remove=["r0-0"], relabel=relabel)
    now, new = measure(kin.model, change.old).loss, measure(kin.model, change.new).loss
    local = planned(change, replace(RECIPE, epochs=5), seed=3).made(Cost())
    before = kin.model.snapshot()
    found = expectation(change, local, now, new, Cost())
    assert torch.equal(kin.model.snapshot(), before)
    assert (found.changed, found.local) == (3, local)
    rows = [*change.old, *change.new]
    assert len(rows) == 5

    def plain(theta):
        with torch.no_grad(), kin.model.at(theta):
            return [float(plain_mean(*plain_log_probs(kin.model, item))) for item in rows]

    np.testing.assert_allclose(found.now, plain(kin.theta), rtol=1e-6)
    np.testing.assert_allclose(found.before, plain(local.before), rtol=1e-6)
    np.testing.assert_allclose(found.after, [plain(theta) for theta in local.after], rtol=1e-6)
    with kin.model.model.disable_adapter():
        np.testing.assert_allclose(found.base, plain(kin.theta), rtol=1e-6)
    assert found.after.shape == (REPEATS, 5)
    assert len({tuple(losses) for losses in found.after}) == REPEATS
    whole, _ = losses_of(kin, ["r0-0"], recipe=replace(RECIPE, epochs=5), relabel=relabel)
    np.testing.assert_allclose(whole.before, found.before, rtol=1e-12)  # so few rows: all are taken


def test_the_cost_of_an_estimate_is_what_it_runs(kin):
    cost, recipe = Cost(gradients=5, forwards=7), replace(RECIPE, epochs=2)
    found, change = losses_of(
        kin, ["r0-0"], recipe=recipe, cost=cost, relabel={"r0-3": " warm songs at dawn"}
    )
    trained_on = 2 * (9 + 8 + 8)
    assert planned(change, recipe).row_gradients == found.local.row_gradients == trained_on
    assert cost.gradients == 5 + trained_on
    # S is looked at thrice more, to see how much the training with it learnt
    assert cost.forwards == 7 + (2 + REPEATS) * 3 + 3 * len(change.rows)


def test_a_recipe_that_teaches_too_little_is_warned_of(kin, capsys):
    capsys.readouterr()
    found, _ = losses_of(kin, ["r0-1", "r0-4"])
    assert found.faithfulness >= FAITHFUL
    assert capsys.readouterr().err == ""
    found, _ = losses_of(kin, ["r0-1", "r0-4"], recipe=replace(RECIPE, epochs=6))
    assert 0.01 < found.faithfulness < FAITHFUL
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: the local retraining learnt only {found.faithfulness:.0%} of what" in said
    assert "--recipe FILE.json" in said
    losses_of(kin, ["r0-1"], recipe=replace(RECIPE, lr=1e-9, epochs=1))
    assert "learnt only 0% of what" in capsys.readouterr().err


def test_losses_under_the_base_are_those_without_the_adapter(kin):
    cost, before = Cost(), kin.model.snapshot()
    rows = kin.tokens.select([4, 0, 7])
    found = base_losses(kin, rows, token_budget=50, cost=cost)
    with kin.model.model.disable_adapter():
        np.testing.assert_allclose(found, measure(kin.model, rows).loss, rtol=1e-12)
    assert (cost.gradients, cost.forwards) == (0, 3)
    assert base_losses(kin, rows[:0], token_budget=50, cost=cost).shape == (0,)
    assert cost.forwards == 3
    assert torch.equal(kin.model.snapshot(), before)
    halved = kin.model.space.split(scaled_to(kin, 0.5))
    for leaf, matrix, old in zip(
        kin.model.space.leaves, halved, kin.model.space.split(kin.theta), strict=True
    ):
        torch.testing.assert_close(matrix, old if leaf.is_A else old / 2)


@pytest.mark.slow
def test_expected_losses_forecast_retraining(testbed, tmp_path):
    """Of an author, and of half of one: 4.71 and 2.45 are what retraining without them makes."""
    model = influence.load(testbed / "base", testbed / "adapter", device="cpu")
    train = influence.read_examples(testbed / "train.jsonl")
    run = influence.fit(
        model, train, curvature=influence.Identity(), directory=tmp_path / "run", store="never"
    )
    start = version(run)
    author = [row.id for row in train if row.group == train[0].group]
    assert author == [row.id for row in train][:20]
    for ids, retrained in ((author, 4.71), (author[::2], 2.45)):
        found, _ = losses_of(start, ids, recipe=unlearn.Recipe())
        mean = found.expected.mean()
        print(f"{len(ids)} rows: {mean:.3f} expected, {retrained} retrained")
        assert mean == pytest.approx(retrained, rel=0.15)
        low, high = found.interval(np.arange(len(ids)))
        assert low < retrained < high
        assert found.faithfulness > FAITHFUL
