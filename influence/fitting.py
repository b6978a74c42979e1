"""`influence.fit`: a run directory from an adapter and its training rows.

What can be refused is refused, the directory is claimed, and every point of the path is fitted
(`influence.fitted_point`), one after the other: a killed fit goes on with the point, and the batch,
that it was at.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from influence import distributed
from influence.adapter import AdaptedModel
from influence.at_point import AtPoint, point_digest, run_file
from influence.credit import credited
from influence.curvature import Specification
from influence.damping import Damping
from influence.errors import InputError, NumericalError, StoreError, ToolkitError
from influence.features import NAME, copy_features, write_features
from influence.fit_plan import FEATURES, FULL, NONE, FitPlan
from influence.fitted_point import PointFit
from influence.gradient_check import measure_precision, precision_note
from influence.growing import Growth, grow, say_growth
from influence.grown_point import GrownFit
from influence.kept import keep_adapter, keep_recipe, keep_rows
from influence.kernel import EXACT_ROWS, WHOLE_ROWS
from influence.logged_loss import check_losses
from influence.manifest import (
    ROW_BYTES,
    STORE_BEFORE,
    Manifest,
    begun_manifest,
    write_manifest,
)
from influence.matrix_file import directory_for
from influence.memory import bounded
from influence.optimizer_state import OptimizerState
from influence.path import Point
from influence.prepared import DISK_BUDGET, Prepared, prepare
from influence.progress import say
from influence.row_storage import Storage
from influence.rows import Examples
from influence.run import Run, refuse_other_tokens
from influence.run_directory import claim, finished_before, tidy
from influence.store import only_writer, open_file, open_rows
from influence.trainer_output import Training


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
    memory: float | None = None,
    store: str = "auto",
    disk_budget: float = DISK_BUDGET,
    row_bytes: int = ROW_BYTES,
    seed: int = 0,
    trainer_output: str | Path | None = None,
    growable: bool = False,
    grown_from: str | Path | Run | None = None,
    overwrite: bool = False,
) -> Run:
    """Fit a curvature to an adapter on its training rows, and store the rows' gradients.

    Rows that came from no file and an adapter that came from no folder are kept in the directory
    (`influence.kept`).

    Raises `InputError` before any work for a wrong argument, `MismatchError` where the directory
    was made from something else (naming what differs), `StoreError` where the disk is too small.

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
    memory
        GB that this fit is to take, base and adapter included (`influence.bounded`, which is for
        later calls too). Default: what is free.
    store, disk_budget, row_bytes
        Store the rows' gradients: `full` (n x P floats a point); as `features`, at most
        `row_bytes` a row and point (`influence.features`), from which scores of the fit's own setting come without a
        training pass too; `none`: every scoring is a pass. `auto`: the first of them that takes at
        most `disk_budget` bytes; similarities of more than 20,000 rows are exact where they take no
        more than as much again (`influence.kernel`).
    seed
        Keys the sampled labels.
    trainer_output
        The output directory of the trainer that made the adapter (`influence.trainer_output`):
        early checkpoints are points where neither `path` nor `checkpoints` is given, the optimiser
        is the newest there, the recipe is kept in the run (`run/recipe.json`), and the objective
        is compared with the logged losses (`influence.logged_loss`).
    growable
        Keep the rows' gradients at sampled labels beside the full store, which take as much again
        for each draw: a run that is grown from this one is then exact for `ekfac` too.
    grown_from
        A finished run of the same adapter and options, on other rows: those that both have are not
        run again (`influence.growing`). It is not touched.
    """
    with bounded(memory):
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
            row_bytes=row_bytes,
            seed=seed,
            trainer_output=trainer_output,
            growable=growable,
        )
        growth = None
        if grown_from is not None:
            growth, manifest = grow(prepared, grown_from, Path(directory))
            prepared = replace(prepared, manifest=manifest)
        return _fit_prepared(prepared, Path(directory), overwrite, growth)


def _fit_prepared(
    prepared: Prepared, directory: Path, overwrite: bool, growth: Growth | None
) -> Run:
    """The work of `fit`."""
    model, train, tokens = prepared.model, prepared.train, prepared.tokens
    curvature, manifest, output = prepared.curvature, prepared.manifest, prepared.output
    reduction, disk_budget = manifest.objective.reduction, manifest.disk_budget
    training = model.training if output is None else output.training(len(train))
    if not finished_before(directory, manifest):
        curvature.refuse(len(train))
        _say_batches(reduction, training, len(train))
        if growth is not None:
            say_growth(growth, manifest)
        elif (losses := check_losses(model, train, prepared.rendering, training)) is not None:
            say(f"{'note' if losses.agrees else 'warning'}: {losses}")
    distributed.wait()  # until all have seen what was there
    with distributed.held_by_first(only_writer(directory)):
        existing = distributed.at_first(lambda: claim(directory, manifest, curvature, overwrite))
        begun = distributed.at_first(lambda: begun_manifest(directory))
        refuse_other_tokens(directory, begun, tokens)
        manifest = existing or replace(manifest, created=begun.created)
        asked = prepared.manifest.token_budget  # a finished run may have had more memory
        bounded = asked if asked < manifest.token_budget else None
        run = Run(directory, manifest, model, train, tokens, curvature, bounded_budget=bounded)
        run.manifest = distributed.at_first(lambda: _kept(run, training, begun))
        if existing is None:
            if growth is None:
                _measure_precision(run)
            fit_points(run, prepared.places, curvature, disk_budget, prepared.state, growth)
        elif run.features_stored:
            _renew_features(run)
        # where nothing is stored, credit is a pass over all rows: of a grown one left to the scores
        if (existing is None or run.manifest.path is None) and (
            growth is None or growth.store != NONE
        ):
            _prepare_credit(run)
    return run


def _measure_precision(run: Run) -> None:
    """Measure the error of 16-bit gradients on a few rows, before the work that is made of them.

    It is largest at the end of the path, where the rows are learnt best and the model is now.
    """
    record, short = None, ""
    try:
        record = measure_precision(run.model, run.tokens, token_budget=run.token_budget)
    except (MemoryError, torch.OutOfMemoryError) as error:
        short = str(error) or type(error).__name__
    if distributed.largest(float(bool(short))):  # all go on alike
        say(f"note: the error of 16-bit gradients could not be measured ({short})")
        return
    if record is None:
        return
    run.manifest = replace(run.manifest, precision=record)
    distributed.at_first(lambda: write_manifest(run.directory, run.manifest))
    if note := precision_note(record):
        say(note)


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


def _kept(run: Run, training: Training | None, begun: Manifest) -> Manifest:
    """Keep rows, adapter and recipe in the directory where no file has them.

    `begun` is the manifest that lies there. Returns the one that says where they are.
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
    return manifest


def _prepare_credit(run: Run) -> None:
    """Make what scores of the fit's own setting need beside its points: the rows' similarities and
    the losses along the path, or the size of additive scores.

    A failure is told, not raised: what is missing is made when scores are asked for.
    """
    try:
        credited(run)
        run.kept.clear()  # scores read it again, and others need the memory
    except (ToolkitError, MemoryError, torch.OutOfMemoryError) as error:
        if distributed.world() > 1 and not isinstance(error, InputError | NumericalError):
            raise  # this process alone has failed: the others wait for it
        say(f"note: how rows share credit could not be prepared ({error})")


def _renew_features(run: Run) -> None:
    """Make the features of a finished run anew where its damping has changed since, or what a killed
    call left of that.
    """
    for point in run.points:
        with run.model.at(point.place.theta):
            write_features(AtPoint(run, point.number, point.place))


# ---- the points ---------------------------------------------------------------------------------


def fit_points(
    run: Run,
    places: Sequence[Point],
    curvature: Specification,
    disk_budget: float,
    state: OptimizerState | None,
    growth: Growth | None = None,
) -> None:
    """Everything between an empty directory (or an interrupted one) and a complete manifest."""
    n, P = len(run.tokens), run.model.space.size
    point_bytes = n * P * run.model.dtype.itemsize
    rule = STORE_BEFORE.get(run.manifest.store, run.manifest.store)
    rule = rule if growth is None else growth.store
    plan = FitPlan.of(
        run.model,
        run.tokens,
        curvature,
        points=len(places),
        at_adapter=any(place.scale == 1 for place in places),
        store=rule,
        disk_budget=disk_budget,
        row_bytes=run.manifest.row_bytes,
        seed=run.manifest.seed,
        growable=run.manifest.growable,
    )
    if growth is None:
        say(f"fit: {plan}")
    kind, wanted = plan.store, plan.gradient_bytes
    left = disk_budget - point_bytes * (len(places) - 1) if kind == FULL else disk_budget
    distributed.at_first(lambda: _refuse_small_disk(run, kind, wanted))
    distributed.at_first(lambda: _say_small_disk(run, plan))
    for number, place in enumerate(places):
        fitted = distributed.at_first(lambda number=number: _fitted(run, number, kind))
        if fitted and kind != FEATURES:
            continue
        if len(places) > 1:
            say(f"point {number + 1} of {len(places)}: {place.label}")
        with run.model.at(place.theta):
            point = AtPoint(run, number, place)
            if not fitted:
                to_come = plan.to_come if number == 0 else 0.0
                storage = Storage(kind == FULL, rule, left, run.manifest.growable)
                if growth is not None:
                    GrownFit(growth, point, curvature, storage, state).work()
                else:
                    PointFit(point, curvature, storage, state, to_come=to_come).work()
            if kind == FEATURES:
                _write_features(point, growth)
    run.manifest = replace(
        run.manifest,
        gradients_stored=kind == FULL,
        features_stored=kind == FEATURES,
        calibration={},
        complete=True,
    )
    distributed.at_first(lambda: _complete(run, curvature))


def _write_features(point: AtPoint, growth: Growth | None) -> None:
    """Make a point's features, of which a grown one has those of the rows that stay."""
    if growth is None:
        write_features(point)
        return
    before = growth.before.points[point.number or 0]
    distributed.at_first(lambda: copy_features(before, point, growth.places, growth.kept))
    write_features(point, growth.added)


def _complete(run: Run, curvature: Specification) -> None:
    """Say on disk that the run is whole."""
    write_manifest(run.directory, run.manifest)
    tidy(run.directory, run.manifest, curvature)


def _fitted(run: Run, number: int, kind: str) -> bool:
    """Whether a killed fit had finished a point's factors, and its gradients where they are kept.

    A file of another run is a `MismatchError`.
    """
    names = ["factors"] + ["gradients"] * (kind == FULL)
    paths = [run_file(run.directory, name, number) for name in names]
    for path in paths:
        if path.exists():
            with open_file(path, run_digest=point_digest(run.digest, number)):
                pass
    complete = all(path.exists() for path in paths)
    return complete and (kind != FULL or bool(open_rows(paths[1], "done").all()))


def _say_small_disk(run: Run, plan: FitPlan) -> None:
    """Say before the work where the rows' similarities will have no room beside what is kept of
    them.
    """
    needed = plan.kernel_bytes if plan.rows > WHOLE_ROWS else 0
    rows = plan.gradient_bytes - _bytes_there(run, plan.store)
    if not needed or directory_for(run.directory, needed + rows) is not None:
        return
    fewer = "" if plan.landmarks or plan.rows <= EXACT_ROWS else ", or give a smaller --disk"
    say(
        f"note: the similarities of the rows need {needed / 1e9:.1f} GB beside what is kept of them, "
        f"and {shutil.disk_usage(run.directory).free / 1e9:.1f} GB are free in {run.directory}: credit "
        f"will be additive; free some space{fewer}"
    )


def _bytes_there(run: Run, kind: str) -> int:
    """What an interrupted fit has laid out of the rows that are kept."""
    names = {NONE: "", FULL: "gradients*.h5", FEATURES: f"{NAME}*.h5"}[kind]
    return sum(path.stat().st_size for path in run.directory.glob(names)) if names else 0


def _refuse_small_disk(run: Run, kind: str, needed: int) -> None:
    """What is kept of the rows at all points must fit before the first point is begun."""
    if kind == NONE:
        return
    there = _bytes_there(run, kind)
    free = shutil.disk_usage(run.directory).free
    if needed - there > free:
        less = "--store features or none" if kind == FULL else "--store none"
        raise StoreError(
            f"what is kept of the rows at all points needs {needed / 1e9:.2f} GB and "
            f"{free / 1e9:.2f} GB are free on the disk of {run.directory}: free some space, choose "
            f"another directory, give fewer points, or use {less}"
        )
