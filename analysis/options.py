"""Command-line options that several `analysis` commands share."""

from __future__ import annotations

from dataclasses import dataclass

from influence.options import option


@dataclass(frozen=True, kw_only=True)
class ResamplesOption:
    """How often a bootstrap draws."""

    resamples: int = option("Bootstrap resamples.", default=1000)
