"""ROUGE by hand, and which texts it can read. (TOFU's own numbers: tests/analysis/metrics.)"""

from __future__ import annotations

import pytest

from influence.overlap import has_words, rouge


def near(values):
    """Up to rounding."""
    return pytest.approx(values, rel=1e-12)


def test_rouge_by_hand():
    """Reference `the cat sat on the mat`, 6 words.

    Generated `on the mat the cats sit`: the, cat (stem), on, the, mat: 5/6.

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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A fox.", True),
        ("1956", True),
        ("é7", True),
        ("", False),
        (" .,!?_ ", False),
        ("كتاب", False),
        ("東京", False),
        ("é", False),
        ("٣", False),
    ],
)
def test_words_are_runs_of_a_to_z_and_digits(text, words):
    """A text is repeated by itself where ROUGE finds a word in it, and else never."""
    assert has_words(text) is words
    assert rouge([text], [text]).rougeL_recall == near([float(words)])
