"""Grown runs against runs that are fitted from scratch on the same rows, and the rows that they run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
import influence.fitted_point as fitting
import influence.path_time as path_time
from influence import EKFAC, GGN, KFAC, Fisher, Identity
from influence.path_time import losses_of_pass
from influence.rows import Examples
from influence.store import open_rows
from tests.conftest import build_model, examples, teach, tokens_of
from tests.helpers import contents, statuses, untouched
from tests.influence.toy_runs import Interruption, interrupt_after, same_files

ALL = list(examples(14))
OLD = ALL[:11]
CHANGED = replace(ALL[4], completion=" red fox")
ALL_THREE = "all three, in another order"
#: The rows of runs that are grown from one on `OLD`.
CHANGES = {
    "added": ALL,
    "removed": ALL[:3] + ALL[5:11],
    "changed": [*ALL[:4], CHANGED, *ALL[5:11]],
    ALL_THREE: [*ALL[7:10], ALL[12], *ALL[1:4], CHANGED, *ALL[5:7], ALL[11], ALL[13]],
}
#: Curvatures and options at which a grown run is exact.
EXACT = {
    "ekfac": {"curvature": EKFAC(), "growable": True, "store": "full"},
    "ekfac of two draws, rows' means": {
        "curvature": EKFAC(samples=2),
        "growable": True,
        "store": "full",
        "reduction": "example",
    },
    "ekfac, sketched": {
        "curvature": EKFAC(max_width=4, rank=12, memory_share=0),
        "growable": True,
        "store": "full",
    },
    "kfac": {"curvature": KFAC()},
    "kfac, nothing stored": {"curvature": KFAC(), "store": "none", "reduction": "example"},
    "kfac in function space": {"curvature": KFAC(), "geometry": "function"},
    "fisher": {"curvature": Fisher(samples=2)},
    "fisher of the data's labels": {"curvature": Fisher(samples=0), "reduction": "batch:3"},
    "ggn": {"curvature": GGN()},
    "identity": {"curvature": Identity(), "reduction": "batch:3"},
}


def some_slow(cases, quick):
    """Parameters of a test, of which all but those that are `quick` are slow."""
    assert all(case in list(cases) for case in quick)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in cases
    ]


@pytest.fixture(scope="module")
def model():
    options = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}
    return teach(build_model("llama", **options), examples(14), steps=8)


@pytest.fixture(scope="module")
def fit(model, tmp_path_factory):
    """A function that fits some rows, each set and its options once."""
    made = {}

    def fitted(kind: str, change: str | None, **options):
        key = (kind, change, *sorted(options))
        if key not in made:
            directory = tmp_path_factory.mktemp("grown") / "run"
            rows = Examples(OLD if change is None else CHANGES[change])
            options = {"path": (0.5, 1.0), "token_budget": 40} | EXACT.get(kind, {}) | options
            made[key] = influence.fit(model, rows, directory=directory, **options)
        return made[key]

    return fitted


def apart(one, other) -> float:
    """Largest difference relative to the largest score."""
    return np.abs(one - other).max() / np.abs(other).max()


@pytest.mark.parametrize(
    ("kind", "change"),
    some_slow(
        [(kind, change) for kind in EXACT for change in CHANGES],
        quick=[("ekfac", ALL_THREE), ("kfac, nothing stored", ALL_THREE), ("identity", "changed")],
    ),
)
def test_a_grown_run_gives_the_scores_of_a_fit_from_scratch(fit, double, kind, change):
    before = fit(kind, None)
    with untouched(before.directory):
        grown = fit(kind, change, grown_from=before)
    scratch, queries = fit(kind, change), examples(3, seed=9)
    assert grown.manifest.grown.otherwise == ()
    scores = grown.score(queries, solver="direct").values
    assert scores.dtype == np.float64
    assert apart(scores, scratch.score(queries, solver="direct").values) < 1e-10
    if kind != "ggn":  # solved for by CG, whose tolerance is 1e-5
        own, expected = grown.self_influence(), scratch.self_influence()
        assert apart(own.values, expected.values) < 1e-10
    assert grown.gradients_stored == scratch.gradients_stored
    assert set(contents(grown.directory)) == set(contents(scratch.directory))
    for one, other in zip(grown.points, scratch.points, strict=True):
        losses, expected = losses_of_pass(one), losses_of_pass(other)
        np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.slow
def test_a_run_grown_twice_is_as_exact(fit, model, double, tmp_path):
    """Rows come, and go again: what is left is the first run but for rounding."""
    for kind in ("ekfac", "kfac"):
        before = fit(kind, None)
        more = fit(kind, "added", grown_from=before)
        options = {"path": (0.5, 1.0), "token_budget": 40} | EXACT[kind]
        again = influence.fit(
            model, Examples(OLD), directory=tmp_path / kind, grown_from=more.directory, **options
        )
        queries = examples(3, seed=9)
        assert apart(again.score(queries).values, before.score(queries).values) < 1e-10


# ---- which rows are run --------------------------------------------------------------------------


class Counted:
    """How often each row goes through a model, told by its tokens."""

    def __init__(self, model, rows: list) -> None:
        self.times = dict.fromkeys([row.id + row.content_hash for row in rows], 0)
        tokens = tokens_of(model, Examples([replace(r, id=str(i)) for i, r in enumerate(rows)]))
        self.rows = {}
        for each, name in zip(tokens, self.times, strict=True):
            ids = tuple(each.input_ids.tolist())
            # the last token predicts nothing: the longest row of a batch comes without it
            assert not {ids, ids[:-1]} & set(self.rows)
            self.rows |= {ids: name, ids[:-1]: name}
        self.pad = model.pad_id
        base = model.model.get_base_model()
        self.handle = base.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _module, _args, kwargs) -> None:
        for row in kwargs["input_ids"].tolist():
            length = next(n for n in range(len(row), 0, -1) if tuple(row[:n]) in self.rows)
            assert set(row[length:]) <= {self.pad}  # padded on the right
            self.times[self.rows[tuple(row[:length])]] += 1

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()

    def of(self, rows: list) -> set[int]:
        return {self.times[row.id + row.content_hash] for row in rows}


@pytest.mark.parametrize("kind", some_slow(EXACT, quick=["ekfac"]))
def test_only_rows_that_come_and_go_are_run_once_at_each_point(
    fit, model, monkeypatch, tmp_path, kind
):
    before = fit(kind, None)
    monkeypatch.setattr("influence.fitting._prepare_credit", lambda run: None)
    rows = CHANGES[ALL_THREE]
    kept = [row for row in OLD if row in rows]
    come, go = ([r for r in one if r not in other] for one, other in ((rows, OLD), (OLD, rows)))
    options = {"path": (0.5, 1.0), "token_budget": 40} | EXACT[kind]
    with Counted(model, [*ALL, CHANGED]) as counted:
        influence.fit(
            model, Examples(rows), directory=tmp_path / "run", grown_from=before, **options
        )
    assert len(kept) == 8
    assert len(come) == 4
    assert len(go) == 3
    assert counted.of(kept) == {0}
    assert counted.of(come) == {2}
    assert counted.of(go) == {0 if kind.startswith(("fisher", "identity")) else 2}


@pytest.mark.parametrize("store", some_slow(["full", "features"], quick=["full"]))
def test_sharing_credit_runs_a_fixed_number_of_the_rows_that_stay(
    fit, model, monkeypatch, tmp_path, store
):
    """Those whose ratio is measured, and the loss of the base; and of points that no pass ran."""
    before = fit("ekfac, " + store, None, store=store)
    monkeypatch.setattr(path_time, "RATIO_ROWS", 1)
    monkeypatch.setattr(path_time, "LOSS_ROWS", 1)
    monkeypatch.setattr(path_time, "ROWS_OF_ALL", 1)  # where no pass left losses
    with Counted(model, [*ALL, CHANGED]) as counted:
        run = influence.fit(
            model,
            Examples(ALL),
            directory=tmp_path / "run",
            grown_from=before,
            path=(0.5, 1.0),
            token_budget=40,
            store=store,
        )
    assert run.manifest.path is not None
    first = counted.times.pop(ALL[0].id + ALL[0].content_hash)
    ratios, losses = 2 * (2 + (store == "features")), 1 + 2 * (store == "features")
    assert first == ratios + losses
    assert {counted.times[row.id + row.content_hash] for row in OLD[1:]} == {0}
    assert all(counted.times[row.id + row.content_hash] > 0 for row in ALL[11:])


# ---- where a grown run is not a fit from scratch -------------------------------------------------


@pytest.mark.parametrize("change", some_slow(CHANGES, quick=[ALL_THREE]))
def test_without_sampled_rows_eigenvalues_are_those_of_the_new_rows_in_the_bases_before(
    fit, change
):
    """`sum_i w_i (Q_S^T G_i Q_A)^2`, by numpy, of the rows that a growable run keeps."""
    before = fit("ekfac, plain", None)
    grown = fit("ekfac, plain", change, grown_from=before)
    assert "eigenbases of the run before" in grown.manifest.grown.otherwise[0]
    assert grown.manifest.grown.curvature_rows == len(set(OLD) & set(CHANGES[change]))
    rows = fit("ekfac", change)
    for number, point in enumerate(grown.points):
        gradients = np.array(open_rows(rows.points[number].file("rows"), "rows"))
        blocks = point.curvature().leaf_blocks
        for block, old in zip(blocks, before.points[number].curvature().leaf_blocks, strict=True):
            assert torch.equal(block.wide, old.wide)
            assert torch.equal(block.narrow, old.narrow)
            leaf = gradients[:, block.leaf.slice].reshape(-1, *block.leaf.shape)
            leaf = leaf if block.leaf.is_A else leaf.transpose(0, 2, 1)
            turned = np.einsum("rk,nrd,de->nke", block.narrow.numpy(), leaf, block.wide.numpy())
            expected = np.einsum("n,nke->ke", rows.weights, turned**2)
            np.testing.assert_allclose(
                block.eigenvalues.numpy(), expected, atol=1e-12 * expected.max()
            )


def test_features_of_rows_that_stay_are_copied_and_of_others_made_by_the_same_curvature(
    fit, double
):
    before = fit("ekfac, features", None, store="features")
    change = ALL_THREE
    grown = fit("ekfac, features", change, store="features", grown_from=before)
    places = [OLD.index(row) if row in OLD else None for row in CHANGES[change]]
    for one, other in zip(grown.points, before.points, strict=True):
        for name in ("codes", "scales", "squares"):
            new, old = (np.array(open_rows(p.file("features"), name)) for p in (one, other))
            for place, row in enumerate(places):
                assert row is None or (new[place] == old[row]).all()
        # by the operator of the run before, from whole gradients of the new rows
        operator, tokens = other.operator(), grown.tokens
        gradients = other._stream(
            tokens, None, torch.empty(len(tokens), one.model.space.size).double()
        )
        expected = (gradients * operator.curvature.solve(gradients, operator.lam)).sum(1)
        squares = np.array(open_rows(one.file("features"), "squares"))
        np.testing.assert_allclose(squares, expected.numpy(), rtol=1e-10)
    assert "which stand for all" in grown.manifest.grown.otherwise[0]


@pytest.mark.slow
def test_a_curvature_of_drawn_rows_stays_and_gradients_are_of_the_new_rows(fit):
    options = {"curvature": EKFAC(rows=6)}
    before = fit("ekfac of 6 rows", None, **options)
    grown = fit("ekfac of 6 rows", "added", **options, grown_from=before)
    same, other = grown.points[0].curvature(), before.points[0].curvature()
    for one, two in zip(same.leaf_blocks, other.leaf_blocks, strict=True):
        assert torch.equal(one.eigenvalues, two.eigenvalues)
    scratch = fit("ekfac", "added")
    for one, two in zip(grown.points, scratch.points, strict=True):
        new, expected = (np.array(open_rows(p.file("gradients"), "gradients")) for p in (one, two))
        np.testing.assert_allclose(new, expected, atol=1e-12)


@pytest.mark.slow
def test_uneven_weights_are_said_and_bound_the_error(fit, double):
    """With `batch:M` sums are multiplied by the mean of the rows' factors."""
    before = fit("kfac, batches", None, curvature=KFAC(), reduction="batch:4")
    options = {"curvature": KFAC(), "reduction": "batch:4"}
    grown = fit("kfac, batches", "added", grown_from=before, **options)
    scratch = fit("kfac, batches", "added", **options)
    ratios = scratch.weights[:11] / before.weights
    spread = np.abs(ratios / ratios.mean() - 1).max()
    (said,) = grown.manifest.grown.otherwise
    assert f"right to {100 * spread:.2g} %" in said
    for one, two in zip(grown.points, scratch.points, strict=True):
        new, expected = (p.curvature().mean_eigenvalues().numpy() for p in (one, two))
        # both factors of a leaf are sums
        assert 1e-8 < np.abs(new / expected - 1).max() < 3 * spread


# ---- killed and resumed --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", some_slow(["ekfac", "kfac", "fisher", "ggn"], quick=["ekfac"]))
def test_a_killed_grown_fit_goes_on(fit, model, monkeypatch, tmp_path, kind):
    before, change = fit(kind, None), ALL_THREE
    options = {"path": (0.5, 1.0), "token_budget": 12, "grown_from": before} | EXACT[kind]
    whole = influence.fit(model, Examples(CHANGES[change]), directory=tmp_path / "whole", **options)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)  # after every batch
    stops = 0
    for batches in (1, 1, 2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, batches)
            with pytest.raises(Interruption):
                influence.fit(
                    model, Examples(CHANGES[change]), directory=tmp_path / "run", **options
                )
            stops += 1
    with Counted(model, [*ALL, CHANGED]) as counted:
        monkeypatch.setattr("influence.fitting._prepare_credit", lambda run: None)
        run = influence.fit(model, Examples(CHANGES[change]), directory=tmp_path / "run", **options)
    assert stops == 3
    assert run.manifest.complete
    # not all again: four of the batches were done
    assert sum(counted.times.values()) < 2 * (4 + 3 * (kind != "fisher"))
    same_files(whole.directory, run.directory, "factors.h5", "factors-2.h5", "gradients.h5")
    names = ("gradients-2.h5", "rows.h5", "rows-2.h5")
    same_files(whole.directory, run.directory, *names)


@pytest.mark.slow
def test_killed_features_go_on(fit, model, monkeypatch, tmp_path):
    before = fit("ekfac, features", None, store="features")
    options = {"path": (0.5, 1.0), "token_budget": 12, "store": "features", "grown_from": before}
    whole = influence.fit(model, Examples(ALL), directory=tmp_path / "whole", **options)
    import influence.features as features

    real, left = features.collate, 2

    def collate(*arguments, **given):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interruption
        return real(*arguments, **given)

    with monkeypatch.context() as patch:
        patch.setattr(features, "collate", collate)
        with pytest.raises(Interruption):
            influence.fit(model, Examples(ALL), directory=tmp_path / "run", **options)
    influence.fit(model, Examples(ALL), directory=tmp_path / "run", **options)
    same_files(whole.directory, tmp_path / "run", "features.h5", "features-2.h5", "kernel.h5")


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ekfac", "ekfac, features"])
def test_two_processes_grow_the_same_run(fit, model, tmp_path, kind):
    options = {"store": "features"} if kind not in EXACT else {}
    before, change = fit(kind, None, **options), ALL_THREE
    one, queries = fit(kind, change, grown_from=before, **options), examples(3, seed=9)
    given = {"path": (0.5, 1.0), "token_budget": 12} | EXACT.get(kind, {}) | options

    def work(rank: int) -> None:
        run = influence.fit(
            model,
            Examples(CHANGES[change]),
            directory=tmp_path / "run",
            grown_from=before.directory,
            **given,
        )
        np.save(tmp_path / f"{rank}.npy", run.score(queries).values)

    assert statuses(work, tmp_path, 2) == [0, 0]
    for rank in range(2):
        assert apart(np.load(tmp_path / f"{rank}.npy"), one.score(queries).values) < 1e-6
