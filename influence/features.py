"""Features: the training rows of a point in few bytes, from which scores come without a pass.

What is kept of a row's gradient, `influence.kept_coordinates` says. Codes, scales and the exact
`|phi|^2` of every row lie in `features.h5`, made by one pass over the rows after the factors are
there, leaf by leaf in the backward: no row's whole gradient is ever formed.

Features answer for the curvature and damping that they were whitened by. Another one is a pass over
the rows for scores, or new features by `influence fit` with that damping.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.batches import collate, padded_tokens, plan_batches
from influence.curvature.base import Damped, Whitening
from influence.errors import StoreError
from influence.geometry import Geometry
from influence.gradients import Tape, tape
from influence.halving import Steps, in_parts
from influence.kept_coordinates import KeptCoordinates
from influence.leaf_gradients import LeafGradients
from influence.measurements import Measurement, output_gradient
from influence.memory import block_bytes, free_memory
from influence.progress import track
from influence.store import RowFile, copy_rows, open_file, open_rows, read, write_file
from influence.tokens import TokenizedExamples

if TYPE_CHECKING:
    from influence.at_point import AtPoint

#: Bytes of decoded features that are read and multiplied at a time.
BLOCK_BYTES = 8 << 20
#: Share of the free memory that the decoded features of queries or landmarks may take.
MEMORY_SHARE = 0.3
#: Bytes that the features of one batch may take before they are coded.
BATCH_BYTES = 256 << 20
#: Seconds of a pass after which its rows are put on the disk, and are not made again after a kill.
VOUCH_SECONDS = 20.0
NAME = "features"


def bytes_of_row(parameters: int, leaves: int, row_bytes: int) -> int:
    """Bytes of a row at one point, at most: codes, scales, the square, and whether it is there.

    They are exact where all coordinates are kept, in four bits or two.
    """
    whole = [size for size in (-(-parameters // 2), -(-parameters // 4)) if size <= row_bytes]
    codes = whole[0] if whole else max(row_bytes, -(-(leaves + 1) // 4))
    return codes + 4 * leaves + 8 + 1


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Whitened gradients in the coordinates that are kept, made in the backward."""

    operator: Damped
    geometry: Geometry
    kept: KeptCoordinates

    @classmethod
    def chosen(cls, point: AtPoint, operator: Damped, row_bytes: int) -> FeatureMap:
        """The map of a point whose curvature is there, and bytes of codes a row."""
        curvature = operator.curvature
        assert isinstance(curvature, Whitening)
        leaves = range(len(point.model.space.leaves))
        expected = [curvature.expected_squares(leaf, operator.lam) for leaf in leaves]
        seed = point.run.manifest.seed
        kept = KeptCoordinates.chosen(expected, row_bytes, seed, point.model.device)
        return cls(operator, point.geometry, kept)

    @property
    def most_rows(self) -> int:
        """Rows of a batch, so that what is kept of them takes at most `BATCH_BYTES`."""
        return max(1, block_bytes(BATCH_BYTES) // (8 * self.kept.size))

    def of_batch(
        self,
        recorder: Tape,
        rows: np.ndarray,
        tokens: TokenizedExamples,
        measured: Measurement | None,
    ) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Rows `[b]`, their features `[b, K]` and the squares `[b]` float64 of all coordinates, of a
        batch, or of its parts where memory is too small for it.

        Of the gradients of m(q), or of the summed losses l_i.
        """

        def run(rows: np.ndarray, _: Steps) -> tuple[Tensor, Tensor]:
            return self._of_rows(recorder, rows, tokens, measured)

        for part, found in in_parts(recorder.model, tokens, rows, run):
            yield part, *found

    def _of_rows(
        self,
        recorder: Tape,
        rows: np.ndarray,
        tokens: TokenizedExamples,
        measured: Measurement | None,
    ) -> tuple[Tensor, Tensor]:
        """Features and squares of rows that run at once."""
        model = recorder.model
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        part = recorder.forward(batch)
        _, gradient = output_gradient(part, measured)
        values = torch.zeros(len(rows), self.kept.size, dtype=model.dtype, device=model.device)
        squares = torch.zeros(len(rows), dtype=torch.float64, device=model.device)

        def take(leaf: int, gradients: Tensor) -> None:
            self.take(leaf, self.geometry.of_leaf(leaf, gradients), values, squares)

        sink = LeafGradients(recorder, take)
        recorder.backward(part.logits, gradient, sink)
        sink.finish()
        return values, squares

    def take(self, leaf: int, gradients: Tensor, values: Tensor, squares: Tensor) -> None:
        """Put what is kept of a leaf's gradients `[b, d_out, d_in]`, in the geometry's coordinates,
        into `values` [b, K], and add up their `squares` [b] once whitened.
        """
        curvature = self.operator.curvature
        assert isinstance(curvature, Whitening)
        whitened = curvature.whiten(leaf, gradients, self.operator.lam)
        squares.add_(whitened.square().sum(1, dtype=torch.float64))
        values[:, self.kept.slices[leaf]] = self.kept.leaves[leaf].of(whitened)


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The features of a point's training rows, as they lie in a file, and their map."""

    point: AtPoint
    path: Path
    map: FeatureMap

    @classmethod
    def open(cls, point: AtPoint, operator: Damped) -> StoredFeatures | None:
        """Those of an operator; None where the file is of another one, or there is none.

        Raises `StoreError` where rows are missing.
        """
        path = point.file(NAME)
        if point.number is None or not path.exists():
            return None
        with open_file(path, run_digest=point.digest) as file:
            if file.attrs.get("setting") != operator.label:
                return None
        if not open_rows(path, "done").all():
            raise StoreError(f"{path} lacks some rows: run the same influence fit again")
        kept = _kept_in(path, point)
        return cls(point, path, FeatureMap(operator, point.geometry, kept))

    @property
    def kept(self) -> KeptCoordinates:
        """Which coordinates these are."""
        return self.map.kept

    @property
    def dtype(self) -> torch.dtype:
        """What rows are decoded to: on a GPU products of numbers of few bits need no more than 16."""
        model = self.point.model
        return model.dtype if model.device.type == "cpu" else torch.bfloat16

    @cached_property
    def squares(self) -> np.ndarray:
        """`grad l_i^T (C + lambda I)^-1 grad l_i` of every row, exactly, `[n]` float64."""
        return np.array(open_rows(self.path, "squares"))

    @property
    def rows_at_once(self) -> int:
        """Rows whose features may be held at a time, by the free memory."""
        free = float(distributed.first(np.array([free_memory(self.point.model.device)]))[0])
        return max(1, int(MEMORY_SHARE * free / (self.kept.size * self.dtype.itemsize)))

    @property
    def none(self) -> Tensor:
        """Features of no row, `[0, K]`."""
        return torch.empty(0, self.kept.size, dtype=self.dtype, device=self.point.model.device)

    def blocks(
        self, skip: np.ndarray | None = None, label: str | None = None, *, shared: bool = False
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """`(indices [b], features [b, K])` of all rows in order, or of this process's share.

        A block of which `skip` [n] marks all rows is passed over.
        """
        n = len(self.point.run.tokens)
        first, end = distributed.span(n) if shared else (0, n)
        step = max(1, block_bytes(BLOCK_BYTES) // (4 * self.kept.size))
        starts = range(first, end, step)
        counts = [min(step, end - start) for start in starts]
        with RowFile(self.path, "codes") as codes, RowFile(self.path, "scales") as scales:
            for start in starts if label is None else track(starts, label, counts=counts):
                stop = min(start + step, end)
                if skip is None or not skip[start:stop].all():
                    read = codes.read(start, stop), scales.read(start, stop)
                    yield np.arange(start, stop), self.kept.unpacked(*read, self.dtype)

    def of_rows(self, rows: np.ndarray) -> Tensor:
        """Features `[k, K]` of some training rows, in their order."""
        with RowFile(self.path, "codes") as file:
            codes = file.rows(rows)
        with RowFile(self.path, "scales") as file:
            scales = file.rows(rows)
        return self.kept.unpacked(codes, scales, self.dtype)

    def of_measurement(self, tokens: TokenizedExamples, measurement: Measurement) -> Tensor:
        """Features `[Q, K]` of the gradients of m(q), in query order."""
        point = self.point
        out = torch.empty(len(tokens), self.kept.size, dtype=self.dtype, device=point.model.device)
        with point.model.at(point.place.theta), tape(point.model) as recorder:
            budget, most = point.run.token_budget, self.map.most_rows
            for batch in plan_batches(tokens, budget, max_rows=most):
                for rows, values, _ in self.map.of_batch(recorder, batch, tokens, measurement):
                    out[torch.from_numpy(rows)] = values.to(out)
        return out

    def products(self, left: Tensor, *, shared: bool = False) -> np.ndarray:
        """`left` [K', K] with every row, `[K', n]` float64.

        `shared`: all processes give the same `left`, and each reads its share of the rows.
        """
        found = np.zeros((len(left), len(self.point.run.tokens)))
        for indices, rows in self.blocks(shared=shared):
            found[:, indices] = (left @ rows.T).double().cpu().numpy()
        return distributed.add_up(torch.from_numpy(found)).numpy() if shared else found


def write_features(point: AtPoint, rows: np.ndarray | None = None) -> None:
    """Make the features of a point whose factors are there, or what a killed call left of them.

    Features of another damping are replaced. The model is at the point. `rows`: those that are
    made; the others are in the file.
    """
    run, path, operator = point.run, point.file(NAME), point.operator()

    def begin() -> np.ndarray:
        """Lay the file out, and tell which rows are in it."""
        if path.exists():
            with open_file(path, run_digest=point.digest) as file:
                same = file.attrs.get("setting") == operator.label
            if not same:
                path.unlink()
        if not path.exists():
            chosen = FeatureMap.chosen(point, operator, run.manifest.row_bytes)
            _lay_out(point, chosen.kept, operator)
        return np.array(open_rows(path, "done")).astype(bool)

    done = distributed.at_first(begin)
    if done.all():
        return
    made = FeatureMap(operator, point.geometry, _kept_in(path, point))
    rows = np.arange(len(run.tokens)) if rows is None else rows
    parts = plan_batches(run.tokens.select(rows), run.token_budget, max_rows=made.most_rows)
    plan = [rows[part] for part in parts]
    left = [rows for rows in plan if not done[rows].all()]
    there = [rows for rows in plan if done[rows].all()]
    left = distributed.share(left, padded_tokens(run.tokens, left))
    order = there[: len(there) // distributed.world()] + left
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(RowFile(path, name, write=True))
            for name in ("codes", "scales", "squares", "done")
        }
        recorder = stack.enter_context(tape(point.model))
        vouched = stack.enter_context(_Vouched(files))
        for batch in track(
            left,
            "training rows to features",
            done=len(order) - len(left),
            counts=[len(rows) for rows in order],
            sizes=padded_tokens(run.tokens, order),
        ):
            for rows, values, squares in made.of_batch(recorder, batch, run.tokens, None):
                codes, scales = made.kept.packed(values, squares)
                vouched.write(rows, codes=codes, scales=scales, squares=squares.cpu().numpy())
    distributed.wait()  # the rows of all processes are in the file


def copy_features(before: AtPoint, point: AtPoint, rows: np.ndarray, places: np.ndarray) -> None:
    """Put the features of another run's `rows` [k] at these `places` [k] of a point's, whose
    damped curvature is the same.

    Done once: a file that is there has them.
    """
    operator = point.operator()
    stored = StoredFeatures.open(before, before.operator())
    if stored is None or operator.label != before.operator().label:
        raise StoreError(
            f"{before.file(NAME)} is of another curvature or damping: fit from scratch"
        )
    path = point.file(NAME)
    if path.exists():
        with open_file(path, run_digest=point.digest):
            pass
        if open_rows(path, "done")[places].all():
            return
    else:
        _lay_out(point, stored.kept, operator)
    for name in ("codes", "scales", "squares", "done"):  # done last, which vouches for the others
        copy_rows(stored.path, path, name, rows, places)


class _Vouched:
    """Rows written to a feature file, of which `done` is told only once they are on the disk.

    Else a machine that loses its power could leave a row that is told done and was never written.
    """

    def __init__(self, files: Mapping[str, RowFile]) -> None:
        self.files = files
        self.waiting: list[np.ndarray] = []
        self.last = time.monotonic()

    def __enter__(self) -> _Vouched:
        return self

    def __exit__(self, *_: object) -> None:
        """Vouch for what was written, also where the pass ends in an error."""
        self.vouch()

    def write(self, rows: np.ndarray, **values: np.ndarray) -> None:
        """Write a batch's `values` [b, ...] by the names of their datasets."""
        for name, each in values.items():
            self.files[name].write(rows, each)
        self.waiting.append(rows)
        if time.monotonic() - self.last > VOUCH_SECONDS:
            self.vouch()

    def vouch(self) -> None:
        """Wait until the rows are on the disk, then tell that they are done, and wait for that."""
        for name, file in self.files.items():
            if name != "done":
                file.flush()
        for rows in self.waiting:
            self.files["done"].write(rows, np.ones(len(rows), np.uint8))
        self.files["done"].flush()
        self.waiting, self.last = [], time.monotonic()


def _lay_out(point: AtPoint, kept: KeptCoordinates, operator: Damped) -> None:
    """Create the file at full size."""
    n, leaves = len(point.run.tokens), len(kept.widths)
    write_file(
        point.file(NAME),
        {
            "widths": np.array(kept.widths, np.int64),
            "whole": np.packbits(kept.is_whole),
            "buckets": kept.buckets,
        },
        attrs={
            "run_digest": point.digest,
            "param_space": point.model.space.digest,
            "setting": operator.label,
            "seed": kept.seed,
            "bits": kept.bits,
            "about": "grad l_i whitened by (C + lambda I)^-1/2: few bits a kept coordinate, a "
            "scale for each leaf, and the exact square",
        },
        rows={
            "codes": ((n, kept.code_bytes), np.uint8),
            "scales": ((n, leaves), np.float32),
            "squares": ((n,), np.float64),
            "done": ((n,), np.uint8),
        },
        strings={"train_ids": point.run.train.ids},
    )


def _kept_in(path: Path, point: AtPoint) -> KeptCoordinates:
    """The coordinates that a file keeps."""
    with open_file(path, run_digest=point.digest) as file:
        widths = tuple(read(file, "widths").tolist())
        is_whole = np.unpackbits(read(file, "whole"), count=sum(widths)).astype(bool)
        bits, seed = (int(np.asarray(file.attrs[name])) for name in ("bits", "seed"))
        buckets = read(file, "buckets")
    return KeptCoordinates(widths, is_whole, buckets, bits, seed, point.model.device)
