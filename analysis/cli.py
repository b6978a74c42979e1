"""The `analysis` command: evaluate, lds, tune, memorization, ood, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence import console
from influence.cli import (
    CheckpointingOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    RunOption,
    TrustOption,
    numbers,
)

app = console.app("Did it work, and what do the scores mean?")
main = console.main(app)


@app.callback()
def _group() -> None:
    """Did it work, and what do the scores mean?"""


@app.command()
def evaluate(
    adapter: Annotated[
        str, typer.Option("--adapter", help="PEFT LoRA adapter to evaluate: folder or hub id.")
    ],
    forget: Annotated[
        Path,
        typer.Option(
            "--forget", help="Rows that should be forgotten: .jsonl, .parquet or a datasets folder."
        ),
    ],
    retain: Annotated[
        Path | None, typer.Option("--retain", help="Rows that should still be known.")
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option("--holdout", help="Rows of the same kind that the adapter never saw."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Adapter of the same rank and layers to compare with: best one trained without the forget rows.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Base model: folder or hub id. Default: the one the adapter records."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Record to write (.json), with every row.")
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            "--generate", help="Continue at most so many prompts of each set, for ROUGE; 0: none."
        ),
    ] = 32,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            "--probe",
            help="relearn (train on a few forget rows, watch the others) or quantise. May be repeated.",
        ),
    ] = None,
    texts: Annotated[
        bool,
        typer.Option(
            "--texts", help="Write the rows' texts and what was generated into the record too."
        ),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Truncate rows to so many tokens, as in training."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            "--token-budget",
            help="Tokens per batch, padding included. Default 1024 on a CPU, else 4096.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="The base's type: float32, bfloat16, float16 or float64.")
    ] = "float32",
    seed: Annotated[
        int, typer.Option("--seed", help="Of the bootstrap, and of the rows learned again.")
    ] = 0,
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Is it forgotten, is the rest still there? Loss, ROUGE, extraction, truth ratios, membership attacks, probes.

    Rows may carry "paraphrased_completion" and "perturbed_completions" (or TOFU's "paraphrased_answer" and "perturbed_answer"),
    for truth ratios and forget quality. What was not given is left out, with the reason in the record's notes.
    """
    from analysis.evaluation.answers import read_rows
    from analysis.evaluation.evaluation import Options, parted
    from analysis.evaluation.evaluation import evaluate as measure
    from analysis.evaluation.table import table
    from influence.errors import InputError
    from influence.loading import adapter_folder, load
    from influence.store import write_json

    options = Options(
        generate=generate,
        probes=tuple(probe or ()),
        max_length=max_length,
        token_budget=token_budget,
        seed=seed,
        texts=texts,
    )
    if out is not None and out.exists() and not overwrite:
        raise InputError(f"{out} exists and would be replaced: give another --out, or --overwrite")
    if out is not None and not out.parent.is_dir():
        raise InputError(
            f"there is no folder {out.parent} to write {out.name} into: make it, or give another --out"
        )
    if texts and out is None and not json:
        raise InputError("--texts goes into the record: give --out FILE.json, or --json")
    files = {"forget": forget, "retain": retain, "holdout": holdout}
    sets = {name: read_rows(path) for name, path in files.items() if path is not None}
    parted(sets)
    for place in (adapter, reference):
        if place is not None:
            adapter_folder(place)
    console.quiet_transformers()
    loaded = load(
        model,
        adapter,
        dtype=dtype,
        device=device,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )
    result = measure(
        loaded,
        sets["forget"],
        sets.get("retain"),
        sets.get("holdout"),
        reference=reference,
        options=options,
    )
    if out is not None:
        write_json(out, result)
    written = "" if out is None else f"\n\n{out}: every number of every row"
    console.emit(result, console.printable(table(result) + written), json)


@app.command()
def lds(
    scores: Annotated[
        Path, typer.Option("--scores", help="Score file (HDF5) made by influence score.")
    ],
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth", help="npz with masks [S, n] and query_loss [S, Q] of retrained adapters."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", help="In place of --truth: the run whose adapter to retrain on subsets."
        ),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="With --run: the rows that were scored.")
    ] = None,
    subsets: Annotated[
        int | None,
        typer.Option("--subsets", help="With --run: random halves to retrain on. Default: 40."),
    ] = None,
    subset_seed: Annotated[
        int | None,
        typer.Option("--subset-seed", help="With --run: seed that draws the halves. Default: 0."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="With --run: JSON of how the adapter was trained."),
    ] = None,
    truth_out: Annotated[
        Path | None,
        typer.Option(
            "--truth-out", help="With --run: npz to keep the losses in. Default: RUN/truth.npz."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap.")] = 0,
    per_query: Annotated[
        bool, typer.Option("--per-query", help="Print the Spearman of every query too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the Spearman of every query (.png or .svg).")
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Linear datamodeling score: do the scores order retrained adapters as their measured losses do?

    With --truth from losses that are there; with --run by retraining first (killed, the same command goes on).
    """
    from analysis.metrics.lds import lds as linear_datamodeling_score
    from analysis.truth import ready_truth, retrained_truth
    from influence.errors import InputError
    from influence.rows import read_examples
    from influence.run import Run
    from influence.scorefile import Scores
    from unlearn.retraining.recipe import Recipe

    if (truth is None) == (run is None):
        raise InputError(
            "give either --truth FILE.npz (ready losses) or --run RUN --queries FILE (retrain first)"
        )
    options = {"--queries": queries, "--subsets": subsets, "--subset-seed": subset_seed}
    options |= {"--recipe": recipe, "--truth-out": truth_out}
    given = [name for name, value in options.items() if value is not None]
    if truth is not None and given:
        raise InputError(
            f"{', '.join(given)} goes with --run only, and --truth was given: leave one of them out"
        )
    if run is not None and queries is None:
        raise InputError(
            "--run retrains and measures the losses of queries: name the scored ones with --queries FILE"
        )
    if plot is not None and plot.exists() and not overwrite:
        raise InputError(
            f"{plot} exists and would be replaced: give another --plot, or --overwrite"
        )
    loaded = Scores.load(scores, detail=False)
    if loaded.attributes.get("measurement", "loss") != "loss":
        raise InputError(
            f"{scores} explains the measurement {loaded.attributes['measurement']!r}, and the truth holds losses: score "
            "again with --measurement loss"
        )
    if truth is not None:
        known = ready_truth(loaded, truth)
    else:
        assert run is not None
        assert queries is not None
        how = None if recipe is None else Recipe.read(recipe)
        asked = read_examples(queries)
        console.quiet_transformers()
        known = retrained_truth(
            loaded,
            Run.open(run, device=device),
            asked,
            subsets=40 if subsets is None else subsets,
            subset_seed=subset_seed or 0,
            recipe=how,
            out=truth_out or run / "truth.npz",
        )
    result = linear_datamodeling_score(
        loaded.values, known.masks, known.query_loss, resamples=resamples, seed=seed
    )
    if plot is not None:
        from analysis.plots import lds_plot

        lds_plot(result, plot, overwrite=overwrite)
    interval = result.interval
    text = (
        f"LDS {result.mean:.4f}, {interval.level:.0%} interval [{interval.low:.4f}, {interval.high:.4f}] "
        f"({interval.resamples} resamples of {result.subsets} retrained adapters, seed {seed}); "
        f"mean Spearman over {result.queries - result.undefined} of {result.queries} queries"
    )
    if per_query:
        lines = zip(result.per_query.tolist(), loaded.query_ids, strict=True)
        text += "\n" + "\n".join(
            f"{rho:+.4f}  {console.printable(id).replace(chr(10), ' ')}" for rho, id in lines
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
            "query_ids": loaded.query_ids,
        },
        text,
        json,
    )


@app.command()
def tune(
    run: RunOption,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth", help="npz of retrained adapters' losses; without it local checks choose."
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            help="The rows that the truth's query_loss is of. Default: those of the run's scores.",
        ),
    ] = None,
    geometry: Annotated[
        list[str] | None,
        typer.Option(
            "--geometry",
            help="Also fit and sweep this geometry: function or adam. May be repeated.",
        ),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path", help="Also fit and sweep these points, as in 0.3,0.6,0.9. May be repeated."
        ),
    ] = None,
    damping: Annotated[
        list[str] | None,
        typer.Option(
            "--damping",
            help="The dampings to sweep. Default: mean:1, mean:0.1, mean:0.01, mean:0.001.",
        ),
    ] = None,
    columns: Annotated[
        int,
        typer.Option(
            "--columns",
            help="Compare the choice with the exact GGN on so many rows (hundreds of passes).",
        ),
    ] = 0,
    k: Annotated[int, typer.Option("-k", help="How many settings to show.")] = 15,
    seed: Annotated[
        int,
        typer.Option("--seed", help="Draws the halves of the truth and the rows of the checks."),
    ] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop what an earlier tune chose, and do nothing else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the table, keep nothing in the manifest.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Which curvature, damping, geometry and points: a table, and the best kept in the run for later scores."""
    from analysis.metrics.lds import read_truth
    from analysis.tune import DAMPINGS, default_queries, table_rows
    from analysis.tune import forget as drop
    from analysis.tune import tune as choose
    from influence.errors import InputError
    from influence.rows import read_examples
    from influence.run import Run

    if k < 1:
        raise InputError(f"-k {k} was given; expected at least 1")
    if queries is not None and truth is None:
        raise InputError(
            "--queries was given without --truth; the local checks need no queries: leave it out"
        )
    paths = [numbers(text, "--path") for text in path or ()]
    known = None if truth is None else read_truth(truth)
    console.quiet_transformers()
    opened = Run.open(run, device=device, trust_remote_code=trust_remote_code)
    if forget:
        drop(opened)
        console.emit({"chosen": None}, f"{run}: scores use what it was fitted with", json)
        return
    rows = None if known is None else read_examples(queries or default_queries(opened))
    result = choose(
        opened,
        truth=known,
        queries=rows,
        dampings=tuple(damping or DAMPINGS),
        geometries=tuple(geometry or ()),
        paths=paths,
        columns=columns,
        seed=seed,
        keep=not dry_run,
    )
    table = list(table_rows(result, k))
    best = result.chosen
    where = (
        "shown only"
        if dry_run
        else f"kept in {run}/manifest.json: later scores use it unless told otherwise"
    )
    text = f"chosen by {result.by}: {best.name}; {where}"
    held_out = None
    if result.held_out is not None:
        interval = result.held_out.interval
        held_out = {"lds": result.held_out.mean, "low": interval.low, "high": interval.high}
        text += (
            f"\nLDS of the chosen setting on the other subsets: {result.held_out.mean:.4f}, {interval.level:.0%} interval "
            f"[{interval.low:.4f}, {interval.high:.4f}]"
        )
    if result.exact is not None:
        text += (
            f"\nSpearman of its scores with the exact GGN's on {columns} rows: {result.exact:.3f} (worst residual "
            f"{result.exact_residual:.1e})"
        )
    if json:
        chosen = next(iter(table_rows(result, 1)))
        console.emit(
            {
                "chosen": chosen,
                "by": result.by,
                "held_out": held_out,
                "exact": result.exact,
                "table": table,
            },
            "",
            True,
        )
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        title=f"the best {len(table)} of {len(result.judged)} settings", title_justify="left"
    )
    for column in table[0]:
        numeric = isinstance(table[0][column], float)
        short = {
            "concentration": "conc.",
            "agreement": "agree.",
            "selectivity": "select.",
            "calibration": "calib.",
        }
        shown.add_column(
            short.get(column, column), justify="right" if numeric else "left", overflow="fold"
        )
    for row in table:
        shown.add_row(
            *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(shown)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def memorization(
    run: RunOption,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth",
            help="npz of retrained adapters' losses (unlearn retrain --subsets): what is measured.",
        ),
    ] = None,
    damping: Annotated[
        list[str] | None,
        typer.Option(
            "--damping",
            help="Self-influence with this damping too. May be repeated. Default: mean:0.01, mean:0.1, mean:1.",
        ),
    ] = None,
    canaries: Annotated[
        Path | None,
        typer.Option(
            "--canaries",
            help='JSON lines {"id", "candidates"}: what else a training row\'s completion could have been.',
        ),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option("--heldout", help="Rows like the training rows that the adapter never saw."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Table to write (.csv or .parquet), one line per training row."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many rows to show.")] = 10,
    resamples: Annotated[int, typer.Option("--resamples", help="Bootstrap resamples.")] = 1000,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the intervals, and of the halves of the reliability.")
    ] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Which training rows are memorised: measured from retrained adapters, forecast without, and do both agree?

    Without --truth the forecasts alone. With --canaries the exposure of secrets, with --heldout that of every row relative
    to rows never seen.
    """
    from analysis.metrics.lds import read_truth
    from analysis.studies.canaries import read_canaries
    from analysis.studies.memorization import memorization as measure
    from analysis.studies.memorization_tables import tables
    from influence.damping import Damping
    from influence.errors import InputError
    from influence.rows import read_examples
    from influence.run import Run
    from influence.tables import checked_table

    if k < 1:
        raise InputError(f"-k {k} was given; expected at least 1")
    if seed < 0 or resamples < 1:
        raise InputError(
            f"--seed {seed} and --resamples {resamples} were given; expected at least 0 and 1"
        )
    if out is not None:
        checked_table(out, overwrite)
    dampings = None if damping is None else [Damping.parse(rule) for rule in damping]
    if truth is not None:
        read_truth(truth)  # a file that is none is refused before the model is loaded
    secrets = None if canaries is None else read_canaries(canaries)
    unseen = None if heldout is None else read_examples(heldout)
    console.quiet_transformers()
    opened = Run.open(run, device=device, trust_remote_code=trust_remote_code)
    result = measure(
        opened,
        truth,
        dampings=dampings,
        canaries=secrets,
        holdout=unseen,
        resamples=resamples,
        seed=seed,
    )
    if out is not None:
        result.write(out, overwrite=overwrite)
    if json:
        console.emit({"out": None if out is None else str(out), **result.record()}, "", True)
        return
    from rich.console import Console

    for table in tables(result, k):
        Console().print(table, "")
    lines = [*result.lines(), *([f"{out}: every number of every row"] if out is not None else [])]
    Console().print(
        console.printable("\n".join(lines)), markup=False, highlight=False, soft_wrap=True
    )


@app.command()
def ood(
    run: RunOption,
    heldout: Annotated[
        Path,
        typer.Option(
            "--heldout",
            help="Rows of the training rows' domain that no model saw: .jsonl, .parquet ...",
        ),
    ],
    other: Annotated[Path, typer.Option("--other", help="Rows of another domain.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for adapters, measurements, ood.csv, ood.json, ood.png."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe", help="JSON of how the adapter was trained. Default: as recorded beside it."
        ),
    ] = None,
    per_kind: Annotated[
        int, typer.Option("--per-kind", help="Rows to plant of each of the four kinds.")
    ] = 8,
    repeats: Annotated[
        int, typer.Option("--repeats", help="How often each planted row is among the rows.")
    ] = 1,
    references: Annotated[
        int,
        typer.Option(
            "--references", help="Adapters to train without the planted rows, for exposure."
        ),
    ] = 2,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="Of the ascent: adam or sgd.")
    ] = "adam",
    seed: Annotated[
        int, typer.Option("--seed", help="Of the planting, the sample of rows and the intervals.")
    ] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Are rows from outside the training distribution harder to unlearn, at a better trade-off? Two answers, measured.

    Plants rows of four kinds, trains the adapter again with and without them, and unlearns each by gradient ascent. Killed, the
    same command goes on with the first part that is not finished.
    """
    from analysis.studies.ood import study
    from analysis.studies.ood_tables import lines, tables
    from influence.errors import InputError
    from influence.rows import read_examples
    from influence.run import Run
    from unlearn.difficulty.measured import Protocol
    from unlearn.retraining.recipe import Recipe

    if seed < 0:
        raise InputError(f"--seed {seed} was given; expected at least 0")
    protocol = Protocol(optimizer=optimizer)
    how = None if recipe is None else Recipe.read(recipe)
    unseen, outside = read_examples(heldout), read_examples(other)
    console.quiet_transformers()
    result = study(
        Run.open(run, device=device, trust_remote_code=trust_remote_code),
        unseen,
        outside,
        out,
        recipe=how,
        per_kind=per_kind,
        repeats=repeats,
        references=references,
        protocol=protocol,
        seed=seed,
        overwrite=overwrite,
    )
    if json:
        console.emit({"out": str(out), **result.record()}, "", True)
        return
    from rich.console import Console

    for table in tables(result):
        Console(width=100).print(table, "")
    text = console.printable("\n".join([*lines(result), f"{out}/ood.csv: every planted row"]))
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(
    edit: Annotated[
        Path,
        typer.Option(
            "--edit", help="Adapter folder made by unlearn remove, relabel, correct or train."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Page to write (.html).")],
    retrained: Annotated[
        Path | None,
        typer.Option(
            "--retrained",
            help="Adapter made by unlearn retrain --edit: how near is the edit to it? Loads the model.",
        ),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option("--holdout", help="With --retrained: rows that neither adapter saw."),
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """One page on one edit, from its edit.json: is it forgotten, what else changed, how exact, how to check it."""
    from analysis.report.page import read_record
    from analysis.report.page import report as write_report
    from influence.errors import InputError

    compared = None
    if holdout is not None and retrained is None:
        raise InputError("--holdout goes with --retrained DIR: leave it out")
    if retrained is not None:
        from analysis.report.agreement import agreement
        from influence.rows import read_examples
        from influence.run import Run

        path = read_record(edit)["run"]["path"]
        if path is None:
            raise InputError(f"{edit} does not record where its run is: --retrained needs it")
        unseen = None if holdout is None else read_examples(holdout)
        console.quiet_transformers()
        compared = agreement(Run.open(path, device=device), edit, retrained, unseen)
    made = write_report(edit, out, compared=compared, overwrite=overwrite)
    result = {
        "out": str(made.path),
        "kind": made.kind,
        "rows": made.rows,
        "verdicts": made.verdicts,
    }
    console.emit(
        result | {"headlines": made.headlines},
        f"{made.path}: {made.title}\n" + "\n".join(made.headlines),
        json,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory to make: data, models, run.")],
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the corpus, the training and the labels.")
    ] = 0,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Make people up, train a small model and an adapter on them, score, and check a prediction by retraining."""
    from analysis.demo.walkthrough import demo as run_demo

    console.quiet_transformers()
    from rich.console import Console

    # with --json the tables go to standard error, so that standard output holds one JSON object
    result = run_demo(out, seed=seed, overwrite=overwrite, console=Console(stderr=json))
    if json:
        console.emit(result, "", True)


if __name__ == "__main__":
    main()
