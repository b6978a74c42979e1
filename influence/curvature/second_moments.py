"""Second moments `sum_n x_n x_n^T` of one side of a LoRA leaf, whole or sketched.

The tokens of a batch that they are summed over are found once for all leaves (`BatchTokens`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from influence.errors import NumericalError


@dataclass(frozen=True, eq=False)
class BatchTokens:
    """The valid tokens of a batch, and what they weigh.

    `valid` [b, T] and `relative` [b] are what they were found of; `places` [N] of the valid tokens
    among the b T, None where all are; `roots` [N] of their rows' weights, None where all rows weigh
    the same; `mass`, the sum of the weights.
    """

    valid: Tensor
    relative: Tensor | None
    places: Tensor | None
    roots: Tensor | None
    mass: Tensor

    @classmethod
    def of(cls, valid: Tensor, relative: Tensor | None) -> BatchTokens:
        """Look at a batch: the only place that waits for its device."""
        places = valid.flatten().nonzero().squeeze(1)
        counts = valid.sum(1).double()
        mass = (counts if relative is None else counts * relative.double()).sum()
        roots = None
        if relative is not None:
            roots = relative.sqrt()[places // valid.shape[1]]
        every = len(places) == valid.numel()
        return cls(valid, relative, None if every else places, roots, mass)

    def found_of(self, valid: Tensor, relative: Tensor | None) -> bool:
        """Whether it was found of these very tensors."""
        return self.valid is valid and self.relative is relative

    def rows(self, x: Tensor) -> Tensor:
        """The inputs `x` [b, T, d] of the valid tokens, times their roots: `[N, d]`."""
        rows = x.flatten(0, 1)
        if self.places is not None:
            rows = rows.index_select(0, self.places)
        return rows if self.roots is None else rows * self.roots.to(x)[:, None]


#: Directions of a wide matrix among which outliers are looked for, the width from which it is wide,
#: and how many times the least of these directions an outlier has at least.
DIRECTIONS, WIDE, OUTLIER = 64, 384, 20
#: Rounds of subspace iteration, after which an outlier's error is `OUTLIER ** -ROUNDS`.
ROUNDS = 5
#: The largest product of an outlier with a direction outside that is taken for rounding.
APART = 1e-4


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[d]` in float64 and eigenvectors `[d, d]` of a symmetric positive matrix, of
    which the lower triangle counts.

    In float32 the largest eigenvalues of a real model's inputs, 1e5 times the median, would drown
    the others: an error is a share of the largest. In float64 the wide sides of a small model take
    as long as the model itself. So the outliers are found first, in float64, and what is left is
    decomposed in float32, where its own largest eigenvalue is the measure. Outliers come from
    subspace iteration (Halko, Martinsson & Tropp 2011). A float64 matrix, and a narrow one, is
    decomposed in float64 whole.
    """
    width = len(matrix)
    if matrix.dtype == torch.float64 or width < WIDE:
        return torch.linalg.eigh(matrix.double(), UPLO="L")
    whole = matrix.tril()
    whole += matrix.tril(-1).mT
    # the columns with the largest diagonals, which is where outliers lie
    span = torch.linalg.qr(whole[:, whole.diagonal().topk(DIRECTIONS).indices]).Q
    for _ in range(ROUNDS - 1):
        span = torch.linalg.qr(whole @ span).Q
    exact = whole.double()
    span = torch.linalg.qr(exact @ span.double()).Q
    inside = span.mT @ (exact @ span)
    found, turned = torch.linalg.eigh((inside + inside.mT) / 2)
    least = max(OUTLIER * float(found[0]), 1e-9 * float(found[-1]))
    outliers = found > least
    count = int(outliers.sum())
    if not count:
        values, vectors = torch.linalg.eigh(whole)
        return values.double(), vectors
    span, found = span @ turned[:, outliers], found[outliers]
    # (I - V V^T) M (I - V V^T) + lift V V^T, where V comes out above all that is outside of it
    image = exact @ span
    inside = span.mT @ image
    inside.diagonal().add_(4 * least)
    half = image - span @ inside / 2
    exact.addmm_(half, span.mT, alpha=-1).addmm_(span, half.mT, alpha=-1)
    values, vectors = torch.linalg.eigh(exact.to(matrix.dtype))
    rest, span = vectors[:, : width - count], span.to(matrix.dtype)
    if float((rest.mT @ span).abs().max()) > APART:  # not as it should be: the slow way
        return torch.linalg.eigh(matrix.double(), UPLO="L")
    vectors[:, width - count :] = span
    return torch.cat([values[: width - count].double(), found]), vectors


class DenseMoment:
    """`sum_n x_n x_n^T` as a `[d, d]` matrix, of which the lower triangle counts."""

    # the upper triangle is not computed: 4 strips of rows save 3/8 of the products, and more
    # strips, where they are wide enough to be fast, up to half. A GPU needs more rows in each to be
    # filled, and fewer calls: WIDEST_ELSEWHERE is a choice, not measured
    STRIPS, WIDEST, WIDEST_ELSEWHERE = 4, 192, 1024

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.state = torch.zeros(width, width, dtype=dtype, device=device)
        #: eigenvectors that it gives, and the order of a matrix that takes as long to decompose
        self.directions = self.order = width

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` [N, d]."""
        self.put(*self.made(x))

    def made(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `put` adds for the rows of `x` [N, d]: all that takes memory."""
        return (x,)

    def put(self, x: Tensor) -> None:
        """Add the rows of `x` [N, d]."""
        widest = self.WIDEST if x.device.type == "cpu" else self.WIDEST_ELSEWHERE
        step = min(max(32, -(-x.shape[1] // self.STRIPS)), widest)
        for start in range(0, x.shape[1], step):
            stop = min(start + step, x.shape[1])
            self.state[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def restore(self, vectors: Tensor, values: Tensor, rest: float, factor: float) -> None:
        """Add `factor` times the moment that `eigen` made these of, put together in float64."""
        vectors = vectors.to(self.state.device).double()
        self.state += (factor * (vectors * values.to(vectors)) @ vectors.T).to(self.state)

    def eigen(self) -> tuple[Tensor, Tensor, float]:
        """Eigenvectors `[d, d]`, eigenvalues `[d]` (clipped at 0), and the mean eigenvalue of
        the complement, 0.

        Decomposed as if in float64 (`eigenvectors`), kept in the sums' type and in their place,
        because the bases of a large adapter take as much memory as all sums. The sums are gone.
        """
        if not bool(torch.isfinite(self.state).all()):
            raise NumericalError(
                "a K-FAC factor holds NaN or infinity: run with --dtype float32 or float64"
            )
        values, vectors = eigenvectors(self.state)
        place = self.state.copy_(vectors)
        del self.state  # a second use is an error, not a wrong basis
        return place, values.clamp(min=0), 0.0

    def room(self) -> tuple[Tensor, Tensor, float]:
        """Tensors like those of `eigen`, in the place of the sums, for another process's."""
        place = self.state
        del self.state
        return place, torch.zeros(len(place), dtype=torch.float64, device=place.device), 0.0


class SketchedMoment:
    """`sum_n x_n x_n^T` through its product with a random `[d, k]` matrix, and its trace."""

    def __init__(
        self, width: int, rank: int, seed: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        # drawn on the host: the numbers of a GPU depend on its model, and a fit that goes on elsewhere
        # must go on with the same directions
        test = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        self.test = torch.linalg.qr(test.to(device)).Q.to(dtype)
        # the last row holds the trace, so that the state is one tensor
        self.state = torch.zeros(width + 1, rank, dtype=dtype, device=device)
        self.directions = rank
        # a QR of [d, k] takes about as long as eigenvectors of d k^2 = order^3
        self.order = round((width * rank**2) ** (1 / 3))

    def add(self, x: Tensor) -> None:
        """Add the rows of `x` [N, d]."""
        self.put(*self.made(x))

    def made(self, x: Tensor) -> tuple[Tensor, ...]:
        """What `put` adds for the rows of `x` [N, d]: all that takes memory."""
        return x, x @ self.test, x.square().sum()

    def put(self, x: Tensor, projected: Tensor, square: Tensor) -> None:
        """Add the rows of `x` [N, d], of which the product with the test matrix is given."""
        self.state[:-1].addmm_(x.T, projected)
        self.state[-1, 0] += square

    def restore(self, vectors: Tensor, values: Tensor, rest: float, factor: float) -> None:
        """Add `factor` times the sketch that `eigen` made these of.

        A Nystroem approximation has the products with the test matrix that it was made of, but for
        the shift, which is rounding of the sums' type.
        """
        vectors = vectors.to(self.state.device).double()
        values = values.to(vectors)
        products = (vectors * values) @ (vectors.T @ self.test.double())
        self.state[:-1] += (factor * products).to(self.state)
        width, rank = self.test.shape
        self.state[-1, 0] += factor * (float(values.sum()) + rest * (width - rank))

    def eigen(self) -> tuple[Tensor, Tensor, float]:
        """Leading eigenvectors `[d, k]`, eigenvalues `[k]`, and the mean eigenvalue of the
        complement.
        """
        sketch, trace = self.state[:-1].double(), float(self.state[-1, 0])
        width, rank = sketch.shape
        shift = torch.finfo(self.state.dtype).eps * float(torch.linalg.matrix_norm(sketch))
        if not shift >= 0:
            raise NumericalError(
                "a K-FAC factor holds NaN or infinity: run with --dtype float32 or float64"
            )
        test = self.test.double()
        shifted = sketch + shift * test
        core = test.T @ shifted
        core_values, core_vectors = torch.linalg.eigh((core + core.T) / 2)
        # square-root pseudo-inverse of the core: rounding may leave it slightly indefinite
        scale = torch.where(core_values > shift / 2, core_values.clamp(min=1e-300).rsqrt(), 0.0)
        half = shifted @ (core_vectors * scale)
        # the singular vectors of a tall matrix by those of its small triangle: on a GPU the SVD of
        # the tall one takes far longer
        basis, triangle = torch.linalg.qr(half)
        squares, inner = torch.linalg.eigh(triangle @ triangle.T)
        vectors, values = basis @ inner.flip(1), (squares.flip(0) - shift).clamp(min=0)
        return vectors, values, max(0.0, (trace - float(values.sum())) / (width - rank))

    def room(self) -> tuple[Tensor, Tensor, float]:
        """Tensors like those of `eigen`, for another process's."""
        rank, options = self.test.shape[1], {"dtype": torch.float64, "device": self.test.device}
        return torch.zeros(self.test.shape, **options), torch.zeros(rank, **options), 0.0
