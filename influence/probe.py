"""How fast this machine fits this adapter, measured on a few of the rows.

The probe begins a fit of one point in a temporary directory beside the run's: a few batches of the
real plan, short, middle and long, run through the very code of the pass (`influence.fitted_point`).
What follows the pass is run too where it is quick, and else told from the time of one piece: an
eigendecomposition of order d takes d^3, a product its multiplications.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import scipy.optimize as so
import torch
from torch import Tensor

from influence.adapter import AdaptedModel, Leaf
from influence.at_point import BLOCK_BYTES, BLOCK_ROWS, AtPoint, evenly_spaced
from influence.batches import collate
from influence.curvature.base import Accumulator, AfterPass, Damped, Invertible, Whitening
from influence.features import FeatureMap
from influence.fit_plan import FULL, NONE, FitPlan
from influence.fitted_point import PointFit, RowFiles, Storage
from influence.gradients import Tape, batch_uniforms, tape
from influence.kept_coordinates import KeptCoordinates
from influence.kernel import WholeKernel
from influence.leaf_gradients import LeafGradients
from influence.loss import mean_losses, sampled_loss_gradient
from influence.prepared import Prepared
from influence.run import Run
from influence.store import RowFile
from influence.tokens import TokenizedExamples

#: What times are read from; a benchmark on a shared machine reads the processor's time instead.
CLOCK: Callable[[], float] = time.perf_counter
#: Seconds after which no further batch of the pass is tried, and batches that are tried anyway.
PASS_SECONDS, LEAST_BATCHES = 2.0, 2
#: Seconds that what follows the pass may take to be tried whole.
FINISH_SECONDS = 3.0
#: Largest order of a matrix that is decomposed, or inverted, to learn the time of larger ones.
TRIED_ORDER = 512
#: Bytes of the file by which the disk is timed.
FILE_BYTES = 32 << 20


# ---- clocks and memory ---------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds, once a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCK()


def seconds_of(work: Callable[[], object], device: torch.device, *, most: float = 0.2) -> float:
    """Seconds of `work`: the shortest of some calls, at most 5, that take `most` seconds."""
    taken: list[float] = []
    while not taken or (len(taken) < 5 and sum(taken) < most):
        start = now(device)
        work()
        taken.append(now(device) - start)
    return min(taken)


class Memory:
    """The most memory since `reset`: of the GPU where the model is, else of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes that are held."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Forget the most so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # the most so far is then that since the process began

    def most(self) -> int:
        """The most bytes that were held since `reset`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return self.now()
        found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(found[0]) * 1024 if found else self.now()


# ---- batches -------------------------------------------------------------------------------------


def features(tokens: TokenizedExamples, batches: Sequence[np.ndarray]) -> np.ndarray:
    """What the time of a batch is linear in, `[batches, 4]`: 1, its padded tokens, its supervised
    tokens (the LM head's), and rows times the square of the longest (attention's).
    """
    longest = np.array([int(tokens.lengths[rows].max()) for rows in batches])
    count = np.array([len(rows) for rows in batches])
    seen = np.array([int(tokens.counts[rows].sum()) for rows in batches])
    return np.stack([np.ones(len(count)), count * longest, seen, count * longest**2], 1)


@dataclass(frozen=True)
class BatchTime:
    """Seconds of a batch of the first pass, linear in `features`: `each` [4], none negative."""

    each: np.ndarray

    @classmethod
    def of(cls, inputs: np.ndarray, seconds: Sequence[float] | np.ndarray) -> BatchTime:
        """The best in relative error, by non-negative least squares, of measured batches."""
        taken = np.maximum(np.array(seconds), 1e-9)
        scale = np.maximum(inputs.max(0), 1e-9)
        each, _ = so.nnls(inputs / scale / taken[:, None], np.ones(len(taken)))
        return cls(each / scale)

    def seconds(self, tokens: TokenizedExamples, batches: Sequence[np.ndarray]) -> float:
        """Seconds of all batches together."""
        return float((features(tokens, batches) @ self.each).sum()) if len(batches) else 0.0


def tried(count: int) -> list[int]:
    """Numbers of the batches that are tried of so many, in order: the largest and the one of the shortest rows
    first, then those between; the largest once more, because the first of all is slower.
    """
    last = count - 1
    places = [0, last, 0, last // 2, last // 4, 3 * last // 4, last // 8, 7 * last // 8]
    return places[:3] + [p for p in dict.fromkeys(places[3:]) if p not in (0, last)]


class ProbeFit(PointFit):
    """A fit that times its batches, and stops after `PASS_SECONDS`."""

    records: list[tuple[np.ndarray, float]]

    def run_batch(
        self,
        recorder: Tape,
        rows: np.ndarray,
        files: RowFiles | None = None,
        draws: int | None = None,
    ) -> None:
        """Time a batch."""
        spent = sum(seconds for _, seconds in self.records)
        if spent > PASS_SECONDS and len(self.records) >= LEAST_BATCHES:
            return
        start = now(self.model.device)
        super().run_batch(recorder, rows, files, draws)
        self.records.append((rows, now(self.model.device) - start))


@dataclass
class OneBlock:
    """A block of rows that the second look takes, several times, and how long it takes for it."""

    block: Tensor
    leaves: Sequence[Leaf]
    seconds: float = 0.0
    total: float = 0.0
    times: int = 3

    @property
    def count(self) -> int:
        """The rows that are shown."""
        return len(self.block) * self.times

    @property
    def weights(self) -> Tensor:
        """A weight for each row."""
        options = {"dtype": torch.float64, "device": self.block.device}
        return torch.full((self.count,), 1.0 / self.count, **options)

    def __iter__(self) -> Iterator[Tensor]:
        """The block, timed."""
        taken = []
        for _ in range(self.times):
            start = now(self.block.device)
            yield self.block
            taken.append(now(self.block.device) - start)
        self.seconds, self.total = min(taken), sum(taken)

    def show_leaves(self, second: Accumulator) -> None:
        """Show the block leaf by leaf, timed."""
        weights = self.weights[: len(self.block)]
        for block in self:
            for number, leaf in enumerate(self.leaves):
                second.add_leaf(number, block[:, leaf.slice].unflatten(1, leaf.shape), weights)


# ---- what was measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratios:
    """Times of batches of other passes, relative to the first pass's.

    Attributes
    ----------
    drawn : float
        At sampled labels alone, without gradients at the data's labels.
    stores : float
        At the data's labels alone, the gradients written; 0 where they are not stored.
    again : float
        Of a second look's pass, leaf by leaf; 0 where there is none.
    leaves : float
        With one backward, leaf by leaf.
    gradients, forward : float
        With one backward that forms whole gradients, and without a backward.
    """

    drawn: float
    stores: float
    again: float
    leaves: float
    gradients: float
    forward: float


@dataclass(frozen=True)
class FewBytes:
    """Rows in few bytes: seconds of whitening and packing a row, of decoding one, and the numbers
    that are kept of it; all 0 of a curvature that does not whiten.
    """

    keep: float = 0.0
    decode: float = 0.0
    coordinates: int = 0


@dataclass(frozen=True)
class Speeds:
    """What a machine takes for the parts of a fit and of scores, in seconds and bytes.

    Attributes
    ----------
    batch : BatchTime
        A batch of the first pass.
    ratios : Ratios
        Batches of other passes.
    features : FewBytes
        Rows in few bytes.
    begin, finish : float
        Of each point, before the pass, and after it beside the rows of the second look.
    row : float
        Of each row and label draw at the second look.
    load, solve : float
        Of a fitted point that is opened, and of each vector that its inverse is applied to.
    multiply : float
        Multiplications a second of a matrix product in the model's type.
    invert : float
        Seconds of inverting a matrix of order 1,000 in float64.
    read, write : float
        Bytes a second, of a file that is in memory and of one that must reach the disk.
    memory, pass_memory : int
        Bytes held before the fit, and what its first pass takes beside them.
    sums_bytes : int
        Size of the running sums, which a checkpoint of the pass takes.
    after : AfterPass
        What follows the pass.
    """

    batch: BatchTime
    ratios: Ratios
    features: FewBytes
    begin: float
    finish: float
    row: float
    load: float
    solve: float
    multiply: float
    invert: float
    read: float
    write: float
    memory: int
    pass_memory: int
    sums_bytes: int
    after: AfterPass


def measure(prepared: Prepared, plan: FitPlan, folder: Path) -> Speeds:
    """Measure a fit's speeds on a few of its rows, at the first of its points.

    Parameters
    ----------
    prepared, plan
        The fit (`influence.fitting.prepare`), and what it is going to do.
    folder
        An empty directory on the run's disk, for files of the probe.
    """
    model, place = prepared.model, prepared.places[0]
    memory = Memory(model.device)
    held = memory.now()
    read, write = disk_speeds(folder / "disk")
    with model.at(place.theta):
        memory.reset()
        fit, begin = _begun(prepared, plan, folder)
        fit.records = []
        fit.lay_out()
        fit.main_pass(np.zeros(len(fit.batches), dtype=bool))
        grown = max(0, memory.most() - held)
        records = fit.records[1:] if len(fit.records) > LEAST_BATCHES else fit.records
        inputs = features(fit.tokens, [rows for rows, _ in records])
        batch = BatchTime.of(inputs, _seconds(records))
        ratios, block = _other_passes(fit, plan, records)
        sums = sum(tensor.nbytes for tensor in fit.accumulator.sums().values())
        after = fit.accumulator.after_pass(plan.rows * max(1, plan.draws))
        multiply = product_speed(model, double=after.double)
        finish, row, load, solve, operator = _after_pass(fit, after, block, multiply, write)
        kept = _few_bytes(fit, plan, block, operator, solve)
    return Speeds(
        batch=batch,
        ratios=ratios,
        features=kept,
        begin=begin,
        finish=finish,
        row=row,
        load=load,
        solve=solve,
        multiply=product_speed(model) if after.double else multiply,
        invert=invert_seconds(model),
        read=read,
        write=write,
        memory=held,
        pass_memory=grown,
        sums_bytes=sums,
        after=after,
    )


def _seconds(records: Sequence[tuple[np.ndarray, float]]) -> list[float]:
    return [seconds for _, seconds in records]


def _begun(prepared: Prepared, plan: FitPlan, folder: Path) -> tuple[ProbeFit, float]:
    """A fit of the tried batches' rows alone, and the seconds of its beginning."""
    model = prepared.model
    storage = Storage(plan.store == FULL, FULL if plan.sampled else NONE, 0)

    def made(rows: np.ndarray) -> ProbeFit:
        run = Run(
            folder,
            prepared.manifest,
            model,
            prepared.train.select(rows),
            prepared.tokens.select(rows),
            prepared.curvature,
        )
        point = AtPoint(run, 0, prepared.places[0])
        return ProbeFit(point, prepared.curvature, storage, prepared.state)

    sample = drawn_rows(prepared, plan)
    parts = plan.batches(model, prepared.tokens.select(sample), prepared.manifest.token_budget)
    batches = [sample[part] for part in parts]
    chosen = [batches[number] for number in tried(len(batches))]
    halves = [rows[: len(rows) // 2] for rows in chosen[:2] if len(rows) > 1]
    rows, places = np.unique(np.concatenate(chosen), return_inverse=True)
    start = now(model.device)
    fit = made(rows)
    seconds = now(model.device) - start
    ends = np.cumsum([len(each) for each in chosen])[:-1]
    fit.batches = np.split(places, ends)
    fit.batches += [np.searchsorted(rows, half) for half in halves]
    fit.sampled_batches = len(fit.batches) if fit.draws else 0
    # labels are drawn of all rows that are tried, apart from the data's as in the fit
    fit.sample, fit.sample_weights = np.arange(len(rows)), fit.weights
    fit.apart = plan.apart and fit.draws > 0
    if fit.buffer is not None:
        most = max(len(each) for each in fit.batches)
        shape = (most, model.space.size)
        fit.buffer = torch.empty(shape, dtype=model.dtype, device=model.device)
    return fit, seconds


def drawn_rows(prepared: Prepared, plan: FitPlan) -> np.ndarray:
    """Rows that labels are drawn of: those that the curvature is formed of, or as many of a plan
    that forms it of others. All rows of a curvature without label draws.
    """
    rows = prepared.curvature.sample(plan.rows, prepared.manifest.seed)
    if not plan.draws:
        return np.arange(plan.rows)
    return rows if len(rows) == plan.sample else evenly_spaced(plan.rows, plan.sample)


def _other_passes(
    fit: ProbeFit, plan: FitPlan, records: Sequence[tuple[np.ndarray, float]]
) -> tuple[Ratios, Tensor]:
    """Times of other passes relative to the first one's, and features of some rows, `[b, P]`."""
    model, device = fit.model, fit.model.device
    rows, seconds = records[-1] if len(records) < 4 else records[2]
    several = {"most": min(0.5, PASS_SECONDS / 4)}
    with tape(model) as recorder:
        batch = collate(fit.tokens, rows, pad_id=model.pad_id, device=device)
        gradients = recorder.run(batch, None)[0]
        one = seconds_of(lambda: recorder.run(batch, None), device, **several)
        work = lambda: _leaf_by_leaf(fit, recorder, rows, 1)  # noqa: E731
        leaves = seconds_of(work, device, **several)
        again = 0.0 if not plan.looks_again else leaves
        if plan.looks_again and plan.draws > 1:
            work = lambda: _leaf_by_leaf(fit, recorder, rows, plan.draws)  # noqa: E731
            again = seconds_of(work, device, **several)
        drawn, stores = seconds, 0.0
        if plan.store == FULL:
            stores, drawn = _either_labels(fit, plan, recorder, rows, several)
    alone, budget = fit.tokens.select(rows), fit.run.manifest.token_budget
    forward = seconds_of(lambda: mean_losses(model, alone, token_budget=budget), device, **several)
    size = max(BLOCK_ROWS, BLOCK_BYTES // (gradients.shape[1] * gradients.element_size()))
    size = min(size, plan.rows)
    block = gradients.repeat(-(-size // len(gradients)), 1)[:size]
    ratios = Ratios(*(each / seconds for each in (drawn, stores, again, leaves, one, forward)))
    return ratios, fit.point.geometry.features(block)


def _leaf_by_leaf(fit: ProbeFit, recorder: Tape, rows: np.ndarray, draws: int) -> None:
    """One batch at sampled labels, of which every leaf's gradients are formed and dropped."""
    model, geometry = fit.model, fit.point.geometry

    def formed(leaf: int, gradients: Tensor) -> None:
        geometry.of_leaf(leaf, gradients)

    batch = collate(fit.tokens, rows, pad_id=model.pad_id, device=model.device)
    part = recorder.forward(batch)
    for draw in range(draws):
        uniforms = batch_uniforms(fit.tokens, rows, fit.run.manifest.seed, draw)
        sink = LeafGradients(recorder, formed)
        gradient = sampled_loss_gradient(part.logits, uniforms)
        recorder.backward(part.logits, gradient, sink, last=draw == draws - 1)
        sink.finish()


def _either_labels(
    fit: ProbeFit, plan: FitPlan, recorder: Tape, rows: np.ndarray, several: dict[str, float]
) -> tuple[float, float]:
    """Seconds of a batch whose gradients at the data's labels are written, and of one at sampled
    labels: the two parts of a first pass that stores gradients.
    """
    device, path, drawn = fit.model.device, fit.point.file("gradients"), 0.0
    run = PointFit.run_batch
    with (
        RowFile(path, "gradients", write=True) as gradients,
        RowFile(path, "done", write=True) as d,
    ):
        files = RowFiles(gradients, d)
        stores = seconds_of(lambda: run(fit, recorder, rows, files, 0), device, **several)
    if plan.draws:
        files = RowFiles()
        drawn = seconds_of(lambda: run(fit, recorder, rows, files, plan.draws), device, **several)
    return stores, drawn


def _after_pass(
    fit: ProbeFit, after: AfterPass, block: Tensor, multiply: float, write: float
) -> tuple[float, float, float, float, Damped | None]:
    """Seconds of finishing a point, of a row of its second look, of opening it, and of a vector
    that it is solved for; and the point's operator, where it was quick to make.
    """
    device = fit.model.device
    decompositions = _decompositions(after, device)
    alike = fit.accumulator.after_pass(1) == fit.accumulator.after_pass(2)
    if not alike or decompositions > FINISH_SECONDS:
        finish = decompositions + after.kept_bytes / write
        row, solve = after.row_products / multiply, after.solve_products / multiply
        return finish, row, after.kept_bytes / write, solve, None
    rows = OneBlock(block, fit.model.space.leaves)
    fit.sampled_rows = lambda **_: rows  # pyright: ignore[reportAttributeAccessIssue]
    start = now(device)
    fit.finish()
    finish = now(device) - start - rows.total
    start = now(device)
    operator = fit.point.operator()
    load, solve, curvature = now(device) - start, 0.0, operator.curvature
    if after.solve_products and isinstance(curvature, Invertible):
        work = lambda: curvature.solve(block, operator.lam)  # noqa: E731
        solve = seconds_of(work, device) / len(block)
    return finish, rows.seconds / len(block), load, solve, operator


def _few_bytes(
    fit: ProbeFit, plan: FitPlan, block: Tensor, operator: Damped | None, solve: float
) -> FewBytes:
    """Times of rows in few bytes, of some features `block` [b, P].

    Without an `operator` whitening is told as half of what a vector's solution takes.
    """
    if not plan.whitens:
        return FewBytes()
    model, leaves = fit.model, fit.model.space.leaves
    # as many rows at a time as a batch has
    some = block[: max(1, max(len(rows) for rows, _ in fit.records))]
    squares = torch.zeros(len(some), dtype=torch.float64, device=model.device)
    whitening = 0.0
    if operator is not None and isinstance(operator.curvature, Whitening):
        made = FeatureMap.chosen(fit.point, operator, plan.row_bytes)
        kept = made.kept
    else:
        alike = [torch.ones(leaf.stop - leaf.start) for leaf in leaves]
        seed = fit.run.manifest.seed
        made, kept = None, KeptCoordinates.chosen(alike, plan.row_bytes, seed, model.device)
        whitening = solve / 2
    values = torch.zeros(len(some), kept.size, dtype=model.dtype, device=model.device)
    places = kept.slices  # made once for all batches: not timed

    def work() -> tuple[np.ndarray, np.ndarray]:
        for number, leaf in enumerate(leaves):
            part = some[:, leaf.slice]
            if made is None:
                values[:, places[number]] = kept.leaves[number].of(part)
                squares.add_(part.square().sum(1, dtype=torch.float64))
            else:
                made.take(number, part.unflatten(1, leaf.shape), values, squares)
        return kept.packed(values, squares)

    keep = whitening + seconds_of(work, model.device) / len(some)
    codes, scales = (np.tile(each, (-(-len(block) // len(some)), 1)) for each in work())
    dtype = torch.float32 if model.device.type == "cpu" else torch.bfloat16
    decode = seconds_of(lambda: kept.unpacked(codes, scales, dtype), model.device)
    return FewBytes(keep, decode / len(codes), kept.size)


def _decompositions(after: AfterPass, device: torch.device) -> float:
    """Seconds of all eigendecompositions of a point."""
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    threads = torch.get_num_threads()
    total = 0.0
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)  # as they are decomposed: side by side, each on one thread
        for order, count in Counter(after.decomposed).items():
            small = min(order, TRIED_ORDER)
            root = torch.randn(small, small, dtype=torch.float64, device=device)
            matrix = root @ root.T
            one = seconds_of(lambda matrix=matrix: torch.linalg.eigh(matrix), device, most=0.05)
            total += count * one * (order / small) ** 3
    finally:
        torch.set_num_threads(threads)
    return total / min(workers, max(1, len(after.decomposed)))


# ---- the machine ---------------------------------------------------------------------------------


def product_speed(model: AdaptedModel, *, double: bool = False) -> float:
    """Multiplications a second of a matrix product on the model's device."""
    dtype = torch.float64 if double else model.dtype
    left, right = 512, min(model.space.size, 1 << 15)
    a, b = (torch.ones(left, right, dtype=dtype, device=model.device) for _ in range(2))
    seconds = seconds_of(lambda: a @ b.T, model.device)
    return left * left * right / max(seconds, 1e-9)


def invert_seconds(model: AdaptedModel) -> float:
    """Seconds of inverting a matrix of order 1,000 as `influence.kernel` does.

    On a GPU a thousandth of one of order 10,000: its products.
    """
    if model.device.type == "cuda":
        return 1e9 / 3 / product_speed(model, double=True)
    root = np.random.default_rng(0).standard_normal((TRIED_ORDER, TRIED_ORDER))
    matrix = root @ root.T
    seconds = seconds_of(lambda: WholeKernel(matrix.copy()).inverse(1.0), torch.device("cpu"))
    return seconds * (1000 / TRIED_ORDER) ** 3


def disk_speeds(path: Path) -> tuple[float, float]:
    """Bytes a second, read and written, of a file that is then deleted."""
    data = np.zeros(FILE_BYTES, np.uint8)
    cpu = torch.device("cpu")

    def write() -> None:
        with open(path, "wb") as file:
            file.write(data.data)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            file.readinto(data.data)

    try:
        write_seconds = seconds_of(write, cpu, most=0.0)
        read_seconds = seconds_of(read, cpu)
    finally:
        path.unlink(missing_ok=True)
    return FILE_BYTES / max(read_seconds, 1e-9), FILE_BYTES / max(write_seconds, 1e-9)
