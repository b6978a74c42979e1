"""Geometries: the coordinates in which gradients are compared and curvature is formed.

A geometry is a linear map T from the flat LoRA gradient `[P]` to features `[P]`, in the same leaf
layout, fixed at the adapter's current parameters. Curvature C_f, damping lambda I and scores live
in feature coordinates; an edit goes back to the parameters by T^T:

    f = T g,     score = f_q^T (C_f + lambda I)^-1 f_i,     delta = T^T (C_f + lambda I)^-1 f

With features `f` the damping is `lambda (T^T T)^+` in raw coordinates: a geometry says which moves
of the adapter count as long.

* `Raw`: T = I. A move is as long as its coordinates.
* `FunctionSpace`: a move of (A, B) is as long as the change of `s B A` that it makes. Scores do not
  depend on how (A, B) factor the adapter, and the r^2 null directions per site have features of
  zero.
* `Adam`: `f = g / (sqrt(v) + eps)^(1/2)`. A coordinate's moves count as long where its gradients
  were large in training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from influence.adapter import AdaptedModel, ParamSpace
from influence.errors import InputError, NumericalError, StoreError

GEOMETRIES = ("raw", "function", "adam")

#: Singular values of B or A below this many units of rounding of the largest count as zero.
RANK_CUTOFF = 100

#: `sqrt(v)` of a coordinate counts as at least this share of its leaf's mean.
ADAM_FLOOR = 1e-3


class Geometry(Protocol):
    """A linear map T from gradients to features.

    Stacks of vectors are rows, `[K, P]`.
    """

    @property
    def name(self) -> str:
        """The geometry's name, one of `GEOMETRIES`."""
        ...

    @property
    def shares_inputs(self) -> bool:
        """Whether `factor` leaves the inputs of every A as they are, so that layers reading one
        tensor share a moment.
        """
        ...

    def features(self, rows: Tensor) -> Tensor:
        """`T g` for every row of `rows` [K, P]."""
        ...

    def of_leaf(self, leaf: int, gradients: Tensor) -> Tensor:
        """`T g` of one leaf, for its gradients `[K, d_out, d_in]`."""
        ...

    def adjoint(self, v: Tensor) -> Tensor:
        """`T^T v` for every row of `v` [K, P]."""
        ...

    def factor(self, leaf: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What K-FAC's factors of a leaf are formed of: `x'` and `g'` for inputs `x` [b, T, d_in],
        output gradients `g`.

        Where T maps the leaf's gradient as `G -> L G R`, `x' = x R` and `g' = g L^T`, so `sum_t
        g'_t x'_t^T` are the leaf's features.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """The tensors that `load_geometry` takes back."""
        ...


@dataclass(frozen=True)
class Raw:
    """The parameters' own coordinates: T = I."""

    name: str = field(default="raw", init=False)
    shares_inputs: bool = field(default=True, init=False)

    def features(self, rows: Tensor) -> Tensor:
        """`rows` [K, P] as they are."""
        return rows

    def of_leaf(self, leaf: int, gradients: Tensor) -> Tensor:
        """`gradients` as they are."""
        return gradients

    def adjoint(self, v: Tensor) -> Tensor:
        """`v` [K, P] as it is."""
        return v

    def factor(self, leaf: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and `g` as they are."""
        return x, g

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


# ---- function space ------------------------------------------------------------------------------


@dataclass(frozen=True)
class FunctionSpace:
    """The tangent space of `M = s B A`, in orthonormal coordinates.

    With `G = dl/dM` (never formed), U an orthonormal basis of B's columns and V of A's rows, the
    features of a site are G's projection on the tangent space `{X A + B Y}`, each part in the
    layout of its leaf:

        A:  U^T G             = L G_A,               L = ((s U^T B)^T)^+      [r, d_in]
        B:  (I - U U^T) G V   = (I - U U^T) G_B R,   R = (s V^T A^T)^+        [d_out, r]

    because `G_A = s B^T G` and `G_B = s G A^T`. `J^T J = I` in these coordinates, J = d vec(s B A)
    / d(A, B). U and V come in the order of the singular vectors of B A, so (A, B) -> (Q A, B Q^-1)
    changes no feature, up to the signs of singular vectors (and rotations among equal singular
    values), which act on the narrow side only.

    A rank below r is told from B's and A's own singular values (those under `RANK_CUTOFF` units of
    rounding times the largest count as zero): U and V then have fewer columns, and the features'
    remaining rows (of A) or columns (of B) are zero. That is still the exact projection. At a fresh
    adapter, B = 0, nothing but `G V` is left.

    `left` [r, r], `right` [r, r] and `U` [d_out, r] (missing columns zero), one of each per site,
    in float64.
    """

    space: ParamSpace
    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]
    U: tuple[Tensor, ...]
    name: str = field(default="function", init=False)
    shares_inputs: bool = field(default=True, init=False)

    def features(self, rows: Tensor) -> Tensor:
        """`U^T G` and `(I - U U^T) G V` of every site, for gradients `rows` [K, P]."""
        out = torch.empty_like(rows)
        parts = zip(self.space.split(rows), self.space.split(out), strict=True)
        for leaf, (given, place) in enumerate(parts):
            place.copy_(self.of_leaf(leaf, given))
        return out

    def of_leaf(self, leaf: int, gradients: Tensor) -> Tensor:
        """`U^T G` of an A, `(I - U U^T) G V` of a B."""
        site = leaf // 2
        if self.space.leaves[leaf].is_A:
            return self.left[site].to(gradients) @ gradients
        return self._off(site, gradients @ self.right[site].to(gradients))

    def adjoint(self, v: Tensor) -> Tensor:
        """The move of (A, B), `[K, P]`, that features `v` [K, P] stand for."""
        out = torch.empty_like(v)
        for number, (given, place) in enumerate(
            zip(self.space.split(v), self.space.split(out), strict=True)
        ):
            site = number // 2
            if self.space.leaves[number].is_A:
                place.copy_(self.left[site].T.to(v) @ given)
            else:
                place.copy_(self._off(site, given) @ self.right[site].T.to(v))
        return out

    def factor(self, leaf: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """A: `x` and `g L^T`.

        B: `x R` and `g (I - U U^T)`.
        """
        site = leaf // 2
        if self.space.leaves[leaf].is_A:
            return x, g @ self.left[site].T.to(g)
        return x @ self.right[site].to(x), self._off(site, g.mT).mT

    def _off(self, site: int, matrix: Tensor) -> Tensor:
        """`(I - U U^T) matrix` for matrices `[..., d_out, k]`."""
        U = self.U[site].to(matrix)
        return matrix - U @ (U.T @ matrix)

    def state(self) -> dict[str, Tensor]:
        """`left/SITE`, `right/SITE` and `U/SITE`."""
        parts = {"left": self.left, "right": self.right, "U": self.U}
        return {
            f"{name}/{site}": tensor
            for name, tensors in parts.items()
            for site, tensor in enumerate(tensors)
        }


def function_space(model: AdaptedModel) -> FunctionSpace:
    """The function-space geometry at the adapter's current parameters.

    Warns, naming how many, of sites whose B or A has a rank below r.
    """
    left, right, bases, short = [], [], [], 0
    for site in model.sites:
        A, B = (weight.detach().double() for weight in (site.A.weight, site.B.weight))
        cutoff = RANK_CUTOFF * torch.finfo(site.A.weight.dtype).eps
        # s belongs to the map, so it is divided out of both leaves' gradients
        L, R, U = _canonical(site.scaling * A, site.scaling * B, cutoff)
        left.append(L)
        right.append(R)
        bases.append(U)
        short += bool((L == 0).all(1).any() or (R == 0).all(0).any())
    if short:
        warnings.warn(
            f"{short} of {len(model.sites)} sites have an A or B of rank below r (a fresh "
            "adapter's B is zero): the "
            "missing directions have no part in the function-space features; train the adapter "
            "first if that is not meant",
            stacklevel=2,
        )
    return FunctionSpace(model.space, tuple(left), tuple(right), tuple(bases))


def _canonical(A: Tensor, B: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """`left` [r, r], `right` [r, r] and `U` [d_out, r] of one site, from `s A` [r, d_in] and `s B`
    [d_out, r].

    With thin `B = Q S Z^T` and `A^T = P D Y^T` (of the ranks that count) and `S Z^T Y D = u sigma
    w^T`: U = Q u, V = P w, `L = u^T S^-1 Z^T` solves `G_A = B^T G` for `U^T G`, and `R = Y D^-1 w`
    solves `G_B = G A^T` for `G V`.
    """
    r = A.shape[0]
    Q, S, Z = _thin(B, cutoff)
    _, D, Y = _thin(A.T, cutoff)
    u, _, w = torch.linalg.svd(S[:, None] * (Z.T @ Y) * D, full_matrices=True)
    left, right, U = A.new_zeros(r, r), A.new_zeros(r, r), B.new_zeros(B.shape[0], r)
    left[: len(S)] = (u.T / S) @ Z.T
    right[:, : len(D)] = (Y / D) @ w.T
    U[:, : len(S)] = Q @ u
    return left, right, U


def _thin(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a tall `[d, r]` matrix without its null space: left vectors [d, k], values [k],
    right vectors [r, k].
    """
    Q, core = torch.linalg.qr(matrix)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    k = int((values > cutoff * values[0]).sum())
    return Q @ left[:, :k], values[:k], right[:k].T


# ---- Adam ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adam:
    """The optimiser's own metric: `f = h g` elementwise, `h = (sqrt(v) + eps)^(-1/2)`, v its second
    moments.

    So `f_q . f_i = g_q^T diag(1 / (sqrt(v) + eps)) g_i`. `h` is `scale`, `[P]`; made by `of` from a
    trainer's second moments (`influence.optimizer_state.second_moments`), or by `from_rms` from
    gradients where there are none. `factor` takes h as separable within a leaf (the least-squares
    fit in log h), and is exact where it is.
    """

    space: ParamSpace
    scale: Tensor
    name: str = field(default="adam", init=False)
    shares_inputs: bool = field(default=False, init=False)

    @classmethod
    def of(cls, space: ParamSpace, v: Tensor, *, eps: float = 1e-8) -> Adam:
        """From bias-corrected second moments `v` [P].

        `sqrt(v)` counts as at least `ADAM_FLOOR` of its leaf's mean: a coordinate that no gradient
        ever reached would otherwise outweigh all others by up to eps^-1/2.
        """
        if v.shape != (space.size,):
            raise InputError(
                f"second moments of shape {tuple(v.shape)} were given; expected [{space.size}], "
                "one for each LoRA "
                "parameter in ParamSpace order"
            )
        if not bool((torch.isfinite(v) & (v >= 0)).all()):
            raise NumericalError(
                "the second moments hold NaN, infinity or negative values: take another checkpoint"
            )
        root = v.sqrt()
        for leaf in space.leaves:
            part = root[leaf.slice]
            part.clamp_(min=ADAM_FLOOR * float(part.mean(dtype=torch.float64)))
        return cls(space, (root + eps).rsqrt())

    @classmethod
    def from_rms(
        cls, space: ParamSpace, rows: Iterable[Tensor], weights: Tensor, *, eps: float = 1e-8
    ) -> Adam:
        """From training gradients: `v_j = mean_i (n w_i g_ij)^2`, as an optimiser with one row a
        step would see them.

        `rows` gives stacks `[b, P]` of gradients of the summed losses l_i, in the order of the
        objective's `weights` [n].
        """
        n = len(weights)
        total, seen = torch.zeros(space.size, dtype=torch.float64), 0
        for stack in rows:
            share = n * weights[seen : seen + len(stack)].to(stack)
            if len(share) == len(stack):
                total = total.to(stack.device) + (share[:, None] * stack).square().sum(
                    0, dtype=torch.float64
                )
            seen += len(stack)
        if seen != n or n == 0:
            raise InputError(
                f"{seen} gradient rows and {n} weights were given; expected one weight for each row"
            )
        return cls.of(space, total / n, eps=eps)

    @cached_property
    def separable(self) -> list[tuple[Tensor, Tensor]]:
        """Per leaf, `exp(a)` [d_out] and `exp(b)` [d_in] with `log h_ij ~ a_i + b_j`."""
        parts = []
        for h in self.space.split(self.scale):
            log = h.double().log()
            half = log.mean() / 2
            parts.append(((log.mean(1) - half).exp(), (log.mean(0) - half).exp()))
        return parts

    def features(self, rows: Tensor) -> Tensor:
        """`h g` for every row of `rows` [K, P]."""
        return rows * self.scale.to(rows)

    def of_leaf(self, leaf: int, gradients: Tensor) -> Tensor:
        """`h g` on the leaf's coordinates."""
        scale = self.scale[self.space.leaves[leaf].slice].to(gradients)
        return gradients * scale.unflatten(0, gradients.shape[1:])

    def adjoint(self, v: Tensor) -> Tensor:
        """`h v`: the map is symmetric."""
        return self.features(v)

    def factor(self, leaf: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """`x exp(b)` and `g exp(a)`."""
        a, b = self.separable[leaf]
        return x * b.to(x), g * a.to(g)

    def state(self) -> dict[str, Tensor]:
        """`scale`."""
        return {"scale": self.scale}


def load_geometry(name: str, space: ParamSpace, state: Mapping[str, Tensor]) -> Geometry:
    """A geometry from its name and what its `state` gave.

    Raises `StoreError` where a tensor is missing, has another shape than `space` asks for, or is
    not finite.
    """
    if name not in GEOMETRIES:
        raise InputError(f"geometry {name!r} was given; expected one of {', '.join(GEOMETRIES)}")
    shapes: dict[str, tuple[int, ...]] = {"scale": (space.size,)} if name == "adam" else {}
    if name == "function":
        for site, (A, B) in enumerate(zip(space.leaves[::2], space.leaves[1::2], strict=True)):
            r = A.shape[0]
            shapes |= {f"left/{site}": (r, r), f"right/{site}": (r, r), f"U/{site}": B.shape}
    for key, shape in shapes.items():
        found = tuple(state[key].shape) if key in state else None
        if found != shape or not bool(torch.isfinite(state[key]).all()):
            raise StoreError(
                f"the stored {name} geometry should hold {key} of shape {list(shape)}, all finite; "
                "found "
                f"{'no such tensor' if found is None else list(found)}: fit the run again"
            )
    if name == "raw":
        return Raw()
    if name == "adam":
        return Adam(space, state["scale"])
    sites = range(len(space.leaves) // 2)
    left, right, U = (
        tuple(state[f"{part}/{site}"] for site in sites) for part in ("left", "right", "U")
    )
    return FunctionSpace(space, left, right, U)
