"""The `analysis` command: measure, retrain and compare, clean, study, report, serve, demo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from analysis.cleaning.options import Clean
from analysis.evaluation.options import Evaluate, Removal, RemovalOptions
from analysis.evaluation.options import Options as EvaluationOptions
from analysis.explorer.options import ExploredOptions, Report
from analysis.options import ResamplesOption
from analysis.serving import command as serving
from analysis.studies.options import Memorization, Ood
from influence import console
from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    ColumnsOption,
    DeviceOption,
    JsonOption,
    OutputOptions,
    RunOption,
    TrustOption,
    TypedLoadingOptions,
    command,
    keywords,
    option,
    points,
)

if TYPE_CHECKING:  # a command's help does not wait for torch
    from analysis.metrics.lds import Truth
    from influence.scorefile import Scores

app = console.app("Did it work, and what do the scores mean?")
main = console.main(app)

#: Defaults of what goes with --run only: the option itself is None where it was not given.
SUBSETS, SUBSET_SEED = 40, 0


@app.callback()
def _group() -> None:
    """Did it work, and what do the scores mean?"""


# ---- evaluation ------------------------------------------------------------------------------


@command(app, Evaluate)
def evaluate(options: Evaluate) -> None:
    """Is it forgotten, is the rest still there? Loss, ROUGE, extraction, truth ratios, membership
    attacks, probes.

    Rows may carry "paraphrased_completion" and "perturbed_completions" (or TOFU's
    "paraphrased_answer" and "perturbed_answer"), for truth ratios and forget quality. What was not
    given is left out, with the reason in the record's notes.
    """
    from analysis.evaluation.answers import read_rows
    from analysis.evaluation.evaluation import evaluate as measure
    from analysis.evaluation.sets import parted
    from analysis.evaluation.table import table
    from influence.adapter_files import adapter_folder
    from influence.loading import load
    from influence.store import write_json

    files = {"forget": options.forget, "retain": options.retain, "holdout": options.holdout}
    sets = {
        name: read_rows(path, options.columns) for name, path in files.items() if path is not None
    }
    parted(sets)
    for place in (options.adapter, options.reference):
        if place is not None:
            adapter_folder(place)
    console.quiet_transformers()
    model = load(
        options.model,
        options.adapter,
        **keywords(TypedLoadingOptions, options),
    )
    result = measure(
        model,
        sets["forget"],
        sets.get("retain"),
        sets.get("holdout"),
        reference=options.reference,
        options=EvaluationOptions(**keywords(EvaluationOptions, options)),
    )
    text = table(result)
    if options.out is not None:
        write_json(options.out, result)
        text += f"\n\n{options.out}: every number of every row"
    console.emit(result, console.printable(text), options.json)


# ---- faithfulness ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lds(ColumnsOption, ResamplesOption, BudgetOptions, DeviceOption, OutputOptions):
    """The options of `analysis lds`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"columns": "queries", "resamples": "truth_out"}

    scores: Path = option("Score file (HDF5) made by influence score.")
    truth: Path | None = option(
        "npz with masks [S, n] and query_loss [S, Q] of retrained adapters.", default=None
    )
    run: Path | None = option(
        "In place of --truth: the run whose adapter to retrain on subsets.",
        default=None,
        also=["--run-dir"],
    )
    queries: Path | None = option("With --run: the rows that were scored.", default=None)
    subsets: int | None = option(
        f"With --run: random halves to retrain on. Default: {SUBSETS}.", default=None
    )
    subset_seed: int | None = option(
        f"With --run: seed that draws the halves. Default: {SUBSET_SEED}.", default=None
    )
    recipe: Path | None = option("With --run: JSON of how the adapter was trained.", default=None)
    truth_out: Path | None = option(
        "With --run: npz to keep the losses in. Default: RUN/truth.npz.", default=None
    )
    seed: int = option("Seed of the bootstrap.", default=0)
    per_query: bool = option("Print the Spearman of every query too.", default=False)
    plot: Path | None = option("Draw the Spearman of every query (.png or .svg).", default=None)

    def __post_init__(self) -> None:
        if (self.truth is None) == (self.run is None):
            raise InputError(
                "give either --truth FILE.npz (ready losses) or --run RUN --queries FILE "
                "(retrain first)"
            )
        with_run = {
            "--queries": self.queries,
            "--subsets": self.subsets,
            "--subset-seed": self.subset_seed,
            "--recipe": self.recipe,
            "--truth-out": self.truth_out,
        }
        given = [name for name, value in with_run.items() if value is not None]
        if self.truth is not None and given:
            raise InputError(
                f"{', '.join(given)} goes with --run only, and --truth was given: "
                "leave one of them out"
            )
        if self.run is not None and self.queries is None:
            raise InputError(
                "--run retrains and measures the losses of queries: name the scored ones with "
                "--queries FILE"
            )
        if self.plot is not None and self.plot.exists() and not self.overwrite:
            raise InputError(
                f"{self.plot} exists and would be replaced: give another --plot, or --overwrite"
            )


@command(app, Lds, shared=True)
def lds(options: Lds) -> None:
    """Linear datamodeling score: do the scores order retrained adapters as their measured losses
    do?

    With --truth from losses that are there; with --run by retraining first (killed, the same
    command goes on; processes that torchrun started deal the trainings out).
    """
    from analysis.metrics.lds import lds as linear_datamodeling_score
    from analysis.words import lds_text
    from influence import distributed
    from influence.scorefile import Scores

    scores = Scores.load(options.scores, detail=False)
    measurement = scores.attributes.get("measurement", "loss")
    if measurement != "loss":
        raise InputError(
            f"{options.scores} explains the measurement {measurement!r}, and the truth holds "
            "losses: score again with --measurement loss"
        )
    options = replace(options, device=distributed.join(options.device))
    truth = _truth(options, scores)
    result = linear_datamodeling_score(
        scores.values,
        truth.masks,
        truth.query_loss,
        resamples=options.resamples,
        seed=options.seed,
    )
    if (plot := options.plot) is not None:
        from analysis.plots import lds_plot

        distributed.at_first(lambda: lds_plot(result, plot, overwrite=options.overwrite))
    record = {
        "lds": result.mean,
        "low": result.interval.low,
        "high": result.interval.high,
        "level": result.interval.level,
        "subsets": result.subsets,
        "queries": result.queries,
        "undefined": result.undefined,
        "seed": options.seed,
        "per_query": result.per_query,
        "query_ids": scores.query_ids,
    }
    text = lds_text(result, options.seed, scores.query_ids if options.per_query else None)
    console.emit(record, text, options.json)
    distributed.leave()


def _truth(options: Lds, scores: Scores) -> Truth:
    """The losses of retrained adapters: ready ones, or measured by retraining."""
    from analysis.truth import ready_truth, retrained_truth
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn.retraining.recipe import Recipe

    if options.truth is not None:
        return ready_truth(scores, options.truth)
    assert options.run is not None
    assert options.queries is not None
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    return retrained_truth(
        scores,
        Run.open(options.run, **keywords(DeviceOption, options)),
        queries,
        subsets=SUBSETS if options.subsets is None else options.subsets,
        subset_seed=options.subset_seed or SUBSET_SEED,
        recipe=recipe,
        out=options.truth_out or options.run / "truth.npz",
    )


@command(app, Removal)
def removal(options: Removal) -> None:
    """Train again without the rows that each method names as the most helpful: whose are missed the
    most?

    Methods are the run's own scores, every --scores file, BM25 and random rows. Killed, the same
    command goes on with the first training that is not done.
    """
    from analysis.evaluation.removal import removal as measure
    from analysis.evaluation.removal_table import lines, tables
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn.retraining.recipe import Recipe

    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    run = Run.open(
        options.run,
        trust_remote_code=options.trust_remote_code,
        **keywords(DeviceOption, options),
    )
    record = measure(
        run,
        queries,
        out=options.out,
        recipe=recipe,
        overwrite=options.overwrite,
        **keywords(RemovalOptions, options),
    )
    if options.json:
        console.emit(record, "", True)
        return
    for table in tables(record):
        console.show(table)
    console.show("\n".join([*lines(record), f"{options.out}: every number and id"]), wrap=False)


def paths(texts: Iterable[str]) -> tuple[tuple[float, ...], ...]:
    """Several paths as they are typed, each as `points` reads it."""
    return tuple(points(text) for text in texts)


@dataclass(frozen=True, kw_only=True)
class Tune(RunOption, BudgetOptions, DeviceOption, TrustOption, JsonOption):
    """The options of `analysis tune`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "forget": "trust_remote_code",
        "dry_run": "forget",
    }

    truth: Path | None = option(
        "npz of retrained adapters' losses; without it local checks choose.", default=None
    )
    queries: Path | None = option(
        "The rows that the truth's query_loss is of. Default: those of the run's scores.",
        default=None,
    )
    geometries: tuple[str, ...] = option(
        "Also fit and sweep this geometry: function or adam. May be repeated.",
        default=(),
        flag="--geometry",
        typed=list[str] | None,
        read=tuple,
    )
    paths: tuple[tuple[float, ...], ...] = option(
        "Also fit and sweep these points, as in 0.3,0.6,0.9. May be repeated.",
        default=(),
        flag="--path",
        typed=list[str] | None,
        read=paths,
    )
    dampings: tuple[str, ...] = option(
        "The dampings to sweep.",
        default=("mean:1", "mean:0.1", "mean:0.01", "mean:0.001"),
        flag="--damping",
        typed=list[str],
        read=tuple,
    )
    columns: int = option(
        "Compare the choice with the exact GGN on so many rows (hundreds of passes).", default=0
    )
    k: int = option("How many settings to show.", default=15, flag="-k")
    seed: int = option("Draws the halves of the truth and the rows of the checks.", default=0)
    forget: bool = option("Drop what an earlier tune chose, and do nothing else.", default=False)
    dry_run: bool = option("Show the table, keep nothing in the manifest.", default=False)

    def __post_init__(self) -> None:
        console.at_least("-k", self.k, 1)
        if self.queries is not None and self.truth is None:
            raise InputError(
                "--queries was given without --truth; the local checks need no queries: "
                "leave it out"
            )


@command(app, Tune, shared=True)
def tune(options: Tune) -> None:
    """Which curvature, damping, geometry and points: a table, and the best kept in the run for
    later scores.
    """
    from analysis.metrics.lds import read_truth
    from analysis.tune import default_queries, table_rows
    from analysis.tune import forget as drop
    from analysis.tune import tune as choose
    from analysis.words import tuning_record, tuning_table, tuning_text
    from influence import distributed
    from influence.row_files import read_examples
    from influence.run import Run

    truth = None if options.truth is None else read_truth(options.truth)
    console.quiet_transformers()
    options = replace(options, device=distributed.join(options.device))
    run = Run.open(
        options.run,
        trust_remote_code=options.trust_remote_code,
        **keywords(DeviceOption, options),
    )
    if options.forget:
        drop(run)
        text = f"{options.run}: scores use what it was fitted with"
        console.emit({"chosen": None}, text, options.json)
        distributed.leave()
        return
    queries = None
    if truth is not None:
        queries = read_examples(options.queries) if options.queries else default_queries(run)
    result = choose(
        run,
        truth=truth,
        queries=queries,
        dampings=options.dampings,
        geometries=options.geometries,
        paths=options.paths,
        columns=options.columns,
        seed=options.seed,
        keep=not options.dry_run,
    )
    rows = list(table_rows(result, options.k))
    if options.json:
        console.emit(tuning_record(result, rows), "", True)
    else:
        place = f"kept in {options.run}/manifest.json: later scores use it unless told otherwise"
        place = "shown only" if options.dry_run else place
        console.show(tuning_table(rows, len(result.judged)))
        console.show(tuning_text(result, place, options.columns), wrap=False)
    distributed.leave()


# ---- cleaning --------------------------------------------------------------------------------


@command(app, Clean)
def clean(options: Clean) -> None:
    """Which training rows to fix or remove: a list with reasons and evidence; and, once decided,
    what that changed, measured by training again.
    """
    from analysis.cleaning.command import make_list, train_again

    (make_list if options.apply is None else train_again)(options)


# ---- studies ---------------------------------------------------------------------------------


@command(app, Memorization)
def memorization(options: Memorization) -> None:
    """Which training rows are memorised: measured from retrained adapters, forecast without, and do
    both agree?

    Without --truth the forecasts alone. With --canaries the exposure of secrets, with --holdout
    that of every row relative to rows never seen.
    """
    from analysis.metrics.lds import read_truth
    from analysis.studies.canaries import read_canaries
    from analysis.studies.memorization import memorization as measure
    from analysis.studies.memorization_tables import tables
    from influence.damping import Damping
    from influence.row_files import read_examples
    from influence.run import Run
    from influence.tables import checked_table

    if options.out is not None:
        checked_table(options.out, options.overwrite)
    dampings = None
    if options.dampings is not None:
        dampings = [Damping.parse(rule) for rule in options.dampings]
    if options.truth is not None:
        read_truth(options.truth)  # a file that is none is refused before the model is loaded
    canaries = None if options.canaries is None else read_canaries(options.canaries)
    holdout = None
    if options.holdout is not None:
        holdout = read_examples(options.holdout, columns=options.columns)
    console.quiet_transformers()
    result = measure(
        Run.open(
            options.run,
            trust_remote_code=options.trust_remote_code,
            **keywords(DeviceOption, options),
        ),
        options.truth,
        dampings=dampings,
        canaries=canaries,
        holdout=holdout,
        resamples=options.resamples,
        seed=options.seed,
    )
    if options.out is not None:
        result.write(options.out, overwrite=options.overwrite)
    if options.json:
        out = None if options.out is None else str(options.out)
        console.emit({"out": out, **result.record()}, "", True)
        return
    for table in tables(result, options.k):
        console.show(table)
        console.show("")
    lines = result.lines()
    if options.out is not None:
        lines = [*lines, f"{options.out}: every number of every row"]
    console.show(console.printable("\n".join(lines)), wrap=False)


@command(app, Ood)
def ood(options: Ood) -> None:
    """Are rows from outside the training distribution harder to unlearn, at a better trade-off? Two
    answers, measured.

    Plants rows of four kinds, trains the adapter again with and without them, and unlearns each by
    gradient ascent. Killed, the same command goes on with the first part that is not finished.
    """
    from rich.console import Console

    from analysis.studies.ood import study
    from analysis.studies.ood_tables import lines, tables
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn.difficulty.protocol import Protocol
    from unlearn.retraining.recipe import Recipe

    protocol = Protocol(optimizer=options.optimizer)
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    holdout = read_examples(options.holdout, columns=options.columns)
    other = read_examples(options.other, columns=options.columns)
    console.quiet_transformers()
    result = study(
        Run.open(
            options.run,
            trust_remote_code=options.trust_remote_code,
            **keywords(DeviceOption, options),
        ),
        holdout,
        other,
        options.out,
        recipe=recipe,
        per_kind=options.per_kind,
        repeats=options.repeats,
        references=options.references,
        protocol=protocol,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    if options.json:
        console.emit({"out": str(options.out), **result.record()}, "", True)
        return
    for table in tables(result):
        Console(width=100).print(table, "")
    text = "\n".join([*lines(result), f"{options.out}/ood.csv: every planted row"])
    console.show(console.printable(text), wrap=False)


# ---- report and demo -------------------------------------------------------------------------


@command(app, Report)
def report(options: Report) -> None:
    """One page, for people, on one edit (--edit) or on a whole run (--run).

    Of an edit it says what its edit.json records. Of a run it shows queries and rows to search and
    tick, and every edit.
    """
    from analysis.report.page import report as write_report
    from analysis.report.reading import read_record

    if options.run is not None:
        _explore(options, options.run)
        return
    assert options.edit is not None
    compared = None
    if options.retrained is not None:
        from analysis.report.agreement import agreement
        from influence.row_files import read_examples
        from influence.run import Run

        path = read_record(options.edit)["run"]["path"]
        if path is None:
            raise InputError(
                f"{options.edit} does not record where its run is: --retrained needs it"
            )
        holdout = None if options.holdout is None else read_examples(options.holdout)
        console.quiet_transformers()
        run = Run.open(path, **keywords(DeviceOption, options))
        compared = agreement(run, options.edit, options.retrained, holdout)
    page = write_report(options.edit, options.out, compared=compared, overwrite=options.overwrite)
    result = {
        "out": str(page.path),
        "kind": page.kind,
        "rows": page.rows,
        "verdicts": page.verdicts,
        "headlines": page.headlines,
    }
    text = "\n".join([f"{page.path}: {page.title}", *page.headlines])
    console.emit(result, text, options.json)


def _explore(options: Report, run: Path) -> None:
    """Write the page on a run."""
    from analysis.explorer.data import gather
    from analysis.explorer.page import write
    from analysis.explorer.sections import SECTIONS
    from analysis.page_file import checked_page

    checked_page(options.out, options.overwrite)
    console.quiet_transformers()
    explored = gather(run, **keywords(ExploredOptions, options))
    page = write(explored, options.out, detail=options.detail, overwrite=options.overwrite)
    result = {"out": str(page.path), "bytes": page.size, "sections": list(page.sections)}
    titles = ", ".join(SECTIONS[name].title for name in page.sections)
    text = f"{page.path}: {page.size / 1e6:.1f} MB; {titles}"
    console.emit(result, text, options.json)


serving.add(app)


@dataclass(frozen=True, kw_only=True)
class Demo(OutputOptions):
    """The options of `analysis demo`."""

    out: Path = option("Directory to make: data, models, run.")
    seed: int = option("Seed of the corpus, the training and the labels.", default=0)


@command(app, Demo)
def demo(options: Demo) -> None:
    """Make people up, train a small model and an adapter on them, score, and check a prediction by
    retraining.
    """
    from rich.console import Console

    from analysis.demo.walkthrough import demo as run_demo

    console.quiet_transformers()
    # with --json the tables go to standard error, so that standard output holds one JSON object
    shown = Console(stderr=options.json)
    result = run_demo(options.out, seed=options.seed, overwrite=options.overwrite, console=shown)
    if options.json:
        console.emit(result, "", True)


if __name__ == "__main__":
    main()
