"""What a fit is going to do, beside what it did."""

from __future__ import annotations

from dataclasses import replace

import pytest

import influence.curvature.kfac as kfac_module
from influence import fit_plan, path_time
from influence import kernel as kernel_module
from influence.adapter import ParamSpace
from influence.at_point import AtPoint
from influence.errors import InputError
from influence.fit_plan import FitPlan, chosen_store, size, store_bytes
from influence.gradients import Tape
from tests.conftest import examples, tokens_of
from tests.influence.toy_runs import EVERY_KIND, KINDS, N_ROWS, fit, small_model


def plan_of(kind: str, **changes) -> FitPlan:
    curvature, store = KINDS[kind]
    points = 2 if kind.endswith("two points") else 1
    model = small_model()
    tokens = tokens_of(model, examples(N_ROWS))
    options = {"points": points, "store": store, "disk_budget": 50e9} | changes
    return FitPlan.of(model, tokens, curvature, **options)


BUDGETS = [
    ("ekfac, features", {"disk_budget": 0}),  # the second look computes rows again
    ("ekfac, features", {"row_bytes": 64}),  # not every coordinate is kept
    ("kfac, some rows, features", {"row_bytes": 150}),  # two bits each
    ("ekfac, some rows", {"disk_budget": 0}),
]


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in KINDS), *BUDGETS])
def test_passes_and_bytes_are_those_of_the_fit(tmp_path, monkeypatch, kind, options):
    """Rows that run forward with a graph are counted, and files measured, whatever is stored."""
    ran, sizes = [0], {}
    forward, unlink = Tape.forward, AtPoint.file

    def counted(self, batch):
        ran[0] += len(batch.indices)
        return forward(self, batch)

    def measured(self, name):
        path = unlink(self, name)
        if path.exists():
            sizes[path.name] = max(sizes.get(path.name, 0), path.stat().st_size)
        return path

    monkeypatch.setattr(Tape, "forward", counted)
    monkeypatch.setattr(AtPoint, "file", measured)
    run = fit(tmp_path / "run", kind, **options)
    plan = plan_of(kind, **options)
    points = len(run.points)
    computed = plan.shares_credit and plan.store != "full"
    ratio = 8 * points if computed else 0  # path_time.RATIO_ROWS
    assert ran[0] == pytest.approx(plan.passes * N_ROWS + ratio)
    assert (plan.store == "full") == run.gradients_stored
    assert (plan.store == "features") == run.features_stored
    kept = sum(
        path.stat().st_size
        for path in run.directory.glob("*.h5")
        if not path.name.startswith("factors")
    )
    files = points * (plan.stored + plan.keeps_rows + (plan.kernel_bytes > 0))
    assert 0 <= kept - plan.kept_bytes <= 10_000 * files
    passing = max((s for name, s in sizes.items() if name == "rows.h5"), default=0)
    if not plan.keeps_rows:
        assert 0 <= passing - plan.passing_bytes <= 10_000


@pytest.mark.parametrize(("disk_budget", "landmarks"), [(10_000, 0), (3_000, 4)])
def test_the_plan_and_the_run_agree_on_landmarks(tmp_path, monkeypatch, disk_budget, landmarks):
    """A pass over the rows takes more than n^3; their files are larger than the smaller budget."""
    monkeypatch.setattr(kernel_module, "WHOLE_ROWS", 3)
    monkeypatch.setattr(kernel_module, "EXACT_ROWS", 3)
    monkeypatch.setattr(kernel_module, "LANDMARKS", 4)
    monkeypatch.setattr(fit_plan, "WHOLE_ROWS", 3)
    options = {"disk_budget": disk_budget}
    run = fit(tmp_path / "run", "ekfac, two points", **options)
    plan = plan_of("ekfac, two points", **options)
    assert plan.landmarks == kernel_module.landmarks_of(run) == landmarks
    files = sum(path.stat().st_size for path in run.directory.glob("kernel*.h5"))
    files += sum(path.stat().st_size for path in run.directory.glob("inverse*.h5"))
    assert 0 < files - plan.kernel_bytes <= 4 * 10_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_what_follows_the_pass_is_what_finish_did(tmp_path, kind, monkeypatch):
    """Bytes to the byte; orders of decompositions as LAPACK was called with."""
    import torch

    orders: list[int] = []
    eigh = torch.linalg.eigh

    def noted(matrix, *args, **kwargs):
        orders.append(len(matrix))
        return eigh(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", noted)
    run = fit(tmp_path / "run", kind)
    point = run.points[0]
    rows = N_ROWS * max(1, run.specification.draws)
    assert plan_of(kind).sample == len(run.specification.sample(N_ROWS, run.manifest.seed))
    with run.model.at(point.place.theta):
        after = run.specification.begin(point).after_pass(rows)
    arrays = [key for key in stored(point) if not key.startswith(("geometry", "theta"))]
    assert after.kept_bytes == sum(stored(point)[key] for key in arrays)
    assert sorted(orders) == sorted(after.decomposed * len(run.points))
    closed = not run.specification.matrix_free and not run.specification.undamped
    assert (after.solve_products > 0) == closed


def stored(point) -> dict[str, int]:
    """Bytes of each dataset of a point's factors."""
    import h5py

    found: dict[str, int] = {}
    with h5py.File(point.file("factors")) as file:
        file.visititems(
            lambda name, item: found.update({name: item.nbytes} if hasattr(item, "nbytes") else {})
        )
    # the losses of the pass are 8 bytes a row, and no curvature's
    return {name: size for name, size in found.items() if not name.startswith("pass")}


def test_sketched_sides_are_counted_too(tmp_path, monkeypatch):
    curvature = kfac_module.KFAC(max_width=4, rank=3, memory_share=0)
    run = fit(tmp_path / "run", "kfac", curvature=curvature)
    point = run.points[0]
    with run.model.at(point.place.theta):
        after = curvature.begin(point).after_pass(N_ROWS)
    assert after.kept_bytes == sum(stored(point).values())


def test_work_is_counted_in_forwards_and_backwards():
    once = plan_of("ekfac")
    assert (once.runs_again, once.passes, once.first_work) == (False, 1, pytest.approx(5 / 3))
    never = plan_of("ekfac, nothing stored")
    assert (never.passes, never.first_work, never.again_work) == (4, 1, 1)
    # the losses at both ends of the path, forward only, beside two passes for credit
    assert never.work == pytest.approx(4 + 2 / 3)
    assert never.to_come == pytest.approx(3 + 2 / 3)
    two = plan_of("ekfac, two points")
    assert two.to_come == pytest.approx((2 * 5 / 3 + 2 / 3) / (5 / 3) - 1)


def test_work_of_a_curvature_of_some_rows_and_of_features():
    some = plan_of("ekfac, some rows")
    share = 14 / N_ROWS
    assert (some.runs_again, some.passes) == (True, pytest.approx(1 + 2 * share))
    assert (some.first_work, some.again_work) == (pytest.approx(1 + share), pytest.approx(share))
    assert some.passing_bytes == 0
    features = plan_of("ekfac, features")
    assert (features.passes, features.first_work, features.runs_again) == (2, 1, False)
    assert features.work == pytest.approx(2 + 2 / 3)
    both = plan_of("kfac, some rows, features")
    assert both.passes == pytest.approx(1 + share)
    assert both.to_come == pytest.approx((share + 1 + 3 / 3) / share - 1)


def test_the_store_is_chosen_by_what_fits():
    space = ParamSpace.of([("x.lora_A", (2, 500_000)), ("x.lora_B", (1000, 2))])
    n, P = 1000, space.size
    full, features = (store_bytes(kind, n, P, 2) for kind in ("full", "features"))
    assert full == 4 * n * P
    assert features == n * (131_072 + 8 + 9)

    def chosen(budget, points=1, rule="auto", **options):
        return chosen_store(rule, n, space, points, budget, **options)

    assert chosen(full) == "full"
    assert chosen(2 * full - 1, points=2, whitens=False) == "none"
    assert chosen(2 * full - 1, points=2) == "features"
    assert chosen(features - 1) == "none"
    assert chosen(full, itemsize=8) == "features"
    assert chosen(full - 1, row_bytes=1000) == "features"
    assert chosen(0, rule="always") == "full"
    assert chosen(1e15, rule="never") == "none"
    assert store_bytes("features", 3, 101, 4) == 3 * (51 + 16 + 9)
    assert store_bytes("features", 3, 1000, 4, row_bytes=300) == 3 * (250 + 16 + 9)
    assert store_bytes("features", 3, 1000, 4, row_bytes=249) == 3 * (249 + 16 + 9)
    with pytest.raises(InputError, match="expected full, features or none"):
        store_bytes("some", 1, 1, 1)


def test_a_plan_in_words():
    plan = plan_of("ekfac, two points")
    assert str(plan).startswith("2 passes at 2 points over 24 rows (")
    assert str(replace(plan, points=1)).startswith("1 pass over 24 rows (")
    assert "kB of disk" in str(plan)
    sizes = [size(each) for each in (900, 3.21e6, 41e9, 2e12)]
    assert sizes == ["1 kB", "3.2 MB", "41 GB", "2.0 TB"]


def test_the_fit_says_its_plan_first(tmp_path, capfd):
    fit(tmp_path / "run", "ekfac")
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("note")]
    assert lines == [f"fit: {plan_of('ekfac')}"]


def test_the_whole_fit_is_told_from_the_first_tenth(tmp_path, monkeypatch, capfd):
    """The passes that are still to come are the plan's, and are told at the first point only."""
    monkeypatch.setattr("influence.progress.INTERVAL", -1.0)
    fit(tmp_path / "run", "ekfac, two points")
    lines = [line for line in capfd.readouterr().err.splitlines() if "in all about" in line]
    assert len(lines) == 1


@pytest.mark.parametrize("kind", ["ekfac", "ekfac, two points", "kfac, some rows, features"])
@pytest.mark.parametrize("path", [(0.4, 0.8), (0.5, 1.0)])
def test_the_rows_whose_losses_are_run_are_those_of_the_plan(tmp_path, monkeypatch, kind, path):
    """Few where a pass left the losses of all at every point, and not at the adapter twice."""
    ran = [0]
    losses = path_time.shared_losses

    def counted(model, tokens, **options):
        ran[0] += len(tokens)
        return losses(model, tokens, **options)

    monkeypatch.setattr(path_time, "shared_losses", counted)
    for module in (path_time, fit_plan):
        monkeypatch.setattr(module, "LOSS_ROWS", 3)
        monkeypatch.setattr(module, "ROWS_OF_ALL", 5)
    fit(tmp_path / "run", kind, path=path)
    plan = plan_of(kind, points=2, at_adapter=path[-1] == 1.0)
    assert plan.leaves_losses == (not kind.endswith("features"))
    assert ran[0] == plan.loss_places * plan.loss_rows
