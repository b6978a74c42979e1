"""`influence.fit`: the pass over the training rows, and what is made of it.

One pass does everything at a point of the path: each batch runs forward once and backward once per set of labels
(the data's for the gradients, the model's own for the curvature). Points come one after the other; a killed fit goes
on with the point, and the batch, that it was at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.calibration import calibrate
from influence.curvature.ekfac import EKFAC, refit_eigenvalues
from influence.curvature.fisher import Fisher, SampleSpaceFisher
from influence.curvature.ggn import GGN
from influence.curvature.hessian import Hessian
from influence.curvature.identity import Identity
from influence.curvature.kfac import KFAC, Kronecker, Moments
from influence.damping import Damping
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.geometry import GEOMETRIES, Adam, Geometry
from influence.gradients import Tape, label_uniforms, max_rows, sampled_gradient, tape
from influence.loss import (
    Supervised,
    check_rows,
    loss_gradient,
    probabilities,
    supervised_logits,
    weights,
)
from influence.manifest import (
    AUDIT,
    FORMAT,
    AdapterSource,
    DataSource,
    Manifest,
    ObjectiveRecord,
    Source,
    TokenizerSource,
    begun_manifest,
    differences,
    digest_of,
    recorded_identity,
    write_manifest,
)
from influence.optimizer_state import OptimizerState, second_moments
from influence.path import DEFAULT_PATH, END, Point, check_path, points
from influence.progress import say, track
from influence.rows import Examples
from influence.run import (
    AtPoint,
    Run,
    geometry_here,
    point_digest,
    row_blocks,
    run_file,
    update_manifest,
)
from influence.store import (
    RowFile,
    only_writer,
    open_file,
    open_rows,
    read,
    write_file,
)
from influence.tokens import TokenizedExamples, tokenize, tokenizer_digest

CurvatureSpec = EKFAC | KFAC | Fisher | GGN | Hessian | Identity
STORE = ("auto", "always", "never")
FILES = ("manifest.json", "factors.h5", "gradients.h5", "rows.h5", "scores.h5", "checkpoint.h5")

#: Seconds between checkpoints of a pass.
CHECKPOINT_SECONDS = 60.0


def fit(
    model: AdaptedModel,
    train: Examples,
    *,
    directory: str | Path,
    curvature: CurvatureSpec | None = None,
    damping: str | Damping = "mean:0.1",
    reduction: str = "token",
    path: Sequence[float] | None = None,
    checkpoints: Sequence[str | Path] = (),
    geometry: str = "raw",
    optimizer: str | Path | None = None,
    max_length: int | None = None,
    token_budget: int | None = None,
    store: str = "auto",
    disk_budget: float = 50e9,
    seed: int = 0,
    overwrite: bool = False,
) -> Run:
    """Fit a curvature to an adapter on its training rows, and store the rows' gradients.

    Parameters
    ----------
    model, train
        The adapter (`influence.load`) and the rows it was trained on (`influence.read_examples`).
    directory
        The run directory. A finished identical fit returns at once, an unfinished one resumes; anything else
        there is an error unless `overwrite`.
    curvature
        `EKFAC()` (default), `KFAC()`, `Fisher()`, `GGN()`, `Hessian()` or `Identity()`.
    damping
        `mean:X`, `top:X`, `abs:X` or `time:T`; scores may use another. `time` alone takes T from `optimizer`.
    reduction
        `token`: `w_i = 1/N_tok`, as Hugging Face trainers weight rows; `example`: `w_i = 1/(n T_i)`.
    path
        Where on the way from the base to the adapter to look: scales c of every B, in (0, 1]. Default: 0.4, 0.6, 0.8,
        or no scale at all where checkpoints are given. `(1.0,)` looks at the adapter itself only. Every point costs a
        pass over the rows. See `influence.path`.
    checkpoints
        PEFT folders that the adapter's training kept, to look there too.
    geometry
        `raw`, `function` (damping in function space, the same however A and B are scaled) or `adam` (the optimiser's
        metric). See `influence.geometry`.
    optimizer
        The Hugging Face trainer checkpoint whose `optimizer.pt` holds Adam's second moments; without it `adam`
        estimates them from training gradients. It also tells the total learning rate for `damping="time"`.
    max_length
        Truncate rows to so many tokens, as in training.
    token_budget
        Tokens per batch, padding included: the memory knob (default 1,024 on a CPU, 4,096 elsewhere). Results do not
        depend on it.
    store, disk_budget
        Store the gradients (n x P floats): `always`, `never`, or `auto`: where they take at most `disk_budget`
        bytes. Without them every later scoring is a pass over the training rows.
    seed
        Keys the sampled labels.

    Raises `InputError` before any work for a wrong argument, `MismatchError` where the directory was made from
    something else (naming what differs), `StoreError` where the disk is too small.
    """
    curvature = EKFAC() if curvature is None else curvature
    if token_budget is None:
        token_budget = 1024 if model.device.type == "cpu" else 4096
    if path is None:
        path = () if checkpoints else END if isinstance(curvature, Identity) else DEFAULT_PATH
    scales = check_path(path)
    _check_options(geometry, store, token_budget, disk_budget)
    if len(train) == 0:
        raise InputError("no training rows were given; give the rows the adapter was trained on")
    if isinstance(curvature, Hessian | GGN) and model.dtype != next(model.model.parameters()).dtype:
        say(
            "note: Hessian and GGN products under a bfloat16 base carry its rounding; prefer --dtype float32"
        )
    directory = Path(directory)
    state = None if optimizer is None else second_moments(optimizer, model)
    damping = _training_time(damping, state)
    places = points(model, scales, checkpoints)
    tokens = tokenize(train, model.tokenizer, max_length=max_length)
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
        max_length=max_length,
        token_budget=token_budget,
        store=store,
        disk_budget=disk_budget,
        seed=seed,
    )
    weights(tokens.counts, reduction)  # refuses an unknown reduction before anything is written
    check_rows(model, tokens)
    with only_writer(directory):
        existing = _claim(directory, manifest, overwrite)
        run = Run(directory, existing or manifest, model, train, tokens)
        if existing is None:
            work(run, places, curvature, disk_budget, state)
        _calibrate(run)
    return run


def _manifest(
    model: AdaptedModel,
    train: Examples,
    tokens: TokenizedExamples,
    curvature: CurvatureSpec,
    *,
    damping: str,
    reduction: str,
    places: Sequence[Point],
    geometry: str,
    optimizer: str | Path | None,
    state: OptimizerState | None,
    max_length: int | None,
    token_budget: int,
    store: str,
    disk_budget: float,
    seed: int,
) -> Manifest:
    """What the run is made from, before anything is computed."""
    records = tuple(place.record() for place in places)
    specification = {"name": curvature.name, **asdict(curvature)}
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    tokenizer, adapter = tokenizer_digest(model.tokenizer), model.adapter_digest
    supervised = int(tokens.counts.sum())
    identity = {
        "base": model.base_digest,
        "adapter": adapter,
        "data": train.digest,
        "tokenizer": tokenizer,
        "reduction": reduction,
        "max_length": max_length,
        "curvature": specification,
        "seed": seed,
        "points": [asdict(record) for record in records],
        "geometry": geometry,
        "optimizer": None if state is None or geometry != "adam" else _digest(state.v),
        "dtype": dtype,
        "store": store,
    }
    return Manifest(
        format=FORMAT,
        digest=digest_of(identity),
        complete=False,
        identity=identity,
        base=Source(model.base, model.base_digest),
        adapter=AdapterSource(model.adapter, adapter, model.space.size),
        data=DataSource(
            train.source, train.digest, len(train), int(tokens.lengths.sum()), supervised
        ),
        tokenizer=TokenizerSource(tokenizer),
        objective=ObjectiveRecord(reduction, max_length, supervised),
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
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _calibrate(run: Run) -> None:
    """Measure how large the scores of the fit's own setting are, unless that is known; a failure is told, not raised."""
    try:
        found = calibrate(run)
    except (NumericalError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"note: the size of the scores could not be measured ({error}); they stay uncalibrated")
        return
    if found:
        update_manifest(run, calibration={**run.manifest.calibration, **found})


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
    """The damping rule; `time` alone becomes `time:T` with the optimiser's total learning rate T."""
    if damping != "time":
        return Damping.parse(damping)
    if state is None or state.sum_lr is None:
        raise InputError(
            "damping time was given, lambda = 1 / (sum of the learning rates), and no trainer checkpoint that records them: "
            "give --optimizer CHECKPOINT with a trainer_state.json, or time:T with T from your training"
        )
    return Damping("time", state.sum_lr)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def _claim(directory: Path, manifest: Manifest, overwrite: bool) -> Manifest | None:
    """Make the directory this fit's own: return the manifest of a finished identical fit, or None to go on."""
    path = directory / "manifest.json"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the run")
    if overwrite and (directory / AUDIT).exists():
        raise InputError(
            f"{directory} holds the record of edits ({AUDIT}), which is evidence and never replaced: give another --run directory"
        )
    if path.exists():
        different = differences(recorded_identity(directory), manifest.identity)
        if not different and not overwrite:
            existing = begun_manifest(directory)
            if not existing.complete:
                return None
            _tidy(directory, existing)
            return _follow_latest_call(directory, existing, manifest)
        if different and not overwrite:
            raise MismatchError(
                f"{directory} holds a run made from something else: {'; '.join(different)}. Give "
                "another --run directory, or --overwrite to replace it"
            )
    elif directory.exists() and any(directory.iterdir()):
        foreign = [path.name for path in _own_files(directory)]
        if foreign or not overwrite:
            raise InputError(
                f"{directory} is not empty and holds no run (no manifest.json{', but ' + ', '.join(foreign) if foreign else ''}"
                "): give a new directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    if path.exists():
        # a run of ours was here: away with the factors that analysis tune fitted below it
        for below in (directory / "tune").glob("*/manifest.json"):
            shutil.rmtree(below.parent)
    for old in _own_files(directory):
        old.unlink()
    write_manifest(directory, manifest)
    return None


def _follow_latest_call(directory: Path, existing: Manifest, asked: Manifest) -> Manifest:
    """A finished run's manifest with what is no part of its factors: damping, and where the same things lie now."""
    current = replace(
        existing,
        damping=asked.damping,
        base=replace(existing.base, path=asked.base.path or existing.base.path),
        adapter=replace(existing.adapter, path=asked.adapter.path or existing.adapter.path),
        data=replace(existing.data, path=asked.data.path or existing.data.path),
    )
    if current.damping != existing.damping:
        chosen = (
            "; later ones use what analysis tune chose (analysis tune --forget drops it)"
            if existing.tuned
            else ""
        )
        say(
            f"note: the damping of {directory} was {existing.damping} and is now {current.damping}; "
            f"scores made before keep theirs{chosen}"
        )
    if current != existing:
        write_manifest(directory, current)
    return current


def _own_files(directory: Path) -> list[Path]:
    """The files of a run that lie in a directory, whatever its number of points."""
    numbered = [
        path for name in ("factors", "gradients", "rows") for path in directory.glob(f"{name}-*.h5")
    ]
    return [path for name in FILES if (path := directory / name).exists()] + numbered


def _tidy(directory: Path, manifest: Manifest) -> None:
    """Remove what only an unfinished fit needs (also where it was killed before it could)."""
    (directory / "checkpoint.h5").unlink(missing_ok=True)
    if manifest.curvature_name != "fisher":
        for number in range(len(manifest.points)):
            run_file(directory, "rows", number).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions of this package and of what it computes with."""
    out = {}
    for package in ("lora-influence", "torch", "transformers", "peft", "numpy", "h5py"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "unknown"
    return out


# ---- the pass over the training rows -------------------------------------------------------------------------


def work(
    run: Run,
    places: Sequence[Point],
    curvature: CurvatureSpec,
    disk_budget: float,
    state: OptimizerState | None,
) -> None:
    """Everything between an empty directory (or an interrupted one) and a complete manifest."""
    n, P = len(run.tokens), run.model.space.size
    if isinstance(curvature, Fisher):
        _refuse_large_gram(n * max(1, curvature.samples))
    row_bytes = n * P * run.model.dtype.itemsize
    empirical = isinstance(curvature, Fisher) and curvature.samples == 0
    stored = _fits(run.manifest.store, row_bytes * len(places), disk_budget) or empirical
    left = disk_budget - row_bytes * (len(places) - 1) if stored else disk_budget
    if stored:
        _refuse_small_disk(run, row_bytes * len(places))
    for number, place in enumerate(places):
        if _finished(run, number, stored):
            continue
        if len(places) > 1:
            say(f"point {number + 1} of {len(places)}: {place.label}")
        with run.model.at(place.theta):
            _Fit(AtPoint(run, number, place), curvature, stored, left, state).work()
    run.manifest = replace(run.manifest, gradients_stored=stored, calibration={}, complete=True)
    write_manifest(run.directory, run.manifest)
    _tidy(run.directory, run.manifest)


def _finished(run: Run, number: int, stored: bool) -> bool:
    """Whether a killed fit had finished a point; a file of another run is a `MismatchError`."""
    names = ["factors"] + ["gradients"] * stored
    paths = [run_file(run.directory, name, number) for name in names]
    for path in paths:
        if path.exists():
            with open_file(path, run_digest=point_digest(run.digest, number)):
                pass
    return all(path.exists() for path in paths) and (
        not stored or bool(open_rows(paths[1], "done").all())
    )


class _Fit:
    """The fit of one point: the pass over the training rows, its checkpoints, and what is made of it."""

    def __init__(
        self,
        point: AtPoint,
        curvature: CurvatureSpec,
        stored: bool,
        disk_budget: float,
        state: OptimizerState | None,
    ) -> None:
        run = point.run
        self.point, self.run, self.model, self.tokens, self.curvature = (
            point,
            run,
            run.model,
            run.tokens,
            curvature,
        )
        self.digest, self.weights = point.digest, run.weights
        n, P = len(self.tokens), self.model.space.size
        self.samples = getattr(
            curvature, "samples", 1 if isinstance(curvature, GGN | Hessian) else 0
        )
        row_bytes = n * P * self.model.dtype.itemsize
        self.store_gradients = stored
        self.store_rows = isinstance(curvature, Fisher) and self.samples > 0
        if isinstance(curvature, EKFAC):  # kept only until the eigenvalues are refitted
            self.store_rows = _fits(run.manifest.store, row_bytes * (1 + self.samples), disk_budget)
        per_example = (
            self.store_gradients or self.store_rows or isinstance(curvature, GGN | Hessian)
        )
        self.batches = self.plan(limited=per_example)
        self.geometry = self.coordinates(state)
        # one buffer for every batch's gradients: each set is written to its file before the next is made
        most = max(len(rows) for rows in self.batches) if per_example else 0
        self.buffer = (
            torch.empty(most, P, dtype=self.model.dtype, device=self.model.device) if most else None
        )
        self.moments: Moments | None = None
        self.created = False  # whether a row file had to be made, so that nothing in it counts
        self.squares = torch.zeros(len(self.model.space.leaves), dtype=torch.float64)

    def coordinates(self, state: OptimizerState | None) -> Geometry:
        """The geometry at this point; Adam's from the optimiser's state, or from gradients of some training rows."""
        name = self.run.manifest.geometry
        if name == "adam" and state is not None:
            return Adam.of(self.model.space, state.v.to(self.model.device))
        return geometry_here(self.run, name)

    def plan(self, limited: bool) -> list[np.ndarray]:
        """The batches; `limited` in rows too, where every row's gradient is held at once."""
        budget = self.run.manifest.token_budget
        return plan_batches(
            self.tokens, budget, max_rows=max_rows(self.model.space) if limited else None
        )

    def work(self) -> None:
        """Everything between nothing (or an interrupted pass) and this point's factors."""
        if isinstance(self.curvature, KFAC):
            shared = shared_inputs(self.model, self.tokens)
            self.moments = Moments(
                self.model.space,
                shared if self.geometry.shares_inputs else list(range(len(shared))),
                self.curvature,
                self.run.manifest.seed,
                self.model.dtype,
                self.model.device,
            )
        self.lay_out()
        if self.store_gradients or self.samples:
            self.main_pass(self.resume())
        self.finish()
        if not isinstance(self.curvature, Fisher):
            self.point.file("rows").unlink(missing_ok=True)

    def lay_out(self) -> None:
        """Create the row files at full size, unless a killed fit already did."""
        n, P = len(self.tokens), self.model.space.size
        dtype = np.dtype("float64" if self.model.dtype == torch.float64 else "float32")
        attrs = {"run_digest": self.digest, "param_space": self.model.space.digest}
        ids = {"train_ids": self.run.train.ids}
        for name in ("gradients", "rows"):
            if self.point.file(name).exists():
                with open_file(self.point.file(name), run_digest=self.digest):
                    pass
        for name, wanted in (("gradients", self.store_gradients), ("rows", self.store_rows)):
            self.created |= wanted and not self.point.file(name).exists()
            if not wanted:
                self.point.file(name).unlink(missing_ok=True)
        if self.store_gradients and not self.point.file("gradients").exists():
            write_file(
                self.point.file("gradients"),
                attrs={
                    **attrs,
                    "about": "gradient of l_i, the summed cross-entropy (nats) of row i, at the data's labels",
                },
                rows={"gradients": ((n, P), dtype), "done": ((n,), np.uint8)},
                strings=ids,
            )
        if self.store_rows and not self.point.file("rows").exists():
            write_file(
                self.point.file("rows"),
                attrs={
                    **attrs,
                    "about": "gradient of row i's summed cross-entropy at labels sampled from the model",
                },
                rows={"rows": ((n * self.samples, P), dtype)},
            )

    def main_pass(self, first: int) -> None:
        """Forward once per batch, backward once per set of labels; checkpoint now and then."""
        with ExitStack() as files:
            gradients = done = sampled = None
            if self.store_gradients:
                gradients = files.enter_context(
                    RowFile(self.point.file("gradients"), "gradients", write=True)
                )
                done = files.enter_context(
                    RowFile(self.point.file("gradients"), "done", write=True)
                )
            if self.store_rows:
                sampled = files.enter_context(RowFile(self.point.file("rows"), "rows", write=True))
            self.run_batches(first, gradients, done, sampled)

    def run_batches(
        self, first: int, gradients: RowFile | None, done: RowFile | None, sampled: RowFile | None
    ) -> None:
        """The batches from number `first` on, into the open row files."""
        last = time.monotonic()
        with tape(self.model) as recorder:
            for number in track(
                range(first, len(self.batches)),
                "training rows",
                total=len(self.batches),
                done=first,
            ):
                self.run_batch(recorder, self.batches[number], gradients, done, sampled)
                if time.monotonic() - last > CHECKPOINT_SECONDS:
                    for file in (gradients, sampled, done):
                        if file is not None:
                            file.flush()
                    self.checkpoint(number + 1)
                    last = time.monotonic()
            if (
                isinstance(self.curvature, EKFAC)
                and not self.store_rows
                and first < len(self.batches)
            ):
                self.checkpoint(len(self.batches))  # a second pass follows: do not lose the first

    def run_batch(
        self,
        recorder: Tape,
        rows: np.ndarray,
        gradients: RowFile | None,
        done: RowFile | None,
        sampled: RowFile | None,
    ) -> None:
        """One batch; its graph is gone when this returns, before the next one is built."""
        batch = collate(self.tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        part = recorder.forward(batch)
        probs = probabilities(part.logits)
        for draw in range(self.samples):
            final = gradients is None and draw == self.samples - 1
            found = self.sampled_backward(recorder, part, probs, rows, draw, final)
            if sampled is not None and found is not None:
                sampled.write(rows * self.samples + draw, found.cpu().numpy())
            del found
        if gradients is not None and done is not None:
            found = recorder.gradients(part, loss_gradient(probs, part.targets), buffer=self.buffer)
            gradients.write(rows, found.cpu().numpy())
            done.write(rows, np.ones(len(rows), np.uint8))

    def sampled_backward(
        self,
        recorder: Tape,
        part: Supervised,
        probs: Tensor,
        rows: np.ndarray,
        draw: int,
        final: bool,
    ) -> Tensor | None:
        """One backward at sampled labels: feeds the moments, the squares or the rows, whichever are wanted."""
        ids, counts = self.tokens.ids, self.tokens.counts
        uniforms = [
            label_uniforms(self.run.manifest.seed, draw, ids[i], int(counts[i])) for i in rows
        ]
        gradient = sampled_gradient(part, probs, torch.from_numpy(np.concatenate(uniforms)))
        relative = self.relative_weights(rows)
        sink = None
        if self.store_rows or isinstance(self.curvature, GGN | Hessian):
            sink = recorder.new_sink(self.buffer)

        def show(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
            if sink is not None:
                sink(leaf, x, g, valid)
            if self.moments is not None:
                self.moments.add(
                    leaf, *self.geometry.factor(leaf, x, g), valid, relative, inputs=draw == 0
                )

        recorder.backward(part.logits, gradient, show, last=final)
        if sink is not None and isinstance(self.curvature, GGN | Hessian):
            w = torch.from_numpy(self.weights[rows])
            features = self.geometry.features(sink.rows)
            for number, leaf in enumerate(self.model.space.leaves):
                self.squares[number] += (
                    features[:, leaf.slice].double().square().sum(1).cpu() * w
                ).sum()
        return None if sink is None else sink.rows

    def sampled_again(self, recorder: Tape, rows: np.ndarray) -> Iterator[Tensor]:
        """The gradients `[b, P]` of one batch at each draw of sampled labels."""
        batch = collate(self.tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        part = recorder.forward(batch)
        probs = probabilities(part.logits)
        for draw in range(self.samples):
            found = self.sampled_backward(
                recorder, part, probs, rows, draw, draw == self.samples - 1
            )
            assert found is not None
            yield found

    def relative_weights(self, rows: np.ndarray) -> Tensor | None:
        """`w_i` relative to the largest, `[b]`, or None where all are equal."""
        if self.weights.min() == self.weights.max():
            return None
        return torch.from_numpy(self.weights[rows] / self.weights.max()).to(self.model.device)

    def checkpoint(self, following: int) -> None:
        """Save the running sums and the number of the next batch."""
        state = {"squares": self.squares, **(self.moments.state() if self.moments else {})}
        write_file(
            self.run.directory / "checkpoint.h5",
            {name: tensor.cpu().numpy() for name, tensor in state.items()},
            attrs={
                "run_digest": self.digest,
                "next": following,
                "plan": self.plan_digest,
                "stored": self.stored,
            },
        )

    def resume(self) -> int:
        """The batch to go on with: after the last checkpoint of the same plan, else the first."""
        path = self.run.directory / "checkpoint.h5"
        if not path.exists():
            return 0
        with open_file(path) as file:
            if file.attrs.get("run_digest") != self.digest:
                return 0  # of the point before
            if (
                file.attrs["plan"] != self.plan_digest
                or file.attrs["stored"] != self.stored
                or self.created
            ):
                return 0
            state = {"squares": self.squares, **(self.moments.state() if self.moments else {})}
            for name, tensor in state.items():
                tensor.copy_(torch.from_numpy(read(file, name)))
            following = int(np.asarray(file.attrs["next"]))
        say(f"resuming at batch {following + 1} of {len(self.batches)}")
        return following

    @property
    def stored(self) -> str:
        """Which rows the pass writes: a checkpoint of other ones is not continued."""
        return f"gradients={self.store_gradients} rows={self.store_rows}"

    @property
    def plan_digest(self) -> str:
        """SHA-256 over the batches, so that a checkpoint is never continued with another plan."""
        return hashlib.sha256(
            b"|".join(rows.astype(np.int64).tobytes() for rows in self.batches)
        ).hexdigest()

    def finish(self) -> None:
        """Turn what the pass left into `factors.h5`."""
        path = self.point.file("factors")
        attrs = {
            "run_digest": self.digest,
            "curvature": self.curvature.name,
            "point": self.point.place.label,
        }
        state = {
            f"geometry/{key}": tensor.cpu().numpy() for key, tensor in self.geometry.state().items()
        }
        if self.point.place.scale is None:
            state["theta"] = self.point.place.theta.cpu().numpy()
        if self.moments is not None:
            unit = float(self.weights.max())
            kfac = self.moments.kronecker(unit, self.samples)
            fitted = (
                refit_eigenvalues(kfac, self.sampled_rows())
                if isinstance(self.curvature, EKFAC)
                else kfac
            )
            write_file(
                path, state | _kronecker_arrays(kfac, fitted, self.moments.wide_of), attrs=attrs
            )
        elif isinstance(self.curvature, Fisher):
            draws = max(1, self.samples)
            scales = np.sqrt(np.repeat(self.weights, draws) / draws)
            name = "rows" if self.samples else "gradients"
            rows = lambda: map(self.geometry.features, self.stored_blocks(name))  # noqa: E731
            fisher = SampleSpaceFisher.fit(
                self.model.space.size, rows, torch.from_numpy(scales).to(self.model.device)
            )
            arrays = {"vectors": fisher.vectors, "values": fisher.values, "scales": fisher.scales}
            write_file(
                path,
                state | {name: tensor.cpu().numpy() for name, tensor in arrays.items()},
                attrs=attrs,
            )
        else:
            write_file(path, state | {"trace": self.squares.numpy()}, attrs=attrs)

    def stored_blocks(self, name: str) -> Iterator[Tensor]:
        """The stored rows of this point, raw, in blocks."""
        return row_blocks(self.point.file(name), name, self.digest, self.model.device)

    def sampled_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per-example features at the sampled labels with their weights `w_i / samples`, in blocks.

        Read back from the pass where they were stored; else computed again with the same labels.
        """
        share = np.repeat(self.weights, self.samples) / self.samples
        if self.store_rows:
            start = 0
            for block in map(self.geometry.features, self.stored_blocks("rows")):
                yield block, torch.from_numpy(share[start : start + len(block)]).to(block)
                start += len(block)
            return
        moments, self.moments, self.store_rows, self.buffer = self.moments, None, True, None
        with tape(self.model) as recorder:
            for rows in track(self.plan(limited=True), "training rows, second pass"):
                share = torch.from_numpy(self.weights[rows] / self.samples)
                for found in self.sampled_again(recorder, rows):
                    yield self.geometry.features(found), share.to(found)
        self.moments, self.store_rows = moments, False


def _refuse_small_disk(run: Run, needed: int) -> None:
    """All points' gradients must fit before the first point is begun."""
    there = sum(path.stat().st_size for path in run.directory.glob("gradients*.h5"))
    free = shutil.disk_usage(run.directory).free
    if needed - there > free:
        raise StoreError(
            f"the gradients of all points need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on the disk of "
            f"{run.directory}: free some space, choose another directory, give fewer points, or use --store never"
        )


def _refuse_large_gram(m: int) -> None:
    """The Gram matrix and its eigendecomposition take about 3 m^2 doubles; refuse before the pass, not after."""
    needed, there = 24 * m * m, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.7 * there:
        raise InputError(
            f"curvature fisher with {m} rows needs {needed / 1e9:.0f} GB of memory for its {m} x {m} Gram matrix, and this "
            f"machine has {there / 1e9:.0f} GB: use --curvature ekfac, or fewer --samples"
        )


def _fits(store: str, needed: int, budget: float) -> bool:
    return store == "always" or (store == "auto" and needed <= budget)


def shared_inputs(model: AdaptedModel, tokens: TokenizedExamples) -> list[int]:
    """For each leaf, the first leaf whose wide side sees the very same tensor (q, k and v; gate and up).

    Found by running the shortest row once and comparing the layers' inputs; only A leaves can share.
    """
    seen: list[tuple[int, Tensor]] = []
    wide_of = list(range(len(model.space.leaves)))

    def note(number: int):
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for first, tensor in seen:
                same = (
                    tensor.data_ptr() == x.data_ptr()
                    and tensor.shape == x.shape
                    and tensor.stride() == x.stride()
                )
                if tensor is x or same:
                    wide_of[number] = first
                    return
            seen.append((number, x))  # kept alive, so that no address is used twice

        return hook

    handles = [
        site.layer.register_forward_pre_hook(note(2 * i), with_kwargs=True)
        for i, site in enumerate(model.sites)
    ]
    try:
        with model.evaluating(), torch.no_grad():
            shortest = np.array([int(np.argmin(tokens.lengths))])
            supervised_logits(
                model, collate(tokens, shortest, pad_id=model.pad_id, device=model.device)
            )
    finally:
        for handle in handles:
            handle.remove()
    return wide_of


def _kronecker_arrays(
    kfac: Kronecker, fitted: Kronecker, wide_of: list[int]
) -> dict[str, np.ndarray]:
    arrays = {"wide_of": np.array(wide_of)}
    for number, (plain, block) in enumerate(zip(kfac.leaf_blocks, fitted.leaf_blocks, strict=True)):
        tensors = {
            "narrow": block.narrow,
            "kfac_eigenvalues": plain.eigenvalues,
            "kfac_rest": plain.rest,
            "eigenvalues": block.eigenvalues,
            "rest": block.rest,
        }
        if wide_of[number] == number:
            tensors["wide"] = block.wide
        arrays |= {
            f"leaf/{number}/{name}": tensor.cpu().numpy() for name, tensor in tensors.items()
        }
    return arrays
