"""`influence.fit`: a run directory from an adapter and its training rows.

What can be refused is refused, the directory is claimed, and every point of the path is fitted
(`influence.fitted_point`), one after the other: a killed fit goes on with the point, and the batch,
that it was at.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.at_point import AtPoint, point_digest, run_file
from influence.credit import credited
from influence.curvature import DEFAULT, SPECIFICATIONS, Specification
from influence.damping import Damping
from influence.errors import InputError, StoreError, ToolkitError
from influence.fit_plan import FitPlan
from influence.fitted_point import PointFit, Storage
from influence.geometry import GEOMETRIES
from influence.gradient_check import measure_precision, precision_note
from influence.kept import keep_adapter, keep_recipe, keep_rows
from influence.logged_loss import check_losses
from influence.loss import check_rows
from influence.manifest import (
    AS_BEFORE,
    FORMAT,
    AdapterSource,
    DataSource,
    Manifest,
    ObjectiveRecord,
    Source,
    TokenizerSource,
    begun_manifest,
    digest_of,
    write_manifest,
)
from influence.optimizer_state import OptimizerState, second_moments
from influence.path import DEFAULT_PATH, Point, check_path, points
from influence.precision import compute_record
from influence.progress import say
from influence.row_weights import batch_size
from influence.rows import Examples
from influence.run import Run, refuse_other_tokens
from influence.run_directory import claim, finished_before, tidy
from influence.store import only_writer, open_file, open_rows
from influence.tokens import Rendering, TokenizedExamples, tokenizer_digest
from influence.trainer_output import TrainerOutput, Training

STORE = ("auto", "always", "never")
#: Bytes of gradients that `store="auto"` keeps unless told otherwise.
DISK_BUDGET = 50e9
#: What is said of an option that changes nothing.
IDLE = "changes nothing"


def fit(
    model: AdaptedModel,
    train: Examples,
    *,
    directory: str | Path,
    curvature: Specification | None = None,
    damping: str | Damping = "mean:0.1",
    reduction: str = "token",
    path: Sequence[float] | None = None,
    checkpoints: Sequence[str | Path] = (),
    geometry: str = "raw",
    optimizer: str | Path | None = None,
    max_length: int | None = None,
    supervise: str | None = None,
    token_budget: int | None = None,
    store: str = "auto",
    disk_budget: float = DISK_BUDGET,
    seed: int = 0,
    trainer_output: str | Path | None = None,
    overwrite: bool = False,
) -> Run:
    """Fit a curvature to an adapter on its training rows, and store the rows' gradients.

    Parameters
    ----------
    model, train
        The adapter (`influence.load`) and the rows it was trained on (`influence.read_examples`).
    directory
        The run directory. A finished identical fit returns at once, an unfinished one resumes;
        anything else there is an error unless `overwrite`.
    curvature
        A specification of `influence.curvature` (default: EK-FAC), or one of your own.
    damping
        `mean:X`, `top:X`, `abs:X` or `time:T`; scores may use another. `time` alone takes T from
        `optimizer`.
    reduction
        `token`: `w_i = 1/N_tok`; `example`: `w_i = 1/(n T_i)`; `batch:M`: what Hugging Face
        trainers minimise at M rows a step, between the two. See `influence.row_weights`.
    path
        Where on the way from the base to the adapter to look: scales c of every B, in (0, 1].
        Default: 0.4, 0.8, or no scale at all where checkpoints are given. `(1.0,)` looks at
        the adapter itself only. Every point costs a pass over the rows. See `influence.path`.
    checkpoints
        PEFT folders that the adapter's training kept, to look there too.
    geometry
        `raw`, `function` (damping in function space, the same however A and B are scaled) or `adam`
        (the optimiser's metric). See `influence.geometry`.
    optimizer
        The Hugging Face trainer checkpoint whose `optimizer.pt` holds Adam's second moments;
        without it `adam` estimates them from training gradients. It also tells the total learning
        rate for `damping="time"`.
    max_length, supervise
        Truncate rows to so many tokens, and supervise these of a conversation, as in training:
        `last` (the default: the last answer), `assistant` (every answer) or `all` (every token).
        See `influence.chats`.
    token_budget
        Tokens per batch, padding included: the memory knob (default 1,024 on a CPU, 4,096
        elsewhere). Results do not depend on it.
    store, disk_budget
        Store the gradients (n x P floats): `always`, `never`, or `auto`: where they take at most
        `disk_budget` bytes. Without them every later scoring is a pass over the training rows.
    seed
        Keys the sampled labels.
    trainer_output
        The output directory of the trainer that made the adapter (`influence.trainer_output`):
        early checkpoints are points where neither `path` nor `checkpoints` is given, the optimiser
        is the newest there, the recipe is kept in the run (`run/recipe.json`), and the objective
        is compared with the logged losses (`influence.logged_loss`).

    Rows that came from no file and an adapter that came from no folder are kept in the directory
    (`influence.kept`).

    Raises `InputError` before any work for a wrong argument, `MismatchError` where the directory
    was made from something else (naming what differs), `StoreError` where the disk is too small.
    """
    prepared = prepare(
        model,
        train,
        curvature=curvature,
        damping=damping,
        reduction=reduction,
        path=path,
        checkpoints=checkpoints,
        geometry=geometry,
        optimizer=optimizer,
        max_length=max_length,
        supervise=supervise,
        token_budget=token_budget,
        store=store,
        disk_budget=disk_budget,
        seed=seed,
        trainer_output=trainer_output,
    )
    return _fit_prepared(prepared, Path(directory), overwrite)


@dataclass(frozen=True)
class Prepared:
    """A fit with every option resolved and checked, of which nothing is computed yet."""

    model: AdaptedModel
    train: Examples
    tokens: TokenizedExamples
    rendering: Rendering
    curvature: Specification
    places: tuple[Point, ...]
    state: OptimizerState | None
    output: TrainerOutput | None
    manifest: Manifest


def prepare(
    model: AdaptedModel,
    train: Examples,
    *,
    curvature: Specification | None,
    damping: str | Damping,
    reduction: str,
    path: Sequence[float] | None,
    checkpoints: Sequence[str | Path],
    geometry: str,
    optimizer: str | Path | None,
    max_length: int | None,
    supervise: str | None,
    token_budget: int | None,
    store: str,
    disk_budget: float,
    seed: int,
    trainer_output: str | Path | None,
) -> Prepared:
    """Resolve and check the options of `fit`, with its errors; nothing is written."""
    curvature = DEFAULT if curvature is None else curvature
    if token_budget is None:
        token_budget = 1024 if model.device.type == "cpu" else 4096
    output = None if trainer_output is None else TrainerOutput.find(trainer_output)
    say_idle(geometry, damping, optimizer, store, disk_budget)
    if output is not None:
        if max_length is None and supervise is None:
            max_length, supervise = output.rendering(train)
        if optimizer is None and (geometry == "adam" or damping == "time"):
            optimizer = _optimizer_of(output)
        if path is None and not checkpoints:
            checkpoints = _points_of(output)
    if path is None:
        path = () if checkpoints else curvature.default_path or DEFAULT_PATH
    scales = check_path(path)
    _check_options(geometry, store, token_budget, disk_budget)
    batch_size(reduction)  # refuses an unknown reduction before any work
    if geometry == "function" and any(site.parameter for site in model.sites):
        raise InputError(
            "geometry function was given, and this adapter has fused experts, each with an A and B "
            "of its own in one matrix: give raw or adam"
        )
    if len(train) == 0:
        raise InputError("no training rows were given; give the rows the adapter was trained on")
    _refuse_nameless(curvature)
    if caution := curvature.caution(model):
        say(caution)
    state = None if optimizer is None else second_moments(optimizer, model)
    damping = _training_time(damping, state)
    places = points(model, scales, checkpoints)
    rendering = Rendering.of_trainer(train, max_length, supervise)
    tokens = rendering.tokenize(train, model.tokenizer)
    manifest = _manifest(
        model,
        train,
        tokens,
        curvature,
        damping=str(damping),
        reduction=reduction,
        places=places,
        geometry=geometry,
        optimizer=optimizer,
        state=state,
        rendering=rendering,
        token_budget=token_budget,
        store=store,
        disk_budget=disk_budget,
        seed=seed,
    )
    check_rows(model, tokens)
    return Prepared(model, train, tokens, rendering, curvature, places, state, output, manifest)


def _fit_prepared(prepared: Prepared, directory: Path, overwrite: bool) -> Run:
    """The work of `fit`."""
    model, train, tokens = prepared.model, prepared.train, prepared.tokens
    curvature, manifest, output = prepared.curvature, prepared.manifest, prepared.output
    reduction, disk_budget = manifest.objective.reduction, manifest.disk_budget
    training = model.training if output is None else output.training(len(train))
    if not finished_before(directory, manifest):
        curvature.refuse(len(train))
        _say_batches(reduction, training, len(train))
        if (losses := check_losses(model, train, prepared.rendering, training)) is not None:
            say(f"{'note' if losses.agrees else 'warning'}: {losses}")
    with only_writer(directory):
        existing = claim(directory, manifest, curvature, overwrite)
        begun = begun_manifest(directory)
        refuse_other_tokens(directory, begun, tokens)
        manifest = existing or replace(manifest, created=begun.created)
        run = Run(directory, manifest, model, train, tokens, curvature)
        _keep(run, training, begun)
        if existing is None:
            _measure_precision(run)
            fit_points(run, prepared.places, curvature, disk_budget, prepared.state)
        if existing is None or run.manifest.path is None:
            _prepare_credit(run)
    return run


def _manifest(
    model: AdaptedModel,
    train: Examples,
    tokens: TokenizedExamples,
    curvature: Specification,
    *,
    damping: str,
    reduction: str,
    places: Sequence[Point],
    geometry: str,
    optimizer: str | Path | None,
    state: OptimizerState | None,
    rendering: Rendering,
    token_budget: int,
    store: str,
    disk_budget: float,
    seed: int,
) -> Manifest:
    """What the run is made from, before anything is computed."""
    records = tuple(place.record() for place in places)
    specification = curvature.record()
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    tokenizer, adapter = tokenizer_digest(model.tokenizer), model.adapter_digest
    supervised = int(tokens.counts.sum())
    identity = {
        "base": model.base_digest,
        "adapter": adapter,
        "data": train.digest,
        "tokenizer": tokenizer,
        "reduction": reduction,
        "max_length": rendering.max_length,
        "curvature": specification,
        "seed": seed,
        "points": [asdict(record) for record in records],
        "geometry": geometry,
        "optimizer": None if state is None or geometry != "adam" else _digest(state.v),
        "dtype": dtype,
        "store": store,
    }
    if rendering.supervise != AS_BEFORE["supervise"]:
        identity["supervise"] = rendering.supervise
    if model.loading.attn_implementation is not None:  # the bits are in the base's digest
        identity["attn_implementation"] = model.loading.attn_implementation
    if (computed := compute_record(model)) != "own":
        identity["compute"] = computed
    return Manifest(
        format=FORMAT,
        digest=digest_of(identity),
        complete=False,
        identity=identity,
        base=Source(model.base, model.base_digest),
        adapter=AdapterSource(model.adapter or None, adapter, model.space.size),
        data=DataSource(
            train.source,
            train.digest,
            len(train),
            int(tokens.lengths.sum()),
            supervised,
            train.columns,
            tokens.digest,
        ),
        tokenizer=TokenizerSource(tokenizer),
        objective=ObjectiveRecord(reduction, rendering.max_length, supervised, rendering.supervise),
        curvature=specification,
        damping=damping,
        points=records,
        geometry=geometry,
        optimizer=None if optimizer is None else str(Path(optimizer).resolve()),
        store=store,
        disk_budget=disk_budget,
        seed=seed,
        token_budget=token_budget,
        dtype=dtype,
        loading=model.loading,
        compute=computed,
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _measure_precision(run: Run) -> None:
    """Measure the error of 16-bit gradients on a few rows, before the work that is made of them.

    It is largest at the end of the path, where the rows are learnt best and the model is now.
    """
    try:
        record = measure_precision(run.model, run.tokens, token_budget=run.manifest.token_budget)
    except (MemoryError, torch.OutOfMemoryError) as error:
        say(f"note: the error of 16-bit gradients could not be measured ({error})")
        return
    if record is None:
        return
    run.manifest = replace(run.manifest, precision=record)
    write_manifest(run.directory, run.manifest)
    if note := precision_note(record):
        say(note)


def say_idle(
    geometry: str,
    damping: str | Damping,
    optimizer: str | Path | None,
    store: str,
    disk_budget: float,
) -> None:
    """Say of options that were given and change nothing as they were given."""
    if optimizer is not None and geometry != "adam" and damping != "time":
        say(f"note: --optimizer {IDLE} without --geometry adam or --damping time")
    if store != "auto" and disk_budget != DISK_BUDGET:
        say(f"note: --disk-budget {IDLE} with --store {store}, only with auto")


def _say_batches(reduction: str, training: Training | None, rows: int) -> None:
    """Say where a trainer's batches weighed rows otherwise than the reduction does."""
    if reduction != "token" or training is None or training.recipe is None:
        return
    size = training.recipe.recipe.batch_size
    if size < rows:
        say(
            f"note: the trainer's steps had {size} rows, in which short rows weigh more than long "
            f"ones: --reduction batch:{size} weights rows as it did"
        )


def _optimizer_of(output: TrainerOutput) -> Path:
    """The optimiser's state in a trainer's output."""
    if output.optimizer is None:
        raise InputError(
            f"{output.folder} has no optimizer.pt in a checkpoint (save_only_model was set, or no "
            "checkpoint was saved), which --geometry adam and --damping time need: give another "
            "geometry or damping, or --optimizer CHECKPOINT"
        )
    say(f"note: Adam's state is that of {output.optimizer}")
    return output.optimizer


def _points_of(output: TrainerOutput) -> tuple[Path, ...]:
    """The checkpoints of a trainer's output that are looked at, said."""
    places = output.points()
    if not places:
        say(
            f"note: {output.folder} has no checkpoint from before the end with a learning rate: "
            "the points are between base and adapter (--path)"
        )
        return ()
    names = ", ".join(place.name for place in places)
    say(
        f"note: points are {names} of {output.folder} ({len(places)} of "
        f"{len(output.checkpoints)} checkpoints, the early ones count most; each is a pass over "
        "the rows): --checkpoints or --path choose others"
    )
    return places


def _keep(run: Run, training: Training | None, begun: Manifest) -> None:
    """Keep rows, adapter and recipe in the directory where no file has them.

    `begun` is the manifest that lies there.
    """
    manifest = run.manifest
    if manifest.data.path is None and (path := keep_rows(run.directory, run.train)) is not None:
        data = replace(manifest.data, path=str(path.resolve()), columns=None)
        manifest = replace(manifest, data=data)
    if not manifest.adapter.path and (path := keep_adapter(run.directory, run.model)) is not None:
        adapter = replace(manifest.adapter, path=str(path.resolve()))
        manifest = replace(manifest, adapter=adapter)
    if training is not None and training.recipe is not None:
        keep_recipe(run.directory, training.recipe)
    if manifest != begun:  # of an unfinished fit too: it tells what to replace
        write_manifest(run.directory, manifest)
    run.manifest = manifest


def _prepare_credit(run: Run) -> None:
    """Make what scores of the fit's own setting need beside its points: the rows' similarities and
    the losses along the path, or the size of additive scores.

    A failure is told, not raised: what is missing is made when scores are asked for.
    """
    try:
        credited(run)
        run.kept.clear()  # scores read it again, and others need the memory
    except (ToolkitError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"note: how rows share credit could not be prepared ({error})")


def _refuse_nameless(curvature: Specification) -> None:
    """A run is opened again by its curvature's name, which must be there, and no other's."""
    name = getattr(curvature, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f"the curvature {curvature!r} has no name: give its class a field `name`")
    known = SPECIFICATIONS.get(name)
    if known is not None and type(curvature) is not known:
        raise InputError(
            f"the curvature {curvature!r} is called {name!r}, as {known.__name__} is: give it "
            "a name of its own"
        )


def _check_options(geometry: str, store: str, token_budget: int, disk_budget: float) -> None:
    if geometry not in GEOMETRIES:
        raise InputError(
            f"geometry {geometry!r} was given; expected one of {', '.join(GEOMETRIES)}"
        )
    if store not in STORE:
        raise InputError(f"store {store!r} was given; expected auto, always or never")
    if token_budget < 1:
        raise InputError(f"token budget {token_budget} was given; expected at least 1")
    if not disk_budget >= 0:
        raise InputError(f"disk budget {disk_budget} was given; expected 0 or more")


def _training_time(damping: str | Damping, state: OptimizerState | None) -> Damping:
    """The damping rule.

    `time` alone becomes `time:T` with the optimiser's total learning rate T.
    """
    if damping != "time":
        return Damping.parse(damping)
    if state is None or state.sum_lr is None:
        raise InputError(
            "damping time was given, lambda = 1 / (sum of the learning rates), and no trainer "
            "checkpoint that records them: "
            "give --optimizer CHECKPOINT with a trainer_state.json, or time:T with T from your "
            "training"
        )
    return Damping("time", state.sum_lr)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of this package, of what it computes with, and of trl, whose templates render
    rows, where it is installed.
    """
    out = {}
    for package in ("lora-influence", "torch", "transformers", "peft", "numpy", "h5py", "trl"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "unknown"
    if out["trl"] == "unknown":
        del out["trl"]
    return out


# ---- the points ---------------------------------------------------------------------------------


def fit_points(
    run: Run,
    places: Sequence[Point],
    curvature: Specification,
    disk_budget: float,
    state: OptimizerState | None,
) -> None:
    """Everything between an empty directory (or an interrupted one) and a complete manifest."""
    n, P = len(run.tokens), run.model.space.size
    point_bytes = n * P * run.model.dtype.itemsize
    rule, wanted = run.manifest.store, point_bytes * len(places)
    plan = FitPlan.of(
        run.model,
        run.tokens,
        curvature,
        points=len(places),
        store=rule,
        disk_budget=disk_budget,
    )
    say(f"fit: {plan}")
    stored = plan.stored
    left = disk_budget - point_bytes * (len(places) - 1) if stored else disk_budget
    if stored:
        _refuse_small_disk(run, wanted)
    for number, place in enumerate(places):
        if _finished(run, number, stored):
            continue
        if len(places) > 1:
            say(f"point {number + 1} of {len(places)}: {place.label}")
        with run.model.at(place.theta):
            point = AtPoint(run, number, place)
            to_come = plan.to_come if number == 0 else 0.0
            storage = Storage(stored, rule, left)
            PointFit(point, curvature, storage, state, to_come=to_come).work()
    run.manifest = replace(run.manifest, gradients_stored=stored, calibration={}, complete=True)
    write_manifest(run.directory, run.manifest)
    tidy(run.directory, run.manifest, curvature)


def _finished(run: Run, number: int, stored: bool) -> bool:
    """Whether a killed fit had finished a point.

    A file of another run is a `MismatchError`.
    """
    names = ["factors"] + ["gradients"] * stored
    paths = [run_file(run.directory, name, number) for name in names]
    for path in paths:
        if path.exists():
            with open_file(path, run_digest=point_digest(run.digest, number)):
                pass
    complete = all(path.exists() for path in paths)
    return complete and (not stored or bool(open_rows(paths[1], "done").all()))


def _refuse_small_disk(run: Run, needed: int) -> None:
    """All points' gradients must fit before the first point is begun."""
    there = sum(path.stat().st_size for path in run.directory.glob("gradients*.h5"))
    free = shutil.disk_usage(run.directory).free
    if needed - there > free:
        raise StoreError(
            f"the gradients of all points need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are "
            f"free on the disk of {run.directory}: free some space, choose another directory, give "
            "fewer points, or use --store never"
        )
