"""The sections of the page: which are there, and the blocks that each is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.cleaning.findings import MEANINGS
from analysis.explorer import about, edits, evaluations
from analysis.explorer.blocks import Block, axis, column, rounded, table, text
from analysis.explorer.data import SELF_HELP, Explored
from influence.manifest import AUDIT

#: Groups and queries of the heat map, and points of the map of rows, at most.
GROUPS, HEAT_QUERIES, POINTS = 40, 500, 2000
#: Groups that have a colour of their own.
COLOURED = 7
NATS = "nats per token"


@dataclass(frozen=True)
class Section:
    """A section: its title, whether a run has it, its blocks, and how to get it where it has not.

    How to get it has commands in backticks. `queries` is drawn by the page's own script and has no
    blocks.
    """

    title: str
    there: Callable[[Explored], bool]
    blocks: Callable[[Explored], list[Block]]
    missing: str = ""


def heatmap(explored: Explored) -> list[Block]:
    """Which groups of rows move which queries: sums of scores over each group's rows."""
    table_ = explored.table
    assert table_ is not None
    names, members = np.unique(np.array(explored.rows.groups, object), return_inverse=True)
    keep = np.flatnonzero(names != "")
    place = np.full(len(names), -1)
    place[keep] = np.arange(len(keep))
    sums = table_.group_sums(place[members], len(keep))
    strongest = np.argsort(-np.abs(sums).max(0, initial=0), kind="stable")[:GROUPS]
    strongest = np.array(sorted(strongest, key=lambda g: in_order(str(names[keep[g]]))), int)
    order = sorted(range(len(explored.queries)), key=lambda q: in_order(explored.queries.groups[q]))
    shown = order[:HEAT_QUERIES]
    said = []
    if len(strongest) < len(keep):
        said.append(f"the {len(strongest)} groups of {len(keep)} with the largest sums")
    if len(shown) < len(order):
        said.append(f"the first {len(shown)} queries of {len(order):,}")
    if table_.kept is not None:
        said.append(f"of each query only the {table_.kept} strongest rows of either end")
    note = [text("Shown: " + "; ".join(said) + ".")] if said else []
    plot = {
        "kind": "plot",
        "plot": "heatmap",
        "title": "Queries by groups of training rows",
        "help": "Sum of the scores of a group's rows. Blue: the group helps the query. Red: harms.",
        "x": axis("group of training rows"),
        "y": axis("query"),
        "unit": table_.unit,
        "columns": [str(names[keep[g]]) for g in strongest],
        "lines": [explored.queries.ids[q] for q in shown],
        "index": shown,
        "values": [rounded(sums[q, strongest], 3) for q in shown],
    }
    return [*note, plot]


def in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with numbers in them by these: 2 before 10."""
    parts = re.split(r"(\d+)", str(name))
    return [(int(part) if part.isascii() and part.isdigit() else -1, part) for part in parts]


NO_VERDICT = (
    "Rows to look at, no verdict. A gain is a forecast that is not to be relied on, and all rows that are "
    "suggested may cost more together than they gain: analysis clean --apply DIR measures, by the column "
    "decision of the list's rows.csv. Ticks on this page are for unlearn remove."
)


def cleaning(explored: Explored) -> list[Block]:
    """The list of rows to look at, which can be ticked."""
    listed = explored.cleaning or ()
    reasons: dict[str, int] = {}
    for each in listed:
        reasons[each.reason] = reasons.get(each.reason, 0) + 1
    if not listed:
        return [text("No row needs a look: the list of analysis clean is empty.", "good")]
    others = list(dict.fromkeys(name for each in listed for name in each.others))
    columns = [
        column("id", "id", "", "The training row."),
        column("reason", "text", "", "Why it should be looked at."),
        column(
            "score",
            "number",
            "",
            "How much speaks for it; higher is more. Its unit depends on the reason.",
        ),
        column("evidence", "text", "", "What speaks for it."),
        column("gain", "number", NATS, "Predicted fall of the loss of others if the row goes."),
        *(column(name, "text", "", "A column of the list.") for name in others),
    ]
    values = [
        [each.id, each.reason, each.score, each.evidence, each.gain]
        + [each.others.get(name, "") for name in others]
        for each in listed
    ]
    found = table("Rows to look at", columns, values)
    found["kind"] = "rows"
    found["index"] = [explored.position.get(each.id, -1) for each in listed]
    found["other"] = [explored.position.get(each.others.get("other", ""), -1) for each in listed]
    found["reasons"] = reasons
    found["meanings"] = {name: MEANINGS[name] for name in reasons if name in MEANINGS}
    counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    unknown = sum(index < 0 for index in found["index"])
    said = [text(f"{len(listed):,} entries: {counted}. {NO_VERDICT}")]
    if unknown:
        said.append(text(f"{unknown:,} of them name rows that this run does not have.", "warn"))
    return [*said, found]


def rows_map(explored: Explored) -> list[Block]:
    """Self-influence and forecast difficulty of the rows, by group."""
    own, forecast = explored.self_influence, explored.difficulty
    n = len(explored.rows)
    steps = np.full(n, np.nan)
    unreached = 0
    for id, known in (forecast or {}).items():
        place, value = explored.position.get(id), known.get("steps")
        if place is None or value is None:
            continue
        unreached += bool(np.isinf(value))
        steps[place] = value
    found: list[Block] = []
    scatter: dict[str, Any] = {"kind": "plot", "plot": "scatter"}
    if own is not None and forecast is not None:
        x, y = steps, np.asarray(own, np.float64)
        scatter |= {
            "title": "How much a row is remembered, and how hard it is to unlearn",
            "x": axis("steps to unlearn it", "forecast steps of ascent", log=True),
            "y": axis("self-influence", NATS, log=_wide(y)),
        }
    elif own is not None:
        y = np.asarray(own, np.float64)
        x = np.argsort(np.argsort(-y, kind="stable"), kind="stable") + 1.0
        scatter |= {
            "title": "How much each row is remembered",
            "x": axis("rank of the row", "1: highest"),
            "y": axis("self-influence", NATS, log=_wide(y)),
        }
    else:
        x, y = steps, np.full(n, np.nan)
        for id, known in (forecast or {}).items():
            if (place := explored.position.get(id)) is not None and known.get("damage") is not None:
                y[place] = known["damage"]
        scatter |= {
            "title": "How hard each row is to unlearn, and what that costs the others",
            "x": axis("steps to unlearn it", "forecast steps of ascent", log=True),
            "y": axis("damage to other rows by then", NATS),
        }
    places = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    shown = _sampled(places, y)
    scatter |= {
        "help": "Each point is a training row; a click shows it. " + SELF_HELP,
        "series": _by_group(explored, shown, x, y),
    }
    if len(shown) < len(places):
        found.append(
            text(
                f"{len(shown):,} of {len(places):,} rows are drawn: the {POINTS // 2:,} highest, "
                "and others evenly spaced by rank."
            )
        )
    if unreached:
        found.append(
            text(
                f"{unreached:,} row{'s' * (unreached > 1)} not drawn: no ascent that the table allows is enough."
            )
        )
    if not len(shown):
        return [*found, text("No row of this run has such a number.", "warn")]
    return [*found, scatter, _group_table(explored, own, steps)]


def _wide(values: np.ndarray) -> bool:
    """Whether values are all positive, and the largest more than 30 times the median."""
    return bool(len(values) and values.min() > 0 and values.max() > 30 * np.median(values))


def _sampled(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """At most `POINTS` of the places: those with the highest values, and some of the others."""
    if len(places) <= POINTS:
        return places
    order = places[np.argsort(-values[places], kind="stable")]
    rest = order[POINTS // 2 :]
    some = rest[np.linspace(0, len(rest) - 1, POINTS - POINTS // 2).astype(int)]
    return np.sort(np.concatenate([order[: POINTS // 2], some]))


def _by_group(
    explored: Explored, places: np.ndarray, x: np.ndarray, y: np.ndarray
) -> list[dict[str, Any]]:
    """The points as one series for each of the largest groups, and one for all other rows."""
    groups = explored.rows.groups
    sizes: dict[str, int] = {}
    for group in groups:
        if group:
            sizes[group] = sizes.get(group, 0) + 1
    named = sorted(sizes, key=lambda g: (-sizes[g], g))[:COLOURED]
    series = []
    for name in [*named, ""]:
        own = [k for k in places.tolist() if (groups[k] if groups[k] in named else "") == name]
        if own:
            series.append(
                {
                    "name": name or ("other rows" if named else "rows"),
                    "x": rounded(x[own], 4),
                    "y": rounded(y[own], 4),
                    "names": [explored.rows.ids[k] for k in own],
                    "index": own,
                    "other": not name,
                }
            )
    return series


def _group_table(explored: Explored, own: np.ndarray | None, steps: np.ndarray) -> Block:
    """Medians by group."""
    members: dict[str, list[int]] = {}
    for k, group in enumerate(explored.rows.groups):
        members.setdefault(group, []).append(k)
    columns = [
        column("group", "text", "", "The rows' group."),
        column("rows", "whole", "", "How many rows it has."),
        column("self-influence", "number", NATS, f"Median of its rows. {SELF_HELP}"),
        column("highest", "number", NATS, "The highest of its rows."),
        column("to unlearn a row", "number", "steps", "Median forecast of its rows."),
    ]
    rows = []
    for name, places in members.items():
        known = steps[places][np.isfinite(steps[places])]
        rows.append(
            [
                name or "(no group)",
                len(places),
                None if own is None else float(np.median(own[places])),
                None if own is None else float(np.max(own[places])),
                float(np.median(known)) if len(known) else None,
            ]
        )
    key = 2 if own is not None else 4
    rows.sort(key=lambda row: -(row[key] if row[key] is not None else -np.inf))
    return table("By group", columns, rows[:1000])


def _has_edits(explored: Explored) -> bool:
    """Whether there is a record of edits, or the run's manifest counts some."""
    path = explored.directory / AUDIT
    return explored.manifest.audit is not None or (path.exists() and path.stat().st_size > 0)


def _none(explored: Explored) -> list[Block]:
    """The blocks of a section that the page's script draws itself."""
    return []


#: The sections by name, in the page's order: the questions that a page is opened with come first.
SECTIONS: Mapping[str, Section] = {
    "queries": Section(
        "Why did it say this?",
        lambda e: e.table is not None,
        _none,
        "No scores yet. Make them with `influence score --run RUN --queries QUERIES`",
    ),
    "cleaning": Section(
        "Which rows to look at?",
        lambda e: e.cleaning is not None,
        cleaning,
        "No list yet. Make one with `analysis clean --run RUN --queries GOOD --out DIR`, where GOOD has "
        "right answers, and this page again with `--cleaning DIR`",
    ),
    "edits": Section(
        "Did the edit work?",
        _has_edits,
        lambda e: edits.blocks(e.directory),
        "No edit yet. Tick rows, export their ids, and take them out with `unlearn remove --run RUN "
        "--ids-file FILE --out ADAPTER`",
    ),
    "heatmap": Section(
        "Groups and queries",
        lambda e: e.table is not None and any(e.rows.groups),
        heatmap,
    ),
    "map": Section(
        "Remembered and hard rows",
        lambda e: len(e.rows) > 0 and (e.self_influence is not None or e.difficulty is not None),
        rows_map,
        "No self-influence yet. Make it with `influence self --run RUN`; forecasts of difficulty "
        "with `unlearn difficulty --run RUN --out F.csv`, then `--difficulty F.csv`",
    ),
    "evaluations": Section(
        "Evaluations",
        lambda e: bool(e.evaluations),
        lambda e: evaluations.blocks(e.evaluations),
    ),
    "faithfulness": Section(
        "Faithfulness",
        lambda e: bool(e.lds or e.manifest.tuned or e.manifest.calibration),
        lambda e: evaluations.faithfulness(e.manifest, e.lds),
        "Scores not checked yet. `analysis lds --run RUN --scores F --queries Q --json > F.json` "
        "compares them with retraining; then `--lds F.json`",
    ),
    "about": Section("How it was made", lambda e: True, about.blocks),
}


def present(explored: Explored) -> list[str]:
    """The names of the sections that a run has."""
    return [name for name, each in SECTIONS.items() if each.there(explored)]
