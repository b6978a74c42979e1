"""The ways into the page: the questions that it is opened with, and where each is answered."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any

from analysis.explorer.data import Explored
from analysis.explorer.sections import SECTIONS

#: By section, what is done there.
WAYS: Mapping[str, Callable[[Explored], str]] = {
    "queries": lambda e: "Choose a query: the rows behind its answer stand beside it.",
    "cleaning": lambda e: _listed(len(e.cleaning or ())),
    "edits": lambda e: "What each edit did to its rows, and what that cost the others.",
}


def ways(explored: Explored, there: Collection[str]) -> list[dict[str, Any]]:
    """The `question` of each way, its `section`, null where the run has none, and what it `says`.

    Where there is no section that is how to make it (`how`).
    """
    return [
        {
            "question": SECTIONS[name].title,
            "section": name if name in there else None,
            "says": [says(explored)] if name in there else how(explored, name),
        }
        for name, says in WAYS.items()
    ]


def how(explored: Explored, name: str) -> list[str]:
    """How to make a section: texts, and between them commands, which name the run for a shell."""
    return [part.replace("RUN", _named(explored)) for part in SECTIONS[name].missing.split("`")]


def after_export(explored: Explored) -> tuple[str, str]:
    """The command that says what removing the rows would do whose ids were saved: what stands before
    the name of the file, and after it.
    """
    return f"unlearn remove --run {_named(explored)} --ids-file ", " --dry-run"


def _named(explored: Explored) -> str:
    """The run for a shell, from anywhere: a browser saves elsewhere.

    A name that does not look like what it is (line ends, letters that turn a line around) stays RUN.
    """
    path = str(explored.directory.resolve())
    return shlex.quote(path) if path.isprintable() else "RUN"


def _listed(entries: int) -> str:
    if not entries:
        return "The list is empty: no row needs a look."
    counted = "1 entry" if entries == 1 else f"{entries:,} entries"
    return f"{counted}, with reasons. Tick rows to fix or remove, and save their ids."
