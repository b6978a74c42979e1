"""Texts and tables for a person: of the linear datamodeling score and of a tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from influence import console

if TYPE_CHECKING:  # a command's help does not wait for the libraries of the work
    from rich.table import Table

    from analysis.metrics.lds import LDS
    from analysis.stats import Interval
    from analysis.tune import Tuning

#: Headings of the table of a tuning that are too long for it.
SHORT_HEADINGS = {
    "concentration": "conc.",
    "agreement": "agree.",
    "selectivity": "select.",
    "calibration": "calib.",
}


def lds_text(result: LDS, seed: int, query_ids: Sequence[str] | None = None) -> str:
    """A linear datamodeling score, with the Spearman of every query where `query_ids` are given."""
    interval = result.interval
    text = (
        f"LDS {_with_interval(result.mean, interval)} "
        f"({interval.resamples} resamples of {result.subsets} retrained adapters, seed {seed}); "
        f"mean Spearman over {result.queries - result.undefined} of {result.queries} queries"
    )
    if query_ids is None:
        return text
    names = [console.printable(id).replace("\n", " ") for id in query_ids]
    values = result.per_query.tolist()
    lines = [f"{rho:+.4f}  {name}" for rho, name in zip(values, names, strict=True)]
    return "\n".join([text, *lines])


def tuning_record(result: Tuning, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The choice and the best settings `rows`, best first, for a program."""
    held_out = None
    if result.held_out is not None:
        interval = result.held_out.interval
        held_out = {"lds": result.held_out.mean, "low": interval.low, "high": interval.high}
    return {
        "chosen": rows[0],
        "by": result.by,
        "held_out": held_out,
        "exact": result.exact,
        "table": rows,
    }


def tuning_text(result: Tuning, place: str, columns: int) -> str:
    """What was chosen, where it is kept, and how good it is by exact scores of `columns` rows."""
    lines = [f"chosen by {result.by}: {result.chosen.name}; {place}"]
    if result.held_out is not None:
        score = _with_interval(result.held_out.mean, result.held_out.interval)
        lines.append(f"LDS of the chosen setting on the other subsets: {score}")
    if result.exact is not None:
        lines.append(
            f"Spearman of its scores with the exact GGN's on {columns} rows: {result.exact:.3f} "
            f"(worst residual {result.exact_residual:.1e})"
        )
    return "\n".join(lines)


def tuning_table(rows: Sequence[Mapping[str, Any]], judged: int) -> Table:
    """The best settings, one a row, of all `judged`."""
    from rich.table import Table

    table = Table(title=f"the best {len(rows)} of {judged} settings", title_justify="left")
    for name, value in rows[0].items():
        justify = "right" if isinstance(value, float) else "left"
        table.add_column(SHORT_HEADINGS.get(name, name), justify=justify, overflow="fold")
    for row in rows:
        values = row.values()
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return table


def _with_interval(mean: float, interval: Interval) -> str:
    return f"{mean:.4f}, {interval.level:.0%} interval [{interval.low:.4f}, {interval.high:.4f}]"
