"""The report of an edit: one page for people who do not read code."""

from typing import TYPE_CHECKING

from influence.front_door import on_first_use

if TYPE_CHECKING:
    from analysis.report.agreement import agreement
    from analysis.report.page import report
    from analysis.report.reading import read_record

_HOMES = {
    "agreement": ("agreement",),
    "page": ("report",),
    "reading": ("read_record",),
}

__all__ = [
    "agreement",
    "read_record",
    "report",
]

__getattr__ = on_first_use(__name__, _HOMES)
