"""What a curvature is, from what is asked of a fit to what an edit makes of it.

`C` approximates the second derivative of the training objective `J = sum_i w_i l_i`, with the same
weights, and is never formed. A curvature is one file with three things:

    Specification    what is asked of `fit`, a small frozen dataclass: `EKFAC(samples=1)`
    Accumulator      what one pass over the training rows adds up at one point of the path
    Curvature        the fitted matrix: products, perhaps an inverse, and itself after an edit

so that `influence.fit` knows none of them by name. Stacks of vectors are rows: `[K, P]`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import scipy.sparse.linalg as sla
import torch
from torch import Tensor

from influence.errors import InputError

if TYPE_CHECKING:
    from influence.adapter import AdaptedModel
    from influence.at_point import AtPoint
    from influence.tokens import TokenizedExamples

#: When the per-row gradients at sampled labels are read, beside the pass itself.
NEVER, ONCE, ALWAYS = "never", "once", "always"


class SampledRows(Protocol):
    """Features `[b, P]` of per-row gradients, in blocks, and what each row weighs.

    A new iteration starts at the first.

    At the labels that the pass sampled from the model (or, without label draws, at the data's own).
    """

    @property
    def weights(self) -> Tensor:
        """`w_i / k` of every row and label draw, `[m]` float64, in the order of the blocks."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """The blocks."""
        ...


@dataclass(frozen=True)
class AfterPass:
    """What follows the pass over the rows at one point, so that its cost is known before it.

    Attributes
    ----------
    decomposed : tuple of int
        Orders of the symmetric matrices whose eigenvectors are computed.
    kept_bytes : int
        Size of what `Accumulator.finish` gives.
    row_products : int
        Multiplications that `second_look` and `finish` make for each row and label draw.
    solve_products : int
        Multiplications of the fitted curvature's closed inverse for each vector; 0: it has none.
    double : bool
        Whether these multiplications are in float64, whatever the model computes in.
    """

    decomposed: tuple[int, ...] = ()
    kept_bytes: int = 0
    row_products: int = 0
    solve_products: int = 0
    double: bool = False


#: What the run kept of a point, by name, read when asked for.
Arrays = Mapping[str, Tensor]


class Accumulator(ABC):
    """Running sums over the training rows, at one point.

    All state that rows change is in `sums`. It is what a checkpoint saves, what a resumed pass
    restores in place, and what several processes add up, each with its share of the rows
    (`influence.distributed.add_up(accumulator.sums())`).
    """

    #: Whether the pass is to call `add`; and whether `add_rows`, for which it forms every row's
    #: gradient.
    per_leaf: ClassVar[bool] = False
    per_row: ClassVar[bool] = False
    #: Whether a second look may show it rows leaf by leaf, so that no row's whole gradient is formed.
    by_leaf: ClassVar[bool] = False

    def add(
        self, leaf: int, x: Tensor, g: Tensor, valid: Tensor, relative: Tensor | None, draw: int
    ) -> None:
        """Take one leaf of one batch at one draw of labels.

        `x` [b, T, d_in] are its inputs and `g` [b, T, d_out] its output gradients, both in the
        geometry's coordinates; `valid` [b, T] marks positions that a token follows. Row i's
        gradient is `sum_t g_it x_it^T` (a leaf that runs twice in a forward is shown twice).

        `relative` [b] are the weights `w_i` over the largest of all rows, None where all rows weigh
        the same: sums of them keep their size whatever the number of rows. What is made of them is
        multiplied by the largest weight, `point.run.weights.max()`, and divided by the draws.

        All that takes memory is made before the sums change, here, in `add_rows` and in `add_leaf`:
        where memory is too small the batch is run again in two, and adds to each sum once.
        """

    def add_rows(self, features: Tensor, weights: Tensor) -> None:
        """Take the gradients `features` [b, P] of some rows at one draw of labels.

        `weights` [b], float64, are `w_i / k` for k draws: no unit is left to be multiplied with.
        """

    def sums(self) -> dict[str, Tensor]:
        """The running sums by name, the tensors themselves: others read and write them in place."""
        return {}

    def add_leaf(self, leaf: int, features: Tensor, weights: Tensor) -> None:
        """The same of one leaf alone, `features` [b, d_out, d_in], where `by_leaf` says so."""

    def second_look(self) -> Accumulator | None:
        """What a second look at the rows sums up, made of the complete sums of the first.

        It gets every row by `add_rows`, or by `add_leaf` leaf after leaf, and finishes in place of this one; its sums, too, are added
        up over processes. None where one look is enough.
        """
        return None

    def restore(self, arrays: Arrays, factor: float) -> None:
        """Add the sums that `finish` once made `arrays` of, every row's weight times `factor`.

        For runs that are grown from others (`influence.growing`). Where nothing is summed there is
        nothing to restore; a curvature of one's own that does not say it is an `InputError`.
        """
        if self.per_leaf or self.per_row:
            raise InputError(
                f"{type(self).__name__} has no `restore`, which says how its sums come back from "
                "what a run keeps: fit from scratch, without --from"
            )

    def after_pass(self, rows: int) -> AfterPass:
        """What follows a pass over so many rows and label draws, for `influence.estimate`.

        Of a curvature that does not say it, nothing is counted.
        """
        return AfterPass()

    @abstractmethod
    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """What the run keeps of this point, by name, once all sums are complete.

        `rows` are all rows, for a curvature that keeps them (`Specification.reads_rows` ALWAYS).
        """


class Specification(ABC):
    """What is asked of `influence.fit`: a frozen dataclass, whose fields are recorded in the
    manifest.

    `name` is a field that is not set by the caller (`field(default="ekfac", init=False)`): by it
    the curvature is asked for, and recorded with scores.
    """

    name: str
    #: When `finish` or the fitted curvature reads per-row gradients: NEVER, ONCE (by `finish`: kept
    #: on disk meanwhile if they fit, else computed again), ALWAYS (kept with the run).
    reads_rows: ClassVar[str] = NEVER
    #: Whether `C + lambda I` is the identity whatever the damping rule says.
    undamped: ClassVar[bool] = False
    #: Whether nothing but a trace is fitted, and products pass over the training rows: there is no
    #: closed inverse.
    matrix_free: ClassVar[bool] = False
    #: Whether the fitted curvature is `Whitening`, so that rows can be kept in few bytes.
    whitens: ClassVar[bool] = False
    #: Whether sums over weighted rows are fitted, which weights that change unevenly would spoil.
    sums_rows: ClassVar[bool] = True
    #: Where on the path to look unless told otherwise; None: where `influence.path` says.
    default_path: ClassVar[tuple[float, ...] | None] = None

    def record(self) -> dict[str, Any]:
        """The name and the options as the manifest keeps them: in JSON's own types."""
        options = asdict(self)  # pyright: ignore[reportArgumentType]
        return json.loads(json.dumps({"name": self.name, **options}))

    @property
    def draws(self) -> int:
        """Label draws per row that the pass makes, k.

        0: none.
        """
        return 0

    def sample(self, rows: int, seed: int) -> np.ndarray:
        """Which of so many training rows the sums are formed of, in order: all of them.

        A curvature that takes fewer multiplies its sums so that they stand for all.
        """
        return np.arange(rows)

    def refuse(self, rows: int) -> None:
        """Raise `InputError` where this many training rows cannot be fitted on this machine.

        Asked before the pass.
        """

    def caution(self, model: AdaptedModel) -> str | None:
        """What a user should know before this is fitted to a model.

        None where there is nothing.
        """
        return None

    @abstractmethod
    def begin(self, point: AtPoint) -> Accumulator:
        """Empty sums for a pass at a point: its model, geometry, tokens, weights and seed are
        there.
        """

    def grow(self, point: AtPoint, arrays: Arrays, *, rows: bool) -> Accumulator:
        """Empty sums for the rows that come to, or go from, a fitted point that keeps `arrays`.

        `rows`: whether the gradients at sampled labels of all rows are there for a second look.
        By default those of `begin`.
        """
        return self.begin(point)

    def grown_otherwise(self, *, rows: bool) -> str | None:
        """In what it differs from one that is fitted from scratch, a sentence; None: in nothing."""
        return None

    @abstractmethod
    def load(self, arrays: Arrays, point: AtPoint) -> Curvature:
        """The fitted curvature from what `Accumulator.finish` gave."""

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """Every curvature that the arrays hold, by name, loaded when called.

        By default this one alone.
        """
        return {self.name: lambda: self.load(arrays, point)}


class ChangedRows(Protocol):
    """Training rows that are taken out of a curvature, or put into it."""

    @property
    def positions(self) -> np.ndarray:
        """Places in the training set of rows that are taken out, `[k]`.

        Empty for rows that are put in.
        """
        ...

    @property
    def tokens(self) -> TokenizedExamples:
        """The rows' tokens."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """Their weights `w` in the objective, `[k]` float64."""
        ...

    def sampled(self, draws: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield `(rows [b], features [b, P])` of gradients at labels drawn as `fit` draws them.

        `rows` are places in `tokens` and `weights`, 0 ... k - 1, each `draws` times.
        With no draws (the empirical Fisher) once, at the data's own labels.
        """
        ...

    def ran(self, rows: int) -> None:
        """Count rows that a later product runs forward and backward."""
        ...


class Curvature(ABC):
    """A fitted curvature C, `[P, P]`, symmetric."""

    name: str
    #: Whether C is held whole: a product then reads and runs no training row.
    in_memory: ClassVar[bool] = False
    #: Whether `(C + lambda I)^-1` is a good preconditioner for other curvatures of the same blocks.
    preconditions: ClassVar[bool] = False
    #: Whether `C + lambda I` is the identity, whatever the damping rule says.
    undamped: ClassVar[bool] = False

    @property
    @abstractmethod
    def blocks(self) -> tuple[slice, ...]:
        """Slices of the flat vector, one after the other, that share one lambda each."""

    @property
    def size(self) -> int:
        """P."""
        return self.blocks[-1].stop

    def spread(self, lam: Tensor, like: Tensor) -> Tensor:
        """One lambda a block, `lam` [blocks], over the coordinates: `[P]` in the type of `like`."""
        return spread(self.blocks, lam, like)

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """`C v` for every row of `v` [K, P]."""

    @abstractmethod
    def mean_eigenvalues(self) -> Tensor:
        """Trace over size of each block, `[blocks]`.

        The scale of the `mean` damping rule.
        """

    @abstractmethod
    def top_eigenvalues(self) -> Tensor:
        """Largest eigenvalue of each block, `[blocks]`.

        The scale of the `top` damping rule.
        """

    @abstractmethod
    def updated(self, gone: ChangedRows, come: ChangedRows) -> Curvature:
        """`C - sum_{gone} w_i C_i + sum_{come} w_i C_i`, as exactly as this curvature allows.

        The class says how.

        Called on the fitted curvature, with all changes since the fit: edits of edits do not add up
        here. Abstract on purpose: an edit solves with the curvature after it, and one that forgot
        to change would silently solve with the curvature before.
        """

    def moved_to(self, theta: Tensor) -> Curvature:
        """The curvature taken again at other LoRA parameters `[P]`.

        Itself where it was fitted once and for all.
        """
        return self


@runtime_checkable
class Invertible(Protocol):
    """A curvature that knows `(C + lambda I)^-1` in closed form."""

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C + lambda I)^-1 v` for every row of `v` [K, P].

        `lam` [blocks].
        """
        ...


@runtime_checkable
class Diagonal(Protocol):
    """A curvature that is diagonal in a basis of its own."""

    def inverse_products(self, v: Tensor, lam: Tensor) -> Tensor:
        """`v^T (C + lambda I)^-1 v` of every row of `v` [K, P], `[K]` float64.

        `lam` [blocks].
        """
        ...


@runtime_checkable
class Whitening(Protocol):
    """A curvature that knows, leaf by leaf, a root W of its inverse: `W^T W = (C + lambda I)^-1`.

    `lam` [blocks]; p' are as many coordinates as the root needs, at least the leaf's own.
    """

    def whiten(self, leaf: int, gradients: Tensor, lam: Tensor) -> Tensor:
        """`W g` of a leaf's gradients `[K, d_out, d_in]`, flat: `[K, p']`."""
        ...

    def expected_squares(self, leaf: int, lam: Tensor) -> Tensor:
        """What the squares of `W g` are expected to be, weighted as in the objective and summed
        over the training rows: `[p']`.
        """
        ...


@runtime_checkable
class Subsampled(Protocol):
    """A curvature `C = sum_i w_i C_i` over training rows that can be multiplied on some of them
    alone.
    """

    @property
    def count(self) -> int:
        """The training rows, n."""
        ...

    def matvec_on(self, v: Tensor, rows: np.ndarray) -> Tensor:
        """`(n / b) sum_{i in rows} w_i C_i v` for every row of `v` [K, P] and b `rows`.

        Unbiased for `C v` where the rows are drawn uniformly.
        """
        ...


@dataclass(frozen=True)
class Damped:
    """The operator `C + lambda I` that solvers invert.

    `lam` [blocks] from a damping rule.
    """

    curvature: Curvature
    lam: Tensor

    def matvec(self, v: Tensor) -> Tensor:
        """`(C + lambda I) v` for every row of `v` [K, P]."""
        return self.curvature.matvec(v) + v * self.diagonal(v)

    @property
    def label(self) -> str:
        """What tells it from others of the same point: the curvature and its lambda, in a few
        characters.
        """
        lam = hashlib.sha256(self.lam.double().cpu().numpy().tobytes()).hexdigest()[:16]
        return f"{self.curvature.name} {lam}"

    def diagonal(self, like: Tensor) -> Tensor:
        """Lambda spread over the coordinates, `[P]`."""
        return spread(self.curvature.blocks, self.lam, like)


def inverse_products(operator: Damped, v: Tensor) -> Tensor:
    """`v^T (C + lambda I)^-1 v` of every row of `v` [K, P], `[K]` float64.

    For a curvature with a closed inverse; half the work where it is diagonal in a basis of its own,
    because nothing is rotated back.
    """
    if isinstance(operator.curvature, Diagonal):
        return operator.curvature.inverse_products(v, operator.lam)
    assert isinstance(operator.curvature, Invertible)
    return (v * operator.curvature.solve(v, operator.lam)).sum(1, dtype=torch.float64)


def spread(blocks: Sequence[slice], lam: Tensor, like: Tensor) -> Tensor:
    """One lambda a block, `lam` [blocks], over the coordinates: `[P]` in the type of `like`."""
    out = torch.empty(blocks[-1].stop, dtype=like.dtype, device=like.device)
    for block, value in zip(blocks, lam.tolist(), strict=True):
        out[block] = value
    return out


def dense(
    curvature: Curvature, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """The whole matrix C, `[P, P]`, column by column, made symmetric.

    For small P and for tests.
    """
    rows = torch.eye(curvature.size, dtype=dtype, device=device)
    matrix = torch.cat([curvature.matvec(part) for part in rows.split(64)])
    return (matrix + matrix.T) / 2


def as_linear_operator(
    operator: Curvature | Damped, device: torch.device | str = "cpu"
) -> sla.LinearOperator:
    """A SciPy `LinearOperator` [P, P] (float64 outside, the model's type inside) of C or of C +
    lambda I.
    """
    size = operator.curvature.size if isinstance(operator, Damped) else operator.size

    def matmat(columns: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(columns.T)).to(device)
        return operator.matvec(rows).double().cpu().numpy().T

    one = lambda vector: matmat(vector.reshape(-1, 1)).ravel()  # noqa: E731
    functions: dict[str, Any] = {
        "matvec": one,
        "rmatvec": one,
        "matmat": matmat,
        "dtype": np.float64,
    }
    return sla.LinearOperator((size, size), **functions)


def refuse_without_draws(curvature: Specification, accumulator: Accumulator) -> None:
    """Refuse a curvature that would be fitted to nothing: no labels are drawn for its sums."""
    if curvature.draws == 0 and (accumulator.per_leaf or accumulator.per_row):
        raise InputError(
            f"curvature {curvature.name} makes no label draws (`draws` is 0), and its accumulator "
            "adds up gradients at sampled labels: give the specification a property draws of 1 or "
            "more"
        )
