"""Figures of scores, rows and edits: each function takes results and writes one PNG or SVG file.

They are drawn as those of `analysis.plots`, which hands these functions on: blue above zero and red
below it, which the colour-blind can tell apart, and text of rows as it is, with no markup read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.drawing import (
    GRID,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    checked_target,
    drawn,
)
from analysis.group_sums import group_sums
from influence.errors import InputError
from influence.messages import one_line

if TYPE_CHECKING:
    from influence.rows import Example, Examples
    from influence.scorefile import Scores, SelfInfluence
    from unlearn.difficulty.forecast import Forecast
    from unlearn.record.edit_record import EditRecord

#: Colours and marks of groups, told apart by the colour-blind (Okabe and Ito 2008), in order.
GROUPS = (
    ("#0072b2", "o"),
    ("#e69f00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#d55e00", "v"),
    ("#56b4e9", "P"),
    ("#8a7a00", "X"),
)
#: Characters of a label, and lines of a heat map, at most.
LABEL, LINES = 56, 60


def top_plot(
    scores: Scores,
    query: int | str,
    path: str | os.PathLike[str],
    *,
    k: int = 8,
    overwrite: bool = False,
) -> Path:
    """Draw the strongest proponents and opponents of a query as bars.

    Parameters
    ----------
    scores : Scores
        From `run.score`; of a file the rows' texts are not drawn.
    query : int or str
        Position or id.
    path : path
        Ends in `.png` or `.svg`.
    k : int
        Rows of either end.
    overwrite : bool
        Replace a file that is already there.

    Returns the file written. Raises `InputError` for another ending, a file that exists, a query
    that was not scored, or one without a score.
    """
    target = checked_target(path, overwrite)
    place = scores.query_index(query)
    proponents, opponents = scores.top(place, k)
    entries = [*proponents, *reversed(opponents)]
    if not entries:
        raise InputError(f"query {query!r} has no score but 0: there is nothing to draw")
    rows = scores.train_rows
    names = [
        _label(each.id if rows is None else f"{each.id}: {_said(rows[each.index])}")
        for each in entries
    ]
    values = np.array([each.score for each in entries])
    help_ = np.arange(len(entries)) < len(proponents)

    def draw(axes: Any) -> None:
        _bars(axes, names, values, np.where(help_, POSITIVE, NEGATIVE))
        axes.set_xlabel(f"score, {scores.attributes.get('unit', '')}")
        _title(
            axes,
            f"Rows behind {_label(scores.query_ids[place])}",
            "blue: proponents, red: opponents",
        )

    return drawn(draw, target, height=1.3 + 0.3 * len(entries), width=8.6)


def modules_plot(
    scores: Scores,
    query: int | str,
    path: str | os.PathLike[str],
    *,
    k: int = 30,
    overwrite: bool = False,
) -> Path:
    """Draw which modules of the adapter a query's scores come from, as bars to either side.

    To the right the sum of what speaks for rows, to the left of what speaks against them, over all
    training rows; the k modules with the most of both. Arguments and errors are those of `top_plot`;
    also `InputError` for scores that are not split by module.
    """
    target = checked_target(path, overwrite)
    place = scores.query_index(query)
    if scores.modules is None:
        raise InputError("these scores are not split by module: score with per_module=True")
    parts = scores.modules[place].astype(np.float64)
    above, below = np.maximum(parts, 0).sum(1), np.minimum(parts, 0).sum(1)
    strongest = np.sort(np.argsort(-(above - below), kind="stable")[:k])
    names = [_label(scores.module_names[m]) for m in strongest]

    def draw(axes: Any) -> None:
        _bars(axes, names, above[strongest], POSITIVE, marked=False)
        _bars(axes, names, below[strongest], NEGATIVE, marked=False)
        axes.set_xlabel(f"sum over the training rows, {scores.attributes.get('unit', '')}")
        more = len(scores.module_names) - len(strongest)
        _title(
            axes,
            f"Modules behind {_label(scores.query_ids[place])}",
            f"the {len(strongest)} strongest of {len(scores.module_names)}" if more else "",
        )

    return drawn(draw, target, height=1.3 + 0.24 * len(names), width=8.6)


def groups_plot(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    train: Examples | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw a heat map of queries and groups of training rows: the sum of the group's scores.

    At most 60 queries and groups are drawn: the first queries, the strongest groups. `train` are the
    training rows, where the scores do not hold them. Other arguments and errors are those of
    `top_plot`; also `InputError` where no row has a group.
    """
    target = checked_target(path, overwrite)
    rows = scores.train_rows if train is None else train
    if rows is None or list(rows.ids) != list(scores.train_ids):
        raise InputError(
            "the training rows are not known here: give train=, those that were scored"
        )
    groups = [row.group for row in rows]
    names = list(dict.fromkeys(group for group in groups if group is not None))
    if not names:
        raise InputError("no training row has a group: there is nothing to draw")
    place = {name: k for k, name in enumerate(names)}
    members = np.array([-1 if group is None else place[group] for group in groups])
    sums = group_sums(scores.values, members, len(names))
    shown = np.sort(np.argsort(-np.abs(sums).max(0), kind="stable")[:LINES])
    values = sums[:LINES, shown]
    largest = float(np.abs(values).max()) or 1.0

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        colors = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#f7f7f7", POSITIVE])
        image = axes.imshow(values, cmap=colors, vmin=-largest, vmax=largest, aspect="auto")
        size = 8 if len(values) <= 30 else 6
        axes.set_yticks(range(len(values)), [_label(id) for id in scores.query_ids[: len(values)]])
        axes.set_xticks(
            range(len(shown)), [_label(names[g], 24) for g in shown], rotation=60, ha="right"
        )
        axes.tick_params(length=0, labelsize=size)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)
            label.set_rotation_mode("anchor")
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.7)
        bar.set_label(f"sum of scores, {scores.attributes.get('unit', '')}")
        bar.outline.set_visible(False)
        parts = [
            f"{len(part):,} of {whole:,} {name}"
            for part, whole, name in (
                (values, len(sums), "queries"),
                (shown, len(names), "groups"),
            )
            if len(part) < whole
        ]
        _title(axes, "Which groups of rows move which queries", ", ".join(parts))

    height = 1.9 + 0.19 * len(values)
    return drawn(draw, target, height=height, width=3.4 + 0.32 * len(shown))


def difficulty_plot(
    self_influence: SelfInfluence,
    forecast: Forecast,
    path: str | os.PathLike[str],
    *,
    train: Examples | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw self-influence against the forecast steps of unlearning each row, by group.

    The seven largest groups of `train` have a colour and a mark of their own. Rows whose target no
    ascent reaches are counted in the title. Other arguments and errors are those of `top_plot`; also
    `InputError` where no row has both numbers.
    """
    target = checked_target(path, overwrite)
    at = {id: k for k, id in enumerate(self_influence.train_ids)}
    table = forecast.table
    known = [
        (at[id], steps) for id, steps in zip(table["id"], table["steps"], strict=True) if id in at
    ]
    places = np.array([place for place, _ in known], dtype=int)
    steps = np.array([value for _, value in known], dtype=float)
    own = np.asarray(self_influence.values, dtype=float)[places]
    drawable = np.isfinite(steps) & (steps > 0) & (own > 0)
    if not drawable.any():
        raise InputError("no row has both a self-influence and forecast steps above 0")
    groups = np.array(
        ["" if train is None else train[k].group or "" for k in places.tolist()], dtype=object
    )
    names, counts = np.unique(groups[groups != ""].astype(str), return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")][: len(GROUPS)].tolist()
    unreached = int(np.isinf(steps).sum())

    def draw(axes: Any) -> None:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        others = drawable & ~np.isin(groups, largest)
        axes.scatter(
            steps[others], own[others], s=16, color=MUTED, alpha=0.6,
            label="other rows" if largest else None,
        )  # fmt: skip
        for name, (color, mark) in zip(largest, GROUPS, strict=False):
            some = drawable & (groups == name)
            axes.scatter(
                steps[some], own[some], s=26, color=color, marker=mark, alpha=0.85,
                label=_label(name, 24),
            )  # fmt: skip
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            _round_ticks(axis)
        axes.set_xlabel("forecast steps of ascent until the row is unlearned")
        axes.set_ylabel("self-influence, nats per token")
        if largest:
            legend = axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
            for text in legend.get_texts():
                text.set_parse_math(False)
        note = f"{unreached:,} rows that no ascent reaches are left out" if unreached else ""
        _title(axes, "Remembered rows, and hard ones", note)

    return drawn(draw, target, height=4.4, width=8.0 if largest else 6.4)


def trade_off_plot(
    edits: Mapping[str, EditRecord], path: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Draw what each edit did to the edited rows against what it did to the others.

    Parameters
    ----------
    edits : mapping of str to EditRecord
        By the name that is drawn beside the point: `edit.record`, or `read_edit_record(folder)` of
        `analysis.report.reading`. All should be of the same rows.
    path, overwrite
        As in `top_plot`.

    Up is forgotten, to the right is damage; a dashed line is the loss that the first edit should
    reach. Raises `InputError` where no edit has the four losses.
    """
    target = checked_target(path, overwrite)
    found = []
    for name, record in edits.items():
        edited, kept = record.losses.edited, record.losses.retained
        numbers = (edited.before, edited.after, kept.before, kept.after)
        if None not in numbers:
            found.append((name, *numbers))
    if not found:
        raise InputError("no edit was given that has its losses before and after: give one or more")
    goal = next(iter(edits.values())).losses.edited.target

    def draw(axes: Any) -> None:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        if goal is not None:
            axes.axhline(goal, color=MUTED, linestyle="--", linewidth=1, label="loss to reach")
        for k, (name, before, after, kept_before, kept_after) in enumerate(found):
            color, mark = GROUPS[k % len(GROUPS)]
            rise = kept_after - kept_before
            axes.annotate(
                "",
                (rise, after),
                (0, before),
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.5},
            )
            axes.scatter(0, before, s=36, facecolors="white", edgecolors=color, zorder=3)
            axes.scatter(rise, after, s=44, color=color, marker=mark, zorder=4)
            axes.annotate(
                _label(name, 32), (rise, after), (7, 3), textcoords="offset points",
                size=9, parse_math=False,
            )  # fmt: skip
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("rise of the retained rows' loss, nats per token")
        axes.set_ylabel("loss of the edited rows, nats per token")
        if goal is not None:
            axes.legend(frameon=False, loc="lower right")
        axes.margins(x=0.25, y=0.12)
        _title(axes, "Forgotten, at what cost to the rest", "hollow: before the edit")

    return drawn(draw, target, height=4.4, width=7.2)


# ---- parts ---------------------------------------------------------------------------------------


def _label(text: str, width: int = LABEL) -> str:
    return one_line(text, width)


def _title(axes: Any, title: str, note: str = "") -> None:
    """A title from the left edge of the figure, and what should be known above the axes."""
    axes.figure.suptitle(
        title, x=0.01, ha="left", fontweight="bold", fontsize=12, color=INK, parse_math=False
    )
    if note:
        axes.set_title(note, loc="left", fontsize=9, color=MUTED, parse_math=False)


def _round_ticks(axis: Any) -> None:
    """Numbers as they are said on a logarithmic axis: 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _said(row: Example) -> str:
    """What tells a row from others in few letters: its answer, where it has one."""
    return row.preview(LABEL) if row.answer is None else row.answer


def _bars(
    axes: Any, names: Sequence[str], values: np.ndarray, colors: Any, *, marked: bool = True
) -> None:
    """Horizontal bars from the top, with their values beside them if `marked`."""
    axes.barh(range(len(names)), values, color=colors, height=0.68)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.spines["left"].set_visible(False)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    if marked:
        for place, value in enumerate(values):
            side = 1 if value >= 0 else -1
            axes.annotate(
                f"{value:+.2g}", (value, place), (4 * side, 0), textcoords="offset points",
                va="center", ha="left" if side > 0 else "right", size=8, color=MUTED,
            )  # fmt: skip
        axes.margins(x=0.16)
