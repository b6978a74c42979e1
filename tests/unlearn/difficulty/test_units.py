"""Units: who is asked for, where their ascents end, which rows tell the damage."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import influence
from influence.errors import DataError, InputError, StoreError
from tests.conftest import rows, tokens_of
from tests.helpers import statuses
from tests.unlearn.difficulty.helpers import (
    ADAM,
    HOLDOUT,
    SHORT_ADAM,
    check,
    data,
    equal,
    gradient_of,
    losses_of,
    plain_loss,
    weights_of,
)
from tests.unlearn.local_oracle import expected, nearest, train_afresh
from unlearn.difficulty import Protocol, measure, predict
from unlearn.difficulty.optimizers import Adam
from unlearn.difficulty.units import find_units
from unlearn.record.version import ORIGINAL, version
from unlearn.retraining.recipe import Recipe

#: A training of few steps, whose draws a plain loop makes too.
RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=4, dropout=False, seed=3)


def unrelated(run, units, together, near_each):
    """Which units are left out together, each with its near rows: the first batch that takes it."""
    rows, n = [item.input_ids.tolist() for item in run.tokens], len(run.tokens)
    batches = []
    for unit in units:
        rest = [i for i in range(n) if i not in unit]
        near = nearest(rows, unit, rest, max(len(unit), near_each))
        for batch in batches:
            members = {i for other, _ in batch for i in other}
            theirs = members.union(*(near for _, near in batch))
            if (
                len(batch) < together
                and len(members) + len(unit) <= n / 2
                and not theirs & set(unit)
                and not members & set(near)
            ):
                batch.append((unit, near))
                break
        else:
            batches.append([(unit, near)])
    return batches


def losses_after(run, rows, whole, repeat, members):
    """Losses of some rows under a plain training on `rows`, as of `whole`."""
    model, leaves = run.model, weights_of(run.model)
    start = [w.detach().clone() for w in leaves]
    counts = [int(item.supervised.sum()) for item in run.tokens]
    for w in leaves:
        w.requires_grad_(True)

    def loss_sum(i):
        return plain_loss(model, run.tokens[i]) * counts[i]

    train_afresh(leaves, loss_sum, counts, rows, whole, RECIPE, repeat)
    found = losses_of(model, [run.tokens[i] for i in members])
    for w, values in zip(leaves, start, strict=True):
        w.requires_grad_(False)
        w.data, w.grad = values, None
    return found


def unseen_oracle(run, units, together=10, near_each=4):
    """Mean expected loss of each unit, and the batches: three plain trainings a batch.

    At most twenty rows besides the near ones, so here all that are retained.
    """
    targets, batches, n = {}, unrelated(run, units, together, near_each), len(run.tokens)
    for batch in batches:
        gone = [i for unit, _ in batch for i in unit]
        near = sorted({i for _, near in batch for i in near})
        rest = np.setdiff1d(np.arange(n), [*gone, *near])
        kept = [*near, *np.random.default_rng(0).permutation(rest).tolist()]
        now = losses_of(run.model, [run.tokens[i] for i in gone])
        before = losses_after(run, [*kept, *sorted(gone)], n, 0, gone)
        after = [losses_after(run, kept, n - len(gone), repeat, gone) for repeat in range(2)]
        found = dict(zip(gone, expected(now, before, after), strict=True))
        for unit, _ in batch:
            targets[tuple(unit)] = np.mean([found[i] for i in unit])
    return [targets[tuple(unit)] for unit in units], batches


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
        "unlearn.difficulty.units.shared_losses", lambda *_, **__: pytest.fail("a forward ran")
    )
    with pytest.raises(error, match=sentence):
        ask(run, protocol=SHORT_ADAM, **given)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """A run of the same adapter and rows, at its end alone, with its recipe on record."""
    folder = tmp_path_factory.mktemp("unseen") / "run"
    plain = influence.fit(run.model, run.train, curvature=influence.Identity(), directory=folder)
    (folder / "recipe.json").write_text(json.dumps(RECIPE.as_json()))
    return plain


def test_the_unseen_target_is_what_local_retrainings_expect_of_each_unit(plain):
    """Held-out rows are measured, and tell nothing about it."""
    protocol = Protocol("adam", 3e-3, "unseen", 6, RECIPE)
    options = {"protocol": protocol, "sample_rows": 2}
    alone = measure(plain, ids=["r0-1", "r0-6"], holdout=HOLDOUT, **options)
    targets, _ = unseen_oracle(plain, [[1], [6]])
    check(alone, plain, [[1], [6]], protocol, HOLDOUT, targets)
    group = measure(plain, groups={"both": ["r0-6", "r0-1"]}, **options)
    (target,), _ = unseen_oracle(plain, [[6, 1]])
    assert abs(target - np.mean(targets)) > 1e-6
    check(group, plain, [[6, 1]], protocol, None, [target])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "near_each", "sizes"), [(10, 4, {1, 2, 3}), (10, 1, {1, 4, 5}), (2, 1, {2})]
)
def test_units_that_are_unrelated_are_left_out_together(
    plain, monkeypatch, capsys, together, near_each, sizes
):
    monkeypatch.setattr("unlearn.difficulty.units.TOGETHER", together)
    monkeypatch.setattr("unlearn.difficulty.units.NEAR_EACH", near_each)
    units = find_units(plain, None, None, Protocol(target="unseen", recipe=RECIPE), None)
    targets, batches = unseen_oracle(plain, [[i] for i in range(10)], together, near_each)
    assert {len(batch) for batch in batches} == sizes
    np.testing.assert_allclose(units.target, targets, rtol=1e-12)
    assert f"targets by {len(batches)} local retrainings, about " in capsys.readouterr().err


def test_groups_that_share_a_row_are_not_left_out_together(plain, capsys):
    groups = {"a": ["r0-1", "r0-6"], "b": ["r0-6", "r0-4"]}
    units = find_units(plain, None, groups, Protocol(target="unseen", recipe=RECIPE), None)
    np.testing.assert_allclose(units.target, unseen_oracle(plain, [[1, 6], [6, 4]])[0], rtol=1e-12)
    # each: 2 epochs of ten rows, and twice of the eight that stay
    assert "targets by 2 local retrainings, about 104 row-gradients" in capsys.readouterr().err


def test_the_unseen_target_follows_the_recipe_that_is_recorded(plain):
    def ask(recipe):
        protocol = Protocol(target="unseen", recipe=recipe)
        return find_units(plain, ["r0-1"], None, protocol, None).target

    np.testing.assert_array_equal(ask(None), ask(RECIPE))
    assert abs(ask(None) - ask(replace(RECIPE, epochs=5))) > 1e-3


def test_a_recipe_that_teaches_the_units_too_little_is_warned_of(plain, capsys):
    find_units(plain, ["r0-1"], None, Protocol(target="unseen", recipe=RECIPE), None)
    before = capsys.readouterr().err
    weak = Protocol(target="unseen", recipe=replace(RECIPE, lr=1e-9, epochs=1))
    find_units(plain, ["r0-1"], None, weak, None)
    assert "learnt only 0% of what" in capsys.readouterr().err
    assert "learnt only 0%" not in before


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


# ---- the rate ------------------------------------------------------------------------------


def test_a_rate_by_the_stride_moves_a_share_of_the_adapters_length(run):
    """Adam's first move is lr in each of the P coordinates, SGD's lr g: of the median row."""
    units = find_units(run, None, None, Protocol(), None, sample_rows=7)
    theta = run.model.snapshot()
    norms = [float(gradient_of(run, [int(row)]).norm()) for row in units.sample]
    by_adam = units.paced(Protocol(stride=0.02))
    assert by_adam.rate == pytest.approx(0.02 * float(theta.norm()) / len(theta) ** 0.5, rel=5e-3)
    by_sgd = units.paced(Protocol("sgd", stride=0.02))
    assert by_sgd.rate == pytest.approx(0.02 * float(theta.norm()) / np.median(norms), rel=5e-3)
    assert units.paced(Protocol()).rate == units.paced(Protocol(stride=Adam.stride)).rate
    given = Protocol("sgd", 0.3)
    assert units.paced(given) is given


def test_a_rate_has_three_digits(run):
    """So a measurement that another machine resumes has the same rate, to the last bit."""
    units = find_units(run, None, None, Protocol(), None, sample_rows=3)
    for optimizer in ("adam", "sgd"):
        rate = units.paced(Protocol(optimizer, stride=0.0123456)).rate
        assert rate == float(f"{rate:.3g}")


def test_predict_and_measure_take_the_rate_of_the_stride(run):
    protocol = Protocol(stride=0.01, steps=3)
    units = find_units(run, ["r0-3"], None, protocol, None, sample_rows=5)
    rate = units.paced(protocol).rate
    for ask in (predict, measure):
        asked = ask(run, ["r0-3"], protocol=protocol, sample_rows=5)
        assert asked.protocol == Protocol(lr=rate, steps=3).record()


def test_an_adapter_without_a_gradient_has_no_stride(run):
    units = find_units(run, ["r0-3"], None, Protocol(), None, sample_rows=2)
    units.__dict__["sample_gradients"] = [torch.zeros(run.model.space.size)] * 2
    with pytest.raises(InputError, match="no rate follows from them; give one"):
        units.paced(Protocol("sgd"))


def test_unseen_targets_are_dealt_out(plain, tmp_path):
    """A local retraining by one process each: the same targets."""
    protocol = Protocol(target="unseen", recipe=RECIPE)
    groups = {"a": [plain.train.ids[1], plain.train.ids[6]], "b": [plain.train.ids[6]]}
    expected = find_units(plain, None, groups, protocol, None).target

    def work(rank: int) -> None:
        found = find_units(plain, None, groups, protocol, None).target
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    assert statuses(work, tmp_path, 2) == [0, 0]
