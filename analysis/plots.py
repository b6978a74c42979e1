"""Pictures of results: each function takes one result and writes one PNG or SVG file.

matplotlib is imported when a picture is drawn, and only its `Figure` is used, never pyplot: no
window, no display, and no state that outlives the call.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from analysis.metrics.lds import LDS
from influence.errors import InputError

#: Colours of text and axes, of what matters less, and of grids.
INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e7ec"
#: Colours of values above and below zero, which the colour-blind can tell apart.
POSITIVE, NEGATIVE = "#0b6e99", "#c8553d"
#: Settings of matplotlib under which every picture is drawn.
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text: searchable, and the same bytes on every machine
    "svg.hashsalt": "lora-influence",
}


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
    path = _target(path, overwrite)
    rho = np.sort(result.per_query[~np.isnan(result.per_query)])[::-1]
    if not rho.size:
        raise InputError(
            f"None of the {result.queries} queries has a defined correlation, so there is nothing "
            "to draw; expected losses and predictions that differ between subsets: check scores "
            "and truth file."
        )
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
        from matplotlib.ticker import MaxNLocator  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "A picture was asked for and matplotlib, which draws it, is not installed: pip install "
            "matplotlib, or work with the numbers."
        ) from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, result, rho)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _save(figure, path)
    return path


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


def _target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(
            f"A picture was asked for as {path}; expected a name that ends in .png or .svg: rename "
            "it."
        )
    if path.exists() and not overwrite:
        raise InputError(
            f"{path} exists and would be replaced: choose another name, or pass overwrite."
        )
    return path


def _save(figure: Any, path: Path) -> None:
    """Write the figure without a date in it, so that the same result gives the same file."""
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
