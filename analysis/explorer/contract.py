"""What the page asks of a run, and the JSON that answers it.

The page's script reads its data through one object, `source`, with asynchronous methods. In a file
they read what is embedded there (`templates/file_source.js`); a server answers the same questions
over HTTP. Either way the answer is what these functions return, so a server needs no more than

    GET /api/meta                                meta(explored)
    GET /api/search?kind=K&text=T                search(explored, K, T)
    GET /api/lines?kind=K&indices=3,7,1          lines(explored, K, [3, 7, 1])
    GET /api/query/Q                             query(explored, Q)
    GET /api/row/I                               row(explored, I)
    GET /api/pair/Q/I                            pair(explored, Q, I)
    GET /api/section/NAME                        section(explored, NAME)

and, in the page, a `source` with `meta()`, `search(kind, text)`, `lines(kind, indices)`,
`query(q)`, `row(i)`, `pair(q, i)` and `section(name)`, each a promise of that JSON. `kind` is
`queries` or `rows`; Q and I are positions. `analysis.explorer.page.built` takes the script of such a
source in place of the file's own.

Every text is as it is in the data, for `textContent` alone: it may be hostile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from analysis.explorer import start
from analysis.explorer.blocks import finite, rounded
from analysis.explorer.data import Explored
from analysis.explorer.sections import SECTIONS, present
from analysis.explorer.texts import Texts
from influence.errors import InputError

KINDS = ("queries", "rows")


def meta(explored: Explored) -> dict[str, Any]:
    """What the page needs first.

    `title`, the `run`'s digest, how many `rows` and `queries` there are; of the scores their `unit`,
    the `measurement`, whether it `rises` when the model gets worse, `kept` (rows kept of either end;
    null: all), `exactness`, a sentence on how exactly they are given, and `first`, the query to begin
    with, and of how many it is the one that a row helps most (`first_of`, 0: no row helps); the
    `sections` that are there, by name and title; the `ways` into the page and the `next` command when
    ids were saved, before and after the name of their file (`analysis.explorer.start`); what is
    `missing` beside the ways, by section how to make it.
    """
    table, there = explored.table, present(explored)
    return {
        "title": explored.title,
        "run": explored.manifest.digest,
        "rows": len(explored.rows),
        "queries": len(explored.queries),
        "scored": table is not None,
        "unit": "" if table is None else table.unit,
        "measurement": "" if table is None else table.measurement,
        "rises": table is None or table.rises,
        "kept": None if table is None else table.kept,
        "exactness": "" if table is None else "Scores are as in the file.",
        "first": 0 if table is None else table.first_shown or 0,
        "first_of": 0 if table is None or table.first_shown is None else table.looked_at,
        "sections": [[name, SECTIONS[name].title] for name in there],
        "ways": start.ways(explored, there),
        "next": start.after_export(explored),
        "missing": {
            name: start.how(explored, name)
            for name, each in SECTIONS.items()
            if each.missing and name not in (*there, *start.WAYS)
        },
    }


def search(explored: Explored, kind: str, text: str) -> list[int]:
    """Positions of the queries or rows that contain every word of a text, in id, group or content.

    No text: all.
    """
    texts, words = _texts(explored, kind), text.lower().split()
    if not words:
        return list(range(len(texts)))
    return [k for k, said in enumerate(texts.searched) if all(word in said for word in words)]


def lines(explored: Explored, kind: str, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Queries or rows as a list shows them: `index`, `id`, `group` and `preview`, one line."""
    texts = _texts(explored, kind)
    places = [_place(texts, kind, index) for index in indices]
    return [
        {
            "index": k,
            "id": texts.ids[k],
            "group": texts.groups[k],
            "preview": texts.preview(k),
        }
        for k in places
    ]


def query(explored: Explored, index: int) -> dict[str, Any]:
    """A query: `parts`, its (role, text) pairs, and the `rows` by position with their `scores`.

    Proponents come first: rows whose removal would make the model worse at it.
    """
    texts = explored.queries
    place = _place(texts, "queries", index)
    found = {**lines(explored, "queries", [place])[0], "parts": texts.parts(place)}
    if explored.table is None:
        return {**found, "rows": [], "scores": []}
    rows, scores = explored.table.query(place)
    return {**found, "rows": rows.tolist(), "scores": rounded(scores)}


def row(explored: Explored, index: int) -> dict[str, Any]:
    """A training row: `parts`, and the `queries` by position with its `scores`.

    Those that it helps come first. `facts` about it are as `analysis.explorer.blocks` has them.
    """
    texts = explored.rows
    place = _place(texts, "rows", index)
    found = {
        **lines(explored, "rows", [place])[0],
        "parts": texts.parts(place),
        "facts": explored.facts_of(place),
    }
    if explored.table is None:
        return {**found, "queries": [], "scores": []}
    queries, scores = explored.table.row(place)
    return {**found, "queries": queries.tolist(), "scores": rounded(scores)}


def pair(explored: Explored, query: int, row: int) -> dict[str, Any]:
    """One score split over the tokens of the training row and over the layers of the adapter.

    `tokens` are (text, part) pairs by position, `modules` (layer, part) pairs, null where the scores
    are not split so, and `why` then says how to.
    """
    place = _place(explored.queries, "queries", query)
    other = _place(explored.rows, "rows", row)
    table = explored.table
    if table is None:
        return {"tokens": None, "modules": None, "why": explored.how_to_split}
    detail = table.detail(place, other)
    tokens = None
    if detail.tokens is not None and explored.tokens is not None:
        tokens = [[explored.tokens(id), finite(value)] for id, value in detail.tokens]
    modules = detail.modules and [[name, finite(value)] for name, value in detail.modules]
    whole = tokens is not None and modules is not None
    return {
        "tokens": tokens,
        "modules": modules,
        "why": "" if whole else explored.how_to_split,
    }


def section(explored: Explored, name: str) -> dict[str, Any]:
    """A section's `title` and its `blocks` (`analysis.explorer.blocks`)."""
    if name not in (there := present(explored)):
        raise InputError(f"section {name!r} was asked for; there are {', '.join(there)}")
    each = SECTIONS[name]
    return {"title": each.title, "blocks": each.blocks(explored)}


def _texts(explored: Explored, kind: str) -> Texts:
    if kind not in KINDS:
        raise InputError(f"kind {kind!r} was given; expected {' or '.join(KINDS)}")
    return explored.queries if kind == "queries" else explored.rows


def _place(texts: Texts, kind: str, index: int) -> int:
    """A position that is there, else `InputError`."""
    if not 0 <= index < len(texts):
        raise InputError(f"position {index} of {kind} was given; there are {len(texts)}")
    return index
