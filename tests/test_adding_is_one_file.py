"""A curvature and a solver that no other file knows: everything the toolkit does, done with them.

The curvature is the diagonal Fisher: `C = diag(sum_i w_i G_i^2)` at labels sampled from the model. The solver is Richardson's
iteration. (A method of one's own is in `unlearn/methods/test_methods.py`, an optimizer of the difficulty in
`unlearn/difficulty/test_protocol.py`, a metric in `analysis/evaluation`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import influence
import unlearn
from analysis.tune import tune
from influence import Run, distributed
from influence.at_point import AtPoint
from influence.curvature import Accumulator, Curvature, Specification
from influence.errors import InputError, MismatchError
from influence.fitted_point import PointFit, Storage, accumulate
from influence.solvers import Solution
from tests.conftest import build_model, examples
from tests.helpers import in_two_processes
from tests.influence.toy_runs import Interruption, interrupt_after
from tests.oracles import sampled_rows

N, BUDGET, PATH = 14, 30, (0.5, 0.9)


# ---- the curvature: one file ---------------------------------------------------------------------


@dataclass(frozen=True)
class DiagonalFisher(Specification):
    """The diagonal Fisher from `samples` label draws a row."""

    samples: int = 1
    name: str = field(default="diagonal-fisher", init=False)

    @property
    def draws(self) -> int:
        return self.samples

    def begin(self, point: AtPoint) -> Accumulator:
        return Squares(torch.zeros(point.model.space.size, dtype=torch.float64))

    def load(self, arrays, point: AtPoint) -> Curvature:
        blocks = tuple(leaf.slice for leaf in point.model.space.leaves)
        return Diagonal(arrays["diagonal"], blocks, self.samples)


@dataclass
class Squares(Accumulator):
    """`sum_i w_i G_i^2`."""

    total: torch.Tensor
    per_row = True

    def add_rows(self, features, weights) -> None:
        self.total += (features.double().square() * weights[:, None]).sum(0)

    def sums(self):
        return {"total": self.total}

    def finish(self, rows):
        return {"diagonal": self.total}


@dataclass(frozen=True)
class Diagonal(Curvature):
    """`diag(d)`, one damping block per leaf."""

    d: torch.Tensor
    slices: tuple[slice, ...]
    samples: int = 1
    name: str = "diagonal-fisher"
    in_memory = True

    @property
    def blocks(self) -> tuple[slice, ...]:
        return self.slices

    def matvec(self, v):
        return v * self.d.to(v)

    def solve(self, v, lam):
        damping = self.spread(lam, self.d)
        return (v.double() / (self.d + damping)).to(v)

    def mean_eigenvalues(self):
        return torch.stack([self.d[block].mean() for block in self.slices])

    def top_eigenvalues(self):
        return torch.stack([self.d[block].max() for block in self.slices])

    def updated(self, gone, come):
        d = self.d.clone()
        for changed, sign in ((gone, -1.0), (come, 1.0)):
            for rows, features in changed.sampled(self.samples):
                share = torch.from_numpy(sign * changed.weights[rows] / self.samples)
                d += (features.double().square() * share[:, None]).sum(0)
        return replace(self, d=d.clamp(min=0))


# ---- the solver: one file ------------------------------------------------------------------------


@dataclass(frozen=True)
class Richardson:
    """`x <- x + (v - (C + lambda I) x) / c`, c above the top eigenvalue."""

    iterations: int = 4000
    tolerance: float = 1e-9
    name: str = "richardson"
    approximate: bool = False

    def solve(self, operator, v) -> Solution:
        c = float((operator.curvature.top_eigenvalues() + operator.lam).max())
        x = torch.zeros_like(v)
        for _ in range(self.iterations):
            x = x + (v - operator.matvec(x)) / c
        count = torch.full((len(v),), self.iterations)
        return Solution.checked(operator, v, x, self.tolerance, count)


# ---- what must work ------------------------------------------------------------------------------


def small_model():
    # GPT-2: a Llama computes its norms in float32
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn"])


def fit(directory, **options) -> Run:
    options = {"curvature": DiagonalFisher(), "path": PATH, "token_budget": BUDGET} | options
    return influence.fit(small_model(), examples(N), directory=directory, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return fit(tmp_path_factory.mktemp("diagonal") / "run")


def test_the_fitted_diagonal_is_that_of_a_plain_loop(run):
    for point in run.points:
        with run.model.at(point.place.theta):
            rows = torch.stack(sampled_rows(run.model, run.tokens, samples=1))
        expected = (rows**2 * torch.from_numpy(run.weights)[:, None]).sum(0)
        fitted = point.curvature()
        assert isinstance(fitted, Diagonal)
        torch.testing.assert_close(fitted.d, expected, rtol=1e-10, atol=0)


def test_scores_are_the_formula_and_open_again(run, tmp_path):
    queries = examples(3, seed=9)
    scores = run.score(queries, at="0.9", out=tmp_path / "scores.h5")
    point = run.points[1]
    operator = point.operator()
    damped = point.curvature().d + operator.diagonal(torch.zeros(1, dtype=torch.float64))
    gradients = torch.cat([rows for _, rows in point.gradient_blocks()])
    order = np.concatenate([indices for indices, _ in point.gradient_blocks()])
    asked = point.query_gradients(run.tokenized(queries), influence.measurements.MeanLoss())
    expected = (asked / damped) @ gradients.T * torch.from_numpy(run.weights[order])
    np.testing.assert_allclose(scores.values[:, order], expected, rtol=1e-4, atol=1e-9)
    assert scores.attributes["curvature"] == "diagonal-fisher"

    again = Run.open(run.directory, model=run.model, train=run.train, curvature=DiagonalFisher())
    np.testing.assert_array_equal(again.score(queries, at="0.9").values, scores.values)
    own = again.self_influence()
    assert (own.values > 0).all()
    assert run.score(queries, per_token=True, per_module=True).modules is not None


def test_a_run_of_it_is_opened_with_it_or_refused_by_name(run):
    options = {"model": run.model, "train": run.train}
    with pytest.raises(InputError, match=r"'diagonal-fisher', which is none of ekfac, .*Run.open"):
        Run.open(run.directory, **options).curvature()
    with pytest.raises(MismatchError, match=r"samples=2.*was fitted with diagonal-fisher"):
        Run.open(run.directory, curvature=DiagonalFisher(samples=2), **options).curvature()


@pytest.mark.slow
@pytest.mark.parametrize("store", ["always", "never"])
def test_killed_after_any_batch_and_resumed_it_is_the_same_bit_for_bit(
    tmp_path, monkeypatch, store
):
    monkeypatch.setattr("influence.fitted_point.CHECKPOINT_SECONDS", -1)  # after every batch
    whole = fit(tmp_path / "whole", store=store)
    for batches in (1, 3):
        place = tmp_path / f"killed-{batches}"
        with monkeypatch.context() as patch:
            interrupt_after(patch, batches)
            with pytest.raises(Interruption):
                fit(place, store=store)
        resumed = fit(place, store=store)
        for one, other in zip(whole.points, resumed.points, strict=True):
            assert torch.equal(one.curvature().d, other.curvature().d)
        queries = examples(2, seed=9)
        np.testing.assert_array_equal(whole.score(queries).values, resumed.score(queries).values)


def test_sums_of_two_processes_are_those_of_one(run, tmp_path):
    point = AtPoint(run, 0, run.points[0].place)

    def sums(rank: int, world: int) -> dict[str, torch.Tensor]:
        with run.model.at(point.place.theta):
            fitting = PointFit(point, DiagonalFisher(), Storage(False, "never", 0), None)
            return accumulate(fitting, fitting.batches[rank::world])

    def share(rank: int) -> None:
        torch.save(distributed.add_up(sums(rank, 2)), tmp_path / f"sums-{rank}.pt")

    in_two_processes(share, tmp_path)
    whole = sums(0, 1)["total"]
    for rank in range(2):
        added = torch.load(tmp_path / f"sums-{rank}.pt", weights_only=True)["total"]
        torch.testing.assert_close(added, whole, rtol=1e-12, atol=0)
    assert not torch.equal(sums(0, 2)["total"], whole)  # half of the rows is not all of them


@pytest.mark.parametrize("curvature", [influence.KFAC(), influence.EKFAC(samples=2)])
def test_both_looks_of_ekfac_add_up_over_processes(run, tmp_path, curvature):
    """Each process has its share of the rows: of the pass, and of the second look."""
    point = AtPoint(run, 0, run.points[0].place)

    def finished(rank: int, world: int, together) -> dict[str, torch.Tensor]:
        with run.model.at(point.place.theta):
            fitting = PointFit(point, curvature, Storage(False, "never", 0), None)
            together(accumulate(fitting, fitting.batches[rank::world]))
            accumulator, rows = fitting.accumulator, fitting.sampled_rows()
            if (second := accumulator.second_look()) is not None:
                start = 0
                for number, block in enumerate(rows):
                    if number % world == rank:
                        second.add_rows(block, rows.weights[start : start + len(block)])
                    start += len(block)
                together(second.sums())
                accumulator = second
            return accumulator.finish(rows)

    def share(rank: int) -> None:
        torch.save(finished(rank, 2, distributed.add_up), tmp_path / f"arrays-{rank}.pt")

    in_two_processes(share, tmp_path)
    whole = finished(0, 1, lambda sums: sums)
    made = torch.load(tmp_path / "arrays-1.pt", weights_only=True)
    assert made.keys() == whole.keys()
    for name in (name for name in whole if name.endswith(("eigenvalues", "rest"))):
        torch.testing.assert_close(made[name], whole[name], rtol=1e-8, atol=1e-14)


def test_a_curvature_without_draws_or_with_anothers_name_is_refused(tmp_path):
    class Drawless(DiagonalFisher):
        draws = 0

    class Borrowed(DiagonalFisher):
        name = "ekfac"

    Nameless = type("Nameless", (DiagonalFisher,), {"name": None})
    cases = {Drawless: "makes no label draws", Borrowed: "as EKFAC is", Nameless: "has no name"}
    for kind, sentence in cases.items():
        specification = kind()
        if kind is not Drawless:
            object.__setattr__(specification, "name", kind.name)
        with pytest.raises(InputError, match=sentence):
            fit(tmp_path / "run", curvature=specification)


def test_tune_sweeps_it(tmp_path):
    run = fit(tmp_path / "run")
    found = tune(run, dampings=("mean:0.1", "mean:1"))
    assert {one.curvature for one in found.judged} == {"diagonal-fisher", "identity"}


def test_a_removal_solves_with_the_curvature_after_it(tmp_path):
    """One shot, one point: the edit by hand, with the fit of the rows that stay at the fit's lambda."""
    run = fit(tmp_path / "run", path=(1.0,))
    gone = [2, 5]
    edit = unlearn.remove(run, [run.train.ids[i] for i in gone], steps=1)
    stay = [i for i in range(N) if i not in gone]
    with run.model.at(run.points[0].place.theta):
        rows = torch.stack(sampled_rows(run.model, run.tokens, samples=1))
    w = torch.from_numpy(run.weights)
    after = (rows[stay] ** 2 * w[stay, None]).sum(0)
    lam = run.points[0].operator().diagonal(torch.zeros(1, dtype=torch.float64))
    gradients = run.points[0].gradients_of(np.array(gone))
    expected = (gradients * w[gone, None]).sum(0) / (after + lam)
    torch.testing.assert_close(edit.delta, expected, rtol=1e-8, atol=1e-12)
    saved = edit.save(tmp_path / "edited", force=True)
    assert unlearn.verify(run.directory).passed
    assert (saved / "adapter_model.safetensors").exists()


def test_difficulty_is_forecast_with_it(run):
    forecast = unlearn.difficulty.predict(run, run.train.ids[:3])
    table = forecast.table
    assert len(table) == 3
    assert np.isfinite(table["self_influence"]).all()
    # the closed form of the damage is d^T C d / 2 by its product, averaged over the points
    from unlearn.difficulty.coarse_ascent import closed_form

    d = torch.randn(2, run.model.space.size, dtype=torch.float64)
    mean = torch.stack([point.curvature().d for point in run.points]).mean(0)
    np.testing.assert_allclose(closed_form(run, d), ((d * d) @ mean / 2).numpy(), rtol=1e-10)


def test_a_curvature_that_does_not_say_how_it_changes_cannot_be_made():
    class Forgetful(Curvature):
        blocks = (slice(0, 1),)
        matvec = mean_eigenvalues = top_eigenvalues = None

    with pytest.raises(TypeError, match="updated"):
        Forgetful()


def test_a_solver_of_ones_own_scores_and_edits(run, tmp_path):
    queries = examples(2, seed=9)
    direct = run.score(queries)
    ours = run.score(queries, solver=Richardson())
    assert ours.converged.all()
    np.testing.assert_allclose(ours.values, direct.values, rtol=1e-4, atol=1e-9)
    assert ours.attributes["solver"] == "richardson"
    edits = [
        unlearn.remove(run, [run.train.ids[1]], steps=1, solver=solver).delta
        for solver in ("direct", Richardson())
    ]
    torch.testing.assert_close(edits[1], edits[0], rtol=1e-5, atol=1e-9)
