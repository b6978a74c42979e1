"""The `influence` command: fit, estimate, score, self, check; top and without are in `influence.answers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from influence import answers, console
from influence.answers import PREVIEW, STRONGEST, describe, order, table
from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    ColumnsOption,
    CountOption,
    CreditOption,
    CurvatureOptions,
    ExplainOption,
    JsonOption,
    LoadingOptions,
    OutputOptions,
    PointOption,
    RenderingOptions,
    RunOption,
    TrainedOptions,
    TypedLoadingOptions,
    command,
    keywords,
    option,
    points,
)

if TYPE_CHECKING:  # a command's help does not wait for torch
    from influence.adapter import AdaptedModel
    from influence.curvature.base import Specification
    from influence.logged_loss import LossCheck
    from influence.rows import Examples
    from influence.run import Run

app = console.app("How much did each training row matter for what a LoRA adapter says?")
main = console.main(app)


@dataclass(frozen=True, kw_only=True)
class FitSettings(
    TrainedOptions,
    ColumnsOption,
    RenderingOptions,
    BudgetOptions,
    TypedLoadingOptions,
):
    """What is fitted to what."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "model": "train",
        "columns": "train",
        "store": "attn_implementation",
        "disk_budget": "store",
        "row_bytes": "disk_budget",
        "seed": "row_bytes",
        "growable": "seed",
    }

    train: str = option(
        "The rows it was trained on: .jsonl, .json, .csv, .parquet, a folder, or org/name:split."
    )
    curvature: str = option("ekfac, kfac, fisher, ggn, hessian or identity.", default="ekfac")
    samples: int = option(
        "Label draws per row for ekfac, kfac, fisher (fisher: 0 = the data's labels).", default=1
    )
    curvature_rows: int | None = option(
        "Form the ekfac or kfac of so many rows, drawn at random. Default: of all.", default=None
    )
    damping: str = option(
        "mean:X, top:X (times the block's eigenvalue), abs:X, or time (1 / total learning rate, "
        "needs --optimizer).",
        default="mean:0.1",
    )
    reduction: str = option(
        "Training loss: the mean over all tokens (token), over rows' means (example), or over "
        "the tokens of each batch of M rows (batch:M, as Hugging Face trainers).",
        default="token",
    )
    path: tuple[float, ...] | None = option(
        "Where between base (0) and adapter (1) to look; each point is a pass over the rows. "
        "Default: 0.4,0.8, or nowhere but at --checkpoints where these are given. "
        "1.0: at the adapter itself only.",
        default=None,
        typed=str | None,
        read=points,
    )
    checkpoints: tuple[Path, ...] = option(
        "Adapter folders that training kept, to look there (one or more).",
        default=(),
        typed=list[Path] | None,
        read=tuple,
        several=True,
    )
    geometry: str = option(
        "raw, function (damping in function space) or adam (the optimiser's metric).",
        default="raw",
    )
    optimizer: Path | None = option(
        "Trainer checkpoint with optimizer.pt, for --geometry adam and --damping time.",
        default=None,
    )
    store: str = option(
        "Keep the rows' gradients: full, as features (few bytes a row), none, or auto: "
        "the first that fits.",
        default="auto",
    )
    disk_budget: float = option(
        "Most gigabytes of gradients or features that --store auto keeps, and as many again of the "
        "similarities of more than 20,000 rows.",
        default=50.0,
        also=["--disk"],
    )
    row_bytes: int = option(
        "Bytes of a row and point as features: more are more exact.", default=131_072
    )
    seed: int = option("Keys the labels sampled from the model.", default=0)
    growable: bool = option(
        "Keep what makes --from exact for ekfac: as much disk as a full store again.",
        default=False,
    )

    def asked(self) -> dict[str, Any]:
        """The keywords of `influence.fit` and `influence.estimate` that both have, checked."""
        from influence.damping import Damping
        from influence.sharding import refuse_curvature

        if self.shard:
            refuse_curvature(self.curvature)
        if self.damping != "time":
            Damping.parse(self.damping)
        same = ("damping", "reduction", "path", "checkpoints", "geometry", "optimizer")
        same += ("max_length", "supervise", "token_budget", "store", "row_bytes", "seed")
        same += ("trainer_output", "growable")
        return {
            "curvature": _curvature(self.curvature, self.samples, self.curvature_rows),
            "disk_budget": self.disk_budget * 1e9,
            **{name: getattr(self, name) for name in same},
        }


@dataclass(frozen=True, kw_only=True)
class Fit(FitSettings, OutputOptions):
    """The options of `influence fit`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"run": "columns", "grown_from": "run"}

    run: Path = option("Directory to make.", also=["--run-dir"])
    grown_from: Path | None = option(
        "A finished run of the same adapter and options: its rows are not run again where --train "
        "has them unchanged.",
        default=None,
        flag="--from",
    )


@command(app, Fit, shared=True, sharded=True)
def fit(options: Fit) -> None:
    """Fit a curvature to an adapter on its training rows; a killed fit resumes, a finished one
    exits at once.
    """
    import time

    from influence import distributed
    from influence.fitting import fit as fit_run
    from influence.row_files import read_examples

    options = replace(options, device=distributed.join(options.device))
    asked = options.asked()
    examples = read_examples(options.train, columns=options.columns)
    model = _load(options)
    start = time.perf_counter()
    asked |= {"grown_from": options.grown_from, "overwrite": options.overwrite}
    run = fit_run(model, examples, directory=options.run, **asked)
    manifest, seconds = run.manifest, time.perf_counter() - start
    labels = ", ".join(point.label for point in manifest.points)
    stored = "stored" if run.gradients_stored else "not stored (scores will pass over the rows)"
    if run.features_stored:
        stored = f"stored in few bytes (at most {manifest.row_bytes:,} a row and point)"
    drawn = manifest.curvature.get("rows")
    name = options.curvature if drawn is None else f"{options.curvature} of {drawn} drawn rows,"
    text = (
        f"{options.run}: {name} on {manifest.data.rows} rows "
        f"({manifest.data.supervised_tokens} supervised tokens, reduction "
        f"{manifest.objective.reduction}), "
        f"{manifest.adapter.parameters} LoRA parameters, damping {manifest.damping}; "
        f"points {labels}; gradients {stored}; {seconds:.1f} s"
    )
    result = {"run": str(options.run), "seconds": seconds, "manifest": manifest.as_json()}
    console.emit(result, text, options.json)
    distributed.leave()


@dataclass(frozen=True, kw_only=True)
class Estimate(FitSettings, JsonOption):
    """The options of `influence estimate`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"run": "columns", "queries": "run"}

    run: Path = option(
        "Directory that the fit would make: its disk is measured. Default: here.",
        default=Path(),
        also=["--run-dir"],
    )
    queries: str | None = option(
        "Rows that would be explained. Default: one that is like a training row.", default=None
    )


@command(app, Estimate)
def estimate(options: Estimate) -> None:
    """What `influence fit` with the same options and scores after it would take: time, memory, disk
    and passes over the rows, measured on a few rows in a few seconds.
    """
    from influence.estimating import estimate as estimate_fit
    from influence.row_files import read_examples

    asked = options.asked()
    examples = read_examples(options.train, columns=options.columns)
    queries = None
    if options.queries is not None:
        queries = read_examples(options.queries, columns=options.columns)
    model = _load(options)
    told = estimate_fit(model, examples, queries, directory=options.run, **asked)
    console.emit(told.as_json(), str(told), options.json)


@dataclass(frozen=True, kw_only=True)
class Score(
    RunOption,
    ColumnsOption,
    ExplainOption,
    CurvatureOptions,
    PointOption,
    CreditOption,
    BudgetOptions,
    LoadingOptions,
    OutputOptions,
):
    """The options of `influence score`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "columns": "queries",
        "explain": "measurement",
        "per_token": "at",
        "per_module": "per_token",
    }

    queries: str = option("Rows whose loss is explained, in the same formats.")
    out: Path | None = option(
        "Score file (HDF5). Default: scores.h5 in the run, strongest.h5 with --top.", default=None
    )
    solver: str = option(
        "direct, cg, pcg (cg preconditioned by EK-FAC), astra, lissa, sgd or datainf "
        "(approximate).",
        default="direct",
    )
    tolerance: float | None = option(
        "Relative residual that an iterative solver goes to.", default=None
    )
    max_iterations: int | None = option(
        "Most products of an iterative solver, each a pass for ggn, hessian.", default=None
    )
    measurement: str = option(
        "loss (mean, nats), sum (of the completion), margin (log-odds), token:K (loss of "
        "completion token K), or contrast (with --contrast).",
        default="loss",
    )
    aggregate: str | None = option(
        "Take queries together, for the price of one: mean or sum of all, or group (the mean of "
        "each).",
        default=None,
    )
    contrast: str | None = option(
        "The same prompts with other completions: what made it say A rather than B?", default=None
    )
    top: int | None = option(
        "Keep only so many rows of either end of each query, not the whole matrix.", default=None
    )
    rerank: int | None = option(
        "Compute the first so many rows of either end again with whole gradients, where rows are "
        "stored as features.",
        default=None,
    )
    per_token: bool = option("Also split scores over the rows' tokens.", default=False)
    per_module: bool = option("Also split scores over the adapted layers.", default=False)


@command(app, Score, shared=True, sharded=True)
def score(options: Score) -> None:
    """Score every training row for every query: the predicted change of the query's loss if the row
    is removed.
    """
    import time

    from influence import distributed
    from influence.measurements import Contrast
    from influence.row_files import read_examples
    from influence.strongest import strongest

    if options.top is not None:
        console.at_least("--top", options.top, 1)
    options = replace(options, device=distributed.join(options.device))
    queries = read_examples(options.queries, columns=options.columns)
    measurement: Any = options.measurement
    if (measurement == "contrast") != (options.contrast is not None):
        raise InputError("give --measurement contrast and --contrast FILE together, or neither")
    if options.contrast is not None:
        measurement = Contrast(read_examples(options.contrast, columns=options.columns))
    run = _open(options)
    out = options.out or options.run / ("scores.h5" if options.top is None else STRONGEST)
    start = time.perf_counter()
    ask: Any = run.score if options.top is None else partial(strongest, run, count=options.top)
    scores = ask(
        queries,
        out=out,
        solver=options.solver,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
        measurement=measurement,
        explain=options.explain,
        aggregate=options.aggregate,
        curvature=options.curvature,
        damping=options.damping,
        at=options.at,
        credit=options.credit,
        per_token=options.per_token,
        per_module=options.per_module,
        rerank=options.rerank,
        overwrite=options.overwrite,
    )
    seconds = time.perf_counter() - start
    tokens = run.query_tokens(queries, options.explain)
    explained, seen = int(tokens.counts.sum()), int(tokens.lengths.sum())
    not_converged = int((~scores.converged).sum())
    worst = float(scores.residuals.max())
    count = len(scores.train_ids)
    kept = f"{count} rows"
    if options.top is not None:
        kept = f"{min(options.top, count)} of {kept} at either end"
    text = (
        f"{out}: scores [{len(scores.query_ids)} queries, {kept}]; "
        f"{describe(scores.attributes)}; worst residual {worst:.1e}; {explained} of {seen} query "
        f"tokens supervised; {seconds:.1f} s"
    )
    result = {
        "out": str(out),
        "shape": [len(scores.query_ids), min(options.top or count, count)],
        "explained_tokens": explained,
        "query_tokens": seen,
        "worst_residual": worst,
        "not_converged": not_converged,
        "seconds": seconds,
    }
    console.emit(result, text, options.json)
    distributed.leave()
    # datainf is an approximation by construction: its residual is a fact, not a failure
    if not_converged and options.solver != "datainf":
        raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class Self(
    RunOption,
    CountOption,
    CurvatureOptions,
    PointOption,
    CreditOption,
    BudgetOptions,
    LoadingOptions,
    OutputOptions,
):
    """The options of `influence self`."""

    out: Path | None = option("HDF5 file. Default: added to scores.h5 in the run.", default=None)


@command(app, Self, name="self", shared=True, sharded=True)
def self_(options: Self) -> None:
    """Self-influence: the predicted rise of each training row's own loss if it is removed
    (memorised rows are high).
    """
    import numpy as np

    from influence import distributed

    options = replace(options, device=distributed.join(options.device))
    console.at_least("-k", options.k, 1)
    run = _open(options)
    out = options.out or options.run / "scores.h5"
    result = run.self_influence(
        out=out,
        curvature=options.curvature,
        damping=options.damping,
        at=options.at,
        credit=options.credit,
        overwrite=options.overwrite,
    )
    count = len(result.values)
    highest = np.argsort(-result.values, kind="stable")[: options.k]
    rows = [
        {
            "id": result.train_ids[i],
            "self_influence": float(result.values[i]),
            "row": run.train[int(i)].preview(PREVIEW),
        }
        for i in highest
    ]
    if options.json:
        record = {"out": str(out), "rows": count, "worst_residual": result.worst_residual}
        console.emit({**record, "top": rows}, "", True)
        distributed.leave()
        return
    shown = table(
        f"{out}: the {len(rows)} rows with the highest self-influence of {count}",
        "self-influence",
        ((f"{row['self_influence']:+.4f}", row["id"], row["row"]) for row in rows),
    )
    console.show(shown)
    console.show(f"nats per token; {describe(result.attributes)}. {order(result.attributes)}")
    distributed.leave()


answers.add(app)


@dataclass(frozen=True, kw_only=True)
class Check(
    TrainedOptions, ColumnsOption, RenderingOptions, BudgetOptions, TypedLoadingOptions, JsonOption
):
    """The options of `influence check`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"model": "train", "columns": "train"}

    train: str = option("Rows to check on.")
    rows: int = option("How many rows to check.", default=8)
    labels: bool = option(
        "Show the first three rows with their supervised tokens marked, and check nothing.",
        default=False,
    )


@command(app, Check)
def check(options: Check) -> None:
    """Compare the streamed per-example gradients of *your* model with a plain one-example loop, and
    the number type it computes in with a wider one; with --trainer-output the objective with the
    losses that the trainer logged.
    """
    from influence.gradient_check import check_gradients
    from influence.row_files import read_examples

    console.at_least("--rows", options.rows, 1)
    examples = read_examples(options.train, columns=options.columns)
    options = _as_trained(options, examples)
    model = _load(options)
    if options.labels:
        _show_labels(options, model, examples[:3])
        return
    result = check_gradients(
        model,
        examples[: options.rows],
        max_length=options.max_length,
        supervise=options.supervise,
    )
    record = result.as_json()
    text, passed = str(result), result.ok
    if options.trainer_output is not None:
        losses = _logged_losses(options, model, examples)
        record["losses"] = None if losses is None else losses.as_json()
        text += f"\n{losses or 'the trainer logged no losses to compare the objective with'}"
        passed = passed and (losses is None or losses.agrees)
    console.emit(record, text, options.json)
    if not passed:
        raise SystemExit(1)


def _logged_losses(options: Check, model: AdaptedModel, examples: Examples) -> LossCheck | None:
    """The objective on the rows beside the losses that the trainer logged; None without any."""
    from influence.logged_loss import check_losses
    from influence.tokens import Rendering
    from influence.trainer_output import TrainerOutput

    assert options.trainer_output is not None
    rendering = Rendering.of_trainer(examples, options.max_length, options.supervise)
    training = TrainerOutput.find(options.trainer_output).training(len(examples))
    return check_losses(model, examples, rendering, training)


def _show_labels(options: Check, model: AdaptedModel, examples: Examples) -> None:
    """Print rows with what is supervised of them."""
    from influence.labels import marked, record
    from influence.loss import check_rows
    from influence.tokens import Rendering

    rendering = Rendering.of_trainer(examples, options.max_length, options.supervise)
    tokens = rendering.tokenize(examples, model.tokenizer)
    check_rows(model, tokens)
    if options.json:
        console.emit(record(tokens, model.tokenizer, rendering), "", True)
    else:
        console.show(marked(tokens, model.tokenizer), wrap=False)


def _curvature(name: str, samples: int, rows: int | None) -> Specification:
    """The curvature that a name stands for, which only the command line asks."""
    from influence.curvature import EKFAC, GGN, KFAC, Fisher, Hessian, Identity
    from influence.progress import say

    lowest = 0 if name == "fisher" else 1
    if samples < lowest:
        raise InputError(f"--samples {samples} was given; {name} needs at least {lowest}")
    if rows is not None and (rows < 1 or name not in ("ekfac", "kfac")):
        raise InputError(
            f"--curvature-rows {rows} was given with {name}; expected at least 1, with ekfac or kfac"
        )
    table = {
        "ekfac": lambda: EKFAC(samples=samples, rows=rows),
        "kfac": lambda: KFAC(samples=samples, rows=rows),
        "fisher": lambda: Fisher(samples=samples),
        "ggn": GGN,
        "hessian": Hessian,
        "identity": Identity,
    }
    if name not in table:
        raise InputError(f"curvature {name!r} was given; expected one of {', '.join(table)}")
    curvature = table[name]()
    if samples != 1 and not hasattr(curvature, "samples"):
        say(f"note: --samples changes nothing with --curvature {name}, which draws no labels")
    return curvature


#: The commands that take a trainer's output.
Trained = TypeVar("Trained", Fit, Check)


def _as_trained(options: Trained, examples: Examples) -> Trained:
    """The options with the trainer's own cut and supervision, where neither is given."""
    from influence.trainer_output import TrainerOutput

    if options.trainer_output is None or options.max_length or options.supervise:
        return options
    length, supervise = TrainerOutput.find(options.trainer_output).rendering(examples)
    return replace(options, max_length=length, supervise=supervise)


def _load(options: Fit | Estimate | Check) -> AdaptedModel:
    """The base with the adapter in it, the last one of the trainer's output unless one is named."""
    from influence.loading import load
    from influence.progress import say
    from influence.trainer_output import TrainerOutput

    adapter: str | Path | None = options.adapter
    if adapter is None:
        if options.trainer_output is None:
            raise InputError("name the adapter: --adapter ADAPTER, or --trainer-output DIR")
        adapter = TrainerOutput.find(options.trainer_output).adapter
        say(f"note: the adapter is {adapter}")
    console.quiet_transformers()
    return load(
        options.model,
        adapter,
        **keywords(TypedLoadingOptions, options),
    )


def _open(options: Score | Self) -> Run:
    """The run, with a note on what its scores explain where it has been edited since."""
    from influence.progress import say
    from influence.run import Run
    from influence.sharding import refuse_curvature

    if options.shard:
        refuse_curvature(options.curvature)
    console.quiet_transformers()
    run = Run.open(
        options.run,
        **keywords(LoadingOptions, options),
    )
    edited = run.manifest.now
    if edited is not None:
        say(
            "note: this run explains the adapter it was fitted on, before the edits that led to "
            f"{edited.adapter.path}: rows that they removed or changed are scored as they were. "
            "Fit a run of the edited adapter for scores after them"
        )
    return run


if __name__ == "__main__":
    main()
