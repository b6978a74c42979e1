"""The commands that say what a run found: top and without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from influence import console
from influence.errors import DataError, InputError, MismatchError
from influence.options import (
    ColumnsOption,
    CurvatureOptions,
    ExplainOption,
    JsonOption,
    LoadingOptions,
    PointOption,
    RowsOptions,
    RunOption,
    command,
    keywords,
    option,
)

if TYPE_CHECKING:  # a command's help does not wait for torch
    from rich.table import Table
    from rich.text import Text

    from influence.manifest import DataSource
    from influence.rows import Examples
    from influence.without import Effect

#: Said under every table of scores.
ORDER = (
    "Read the order before the size: removing one row of several that teach the same changes far "
    "less."
)
#: Characters of a row that a table shows.
PREVIEW = 90


@dataclass(frozen=True, kw_only=True)
class Top(RunOption, JsonOption):
    """The options of `influence top`."""

    query: str = option("Query id, or its position in the query file.")
    scores: Path | None = option("Score file. Default: scores.h5 in the run.", default=None)
    k: int = option("Rows of each kind.", default=10, flag="-k")


def top(options: Top) -> None:
    """Show the rows whose removal would raise (proponents) and lower (opponents) a query's loss the
    most.
    """
    from influence.manifest import read_manifest
    from influence.scorefile import Scores

    console.at_least("-k", options.k, 1)
    manifest = read_manifest(options.run)
    path = options.scores or options.run / "scores.h5"
    if not path.exists():
        raise InputError(
            f"{path} does not exist: "
            f"make it with influence score --run {options.run} --queries QUERIES"
        )
    scores = Scores.load(path, detail=False)
    if scores.attributes.get("run_digest") != manifest.digest:
        raise MismatchError(
            f"{path} belongs to another run than {options.run}: give the run it was made from"
        )
    position = scores.query_index(options.query)
    proponents, opponents = scores.top(position, options.k)
    train = _rows_fitted_on(options.run, manifest.data)
    query = scores.query_ids[position]
    if options.json:
        console.emit(
            {
                "query": query,
                "proponents": [vars(entry) for entry in proponents],
                "opponents": [vars(entry) for entry in opponents],
            },
            "",
            True,
        )
        return
    attributes, shown = scores.attributes, console.printable(query)
    measurement = attributes.get("measurement", "loss")
    effects = ("raise", "lower") if attributes.get("rises", True) else ("lower", "raise")
    for name, entries, effect in (
        ("proponents", proponents, effects[0]),
        ("opponents", opponents, effects[1]),
    ):
        title = f"{name} of {shown}: removing one would {effect} its {measurement}"
        previews = [train[e.index].preview(PREVIEW) if train else "" for e in entries]
        cells = [
            (f"{entry.score:+.2e}", entry.id, preview)
            for entry, preview in zip(entries, previews, strict=True)
        ]
        console.show(table(title, f"score ({attributes.get('unit', '')})", cells))
    if "points" in attributes:
        console.show(f"{describe(attributes)}. {ORDER}")


def _rows_fitted_on(run: Path, data: DataSource) -> Examples | None:
    """The rows that a run was fitted on, None where they are gone, or the hub is not reached.

    Raises `MismatchError` where they have changed.
    """
    from influence.progress import say
    from influence.row_files import place_of, read_again

    place = place_of(data.path) if data.path else None
    if not data.path or (place is not None and not place.exists()):
        return None
    try:
        train = read_again(data.path, data.columns)
    except DataError as error:
        if place is not None:
            raise
        say(f"note: the rows' texts are not shown: {error}")
        return None
    if train.digest != data.digest:
        raise MismatchError(
            f"{data.path} has changed since {run} was fitted: restore it, or fit a new run"
        )
    return train


@dataclass(frozen=True, kw_only=True)
class Without(
    RunOption,
    RowsOptions,
    ColumnsOption,
    ExplainOption,
    CurvatureOptions,
    PointOption,
    LoadingOptions,
    JsonOption,
):
    """The options of `influence without`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"explain": "queries", "columns": "queries"}

    group: str | None = option("Remove all rows of this group.", default=None)
    queries: str | None = option(
        "Rows whose losses are predicted beside the removed ones'.", default=None
    )
    out: Path | None = option("Write the table here too (CSV).", default=None)


def without(options: Without) -> None:
    """Predict the loss of every query, and of the removed rows themselves, if some training rows
    go together: no sum of their scores, because rows that teach the same stand in for each other.
    """
    from influence.manifest import read_manifest
    from influence.row_files import read_examples
    from influence.row_ids import named_ids
    from influence.run import Run

    if options.ids is options.ids_file is options.group is None:
        raise InputError(
            "name the rows to do without: --ids A,B,C, --ids-file FILE (one id per line) or "
            "--group G"
        )
    if options.out is not None and options.out.exists():
        raise InputError(f"{options.out} exists: give another --out, or move it away")
    train = _rows_fitted_on(options.run, read_manifest(options.run).data)
    ids = named_ids(options, train) or []
    queries = None
    if options.queries is not None:
        queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    run = Run.open(options.run, train=train, **keywords(LoadingOptions, options))
    effect = run.without(
        ids,
        queries,
        group=options.group,
        curvature=options.curvature,
        damping=options.damping,
        at=options.at,
        explain=options.explain,
    )
    if options.out is not None:
        _write_csv(options.out, effect)
    if options.json:
        console.emit(effect.as_json(), "", True)
        return
    texts = {"queries": queries, "removed": run.train}
    for name, title in (
        ("queries", f"queries without {len(effect.removed)} training rows"),
        ("removed", "the removed rows themselves"),
    ):
        found = getattr(effect, name)
        if found:
            console.show(_predictions(title, found, texts[name]))
    console.show(
        f"nats per token; {describe(effect.attributes)}. The interval is that of the size on the "
        "models it was measured on (unlearn retrain gives the exact answer)."
    )


def _predictions(title: str, found: Iterable[Any], rows: Examples | None) -> Table:
    """A table of predicted losses."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left")
    for name in ("before", "predicted", "interval"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("id", max_width=24, overflow="fold")
    shown.add_column("row", overflow="fold")
    for each in found:
        held = " (held)" if each.beyond else ""
        interval = f"{each.low:.3f} to {each.high:.3f}"
        preview = "" if rows is None else rows[rows.index(each.id)].preview(PREVIEW)
        numbers = (f"{each.before:.3f}", f"{each.predicted:.3f}{held}", interval)
        shown.add_row(*numbers, cell(each.id), cell(preview))
    return shown


def _write_csv(path: Path, effect: Effect) -> None:
    """The predictions as a table: kind, id, and the numbers."""
    import pandas as pd

    rows = [
        {"kind": kind, **vars(each)}
        for kind in ("queries", "removed")
        for each in getattr(effect, kind)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)


def add(app: typer.Typer) -> None:
    """Register the commands."""
    command(app, Top)(top)
    command(app, Without)(without)


def describe(attributes: Mapping[str, Any]) -> str:
    """With what scores were made, in one line."""
    labels = ", ".join(str(label) for label in attributes["points"])
    calibration = attributes["calibration"]
    size = "not calibrated" if calibration == "none" else f"calibrated by {calibration}"
    credit = attributes.get("credit", "additive")
    if credit == "shared" and calibration == "none":
        size = "from the losses along the path"
    return (
        f"{attributes['geometry']} {attributes['curvature']}, damping {attributes['damping']}, "
        f"points {labels}, credit {credit}, size {size}"
    )


def table(title: str, first: str, rows: Iterable[tuple[str, str, str]]) -> Table:
    """A table of training rows: a number, the id, and how the row begins."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, justify="right", no_wrap=True)
    table.add_column("id", max_width=24, overflow="fold")
    table.add_column("row", overflow="fold")
    for number, id, text in rows:
        table.add_row(number, cell(id), cell(text))
    return table


def cell(text: str) -> Text:
    """Row text as plain text: no markup is read from it."""
    from rich.text import Text

    return Text(console.printable(text))
