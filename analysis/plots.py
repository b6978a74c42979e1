"""Pictures of results: each function takes one result and writes one PNG or SVG file.

Figures of scores, rows and edits are in `analysis.figures`, and handed on here. All are drawn as
`analysis.drawing` says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from analysis.drawing import (
    GRID,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    checked_target,
    drawn,
)
from analysis.figures import (
    difficulty_plot,
    groups_plot,
    modules_plot,
    top_plot,
    trade_off_plot,
)
from analysis.metrics.lds import LDS
from influence.errors import InputError

__all__ = [
    "difficulty_plot",
    "groups_plot",
    "lds_plot",
    "modules_plot",
    "top_plot",
    "trade_off_plot",
]


def lds_plot(result: LDS, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Draw the Spearman correlation of every query, sorted, with mean and bootstrap interval.

    Parameters
    ----------
    result : LDS
        From `analysis.metrics.lds`.
    path : path
        Ends in `.png` or `.svg`.
    overwrite : bool
        Replace a file that is already there.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    InputError
        If the suffix is another, the file exists, no query has a defined correlation, or matplotlib
        is missing.
    """
    target = checked_target(path, overwrite)
    rho = np.sort(result.per_query[~np.isnan(result.per_query)])[::-1]
    if not rho.size:
        raise InputError(
            f"None of the {result.queries} queries has a defined correlation, so there is nothing "
            "to draw; expected losses and predictions that differ between subsets: check scores "
            "and truth file."
        )

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        _draw(axes, result, rho)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return drawn(draw, target, height=4.2, width=7.2)


def _draw(axes: Any, result: LDS, rho: np.ndarray) -> None:
    """Draw the sorted correlations `rho`, their mean and its interval."""
    interval = result.interval
    rank = np.arange(1, len(rho) + 1)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axhspan(
        interval.low,
        interval.high,
        color=POSITIVE,
        alpha=0.15,
        linewidth=0,
        label=f"{100 * interval.level:g} % bootstrap interval "
        f"[{interval.low:.2f}, {interval.high:.2f}]",
    )
    axes.axhline(result.mean, color=POSITIVE, linewidth=1.5, label=f"mean {result.mean:.3f}")
    colors = [POSITIVE if value >= 0 else NEGATIVE for value in rho]
    if len(rho) <= 150:  # more stems than that run together
        axes.vlines(rank, 0, rho, colors=colors, linewidth=1.2, alpha=0.5)
    axes.scatter(rank, rho, s=min(28.0, max(4.0, 1500 / len(rho))), c=colors, zorder=3)
    axes.set_xlim(0, len(rho) + 1)
    axes.set_ylim(min(0, rho[-1], interval.low) - 0.06, max(0, rho[0], interval.high) + 0.06)
    axes.set_ylabel("Spearman correlation,\npredicted and measured loss")
    axes.set_title(
        "Linear datamodeling score",
        loc="left",
        fontweight="bold",
        fontsize=12,
        pad=22,
        color=INK,
    )
    left_out = f" ({result.undefined} undefined, left out)" if result.undefined else ""
    axes.set_xlabel(f"query, sorted by its correlation{left_out}")
    axes.text(
        0,
        1.03,
        f"{result.queries} queries, {result.subsets} retrained subsets",
        transform=axes.transAxes,
        color=MUTED,
    )
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
