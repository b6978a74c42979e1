"""Runs that several processes make together: the same as one process's, killed and resumed."""

from __future__ import annotations

import functools
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import influence
import influence.at_point as at_point_module
from influence import EKFAC, GGN, Fisher, Identity, Run, distributed
from influence.credit import credited
from influence.measurements import MeanLoss
from influence.scores import raw_parts
from tests.conftest import build_model, examples, teach
from tests.helpers import statuses

N_ROWS, BUDGET = 23, 40

#: What is fitted, whether gradients are stored, and the points.
KINDS = {
    "ekfac": (EKFAC(), "always", (0.5, 0.9)),
    "ekfac, nothing stored": (EKFAC(samples=2), "never", (0.7,)),
    "ekfac, sketched": (EKFAC(max_width=4, rank=3, memory_share=0), "always", (0.7,)),
    "fisher": (Fisher(), "always", (0.7,)),
    "ggn": (GGN(), "always", (0.5, 0.9)),
    "identity": (Identity(), "always", (1.0,)),
}


@functools.cache
def model(dtype: torch.dtype = torch.float64):
    options = {"layers": 1, "target_modules": ["q_proj", "v_proj"], "dtype": dtype}
    return teach(build_model("llama", **options), examples(N_ROWS), steps=5)


def fit(directory: Path, kind: str = "ekfac", dtype: torch.dtype = torch.float64, **options) -> Run:
    curvature, store, path = KINDS[kind]
    options = {"token_budget": BUDGET, "reduction": "example"} | options
    return influence.fit(
        model(dtype),
        examples(N_ROWS),
        directory=directory,
        curvature=curvature,
        store=store,
        path=path,
        **options,
    )


def answers(run: Run, kind: str = "ekfac") -> dict[str, np.ndarray]:
    """Everything that is asked of a run, as arrays."""
    queries = examples(5, seed=9)
    solver = influence.CG(max_iterations=3) if kind == "ggn" else "direct"
    detail = {"per_module": True, "per_token": True}
    scores = run.score(queries, solver=solver, out=run.directory / "scores.h5", **detail)
    found = {
        "scores": scores.values,
        "modules": scores.modules,
        "tokens": scores.tokens.values,
        "residuals": scores.residuals,
        "set": run.score(queries, solver=solver, aggregate="mean").values,
        "additive": run.score(queries[:1], solver=solver, credit="additive").values,
    }
    if kind != "ggn":  # which needs hundreds of products for every row
        place = run.directory / "scores.h5"
        found["self"] = run.self_influence(out=place, credit="additive").values
    if kind.startswith(("ekfac", "fisher")):
        found["shared self"] = run.self_influence().values
        effect = run.without([run.train.ids[3], run.train.ids[4]], queries)
        losses = [each.predicted for each in (*effect.queries, *effect.removed)]
        found["without"] = np.array(losses)
        setting, credit = credited(run)
        raw = raw_parts(setting, run.query_tokens(queries), MeanLoss())
        found |= {"raw": raw, "in float64": credit.singles(raw)}
        found["self in float64"] = credit.self_influence(run.tokens.counts)
    return found


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal to rounding: of float32, 1e-7 of the largest number is one bit."""
    assert list(one) == list(other)
    for name, values in one.items():
        size = np.abs(values).max()
        assert size > 0 or name == "residuals", name
        bits = 3e-7 if values.dtype == np.float32 else 0
        allowed = max(tolerance, bits) * size + (1e-10 if name == "residuals" else 0)
        assert np.abs(values - other[name]).max() <= allowed, name


def same_rows(one: Path, other: Path, *names: str) -> None:
    """The files are in both or in neither, with the same numbers to rounding."""
    for name in names:
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            with h5py.File(one / name) as first, h5py.File(other / name) as second:
                assert list(first) == list(second)
                for key in first:
                    if first[key].dtype.kind == "f" and key != "residuals":
                        a, b = first[key][()], second[key][()]
                        least = 1e-10 if a.dtype == np.float64 else 3e-7
                        np.testing.assert_allclose(a, b, atol=least * np.abs(a).max(), rtol=0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every process reads several blocks and parts, and meets the others often."""
    width = model().space.size * 8
    monkeypatch.setattr(at_point_module, "BLOCK_BYTES", width)
    monkeypatch.setattr(at_point_module, "BLOCK_ROWS", 2)
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_makes_the_run_of_one(tmp_path, kind):
    whole = fit(tmp_path / "one", kind)
    expected = answers(whole, kind)
    for count in (2, 3):
        place = tmp_path / f"of {count}"

        def work(rank: int, place: Path = place) -> None:
            run = fit(place, kind)
            np.savez(f"{place}-{rank}.npz", **answers(run, kind))

        assert statuses(work, tmp_path, count) == [0] * count
        for rank in range(count):  # all have all answers
            same(expected, dict(np.load(f"{place}-{rank}.npz")), 1e-10)
        same_rows(tmp_path / "one", place, "gradients.h5", "rows.h5", "kernel.h5", "scores.h5")
        for here, there in zip(whole.points, opened(place).points, strict=True):
            v = torch.randn(3, whole.model.space.size, dtype=torch.float64)
            a, b = here.curvature().matvec(v), there.curvature().matvec(v)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max()))
        assert sorted(p.name for p in place.iterdir()) == sorted(
            p.name for p in (tmp_path / "one").iterdir()
        )


def opened(directory: Path, dtype: torch.dtype = torch.float64) -> Run:
    return Run.open(directory, model=model(dtype), train=examples(N_ROWS))
