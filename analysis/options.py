"""Command-line options that several `analysis` commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from influence.options import option


@dataclass(frozen=True, kw_only=True)
class ResamplesOption:
    """How often a bootstrap draws."""

    resamples: int = option("Bootstrap resamples.", default=1000)


@dataclass(frozen=True, kw_only=True)
class RecipeOption:
    """How an adapter is trained again."""

    recipe: Path | None = option(
        "JSON of how the adapter was trained. Default: as recorded beside it.", default=None
    )
