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

        Decomposed in float64 (in float32 the large eigenvalues of a real model's inputs, 1e5 times
        the median, drown the others), kept in the sums' type and in their place, because the bases
        of a large adapter take as much memory as all sums. The sums are gone.
        """
        matrix = self.state.double()
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(
                "a K-FAC factor holds NaN or infinity: run with --dtype float32 or float64"
            )
        values, vectors = torch.linalg.eigh(matrix, UPLO="L")
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
