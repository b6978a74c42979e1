"""The terms that methods are made of, under the name that files of your own import.

They live in `unlearn.methods.terms`.
"""

from unlearn.methods.terms import (
    Part,
    Term,
    ascent,
    descent,
    divergence,
    dpo,
    matching,
    npo,
    simnpo,
)

__all__ = ["Part", "Term", "ascent", "descent", "divergence", "dpo", "matching", "npo", "simnpo"]
