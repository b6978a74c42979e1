"""Linear datamodeling score (LDS): do scores order retrained models as their losses do?

A score says what a query's loss does when one training example is removed. That is a claim about a
model nobody has trained, so it is checked on models somebody has: adapters retrained on random
subsets (usually halves) of the data. If effects add up, the scores also say which subsets leave a
query with a high loss and which with a low one, and

    LDS(q) = Spearman over the subsets S of ( prediction(S, q), loss(S, q) ),

with `loss(S, q)` the measured loss of query q under the adapter trained on S (Park et al. 2023,
arXiv 2303.14186, section 2). Only order counts: scores of any unit or scale may be compared, also
between methods.

**Sign.** Here `score[q, i]` is the predicted *change of the loss of q when i is removed* (the
convention of `influence.scores`; positive = proponent). Having i in the training data therefore
lowers the loss by it, and

    prediction(S, q) = sum_{i in S} -score[q, i].

A perfect additive predictor of the losses has an LDS of +1. Papers that score the change on
*adding* i, or a margin instead of a loss, have the opposite sign once or twice.

**Interval.** The resampled unit is the *retrained model*: subsets are drawn again with replacement,
all queries staying as they are, since the losses of all queries under one model share its luck. The
interval therefore says how much the answer depends on which subsets were retrained; it does not
cover another choice of queries, nor another seed of the retraining.

**Limits.** Noise of the retraining caps the score: where two seeds agree on the same subsets at a
mean Spearman of c, a perfect predictor of the expected loss scores about sqrt(c) against one seed.
A Spearman of few pairs is pulled towards zero (by about 2 % of its value at 40 subsets), and so are
its resamples; with hundreds of queries the interval gets short enough for that to show. Compare at
equal numbers of subsets.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.stats import Interval, bootstrap_interval, spearman
from influence.errors import InputError

#: Values that are ranked at once, of several resamples: calls take longer than few values.
AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class LDS:
    """Linear datamodeling score of one set of scores.

    Attributes
    ----------
    per_query : array [Q]
        Spearman correlation over the subsets; NaN where it is undefined.
    mean : float
        Mean over the queries for which it is defined; NaN if there is none.
    interval : Interval
        Bootstrap interval of that mean; the resampled unit is the subset, that is, the retrained
        model.
    subsets, queries : int
        S and Q.
    undefined : int
        Queries left out of the mean because their losses, or their predictions, are the same for
        every subset.
    """

    per_query: NDArray[np.float64]
    mean: float
    interval: Interval
    subsets: int
    queries: int
    undefined: int


@dataclass(frozen=True, eq=False)
class LDSDifference:
    """How much better (positive) method a orders the retrained models than method b.

    Attributes
    ----------
    per_query : array [Q]
        LDS of a less LDS of b; NaN where either is undefined.
    mean : float
        Mean over the queries for which both are defined; NaN if there is none.
    interval : Interval
        Paired bootstrap interval of that mean; both methods see the same resampled subsets.
    subsets, queries : int
        S and Q.
    undefined : int
        Queries left out of the mean.
    """

    per_query: NDArray[np.float64]
    mean: float
    interval: Interval
    subsets: int
    queries: int
    undefined: int


def lds(
    scores: ArrayLike,
    masks: ArrayLike,
    losses: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> LDS:
    """Mean over queries of Spearman's rho of predicted and measured losses.

    `LDS(q) = Spearman_S( sum_{i in S} -score[q, i], loss[S, q] )`; see the module for sign and
    interval. Predictions closer together than rounding count as ties.

    Parameters
    ----------
    scores : array_like [Q, n]
        Predicted change of the loss of query q when training example i is removed.
    masks : array_like of bool [S, n]
        True where example i was in the training data of retrained model S.
    losses : array_like [S, Q]
        Measured loss of query q under retrained model S.
    resamples, seed, level
        Of the bootstrap over the S subsets.

    Raises
    ------
    InputError
        If the shapes disagree, a value is NaN or infinite, or there are fewer than 3 subsets.
    """
    masks, losses = _check_truth(masks, losses)
    predictions = _predictions(scores, masks, losses, "scores")

    def per_query(subsets: NDArray[np.intp]) -> NDArray[np.float64]:
        return spearman(predictions[:, subsets], losses.T[:, subsets])

    return LDS(*_summary(per_query, len(masks), resamples, level, seed))


def lds_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    masks: ArrayLike,
    losses: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> LDSDifference:
    """Difference of the linear datamodeling scores of two methods, with a paired interval.

    `mean_q( LDS_a(q) - LDS_b(q) )`, both on the same resampled subsets. Two methods are judged by
    the same retrained models, so their errors go together and this interval is usually shorter than
    their two intervals suggest: compare methods by it, not by whether those overlap.

    Parameters
    ----------
    scores_a, scores_b : array_like [Q, n]
        Scores of the two methods, each as in `lds`.
    masks, losses, resamples, seed, level
        As in `lds`.

    Raises
    ------
    InputError
        As in `lds`.
    """
    masks, losses = _check_truth(masks, losses)
    predictions = np.stack(
        [
            _predictions(scores_a, masks, losses, "scores_a"),
            _predictions(scores_b, masks, losses, "scores_b"),
        ]
    )

    def per_query(subsets: NDArray[np.intp]) -> NDArray[np.float64]:
        a, b = spearman(predictions[:, :, subsets], losses.T[:, subsets])
        return a - b

    return LDSDifference(*_summary(per_query, len(masks), resamples, level, seed))


def _summary(
    per_query: Callable[[NDArray[np.intp]], NDArray[np.float64]],
    subsets: int,
    resamples: int,
    level: float,
    seed: int,
) -> tuple[NDArray[np.float64], float, Interval, int, int, int]:
    """Give the fields of a result, in order, from per-query values on selections of subsets:
    `per_query` gives [Q, ...] of indices [..., S].
    """

    def mean_of_defined(values: NDArray[np.float64]) -> float:
        defined = values[~np.isnan(values)]
        return float(defined.mean()) if defined.size else float("nan")

    values = per_query(np.arange(subsets))
    interval = bootstrap_interval(
        lambda selections: [mean_of_defined(each) for each in per_query(selections).T],
        subsets,
        together=max(1, AT_ONCE // values.size // subsets),
        resamples=resamples,
        level=level,
        seed=seed,
    )
    undefined = int(np.isnan(values).sum())
    return values, mean_of_defined(values), interval, subsets, len(values), undefined


def _predictions(
    scores: ArrayLike, masks: NDArray[np.bool_], losses: NDArray[np.float64], name: str
) -> NDArray[np.float64]:
    """Check scores and sum them over each subset: [Q, S]."""
    scores = np.asarray(scores, dtype=np.float64)
    queries, n = losses.shape[1], masks.shape[1]
    if scores.shape != (queries, n):
        raise InputError(
            f"{name} has shape {scores.shape}; with masks of shape {masks.shape} and losses of "
            f"shape {losses.shape}, [queries, train] = {(queries, n)} was expected: pass one row "
            "per query and one column per training example, in the order of the masks."
        )
    _refuse_not_finite(
        scores, name, "look for the queries or examples that gave them, and score those again"
    )
    # Subsets whose predictions are equal but for the order of summation must tie, not be ranked by
    # rounding.
    resolution = np.abs(scores).sum(axis=1, keepdims=True) * 2.0**-40
    predictions = -(scores @ masks.T.astype(np.float64))
    return np.round(predictions / np.where(resolution > 0, resolution, 1))


def _check_truth(
    masks: ArrayLike, losses: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Check masks [S, n] and losses [S, Q] against each other."""
    masks = np.asarray(masks)
    losses = np.asarray(losses, dtype=np.float64)
    if masks.dtype != np.bool_:
        raise InputError(
            f"masks has type {masks.dtype}; expected bool, True where a training example was kept: "
            "turn 0 and 1 into bool with masks.astype(bool), lists of indices into rows of True "
            "and False."
        )
    if masks.ndim != 2 or losses.ndim != 2 or len(masks) != len(losses):
        raise InputError(
            f"masks has shape {masks.shape} and losses {losses.shape}; expected [subsets, train] "
            "and [subsets, queries]: give both one row per retrained model (transpose if it is the "
            "columns)."
        )
    if len(masks) < 3:
        raise InputError(
            f"There are {len(masks)} retrained models; expected at least 3 for a rank correlation, "
            "and some dozens for a useful interval: retrain on more random halves."
        )
    _refuse_not_finite(
        losses, "losses", "measure those again, or leave out the retrained models that diverged"
    )
    return masks, losses


def _refuse_not_finite(values: NDArray[np.float64], name: str, advice: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise InputError(
            f"{name} has {len(bad)} NaN or infinite values, the first at {first}; expected finite "
            f"numbers: {advice}."
        )


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining measured: the file that `--truth` names.

    Attributes
    ----------
    masks : bool array [S, n]
        True where training example i was kept for retrained model S.
    query_loss : array [S, Q]
        Mean loss per completion token of each query under each retrained model, in nats.
    train_loss : array [S, n] or None
        The same of each training example, kept or not, where the file has it.
    extra : mapping
        The file's other arrays, by name, as they are.
    """

    masks: NDArray[np.bool_]
    query_loss: NDArray[np.float64]
    train_loss: NDArray[np.float64] | None = None
    extra: Mapping[str, NDArray] = field(default_factory=dict)


def read_truth(path: str | os.PathLike[str]) -> Truth:
    """Read the losses of retrained models from an `.npz` file (never unpickled).

    Parameters
    ----------
    path : path
        Holds `masks` [S, n], bool or 0 and 1, and `query_loss` [S, Q]; optionally `train_loss` [S,
        n]; others are carried along.

    Raises
    ------
    InputError
        If the file is not there, is not a plain `.npz`, lacks a key, or its arrays disagree.
    """
    arrays = _read_npz(path)
    missing = [key for key in ("masks", "query_loss") if key not in arrays]
    if missing:
        raise InputError(
            f"{path} has no {' and no '.join(missing)}; it holds "
            f"{', '.join(sorted(arrays)) or 'nothing'}, expected masks [subsets, train] and "
            "query_loss [subsets, queries]: write them with numpy.savez(path, masks=..., "
            "query_loss=...)."
        )
    masks = arrays.pop("masks")
    if np.issubdtype(masks.dtype, np.number) and np.isin(masks, (0, 1)).all():
        masks = masks.astype(bool)
    train_loss = arrays.pop("train_loss", None)
    try:
        masks, query_loss = _check_truth(masks, arrays.pop("query_loss"))
        if train_loss is not None:
            train_loss = np.asarray(train_loss, dtype=np.float64)
            if train_loss.shape != masks.shape:
                raise InputError(
                    f"train_loss has shape {train_loss.shape}; expected that of masks, "
                    f"{masks.shape}: write the loss of every training example under every "
                    "retrained model, or leave it out."
                )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Truth(masks, query_loss, train_loss, arrays)


def _read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            return {key: file[key] for key in file.files}
    except FileNotFoundError:
        raise InputError(
            f"There is no file {path}; expected an .npz of retrained losses: check the path."
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds no plain arrays" if "pickle" in str(error) else str(error)
        raise InputError(
            f"{path} cannot be read ({reason}); expected an .npz of plain arrays: write one with "
            "numpy.savez, without arrays of Python objects."
        ) from error
