"""The `analysis` command: lds, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence import console
from influence.cli import JsonOption, OverwriteOption

app = console.app("Did it work, and what do the scores mean?")
main = console.main(app)


@app.callback()
def _group() -> None:
    """Did it work, and what do the scores mean?"""


@app.command()
def lds(
    scores: Annotated[Path, typer.Option("--scores", help="Score file (HDF5) made by influence score.")],
    truth: Annotated[
        Path, typer.Option("--truth", help="npz with masks [S, n] and query_loss [S, Q] of retrained adapters.")
    ],
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap.")] = 0,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the Spearman of every query (.png or .svg).")
    ] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Linear datamodeling score: do the scores order retrained adapters as their measured losses do?"""
    from analysis.metrics.lds import lds as linear_datamodeling_score
    from analysis.metrics.lds import read_truth
    from influence.errors import InputError
    from influence.scores import Scores

    loaded = Scores.load(scores)
    if loaded.attributes.get("measurement", "loss") != "loss":
        raise InputError(
            f"{scores} explains the measurement {loaded.attributes['measurement']!r}, and the truth holds losses: score "
            "again with --measurement loss"
        )
    known = read_truth(truth)
    result = linear_datamodeling_score(loaded.values, known.masks, known.query_loss, resamples=resamples, seed=seed)
    if plot is not None:
        from analysis.plots import lds_plot

        lds_plot(result, plot, overwrite=overwrite)
    interval = result.interval
    text = (
        f"LDS {result.mean:.4f}, {interval.level:.0%} interval [{interval.low:.4f}, {interval.high:.4f}] "
        f"({interval.resamples} resamples of {result.subsets} retrained adapters, seed {seed}); "
        f"mean Spearman over {result.queries - result.undefined} of {result.queries} queries"
    )
    console.emit(
        {
            "lds": result.mean,
            "low": interval.low,
            "high": interval.high,
            "level": interval.level,
            "subsets": result.subsets,
            "queries": result.queries,
            "undefined": result.undefined,
            "seed": seed,
            "per_query": result.per_query,
        },
        text,
        json,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to make: data, models, run.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of the corpus, the training and the labels.")] = 0,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Make people up, train a small model and an adapter on them, score, and check a prediction by retraining."""
    from analysis.demo import demo as run_demo

    console.quiet_transformers()
    from rich.console import Console

    # with --json the tables go to standard error, so that standard output holds one JSON object
    result = run_demo(out, seed=seed, overwrite=overwrite, console=Console(stderr=json))
    if json:
        console.emit(result, "", True)


if __name__ == "__main__":
    main()
