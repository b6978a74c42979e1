"""The pass over the training rows at one point: killed, resumed, and what it stores."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import influence
import influence.at_point as at_point_module
import influence.fitted_point as fitting
from influence import Run
from influence.errors import InputError, MismatchError, StoreError
from influence.scorefile import Scores
from tests.conftest import examples
from tests.helpers import contents, untouched
from tests.influence.toy_runs import (
    BUDGET,
    EVERY_KIND,
    KINDS,
    N_ROWS,
    Interruption,
    fit,
    interrupt_after,
    interrupted_fit,
    same_files,
    small_model,
    solver_of,
)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_fit_interrupted_between_batches_and_resumed_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, kind
):
    queries = examples(3, seed=9)
    expected = fit(tmp_path / "whole", kind).score(queries, solver=solver_of(kind)).values
    for checkpointed in (True, False):
        directory = tmp_path / f"resumed {checkpointed}"
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "CHECKPOINT_SECONDS", 0 if checkpointed else 1e9)
            interruptions = 0
            for batches in (1, 3, 2, 5):
                with patch.context() as inner:
                    interrupt_after(inner, batches)
                    try:
                        fit(directory, kind)
                    except Interruption:
                        interruptions += 1
                        with pytest.raises(
                            InputError, match=r"the fit in .* is unfinished: run the same"
                        ):
                            Run.open(directory, model=small_model(), train=examples(N_ROWS))
        run = fit(directory, kind)
        works = kind != "identity" or KINDS[kind][1] == "always"
        assert interruptions >= (2 if works else 0)
        names = ("factors", "gradients", "rows", "features")
        same_files(tmp_path / "whole", directory, *(f"{name}.h5" for name in names))
        scores = run.score(queries, solver=solver_of(kind)).values
        assert np.array_equal(scores, expected)
        assert sorted(contents(directory)) == sorted(
            contents(tmp_path / "whole")
        )  # nothing is left behind


def test_another_batch_plan_does_not_continue_a_checkpoint_but_gives_the_same_scores(
    tmp_path, monkeypatch
):
    expected = fit(tmp_path / "whole").score(examples(3, seed=9)).values
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0)
    interrupted_fit(monkeypatch, tmp_path / "run", 4)
    run = fit(tmp_path / "run", token_budget=100)
    scores = run.score(examples(3, seed=9)).values
    assert np.abs(scores - expected).max() < 1e-4 * np.abs(expected).max()


def in_child(work, kill_after: float | None) -> bool:
    """Run `work` in a forked process, killed after so many seconds; whether it came to its end."""
    pid = os.fork()
    if pid == 0:  # the child never returns into pytest
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    end = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (
                "the child failed by itself"
            )
            return os.WIFEXITED(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    "kind",
    [
        "ekfac",
        pytest.param("ekfac, nothing stored", marks=pytest.mark.slow),
        pytest.param("ekfac, two points", marks=pytest.mark.slow),
    ],
)
def test_sigkill_at_ten_random_moments_changes_nothing(tmp_path, monkeypatch, kind):
    train, queries = examples(50), examples(6, seed=9)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.02)
    monkeypatch.setattr(at_point_module, "BLOCK_BYTES", 10 * small_model().space.size * 4)

    def work(directory: Path) -> None:
        fit(directory, kind, train=train, token_budget=BUDGET).score(
            queries, out=directory / "scores.h5"
        )

    work(tmp_path / "warm")  # what is imported here is not in the children: kills fall on the work
    start = time.monotonic()
    assert in_child(lambda: work(tmp_path / "whole"), None)
    whole = time.monotonic() - start
    generator = random.Random(0)
    kills, directory, copies = 0, tmp_path / "run", 0
    while kills < 10 and copies < 30:
        if in_child(lambda path=directory: work(path), generator.uniform(0, 0.7 * whole)):
            # it came to its end: start over
            directory, copies = tmp_path / f"run {copies}", copies + 1
        else:
            kills += 1
    assert kills == 10
    for path in sorted(tmp_path.glob("run*")):
        assert in_child(lambda path=path: work(path), None)
        same_files(tmp_path / "whole", path, "factors.h5", "gradients.h5")
        assert np.array_equal(
            Scores.load(path / "scores.h5").values,
            Scores.load(tmp_path / "whole" / "scores.h5").values,
        )
        assert sorted(contents(path)) == sorted(contents(tmp_path / "whole"))


@pytest.mark.parametrize("lost", ["rows.h5", "gradients.h5"])
def test_a_resume_that_must_store_other_rows_starts_again(tmp_path, monkeypatch, lost):
    """A checkpoint says which row files it goes with: a larger disk budget, or a lost file, voids
    it.
    """
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)  # after every batch
    expected = fit(tmp_path / "whole", store="auto").score(examples(2, seed=9)).values
    row = small_model().space.size * 8 * N_ROWS
    interrupted_fit(
        monkeypatch, tmp_path / "budget", 4, store="auto", disk_budget=row
    )  # gradients, no rows
    scores = fit(tmp_path / "budget", store="auto").score(examples(2, seed=9)).values
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    interrupted_fit(monkeypatch, tmp_path / "lost", 4, store="auto")
    (tmp_path / "lost" / lost).unlink()
    assert np.array_equal(
        fit(tmp_path / "lost", store="auto").score(examples(2, seed=9)).values, expected
    )


def test_a_resume_of_sums_of_another_size_starts_again(tmp_path, monkeypatch):
    """A sketch that kept fewer directions, of an earlier version or on a smaller machine."""
    import influence.curvature.kfac as module

    few = influence.EKFAC(max_width=4, rank=2)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "device_memory", lambda device: 0)
        interrupted_fit(patch, tmp_path / "run", 3, curvature=few)
        other = fit(tmp_path / "other", curvature=few)
        assert not all(block.complete for block in other.curvature().leaf_blocks)
    expected = fit(tmp_path / "whole", curvature=few).score(examples(2, seed=9)).values
    found = fit(tmp_path / "run", curvature=few).score(examples(2, seed=9)).values
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_foreign_row_file_in_an_unfinished_fit_is_not_continued(tmp_path, monkeypatch):
    """Row files that a killed fit left are trusted only if they are this run's own."""
    fit(tmp_path / "theirs", seed=1)
    directory = tmp_path / "ours"
    interrupted_fit(monkeypatch, directory, 2)
    shutil.copy(tmp_path / "theirs" / "gradients.h5", directory / "gradients.h5")
    with (
        untouched(directory),
        pytest.raises(MismatchError, match=r"gradients.h5 belongs to another run"),
    ):
        fit(directory)


def test_a_truncated_row_file_in_an_unfinished_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0)
    interrupted_fit(monkeypatch, tmp_path, 2)
    for name in ("gradients.h5", "rows.h5", "checkpoint.h5"):
        shutil.copytree(tmp_path, tmp_path.parent / name)
        os.truncate(tmp_path.parent / name / name, 1000)
        with (
            untouched(tmp_path.parent / name),
            pytest.raises(StoreError, match=f"{name} is damaged, truncated"),
        ):
            fit(tmp_path.parent / name)


def test_sums_that_take_long_to_write_are_written_more_rarely(tmp_path, monkeypatch):
    """A clock by hand: a batch takes 30 seconds, a checkpoint 10, so 300 lie between two of them."""
    now, written = [0.0], []
    run_batch = fitting.PointFit.run_batch

    def slow_batch(*arguments):
        now[0] += 30
        return run_batch(*arguments)

    def slow_checkpoint(_, done: np.ndarray):
        now[0] += 10
        written.append(int(done.sum()))

    monkeypatch.setattr(fitting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(fitting.PointFit, "run_batch", slow_batch)
    monkeypatch.setattr(fitting.PointFit, "checkpoint", slow_checkpoint)
    fit(tmp_path / "run", token_budget=1)  # a row a batch
    assert written == [3, 14]


@pytest.mark.parametrize("kind", ["ekfac", "kfac, nothing stored"])
def test_progress_counts_rows_in_every_pass(tmp_path, monkeypatch, capfd, kind):
    """Of the fit and of the scores, read or computed: the last line of a pass has all rows."""
    monkeypatch.setattr("influence.progress.INTERVAL", -1.0)
    run = fit(tmp_path / "run", kind)
    run.score(examples(2, seed=9), credit="additive", per_token=True)
    counted: dict[str, list[str]] = {}
    for line in capfd.readouterr().err.splitlines():
        label, shown = line.split(", about ")[0].rsplit(": ", 1) if "/" in line else ("", "")
        counted.setdefault(label, []).append(shown)
    labels = {"training rows", "training rows, token by token"}
    if kind == "ekfac":
        labels.add("stored gradients")
    assert labels <= set(counted)
    for label in labels:
        assert counted[label][-1] == f"{N_ROWS}/{N_ROWS}"
        assert len(counted[label]) > 1 or label == "stored gradients"
