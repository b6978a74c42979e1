"""The explorer: one page of a run to look at, search and tick rows in, in a file or served."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.explorer.data import Explored, gather
    from analysis.explorer.page import Written, html, write

_HOMES = {
    "data": ("Explored", "gather"),
    "page": ("Written", "html", "write"),
}

__all__ = [
    "Explored",
    "Written",
    "gather",
    "html",
    "write",
]

__getattr__ = on_first_use(__name__, _HOMES)
