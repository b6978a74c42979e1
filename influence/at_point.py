"""A run at one point of its path: curvature, training gradients and query gradients there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import padded_tokens, plan_batches
from influence.curvature import (
    PLAIN,
    SPECIFICATIONS,
    Curvature,
    Damped,
    Invertible,
)
from influence.curvature.base import Whitening
from influence.curvature.several import all_inverse_products
from influence.damping import Damping
from influence.errors import InputError, StoreError
from influence.features import StoredFeatures
from influence.geometry import Adam, Geometry, Raw, function_space, load_geometry
from influence.gradients import max_rows, stream_gradients
from influence.measurements import Measurement
from influence.memory import block_bytes, free_memory
from influence.path import Point
from influence.progress import track
from influence.sharding import refuse_curvature
from influence.store import (
    RowFile,
    open_file,
    open_rows,
    read,
    read_group,
    read_mapped,
)
from influence.tokens import TokenizedExamples

if TYPE_CHECKING:
    from influence.run import Run

#: Bytes of gradients read and multiplied at a time, and the fewest rows.
BLOCK_BYTES = 32 << 20
BLOCK_ROWS = 8
#: The most bytes of one leaf of all rows that are looked at together.
LEAF_BYTES = 1 << 30
#: Bytes of gradients that are solved for at a time where only a few numbers of each are wanted.
PART_BYTES = 256 << 20
#: Share of the free memory that the gradients of one chunk of queries, with all that solving holds
#: beside them, may take.
QUERY_SHARE = 0.8
#: A point's scale is the mean self-influence of at most so many training rows, evenly spaced.
SCALE_ROWS = 512
#: Training rows whose gradients estimate Adam's second moments where no optimiser state is given.
RMS_ROWS = 256


class AtPoint:
    """A run at one point of its path: curvature, training gradients and query gradients there.

    Vectors are in the coordinates of the run's geometry. `number` is None for the adapter itself
    where the run has no factors there.
    """

    def __init__(self, run: Run, number: int | None, place: Point) -> None:
        self.run, self.number, self.place = run, number, place
        self._cache: dict[str, Curvature] = {}
        self._scales: dict[tuple[str, bytes], float] = {}
        self._features: dict[str, StoredFeatures] = {}

    @property
    def model(self) -> AdaptedModel:
        """The adapter.

        `model.at(place.theta)` puts it at this point.
        """
        return self.run.model

    @property
    def digest(self) -> str:
        """What every file of this point carries."""
        return point_digest(self.run.digest, self.number or 0)

    def file(self, name: str) -> Path:
        """The `factors`, `gradients` or `rows` file of this point."""
        return run_file(self.run.directory, name, self.number or 0)

    @cached_property
    def geometry(self) -> Geometry:
        """The coordinates in which gradients are compared and curvature is formed."""
        name = self.run.manifest.geometry
        if self.number is None and not (name == "adam" and self.run.manifest.optimizer):
            with self.model.at(self.place.theta):
                return geometry_here(self.run, name)
        with open_file(self.file("factors"), run_digest=self.digest) as file:
            arrays = read_group(file, "geometry")
        state = {
            key: torch.from_numpy(array).to(self.model.device) for key, array in arrays.items()
        }
        return load_geometry(name, self.model.space, state)

    def curvature(self, name: str | None = None) -> Curvature:
        """The fitted curvature, or another one that its factors hold.

        Every run has `identity`; what else it has, `Specification.held` of its curvature says (an
        `ekfac` run also `kfac`, `ggn` and `hessian`). Anything else is an `InputError`.
        """
        name = name or self.run.fitted_name
        if name not in self._cache:
            self._cache[name] = self._load_curvature(name)
        return self._cache[name]

    def _load_curvature(self, name: str) -> Curvature:
        if name == PLAIN:
            return SPECIFICATIONS[PLAIN]().load({}, self)
        specification = self.run.specification
        with open_file(self.file("factors"), run_digest=self.digest) as file:
            held = specification.held(StoredTensors(file, self.model.device), self)
            if name in held:
                return held[name]()
        raise InputError(
            f"curvature {name!r} was asked of a run fitted with {specification.name!r}, which does "
            f"not hold it: fit another run with --curvature {name}"
        )

    @property
    def held(self) -> list[str]:
        """Names of the curvatures that can be asked for at this point."""
        with open_file(self.file("factors"), run_digest=self.digest) as file:
            names = self.run.specification.held(StoredTensors(file, self.model.device), self)
        return [*names, *([PLAIN] if PLAIN not in names else [])]

    def operator(
        self, curvature: str | None = None, damping: str | Damping | None = None
    ) -> Damped:
        """`C + lambda I` for a curvature of this run and a damping rule (the fit's by default)."""
        if self.model.shards is not None:
            refuse_curvature(curvature or self.run.fitted_name)
        fitted = self.curvature(curvature)
        if fitted.undamped:
            return Damped(fitted, torch.ones(1, dtype=torch.float64))
        rule = Damping.parse(damping or self.run.manifest.damping)
        return Damped(fitted, rule.resolve(fitted))

    @property
    def preconditions(self) -> bool:
        """Whether the run's own curvature can precondition iterations on others."""
        return self.curvature().preconditions

    def preconditioner(self, operator: Damped) -> Damped:
        """The run's own curvature with the operator's lambda, for preconditioned iterations."""
        fitted = self.curvature()
        if not fitted.preconditions:
            raise InputError(
                "preconditioned CG and ASTRA need EK-FAC factors and this run was fitted with "
                f"{fitted.name!r}: fit with --curvature ekfac, or use --solver cg"
            )
        diagonal = operator.diagonal(torch.empty(0, dtype=torch.float64))
        lam = torch.stack([diagonal[block.start] for block in fitted.blocks])
        return Damped(fitted, lam)

    @property
    def gradients_stored(self) -> bool:
        """Whether the training gradients at this point are on disk."""
        return self.number is not None and self.run.gradients_stored

    def features(self, operator: Damped) -> StoredFeatures | None:
        """The rows in few bytes, whitened by this operator; None where the run has none of it."""
        if not self.run.features_stored:
            return None
        if operator.label not in self._features:
            found = StoredFeatures.open(self, operator)
            if found is None:  # they may still be made
                return None
            self._features[operator.label] = found
        return self._features[operator.label]

    def gradient_blocks(
        self,
        skip: np.ndarray | None = None,
        label: str | None = "stored gradients",
        *,
        shared: bool = False,
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """`(indices [b], gradients of l_i [b, P])` of all training rows, read or computed, in a
        fixed order.

        `skip` [n] marks rows that are not needed; a block of which all rows are marked is passed
        over. `shared`: of several processes each gets its share of the rows.
        """
        tokens = self.run.tokens
        skip = np.zeros(len(tokens), dtype=bool) if skip is None else skip
        if self.gradients_stored:
            self._check_gradients()
            start, end = distributed.span(len(tokens)) if shared else (0, len(tokens))
            file, device = self.file("gradients"), self.model.device
            for block in row_blocks(file, "gradients", self.digest, device, label, (start, end)):
                indices = np.arange(start, start + len(block))
                start += len(block)
                if not skip[indices].all():
                    yield indices, self.geometry.features(block)
            return
        plan = self._plan()
        left = [rows for rows in plan if not skip[rows].all()]
        done = [rows for rows in plan if skip[rows].all()]
        if shared:
            done = done[: len(done) // distributed.world()]
            left = distributed.share(left, padded_tokens(tokens, left))
        order = done + left
        with self.model.at(self.place.theta):
            batches = track(
                left,
                "training rows",
                done=len(done),
                counts=[len(rows) for rows in order],
                sizes=padded_tokens(tokens, order),
            )
            for indices, gradients, _ in stream_gradients(self.model, tokens, batches=batches):
                yield indices, self.geometry.features(gradients)

    def by_leaf(self, rows: int) -> bool:
        """Whether one leaf of so many rows takes little memory."""
        largest = max(leaf.stop - leaf.start for leaf in self.model.space.leaves)
        return rows * largest * self.model.dtype.itemsize <= block_bytes(LEAF_BYTES)

    def leaf_blocks(self, leaves: range, name: str = "gradients") -> Iterator[tuple[int, Tensor]]:
        """`(leaf, features [n, d_out, d_in])` of all stored rows, read leaf by leaf: of the data's
        gradients, or of the `rows` at sampled labels.
        """
        if name == "gradients":
            self._check_gradients()
        every, width = self.model.space.leaves, self.model.dtype.itemsize
        with RowFile(self.file(name), name) as file:
            most = block_bytes(BLOCK_BYTES) // (len(file) * width)
            while leaves:
                begin, count = every[leaves[0]].start, 1
                while count < len(leaves) and every[leaves[count]].stop - begin <= most:
                    count += 1
                block = file.block(slice(0, len(file)), slice(begin, every[leaves[count - 1]].stop))
                for number in leaves[:count]:
                    leaf = every[number]
                    part = torch.from_numpy(block[:, leaf.start - begin : leaf.stop - begin])
                    part = part.to(self.model.device).unflatten(1, leaf.shape)
                    yield number, self.geometry.of_leaf(number, part)
                leaves = leaves[count:]

    def whitened_products(self, operator: Damped) -> np.ndarray:
        """Products under the inverse of all rows' gradients, `[n, n]` float64: those of `W g` with
        `W^T W` the inverse, leaf after leaf of the stored rows, each process some leaves.
        """
        n, curvature = len(self.run.tokens), operator.curvature
        found = np.zeros((n, n))
        assert isinstance(curvature, Whitening)
        leaves = range(*distributed.span(len(self.model.space.leaves)))
        for number, gradients in self.leaf_blocks(leaves):
            white: Tensor = curvature.whiten(number, gradients, operator.lam)
            found += (white @ white.T).double().cpu().numpy()
        return distributed.add_up(torch.from_numpy(found)).numpy()

    @property
    def stream_weights(self) -> Tensor:
        """The weights `w_i` [n] in the order in which `gradient_blocks` gives the rows."""
        if self.gradients_stored:
            return torch.from_numpy(self.run.weights)
        return torch.from_numpy(self.run.weights[np.concatenate(self._plan())])

    def _plan(self) -> list[np.ndarray]:
        budget = self.run.token_budget
        return plan_batches(self.run.tokens, budget, max_rows=max_rows(self.model.space))

    def row_products(self, vectors: Tensor, *, shared: bool = False) -> np.ndarray:
        """Products of `vectors` [K, P] with the gradients of all training rows, `[K, n]` float64.

        `shared`: all processes give the same vectors, and each reads its share of the rows.
        """
        found = np.zeros((len(vectors), len(self.run.tokens)))
        for indices, gradients in self.gradient_blocks(label=None, shared=shared):
            found[:, indices] = (vectors @ gradients.T).double().cpu().numpy()
        return distributed.add_up(torch.from_numpy(found)).numpy() if shared else found

    def gradients_of(self, rows: np.ndarray) -> Tensor:
        """Gradients of l_i `[b, P]` of some training rows, in their order."""
        out = torch.empty(
            len(rows), self.model.space.size, dtype=self.model.dtype, device=self.model.device
        )
        if self.gradients_stored:
            self._check_gradients()
            with RowFile(self.file("gradients"), "gradients") as file:
                for place, row in enumerate(rows.tolist()):
                    out[place] = torch.from_numpy(file.read(row, row + 1)[0]).to(out)
            return self.geometry.features(out)
        return self._stream(self.run.tokens.select(rows), None, out)

    def query_gradients(self, tokens: TokenizedExamples, measurement: Measurement) -> Tensor:
        """Gradients of m(q), `[Q, P]`, in query order."""
        out = torch.empty(
            len(tokens), self.model.space.size, dtype=self.model.dtype, device=self.model.device
        )
        return self._stream(tokens, measurement, out)

    def _stream(
        self, tokens: TokenizedExamples, measurement: Measurement | None, out: Tensor
    ) -> Tensor:
        budget = self.run.token_budget
        options: dict[str, Any] = {} if measurement is None else {"measurement": measurement}
        with self.model.at(self.place.theta):
            for rows, gradients, _ in stream_gradients(
                self.model, tokens, token_budget=budget, **options
            ):
                out[torch.from_numpy(rows)] = gradients
        return self.geometry.features(out)

    def _check_gradients(self) -> None:
        path = self.file("gradients")
        with open_file(path, run_digest=self.digest):
            if not open_rows(path, "done").all():
                raise StoreError(
                    f"{path} lacks the gradients of some rows: fit the run again with --overwrite"
                )

    def scale(self, operator: Damped) -> float:
        """Mean self-influence of the training rows under this operator, nats per token: the scale
        of this point's scores.

        Of at most `SCALE_ROWS` rows, evenly spaced. A matrix-free operator is stood in for by the
        run's EK-FAC with the same lambda, or by plain gradient products where there is none: what
        matters is how the points compare.
        """
        return self.scales([operator])[0]

    def scales(self, operators: Sequence[Damped]) -> list[float]:
        """The scales under several operators, for one reading of the rows; each is kept."""
        keys = [(each.curvature.name, each.lam.numpy().tobytes()) for each in operators]
        new = {key: each for key, each in zip(keys, operators, strict=True)}
        new = {key: each for key, each in new.items() if key not in self._scales}
        if new:
            rows = evenly_spaced(len(self.run.tokens), SCALE_ROWS)
            count, rows = len(rows), distributed.shard(rows)
            shares = self.run.weights[rows] / self.run.tokens.counts[rows]
            summed = distributed.add_up(
                torch.from_numpy(self._squares([*new.values()], rows) @ shares)
            )
            self._scales |= dict(zip(new, (summed / count).tolist(), strict=True))
        return [self._scales[key] for key in keys]

    def _squares(self, operators: Sequence[Damped], rows: np.ndarray) -> np.ndarray:
        """`grad l_i^T (C + lambda I)^-1 grad l_i` of some rows, `[operators, b]`."""
        found, computed, inverts = np.zeros((len(operators), len(rows))), [], []
        for number, operator in enumerate(operators):
            if (stored := self.features(operator)) is not None:
                found[number] = stored.squares[rows]
                continue
            computed.append(number)
            inverts.append(operator)
            if not isinstance(operator.curvature, Invertible):
                stands = self.preconditions
                inverts[-1] = self.preconditioner(operator) if stands else self.operator(PLAIN)
        chunks = memory_chunks(self.run, len(rows)) if computed and len(rows) else []
        for some in chunks:  # of several processes one may have no rows
            squares = all_inverse_products(inverts, self.gradients_of(rows[some]))
            found[np.ix_(computed, some)] = squares.cpu().numpy()
        return found

    def kept_rows(self) -> Iterator[Tensor]:
        """Features `[b, P]` of the rows that the curvature keeps, in order: at sampled labels,
        or at the data's own.
        """
        name = "rows" if self.run.specification.draws else "gradients"
        blocks = row_blocks(self.file(name), name, self.digest, self.model.device)
        return (self.geometry.features(block) for block in blocks)

    def kept_rows_of(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Features `[k, P]` of the kept rows of some training rows, one for each label draw."""
        draws = self.run.specification.draws
        name, each = ("rows", draws) if draws else ("gradients", 1)
        with open_file(self.file(name), run_digest=self.digest):
            pass
        with RowFile(self.file(name), name) as file:
            for row in rows.tolist():
                block = torch.from_numpy(file.read(row * each, (row + 1) * each))
                yield self.geometry.features(block.to(self.model.device))


class StoredTensors(Mapping[str, Tensor]):
    """The datasets of an open HDF5 file as tensors on a device, read when asked for.

    On the CPU large ones stay in the file: a real model's eigenbases take 1.1 GB a point.
    """

    def __init__(self, file: h5py.File, device: torch.device) -> None:
        self.file, self.device = file, device

    def __getitem__(self, name: str) -> Tensor:
        """Read one.

        `StoreError` where it is missing.
        """
        mapped = self.device.type == "cpu"
        array = read_mapped(self.file, name) if mapped else read(self.file, name)
        return torch.from_numpy(np.asarray(array)).to(self.device)

    def __iter__(self) -> Iterator[str]:
        """The names of the datasets."""
        names: list[str] = []
        self.file.visititems(
            lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None
        )
        return iter(names)

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))


def evenly_spaced(n: int, most: int) -> np.ndarray:
    """At most `most` of the positions 0 ... n - 1, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def memory_chunks(run: Run, count: int) -> list[np.ndarray]:
    """Positions 0 ... count - 1 in parts whose gradients, and some copies of them, take a
    bounded amount of memory.
    """
    size = max(1, block_bytes(PART_BYTES) // (run.model.space.size * run.model.dtype.itemsize))
    return np.array_split(np.arange(count), -(-count // size))


def queries_at_once(run: Run, copies: int) -> int:
    """Queries whose gradients, with the `copies` [K, P] that solving holds beside them, fit into
    the free memory, the same number in every process.
    """
    each = (1 + copies) * run.model.space.size * run.model.dtype.itemsize
    free = float(distributed.first(np.array([free_memory(run.model.device)]))[0])
    return max(1, int(QUERY_SHARE * free / each))


def geometry_here(run: Run, name: str) -> Geometry:
    """A geometry where the model is now.

    Adam's is estimated from gradients of some training rows.
    """
    if name == "function":
        return function_space(run.model)
    if name == "raw":
        return Raw()
    n = len(run.tokens)
    rows = evenly_spaced(n, RMS_ROWS)
    budget, order, blocks = run.token_budget, [], []
    for indices, gradients, _ in stream_gradients(
        run.model, run.tokens.select(rows), token_budget=budget
    ):
        order.append(indices)
        blocks.append(gradients)
    # so few rows stand for all: n w_i keeps its meaning
    shares = torch.from_numpy(run.weights[rows][np.concatenate(order)] * n / len(rows))
    return Adam.from_rms(run.model.space, blocks, shares)


def run_file(directory: Path, name: str, number: int) -> Path:
    """Where a point's `factors`, `gradients` or `rows` are: plain for the first point, numbered
    from 2 for others.
    """
    return directory / (f"{name}.h5" if number == 0 else f"{name}-{number + 1}.h5")


def point_digest(run_digest: str, number: int) -> str:
    """What the files of a point carry, so that the files of two points cannot be exchanged."""
    return (
        run_digest if number == 0 else hashlib.sha256(f"{run_digest}/{number}".encode()).hexdigest()
    )


def row_blocks(
    path: Path,
    name: str,
    run_digest: str,
    device: torch.device,
    label: str | None = None,
    span: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Blocks `[b, P]` of a stored row dataset, in order, each about `BLOCK_BYTES`.

    With progress if labelled. `span`: where the rows begin and end, by default at both ends.
    """
    with open_file(path, run_digest=run_digest):
        pass
    with RowFile(path, name) as rows:
        step = max(BLOCK_ROWS, block_bytes(BLOCK_BYTES) // (rows.shape[1] * rows.dtype.itemsize))
        first, end = span or (0, len(rows))
        starts = range(first, end, step)
        counts = [min(step, end - start) for start in starts]
        for start in starts if label is None else track(starts, label, counts=counts):
            yield torch.from_numpy(rows.read(start, min(start + step, end))).to(device)
