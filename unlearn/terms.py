"""The terms that methods of your own are made of, under the name that their files import: see `unlearn.methods.terms`."""

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
