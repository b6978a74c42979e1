"""Work, counted in rows that are run through the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """Work done so far.

    Attributes
    ----------
    gradients : int
        Rows run forward and backward.
    forwards : int
        Rows run forward only.
    """

    gradients: int = 0
    forwards: int = 0

    @property
    def total(self) -> float:
        """Work in row-gradients: a backward is about two forwards, so a forward is a third."""
        return self.gradients + self.forwards / 3
