"""Edits by influence: rows removed, relabelled or corrected, by one closed-form step or several."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from unlearn.edits.by_influence import correct, edit, forecast, relabel, remove
    from unlearn.edits.options import Options

_HOMES = {
    "by_influence": ("correct", "edit", "forecast", "relabel", "remove"),
    "options": ("Options",),
}

__all__ = [
    "Options",
    "correct",
    "edit",
    "forecast",
    "relabel",
    "remove",
]

__getattr__ = on_first_use(__name__, _HOMES)
