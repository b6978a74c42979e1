"""Work, counted in rows that are run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """Work done: rows run forward and backward, and rows run forward only, which count a third."""

    gradients: int = 0
    forwards: int = 0

    @property
    def total(self) -> float:
        """In row-gradients."""
        return self.gradients + self.forwards / 3
