"""The terms under the name that files of one's own import."""

from __future__ import annotations

import unlearn
from unlearn import terms
from unlearn.methods import terms as defined


def test_it_hands_on_every_term_and_nothing_else():
    assert unlearn.terms is terms
    assert all(getattr(terms, name) is getattr(defined, name) for name in terms.__all__)
    made = {name for name, value in vars(defined).items() if isinstance(value, defined.Term)}
    assert made <= set(terms.__all__)
    assert {"Term", "Part", "npo", "simnpo", "dpo"} <= set(terms.__all__)
