"""The explorer: one page of a run to look at, search and tick rows in, in a file or served."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.explorer.data import Explored, gather
    from analysis.explorer.page import Page, Written, built, write

_HOMES = {
    "data": ("Explored", "gather"),
    "page": ("Page", "Written", "built", "write"),
}

__all__ = [
    "Explored",
    "Page",
    "Written",
    "built",
    "gather",
    "write",
]

__getattr__ = on_first_use(__name__, _HOMES)
