"""Pictures of studies: each function takes arrays and returns a matplotlib `Figure`.

One panel for each world.

`title` says what is to be seen. Blue and red of `analysis.plots` are told apart by the
colour-blind, and shape or place says the same again. Text of rows is drawn as it is: no markup of
matplotlib in it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.drawing import GRID, INK, MUTED, NEGATIVE, POSITIVE, STYLE
from analysis.metrics.lds import LDS
from influence.curvature import PLAIN
from influence.errors import InputError

_DPI = 110
#: Characters in a line of a row's text.
_COLUMNS = 108
#: Ticks of a logarithmic axis of counts.
_STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500)


def ranks_plot(hits: Mapping[str, np.ndarray], title: str, *, most: int = 40) -> Figure:
    """Share of hits among the strongest k rows of either end of a ranking, and chance's.

    Parameters
    ----------
    hits : mapping of str to bool array [Q, n]
        For each world, whether the k-th strongest proponent of a query is a hit; the last column is
        the strongest opponent.
    title : str
    most : int
        The largest k.
    """
    figure, panels = _panels(hits, title, share=True, height=3.4)
    for axes, world_hits in zip(panels, hits.values(), strict=True):
        shares = world_hits.astype(float)
        k = np.arange(1, min(most, shares.shape[1]) + 1)
        for ranked, color, style, label in (
            (shares, POSITIVE, "-", "strongest proponents"),
            (shares[:, ::-1], NEGATIVE, "--", "strongest opponents"),
        ):
            share = ranked[:, : len(k)].cumsum(1) / k
            error = 1.96 * share.std(0) / np.sqrt(len(share))
            axes.fill_between(
                k,
                share.mean(0) - error,
                share.mean(0) + error,
                color=color,
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(k, share.mean(0), style, color=color, label=label)
        axes.axhline(
            shares.mean(), color=MUTED, linewidth=1, linestyle=":", label="all rows: chance"
        )
        axes.set(xlabel="k strongest rows", ylim=(0, 1.02), xlim=(1, len(k)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("share about the query's subject")
    panels[0].legend(frameon=False)
    return figure


def tokens_plot(rows: Mapping[str, tuple[Sequence[str], np.ndarray]], title: str) -> Figure:
    """Text of rows with every token shaded by its score.

    Blue above zero, red (and underlined) below it.

    Parameters
    ----------
    rows : mapping of str to (tokens [T], scores [T], nats)
        A heading, and the row under it; each row has a colour scale of its own, and its largest
        score is written beside it.
    title : str
    """
    lines = {head: _wrapped(tokens) for head, (tokens, _) in rows.items()}
    if not rows:
        raise InputError("no rows were given to draw; give one or more")
    with rc_context(STYLE):
        height = sum(1.9 + len(wrapped) for wrapped in lines.values())
        figure = Figure(figsize=(8.6, 0.27 * height + 0.5), dpi=_DPI)
        axes = figure.add_axes((0.01, 0.01, 0.98, 0.98 - 0.42 / (0.27 * height + 0.5)))
        axes.set(xlim=(0, _COLUMNS), ylim=(height, 0))
        axes.axis("off")
        figure.text(0.012, 0.985, title, va="top", fontweight="bold", fontsize=12, color=INK)
        top = 0.6
        for head, (tokens, scores) in rows.items():
            largest = float(np.abs(scores).max()) or 1.0
            note = f"{_visible(head)}   (darkest token {scores[np.abs(scores).argmax()]:+.2g} nats)"
            axes.text(0, top, note, va="center", color=MUTED, fontsize=9, parse_math=False)
            for number, line in enumerate(lines[head]):
                for token, column in line:
                    _token(
                        axes,
                        (column, top + 1 + number),
                        _visible(tokens[token]),
                        scores[token] / largest,
                    )
            top += 1.9 + len(lines[head])
    return figure


def settings_plot(
    points: Mapping[str, Mapping[str, tuple[float, float]]], chosen: Mapping[str, str], title: str
) -> Figure:
    """Concentration and selectivity of each setting, as measured edits show them.

    Parameters
    ----------
    points : mapping of world to mapping of setting to (concentration, selectivity)
        As in `analysis.tune`; names of settings that begin with `identity` are gradient products.
    chosen : mapping of world to setting
    title : str
    """
    figure, panels = _panels(points, title, share=False, height=3.8)
    for axes, (world, settings) in zip(panels, points.items(), strict=True):
        for plain, color, marker, label in (
            (False, POSITIVE, "o", "with EK-FAC"),
            (True, NEGATIVE, "X", "gradient products"),
        ):
            place = np.array(
                [value for name, value in settings.items() if name.startswith(PLAIN) is plain]
            )
            axes.scatter(
                *place.T, s=46, color=color, marker=marker, label=label, zorder=3, alpha=0.85
            )
        best = settings[chosen[world]]
        axes.scatter(
            *best,
            s=190,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.3,
            zorder=4,
            label="chosen",
        )
        axes.set(
            xlim=(0, 1.15 * max(x for x, _ in settings.values())),
            ylim=(0, 1.15 * max(y for _, y in settings.values())),
        )
        axes.set_xlabel("concentration: share of the strongest row\nin all influence on a row")
    panels[0].set_ylabel("selectivity: rise of the edited row's\nloss / mean change of the others'")
    panels[0].legend(frameon=False, loc="upper left")
    return figure


def lds_settings_plot(results: Mapping[str, Mapping[str, LDS]], title: str) -> Figure:
    """The linear datamodeling score of some settings with its interval, best at the top."""
    figure, panels = _panels(
        results,
        title,
        share=False,
        height=0.9 + 0.34 * max(len(scores) for scores in results.values()),
    )
    for axes, scores in zip(panels, results.values(), strict=True):
        names = sorted(scores, key=lambda name: scores[name].mean)
        for place, name in enumerate(names):
            score, color = scores[name], NEGATIVE if "gradient products" in name else POSITIVE
            marker = "X" if "gradient products" in name else "o"
            axes.hlines(
                place, score.interval.low, score.interval.high, color=color, linewidth=2, alpha=0.5
            )
            axes.scatter(score.mean, place, color=color, marker=marker, s=42, zorder=3)
            axes.annotate(
                f"{score.mean:.2f}",
                (score.mean, place),
                (0, 6),
                textcoords="offset points",
                ha="center",
                size=8,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, None), ylim=(-0.6, len(names) - 0.2))
        axes.set_xlabel("linear datamodeling score, 95 % interval over retrained adapters")
    return figure


def losses_plot(
    losses: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    goals: Mapping[str, float],
    title: str,
) -> Figure:
    """Losses of sets of rows before and after an edit.

    Every row is a short stroke, the means are hollow (before) and full (after).

    Parameters
    ----------
    losses : mapping of world to mapping of set to (before [n], after [n])
        Mean loss per completion token of each row, nats; the first set is the one that was edited.
    goals : mapping of world to float
        The mean loss that the first set should reach.
    title : str
    """
    figure, panels = _panels(losses, title, share=True, height=3.9)
    for axes, (world, sets) in zip(panels, losses.items(), strict=True):
        for place, (before, after) in enumerate(sets.values()):
            ends = np.mean(before), np.mean(after)
            color = NEGATIVE if place == 0 else POSITIVE
            axes.plot(
                after, np.full(len(after), place + 0.24), "|", color=color, alpha=0.4, markersize=6
            )
            axes.annotate(
                "",
                (ends[1], place),
                (ends[0], place),
                arrowprops={"arrowstyle": "-", "color": color, "lw": 2},
            )
            axes.scatter(
                ends[0], place, s=64, facecolors="white", edgecolors=color, linewidths=1.6, zorder=3
            )
            axes.scatter(ends[1], place, s=40, color=color, zorder=4)
        axes.plot([goals[world]] * 2, [-0.32, 0.12], color=INK, linewidth=2, zorder=5)
        axes.annotate(
            "expected",
            (goals[world], -0.34),
            (0, 2),
            textcoords="offset points",
            ha="center",
            size=8,
        )
        for place, (before, _) in enumerate(sets.values()):
            axes.text(
                0.01,
                place - 0.15,
                f"n = {len(before)}",
                transform=axes.get_yaxis_transform(),
                size=8,
                color=MUTED,
            )
        axes.set(
            ylim=(len(sets) - 0.4, -0.75), xscale="log", xlabel="loss, nats per completion token"
        )
        axes.set_yticks(range(len(sets)), list(sets))
        _plain_ticks(axes.xaxis)
    return figure


def moves_plot(
    moves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    title: str,
    *,
    own: str,
    others: str,
) -> Figure:
    """Predicted and measured change of every query's loss, the queries of an edit marked.

    Parameters
    ----------
    moves : mapping of world to (predicted [Q], measured [Q], own [Q] bool)
        Changes in nats per token; signs and order are compared, so the axes have scales of their
        own.
    title, own, others : str
        The last two name the two kinds of queries.
    """
    figure, panels = _panels(moves, title, share=False, height=3.6)
    for axes, (predicted, measured, about) in zip(panels, moves.values(), strict=True):
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.scatter(
            predicted[~about], measured[~about], s=26, color=POSITIVE, alpha=0.7, label=others
        )
        axes.scatter(predicted[about], measured[about], s=44, color=NEGATIVE, marker="X", label=own)
        axes.set_xlabel("predicted by the scores, nats per token")
    panels[0].set_ylabel("measured after the edit")
    panels[0].legend(frameon=False)
    return figure


def prices_plot(prices: Mapping[str, Mapping[str, tuple[float, float]]], title: str) -> Figure:
    """What each method costs the retained rows: their mean loss's rise, with 1.96 standard errors.

    A scale for each world.

    Parameters
    ----------
    prices : mapping of world to mapping of method to (rise, standard error)
        In nats per token.
    title : str
    """
    figure, panels = _panels(
        prices,
        title,
        share=False,
        height=0.9 + 0.4 * max(len(methods) for methods in prices.values()),
    )
    for axes, methods in zip(panels, prices.values(), strict=True):
        for place, (rise, error) in enumerate(methods.values()):
            color = NEGATIVE if place == 0 else POSITIVE
            axes.barh(place, rise, color=color, height=0.55)
            axes.hlines(place, rise - 1.96 * error, rise + 1.96 * error, color=INK, linewidth=1.3)
            end = max(0, rise + 1.96 * error)
            axes.annotate(
                f"{rise:+.3f}",
                (end, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                size=9,
            )
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(methods)), list(methods) if axes is panels[0] else [])
        axes.set(
            ylim=(len(methods) - 0.5, -0.5),
            xlabel="rise of the retained rows' loss, nats per token",
        )
        axes.margins(x=0.22)
    return figure


def rows_plot(
    rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]],
    title: str,
    *,
    least: float = 0.04,
) -> Figure:
    """Every row's loss before and after, a line of panels for each world, a panel for each method.

    Parameters
    ----------
    rows : mapping of world to mapping of method to (before [n], after [n], removed [n] bool)
        Mean loss per completion token, nats.
    title : str
    least : float
        Where both axes, logarithmic, begin; rows below it are drawn at the edge.
    """
    methods = list(next(iter(rows.values())))
    most = 1.25 * max(np.max(ends) for results in rows.values() for *ends, _ in results.values())
    with rc_context(STYLE):
        figure = Figure(
            figsize=(2.7 * len(methods) + 0.6, 2.6 * len(rows) + 0.9),
            dpi=_DPI,
            layout="constrained",
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12, color=INK)
        grid = figure.subplots(len(rows), len(methods), sharex=True, sharey=True, squeeze=False)
        for line, (world, results) in zip(grid, rows.items(), strict=True):
            for axes, (method, (before, after, removed)) in zip(line, results.items(), strict=True):
                before, after = np.maximum(before, least), np.maximum(after, least)
                axes.grid(color=GRID)
                axes.set_axisbelow(True)
                axes.plot([least, most], [least, most], color=MUTED, linewidth=0.8)
                axes.scatter(
                    before[~removed],
                    after[~removed],
                    s=12,
                    color=POSITIVE,
                    alpha=0.5,
                    label="retained",
                )
                axes.scatter(
                    before[removed],
                    after[removed],
                    s=26,
                    color=NEGATIVE,
                    marker="X",
                    label="removed",
                )
                axes.set(
                    xscale="log",
                    yscale="log",
                    xlim=(least, most),
                    ylim=(least, most),
                    aspect="equal",
                )
                axes.set_title(f"{world}: {method}", fontsize=10, loc="left")
                _plain_ticks(axes.xaxis)
                _plain_ticks(axes.yaxis)
            line[0].set_ylabel("loss after, nats")
        for axes in grid[-1]:
            axes.set_xlabel("loss before, nats")
        grid[0][0].legend(frameon=False, loc="lower right", handletextpad=0.1, borderaxespad=0)
    return figure


def paths_plot(
    paths: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    title: str,
    *,
    labels: Sequence[tuple[str, str]],
) -> Figure:
    """Ways of rows, kind by kind: every row faint, and the mean of each level.

    Bars are 1.96 standard errors of both coordinates.

    Parameters
    ----------
    paths : mapping of panel to mapping of kind to (x [n, c], y [n, c])
        Of n rows at c levels; NaN where a row did not come so far, and such a level of a kind
        counts the others.
    title : str
    labels : sequence of (x label, y label)
        One pair for each panel.
    """
    figure, panels = _panels(paths, title, share=False, height=3.9)
    colors, markers = (INK, POSITIVE, NEGATIVE, MUTED), "osD^"
    for axes, kinds, (x_label, y_label) in zip(panels, paths.values(), labels, strict=True):
        for (kind, (x, y)), color, marker in zip(kinds.items(), colors, markers, strict=False):
            axes.plot(x.T, y.T, color=color, linewidth=0.6, alpha=0.13)
            defined = np.isfinite(x) & np.isfinite(y)
            count = np.maximum(defined.sum(0), 1)
            means = [np.where(defined, values, 0).sum(0) / count for values in (x, y)]
            errors = [
                1.96 * np.sqrt(np.where(defined, (values - mean) ** 2, 0).sum(0)) / count
                for values, mean in zip((x, y), means, strict=True)
            ]
            reached = defined.any(0)
            places, reach = ([values[reached] for values in both] for both in (means, errors))
            axes.errorbar(
                *places,
                xerr=reach[0],
                yerr=reach[1],
                color=color,
                marker=marker,
                markersize=5,
                label=kind,
                linewidth=1.8,
                elinewidth=1,
                zorder=3,
            )
        axes.set(xlabel=x_label, ylabel=y_label)
    panels[0].legend(frameon=False)
    return figure


def forecast_plot(
    forecasts: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    title: str,
    *,
    label: str,
    root: bool = False,
) -> Figure:
    """What was measured of each row against its forecast, with interval and diagonal.

    Parameters
    ----------
    forecasts : mapping of str to (forecast [n], ends of its interval [2, n], measured [n])
        For each world.
    title, label : str
        `label` names the quantity and its unit.
    root : bool
        Signed square roots on both axes, which spread small values and allow negative ones; else
        logarithms.
    """
    figure, panels = _panels(forecasts, title, share=False, height=3.8)
    for axes, (forecast, (low, high), measured) in zip(panels, forecasts.values(), strict=True):
        axes.hlines(
            measured,
            low,
            high,
            color=POSITIVE,
            alpha=0.25,
            linewidth=1.2,
            label="interval, to hold 9 of 10",
        )
        axes.plot(forecast, measured, "o", color=POSITIVE, markersize=3.5, alpha=0.8, label="row")
        ends = np.array([min(forecast.min(), measured.min()), max(forecast.max(), measured.max())])
        axes.plot(ends, ends, ":", color=MUTED, linewidth=1, label="as forecast")
        if root:
            for scale in (axes.set_xscale, axes.set_yscale):
                scale("function", functions=(_signed_root, _signed_square))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4))
        else:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(FixedLocator(_STEPS))
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel=f"forecast {label}", ylabel=f"measured {label}")
    panels[0].legend(frameon=False, loc="upper left")
    return figure


def correlations_plot(
    correlations: Mapping[str, Mapping[str, tuple[float, float, float]]], title: str, *, label: str
) -> Figure:
    """Rank correlations with their intervals, one line each, those of one world in a panel.

    Parameters
    ----------
    correlations : mapping of str to mapping of str to (correlation, low, high)
        For each world, what was correlated; drawn from the top in the order given, the first one
        emphasised.
    title, label : str
    """
    most = max(len(lines) for lines in correlations.values())
    figure, panels = _panels(correlations, title, share=True, height=1.2 + 0.3 * most)
    for axes, lines in zip(panels, correlations.values(), strict=True):
        for place, (value, low, high) in enumerate(lines.values()):
            color = POSITIVE if place == 0 else MUTED
            axes.plot(
                [low, high], [place, place], color=color, linewidth=2.2 if place == 0 else 1.4
            )
            axes.plot(
                value,
                place,
                "o" if place == 0 else "s",
                color=color,
                markersize=6 if place == 0 else 4,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(lines)), [_visible(name) for name in lines])
        axes.tick_params(axis="y", labelleft=True)
        axes.set(xlabel=label, xlim=(-1.02, 1.02), ylim=(most - 0.5, -0.5))
        axes.grid(axis="x", color=GRID)
    return figure


# ---- parts ---------------------------------------------------------------------------------------


def _signed_root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _signed_square(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.square(values)


def _panels(
    worlds: Mapping[str, Any], title: str, *, share: bool, height: float
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each world, side by side, on one scale where that is asked for."""
    if not worlds:
        raise InputError("nothing was given to draw; give one world or more")
    with rc_context(STYLE):
        figure = Figure(
            figsize=(max(6.4, 4.5 * len(worlds)), height + 0.5), dpi=_DPI, layout="constrained"
        )
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12, color=INK)
        panels = list(figure.subplots(1, len(worlds), sharex=share, sharey=share, squeeze=False)[0])
        for axes, world in zip(panels, worlds, strict=True):
            axes.grid(color=GRID)
            axes.set_axisbelow(True)
            axes.set_title(world, fontsize=10, loc="left", color=MUTED)
    return figure, panels


def _plain_ticks(axis: Axis) -> None:
    """Round numbers on a logarithmic scale of losses."""
    axis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _visible(text: str) -> str:
    """Text in print: a line break as its sign, any other control character as a dot."""
    return "".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\u00b7" for c in text)


def _wrapped(tokens: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Lines of (token, column): as many tokens in a line as fit."""
    lines: list[list[tuple[int, int]]] = [[]]
    column = 0
    for number, token in enumerate(tokens):
        if column + len(_visible(token)) > _COLUMNS and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((number, column))
        column += len(_visible(token))
    return lines


def _token(axes: Axes, place: tuple[float, float], text: str, strength: float) -> None:
    """A token with its shade. `strength` from -1 to 1."""
    x, y = place
    shade = POSITIVE if strength >= 0 else NEGATIVE
    axes.add_patch(
        Rectangle(
            (x, y - 0.46), len(text), 0.92, color=shade, alpha=min(1.0, abs(strength)), linewidth=0
        )
    )
    if strength < -0.1:
        axes.plot([x, x + len(text)], [y + 0.46] * 2, color=NEGATIVE, linewidth=1.2)
    color = "white" if abs(strength) > 0.6 else INK
    for place_in, letter in enumerate(text):
        axes.text(
            x + place_in + 0.5,
            y,
            letter,
            va="center",
            ha="center",
            size=8.5,
            color=color,
            parse_math=False,
            family="monospace",
        )
