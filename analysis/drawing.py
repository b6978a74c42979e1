"""What every picture of results is drawn with: colours, style, the file that it is written to.

matplotlib is imported when a picture is drawn, and only its `Figure` is used, never pyplot: no
window, no display, and no state that outlives the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def drawn(draw: Callable[[Any], None], path: Path, *, height: float, width: float) -> Path:
    """Call `draw` with the axes of a new figure of that size in inches, and write it to `path`.

    Raises `InputError` where matplotlib is missing.
    """
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "A picture was asked for and matplotlib, which draws it, is not installed: pip install "
            "matplotlib, or work with the numbers."
        ) from error

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        # without a date, so that the same result gives the same file
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
    return path


def checked_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The file of a picture, or `InputError` for another ending or a file that exists."""
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
