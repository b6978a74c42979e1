"""Which rows' gradients a fit keeps on disk, for a while or for good."""

from __future__ import annotations

from dataclasses import dataclass

from influence.curvature.base import ALWAYS, ONCE, Specification


@dataclass(frozen=True)
class Storage:
    """What a fit keeps on disk: whether the rows' gradients, and the bytes that sampled rows may
    take meanwhile. `growable`: they stay beside the gradients (`influence.growing`).
    """

    gradients: bool
    rule: str
    bytes_left: float
    growable: bool = False

    def holds(self, needed: int) -> bool:
        """Whether so many bytes of gradients may be taken for a while: by the rule `full`, and but
        by `none` within the budget.
        """
        return self.rule == "full" or (self.rule != "none" and needed <= self.bytes_left)


def keeps_sampled(curvature: Specification, storage: Storage, row_bytes: int) -> bool:
    """Whether the rows' gradients at sampled labels are on disk, at least for a point's second
    look; `row_bytes` are those of one gradient of every row.
    """
    draws = curvature.draws
    stays = storage.growable and storage.gradients
    fits = stays or storage.holds(row_bytes * (1 + draws))
    keeps_once = curvature.reads_rows == ONCE and fits
    return draws > 0 and (curvature.reads_rows == ALWAYS or keeps_once)


def keeps_for_good(curvature: Specification, storage: Storage) -> bool:
    """Whether rows at sampled labels that are on disk stay there."""
    stays = storage.growable and storage.gradients and curvature.reads_rows == ONCE
    return curvature.reads_rows == ALWAYS or stays
