"""The metrics of arrays: values derived by hand, slow oracles, laws, and what each says of a wrong call."""

import functools
import itertools
import math
import zlib
from typing import Any, cast

import numpy as np
import pytest

from analysis import metrics
from analysis.metrics import (
    UtilitySet,
    accuracy,
    answer_probability,
    attack,
    exact_memorization,
    exposure,
    exposure_of,
    extraction_strength,
    forget_quality,
    generalized_exposure,
    gradient_norm_score,
    loss_score,
    min_k,
    min_k_plus_plus,
    model_utility,
    option_probability,
    perplexity,
    privleak,
    reference_score,
    relative_exposure,
    rouge,
    truth_ratio,
    zlib_score,
)
from influence.errors import InputError

LN2 = math.log(2)
near = functools.partial(pytest.approx, rel=1e-14, abs=1e-14)


def samples(seed=0, n=23, m=17, ties=False):
    """Two groups of numbers; with `ties`, of few values."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.4, 1, n), rng.normal(0, 1, m)
    return (np.round(a), np.round(b)) if ties else (a, b)


# ------------------------------------------------------------------------------------------- membership inference


def test_auc_by_hand():
    """Members 3, 1, 2 against 2, 0: of 6 pairs 3>2, 3>0, 1>0, 2>0 are won, 2=2 is half: 4.5 / 6."""
    result = attack([3, 1, 2], [2, 0], resamples=5)
    assert result.auc == near(0.75)
    assert (result.n, result.m, result.interval.resamples, result.interval.seed) == (3, 2, 5, 0)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_won(ties):
    for seed in range(5):
        a, b = samples(seed, ties=ties)
        won = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
        assert attack(a, b, resamples=1).auc == near(won / (len(a) * len(b)))


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_antisymmetric_and_never_folded(ties):
    a, b = samples(ties=ties)
    auc = attack(a, b, resamples=1).auc
    assert attack(b, a, resamples=1).auc == near(1 - auc)
    assert attack(-a, -b, resamples=1).auc == near(1 - auc)
    assert auc > 0.5 > 1 - auc
    assert attack([0, 1], [2, 3], resamples=1).auc == 0
    assert attack([2, 3], [0, 1], resamples=1).auc == 1


def test_auc_of_equal_scores_is_chance_and_any_increasing_map_changes_nothing():
    assert attack([7, 7, 7], [7, 7], resamples=1).auc == 0.5
    a, b = samples()
    mapped, plain = attack(np.exp(a), np.exp(b), resamples=50), attack(a, b, resamples=50)
    assert (mapped.auc, mapped.tpr, mapped.interval) == (plain.auc, plain.tpr, plain.interval)


def test_true_positive_rate_by_hand():
    """Ten non-members 0 ... 9. None may pass: only members above 9, 1 of 4. One may: above 8, so 9.5, 9 and 8.5."""
    result = attack([9.5, 9, 8.5, 3], np.arange(10), fprs=(0.01, 0.1, 0.19, 1), resamples=1)
    assert result.tpr == {0.01: 0.25, 0.1: 0.75, 0.19: 0.75, 1: 1}


@pytest.mark.parametrize("ties", [False, True])
def test_true_positive_rate_is_the_best_over_all_thresholds(ties):
    for seed in range(5):
        a, b = samples(seed, ties=ties)
        for fpr in (0, 0.01, 0.05, 0.1, 0.3, 0.5, 1):
            cuts = [*a, *b, np.inf]
            best = max(
                np.mean(a >= cut) for cut in cuts if np.sum(b >= cut) <= fpr * len(b) + 1e-12
            )
            assert attack(a, b, fprs=[fpr], resamples=1).tpr == {fpr: near(best)}


def test_allowed_share_is_not_lost_to_rounding():
    """0.29 of 100 is 28.999... in floats and must allow 29: members above the 30th highest, 70."""
    assert attack([70.5], np.arange(100), fprs=[0.29], resamples=1).tpr == {0.29: 1}
    assert attack([70], np.arange(100), fprs=[0.29], resamples=1).tpr == {0.29: 0}


def test_the_interval_draws_both_groups_again():
    a, b = samples()
    rng = np.random.default_rng(4)
    aucs = []
    for _ in range(40):
        x, y = a[rng.integers(23, size=23)], b[rng.integers(17, size=17)]
        aucs.append(np.mean([(i > j) + (i == j) / 2 for i in x for j in y]))
    interval = attack(a, b, resamples=40, seed=4, level=0.8).interval
    assert (interval.low, interval.high) == near(np.quantile(aucs, [0.1, 0.9]))
    assert interval.low < attack(a, b, resamples=1).auc < interval.high


def test_width_of_the_interval_is_that_of_theory():
    """Of equal distributions the AUC has variance (n + m + 1) / (12 n m) (Mann and Whitney 1947)."""
    rng = np.random.default_rng(0)
    interval = attack(rng.normal(size=120), rng.normal(size=80), resamples=1000, level=0.9).interval
    theory = 2 * 1.6449 * math.sqrt(201 / (12 * 120 * 80))
    assert interval.high - interval.low == pytest.approx(theory, rel=0.15)


def test_scores_by_hand():
    """All have members above: small losses, losses below a reference's, small gradients."""
    assert loss_score([0.5, 2]).tolist() == [-0.5, -2]
    assert gradient_norm_score([0.5, 2]).tolist() == [-0.5, -2]
    assert reference_score([0.5, 2], [3, 2.5]).tolist() == [2.5, 0.5]


def test_zlib_by_hand():
    """Nats per compressed byte: of two texts with the same loss the one that compresses well is less surprising.

    So it says less of a member to have a low loss on it: `aaaa...` scores lower.
    """
    dull, rich = "a" * 60, "The quick brown fox jumps over the lazy dog, 0123456789 times"
    scores = zlib_score([6.0, 6.0], [dull, rich])
    expected = [-6 / len(zlib.compress(dull.encode())), -6 / len(zlib.compress(rich.encode()))]
    assert scores == near(expected)
    assert scores[0] < scores[1]
    assert zlib_score([6.0], ["half a pair: \ud83d"]).shape == (
        1,
    )  # rows read from JSON may hold it


def test_min_k_by_hand():
    """Of 5 tokens the lowest 40 % are 2, -4 and -3: mean -3.5; 20 % is 1; of 2 tokens it is still 1."""
    rows = [np.array([-1, -4, -0.5, -3, -2]), np.array([-1, -2])]
    assert min_k(rows, 0.4) == near([-3.5, -2])
    assert min_k(rows) == near([-4, -2])
    assert min_k(rows, 1) == near([-2.1, -1.5])  # all tokens: minus the mean loss
    assert min_k([-np.arange(100.0)], 0.29) == near([-np.arange(71, 100).mean()])


def test_min_k_plus_plus_by_hand():
    """Tokens z = (-1 + 2) / 0.5 = 2, (-4 + 2) / 1 = -2, (-3 + 1) / 4 = -0.5: the lowest two of three mean -1.25."""
    rows = [np.array([-1, -4, -3.0])], [np.array([-2, -2, -1.0])], [np.array([0.5, 1, 4])]
    assert min_k_plus_plus(*rows, k=0.7) == near([-1.25])
    assert min_k_plus_plus(*rows) == near([-2])


def test_min_k_plus_plus_of_the_model_itself_is_centred():
    """Of all tokens drawn from p the mean of z is 0 and that of z^2 is 1, by definition of mu and sigma."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    mu = p @ np.log(p)
    sigma = math.sqrt(p @ (np.log(p) - mu) ** 2)
    z = [min_k_plus_plus([[math.log(own)]], [[mu]], [[sigma]])[0] for own in p]
    assert p @ z == pytest.approx(0, abs=1e-14)
    assert p @ np.square(z) == pytest.approx(1, abs=1e-14)


def test_min_k_plus_plus_where_nothing_was_uncertain():
    """A distribution of one token has spread 0: its own token is as likely as expected, any other beyond all others."""
    assert min_k_plus_plus([[0.0]], [[0.0]], [[0.0]]) == [0]
    assert min_k_plus_plus([[-20.0]], [[0.0]], [[0.0]]) == [-20 / 1e-12]


def test_privleak_by_hand():
    """In MUSE's orientation areas are 1 - auc: 0.1 against 0.4 is (0.1 - 0.4) / 0.4 = -75 %."""
    assert privleak(0.9, 0.6) == near(-75)
    assert privleak(0.6, 0.6) == 0
    assert privleak(1, 0.5) == -100  # never unlearned, as the target models of MUSE's table
    assert (
        privleak(0, 0.5) == 100
    )  # over-unlearned: forgotten rows look less familiar than unseen ones


# -------------------------------------------------------------------------------------------------------- exposure


def test_exposure_by_hand():
    """Of 1024 candidates rank 1 is 10 bits, rank 2 is 9, the last is 0."""
    assert exposure([1, 2, 1024], 1024).tolist() == [10, 9, 0]
    assert exposure(1, 8) == 3


def test_exposure_of_by_hand():
    """Losses 1, 2, 9 among three others 1.5, 2, 3: ranks 1, 2.5 (tied with one), 4 of 4: 2, log2 1.6, 0 bits."""
    result = exposure_of([1, 2, 9], np.tile([1.5, 2, 3], (3, 1)))
    assert result.values == near([2, math.log2(1.6), 0])
    assert result.value == near((2 + math.log2(1.6)) / 3)


def test_exposure_of_equals_sorting():
    rng = np.random.default_rng(0)
    losses, others = rng.normal(size=6), rng.normal(size=(6, 31))
    ranks = [1 + sorted([own, *row]).index(own) for own, row in zip(losses, others, strict=True)]
    assert exposure_of(losses, others).values == near([5 - math.log2(rank) for rank in ranks])


def test_exposure_of_a_model_that_cannot_tell():
    """All m + 1 tie at the rank (m + 2) / 2: below 1 bit, whatever m."""
    for m in (1, 3, 1000):
        value = exposure_of([2.0], np.full((1, m), 2.0)).value
        assert value == near(math.log2(2 * (m + 1) / (m + 2)))
        assert value < 1


def test_generalized_exposure_by_hand():
    """p = 1/2 against references 1/4 and 1/8, mean 3/16: log2(8/3); the second row is 1/8 against 1/8: 0."""
    result = generalized_exposure([LN2, 3 * LN2], [[2 * LN2, 3 * LN2], [3 * LN2, 3 * LN2]])
    assert result.values == pytest.approx([math.log2(8 / 3), 0], abs=1e-14)
    assert result.value == near(math.log2(8 / 3) / 2)


def test_generalized_exposure_is_zero_as_if_never_seen_and_one_bit_per_halving():
    losses = np.random.default_rng(0).uniform(1, 6, size=9)
    assert generalized_exposure(losses, [losses]).values == pytest.approx(np.zeros(9), abs=1e-14)
    assert generalized_exposure(losses - LN2, [losses]).values == pytest.approx(
        np.ones(9), abs=1e-14
    )
    assert (
        generalized_exposure(losses + 1, [losses, losses + 0.5]).values < 0
    ).all()  # over-unlearned


def test_the_reference_is_the_mean_of_likelihoods_not_of_losses():
    """References 1 and 0 in likelihood (losses 0 and 5000, which underflows): mean 1/2, so p = 1/2 is 0 bits."""
    assert generalized_exposure([LN2], [[0.0], [5000.0]]).values == pytest.approx([0], abs=1e-14)
    assert generalized_exposure([5000.0], [[5001.0]]).values == pytest.approx([1 / LN2], rel=1e-12)


def test_relative_exposure_by_hand():
    """Unseen rows of likelihood 1/2 and 1/8, mean 5/16. Rows of 1 and 5/16: log2(16/5) and 0 bits."""
    result = relative_exposure([0.0, -math.log(5 / 16)], [LN2, 3 * LN2])
    assert result.values == pytest.approx([math.log2(16 / 5), 0], abs=1e-14)
    assert result.value == near(math.log2(16 / 5) / 2)


def test_relative_exposure_is_generalized_exposure_where_unseen_rows_say_what_references_would():
    losses, comparable = np.array([1.0, 2.5, 4.0]), np.array([3.0, 3.5, 5.0])
    reference = np.tile(
        comparable[:, None], (1, 3)
    )  # three models that find every row as hard as some unseen row
    expected = generalized_exposure(losses, reference)
    np.testing.assert_allclose(
        relative_exposure(losses, comparable).values, expected.values, rtol=0, atol=1e-14
    )


# ----------------------------------------------------------------------------------------- extraction and likelihood


def test_extraction_by_hand():
    """Of 4 tokens, the last wrong one is at place: none -> 1; first -> 3/4; third -> 1/4; last -> 0."""
    rows = [
        [True] * 4,
        [False, True, True, True],
        [False, True, False, True],
        [True, True, True, False],
        [False],
    ]
    rows = [np.array(row) for row in rows]
    assert extraction_strength(rows).tolist() == [1, 0.75, 0.25, 0, 0]
    assert exact_memorization(rows).tolist() == [1, 0.75, 0.5, 0.75, 0]


def test_extraction_equals_the_definition():
    """The least k for which everything from token k on is right, by trying every k."""
    for length in range(1, 7):
        rows = [np.array(row) for row in itertools.product([False, True], repeat=length)]
        least = [min(k for k in range(length + 1) if row[k:].all()) for row in rows]
        assert extraction_strength(rows) == near([1 - k / length for k in least])
        assert (extraction_strength(rows) <= exact_memorization(rows) + 1e-14).all()


def test_accuracy_counts_tokens_and_rows():
    """2 of 2 and 1 of 4 tokens: 1 and 1/4 per row, 3/6 of all."""
    result = accuracy([np.array([True, True]), np.array([True, False, False, False])])
    assert result.values.tolist() == [1, 0.25]
    assert result.value == 0.5


def test_perplexity_by_hand():
    """Rows of ln 2 over 1 token and ln 8 over 3: 2 and 8; together exp((ln 2 + 9 ln 2) / 4) = 2^2.5."""
    result = perplexity([LN2, 3 * LN2], [1, 3])
    assert result.values == near([2, 8])
    assert result.value == near(2**2.5)


def test_nothing_overflows():
    huge = np.finfo(np.float64).max
    assert perplexity([5000.0], [1]).value == pytest.approx(huge, rel=1e-12)
    assert truth_ratio([5000.0], [[1.0, 2.0]]) == pytest.approx([huge], rel=1e-12)
    assert truth_ratio([1.0], [[5000.0]]) == [0]
    assert option_probability([5000.0], [[5000.0]]) == [0.5]


# ------------------------------------------------------------------------------------------------------------ TOFU


def test_truth_ratio_by_hand():
    """Wrong answers of 1/4 and 1/16, geometric mean 1/8, against a paraphrase of 1/2: R = 1/4."""
    assert truth_ratio([LN2], [[2 * LN2, 4 * LN2]]) == near([0.25])


def test_truth_ratio_equals_the_product_of_probabilities():
    rng = np.random.default_rng(0)
    paraphrased, perturbed = rng.uniform(0, 4, 7), rng.uniform(0, 4, (7, 5))
    wrong = [math.prod(math.exp(-loss) for loss in row) ** (1 / 5) for row in perturbed]
    expected = [p / math.exp(-loss) for p, loss in zip(wrong, paraphrased, strict=True)]
    np.testing.assert_allclose(truth_ratio(paraphrased, perturbed), expected, rtol=1e-13)


def test_probabilities_by_hand():
    """1/2 against options of 1/4 and 1/4 is half of all."""
    assert answer_probability([0, LN2]) == near([1, 0.5])
    assert option_probability([LN2], [[2 * LN2, 2 * LN2]]) == near([0.5])


def ks_by_counting(n, m, statistic):
    """Share of all ways to interleave two samples whose distribution functions are at least `statistic` apart."""
    reached = 0
    for places in itertools.combinations(range(n + m), n):
        own = np.isin(np.arange(n + m), places)
        distance = np.abs(np.cumsum(own) / n - np.cumsum(~own) / m).max()
        reached += distance >= statistic - 1e-12
    return reached / math.comb(n + m, n)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 3), (2, 7)])
def test_forget_quality_counts_interleavings(n, m):
    for seed in range(4):
        a, b = (np.exp(x) for x in samples(seed, n, m))
        everything = np.concatenate([a, b])
        distance = max(abs((a <= x).mean() - (b <= x).mean()) for x in everything)
        result = forget_quality(a, b)
        assert result.statistic == near(distance)
        assert result.value == pytest.approx(ks_by_counting(n, m, distance), rel=1e-10)
        assert (result.n, result.m) == (n, m)
        assert result.value >= result.floor * (1 - 1e-10)


def test_forget_quality_of_the_same_sample_is_one_and_of_separate_ones_its_floor():
    a, _ = samples()
    a = np.exp(a)
    assert forget_quality(a, a).value == 1
    for n, m in ((1, 1), (3, 3), (23, 23), (23, 17), (40, 8)):
        a, b = np.linspace(1, 2, n), np.linspace(3, 4, m)
        for result in (forget_quality(a, b), forget_quality(1 / a, 1 / b)):
            assert result.statistic == 1
            assert result.value == pytest.approx(result.floor, rel=1e-10)
    assert forget_quality([1.0], [2.0]).floor == 1  # one row each never shows anything


@pytest.mark.parametrize(("n", "floor"), [(40, 1.9e-23), (200, 1.9e-119), (400, 1.1e-239)])
def test_floor_of_the_published_sizes(n, floor):
    """2 / binomial(2n, n), to the two digits that are known of it."""
    result = forget_quality(np.linspace(1, 2, n), np.linspace(3, 4, n))
    assert float(f"{result.floor:.1e}") == floor
    assert result.value == pytest.approx(result.floor, rel=1e-9)


def test_floor_below_the_smallest_float_is_zero():
    result = forget_quality(np.linspace(1, 2, 700), np.linspace(3, 4, 700))
    assert (result.value, result.floor, result.statistic) == (0, 0, 1)


def test_rouge_by_hand():
    """Reference `the cat sat on the mat`, 6 words. Generated `on the mat the cats sit`: the, cat (stem), on, the, mat: 5/6.

    The longest common subsequence is `on the mat`: 3/6.
    """
    result = rouge(
        ["The cat sat on the mat.", "same words", "one"],
        ["on the mat the cats sit", "Same, words!", ""],
    )
    assert result.rouge1_recall == near([5 / 6, 1, 0])
    assert result.rougeL_recall == near([0.5, 1, 0])


def test_rouge_is_recall_of_the_reference():
    assert rouge(["a b c d"], ["a b"]).rougeL_recall == [0.5]
    assert rouge(["a b"], ["a b c d"]).rougeL_recall == [1]


def full_utility():
    sets = {}
    for i, name in enumerate(("retain", "real_authors", "world_facts")):
        sets[name] = UtilitySet([0.5, 0.5 + 0.1 * i], [1, 0.2 * i], [0.5, 3])
    return sets


def test_model_utility_by_hand():
    """Means: probability 0.5, 0.55, 0.6; rouge 0.5, 0.6, 0.7; max(0, 1 - R) of 0.5 and 3: 0.25 three times."""
    result = model_utility(full_utility())
    expected = [0.5, 0.5, 0.25, 0.55, 0.6, 0.25, 0.6, 0.7, 0.25]
    assert list(result.parts.values()) == near(expected)
    assert list(result.parts)[:4] == [
        "retain probability",
        "retain rouge",
        "retain truth_ratio",
        "real_authors probability",
    ]
    assert result.value == near(9 / sum(1 / part for part in expected))
    assert result.missing == ()


def test_model_utility_of_fewer_parts_names_the_missing():
    """0.5 and 0.25 have the harmonic mean 2 / (2 + 4) = 1/3."""
    result = model_utility({"retain": UtilitySet(probability=[0.5], truth_ratio=[0.75])})
    assert result.value == near(1 / 3)
    assert list(result.parts) == ["retain probability", "retain truth_ratio"]
    assert len(result.missing) == 7
    assert result.missing[:2] == ("retain rouge", "real_authors probability")


def test_model_utility_is_zero_where_a_part_is_and_between_its_extremes_else():
    sets = full_utility()
    result = model_utility(sets)
    assert min(result.parts.values()) < result.value < max(result.parts.values())
    sets["retain"] = UtilitySet([0.5], [0.5], [1.0, 2.0])  # every max(0, 1 - R) is 0
    assert model_utility(sets).value == 0


# ---------------------------------------------------------------------------------------------------------- errors

T = np.array([True])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: loss_score([]),
            r"losses has shape \(0,\); expected \[n\], one number per row, and at least one: pass",
        ),
        (lambda: loss_score([[1, 2]]), r"losses has shape \(1, 2\)"),
        (
            lambda: loss_score([1, math.nan, math.inf]),
            r"losses has 2 NaN or infinite values, the first at \[1\]; expected",
        ),
        (lambda: loss_score(cast(Any, [None, 1])), r"losses has 1 NaN"),
        (
            lambda: loss_score(["a"]),
            r"losses cannot be read as an array of numbers; expected \[n\].*: pad or select",
        ),
        (
            lambda: truth_ratio([1, 2], [[1, 2], [3]]),
            r"perturbed cannot be read as an array of numbers; expected \[n, k\]",
        ),
        (lambda: truth_ratio([1, 2], [1, 2]), r"perturbed has shape \(2,\); expected \[n, k\]"),
        (
            lambda: truth_ratio([1], [[1], [2]]),
            r"perturbed has 2 rows; expected 1, as before it: pass the same rows",
        ),
        (lambda: truth_ratio([1], [[math.nan]]), r"perturbed has 1 NaN .* first at \[0, 0\]"),
        (lambda: option_probability([1], [[1], [2]]), r"perturbed has 2 rows"),
        (lambda: forget_quality([1], []), r"retain_ratios has shape \(0,\)"),
        (
            lambda: forget_quality([-0.5], [1]),
            r"ratios has the value -0\.5; expected truth ratios, 0 and more: pass",
        ),
        (lambda: rouge([], []), r"given 0 references and 0 generated texts; expected as many"),
        (lambda: rouge(["a"], ["a", "b"]), r"given 1 references and 2 generated"),
        (lambda: model_utility({}), r"No part of model utility was given"),
        (
            lambda: model_utility({"forget": UtilitySet([1])}),
            r"key 'forget'; expected some of retain, real_authors",
        ),
        (
            lambda: model_utility({"retain": UtilitySet([1.5])}),
            r"retain probability has the value 1\.5; expected shares",
        ),
        (
            lambda: model_utility({"retain": UtilitySet(rouge=[50])}),
            r"retain rouge has the value 50; .*or percent",
        ),
        (
            lambda: model_utility({"retain": UtilitySet(truth_ratio=[-1])}),
            r"retain truth_ratio has the value -1",
        ),
        (lambda: attack([1], []), r"non_members has shape \(0,\)"),
        (lambda: attack([math.nan], [1]), r"members has 1 NaN"),
        (
            lambda: attack([1], [1], fprs=[10]),
            r"fprs is \(10,\); expected shares between 0 and 1: write 1 % as 0\.01",
        ),
        (lambda: attack([1], [1], resamples=0), r"0 resamples"),
        (lambda: zlib_score([1.0], []), r"texts has 0 rows; expected 1"),
        (lambda: min_k([]), r"log_probs has no rows"),
        (lambda: min_k([[-1], []]), r"log_probs\[1\] has shape \(0,\)"),
        (
            lambda: min_k([[-1]], k=20),
            r"k is 20; expected a share of the tokens above 0 and up to 1: write 20 % as 0\.2",
        ),
        (lambda: min_k([[-1]], k=0), r"k is 0"),
        (lambda: min_k_plus_plus([[-1]], [[-1], [-1]], [[1]]), r"means has 2 rows; expected 1"),
        (
            lambda: min_k_plus_plus([[-1]], [[-1, -1]], [[1]]),
            r"Row 0 has 1 log_probs, 2 means and 1 stds; expected one",
        ),
        (lambda: min_k_plus_plus([[-1]], [[-1]], [[-1]]), r"stds\[0\] has a negative value"),
        (lambda: reference_score([1], [1, 2]), r"reference_losses has 2 rows; expected 1"),
        (lambda: privleak(1.2, 0.5), r"auc is 1\.2; expected an area between 0 and 1: pass"),
        (lambda: privleak(0.5, math.nan), r"auc_retrained is nan"),
        (lambda: privleak(0.5, 1), r"auc_retrained is 1, and PrivLeak divides by"),
        (
            lambda: exposure(0, 5),
            r"A rank among 5 candidates was given as 0\.0; expected numbers from 1",
        ),
        (lambda: exposure([1, 6], 5), r"given as \[1\.0, 6\.0\]"),
        (lambda: exposure(math.nan, 5), r"given as nan"),
        (lambda: exposure_of([1, 2], [[1]]), r"others has 1 rows; expected 2"),
        (
            lambda: generalized_exposure([1, 2], [[1]]),
            r"reference, transposed, has 1 rows; expected 2",
        ),
        (lambda: generalized_exposure([1, 2], [1, 2]), r"reference, transposed, has shape \(2,\)"),
        (lambda: relative_exposure([1], []), r"comparable has shape \(0,\)"),
        (lambda: extraction_strength([]), r"right has no rows"),
        (
            lambda: extraction_strength([T, T[:0]]),
            r"right\[1\] has shape \(0,\) and type bool; .*: leave out rows",
        ),
        (
            lambda: exact_memorization([np.array([0, 1])]),
            r"right\[0\] has shape \(2,\) and type int64; expected \[T\] of bool",
        ),
        (lambda: perplexity([1, 2], [1]), r"counts has 1 rows; expected 2"),
        (
            lambda: perplexity([1, 2], [1, 0]),
            r"counts has the value 0; expected the positive number",
        ),
    ],
)
def test_errors_say_given_expected_and_what_to_do(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_every_metric_is_exported_and_tested_here():
    assert sorted(metrics.__all__) == sorted(set(metrics.__all__))
    functions = {name for name in metrics.__all__ if name[0].islower()} - {
        "lds",
        "lds_difference",
        "read_truth",
    }
    assert functions <= set(globals())
