"""Choosing a setting: what is swept equals what is scored, the choice is kept and obeyed, sizes are
calibrated.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import influence
from analysis.metrics.lds import Truth
from analysis.tune import (
    EXACT_TOLERANCE,
    agreement,
    concentration,
    default_queries,
    forget,
    retrained_factor,
    table_rows,
    tune,
)
from influence import calibration
from influence.calibration import EDITED_ROWS, measured_edits, some_rows
from influence.errors import InputError, MismatchError, NumericalError
from influence.setting import Setting
from influence.store import read_json
from tests.conftest import build_model, examples, teach
from tests.helpers import statuses, write_rows

PATH = (0.5, 0.9)


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"])


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tune") / "run"
    influence.fit(model, examples(14), directory=directory, path=PATH)
    return directory


@pytest.fixture
def run(fitted, model, tmp_path):
    """A copy of that run, to keep settings in."""
    shutil.copytree(fitted, tmp_path / "run")
    return influence.Run.open(tmp_path / "run", model=model, train=examples(14))


def linear_truth(run, queries, subsets=24, noise=0.0, **setting) -> Truth:
    """Losses as if the scores of a setting were the whole truth."""
    generator = np.random.default_rng(0)
    masks = generator.random((subsets, len(run.train))) < 0.5
    values = run.score(queries, **({"credit": "additive"} | setting)).values
    losses = 3.0 - masks @ values.T.astype(float)
    return Truth(masks, losses + noise * generator.standard_normal(losses.shape))


def test_the_queries_of_the_scores_are_read_as_they_were(run, tmp_path):
    items = [{"q": row.prompt, "a": row.completion, "id": row.id} for row in examples(3, seed=9)]
    path = write_rows(tmp_path / "asked.jsonl", items)
    queries = influence.read_examples(path, columns={"prompt": "q", "completion": "a"})
    run.score(queries, out=run.directory / "scores.h5")
    assert default_queries(run) == queries
    write_rows(path, items[:2])
    with pytest.raises(MismatchError, match=r"asked\.jsonl has changed since"):
        default_queries(run)


def test_every_setting_of_the_table_is_scored_as_influence_scores_it(run):
    queries = examples(3, seed=9)
    truth = linear_truth(run, queries)
    found = tune(run, truth=truth, queries=queries, dampings=("mean:1", "mean:0.01"), keep=False)
    assert (
        len(found.judged) == (2 * 2 + 1) * 3
    )  # ekfac and kfac with two dampings, identity; all points and each
    run.manifest = replace(run.manifest, calibration={})
    for one in found.judged:
        damping = None if one.damping == "none" else one.damping
        expected = run.score(
            queries, curvature=one.curvature, damping=damping, at=one.at, credit="additive"
        ).values
        np.testing.assert_allclose(
            one.scores, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max()
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted", [{"curvature": "kfac", "damping": "mean:0.01", "at": "0.9"}, {"at": "0.5"}]
)
def test_the_setting_that_is_the_truth_is_chosen_kept_and_obeyed(run, wanted):
    queries = examples(3, seed=9)
    truth = linear_truth(run, queries, **wanted)
    found = tune(run, truth=truth, queries=queries)
    best = {"curvature": "ekfac", "damping": "mean:0.1"} | wanted
    assert {key: vars(found.chosen)[key] for key in best} == best
    assert found.held_out.mean == pytest.approx(1.0)
    again = influence.Run.open(run.directory, model=run.model, train=run.train)
    (kept,) = [
        found
        for found in again.manifest.calibration.values()
        if found.source.startswith("retraining")
    ]
    uncalibrated = Setting.of(again, calibrated=False)
    np.testing.assert_allclose(Setting.of(again).factors, uncalibrated.factors * kept.factor)
    again.manifest = replace(again.manifest, calibration={})
    plain = influence.Run.open(run.directory, model=run.model, train=run.train)
    plain.manifest = replace(plain.manifest, tuned=None, calibration={})
    np.testing.assert_array_equal(
        again.score(queries, credit="additive").values,
        plain.score(queries, **wanted, credit="additive").values,
    )
    # what is typed wins over what was chosen, option by option; the identity has points of its own
    for typed in (
        {"curvature": "ekfac", "damping": "mean:1"},
        {"at": "all"},
        {"curvature": "kfac"},
        {"damping": "top:1"},
    ):
        expected = plain.score(queries, **(best | typed), credit="additive").values
        np.testing.assert_array_equal(
            again.score(queries, **typed, credit="additive").values, expected
        )
    plainly = {"curvature": "identity"}
    np.testing.assert_array_equal(
        again.score(queries, **plainly, credit="additive").values,
        plain.score(queries, **plainly, credit="additive").values,
    )
    with pytest.raises(InputError, match="has none: leave it out"):
        again.score(queries, curvature="identity", damping="mean:1", credit="additive")
    only = again.score(queries, damping="mean:10", credit="additive").attributes
    assert (only["curvature"], only["damping"]) == (best["curvature"], "mean:10")


@pytest.mark.slow
def test_queries_in_chunks_give_the_same_table(run, monkeypatch):
    queries = examples(5, seed=9)
    truth = linear_truth(run, queries)
    options = {"truth": truth, "queries": queries, "dampings": ("mean:1",), "keep": False}
    expected = {one.name: (one.scores, one.concentration) for one in tune(run, **options).judged}
    monkeypatch.setattr("analysis.tune.queries_at_once", lambda *_: 2)
    for one in tune(run, **options).judged:
        np.testing.assert_allclose(one.scores, expected[one.name][0], rtol=1e-10, atol=1e-14)
        assert one.concentration == pytest.approx(expected[one.name][1])


def test_the_factor_of_a_truth_in_other_units_is_found(run):
    queries = examples(3, seed=9)
    run.manifest = replace(run.manifest, calibration={})
    truth = linear_truth(run, queries)
    values = run.score(queries, credit="additive").values
    assert retrained_factor(values * 4, truth.masks, truth.query_loss) == pytest.approx(0.25)
    tune(run, truth=truth, queries=queries, dampings=("mean:0.1",), curvatures=("ekfac",))
    again = influence.Run.open(run.directory, model=run.model, train=run.train)
    assert again.manifest.tuned.at == "all"
    np.testing.assert_allclose(again.score(queries, credit="additive").values, values, rtol=1e-4)


@pytest.mark.slow
def test_other_factors_are_fitted_below_the_run_and_used(model, tmp_path, capfd):
    run = influence.fit(model, examples(12), directory=tmp_path / "run", path=(1.0,))
    queries = examples(3, seed=9)
    other = influence.fit(
        model, examples(12), directory=tmp_path / "other", geometry="function", path=(1.0,)
    )
    other.manifest = replace(other.manifest, calibration={})
    truth = linear_truth(other, queries, damping="mean:0.001")
    found = tune(
        run,
        truth=truth,
        queries=queries,
        curvatures=("ekfac",),
        geometries=("function",),
        paths=[PATH],
    )
    assert "fitting path-0.5,0.9 below" in capfd.readouterr().err
    assert (found.chosen.run, found.chosen.damping) == ("tune/geometry-function", "mean:0.001")
    again = influence.Run.open(run.directory, model=run.model, train=run.train)
    factor = read_json(run.directory / "tune" / "geometry-function" / "manifest.json")[
        "calibration"
    ]
    (factor,) = [found["factor"] for name, found in factor.items() if "mean:0.001" in name]
    scores = again.score(queries, out=tmp_path / "s.h5", credit="additive")
    np.testing.assert_allclose(
        scores.values,
        other.score(queries, damping="mean:0.001", credit="additive").values * factor,
        rtol=1e-5,
    )
    assert scores.attributes["geometry"] == "function"
    influence.fit(
        model, examples(12), directory=tmp_path / "run", path=(1.0,), seed=3, overwrite=True
    )
    assert not list((tmp_path / "run" / "tune").iterdir())  # the factors of the run before


def test_without_a_truth_the_checks_choose_and_tell_what_they_found(run):
    found = tune(run, dampings=("mean:0.1", "mean:0.01"))
    rows = list(table_rows(found))
    assert len(rows) == (2 * 2 + 1) * 3
    assert all(
        np.isfinite([row["concentration"], row["selectivity"], row["calibration"]]).all()
        for row in rows
    )
    assert run.manifest.tuned.at == found.chosen.at
    assert json.loads((run.directory / "manifest.json").read_text())["tuned"] == vars(
        run.manifest.tuned
    )


def test_what_no_setting_changes_is_measured_once(run, monkeypatch):
    """Each setting runs the edited adapters; the adapter before is run for all of them once."""
    runs, places, losses = [], run.model.snapshot(), calibration.mean_losses

    def counted(model, tokens, **options):
        runs.append(torch.equal(model.snapshot(), places))
        return losses(model, tokens, **options)

    monkeypatch.setattr(calibration, "mean_losses", counted)
    found = tune(run, dampings=("mean:1", "mean:0.01"), keep=False)
    assert sum(runs) == 1
    assert len(runs) == 1 + len(found.judged) * min(EDITED_ROWS, len(run.train))
    chosen = found.chosen
    damping = None if chosen.damping == "none" else chosen.damping
    setting = Setting.of(run, chosen.curvature, damping, chosen.at, tuned=False, calibrated=False)
    edited = some_rows(run, EDITED_ROWS)
    edits = measured_edits(setting, edited, some_rows(run, 32))
    assert edits.selectivity == found.chosen.selectivity


def test_small_edits_are_predicted_to_first_order(model, tmp_path):
    """At the adapter itself with a strong damping an edit is small, and its measured effect is the
    predicted one.
    """
    run = influence.fit(model, examples(14), directory=tmp_path / "run", path=(1.0,))
    setting = Setting.of(run, "ekfac", "abs:100", calibrated=False)
    edits = measured_edits(setting, some_rows(run, 4), some_rows(run, 9))
    assert edits.predicted.shape == edits.measured.shape == (9, 4)
    np.testing.assert_allclose(
        edits.measured, edits.predicted, rtol=0.02, atol=2e-4 * np.abs(edits.predicted).max()
    )
    assert edits.factor == pytest.approx(1, abs=0.01)
    assert agreement(edits) > 0.99
    own = run.self_influence(damping="abs:100", credit="additive").values[edits.rows]
    np.testing.assert_allclose(np.diagonal(edits.predicted), own * edits.sizes, rtol=1e-5)


def test_averages_are_calibrated_when_they_are_asked_for(run):
    run.manifest = replace(run.manifest, calibration={})
    run.score(examples(1, seed=9), credit="additive")
    ((name, found),) = run.manifest.calibration.items()
    assert name == "raw ekfac mean:0.1 at 0.5,0.9"
    queries = examples(3, seed=9)
    default, other = (
        run.score(queries, credit="additive"),
        run.score(queries, damping="mean:0.2", credit="additive"),
    )
    assert (default.attributes["calibration"], other.attributes["calibration"]) == (
        found.source,
        "none",
    )
    setting = Setting.of(run, calibrated=False)
    np.testing.assert_allclose(Setting.of(run).factors, setting.factors * found.factor)


def test_the_choice_is_compared_with_the_exact_ggn(run):
    found = tune(run, dampings=("mean:1",), curvatures=("ekfac", "kfac"), columns=2, keep=False)
    assert found.exact_residual <= 1e-2
    assert 0.5 < found.exact <= 1
    first = int(some_rows(run, 2)[0])
    queries = run.train[first : first + 1]
    run.manifest = replace(run.manifest, calibration={})
    chosen = {"at": found.chosen.at, "damping": "mean:1"}
    ours = run.score(queries, curvature=found.chosen.curvature, **chosen, credit="additive").values[
        0
    ]
    exact = run.score(queries, curvature="ggn", solver="pcg", **chosen, credit="additive").values[0]
    assert spearmanr(ours, exact)[0] > 0.5


def test_concentration_leaves_a_row_s_own_score_out():
    scores = np.array([[9.0, 1.0, 1.0, 2.0], [1.0, 9.0, 0.0, 0.0]])
    assert concentration(scores, np.array([0, 1])) == pytest.approx((0.5 + 1.0) / 2)
    assert concentration(np.zeros((2, 3)), np.array([0, 1])) == 0


def test_other_people_s_files_stay(model, tmp_path):
    """Overwriting a folder that holds no run, or one with strangers below it, removes nothing but a
    run's own files.
    """
    for made in (False, True):
        folder = tmp_path / str(made)
        (folder / "tune" / "notes").mkdir(parents=True)
        (folder / "tune" / "notes" / "precious.txt").write_text("mine")
        (folder / "tune" / "precious.txt").write_text("mine")
        for seed in range(1 + made):
            influence.fit(
                model, examples(4), directory=folder, path=(1.0,), seed=seed, overwrite=True
            )
        assert (folder / "tune" / "precious.txt").read_text() == "mine"
        assert (folder / "tune" / "notes" / "precious.txt").exists()


def test_a_truth_of_other_ids_is_refused(run):
    queries = examples(3, seed=9)
    truth = linear_truth(run, queries)
    for key, ids in (("query_ids", queries.ids), ("train_ids", run.train.ids)):
        named = Truth(truth.masks, truth.query_loss, None, {key: np.array(ids[::-1])})
        with pytest.raises(
            MismatchError, match="ids differ: the truth has the same ones in another order"
        ):
            tune(run, truth=named, queries=queries)
    assert not run.manifest.tuned


def test_a_choice_can_be_dropped(run):
    expected = run.score(examples(2, seed=9), credit="additive").values
    tune(run, dampings=("mean:1",), curvatures=("kfac",))
    assert not np.array_equal(run.score(examples(2, seed=9), credit="additive").values, expected)
    forget(run)
    again = influence.Run.open(run.directory, model=run.model, train=run.train)
    np.testing.assert_array_equal(
        again.score(examples(2, seed=9), credit="additive").values, expected
    )


def test_wrong_requests(run, model, tmp_path):
    queries = examples(3, seed=9)
    truth = linear_truth(run, queries)
    for options, sentence in (
        ({"truth": truth}, "together, or neither"),
        ({"truth": truth, "queries": examples(2, seed=9)}, "the truth is of 3 queries and 14 rows"),
        ({"curvatures": ("ggn",)}, "ggn has no closed-form inverse"),
        (
            {"truth": Truth(truth.masks[:4], truth.query_loss[:4]), "queries": queries},
            "give at least 8",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            tune(run, **options)
    assert not run.manifest.tuned
    ggn = influence.fit(
        model, examples(6), curvature=influence.GGN(), directory=tmp_path / "ggn", path=(1.0,)
    )
    with pytest.raises(InputError, match="fit one with ekfac"):
        tune(ggn)


def test_retraining_calibrates_shared_credit_too_and_says_its_faithfulness(tmp_path):
    """The truth is half of what shared scores say: their factor is found and used."""
    model = teach(
        build_model("gpt2", layers=1, target_modules=["attn.c_attn", "mlp.c_proj"]), examples(14)
    )
    run = influence.fit(model, examples(14), directory=tmp_path / "run", path=PATH)
    queries = examples(3, seed=9)
    plain = run.score(queries)
    assert plain.attributes["credit"] == "shared"
    truth = linear_truth(run, queries, curvature="ekfac", damping="mean:0.1", credit="shared")
    truth = replace(truth, query_loss=3 + (truth.query_loss - 3) / 2)
    found = tune(run, truth=truth, queries=queries, curvatures=["ekfac"], dampings=["mean:0.1"])
    assert found.chosen.at == "all"
    assert found.held_out.mean == pytest.approx(1.0)
    tuned = run.score(queries)
    assert tuned.attributes["calibration"].startswith("retraining")
    np.testing.assert_allclose(tuned.values, plain.values / 2, rtol=1e-4)


def figures(found, truth: bool) -> dict[str, np.ndarray]:
    """Everything that tune finds, as arrays, and what it chose."""
    rows = list(table_rows(found))
    names = [key for key in rows[0] if key not in ("setting", "factors")]
    made = {"names": np.array([row["setting"] for row in rows])}
    made["table"] = np.array([[row[name] for name in names] for row in rows])
    if truth:
        made["scores"] = np.stack([row.scores for row in found.judged])
        made["held out"] = np.array([found.held_out.mean])
    elif found.exact is not None:
        made["exact"] = np.array([found.exact, found.exact_residual])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "counts"),
    [
        pytest.param(torch.float64, 1e-10, (2, 3), marks=pytest.mark.slow, id="float64"),
        pytest.param(torch.float32, 1e-5, (2,), id="float32"),
    ],
)
def test_any_number_of_processes_finds_the_table_of_one(tmp_path, dtype, tolerance, counts):
    """Also where there are fewer queries than processes, and where no row's gradient is stored."""
    rows, queries = examples(14), examples(2, seed=9)
    options = {"layers": 1, "target_modules": ["attn.c_attn"], "dtype": dtype}
    model = teach(build_model("gpt2", **options), rows)
    fits = {"stored": {"path": PATH}, "streamed": {"path": (0.9,), "store": "never"}}
    for name, how in fits.items():
        run = influence.fit(model, rows, directory=tmp_path / "fitted" / name, **how)
        if name == "stored":
            truth = linear_truth(run, queries, noise=0.01)

    def tuned(name: str) -> dict[str, dict[str, np.ndarray]]:
        runs = {
            kind: influence.Run.open(tmp_path / name / kind, model=model, train=rows)
            for kind in fits
        }
        several = {"dampings": ("mean:1",), "geometries": ("function",) * (dtype == torch.float64)}
        by_truth = tune(runs["stored"], truth=truth, queries=queries, **several)
        grid = {"dampings": ("mean:1", "mean:0.1"), "curvatures": ("ekfac",)}
        columns = 2 * (dtype == torch.float64)
        by_checks = tune(runs["streamed"], columns=columns, **grid)
        return {"stored": figures(by_truth, True), "streamed": figures(by_checks, False)}

    for name in ("one", *(f"of {count}" for count in counts)):
        shutil.copytree(tmp_path / "fitted", tmp_path / name)
    expected = tuned("one")
    for count in counts:

        def work(rank: int, count: int = count) -> None:
            for kind, found in tuned(f"of {count}").items():
                for name, values in expected[kind].items():
                    if name == "names":
                        assert found[name].tolist() == values.tolist()
                        continue
                    size = np.abs(values).max(-1, keepdims=True)
                    allowed = np.broadcast_to(tolerance * size, values.shape).copy()
                    if name == "exact":  # of columns solved until all of a process's are
                        allowed = EXACT_TOLERANCE
                    if name == "table" and kind == "streamed":
                        allowed[:, 1] = 1e-2  # ranks of changes that are equal but for rounding
                    assert (np.abs(found[name] - values) <= allowed).all(), (kind, name)

        assert statuses(work, tmp_path, count) == [0] * count
        for kind in fits:
            one, other = (
                read_json(tmp_path / name / kind / "manifest.json")
                for name in ("one", f"of {count}")
            )
            assert one["tuned"].keys() == other["tuned"].keys()
            assert one["tuned"]["at"] == other["tuned"]["at"]
            assert list(one["calibration"]) == list(other["calibration"])


def test_what_a_process_cannot_measure_is_left_out_by_all(run, monkeypatch, tmp_path):
    """A setting whose edit fails in one process is in no process's table."""
    real = measured_edits

    def failing(setting, *others):
        if setting.rule == "mean:1":
            raise NumericalError("no finite loss")
        return real(setting, *others)

    monkeypatch.setattr("analysis.tune.measured_edits", failing)

    def work(rank: int) -> None:
        grid = {"dampings": ("mean:1", "mean:0.1"), "curvatures": ("ekfac",)}
        found = tune(run, keep=False, **grid)
        assert {row.damping for row in found.judged} == {"mean:0.1"}

    assert statuses(work, tmp_path, 2) == [0, 0]
