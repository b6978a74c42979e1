"""K-FAC for LoRA leaves.

Martens & Grosse 2015, arXiv 1503.05671, in the expand setting of Eschenhagen et al. 2023.

A leaf with input x_t and output gradient g_t (labels sampled from the model) at token t has the
gradient `G_i = sum_t g_t x_t^T` and the Fisher block `sum_i w_i vec(G_i) vec(G_i)^T`. K-FAC takes
tokens as independent and inputs as independent of output gradients:

    C  ~  S (x) A,  S = sum_i w_i sum_t g_t g_t^T,  A = sum_i w_i sum_t x_t x_t^T / sum_i w_i T_i

(T_i counts all positions of example i, prompt included). With `S = Q_S diag(s) Q_S^T`, `A = Q_A
diag(a) Q_A^T`:

    (C + lambda I)^-1 V = Q_S [ (Q_S^T V Q_A) / (s a^T + lambda) ] Q_A^T

One internal shape: every leaf block is seen as `[r, d]`, its *narrow* side r and its *wide* side d.
For A (`[r, d_in]`) the narrow side is the output gradient and the wide side the input; for B
(`[d_out, r]`, seen transposed) the narrow side is the input A x and the wide side the output
gradient. Layers that read the same tensor (q/k/v, gate/up) share one wide factor.

Wide sides whose moments would not fit into a share of the memory never get a `d x d` matrix
(`influence.curvature.wide_sides`). Their second moment is sketched in one pass (randomised
Nystroem, Tropp et al. 2017, arXiv 1706.05736, algorithm 3), which keeps so many eigenvectors as
the sketch has columns; the complement of their span is treated as isotropic, with its own mean
eigenvalue per narrow direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import Leaf, ParamSpace
from influence.curvature.base import (
    Accumulator,
    AfterPass,
    Arrays,
    ChangedRows,
    Curvature,
    SampledRows,
    Specification,
)
from influence.curvature.ggn import GGN
from influence.curvature.hessian import Hessian
from influence.curvature.second_moments import BatchTokens, DenseMoment, SketchedMoment
from influence.curvature.wide_sides import directions, note, shared_inputs
from influence.errors import InputError
from influence.memory import device_memory
from influence.progress import say

if TYPE_CHECKING:
    from influence.at_point import AtPoint


@dataclass(frozen=True)
class KFAC(Specification):
    """K-FAC with labels sampled from the model.

    `samples` label draws per training example. Wide sides up to `max_width` are whole; of wider
    ones a sketch keeps `rank` directions, or more, or they are whole too, while the second moments
    of a point fit into `memory_share` of the device's memory. 0 is for the same factors on every
    machine. Of `rows` training rows, drawn at random, the curvature is formed; None: of all.
    """

    samples: int = 1
    max_width: int = 2048
    rank: int = 256
    memory_share: float = 0.15
    rows: int | None = None
    name: str = field(default="kfac", init=False)
    whitens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_width < 1 or self.rank < 1:
            raise InputError(f"{self} was given; samples, max_width and rank must be at least 1")
        if not 0 <= self.memory_share <= 1:
            raise InputError(f"{self} was given; memory_share must be between 0 and 1")
        if self.rows is not None and self.rows < 1:
            raise InputError(f"{self} was given; rows must be at least 1, or None for all")

    def record(self) -> dict[str, Any]:
        """As before for what is the default, so that runs are told to be the same that were."""
        found = super().record()
        if self.memory_share == KFAC.memory_share:
            del found["memory_share"]
        if self.rows is None:
            del found["rows"]
        return found

    def sample(self, rows: int, seed: int) -> np.ndarray:
        """All rows, or as many as were asked for, drawn at random."""
        if self.rows is None or self.rows >= rows:
            return np.arange(rows)
        generator = np.random.Generator(np.random.Philox(key=seed))
        return np.sort(generator.permutation(rows)[: self.rows])

    @property
    def draws(self) -> int:
        """Label draws per row."""
        return self.samples

    def begin(self, point: AtPoint) -> Moments:
        """Second moments of every leaf's inputs and output gradients."""
        return Moments.at(point, self)

    def grow(self, point: AtPoint, arrays: Arrays, *, rows: bool) -> Accumulator:
        """Second moments, which add up."""
        return Moments.at(point, self, arrays)

    def load(self, arrays: Arrays, point: AtPoint) -> Kronecker:
        """K-FAC's own eigenvalues in its eigenbases."""
        return load_kronecker(arrays, point, "kfac", "kfac_", self.samples)

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """Itself, and the exact curvatures, whose damping needs a trace only."""
        sizes = torch.tensor([leaf.stop - leaf.start for leaf in point.model.space.leaves])

        def trace() -> dict[str, Tensor]:
            return {"trace": point.curvature(self.name).mean_eigenvalues() * sizes}

        exact: dict[str, Callable[[], Curvature]] = {
            "ggn": lambda: GGN().load(trace(), point),
            "hessian": lambda: Hessian().load(trace(), point),
        }
        return super().held(arrays, point) | exact


# ---- second moments ------------------------------------------------------------------------------


class Moments(Accumulator):
    """Both second moments of every leaf.

    `wide_of[leaf]` names the leaf whose wide moment a leaf uses (its own, unless it shares its
    input). Sums are of weights relative to the largest, `unit`, so that their size does not depend
    on the number of rows.
    """

    per_leaf = True

    def __init__(
        self,
        space: ParamSpace,
        wide_of: list[int],
        options: KFAC,
        seed: int,
        unit: float,
        dtype: torch.dtype,
        device: torch.device,
        kept: dict[int, int] | None = None,
    ) -> None:
        self.space, self.wide_of, self.options, self.unit = space, wide_of, options, unit
        self.dtype = dtype
        self.narrow = [DenseMoment(min(leaf.shape), dtype, device) for leaf in space.leaves]
        self.wide: dict[int, DenseMoment | SketchedMoment] = {}
        widths = {number: wide_side(space.leaves[number]) for number in sorted(set(wide_of))}
        if kept is None:
            # every process sums up the same directions, whatever machine it is on
            memory = float(distributed.first(np.array([device_memory(device)]))[0])
            budget = options.memory_share * memory
            kept = directions(widths, options.max_width, options.rank, dtype.itemsize, budget)
        for number, width in widths.items():
            if kept[number] == width:
                self.wide[number] = DenseMoment(width, dtype, device)
            else:
                self.wide[number] = SketchedMoment(
                    width, kept[number], seed + number, dtype, device
                )
        # where the batches are: a number that is fetched from a GPU, leaf after leaf, makes it wait
        # for the host each time
        self.mass = torch.zeros(len(space.leaves), dtype=torch.float64, device=device)
        self._batch: BatchTokens | None = None
        #: eigenvalues of the moments, once they are decomposed: the sums can be made of them again
        self.spectra: dict[str, Tensor] = {}

    @classmethod
    def at(cls, point: AtPoint, options: KFAC, arrays: Arrays | None = None) -> Self:
        """Empty moments at a point, with the sides and directions of fitted `arrays` if given.

        Layers that read the same tensor share one wide factor where the geometry allows it.
        """
        model, run, kept = point.model, point.run, None
        if arrays is not None:
            wide_of = arrays["wide_of"].tolist()
            kept = {i: arrays[f"leaf/{i}/wide"].shape[1] for i in sorted(set(wide_of))}
        else:
            wide_of = shared_inputs(model, run.tokens)
            if not point.geometry.shares_inputs:
                wide_of = list(range(len(wide_of)))
        n, seed = len(run.tokens), run.manifest.seed
        # rows that were drawn stand for all
        unit = float(run.weights.max()) * n / len(options.sample(n, seed))
        return cls(model.space, wide_of, options, seed, unit, model.dtype, model.device, kept)

    def add(
        self, leaf: int, x: Tensor, g: Tensor, valid: Tensor, relative: Tensor | None, draw: int
    ) -> None:
        """Add a batch of one leaf.

        Inputs once, at the first draw of labels.

        Output gradients vanish where nothing is predicted; inputs do not, and are cut to the valid
        tokens.
        """
        if relative is not None:
            g = g * relative.sqrt().to(g)[:, None, None]
        outputs = self._output_moment(leaf)
        made = outputs.made(g.flatten(0, 1))  # first what takes memory, and then the sums
        if draw == 0:
            batch = self._batch_tokens(valid, relative)
            if not self.space.leaves[leaf].is_A or self.wide_of[leaf] == leaf:
                inputs = self._input_moment(leaf)
                inputs.add(batch.rows(x))
            self.mass[leaf] += batch.mass
        outputs.put(*made)

    def _batch_tokens(self, valid: Tensor, relative: Tensor | None) -> BatchTokens:
        """What all leaves of a batch share, found once for a batch and not once for a leaf.

        The tape shows the same `valid` to every leaf that sees the batch's tokens.
        """
        if self._batch is None or not self._batch.found_of(valid, relative):
            self._batch = BatchTokens.of(valid, relative)
        return self._batch

    def _input_moment(self, leaf: int) -> DenseMoment | SketchedMoment:
        return self.wide[self.wide_of[leaf]] if self.space.leaves[leaf].is_A else self.narrow[leaf]

    def _output_moment(self, leaf: int) -> DenseMoment | SketchedMoment:
        return self.narrow[leaf] if self.space.leaves[leaf].is_A else self.wide[leaf]

    def _eigen(self, moment: DenseMoment | SketchedMoment) -> tuple[Tensor, Tensor, float]:
        """Decompose in float64.

        Keep the vectors in the gradients' type, which is what they are applied to.
        """
        vectors, values, rest = moment.eigen()
        return vectors.to(self.dtype), values, rest

    def _decomposed(
        self, moments: Sequence[DenseMoment | SketchedMoment]
    ) -> list[tuple[Tensor, Tensor, float]]:
        """Every moment's eigenvectors, eigenvalues and rest: each process does some, and has all.

        Where all compute the same, two machines may turn a vector differently.
        """
        owners = distributed.owners(
            [moment.state.numel() * moment.state.shape[1] for moment in moments]
        )
        pairs = zip(moments, owners, strict=True)
        mine = [moment for moment, owner in pairs if owner == distributed.rank()]
        if self.mass.device.type == "cpu":  # LAPACK runs without the interpreter's lock
            workers = torch.get_num_threads()
            with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
                made = list(pool.map(self._eigen, mine))
        else:  # CUDA's library is not safe to enter from several threads
            made = [self._eigen(moment) for moment in mine]
        if distributed.world() == 1:
            return made
        done, found = iter(made), []
        for moment, owner in zip(moments, owners, strict=True):
            vectors, values, rest = next(done) if owner == distributed.rank() else moment.room()
            vectors, left = vectors.to(self.dtype).contiguous(), torch.tensor([rest]).double()
            distributed.hand_out((vectors, values, left), owner)
            found.append((vectors, values, float(left)))
        return found

    def sums(self) -> dict[str, Tensor]:
        """Every second moment, and the tokens' weights `mass` [leaves]."""
        tensors = {f"narrow/{i}": moment.state for i, moment in enumerate(self.narrow)}
        tensors |= {f"wide/{i}": moment.state for i, moment in self.wide.items()}
        return {**tensors, "mass": self.mass}

    def restore(self, arrays: Arrays, factor: float) -> None:
        """Put the moments together from their eigenvectors and eigenvalues.

        Rounding is that of the eigenvectors' type, relative to a moment's largest eigenvalue, as
        in the sums themselves.
        """
        if "moments/unit" not in arrays:
            raise InputError(
                "the run was fitted by a version that did not keep the eigenvalues of the moments: "
                "fit from scratch, without --from"
            )
        factor *= float(arrays["moments/unit"]) / self.unit
        self.mass += factor * arrays["moments/mass"].to(self.mass)
        for side, moments in (("narrow", dict(enumerate(self.narrow))), ("wide", self.wide)):
            for number, moment in moments.items():
                values = arrays[f"moments/{side}/{number}"]
                rest = float(arrays[f"moments/rest/{number}"]) if side == "wide" else 0.0
                moment.restore(arrays[f"leaf/{number}/{side}"], values, rest, factor)

    def after_pass(self, rows: int) -> AfterPass:
        """Every second moment is decomposed; rows are rotated into the bases, and solved for by
        rotating twice.
        """
        decomposed = [moment.order for moment in self.narrow]
        decomposed += [moment.order for moment in self.wide.values()]
        kept, products, width = 8 + 16 * len(self.wide_of), 0, self.dtype.itemsize
        for number, leaf in enumerate(self.space.leaves):
            r, d = min(leaf.shape), wide_side(leaf)
            k = self.wide[self.wide_of[number]].directions
            kept += width * r * r + 8 * 2 * (r * k + r)  # both eigenvalues, K-FAC's and the fitted
            kept += 8 * r  # the moments' eigenvalues, here and of the wide side
            kept += width * d * k + 8 * (k + 1) if self.wide_of[number] == number else 0
            products += r * r * d + r * d * k * (1 if k == d else 2)
        return AfterPass(tuple(decomposed), kept, products, 2 * products)

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """K-FAC's eigenbases and eigenvalues."""
        kfac = self.kronecker()
        return self.arrays(kfac, kfac)

    def arrays(self, kfac: Kronecker, fitted: Kronecker) -> dict[str, Tensor]:
        """What a run keeps: the eigenbases, K-FAC's eigenvalues, and those of the curvature that
        was fitted. Says what is sketched of it.
        """
        if (words := fitted.sketched()) is not None:
            say(words)
        arrays = {"wide_of": torch.tensor(self.wide_of), **self.spectra}
        pairs = zip(kfac.leaf_blocks, fitted.leaf_blocks, strict=True)
        for number, (plain, block) in enumerate(pairs):
            tensors = {
                "narrow": block.narrow,
                "kfac_eigenvalues": plain.eigenvalues,
                "kfac_rest": plain.rest,
                "eigenvalues": block.eigenvalues,
                "rest": block.rest,
            }
            if self.wide_of[number] == number:
                tensors["wide"] = block.wide
            arrays |= {f"leaf/{number}/{name}": tensor for name, tensor in tensors.items()}
        return arrays

    def kronecker(self) -> Kronecker:
        """K-FAC from the moments, eigendecomposed.

        Output moments are means over the label draws. The moments are used up: their memory holds
        the eigenvectors.
        """
        wide = dict(zip(self.wide, self._decomposed(list(self.wide.values())), strict=True))
        narrow = self._decomposed(self.narrow)
        blocks, masses = [], self.mass.tolist()
        self.spectra = {
            "moments/unit": torch.tensor(self.unit, dtype=torch.float64),
            "moments/mass": self.mass.clone(),
        }
        for number, (_, values, _) in enumerate(narrow):
            self.spectra[f"moments/narrow/{number}"] = values
        for number, (_, values, rest) in wide.items():
            self.spectra[f"moments/wide/{number}"] = values
            self.spectra[f"moments/rest/{number}"] = torch.tensor(rest, dtype=torch.float64)
        for number, leaf in enumerate(self.space.leaves):
            narrow_vectors, narrow_values, _ = narrow[number]
            wide_vectors, wide_values, rest = wide[self.wide_of[number]]
            # inputs are normalised by the mass of their tokens, output gradients weighted and
            # averaged over draws
            factor = self.unit / self.options.samples / max(masses[number], 1.0)
            eigenvalues = factor * narrow_values[:, None] * wide_values[None, :]
            blocks.append(
                KroneckerBlock(
                    leaf, narrow_vectors, wide_vectors, eigenvalues, factor * narrow_values * rest
                )
            )
        return Kronecker(self.space, tuple(blocks))


def wide_side(leaf: Leaf) -> int:
    """Width d of a leaf's wide side: d_in of an A, d_out of a B."""
    return leaf.shape[1] if leaf.is_A else leaf.shape[0]


# ---- the fitted curvature ------------------------------------------------------------------------


@dataclass(frozen=True)
class KroneckerBlock:
    """Eigenbasis and eigenvalues of one leaf, seen as `[r, d]`.

    `narrow` [r, r], `wide` [d, k] (k = d unless sketched), `eigenvalues` [r, k], and `rest` [r],
    the eigenvalue of each narrow direction on the complement of `wide` (unused when k = d).
    """

    leaf: Leaf
    narrow: Tensor
    wide: Tensor
    eigenvalues: Tensor
    rest: Tensor

    @property
    def complete(self) -> bool:
        """Whether the wide basis spans everything."""
        return self.wide.shape[1] == wide_side(self.leaf)

    def rotate(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Coordinates `[K, r, k]` of flat leaf vectors `[K, r*d]`, and what lies off the wide
        basis `[K, r, d]`.
        """
        matrix = v.unflatten(-1, self.leaf.shape)
        matrix = self.narrow.T.to(v) @ (matrix if self.leaf.is_A else matrix.mT)
        wide = self.wide.to(v)
        coordinates = matrix @ wide
        return coordinates, None if self.complete else matrix - coordinates @ wide.T

    def unrotate(self, coordinates: Tensor, off: Tensor | None) -> Tensor:
        """Inverse of `rotate`."""
        matrix = coordinates @ self.wide.T.to(coordinates)
        if off is not None:
            matrix = matrix + off
        matrix = self.narrow.to(coordinates) @ matrix
        return (matrix if self.leaf.is_A else matrix.mT).flatten(-2)


@dataclass(frozen=True)
class Kronecker(Curvature):
    """A fitted K-FAC or EK-FAC: one eigenbasis and one table of eigenvalues per leaf.

    One damping block per leaf.

    `samples` label draws of each training row made the eigenvalues.
    """

    space: ParamSpace
    leaf_blocks: tuple[KroneckerBlock, ...]
    name: str = "kfac"
    samples: int = 1
    in_memory: ClassVar[bool] = True
    preconditions: ClassVar[bool] = True

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The leaves."""
        return tuple(leaf.slice for leaf in self.space.leaves)

    def matvec(self, v: Tensor) -> Tensor:
        """`C v` for every row of `v` [K, P]."""
        spectra = ([(block.eigenvalues, block.rest)] for block in self.leaf_blocks)
        return self._apply(v, spectra, 1)[0]

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C + lambda I)^-1 v` for every row of `v` [K, P].

        `lam` [leaves].
        """
        return self.solve_several(v, [lam])[0]

    def solve_several(self, v: Tensor, lams: Sequence[Tensor]) -> list[Tensor]:
        """`solve` for each of several `lams`, `[K, P]` each; rotates once."""
        spectra = (
            [(1 / (block.eigenvalues + x), 1 / (block.rest + x)) for x in values]
            for block, values in self._damped(lams)
        )
        return self._apply(v, spectra, len(lams))

    def _damped(self, lams: Sequence[Tensor]) -> Iterator[tuple[KroneckerBlock, list[float]]]:
        """Each leaf with its own part of each of `lams` [leaves]."""
        columns = zip(*(lam.tolist() for lam in lams), strict=True)
        for block, values in zip(self.leaf_blocks, columns, strict=True):
            yield block, list(values)

    def inverse_products(self, v: Tensor, lam: Tensor) -> Tensor:
        """`v^T (C + lambda I)^-1 v` of every row of `v` [K, P], `[K]` float64, in the eigenbasis.

        `lam` [leaves].
        """
        return self.inverse_products_several(v, [lam])[0]

    def inverse_products_several(self, v: Tensor, lams: Sequence[Tensor]) -> Tensor:
        """`inverse_products` for each of several `lams`, `[lambdas, K]` float64; rotates once."""
        total = torch.zeros(len(lams), len(v), dtype=torch.float64, device=v.device)
        for block, values in self._damped(lams):
            coordinates, off = block.rotate(v[:, block.leaf.slice])
            inside = coordinates.square_()
            outside = None if off is None else off.square_()
            for sums, x in zip(total, values, strict=True):
                squares = inside / (block.eigenvalues + x).to(v)
                sums += squares.sum((1, 2), dtype=torch.float64)
                if outside is not None:
                    squares = outside / (block.rest + x).to(v)[:, None]
                    sums += squares.sum((1, 2), dtype=torch.float64)
        return total

    def whiten(self, leaf: int, gradients: Tensor, lam: Tensor) -> Tensor:
        """`W g` [K, p'] of a leaf's gradients `[K, d_out, d_in]`, in its eigenbasis; what lies off
        a wide basis follows, `[r, d]`.
        """
        block, x = self.leaf_blocks[leaf], float(lam[leaf])
        coordinates, off = block.rotate(gradients.flatten(1))
        inside = (coordinates * (block.eigenvalues + x).rsqrt().to(coordinates)).flatten(1)
        if off is None:
            return inside
        outside = off * (block.rest + x).rsqrt().to(off)[:, None]
        return torch.cat([inside, outside.flatten(1)], 1)

    def expected_squares(self, leaf: int, lam: Tensor) -> Tensor:
        """`Lambda / (Lambda + lambda)`, `[p']`."""
        block, x = self.leaf_blocks[leaf], float(lam[leaf])
        inside = (block.eigenvalues / (block.eigenvalues + x)).flatten()
        if block.complete:
            return inside
        width, kept = wide_side(block.leaf), block.wide.shape[1]
        outside = block.rest / (block.rest + x) * (1 - kept / width)
        return torch.cat([inside, outside.repeat_interleave(width)])

    def _apply(
        self, v: Tensor, spectra: Iterator[list[tuple[Tensor, Tensor]]], count: int
    ) -> list[Tensor]:
        """`v` times `count` functions of the curvature, of which the eigenvalues are given leaf by
        leaf.
        """
        found = [torch.empty_like(v) for _ in range(count)]
        for block, values in zip(self.leaf_blocks, spectra, strict=True):
            coordinates, off = block.rotate(v[:, block.leaf.slice])
            for out, (inside, outside) in zip(found, values, strict=True):
                scaled = coordinates * inside.to(v)
                out[:, block.leaf.slice] = block.unrotate(
                    scaled, None if off is None else off * outside.to(v)[:, None]
                )
        return found

    def mean_eigenvalues(self) -> Tensor:
        """Trace over size of each leaf, `[leaves]`."""
        traces = [
            block.eigenvalues.sum()
            + block.rest.sum() * (wide_side(block.leaf) - block.wide.shape[1])
            for block in self.leaf_blocks
        ]
        sizes = torch.tensor([block.leaf.stop - block.leaf.start for block in self.leaf_blocks])
        return torch.stack(traces).double().cpu() / sizes

    def outside(self) -> Tensor:
        """Share of each leaf's trace off its wide basis, `[leaves]` float64: 0 where it is whole.

        What a sketch knows by a mean eigenvalue alone.
        """
        shares = []
        for block in self.leaf_blocks:
            off = block.rest.double().sum() * (wide_side(block.leaf) - block.wide.shape[1])
            shares.append(float(off / (block.eigenvalues.double().sum() + off).clamp(min=1e-300)))
        return torch.tensor(shares, dtype=torch.float64)

    def sketched(self) -> str | None:
        """What is to be known of sketched leaves, None where all are whole."""
        sides = [(wide_side(block.leaf), block.wide.shape[1]) for block in self.leaf_blocks]
        return note(sides, self.outside().tolist())

    def top_eigenvalues(self) -> Tensor:
        """Largest eigenvalue of each leaf, `[leaves]`."""
        return torch.stack([block.eigenvalues.max() for block in self.leaf_blocks]).double().cpu()

    def updated(self, gone: ChangedRows, come: ChangedRows) -> Kronecker:
        """The eigenvalues of the rows after the change, in the same eigenbases.

        Each row's share `w_i (Q_S^T G_i Q_A)^2` at its sampled labels is taken out or put in. For
        EK-FAC that is exactly its eigenvalues refitted on these rows; for K-FAC an approximation,
        and what would fall below zero is zero.
        """
        inside = [block.eigenvalues.clone() for block in self.leaf_blocks]
        outside = [block.rest.clone() for block in self.leaf_blocks]
        for changed, sign in ((gone, -1.0), (come, 1.0)):
            for rows, gradients in changed.sampled(self.samples):
                share = torch.from_numpy(sign * changed.weights[rows] / self.samples).to(gradients)
                share = share[:, None, None]
                for number, block in enumerate(self.leaf_blocks):
                    coordinates, off = block.rotate(gradients[:, block.leaf.slice])
                    inside[number] += (coordinates.square() * share).sum(0).to(inside[number])
                    if off is not None:
                        left = wide_side(block.leaf) - block.wide.shape[1]
                        squares = (off.square() * share).sum((0, 2)).to(outside[number])
                        outside[number] += squares / left
        blocks = (
            replace(block, eigenvalues=values.clamp(min=0), rest=rest.clamp(min=0))
            for block, values, rest in zip(self.leaf_blocks, inside, outside, strict=True)
        )
        return replace(self, leaf_blocks=tuple(blocks))


def load_kronecker(
    arrays: Arrays, point: AtPoint, name: str, prefix: str, samples: int
) -> Kronecker:
    """The eigenbases of a run with the eigenvalues whose names begin with `prefix`."""
    wide_of = arrays["wide_of"].tolist()
    wide = {number: arrays[f"leaf/{number}/wide"] for number in sorted(set(wide_of))}
    blocks = []
    for number, leaf in enumerate(point.model.space.leaves):
        place = f"leaf/{number}"
        eigenvalues, rest = arrays[f"{place}/{prefix}eigenvalues"], arrays[f"{place}/{prefix}rest"]
        narrow = arrays[f"{place}/narrow"]
        blocks.append(KroneckerBlock(leaf, narrow, wide[wide_of[number]], eigenvalues, rest))
    return Kronecker(point.model.space, tuple(blocks), name, samples)
