"""`influence.estimate`: what a fit and its scores are going to take, before they are begun.

Time is measured on a few batches (`influence.probe`) and multiplied by what the options will really
do (`influence.fit_plan`); bytes on disk follow from shapes. On a machine that does other things too,
times are those that it had while they were measured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence.adapter import AdaptedModel
from influence.at_point import (
    BLOCK_BYTES,
    QUERY_SHARE,
    RMS_ROWS,
    SCALE_ROWS,
    evenly_spaced,
)
from influence.batches import plan_batches
from influence.cost_advice import Situation, advice
from influence.curvature import Specification
from influence.damping import Damping
from influence.features import BLOCK_BYTES as DECODED_BYTES
from influence.features import MEMORY_SHARE
from influence.fit_plan import FEATURES, FILE_BYTES, FULL, FitPlan, size, string_bytes
from influence.fitted_point import CHECKPOINT_SECONDS
from influence.gradients import max_rows
from influence.kernel import COPIES, ROWS_AT_ONCE, WHOLE_ROWS
from influence.manifest import ROW_BYTES
from influence.matrix_file import GPU_TILE, PANEL_BYTES, TILE
from influence.memory import free_memory
from influence.path_time import RATIO_ROWS
from influence.prepared import DISK_BUDGET, Prepared, prepare
from influence.probe import Speeds, drawn_rows, measure, now
from influence.progress import duration
from influence.rows import Examples
from influence.solvers.direct import Direct
from influence.tokens import Rendering, TokenizedExamples
from influence.trainer_output import recipe_near

#: What HDF5 takes for the arrays of a leaf's bases and eigenvalues, about eight, around their numbers.
LEAF_FILE_BYTES = 4_000
#: Passes over n x n numbers, 8 bytes each, that making the rows' similarities takes beside products.
KERNEL_TOUCHES = 10
#: Bytes that are held of similarities in files: tiles of float64, and rows of them.
KERNEL_TILES, KERNEL_ROWS = 6 * 8, 4 * PANEL_BYTES


@dataclass(frozen=True)
class Cost:
    """What a command takes.

    Attributes
    ----------
    seconds : float
        From its beginning to its end, without loading the model.
    memory_bytes : int
        The most that the process holds: of the GPU where the model is on one, else of the machine,
        with the model and all libraries.
    disk_bytes : int
        The most that its files take at any time.
    kept_bytes : int
        What of it stays.
    passes : float
        Passes over all training rows, forward and backward.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    kept_bytes: int
    passes: float

    def __str__(self) -> str:
        """The cost in one line."""
        return (
            f"about {duration(self.seconds)}, {size(self.memory_bytes)} of memory, "
            f"{size(self.disk_bytes)} of disk ({size(self.kept_bytes)} stay), "
            f"{self.passes:.3g} passes over the rows"
        )


@dataclass(frozen=True)
class Estimate:
    """What `fit` and `score` take, and what would take less.

    Attributes
    ----------
    fit, score : Cost
        Of the fit, and of scoring the queries afterwards.
    queries : int
        Queries that are scored: 1 like a training row of middle length where none were given.
    advice : tuple of str
        Sentences for people.
    plan : FitPlan
        What the fit reads, runs and writes.
    """

    fit: Cost
    score: Cost
    queries: int
    advice: tuple[str, ...]
    plan: FitPlan = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """For a program: `fit`, `score` and `advice`."""
        score = {**asdict(self.score), "queries": self.queries}
        return {"fit": asdict(self.fit), "score": score, "advice": list(self.advice)}

    def __str__(self) -> str:
        """For a person."""
        many = f"{self.queries} quer" + ("y" if self.queries == 1 else "ies")
        lines = [f"fit: {self.fit}", f"score, {many}: {self.score}"]
        return "\n".join([*lines, *self.advice])


def estimate(
    model: AdaptedModel,
    train: Examples,
    queries: Examples | None = None,
    *,
    directory: str | Path = ".",
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
    row_bytes: int = ROW_BYTES,
    seed: int = 0,
    trainer_output: str | Path | None = None,
    growable: bool = False,
) -> Estimate:
    """Measure for a few seconds what a fit with these options takes, and scores after it.

    The other options are those of `influence.fit`, with its errors.

    Parameters
    ----------
    model, train
        As for `influence.fit`.
    queries
        The rows that are to be explained; None: one that is like a training row.
    directory
        The run directory that the fit would make: its disk is measured, and nothing stays there.
    """
    start = now(model.device)
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
    preparing = now(model.device) - start

    def plan_of(kind: str) -> FitPlan:
        return FitPlan.of(
            model,
            prepared.tokens,
            prepared.curvature,
            points=len(prepared.places),
            at_adapter=any(place.scale == 1 for place in prepared.places),
            store=kind,
            disk_budget=disk_budget,
            row_bytes=row_bytes,
            seed=seed,
            growable=growable,
        )

    plan = plan_of(store)
    prepared.curvature.refuse(len(train))
    place = _disk_of(Path(directory))
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=place) as folder:
        speeds = measure(prepared, plan, Path(folder))
    query_tokens = _query_tokens(prepared, queries)
    work = Work(prepared, speeds, preparing)
    fit = work.fit(plan)
    situation = Situation(
        plan=plan,
        seconds=fit.seconds,
        disk_bytes=fit.disk_bytes,
        disk_free=shutil.disk_usage(place).free,
        memory_bytes=fit.memory_bytes,
        memory_free=free_memory(model.device) + speeds.memory,
        token_budget=prepared.manifest.token_budget,
        rows_retrained=rows_retrained(prepared),
        devices=torch.cuda.device_count() if model.device.type == "cuda" else 1,
        takes_rows=hasattr(prepared.curvature, "rows"),
        plan_of=plan_of,
        seconds_of=lambda changed: work.fit(changed).seconds,
        seconds_with_budget=lambda budget: work.with_budget(budget).fit(plan).seconds,
        score_seconds_of=lambda changed: work.score(changed, query_tokens).seconds,
    )
    return Estimate(
        fit, work.score(plan, query_tokens), len(query_tokens), tuple(advice(situation)), plan
    )


def _disk_of(directory: Path) -> Path:
    """The directory, or the nearest above it that exists."""
    directory = directory.resolve()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def _query_tokens(prepared: Prepared, queries: Examples | None) -> TokenizedExamples:
    """The queries as tokens, or a training row of middle length."""
    if queries is not None and len(queries):
        rendering = Rendering(prepared.rendering.max_length, "last")
        return rendering.tokenize(queries, prepared.model.tokenizer)
    order = np.argsort(prepared.tokens.lengths, kind="stable")
    return prepared.tokens.select([int(order[len(order) // 2])])


def rows_retrained(prepared: Prepared) -> int | None:
    """Rows that a retraining reads, None where no recipe is known."""
    rows, model = len(prepared.train), prepared.model
    training = model.training if prepared.output is None else prepared.output.training(rows)
    recorded = None if training is None else training.recipe
    if recorded is None and model.adapter and Path(model.adapter).is_dir():
        recorded = recipe_near(Path(model.adapter), rows)
    return None if recorded is None else recorded.recipe.rows_read(rows)


@dataclass(frozen=True)
class Work:
    """The costs of a fit and of scores, from what its parts take.

    `preparing` are the seconds of rendering the rows and of the digests.
    """

    prepared: Prepared
    speeds: Speeds
    preparing: float
    budget: int | None = None

    def with_budget(self, budget: int) -> Work:
        """The same with other batches."""
        return Work(self.prepared, self.speeds, self.preparing, budget)

    @property
    def token_budget(self) -> int:
        """Tokens of a batch."""
        return self.budget or self.prepared.manifest.token_budget

    # ---- passes

    def pass_seconds(self, plan: FitPlan) -> float:
        """Seconds of the first pass: one over all rows, or over those that the curvature is formed
        of and then, where gradients are stored, over all.
        """
        tokens, ratios = self.drawn_tokens(plan), self.speeds.ratios
        batches = plan.batches(self.prepared.model, tokens, self.token_budget)
        seconds = self.speeds.batch.seconds(tokens, batches)
        if not plan.apart or not plan.draws:
            return seconds
        stored = self.whole_seconds(self.prepared.tokens) if plan.store == FULL else 0.0
        return ratios.drawn * seconds + ratios.stores * stored

    def drawn_tokens(self, plan: FitPlan) -> TokenizedExamples:
        """The rows that labels are drawn of."""
        if not plan.apart:
            return self.prepared.tokens
        return self.prepared.tokens.select(drawn_rows(self.prepared, plan))

    def whole_seconds(self, tokens: TokenizedExamples) -> float:
        """Seconds of the first pass's work on some rows, in batches of which whole gradients are
        formed.
        """
        most = max_rows(self.prepared.model.space)
        return self.speeds.batch.seconds(
            tokens, plan_batches(tokens, self.token_budget, max_rows=most)
        )

    def leafwise_seconds(self, tokens: TokenizedExamples) -> float:
        """The same in batches that are limited by their tokens alone."""
        return self.speeds.batch.seconds(tokens, plan_batches(tokens, self.token_budget))

    def gradient_seconds(self, tokens: TokenizedExamples) -> float:
        """Seconds of a pass with one backward over some rows."""
        return self.speeds.ratios.gradients * self.whole_seconds(tokens)

    def features_seconds(self, tokens: TokenizedExamples) -> float:
        """Seconds of a pass that makes few bytes of some rows."""
        passing = self.speeds.ratios.leaves * self.leafwise_seconds(tokens)
        return passing + len(tokens) * self.speeds.features.keep

    def forward_seconds(self, tokens: TokenizedExamples) -> float:
        """Seconds of a pass without backward over some rows."""
        return self.speeds.ratios.forward * self.leafwise_seconds(tokens)

    def reading(self, count: float) -> float:
        """Seconds of reading so many bytes."""
        return count / self.speeds.read

    # ---- fit

    def fit(self, plan: FitPlan) -> Cost:
        """The cost of the fit."""
        kept = self.kept_bytes(plan)
        return Cost(
            seconds=self.fit_seconds(plan),
            memory_bytes=self.fit_memory(plan),
            disk_bytes=kept + plan.passing_bytes + self.checkpoint_bytes(plan),
            kept_bytes=kept,
            passes=plan.passes,
        )

    def checkpoint_bytes(self, plan: FitPlan) -> int:
        """Bytes of the checkpoint that a killed fit goes on with, deleted at the end: of a pass that
        is long, or followed by another one.
        """
        long = self.pass_seconds(plan) > CHECKPOINT_SECONDS
        return (
            self.speeds.sums_bytes + FILE_BYTES
            if plan.runs_first and (long or plan.runs_again)
            else 0
        )

    def kept_bytes(self, plan: FitPlan) -> int:
        """Bytes of the run directory."""
        train, after = self.prepared.train, self.speeds.after
        each = after.kept_bytes + 3 * FILE_BYTES + string_bytes(train.ids) * plan.stored
        each += len(train) * (plan.store == FULL)  # whether each row is there
        each += LEAF_FILE_BYTES * plan.leaves * bool(after.decomposed)
        if plan.store == FEATURES:  # which coordinates are kept
            each += 16 * plan.leaves + -(-plan.parameters // 8)
        geometry = self.prepared.manifest.geometry
        if geometry == "adam":
            each += plan.parameters * plan.itemsize
        checkpoints = sum(place.scale is None for place in self.prepared.places)
        return (
            plan.kept_bytes
            + plan.points * each
            + checkpoints * plan.parameters * plan.itemsize
            + FILE_BYTES
        )

    def fit_seconds(self, plan: FitPlan) -> float:
        """Seconds of the fit."""
        s, tokens = self.speeds, self.prepared.tokens
        rows = plan.sample * max(1, plan.draws)
        first = self.pass_seconds(plan)
        each = s.begin + s.finish
        if self.prepared.manifest.geometry == "adam" and self.prepared.state is None:
            each += self.gradient_seconds(_evenly(tokens, RMS_ROWS))
        if plan.runs_first:
            each += first
        if plan.looks_again or plan.keeps_rows:
            each += rows * s.row
            again = s.ratios.again * self.leafwise_seconds(self.drawn_tokens(plan))
            each += again if plan.runs_again else self._read_rows(plan, rows)
        if plan.store == FEATURES:
            each += s.load + self.features_seconds(tokens)
            each += plan.gradient_bytes / plan.points / s.write
        each += self.checkpoint_bytes(plan) / s.write
        return self.preparing + plan.points * each + self.credit_seconds(plan)

    def _read_rows(self, plan: FitPlan, rows: int) -> float:
        return self.reading(rows * plan.parameters * plan.itemsize)

    def credit_seconds(self, plan: FitPlan) -> float:
        """Seconds of what scores need beside the points: similarities and losses along the path, or
        the size of additive scores.
        """
        s, tokens, n = self.speeds, self.prepared.tokens, plan.rows
        if not plan.shares_credit:
            if not plan.closed or plan.points < 2 or plan.store == FEATURES:
                return 0.0
            return plan.points * self.gradient_seconds(_evenly(tokens, SCALE_ROWS))
        columns = min(n, plan.landmarks) or n
        rows, few = self.rows_seconds(plan), plan.store == FEATURES
        # stored rows are read once, and turned once where a solution turns them twice
        turned = self.turned(plan)
        looks = 1.0 if turned else columns / n + self.parts(plan, columns)
        each = s.load + rows * looks
        triangle = 0.5 if n > WHOLE_ROWS and not plan.landmarks else 1.0
        each += triangle * columns * n * self.width(plan) / s.multiply
        each += 0.0 if few else (n / 2 if turned else columns) * s.solve
        each += plan.kernel_bytes / plan.points / s.write
        if plan.landmarks:
            # U, U^T A U and the diagonal of the inverse, each of them half a product
            each += 1.5 * columns**2 * n / s.multiply + s.invert * 2 * (columns / 1000) ** 3
            # K's diagonal is another look at the rows; of few bytes it is in the file
            each += 0.0 if few else rows + n * s.solve / 2
        elif n > WHOLE_ROWS:
            each += s.invert * (n / 1000) ** 3
        else:
            each += KERNEL_TOUCHES * 8 * n**2 / s.read
        one = _evenly(tokens, RATIO_ROWS)
        single = [np.array([row]) for row in range(len(one))]
        alone = s.batch.seconds(one, single)
        each += (s.ratios.gradients + 2 * s.ratios.forward) * alone + RATIO_ROWS * s.solve
        losses = self.forward_seconds(_evenly(tokens, plan.loss_rows))
        return plan.points * each + plan.loss_places * losses

    def turned(self, plan: FitPlan) -> bool:
        """Whether the similarities are those of stored rows, looked at leaf by leaf."""
        return plan.store == FULL and plan.rows <= WHOLE_ROWS and self.prepared.curvature.whitens

    def rows_seconds(self, plan: FitPlan) -> float:
        """Seconds of having every row once: read, read and decoded, or computed."""
        if plan.store == FEATURES:
            read = self.reading(plan.gradient_bytes / plan.points)
            return read + plan.rows * self.speeds.features.decode
        if plan.stored:
            return self._read_rows(plan, plan.rows)
        return self.gradient_seconds(self.prepared.tokens)

    def parts(self, plan: FitPlan, columns: int) -> int:
        """How many parts the rows are solved for in, each of which reads all rows."""
        at_once = self.at_once(plan, COPIES)
        if plan.rows > WHOLE_ROWS:
            at_once = min(at_once, ROWS_AT_ONCE)
        return -(-columns // at_once)

    def at_once(self, plan: FitPlan, copies: int) -> int:
        """Rows, or queries, that are held at a time, with so many copies of a gradient beside it."""
        free = free_memory(self.prepared.model.device)
        if plan.store == FEATURES:
            return max(1, int(MEMORY_SHARE * free / self.decoded_bytes))
        each = (1 + copies) * plan.parameters * plan.itemsize
        return max(1, int(QUERY_SHARE * free / each))

    @property
    def kernel_held(self) -> int:
        """Bytes that are held of similarities in files."""
        tile = TILE if self.prepared.model.device.type == "cpu" else GPU_TILE
        return KERNEL_TILES * tile**2 + KERNEL_ROWS

    @property
    def decoded_bytes(self) -> int:
        """Bytes of a row that was kept in few of them, as it is multiplied."""
        each = 4 if self.prepared.model.device.type == "cpu" else 2
        return self.speeds.features.coordinates * each

    def width(self, plan: FitPlan) -> int:
        """Numbers of a row that products are made of."""
        return self.speeds.features.coordinates if plan.store == FEATURES else plan.parameters

    def fit_memory(self, plan: FitPlan) -> int:
        """The most memory of the fit."""
        s, n = self.speeds, plan.rows
        width = plan.parameters * plan.itemsize
        block = max(BLOCK_BYTES, width * 8)
        largest = max(s.after.decomposed, default=0)
        workers = torch.get_num_threads()
        # the sums are within what the pass took, and eigenvectors take their place
        stages = [s.after.kept_bytes + 4 * 8 * largest**2 * workers + 3 * min(block, n * width)]
        if plan.shares_credit:
            columns = min(n, plan.landmarks) or n
            at_once = -(-columns // self.parts(plan, columns))
            at_once = min(at_once, RATIO_ROWS) if self.turned(plan) else at_once
            held = 8 * columns * n * (plan.points + 1) if n <= WHOLE_ROWS else self.kernel_held
            stages.append(self.solving_memory(plan, at_once) + held)
        return s.memory + self.together(max(stages))

    def together(self, later: int) -> int:
        """The most memory of the pass and of what comes later, beside what was held before.

        A GPU's allocator uses the pass's memory again; on a CPU the process keeps most of it, in
        pieces too small for what comes later (measured, benchmarks/estimate.py).
        """
        passing = self.speeds.pass_memory
        on_gpu = self.prepared.model.device.type == "cuda"
        return max(passing, later) if on_gpu else passing + later

    def solving_memory(self, plan: FitPlan, rows: int) -> int:
        """Bytes of some rows' gradients, of their answers, of what is rotated of a leaf meanwhile,
        and of a block of the rows that they are multiplied with; decoded, of rows in few bytes.
        """
        if plan.store == FEATURES:
            block = min(DECODED_BYTES, plan.rows * self.decoded_bytes)
            return rows * self.decoded_bytes + 3 * block // 2 + self.speeds.after.kept_bytes
        leaves = self.prepared.model.space.leaves
        leaf = max(leaf.stop - leaf.start for leaf in leaves)
        width = plan.parameters * plan.itemsize
        block = min(max(BLOCK_BYTES, width * 8), plan.rows * width)
        return rows * (2 * width + 3 * leaf * plan.itemsize) + block + self.speeds.after.kept_bytes

    # ---- scores

    def score(self, plan: FitPlan, queries: TokenizedExamples) -> Cost:
        """The cost of scoring the queries, all points, in the default setting."""
        s, n, Q = self.speeds, plan.rows, len(queries)
        width = plan.parameters * plan.itemsize
        chunks = -(-Q // self.at_once(plan, Direct.copies))
        if plan.store == FEATURES:
            each = s.load + self.features_seconds(queries)
        else:
            each = s.load + self.gradient_seconds(queries) + 2 * Q * s.solve
        each += chunks * self.rows_seconds(plan) + Q * n * self.width(plan) / s.multiply
        apart = plan.shares_credit or plan.points > 1
        if plan.shares_credit:
            each += plan.kernel_bytes / plan.points / s.read
            each += Q * n * (2 * plan.landmarks or n) / s.multiply
        if plan.shares_credit and n <= WHOLE_ROWS:
            each += KERNEL_TOUCHES * 8 * n**2 / s.read + s.invert * (n / 1000) ** 3
        ids = string_bytes(self.prepared.train.ids) + string_bytes(queries.ids)
        kept = 4 * Q * n + ids + chunks * plan.points * n + 12 * Q + 2 * FILE_BYTES
        at_once = -(-Q // chunks)
        memory = self.solving_memory(plan, at_once) + at_once * width * (plan.store != FEATURES)
        if plan.shares_credit:
            memory += 8 * n * n * (plan.points + 1) if n <= WHOLE_ROWS else self.kernel_held
        return Cost(
            seconds=plan.points * each,
            memory_bytes=s.memory + self.together(memory),
            disk_bytes=kept + (4 * plan.points * Q * n if apart else 0),
            kept_bytes=kept,
            passes=0 if plan.stored else float(chunks * plan.points),
        )


def _evenly(tokens: TokenizedExamples, most: int) -> TokenizedExamples:
    """At most so many of the rows, evenly spaced."""
    return tokens.select(evenly_spaced(len(tokens), most))
