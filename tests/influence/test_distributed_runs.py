"""Runs that several processes make together: the same as one process's, killed and resumed."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import influence
import influence.at_point as at_point_module
import influence.fitted_point as fitting
import influence.kernel as kernel_module
import influence.scores as scores_module
from influence import EKFAC, GGN, Fisher, Identity, Run, distributed
from influence.credit import credited
from influence.errors import InputError, ProcessError, StoreError
from influence.measurements import MeanLoss
from influence.scores import raw_parts
from influence.store import only_writer
from tests.conftest import build_model, examples, teach
from tests.helpers import statuses

N_ROWS, BUDGET = 23, 15

#: What is fitted, whether gradients are stored, and the points.
KINDS = {
    "ekfac": (EKFAC(), "always", (0.5, 0.9)),
    "ekfac, nothing stored": (EKFAC(samples=2), "never", (0.7,)),
    "ekfac, sketched": (EKFAC(max_width=4, rank=3, memory_share=0), "always", (0.7,)),
    "ekfac, features": (EKFAC(), "features", (0.5, 0.9)),
    "ekfac, features of drawn rows": (EKFAC(rows=11), "features", (0.7,)),
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
        options.pop("train", examples(N_ROWS)),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "ekfac")) for kind in KINDS]
)
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
        same_rows(
            tmp_path / "one",
            place,
            "gradients.h5",
            "rows.h5",
            "features.h5",
            "kernel.h5",
            "scores.h5",
        )
        for here, there in zip(whole.points, opened(place).points, strict=True):
            v = torch.randn(3, whole.model.space.size, dtype=torch.float64)
            a, b = here.curvature().matvec(v), there.curvature().matvec(v)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(a.abs().max()))
        assert sorted(p.name for p in place.iterdir()) == sorted(
            p.name for p in (tmp_path / "one").iterdir()
        )


def opened(directory: Path, dtype: torch.dtype = torch.float64) -> Run:
    return Run.open(directory, model=model(dtype), train=examples(N_ROWS))


def count_batches(monkeypatch) -> list[int]:
    """Count the batches of the pass that this process runs from now on."""
    real, ran = fitting.PointFit.run_batch, []

    def run_batch(self, recorder, rows, *others):
        ran.append(len(rows))
        return real(self, recorder, rows, *others)

    monkeypatch.setattr(fitting.PointFit, "run_batch", run_batch)
    return ran


def dies_after(monkeypatch, batches: int) -> None:
    """Have this process killed when it begins its batch after so many."""
    real, ran = fitting.PointFit.run_batch, []

    def run_batch(self, recorder, rows, *others):
        if len(ran) == batches:
            os.kill(os.getpid(), signal.SIGKILL)
        ran.append(rows)
        return real(self, recorder, rows, *others)

    monkeypatch.setattr(fitting.PointFit, "run_batch", run_batch)


@pytest.fixture
def every_batch(monkeypatch):
    """A checkpoint after every batch."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        pytest.param(*counts, kind, marks=[pytest.mark.slow] * ((*counts, kind) != (2, 3, "ekfac")))
        for counts in ((2, 3), (3, 1), (1, 2))
        for kind in ("ekfac", "ekfac, nothing stored", "fisher")
    ],
)
def test_a_fit_killed_and_resumed_by_another_number_of_processes(
    tmp_path, monkeypatch, every_batch, kind, before, after
):
    """One is killed in the middle of the pass; the others end of it; no batch that the checkpoint
    has is done twice. What is done are not the first batches: each process had a stretch of them.
    """
    whole = fit(tmp_path / "one", kind)
    expected = answers(whole, kind)
    place = tmp_path / "run"

    def stretches(costs) -> list[int]:
        return [place * before // len(costs) for place in range(len(costs))]

    def killed(rank: int) -> None:
        monkeypatch.setattr(distributed, "owners", stretches)
        if rank == before - 1:
            dies_after(monkeypatch, 3)
        with pytest.raises(ProcessError, match="with any number of processes"):
            fit(place, kind)

    ended = statuses(killed, tmp_path, before)
    assert ended == [0] * (before - 1) + [-signal.SIGKILL]
    with h5py.File(place / fitting.CHECKPOINT) as file:
        mask = file[fitting.DONE][()]
    done = int(mask.sum())
    assert done == 3 * before
    assert mask[:done].all() == (before == 1)
    points, batches = len(KINDS[kind][2]), len(fitting_plan(whole))
    assert batches > 3 * before + 3

    def resumed(rank: int) -> None:
        ran = count_batches(monkeypatch)
        run = fit(place, kind)
        (tmp_path / f"ran-{rank}").write_text(str(len(ran)))
        np.savez(tmp_path / f"{rank}.npz", **answers(run, kind))

    assert statuses(resumed, tmp_path, after) == [0] * after
    ran = sum(int((tmp_path / f"ran-{rank}").read_text()) for rank in range(after))
    assert ran == points * batches - done
    for rank in range(after):
        same(expected, dict(np.load(tmp_path / f"{rank}.npz")), 1e-10)


def fitting_plan(run: Run) -> list[np.ndarray]:
    """The batches of the pass at a point."""
    point = run.points[0]
    with run.model.at(point.place.theta):
        storage = fitting.Storage(run.gradients_stored, "always", 0)
        return fitting.PointFit(point, run.specification, storage, None).batches


@pytest.mark.slow
def test_a_scoring_killed_and_resumed_by_another_number_of_processes(tmp_path, monkeypatch):
    """What the first process had gathered is not made again."""
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0)
    run, queries = fit(tmp_path / "run"), examples(5, seed=9)
    expected, out = run.score(queries).values, tmp_path / "scores.h5"
    real, ran = scores_module.distributed.gathered, []

    def killed(rank: int) -> None:
        def gathered(pieces):
            if len(ran) == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            ran.append(len(pieces))
            return real(pieces)

        monkeypatch.setattr(distributed, "gathered", gathered)
        with pytest.raises(ProcessError):
            opened(run.directory).score(queries, out=out)

    assert statuses(killed, tmp_path, 2) == [0, -signal.SIGKILL]
    with h5py.File(f"{out}.partial") as file:
        done = file["done"][()]
    assert 0 < done.sum() < done.size

    def resumed(rank: int) -> None:
        read = []

        def row_scores(point, solved, modules, gone):
            for piece in whole(point, solved, modules, gone):
                read.append(len(piece[0]))
                yield piece

        whole = scores_module._row_scores
        monkeypatch.setattr(scores_module, "_row_scores", row_scores)
        found = opened(run.directory).score(queries, out=out).values
        np.save(tmp_path / f"{rank}.npy", found)
        (tmp_path / f"read-{rank}").write_text(str(sum(read)))

    assert statuses(resumed, tmp_path, 3) == [0] * 3
    for rank in range(3):
        found = np.load(tmp_path / f"{rank}.npy")
        assert np.abs(found - expected).max() <= 3e-7 * np.abs(expected).max()
    again = sum(int((tmp_path / f"read-{rank}").read_text()) for rank in range(3))
    assert done.size - done.sum() <= again < done.size
    assert not list(tmp_path.glob("scores.h5.*"))


def test_what_one_process_finds_wrong_all_raise(tmp_path):
    """A directory that another call is writing to, and one of another run."""
    fit(tmp_path / "run")

    def work(rank: int) -> None:
        with pytest.raises(InputError, match="seed is 0 there and 1 here"):
            fit(tmp_path / "run", seed=1)
        with pytest.raises(StoreError, match="another process is writing to"):
            fit(tmp_path / "locked")

    with only_writer(tmp_path / "locked"):
        assert statuses(work, tmp_path, 2) == [0, 0]


@pytest.mark.slow
def test_float32_runs_of_several_processes(tmp_path):
    """Sums in another order, in the last bits of float32."""
    kind = "ekfac"
    expected = answers(fit(tmp_path / "one", kind, torch.float32), kind)
    assert expected.pop("residuals").max() < 1e-5

    def work(rank: int) -> None:
        np.savez(
            tmp_path / f"{rank}.npz", **answers(fit(tmp_path / "run", kind, torch.float32), kind)
        )

    assert statuses(work, tmp_path, 2) == [0, 0]
    found = dict(np.load(tmp_path / "0.npz"))
    del found["residuals"]
    same(expected, found, 1e-5)


IN_FILES = [{"WHOLE_ROWS": 3}, {"EXACT_ROWS": 10, "MOST_ROWS": 10, "LANDMARKS": 7}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("ekfac", IN_FILES[1]),
        ("ekfac, nothing stored", IN_FILES[0]),
        pytest.param("ekfac", IN_FILES[0], marks=pytest.mark.slow),
        pytest.param("ekfac, nothing stored", IN_FILES[1], marks=pytest.mark.slow),
    ],
)
def test_similarities_in_files_are_made_by_several_processes(tmp_path, monkeypatch, numbers, kind):
    """Those of a damping that is not the fit's own, so that every call makes them."""
    run = fit(tmp_path / "run", kind)
    monkeypatch.setattr("influence.matrix_file.TILE", 5)
    monkeypatch.setattr(kernel_module, "ROWS_AT_ONCE", 4)
    for name, value in numbers.items():
        monkeypatch.setattr(kernel_module, name, value)

    def kernel(run: Run) -> list[np.ndarray]:
        point = run.points[0]
        found = kernel_module.row_kernel(point, point.operator(damping="mean:3"))
        inverse = found.inverse(0.5)
        weights = run.weights
        values = np.eye(len(weights))[:3]
        return [np.array(found.slope(weights)), inverse.diagonal, inverse.apply(values)]

    expected = kernel(run)

    def work(rank: int) -> None:
        for one, other in zip(expected, kernel(opened(run.directory)), strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-8 * np.abs(one).max())

    assert statuses(work, tmp_path, 3) == [0] * 3
    assert not list(run.directory.glob("kernel-making-*"))


@pytest.mark.slow
@pytest.mark.parametrize("numbers", IN_FILES)
def test_many_rows_share_credit_in_several_processes(tmp_path, monkeypatch, numbers):
    """Whether files have room is the first process's to say, and nothing is exchanged meanwhile."""
    run, queries = fit(tmp_path / "run"), examples(3, seed=9)
    for name, value in numbers.items():
        monkeypatch.setattr(f"influence.kernel.{name}", value)
    run.kept.clear()
    expected = run.score(queries, credit="shared").values
    for name in ("kernel.h5", "inverse.h5"):
        (run.directory / name).unlink()

    def work(rank: int) -> None:
        found = opened(run.directory).score(queries, credit="shared").values
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    assert statuses(work, tmp_path, 2) == [0, 0]


@pytest.mark.parametrize("kind", ["ekfac", "ekfac, features"])
def test_fewer_rows_than_processes(tmp_path, kind):
    """A process without rows of its own takes part all the same."""
    rows = examples(2)
    run = fit(tmp_path / "run", kind, train=rows)
    expected = run.score(rows, credit="additive").values

    def work(rank: int) -> None:
        # codes are of an eigenbasis, which two rows leave undetermined: those of one fit are asked
        place = "run" if "features" in kind else "other"
        found = fit(tmp_path / place, kind, train=rows).score(rows, credit="additive").values
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    assert statuses(work, tmp_path, 3) == [0] * 3
