"""What rows do to one another: against refitted ridge regressions, and lists by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from analysis.cleaning.opposition import (
    Pull,
    doubtful,
    effects_of,
    harms,
    kin,
    mates,
    pulls,
    share_against,
    telling,
    unusual,
)
from analysis.cleaning.texts import Nearest, Said, said
from influence.kernel import WholeInverse
from influence.memory import bounded
from influence.rows import Example, Examples
from tests.influence.test_credit import Ridge


def test_an_effect_on_another_row_is_the_change_when_it_is_left_out():
    """In a ridge regression exactly: row j's loss changes by its slope times the move."""
    bed, counts = Ridge(), np.arange(1, 12)
    others = np.array([1, 4, 9])
    for row in (0, 5):
        move = bed.refitted([row]) - bed.theta
        slopes = (bed.x[others] @ bed.theta - bed.y[others])[:, None] * bed.x[others]
        np.testing.assert_allclose(
            effects_of(bed.credit, counts, np.array([row]))[0, others],
            slopes @ move / counts[others],
            rtol=1e-10,
        )


def test_pulls_name_the_mates_that_are_opposed_most():
    bed, counts = Ridge(), np.ones(11)
    compared = [np.setdiff1d(np.arange(11), [row]) for row in range(11)]
    compared[3] = np.array([], int)
    pull = pulls(bed.credit, counts, compared)
    for row in (0, 7):
        effects = effects_of(bed.credit, counts, np.array([row]))[0, compared[row]]
        assert pull.against[row] == pytest.approx(-effects[effects < 0].sum() / abs(effects).sum())
        assert pull.gains[row] == pytest.approx(-effects.mean())
        assert pull.opposed[row][0] == compared[row][effects.argmin()]
        assert pull.shares[row][0] == pytest.approx(-effects.min() / abs(effects).sum())
    assert pull.against[3] == 0
    assert pull.opposed[3] == []


class Asked(WholeInverse):
    """An inverse that counts how often it is multiplied with, as each time costs a whole file."""

    times = 0

    def apply(self, values):
        Asked.times += 1
        return super().apply(values)


def test_rows_are_looked_at_together_as_far_as_memory_goes():
    bed, counts = Ridge(n=40), np.ones(40)
    credit = replace(bed.credit, kernels=[Asked(bed.credit.inverses[0].values)])
    compared = [np.setdiff1d(np.arange(40), [row]) for row in range(40)]
    whole, Asked.times = pulls(credit, counts, compared), 0
    assert pulls(credit, counts, compared).opposed == whole.opposed
    assert Asked.times == 1
    with bounded(memory=16 * 3 * 8 * 40 * 7 / 1e9):  # a block of seven rows
        parts = pulls(credit, counts, compared)
    assert Asked.times == 1 + 6
    assert parts.opposed == whole.opposed
    np.testing.assert_allclose(parts.against, whole.against, rtol=1e-12)


def test_the_share_that_is_against_by_hand():
    effects = np.array([[1.0, -1, 0, 2], [-3.0, -1, 0, 2]])
    assert share_against(effects).tolist() == [0.75, 1, 0, 0]


# ---- good rows -----------------------------------------------------------------------------------


def test_rows_that_harm_the_good_rows_of_their_kind():
    scores = np.array([[0.1, -0.3, -9.0], [0.2, -0.1, -9.0], [-5.0, 0.05, 0.4]])
    compared = [np.array([0, 1]), np.array([0, 1, 2]), np.array([2])]
    found = harms(scores, compared, ["a", "b", "c"])
    assert [each.row for each in found.findings] == [1]
    (each,) = found.findings
    assert found.scores == pytest.approx([-0.15, 0.35 / 3, -0.4])
    assert each.gain == each.score == pytest.approx(0.35 / 3)
    assert each.suggested == "remove"
    assert "'a', which would gain 0.3 nats" in each.evidence


def test_good_rows_of_a_row_s_group_else_the_nearest():
    rows = Examples(
        [
            Example("r0", group="g", prompt="far away", completion="x"),
            Example("r1", prompt="the red fox runs over a lazy dog", completion="yes"),
            Example("r3", group="g", prompt="farther", completion="x"),
            Example("r2", group="lonely", prompt="birds sing loud songs at dawn", completion="no"),
        ]
    )
    queries = Examples(
        [
            *(Example(f"q{i}", prompt=f"filler text number {i}", completion="z") for i in range(5)),
            Example("q5", group="g", prompt="other", completion="x"),
            Example("q6", prompt="a red fox runs over the lazy dog", completion="yes"),
        ]
    )
    texts, asked = ([said(row, str) for row in part] for part in (rows, queries))
    first, second, same, third = kin(rows, queries, texts, asked)
    assert first.tolist() == [5]
    assert first is same  # so that n rows of a group do not hold n arrays
    assert second[0] == 6
    assert len(second) == len(third) == 5


# ---- rows of a kind ------------------------------------------------------------------------------


def test_mates_are_the_group_else_the_nearest():
    near = Nearest(np.array([[3, 1], [0, 2], [4, 3], [2, 0], [1, 0]]), np.ones((5, 2)))
    compared = mates(["a", "a", None, "b", "a"], near)
    assert [each.tolist() for each in compared] == [[1, 4], [0, 4], [3, 4], [0, 2], [0, 1]]


def test_of_a_large_group_the_nearest():
    near = Nearest(np.array([[9, 5]] * 10), np.ones((10, 2)))
    compared = mates(["a"] * 10, near, most=4)
    assert compared[0].tolist() == [1, 2, 5, 9]
    assert all(len(each) == 4 for each in compared)


def all_mates(groups, near, most):
    """The mates of rows of large groups by a look at all rows of the group."""
    for row, group in enumerate(groups):
        nearest = [int(each) for each in near.rows[row] if groups[each] == group]
        others = [at for at in range(len(groups)) if groups[at] == group and at != row]
        rest = sorted((at for at in others if at not in nearest), key=lambda at: abs(at - row))
        yield sorted([*nearest, *rest][:most])


@pytest.mark.parametrize("most", [3, 8, 12])
def test_mates_of_large_groups_are_those_of_all_its_rows(most):
    rng = np.random.default_rng(most)
    groups = [f"g{each}" for each in rng.integers(3, size=150)]
    near = Nearest(
        np.array([rng.choice(np.delete(np.arange(150), i), 9, False) for i in range(150)]), None
    )
    compared = mates(groups, near, most=most)
    assert [each.tolist() for each in compared] == list(all_mates(groups, near, most))


@pytest.mark.slow
def test_a_group_of_many_rows_does_not_take_their_square():
    """Looked at pair by pair, 40,000 rows take minutes."""
    n, began = 40_000, time.process_time()
    rows = np.add.outer(np.arange(n), np.arange(1, 21) * 1_000) % n
    compared = mates(["all"] * n, Nearest(rows, None))
    assert time.process_time() - began < 30
    assert {len(each) for each in compared} == {50}
    assert compared[20_000].tolist() == sorted(
        [*rows[20_000], *range(19_985, 20_000), *range(20_001, 20_016)]
    )


def doubted(against, opposed, shares, answers, usual=0.05):
    """Of rows of one kind, beside twelve others whose share against is usual."""
    n = len(against) + 12
    texts = [Said("q", answer) for answer in [*answers, *[" Other."] * 12]]
    others = np.linspace(0.8, 1.2, 12) * usual
    pull = Pull(
        np.array([*against, *others]),
        np.zeros(n),
        [*opposed, *[[0]] * 12],
        [*shares, *[[0.1]] * 12],
    )
    compared = [np.delete(np.arange(n), row) for row in range(n)]
    return doubtful(pull, compared, texts, [f"r{i}" for i in range(n)])


RIGHT = " In Kelmouth, a town of Upper Dask."


def test_a_better_answer_is_one_on_which_the_opposed_agree():
    answers = [" Somewhere else.", RIGHT, RIGHT.replace(".", "!")]
    found = doubted([0.5, 0.0, 0.1], [[1, 2], [], [0]], [[0.3, 0.2], [], [0.1]], answers)
    assert [(each.row, each.other, each.suggested) for each in found.findings] == [
        (0, 1, "relabel")
    ]
    assert found.findings[0].answer == RIGHT


@pytest.mark.parametrize(
    ("against", "shares", "last"),
    [
        ([0.5, 0.0, 0.1], [0.3, 0.05], RIGHT),  # one is hardly opposed
        ([0.5, 0.0, 0.1], [0.3, 0.2], " A parrot."),  # they do not agree
        ([0.5, 0.0, 0.4], [0.3, 0.2], RIGHT),  # one is in doubt itself
    ],
)
def test_otherwise_it_is_to_go(against, shares, last):
    found = doubted(against, [[1, 2], [], [0]], [shares, [], [0.1]], [" Elsewhere.", RIGHT, last])
    row = next(each for each in found.findings if each.row == 0)
    assert (row.suggested, row.answer) == ("remove", None)


def test_nothing_is_suggested_where_rows_are_usually_against_their_own():
    """The order of the list and its scores stay."""
    row = ([0.5, 0.0, 0.1], [[1, 2], [], [0]], [[0.3, 0.2], [], [0.1]], [" Else.", RIGHT, RIGHT])
    found = doubted(*row, usual=0.3)
    assert len(found.findings) == 13
    assert {(each.suggested, each.answer) for each in found.findings} == {("", None)}
    assert found.findings[0].row == 0
    assert "that is usual here (z " in found.findings[0].evidence
    assert found.scores[0] == doubted(*row).scores[0] == 0.5


def test_what_is_usual_is_so_among_as_many_others():
    """Noise of three others is no news beside rows of fifty, which hardly differ."""
    rng = np.random.default_rng(0)
    few, many = rng.uniform(0, 1, 100), rng.uniform(0, 0.05, 1_000)
    scores = np.concatenate([few, many, [0.9, 0.9, -np.inf]])
    sizes = np.repeat([3, 50, 3, 40, 0], [100, 1_000, 1, 1, 1])
    found, told = unusual(scores, sizes)
    assert found[:100].max() < 3.5
    assert found[-3] < 3.5 < found[-2]
    assert found[-1] == 0
    assert told.tolist() == [101] * 100 + [1_001] * 1_000 + [101, 1_001, 0]
    pull = Pull(np.where(sizes > 0, scores, 0), np.zeros(1_103), [], [])
    shares = telling(pull, [np.arange(size) for size in sizes])
    assert np.flatnonzero(shares).tolist() == [1_101]
    assert shares[1_101] == 0.9


def test_of_four_rows_nothing_is_usual():
    """The largest share beside zeros is far from them, and tells nothing all the same."""
    for others, suggested in ((3, ""), (4, "remove")):
        pull = Pull(
            np.array([0.95, *[0.0] * others]),
            np.zeros(others + 1),
            [[1]] + [[]] * others,
            [[0.95]] + [[]] * others,
        )
        compared = [np.array([1, 2])] * (others + 1)
        texts = [Said(f"q{row}", f"a{row}") for row in range(others + 1)]
        (found,) = doubtful(
            pull, compared, texts, [f"r{row}" for row in range(others + 1)]
        ).findings
        assert found.suggested == suggested
        assert ("do not tell what is usual" in found.evidence) == (suggested == "")


def test_rows_without_mates_are_not_in_doubt():
    pull = Pull(np.array([0.0]), np.zeros(1), [[]], [[]])
    found = doubtful(pull, [np.array([], int)], [Said("q", "a")], ["r0"])
    assert found.scores.tolist() == [-np.inf]
    assert found.findings == ()
