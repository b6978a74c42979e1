"""Score files: resumed, read by others, and never written over by mistake."""

from __future__ import annotations

import os
from dataclasses import replace

import h5py
import numpy as np
import pytest

import influence
import influence.at_point as at_point_module
from influence import scorefile
from influence.at_point import AtPoint
from influence.errors import MismatchError, StoreError
from influence.manifest import CalibrationRecord
from influence.scorefile import Scores
from influence.scores import (
    CONVENTION,
    SELF_CONVENTION,
    SHARED_CONVENTION,
    SHARED_SELF_CONVENTION,
)
from influence.setting import ADDITIVE, CREDITS, SHARED, Setting
from tests.conftest import build_model, examples, fit_end, teach
from tests.helpers import untouched
from tests.influence.toy_runs import N_ROWS, Interruption, fit, small_model

N, PATH = 9, (0.4, 0.8)
CONVENTIONS = {
    ADDITIVE: (CONVENTION, SELF_CONVENTION),
    SHARED: (SHARED_CONVENTION, SHARED_SELF_CONVENTION),
}


SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return teach(build_model("gpt2", **SITES), examples(N))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


@pytest.mark.parametrize("credit", CREDITS)
def test_a_calibrated_score_of_one_point_is_calibrated_once(model, tmp_path, monkeypatch, credit):
    """Killed after the sum was made and before the file was moved into place: it must not be
    multiplied again.
    """
    fitted = fit_end(model, examples(5), directory=tmp_path / "run")
    queries = examples(2, seed=1)
    plain = fitted.score(queries, credit=credit)
    assert plain.attributes["credit"] == credit
    name = Setting.of(fitted, credit=credit).name
    calibration = {name: CalibrationRecord(3.0, "by hand")}
    fitted.manifest = replace(fitted.manifest, calibration=calibration)
    expected = fitted.score(queries, credit=credit).values
    np.testing.assert_allclose(expected, 3 * plain.values, rtol=1e-6)

    def killed(self, result, run):
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(scorefile.ScoresInTheMaking, "seal", killed)
        with pytest.raises(Interruption):
            fitted.score(queries, out=tmp_path / "s.h5", credit=credit)
    resumed = fitted.score(queries, out=tmp_path / "s.h5", credit=credit)
    np.testing.assert_array_equal(resumed.values, expected)


def test_parts_of_another_request_are_not_taken_for_this_ones(run, tmp_path, monkeypatch):
    """A is killed at its end; B is killed while it lays out its files over A's; A is asked for
    again.
    """
    A, B = examples(3, seed=1), examples(3, seed=2)
    expected, out = run.score(A).values, tmp_path / "s.h5"

    def killed(*_arguments):
        raise Interruption

    for queries, target, name in (
        (A, scorefile.ScoresInTheMaking, "seal"),
        (B, scorefile, "_lay_out"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, killed)
            with pytest.raises(Interruption):
                run.score(queries, out=out)
    np.testing.assert_array_equal(run.score(A, out=out).values, expected)


@pytest.mark.parametrize("kind", ["ekfac", "ekfac, nothing stored", "ekfac, two points"])
def test_a_scoring_interrupted_between_blocks_and_resumed_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, kind, capfd
):
    run = fit(tmp_path / "run", kind)
    queries = examples(5, seed=9)
    monkeypatch.setattr(
        at_point_module, "BLOCK_BYTES", 5 * run.model.space.size * 4
    )  # five rows at a time
    monkeypatch.setattr(at_point_module, "BLOCK_ROWS", 1)
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 2)
    expected = run.score(queries, out=tmp_path / "whole.h5", per_module=True)
    expected, by_module = expected.values, expected.modules
    out = tmp_path / "resumed.h5"
    real, interruptions = AtPoint.gradient_blocks, 0
    for blocks in (2, 1, 3, 5, 1, 2):
        left = blocks

        def few(self, skip=None, **options):
            nonlocal left
            for item in real(self, skip, **options):
                if left == 0:
                    raise Interruption
                left -= 1
                yield item

        with monkeypatch.context() as patch:
            patch.setattr(AtPoint, "gradient_blocks", few)
            try:
                run.score(queries, out=out, per_module=True)
            except Interruption:
                interruptions += 1
                assert not out.exists()
    capfd.readouterr()
    scores = run.score(queries, out=out, per_module=True)
    assert interruptions == 6
    assert "resuming" in capfd.readouterr().err
    assert np.array_equal(scores.values, expected)
    assert np.array_equal(scores.modules, by_module)
    assert np.array_equal(Scores.load(out).values, expected)
    assert not list(tmp_path.glob("*.part*"))


def test_a_partial_score_file_of_another_request_is_not_continued(tmp_path, monkeypatch):
    run = fit(tmp_path / "run")
    out = tmp_path / "scores.h5"
    with monkeypatch.context() as patch:
        patch.setattr(
            AtPoint, "gradient_blocks", lambda *_, **__: (_ for _ in ()).throw(Interruption)
        )
        with pytest.raises(Interruption):
            run.score(examples(3, seed=9), out=out)
    assert out.with_name("scores.h5.partial").exists()
    queries = examples(3, seed=8)
    assert np.array_equal(run.score(queries, out=out).values, run.score(queries).values)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_truncated_score_file_is_named_and_nothing_is_overwritten(tmp_path, share):
    run, out = fit(tmp_path), tmp_path / "scores.h5"
    run.score(examples(2, seed=9), out=out)
    os.truncate(out, int(share * out.stat().st_size))
    for call in (
        lambda: Scores.load(out),
        lambda: run.score(examples(2, seed=9), out=out),
        lambda: run.self_influence(out=out),
    ):
        with (
            untouched(tmp_path),
            pytest.raises(
                StoreError, match=r"scores.h5 is damaged, truncated, or not an HDF5 file"
            ),
        ):
            call()
    run.score(examples(2, seed=9), out=out, overwrite=True)
    assert Scores.load(out).values.shape == (2, N_ROWS)


def test_a_file_in_the_way_of_an_unfinished_score_file_is_left_alone(tmp_path):
    run, out = fit(tmp_path), tmp_path / "scores.h5"
    (tmp_path / "scores.h5.partial").write_bytes(b"somebody else's")
    with (
        untouched(tmp_path),
        pytest.raises(MismatchError, match="is in the way and is no unfinished score file"),
    ):
        run.score(examples(2, seed=9), out=out)


def test_a_run_s_own_files_are_no_place_for_scores(tmp_path):
    run = fit(tmp_path)
    for name in ("gradients.h5", "factors.h5"):
        with untouched(tmp_path), pytest.raises(MismatchError, match="no score file"):
            run.score(examples(2, seed=9), out=tmp_path / name)
        with untouched(tmp_path), pytest.raises(MismatchError, match="no score file"):
            run.self_influence(out=tmp_path / name)


def test_an_unfinished_score_file_is_not_read_as_scores(tmp_path, monkeypatch):
    run = fit(tmp_path)
    monkeypatch.setattr("influence.scorefile.ScoresInTheMaking.seal", lambda _, result, run: result)
    run.score(examples(2, seed=9), out=tmp_path / "s.h5")
    with pytest.raises(
        StoreError, match="is unfinished: run the same influence score command again"
    ):
        Scores.load(tmp_path / "s.h5.partial")


def test_two_processes_do_not_write_the_same_file(tmp_path):
    from influence.store import only_writer

    run = fit(tmp_path)
    with (
        only_writer(tmp_path / "s.h5"),
        pytest.raises(StoreError, match="another process is writing to"),
    ):
        run.score(examples(2, seed=9), out=tmp_path / "s.h5")
    with (
        only_writer(tmp_path / "new"),
        pytest.raises(StoreError, match="another process is writing to"),
    ):
        fit(tmp_path / "new")


def test_solver_options_are_part_of_the_request(tmp_path):
    from influence.solvers import CG

    run = fit(tmp_path)
    run.score(examples(2, seed=9), out=tmp_path / "s.h5", solver=CG(tolerance=0.5))
    with pytest.raises(MismatchError, match="another options"):
        run.score(examples(2, seed=9), out=tmp_path / "s.h5", solver=CG(tolerance=1e-8))


def test_scores_of_another_run_or_request_are_not_replaced(tmp_path):
    ours, theirs = fit(tmp_path / "ours"), fit(tmp_path / "theirs", seed=1)
    out, queries = tmp_path / "scores.h5", examples(2, seed=9)
    theirs.score(queries, out=out)
    theirs.self_influence(out=out)
    with untouched(tmp_path):
        with pytest.raises(
            MismatchError,
            match=r"holds other scores \(.*run_digest.*\): give another --out, or --overw",
        ):
            ours.score(queries, out=out)
        with pytest.raises(MismatchError, match="belongs to another run"):
            ours.self_influence(out=out)
        for options, named in [
            (
                {"measurement": "margin"},
                "measurement loss there, margin now; unit nats per token there, log-odds per "
                "token now; .*",
            ),
            (
                {"curvature": "identity"},
                "another convention; curvature ekfac there, identity now; .*damping.*; credit "
                "shared there, additive now",
            ),
            (
                {"credit": "additive"},
                "another convention; another factors; credit shared there, additive now",
            ),
            (
                {"damping": "mean:0.2"},
                "damping mean:0.1 there, mean:0.2 now; another lambda; another factors; another "
                "path_time; another strength",
            ),
            ({"solver": "cg"}, "solver direct there, cg now; another options"),
        ]:
            with pytest.raises(MismatchError, match=rf"holds other scores \({named}\)"):
                theirs.score(queries, out=out, **options)
        with pytest.raises(MismatchError, match=r"holds other scores \(of other queries\)"):
            theirs.score(examples(2, seed=8), out=out)
        with pytest.raises(
            MismatchError,
            match=r"holds another self-influence "
            r"\(damping mean:0.1 there, mean:0.2 now; another lambda; another factors; "
            r"another path_time; another strength\)",
        ):
            theirs.self_influence(out=out, damping="mean:0.2")
    ours.score(queries, out=out, overwrite=True)
    with h5py.File(out) as file:
        assert file.attrs["run_digest"] == ours.digest
        assert "self_influence" not in file  # it was of another run


def test_a_plain_hdf5_file_is_no_score_file(tmp_path):
    run, out = fit(tmp_path / "run"), tmp_path / "mine.h5"
    with h5py.File(out, "w") as file:
        file["precious"] = np.arange(3)
    with untouched(tmp_path):
        with pytest.raises(
            StoreError, match="is no score file: it lacks scores, query_ids, train_ids"
        ):
            Scores.load(out)
        with pytest.raises(MismatchError, match=r"mine.h5 holds other scores"):
            run.score(examples(2, seed=9), out=out)
        with pytest.raises(MismatchError, match=r"mine.h5 belongs to another run"):
            run.self_influence(out=out)


@pytest.mark.parametrize("credit", CREDITS)
def test_plain_h5py_reads_the_scores(tmp_path, credit):
    run = fit(tmp_path / "run")
    queries = influence.examples_from_rows(
        [{"id": f"q {i} äé東", "text": "the red fox"} for i in range(3)]
    )
    out = tmp_path / "scores.h5"
    options = {"measurement": "margin", "solver": "cg", "damping": "top:0.01", "credit": credit}
    scores = run.score(queries, out=out, **options)
    with h5py.File(out) as file:
        assert file["scores"].dtype == np.float32
        assert file["scores"].shape == (3, N_ROWS)
        assert np.array_equal(file["scores"], scores.values)
        assert [id.decode() for id in file["query_ids"]] == queries.ids
        assert [id.decode() for id in file["train_ids"]] == examples(N_ROWS).ids
        assert h5py.check_string_dtype(file["query_ids"].dtype).encoding == "utf-8"
        assert file["done"][()].all()
        assert file["residuals"].shape == file["converged"].shape == (3,)
        attributes = dict(file.attrs)
    assert attributes["convention"] == CONVENTIONS[credit][0]
    assert attributes["credit"] == credit
    if credit == SHARED:
        assert attributes["path_time"] > 0
        assert attributes["strength"] > 0
        np.testing.assert_allclose(attributes["factors"].sum(), attributes["path_time"])
    assert (attributes["measurement"], attributes["curvature"], attributes["solver"]) == (
        "margin",
        "ekfac",
        "cg",
    )
    assert attributes["damping"] == "top:0.01"
    assert attributes["unit"]
    assert attributes["lambda"].shape == (4,)
    assert attributes["residuals"] == scores.residuals.max()
    assert attributes["complete"]
    digests = {
        "run": run.digest,
        "base": small_model().base_digest,
        "adapter": small_model().adapter_digest,
    }
    digests |= {"data": examples(N_ROWS).digest}
    assert {name: attributes[f"{name}_digest"] for name in digests} == digests
    assert attributes["query_digest"] == queries.digest
    assert attributes["version"] == run.manifest.versions["lora-influence"]


@pytest.mark.parametrize("credit", CREDITS)
def test_self_influence_and_scores_share_a_file_without_harm(tmp_path, credit):
    run, queries, out = fit(tmp_path / "run"), examples(2, seed=9), tmp_path / "both.h5"
    scores = run.score(queries, out=out, credit=credit)
    self_influence = run.self_influence(out=out, credit=credit)
    for _ in range(2):
        with h5py.File(out) as file:
            assert np.array_equal(file["scores"], scores.values)
            assert np.array_equal(file["self_influence"], self_influence.values)
            assert file["self_influence"].shape == (N_ROWS,)
            assert file["self_influence"].dtype == np.float32
            assert file["self_influence"].attrs["convention"] == CONVENTIONS[credit][1]
            assert file.attrs["convention"] == CONVENTIONS[credit][0]
        # keeps the self-influence
        scores = run.score(examples(4, seed=8), out=out, overwrite=True, credit=credit)
    assert sorted(path.name for path in tmp_path.glob("*.h5*")) == ["both.h5"]


def test_self_influence_first_and_scores_after(tmp_path):
    run, out = fit(tmp_path / "run"), tmp_path / "both.h5"
    self_influence = run.self_influence(out=out)
    with pytest.raises(StoreError, match="is no score file: it lacks scores, query_ids"):
        Scores.load(out)
    run.score(examples(2, seed=9), out=out)
    with h5py.File(out) as file:
        assert np.array_equal(file["self_influence"], self_influence.values)
        assert file["scores"].shape == (2, N_ROWS)
