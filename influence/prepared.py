"""The options of a fit, resolved and checked before anything is computed or written."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.curvature import DEFAULT, SPECIFICATIONS, Specification
from influence.curvature.base import ONCE
from influence.damping import Damping
from influence.errors import InputError
from influence.fit_plan import AUTO, FEATURES, FULL, STORE
from influence.geometry import GEOMETRIES
from influence.kernel import EXACT_ROWS
from influence.loss import check_rows
from influence.manifest import (
    AS_BEFORE,
    FORMAT,
    ROW_BYTES,
    STORE_BEFORE,
    STORE_NOW_BEFORE,
    AdapterSource,
    DataSource,
    Manifest,
    ObjectiveRecord,
    Source,
    TokenizerSource,
    digest_of,
)
from influence.memory import enforce
from influence.optimizer_state import OptimizerState, second_moments
from influence.path import DEFAULT_PATH, Point, check_path, points
from influence.precision import compute_record
from influence.progress import say
from influence.row_weights import RowWeights, batch_size
from influence.rows import Examples
from influence.sharding import refuse_curvature
from influence.token_budget import bounded_budget, usual_budget
from influence.tokens import Rendering, TokenizedExamples, tokenizer_digest
from influence.trainer_output import TrainerOutput

#: Bytes of gradients that `store="auto"` keeps unless told otherwise.
DISK_BUDGET = 50e9
#: What is said of an option that changes nothing.
IDLE = "changes nothing"


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

    @property
    def weights(self) -> np.ndarray:
        """The objective's weights `w_i`, `[n]` float64."""
        return RowWeights(self.manifest.objective.reduction, self.tokens.counts).fitted()


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
    row_bytes: int,
    seed: int,
    trainer_output: str | Path | None,
    growable: bool = False,
) -> Prepared:
    """Resolve and check the options of `fit`, with its errors; nothing is written."""
    curvature = DEFAULT if curvature is None else curvature
    if token_budget is not None and token_budget < 1:
        raise InputError(f"token budget {token_budget} was given; expected at least 1")
    store = STORE_BEFORE.get(store, store)
    output = None if trainer_output is None else TrainerOutput.find(trainer_output)
    say_idle(geometry, damping, optimizer, store, disk_budget, len(train))
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
    _check_options(geometry, store, curvature, disk_budget, row_bytes)
    batch_size(reduction)  # refuses an unknown reduction before any work
    if geometry == "function" and any(site.parameter for site in model.sites):
        raise InputError(
            "geometry function was given, and this adapter has fused experts, each with an A and B "
            "of its own in one matrix: give raw or adam"
        )
    if len(train) == 0:
        raise InputError("no training rows were given; give the rows the adapter was trained on")
    _refuse_nameless(curvature)
    if model.shards is not None:
        refuse_curvature(curvature.name)
    if growable and (curvature.reads_rows != ONCE or store not in (AUTO, FULL)):
        say(f"note: --growable {IDLE} but for ekfac whose rows are stored in full")
    if caution := curvature.caution(model):
        say(caution)
    state = None if optimizer is None else second_moments(optimizer, model)
    damping = _training_time(damping, state)
    places = points(model, scales, checkpoints)
    rendering = Rendering.of_trainer(train, max_length, supervise)
    tokens = rendering.tokenize(train, model.tokenizer)
    check_rows(model, tokens)
    if token_budget is None:
        token_budget = bounded_budget(model, tokens, usual_budget(model.device))
    else:
        enforce(model.device)
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
        row_bytes=row_bytes,
        seed=seed,
        growable=growable,
    )
    return Prepared(model, train, tokens, rendering, curvature, places, state, output, manifest)


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
    row_bytes: int,
    seed: int,
    growable: bool,
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
        "store": STORE_NOW_BEFORE.get(store, store),  # by which runs were always told
    }
    if rendering.supervise != AS_BEFORE["supervise"]:
        identity["supervise"] = rendering.supervise
    if model.loading.attn_implementation is not None:  # the bits are in the base's digest
        identity["attn_implementation"] = model.loading.attn_implementation
    if (computed := compute_record(model)) != "own":
        identity["compute"] = computed
    if row_bytes != ROW_BYTES:
        identity["row_bytes"] = row_bytes
    if growable:
        identity["growable"] = True
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
        row_bytes=row_bytes,
        seed=seed,
        token_budget=token_budget,
        dtype=dtype,
        loading=model.loading,
        compute=computed,
        growable=growable,
        versions=versions(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def say_idle(
    geometry: str,
    damping: str | Damping,
    optimizer: str | Path | None,
    store: str,
    disk_budget: float,
    rows: int,
) -> None:
    """Say of options that were given and change nothing as they were given."""
    if optimizer is not None and geometry != "adam" and damping != "time":
        say(f"note: --optimizer {IDLE} without --geometry adam or --damping time")
    idle = store not in (AUTO, FEATURES) and rows <= EXACT_ROWS  # else it bounds similarities too
    if idle and disk_budget != DISK_BUDGET:
        say(f"note: --disk-budget {IDLE} with --store {store}, only with auto")


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


def _check_options(
    geometry: str,
    store: str,
    curvature: Specification,
    disk_budget: float,
    row_bytes: int,
) -> None:
    if geometry not in GEOMETRIES:
        raise InputError(
            f"geometry {geometry!r} was given; expected one of {', '.join(GEOMETRIES)}"
        )
    if store not in STORE:
        raise InputError(f"store {store!r} was given; expected {', '.join(STORE)}")
    if store == FEATURES and not curvature.whitens:
        raise InputError(
            f"store features was given, which needs a curvature with a root that is known leaf by "
            f"leaf (ekfac, kfac, identity), and {curvature.name} has none: give another store"
        )
    if row_bytes < 64:
        raise InputError(f"row bytes {row_bytes} was given; expected at least 64")
    if not disk_budget >= 0:
        raise InputError(
            f"disk budget {disk_budget / 1e9:g} GB was given (--disk); expected 0 or more"
        )


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
