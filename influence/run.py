"""A finished run: what `influence fit` computed about an adapter and its training rows.

    run/manifest.json   what it was made from (`influence.manifest`)
    run/factors.h5      the curvature, the geometry, and (of a checkpoint) the parameters /theta [P]
    run/gradients.h5    /gradients [n, P] of l_i at the data's labels, /done [n]     (when stored)
    run/rows.h5         /rows [n * draws, P] at sampled labels       (curvatures that keep them)
    run/scores.h5       scores and self-influences computed later
    run/rows.jsonl      the training rows, where they came from no file  (`influence.kept`)
    run/adapter/        the adapter, where it came from no folder
    run/recipe.json     how it was trained, where that is known          (`influence.recipe`)

A run with several points of the path has one such file for each: `factors.h5`, `factors-2.h5`,
`factors-3.h5` ... Gradients and rows are stored in the parameters' own coordinates; the geometry's
map is applied when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from influence import cards, distributed
from influence.adapter import AdaptedModel
from influence.at_point import AtPoint, point_digest, run_file
from influence.base_files import live_loading
from influence.curvature import (
    SPECIFICATIONS,
    Curvature,
    Damped,
    Invertible,
    Specification,
)
from influence.damping import Damping
from influence.errors import InputError, MismatchError
from influence.loading import load
from influence.loss import check_rows
from influence.manifest import ADAPTER, Manifest, change_manifest, differences, read_manifest
from influence.measurements import Measurement
from influence.path import Point, point_from_record, scaled
from influence.precision import compute_record
from influence.row_files import place_of, read_again
from influence.row_weights import RowWeights
from influence.rows import Examples
from influence.sharding import refuse_curvature
from influence.store import (
    open_file,
    read,
)
from influence.token_budget import bounded_budget
from influence.tokens import Rendering, TokenizedExamples, tokenizer_digest

if TYPE_CHECKING:
    from influence.measurements import Contrast
    from influence.scorefile import Scores, SelfInfluence
    from influence.solvers import Solver
    from influence.without import Effect


@dataclass
class Run:
    """A fitted run: the manifest, and on demand the curvatures and the training gradients at each
    of its points.

    Made by `influence.fit`, or opened again with `Run.open`. `kept` has what answers asked before
    need again: the rows' shared credit, and what a set of queries is to them.
    """

    directory: Path
    manifest: Manifest = field(repr=False)
    model: AdaptedModel = field(repr=False)
    train: Examples
    tokens: TokenizedExamples = field(repr=False)
    own_curvature: Specification | None = field(default=None, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    bounded_budget: int | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return cards.run_line(self)

    def _repr_html_(self) -> str:
        return cards.run_card(self)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        model: AdaptedModel | None = None,
        train: Examples | None = None,
        curvature: Specification | None = None,
        device: str = "auto",
        device_map: str | None = None,
        shard: bool = False,
        checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Run:
        """Open a run directory with the base, adapter and data it records (or those given).

        The base is loaded as it was for the fit: in its type, its bits, with its attention.

        Raises `MismatchError`, naming what differs, if base, adapter, data or tokenizer are not
        those it was made from; `InputError` if it is no run or an unfinished one. `curvature`: the
        specification that the run was fitted with, where that is one of your own.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if shard:
            refuse_curvature(manifest.curvature_name)
        refuse_moved(directory, manifest, model=model is None, train=train is None)
        if model is None:
            if not manifest.adapter.path:
                raise InputError(
                    f"{directory} was fitted on an adapter that came from no folder: pass it as "
                    "model="
                )
            model = load(
                manifest.base.path,
                manifest.adapter.path,
                dtype=manifest.dtype,
                **asdict(manifest.loading),
                compute=manifest.compute,
                device=device,
                device_map=device_map,
                shard=shard,
                checkpointing=checkpointing,
                trust_remote_code=trust_remote_code,
            )
        if train is None:
            if manifest.data.path is None:
                raise InputError(
                    f"{directory} was fitted on rows that came from no file: pass them as train="
                )
            train = read_again(manifest.data.path, manifest.data.columns)
        given = {
            "base": model.base_digest,
            "adapter": model.adapter_digest,
            "data": train.digest,
            "tokenizer": tokenizer_digest(model.tokenizer),
            "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
            "compute": None if (computed := compute_record(model)) == "own" else computed,
            **_attention(manifest, model, directory),
        }
        different = differences(manifest.identity, given)
        if different:
            raise MismatchError(
                f"{directory} was made from something else: {'; '.join(different)}. Restore what it "
                "was made from (paths in manifest.json), or fit a new run"
            )
        tokens = manifest.objective.rendering.tokenize(train, model.tokenizer)
        refuse_other_tokens(directory, manifest, tokens)
        budget = bounded_budget(model, tokens, manifest.token_budget)
        bounded = None if budget == manifest.token_budget else budget
        return cls(directory, manifest, model, train, tokens, curvature, bounded_budget=bounded)

    @property
    def token_budget(self) -> int:
        """Tokens of a batch, padding included: the fit's, or what `influence.bounded` allowed when
        the run was opened.
        """
        return self.bounded_budget or self.manifest.token_budget

    @property
    def digest(self) -> str:
        """SHA-256 of what the run was made from.

        Every file of the run carries it.
        """
        return self.manifest.digest

    def tokenized(self, rows: Examples) -> TokenizedExamples:
        """Tokens of other rows, rendered, truncated and supervised as the training rows are.

        Rows that the model cannot take are an error.
        """
        found = self.manifest.objective.rendering.tokenize(rows, self.model.tokenizer)
        check_rows(self.model, found)
        return found

    def query_tokens(self, queries: Examples, explain: str = "last") -> TokenizedExamples:
        """Tokens of queries, of which those of `explain` are explained.

        `last`: the last answer of a conversation, whatever training supervised; `assistant`: every
        answer; `all`: every token. Rows that the model cannot take are an error.
        """
        rendering = Rendering(self.manifest.objective.max_length, explain)
        found = rendering.tokenize(queries, self.model.tokenizer)
        check_rows(self.model, found)
        return found

    @cached_property
    def weights(self) -> np.ndarray:
        """The objective's weights `w_i`, `[n]` float64."""
        return self.row_weights.fitted()

    @property
    def row_weights(self) -> RowWeights:
        """The rule of the weights `w_i`, which weights changed rows too."""
        return RowWeights(self.manifest.objective.reduction, self.tokens.counts)

    @property
    def fitted_name(self) -> str:
        """Name of the curvature that was fitted."""
        return self.manifest.curvature_name

    @cached_property
    def specification(self) -> Specification:
        """The curvature as it was asked of `fit`, such as `EKFAC(samples=1)`."""
        name, options = self.manifest.curvature_name, self.manifest.curvature_options
        if self.own_curvature is not None:
            if self.own_curvature.record() != dict(self.manifest.curvature):
                raise MismatchError(
                    f"the curvature {self.own_curvature} was given, and {self.directory} was "
                    "fitted "
                    f"with {name} {options}: give that one"
                )
            return self.own_curvature
        if name not in SPECIFICATIONS:
            raise InputError(
                f"{self.directory} was fitted with the curvature {name!r}, which is none of "
                f"{', '.join(SPECIFICATIONS)}: open it with the specification that it was fitted "
                "with, Run.open(..., curvature=...)"
            )
        return SPECIFICATIONS[name](**options)

    @property
    def closed_forms(self) -> list[str]:
        """Names of the curvatures of this run that have a closed inverse: the fitted one first,
        plain products last.
        """
        point = self.points[-1]
        names = [self.fitted_name, *(name for name in point.held if name != self.fitted_name)]
        closed = [name for name in names if isinstance(point.curvature(name), Invertible)]
        return sorted(closed, key=self.is_plain)

    def is_plain(self, curvature: str | None) -> bool:
        """Whether a curvature (None: the fitted one) stands for plain gradient products, without
        damping.
        """
        if curvature is None or curvature == self.fitted_name:
            return self.specification.undamped
        return curvature in SPECIFICATIONS and SPECIFICATIONS[curvature].undamped

    @property
    def gradients_stored(self) -> bool:
        """Whether the training gradients are on disk, so that scoring needs no training pass."""
        return self.manifest.gradients_stored

    @property
    def features_stored(self) -> bool:
        """Whether the rows are on disk in few bytes (`influence.features`), from which scores of
        the fit's own setting come without a training pass.
        """
        return self.manifest.features_stored

    @property
    def tuned(self) -> Tuned | None:
        """The setting that `analysis tune` chose, if it was run."""
        chosen = self.manifest.tuned
        if chosen is None:
            return None
        run = self
        if chosen.run is not None:
            run = Run.open(
                self.directory / chosen.run,
                model=self.model,
                train=self.train,
                curvature=self.own_curvature,
            )
        return Tuned(run, chosen.curvature, chosen.damping, chosen.at)

    @cached_property
    def points(self) -> list[AtPoint]:
        """The run at each of its points, in order."""
        found = []
        for number, record in enumerate(self.manifest.points):
            theta = None
            if record.scale is None:
                with open_file(
                    run_file(self.directory, "factors", number),
                    run_digest=point_digest(self.digest, number),
                ) as file:
                    theta = torch.from_numpy(read(file, "theta")).to(
                        self.model.device, self.model.dtype
                    )
            found.append(AtPoint(self, number, point_from_record(self.model, record, theta)))
        return found

    @cached_property
    def end(self) -> AtPoint:
        """The run at the adapter itself, whether or not that is one of its points."""
        for point in self.points:
            if point.place.scale == 1:
                return point
        return AtPoint(self, None, Point("1", 1.0, scaled(self.model, 1.0), scale=1.0))

    def curvature(self, name: str | None = None) -> Curvature:
        """The curvature at the run's last point.

        See `AtPoint.curvature`.
        """
        return self.points[-1].curvature(name)

    def operator(
        self, curvature: str | None = None, damping: str | Damping | None = None
    ) -> Damped:
        """`C + lambda I` at the run's last point.

        See `AtPoint.operator`.
        """
        return self.points[-1].operator(curvature, damping)

    def preconditioner(self, operator: Damped) -> Damped:
        """The damped EK-FAC of the run's last point.

        See `AtPoint.preconditioner`.
        """
        return self.points[-1].preconditioner(operator)

    def gradient_blocks(
        self, skip: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The training gradients at the run's last point.

        See `AtPoint.gradient_blocks`.
        """
        return self.points[-1].gradient_blocks(skip)

    def score(
        self,
        queries: Examples,
        *,
        out: str | Path | None = None,
        solver: str | Solver = "direct",
        tolerance: float | None = None,
        max_iterations: int | None = None,
        curvature: str | None = None,
        damping: str | Damping | None = None,
        measurement: str | Measurement | Contrast = "loss",
        explain: str = "last",
        aggregate: str | None = None,
        at: str | None = None,
        credit: str | None = None,
        per_token: bool = False,
        per_module: bool = False,
        rerank: int | None = None,
        overwrite: bool = False,
    ) -> Scores:
        """Influence of every training row on every query.

        The keywords are those of `influence.scores.score`.
        """
        from influence.scores import score

        found = score(
            self,
            queries,
            out=out,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            curvature=curvature,
            damping=damping,
            measurement=measurement,
            explain=explain,
            aggregate=aggregate,
            at=at,
            credit=credit,
            per_token=per_token,
            per_module=per_module,
            rerank=rerank,
            overwrite=overwrite,
        )
        return replace(found, train_rows=self.train, query_rows=queries)

    def self_influence(
        self,
        *,
        out: str | Path | None = None,
        curvature: str | None = None,
        damping: str | Damping | None = None,
        at: str | None = None,
        credit: str | None = None,
        overwrite: bool = False,
    ) -> SelfInfluence:
        """Predicted rise of every training row's own mean loss if it is removed.

        See `influence.scores.self_influence`.
        """
        from influence.scores import self_influence

        return self_influence(
            self,
            out=out,
            curvature=curvature,
            damping=damping,
            at=at,
            credit=credit,
            overwrite=overwrite,
        )

    def without(
        self,
        ids: Sequence[str] = (),
        queries: Examples | None = None,
        *,
        group: str | None = None,
        curvature: str | None = None,
        damping: str | Damping | None = None,
        at: str | None = None,
        explain: str = "last",
    ) -> Effect:
        """Predicted losses if some training rows go together, without training again.

        See `influence.without.without`.
        """
        from influence.without import without

        return without(
            self,
            ids,
            queries,
            group=group,
            curvature=curvature,
            damping=damping,
            at=at,
            explain=explain,
        )


@dataclass(frozen=True)
class Tuned:
    """The setting that `analysis tune` recorded: the run that holds it (this one, or one below
    it), and what to use.
    """

    run: Run
    curvature: str
    damping: str | None
    at: str


def refuse_moved(
    directory: Path, manifest: Manifest, *, model: bool = True, train: bool = True
) -> None:
    """Name what a run was made from that no longer lies where it lay, as an `InputError`.

    That is the base and the adapter where the `model` is needed, and the training rows.
    """
    rows = None
    if manifest.data.path is not None:
        rows = place_of(manifest.data.path)
    folders = [
        ("--model", Path(manifest.base.path or ""), model),
        ("--adapter", Path(manifest.adapter.path or ""), model),
        ("--train", rows or Path(), train),
    ]
    # what is not absolute is a name on the hub
    gone = [
        (option, path)
        for option, path, needed in folders
        if needed and path.is_absolute() and not path.exists()
    ]
    if gone:
        places = ", ".join(f"{path} ({option})" for option, path in gone)
        raise InputError(
            f"{directory} was made from what does not exist any more: {places}. Where it was "
            "moved, the same influence fit command with the new paths says so to the run, and "
            "computes nothing again"
        )


def _attention(manifest: Manifest, model: AdaptedModel, directory: Path) -> dict[str, str | None]:
    """The attention of a model, to compare with a run's; nothing where the run's is not known.

    Runs of live models recorded none once, whichever it was.
    """
    recorded = manifest.loading.attn_implementation
    place = manifest.adapter.path
    if recorded is None and (place is None or Path(place) == (directory / ADAPTER).resolve()):
        return {}
    base = model.model.get_base_model()
    if recorded is not None and getattr(base.config, "_attn_implementation", None) == recorded:
        return {"attn_implementation": recorded}  # also where it is what transformers chooses
    asked = model.loading.attn_implementation
    return {"attn_implementation": asked and live_loading(base).attn_implementation}


def refuse_other_tokens(directory: Path, manifest: Manifest, tokens: TokenizedExamples) -> None:
    """The same rows and tokenizer may be rendered otherwise by other versions of the libraries.

    Runs from before their tokens were kept as a digest are told by how many they are.
    """
    data = manifest.data
    there = data.tokens, data.supervised_tokens, data.tokens_digest
    here = int(tokens.lengths.sum()), int(tokens.counts.sum()), tokens.digest
    if there[:2] == here[:2] and there[2] in (None, here[2]):
        return
    made = ", ".join(f"{name} {number}" for name, number in sorted(manifest.versions.items()))
    raise MismatchError(
        f"the rows of {directory} were {there[0]} tokens ({there[1]} supervised) at the fit and "
        f"are {'others' if there[:2] == here[:2] else f'{here[0]} ({here[1]})'} now: transformers "
        f"or trl render them otherwise than then. Install what the fit had ({made}), or fit a new "
        "run"
    )


def update_manifest(run: Run, **changes: Any) -> None:
    """Set some fields of a run's manifest, in memory and on disk, where the others stay what
    they are by now.
    """
    run.manifest = distributed.at_first(lambda: change_manifest(run.directory, **changes))
