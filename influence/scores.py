"""Influence scores, their sign and their unit.

The convention, said once:

* `l_i(theta)` is the **sum** over the supervised tokens of example i of the cross-entropy, in nats; the training
  objective is `J = sum_i w_i l_i`, with `w_i = 1/N_tok` (reduction `token`) or `1/(n T_i)` (`example`).
* `score[q, i] = w_i grad m(q)^T (C + lambda I)^-1 grad l_i` is the **predicted change of measurement m(q) when
  example i is removed** from training. With m = loss (mean cross-entropy over the query's completion tokens, in
  nats): positive, removing i raises the query's loss, it helped: a *proponent*; negative: an *opponent*.
* `self_influence[i]` is the predicted rise of example i's own mean loss if it is removed, in nats per token.
* Scores of several rows add up: the predicted change for a removed set is the sum over it.

First-order in the weight of the removed row (Koh & Liang 2017, arXiv 1703.04730; with a proximal reading of the
adapter as the optimum, Bae et al. 2022, arXiv 2209.05364).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch
from torch import Tensor

from influence.curvature.base import Damped
from influence.damping import Damping
from influence.data import Examples, TokenizedExamples, tokenize
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.gradients import stream_gradients
from influence.loss import MEASUREMENTS, MeanLoss, Measurement, check_rows
from influence.progress import say
from influence.run import Run
from influence.solvers import CG, Direct, Solver
from influence.store import only_writer, open_file, open_rows, read, read_strings, write_file

CONVENTION = (
    "score[q, i] = w_i * grad m(q)^T (C + lambda I)^-1 grad l_i: predicted change of measurement m(q) when training "
    "row i is removed; with m = loss, positive = proponent (removing it raises the query's loss), negative = opponent"
)
SELF_CONVENTION = (
    "self_influence[i] = w_i / T_i * grad l_i^T (C + lambda I)^-1 grad l_i: predicted rise of row i's own mean loss, in "
    "nats per token, if it is removed"
)
#: Share of the free memory that the gradients of one chunk of queries may take.
QUERY_SHARE = 0.2


@dataclass(frozen=True)
class Entry:
    """One training row in a ranking: its id, its position in the training set, and its score."""

    id: str
    index: int
    score: float


@dataclass(frozen=True)
class Scores:
    """Influence of every training row on every query: `values` float32 [query, train]; see the module's convention."""

    values: np.ndarray = field(repr=False)
    query_ids: list[str] = field(repr=False)
    train_ids: list[str] = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    converged: np.ndarray = field(repr=False)
    attributes: dict[str, Any] = field(default_factory=dict)

    def query_index(self, query: int | str) -> int:
        """Position of a query given by position or id; an unknown one is an `InputError`."""
        if isinstance(query, str) and query in self.query_ids:
            return self.query_ids.index(query)
        try:
            index = int(query)
        except ValueError:
            index = -1
        if not 0 <= index < len(self.query_ids):
            shown = ", ".join(self.query_ids[:5]) + (", ..." if len(self.query_ids) > 5 else "")
            raise InputError(
                f"query {query!r} was given; there are {len(self.query_ids)} scored queries: give a position "
                f"0..{len(self.query_ids) - 1} or one of the ids {shown}"
            )
        return index

    def top(self, query: int | str, k: int = 10) -> tuple[list[Entry], list[Entry]]:
        """The k strongest proponents (most positive first) and the k strongest opponents (most negative first)."""
        row = self.values[self.query_index(query)]
        order = np.argsort(-row, kind="stable")
        entry = lambda i: Entry(self.train_ids[i], int(i), float(row[i]))  # noqa: E731
        proponents = [entry(i) for i in order[:k] if row[i] > 0]
        opponents = [entry(i) for i in order[::-1][:k] if row[i] < 0]
        return proponents, opponents

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a score file; plain h5py reads it as well."""
        path = Path(path)
        with open_file(path) as file:
            missing = [key for key in ("scores", "query_ids", "train_ids") if key not in file]
            if missing:
                raise StoreError(f"{path} is no score file: it lacks {', '.join(missing)}")
            if not file.attrs.get("complete", True):
                raise StoreError(f"{path} is unfinished: run the same influence score command again to complete it")
            return cls(
                read(file, "scores"),
                read_strings(file, "query_ids"),
                read_strings(file, "train_ids"),
                read(file, "residuals") if "residuals" in file else np.array([]),
                read(file, "converged").astype(bool) if "converged" in file else np.array([]),
                dict(file.attrs),
            )


@dataclass(frozen=True)
class SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed: `values` float32 [train], nats per token."""

    values: np.ndarray
    train_ids: list[str]
    worst_residual: float
    attributes: dict[str, Any] = field(default_factory=dict)


def score(
    run: Run,
    queries: Examples,
    *,
    out: str | Path | None = None,
    solver: str | Solver = "direct",
    curvature: str | None = None,
    damping: str | Damping | None = None,
    measurement: str | Measurement = "loss",
    overwrite: bool = False,
) -> Scores:
    """Influence of every training row of a run on every query.

    Parameters
    ----------
    run, queries
        A finished run and the rows whose measurement is explained.
    out
        Write a score file here, row block by row block; killed and called again, it goes on where it was. Without
        it the scores stay in memory. A file with the very same scores is returned at once; one of anything
        else is an error unless `overwrite`.
    solver
        `direct`, `cg`, `pcg` (CG preconditioned by the run's EK-FAC), or a solver object.
    curvature, damping
        Another curvature of this run (see `Run.curvature`) or another damping rule than the fit's.
    measurement
        `loss` (mean cross-entropy, nats), `margin` (mean log-odds of the right token), or a measurement object.

    With stored gradients no training row is run again. Columns that did not converge are flagged in `converged`
    and said on standard error.
    """
    if len(queries) == 0:
        raise InputError("no queries were given; give at least one row")
    explained: Measurement = _named(measurement, MEASUREMENTS, "measurement")
    operator = run.operator(curvature, damping)
    chosen = make_solver(run, solver, operator)
    tokens = tokenize(queries, run.model.tokenizer, max_length=run.manifest["objective"]["max_length"])
    attributes = {
        "convention": CONVENTION,
        "measurement": explained.name,
        "unit": explained.unit,
        **_provenance(run, operator, chosen, damping),
        "options": f"{explained} {_options(chosen)}",
        "query_digest": queries.digest,
        "complete": False,
    }
    check_rows(run.model, tokens)
    target = None if out is None else Path(out)
    found = _existing(target, attributes) if target is not None and target.exists() and not overwrite else None
    if found is not None:
        return found
    with nullcontext() if target is None else only_writer(target):
        return _score(run, queries, tokens, explained, operator, chosen, attributes, target)


def _score(
    run: Run,
    queries: Examples,
    tokens: TokenizedExamples,
    measurement: Measurement,
    operator: Damped,
    solver: Solver,
    attributes: dict[str, Any],
    target: Path | None,
) -> Scores:
    """Solve a chunk of queries, then pass over the training gradients once for it; into a file if there is one."""
    shape, chunks = (len(queries), len(run.train)), -(-len(queries) // _queries_at_once(run))
    partial = None if target is None else target.with_name(target.name + ".partial")
    if partial is not None:
        chunks = _lay_out(partial, run, queries, shape, chunks, attributes)
        names = ("scores", "done", "residuals", "converged")
        values, done, residuals, converged = (open_rows(partial, name, write=True) for name in names)
    else:
        values, done = np.zeros(shape, np.float32), np.zeros((chunks, shape[1]), np.uint8)
        residuals, converged = np.zeros(shape[0]), np.zeros(shape[0], np.uint8)
    if chunks > 1:
        what = "the stored gradients" if run.gradients_stored else "the training rows, forward and backward"
        say(f"{len(queries)} queries do not fit in memory at once: {chunks} passes over {what}")

    message = ""
    for number, rows in enumerate(np.array_split(np.arange(len(queries)), chunks)):
        if done[number].all():
            continue
        solution = solver.solve(operator, query_gradients(run, tokens.select(rows), measurement))
        residuals[rows], converged[rows] = solution.residuals.numpy(), solution.converged.cpu().numpy()
        message = solution.message or message
        for indices, gradients in run.gradient_blocks(skip=done[number].astype(bool)):
            weighted = solution.values @ gradients.T * torch.from_numpy(run.weights[indices]).to(gradients)
            values[np.ix_(rows, indices)] = weighted.cpu().numpy()
            done[number, indices] = 1
    if not np.isfinite(values).all():
        raise NumericalError("scores hold NaN or infinity: raise the damping, or run with --dtype float32 or float64")
    if message:
        say(f"warning: {message}")
    attributes["residuals"], attributes["complete"] = float(residuals.max()), True
    if target is not None and partial is not None:
        result = Scores(
            np.array(values), queries.ids, run.train.ids, np.array(residuals), converged.astype(bool), attributes
        )
        del values, done, residuals, converged
        _seal(partial, target, attributes, run.digest)
        return result
    return Scores(values, queries.ids, run.train.ids, residuals, converged.astype(bool), attributes)


def _queries_at_once(run: Run) -> int:
    """Queries whose gradients, with those that solving needs beside them, fit into a share of the free memory."""
    if run.model.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.model.device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, int(QUERY_SHARE * free / (run.model.space.size * 4)))


def query_gradients(run: Run, tokens: TokenizedExamples, measurement: Measurement) -> Tensor:
    """Gradients of m(q), `[Q, P]`, in query order."""
    out = torch.empty(len(tokens), run.model.space.size, dtype=run.model.dtype, device=run.model.device)
    budget = run.manifest["token_budget"]
    for rows, gradients, _ in stream_gradients(run.model, tokens, measurement=measurement, token_budget=budget):
        out[torch.from_numpy(rows)] = gradients
    return out


def self_influence(
    run: Run,
    *,
    out: str | Path | None = None,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    overwrite: bool = False,
) -> SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed, `[train]`, nats per token.

    Solved directly where the curvature has a closed form, else by CG (preconditioned where the run has EK-FAC
    factors). `out` may be a score file of the same run; the values are added to it.
    """
    operator = run.operator(curvature, damping)
    exact = operator.curvature.name in ("ggn", "hessian")
    solver = make_solver(
        run, ("pcg" if run.fitted_name in ("ekfac", "kfac") else "cg") if exact else "direct", operator
    )
    attributes = {"convention": SELF_CONVENTION, "unit": MeanLoss().unit, **_provenance(run, operator, solver, damping)}
    target = None if out is None else Path(out)
    if target is not None and (found := _existing_self(target, run, attributes, overwrite)) is not None:
        return found
    values = np.empty(len(run.train), np.float32)
    worst = 0.0
    for indices, gradients in run.gradient_blocks():
        for part, rows in zip(
            gradients.split(256), np.array_split(indices, range(256, len(indices), 256)), strict=True
        ):
            solution = solver.solve(operator, part)
            worst = max(worst, float(solution.residuals.max()))
            share = torch.from_numpy(run.weights[rows] / run.tokens.counts[rows])
            values[rows] = ((part * solution.values).double().sum(1).cpu() * share).numpy()
    attributes["residuals"] = worst
    if not np.isfinite(values).all():
        raise NumericalError("self-influences hold NaN or infinity: raise the damping, or run in float32 or float64")
    result = SelfInfluence(values, run.train.ids, worst, attributes)
    if target is not None:
        with only_writer(target):
            _write_self(target, run, result)
    return result


def make_solver(run: Run, solver: str | Solver, operator: Damped) -> Solver:
    """A solver by name, with the run's preconditioner where it needs one; a solver object as it is."""
    if not isinstance(solver, str):
        return solver
    if solver == "pcg":
        return CG(preconditioner=run.preconditioner(operator), name="pcg")
    solvers: dict[str, Solver] = {"direct": Direct(), "cg": CG()}
    return _named(solver, solvers, "solver", also=("pcg",))


def _options(solver: Solver) -> str:
    """A solver's own numbers, for the record (its preconditioner is told by its name)."""
    return ", ".join(f"{key}={value}" for key, value in vars(solver).items() if isinstance(value, int | float | str))


def _named(value: Any, table: dict[str, Any], what: str, also: Sequence[str] = ()) -> Any:
    if not isinstance(value, str):
        return value
    if value not in table:
        raise InputError(f"{what} {value!r} was given; expected one of {', '.join([*table, *also])}")
    return table[value]


# ---- the score file ------------------------------------------------------------------------------------------


def _provenance(run: Run, operator: Damped, solver: Solver, damping: str | Damping | None) -> dict[str, Any]:
    identity = operator.curvature.name == "identity"
    return {
        "curvature": operator.curvature.name,
        "solver": solver.name,
        "damping": "none" if identity else str(Damping.parse(damping or run.manifest["damping"])),
        "lambda": operator.lam.numpy(),
        "run_digest": run.digest,
        "base_digest": run.manifest["base"]["digest"],
        "adapter_digest": run.manifest["adapter"]["digest"],
        "data_digest": run.manifest["data"]["digest"],
        "version": run.manifest["versions"]["lora-influence"],
    }


def _different(found: Mapping[str, Any], attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes in which what is stored differs from what is asked now."""

    def same(one: Any, other: Any) -> bool:
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.kind == "f" and one.shape == other.shape:
            return np.allclose(one, other, rtol=1e-6, atol=0)  # a device's sums may differ in their last bits
        return np.array_equal(one, other)

    keys = [key for key in attributes if key not in ("residuals", "complete", "version")]
    return [key for key in keys if key not in found or not same(found[key], attributes[key])]


def _existing(target: Path, attributes: dict[str, Any]) -> Scores | None:
    """The scores of the very same request; None where the file holds a self-influence of this run only."""
    with open_file(target) as file:
        only_self = set(file) == {"self_influence", "train_ids"}
        if only_self and file.attrs.get("run_digest") == attributes["run_digest"]:
            return None
        different = _different(file.attrs, attributes) if "scores" in file else ["it is no score file: all"]
    if different:
        raise MismatchError(
            f"{target} holds other scores ({', '.join(different)} differ): give another --out, or --overwrite to "
            "replace them"
        )
    return Scores.load(target)


def _lay_out(
    partial: Path, run: Run, queries: Examples, shape: tuple[int, int], chunks: int, attributes: dict[str, Any]
) -> int:
    """Create the partial file, unless a killed call with the same request left one to go on with.

    Returns the number of chunks the queries are in: the one that was begun with.
    """
    if partial.exists():
        try:
            with open_file(partial) as file:
                ours, same = "convention" in file.attrs, not _different(file.attrs, attributes)
                begun = read(file, "done").shape[0]
        except (StoreError, MismatchError):
            ours, same, begun = False, False, 0
        if same:
            say(f"resuming {partial}")
            return begun
        if not ours:
            raise MismatchError(f"{partial} is in the way and is no unfinished score file: move it away")
        partial.unlink()
    write_file(
        partial,
        attrs=attributes,
        strings={"query_ids": queries.ids, "train_ids": run.train.ids},
        rows={
            "scores": (shape, np.float32),
            "residuals": ((shape[0],), np.float64),
            "converged": ((shape[0],), np.uint8),
            "done": ((chunks, shape[1]), np.uint8),
        },
    )
    return chunks


def _seal(partial: Path, target: Path, attributes: dict[str, Any], run_digest: str) -> None:
    """Complete the partial file's attributes, keep a self-influence the target held, and move it into place."""
    with h5py.File(partial, "r+") as file:
        file.attrs.update(attributes)
        with suppress(StoreError), open_file(target) as old:  # a missing or damaged target has nothing to keep
            kept = cast("h5py.Dataset | None", old.get("self_influence"))
            if kept is not None and kept.attrs.get("run_digest") == run_digest:
                old.copy("self_influence", file)
    os.replace(partial, target)


def _existing_self(target: Path, run: Run, attributes: dict[str, Any], overwrite: bool) -> SelfInfluence | None:
    """The stored self-influence of the very same request; None where there is none; anything else is refused."""
    if not target.exists():
        return None
    with open_file(target, run_digest=run.digest) as file:
        if not set(file) & {"scores", "self_influence"}:
            raise MismatchError(f"{target} is no score file: give another --out")
        dataset = cast("h5py.Dataset | None", file.get("self_influence"))
        if dataset is None or overwrite:
            return None
        different = _different(dataset.attrs, attributes)
        values, found = dataset[()], dict(dataset.attrs)
    if different:
        raise MismatchError(
            f"{target} holds another self-influence ({', '.join(different)} differ): give another --out, or --overwrite"
        )
    return SelfInfluence(values, run.train.ids, float(np.asarray(found["residuals"])), found)


def _write_self(target: Path, run: Run, result: SelfInfluence) -> None:
    partial = target.with_name(target.name + ".self.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.copyfile(target, partial)
    else:
        write_file(partial, attrs={"run_digest": run.digest}, strings={"train_ids": run.train.ids})
    with h5py.File(partial, "r+") as file:
        if "self_influence" in file:
            del file["self_influence"]
        file.create_dataset("self_influence", data=result.values).attrs.update(result.attributes)
    os.replace(partial, target)
