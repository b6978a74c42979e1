"""The commands that say what a run found: top and without."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from influence import console
from influence.errors import DataError, InputError, MismatchError, ToolkitError
from influence.options import (
    BudgetOptions,
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
from influence.progress import say

if TYPE_CHECKING:  # a command's help does not wait for torch
    import numpy as np
    from rich.text import Text

    from influence.manifest import DataSource, Manifest
    from influence.row_table import RowTable
    from influence.rows import Example, Examples
    from influence.run import Run
    from influence.scorefile import Entry, Scores
    from influence.strongest import Strongest
    from influence.tokenwise import Tokenwise
    from influence.without import Effect

#: Where `score --top` puts what it keeps, in the run.
STRONGEST = "strongest.h5"
#: Said under every table of additive scores.
ORDER = (
    "Read the order before the size: removing one row of several that teach the same changes far "
    "less."
)
#: Said under every table of shared ones.
SHARED_ORDER = (
    "A size is that of removing this row alone, right within a factor of a few; several rows "
    "together do more or less than their sum (influence without)."
)
#: Characters of a row that a table shows.
PREVIEW = 90
#: Tokens of a row that are shown with their part of its score.
MOST_TOKENS = 3
#: What ranks rows.
RANKINGS = ("effect", "text", "both")
#: Characters of a row that is shown in full.
WHOLE = 10**9


@dataclass(frozen=True, kw_only=True)
class Top(RunOption, ColumnsOption, JsonOption):
    """The options of `influence top`."""

    query: str = option("Query id, or its position in the query file.")
    scores: Path | None = option(
        "Score file. Default: scores.h5 in the run, else strongest.h5.", default=None
    )
    k: int = option("Rows of each kind.", default=10, flag="-k")
    by: str = option(
        "What ranks the rows: effect (how much removing one changes the query), text (BM25: which "
        "row says this?), or both (the sum of the two, standardised).",
        default="effect",
    )
    queries: str | None = option(
        "The query file, for --by text and both, where it no longer lies where it was scored.",
        default=None,
    )
    whole: bool = option("Show rows in full, not how they begin.", default=False)


def top(options: Top) -> None:
    """Show the rows whose removal would raise (proponents) and lower (opponents) a query's loss the
    most, or with --by the rows that say what it says.
    """
    from influence.manifest import read_manifest
    from influence.scorefile import Scores, tokens_of_query

    console.at_least("-k", options.k, 1)
    if options.by not in RANKINGS:
        raise InputError(f"--by {options.by} was given; expected {', '.join(RANKINGS)}")
    manifest = read_manifest(options.run)
    path = options.scores or scores_of(options.run) or options.run / "scores.h5"
    if not path.exists():
        raise InputError(
            f"{path} does not exist: "
            f"make it with influence score --run {options.run} --queries QUERIES"
        )
    scores = _scores_in(path)
    if scores.attributes.get("run_digest") != manifest.digest:
        raise MismatchError(
            f"{path} belongs to another run than {options.run}: give the run it was made from"
        )
    position = scores.query_index(options.query)
    train = rows_fitted_on(options.run, manifest.data)
    queries = rows_scored(scores.attributes, options.queries, options.columns)
    query = None if queries is None else queries[position]
    if options.by != "effect" and not isinstance(scores, Scores):
        raise InputError(
            f"--by {options.by} ranks all rows, and {path} keeps the strongest alone: score without "
            "--top"
        )
    if options.by == "effect" or not isinstance(scores, Scores):
        proponents, opponents = scores.top(position, options.k)
        found, similar = {"proponents": proponents, "opponents": opponents}, None
    else:
        similar = _similarities(options, query, train)
        ranked = similar
        if options.by == "both":
            from influence.text_search import standardised

            sign = 1 if scores.attributes.get("rises", True) else -1
            ranked = standardised(similar) + standardised(sign * scores.values[position])
        found = {"rows": scores.ranked(position, ranked, options.k)}
    if options.json:
        entries = {
            name: [vars(each) | _similarity(similar, each) for each in rows]
            for name, rows in found.items()
        }
        console.emit({"query": scores.query_ids[position], "by": options.by, **entries}, "", True)
        return
    tokens = None if options.by == "text" else tokens_of_query(path, position)
    _show_top(options, scores, position, found, train, query, similar, tokens)


def _scores_in(path: Path) -> Scores | Strongest:
    """What a file holds: all scores, or the strongest of each query."""
    from influence.scorefile import Scores
    from influence.store import open_file
    from influence.strongest import Strongest

    with open_file(path) as file:
        whole = "highest" not in file
    return Scores.load(path, detail=False) if whole else Strongest.load(path)


def _similarity(similar: np.ndarray | None, entry: Entry) -> dict[str, float]:
    """A row's BM25 where that was asked for."""
    return {} if similar is None else {"text": float(similar[entry.index])}


def _similarities(options: Top, query: Example | None, train: Examples | None) -> np.ndarray:
    """BM25 of the query with every training row, `[n]`."""
    from influence.text_search import bm25, text_of

    if query is None or train is None:
        missing = "the query's" if query is None else "the training rows'"
        raise InputError(
            f"--by {options.by} compares texts, and {missing} text is not known here: give "
            "--queries FILE for queries that were scored one by one, and the run's rows where they "
            "lay"
        )
    return bm25([text_of(query)], [text_of(row) for row in train])[0]


def _show_top(
    options: Top,
    scores: Scores | Strongest,
    position: int,
    found: Mapping[str, list[Entry]],
    train: Examples | None,
    query: Example | None,
    similar: np.ndarray | None,
    tokens: Tokenwise | None,
) -> None:
    """Show the tables of a ranking, and what the scores were made with."""
    from rich.text import Text

    from influence.manifest import read_manifest

    attributes = scores.attributes
    shared = _shared_words(query, train)
    name = console.printable(scores.query_ids[position])
    if query is not None:
        width = WHOLE if options.whole else PREVIEW
        console.show(Text.assemble(f"{name}: ", cell(query.preview(width), shared)))
    effects = ("raise", "lower") if attributes.get("rises", True) else ("lower", "raise")
    measurement = attributes.get("measurement", "loss")
    titles = {
        "proponents": f"proponents of {name}: removing one would {effects[0]} its {measurement}",
        "opponents": f"opponents of {name}: removing one would {effects[1]} its {measurement}",
        "rows": f"rows that say what {name} says, by {options.by}",
    }
    grouped = train is not None and any(train[e.index].group for es in found.values() for e in es)
    columns = [f"score ({attributes.get('unit', '')})"]
    columns += ["BM25"] * (similar is not None)
    tokenizer = None if tokens is None else tokenizer_of(read_manifest(options.run))
    for kind, entries in found.items():
        rows = []
        for each in entries:
            row = None if train is None else train[each.index]
            numbers = [f"{each.score:+.2e}"]
            numbers += [f"{_similarity(similar, each)['text']:.1f}"] if similar is not None else []
            group = [str((row.group if row else None) or "")] if grouped else []
            text = "" if row is None else row.preview(WHOLE if options.whole else PREVIEW)
            if tokens is not None and tokenizer is not None:
                text += _strongest_tokens(tokenizer, *tokens.row(0, each.index))
            rows.append((numbers, each.id, [*group, text]))
        texts = ["id", *(["group"] if grouped else []), "row"]
        console.show(wide_table(titles[kind], columns, texts, rows, shared))
    if "points" in attributes:
        console.show(f"{describe(attributes)}. {order(attributes)}")


def _shared_words(query: Example | None, train: Examples | None) -> set[str]:
    """The query's words by which rows are marked, none where texts are not known."""
    from influence.text_search import shared_words, text_of

    if query is None or train is None:
        return set()
    return shared_words(text_of(query), [text_of(row) for row in train])


def _strongest_tokens(tokenizer: Any, ids: np.ndarray, values: np.ndarray) -> str:
    """The tokens `ids` [T] of a row that carry most of its score, with their `values` [T]."""
    strongest = sorted(range(len(ids)), key=lambda place: -abs(values[place]))[:MOST_TOKENS]
    shown = (f"{tokenizer.decode([int(ids[k])])!r} {values[k]:+.1e}" for k in strongest)
    return f"\n[at {', '.join(shown)}]"


def tokenizer_of(manifest: Manifest) -> Any:
    """The tokenizer of a run, without its model; None where it cannot be read."""
    from influence.adapter_files import read_adapter
    from influence.tokenizer_files import load_tokenizer

    if manifest.adapter.path is None or manifest.base.path is None:
        return None
    console.quiet_transformers()
    try:
        return load_tokenizer(read_adapter(manifest.adapter.path).folder, manifest.base.path)
    except (ToolkitError, OSError) as error:
        say(f"note: tokens are not shown: {error}")
        return None


def scores_of(run: Path) -> Path | None:
    """The file in a run that holds scores of queries: all, or else the strongest. None: neither."""
    from influence.store import open_file

    for name in ("scores.h5", STRONGEST):
        path = run / name
        if path.exists():
            with open_file(path) as file:
                if "query_ids" in file:
                    return path
    return None


def scored_queries(attributes: Mapping[str, Any]) -> Examples | None:
    """The rows that were scored, read again from where a score file says that they lay; None where
    those have changed.
    """
    from influence.row_files import read_again

    columns = attributes.get("query_columns")
    rows = read_again(str(attributes["queries"]), json.loads(str(columns)) if columns else None)
    return rows if rows.digest == attributes["query_digest"] else None


def rows_scored(
    attributes: Mapping[str, Any],
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Examples | None:
    """The rows of a score file's queries, from `source` or from where they lay.

    None where several rows make up a query, and where they are gone, have changed, or lie on a hub,
    which is not asked for texts. Raises `MismatchError` where `source` holds others, and `DataError`
    where what lies there cannot be read.
    """
    from influence.row_files import place_of, read_examples

    if source is not None:
        rows = read_examples(source, columns=columns)
        if rows.digest != attributes.get("query_digest"):
            raise MismatchError(f"{source} is not what was scored: give the file of the queries")
        return None if "aggregate" in attributes else rows
    kept = str(attributes.get("queries") or "")
    place = place_of(kept) if kept and "aggregate" not in attributes else None
    return scored_queries(attributes) if place is not None and place.exists() else None


def rows_fitted_on(run: Path, data: DataSource) -> Examples | None:
    """The rows that a run was fitted on, None where they are gone, or the hub is not reached.

    Raises `MismatchError` where they have changed.
    """
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
class WithoutOptions(
    RunOption, RowsOptions, ColumnsOption, ExplainOption, BudgetOptions, LoadingOptions, JsonOption
):
    """Which rows go, and what is asked of the model without them.

    Raises `InputError` where no row is named, and for a file that exists.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"explain": "queries", "columns": "queries"}

    group: str | None = option("Remove all rows of this group.", default=None)
    queries: str | None = option(
        "Rows whose losses are predicted beside the removed ones'.", default=None
    )
    out: Path | None = option("Write the table here too (CSV).", default=None)

    def __post_init__(self) -> None:
        if self.ids is self.ids_file is self.group is None:
            raise InputError(
                "name the rows to do without: --ids A,B,C, --ids-file FILE (one id per line) or "
                "--group G"
            )
        if self.out is not None and self.out.exists():
            raise InputError(f"{self.out} exists: give another --out, or move it away")


@dataclass(frozen=True, kw_only=True)
class Without(WithoutOptions, CurvatureOptions, PointOption):
    """The options of `influence without`."""


def opened(options: WithoutOptions) -> tuple[Run, list[str], Examples | None]:
    """The run that is asked about, the ids of the rows that go, and the queries."""
    from influence.manifest import read_manifest
    from influence.row_files import read_examples
    from influence.row_ids import named_ids
    from influence.run import Run
    from influence.sharding import refuse_curvature

    train = rows_fitted_on(options.run, read_manifest(options.run).data)
    ids = named_ids(options, train) or []
    queries = None
    if options.queries is not None:
        queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    if options.shard:
        refuse_curvature(getattr(options, "curvature", None))
    run = Run.open(options.run, train=train, **keywords(LoadingOptions, options))
    return run, ids, queries


def without(options: Without) -> None:
    """Predict the loss of every query, and of the removed rows themselves, if some training rows
    go together: no sum of their scores, because rows that teach the same stand in for each other.
    """
    from influence import distributed

    options = replace(options, device=distributed.join(options.device))
    run, ids, queries = opened(options)
    effect = run.without(
        ids,
        queries,
        group=options.group,
        curvature=options.curvature,
        damping=options.damping,
        at=options.at,
        explain=options.explain,
    )
    tell(
        effect,
        options,
        queries,
        run.train,
        f"{describe(effect.attributes)}. The interval is that "
        "of the size on the models it was measured on (unlearn without: by small trainings; unlearn "
        "retrain: the exact answer).",
    )
    distributed.leave()


def tell(
    effect: Effect, options: WithoutOptions, queries: Examples | None, train: Examples, how: str
) -> None:
    """Print an effect, and write it where that is asked for; `how` it was found is said below."""
    from influence import distributed

    if (out := options.out) is not None:
        distributed.at_first(lambda: _write_csv(out, effect))
    if options.json:
        console.emit(effect.as_json(), "", True)
        return
    texts = {"queries": queries, "removed": train}
    for name, title in (
        ("queries", f"queries without {len(effect.removed)} training rows"),
        ("removed", "the removed rows themselves"),
    ):
        found = getattr(effect, name)
        if found:
            console.show(_predictions(title, found, texts[name]))
    console.show(f"nats per token; {how}")


def _predictions(title: str, found: Iterable[Any], rows: Examples | None) -> RowTable:
    """A table of predicted losses."""
    shown = []
    for each in found:
        held = " (held)" if each.beyond else ""
        interval = f"{each.low:.3f} to {each.high:.3f}"
        preview = "" if rows is None else rows[rows.index(each.id)].preview(PREVIEW)
        numbers = (f"{each.before:.3f}", f"{each.predicted:.3f}{held}", interval)
        shown.append((numbers, each.id, [preview]))
    return wide_table(title, ("before", "predicted", "interval"), ("id", "row"), shown)


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
    command(app, Without, shared=True, sharded=True)(without)


def order(attributes: Mapping[str, Any]) -> str:
    """How the sizes of scores are to be read."""
    return SHARED_ORDER if attributes.get("credit") == "shared" else ORDER


def describe(attributes: Mapping[str, Any]) -> str:
    """With what scores were made, in one line."""
    labels = ", ".join(str(label) for label in attributes["points"])
    calibration = attributes["calibration"]
    size = "not calibrated" if calibration == "none" else f"calibrated by {calibration}"
    credit = attributes.get("credit", "additive")
    if credit == "shared" and calibration == "none":
        size = "from the losses along the path"
    rows = ", rows in few bytes" if "store" in attributes else ""
    if "rerank" in attributes:
        rows += f" and the first {attributes['rerank']} of either end by whole gradients"
    return (
        f"{attributes['geometry']} {attributes['curvature']}, damping {attributes['damping']}, "
        f"points {labels}, credit {credit}, size {size}{rows}"
    )


def table(title: str, first: str, rows: Iterable[tuple[str, str, str]]) -> RowTable:
    """A table of training rows: a number, the id, and how the row begins."""
    cells = (([number], id, [text]) for number, id, text in rows)
    return wide_table(title, [first], ["id", "row"], cells)


def wide_table(
    title: str,
    numbers: Sequence[str],
    texts: Sequence[str],
    rows: Iterable[tuple[Sequence[str], str, Sequence[str]]],
    shared: Container[str] = (),
) -> RowTable:
    """A table of rows: some numbers, the id, and texts. The columns are named.

    Words of the last text that are in `shared` are marked.
    """
    from influence.row_table import RowTable

    lines = [
        (values, [cell(id), *map(cell, others[:-1]), cell(others[-1], shared)])
        for values, id, others in rows
    ]
    return RowTable(title, numbers, texts, lines)


def cell(text: str, shared: Container[str] = ()) -> Text:
    """Row text as plain text: no markup is read from it. Words in `shared` are marked."""
    from influence.row_table import marked

    return marked(console.printable(text), shared)
