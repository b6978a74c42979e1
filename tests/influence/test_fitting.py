"""Fits that are killed and resumed, refused, replaced or left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

import influence
from influence import Run
from influence.errors import InputError, MismatchError, StoreError
from influence.scorefile import Scores
from tests.conftest import build_model, examples, rows
from tests.helpers import save, untouched
from tests.influence.toy_runs import (
    fit,
    same_files,
)

N, PATH = 9, (0.4, 0.8)


SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


def test_a_finished_fit_computes_nothing_again(model, run, tmp_path, monkeypatch):
    """Not the scales of its points, nor its calibration, though nothing is stored."""
    options = {"path": PATH, "directory": tmp_path / "run", "store": "never"}
    expected = influence.fit(model, run.train, **options).manifest
    monkeypatch.setattr("influence.at_point.stream_gradients", None)
    assert influence.fit(model, run.train, **options).manifest == expected


def test_a_finished_fit_keeps_within_what_is_given_now(model, run):
    """It was made with more memory; what is asked of it now is not."""
    assert run.token_budget == run.manifest.token_budget > 16
    options = {"path": PATH, "directory": run.directory}
    assert influence.fit(model, run.train, token_budget=16, **options).token_budget == 16
    with influence.bounded(token_budget=32):
        assert influence.fit(model, run.train, **options).token_budget == 32
    again = influence.fit(model, run.train, token_budget=10**6, **options)
    assert again.token_budget == run.manifest.token_budget == again.manifest.token_budget


@pytest.mark.slow
def test_commands_killed_at_ten_random_moments_change_nothing(tmp_path):
    base, adapter = save(tmp_path, "llama")
    for name, count, seed in (("train", 300, 0), ("queries", 30, 9)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(count, seed))
        )

    def commands(run: Path) -> list[list[str]]:
        fit = [
            "fit",
            "--model",
            base,
            "--adapter",
            adapter,
            "--train",
            tmp_path / "train.jsonl",
            "--token-budget",
            "40",
        ]
        score = ["score", "--run", run, "--queries", tmp_path / "queries.jsonl"]
        start = (
            "import influence.fitted_point as r; r.CHECKPOINT_SECONDS = 0.05; from influence.cli "
            "import main; main()"
        )
        return [[sys.executable, "-c", start, *map(str, c)] for c in ([*fit, "--run", run], score)]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    lasted = []
    for command in commands(tmp_path / "whole"):
        start = time.monotonic()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lasted.append(time.monotonic() - start)
    expected = Scores.load(tmp_path / "whole" / "scores.h5").values
    generator = random.Random(0)
    for number, (command, made) in enumerate(
        zip(commands(tmp_path / "run"), ["run", "run/scores.h5"], strict=True)
    ):
        kills = 0
        while kills < 5:
            process = subprocess.Popen(
                command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            start = time.monotonic()
            try:
                assert process.wait(generator.uniform(0.4, 1) * lasted[number]) == 0
                lasted[number] = time.monotonic() - start  # other work slowed the first one down
                made_it = tmp_path / made  # it came to its end: start over
                shutil.rmtree(made_it) if made_it.is_dir() else made_it.unlink()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert np.array_equal(Scores.load(tmp_path / "run" / "scores.h5").values, expected)
    same_files(tmp_path / "whole", tmp_path / "run", "factors.h5", "gradients.h5")


def test_what_is_supervised_is_kept_in_the_run_and_only_where_it_is_not_the_last_answer(tmp_path):
    plain, every = fit(tmp_path / "plain"), fit(tmp_path / "all", supervise="all")
    assert "supervise" not in plain.manifest.identity
    assert "supervise" not in plain.manifest.as_json()["objective"]
    assert every.manifest.identity["supervise"] == "all"
    assert every.tokens.counts.sum() > plain.tokens.counts.sum()
    again = Run.open(tmp_path / "all", model=every.model, train=every.train)
    assert again.tokens.counts.tolist() == every.tokens.counts.tolist()
    queries = examples(2, seed=9)
    # a query is explained by its answer, whatever training supervised
    assert (
        again.query_tokens(queries).counts.tolist() == plain.query_tokens(queries).counts.tolist()
    )
    every_token = again.query_tokens(queries, "all").counts
    assert every_token.tolist() == again.tokenized(queries).counts.tolist()
    assert every_token.sum() > again.query_tokens(queries).counts.sum()
    assert not np.allclose(again.score(queries).values, again.score(queries, explain="all").values)
    with pytest.raises(InputError, match="supervise 'first' was given"):
        again.score(queries, explain="first")
    with pytest.raises(MismatchError, match="supervise is all there and last here"):
        fit(tmp_path / "all")


def test_a_disk_that_is_too_small_is_told_before_the_pass(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run = fit(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
        message = (
            r"what is kept of the rows at all points needs \d+\.\d+ GB and 0.00 GB are free on "
            r"the disk of .*free some space, .*--store features or none"
        )
        with pytest.raises(StoreError, match=message):
            fit(tmp_path / "full")
        assert not (tmp_path / "full" / "gradients.h5").exists()
        with (
            untouched(tmp_path / "run"),
            pytest.raises(StoreError, match=r"scores.h5.* GB are free on its disk"),
        ):
            run.score(examples(2, seed=9), out=tmp_path / "run" / "scores.h5")
    fit(tmp_path / "full")  # goes on once there is room


def test_too_little_disk_for_similarities_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    """Where landmarks would take less, the option that gives them is named."""
    for module in ("fitting", "kernel", "fit_plan"):
        monkeypatch.setattr(f"influence.{module}.WHOLE_ROWS", 3)
    monkeypatch.setattr("influence.fitting.directory_for", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr("influence.fitting.PointFit", None)  # no point is begun
        with pytest.raises(TypeError):
            fit(tmp_path / "few")
    said = capsys.readouterr().err
    assert "note: the similarities of the rows need 0.0 GB beside what is kept of them" in said
    assert "credit will be additive; free some space\n" in said
    for module in ("fitting", "kernel"):
        monkeypatch.setattr(f"influence.{module}.EXACT_ROWS", 3)
    fit(tmp_path / "many")
    assert "free some space, or give a smaller --disk\n" in capsys.readouterr().err


def test_the_disk_budget_decides_what_auto_stores(tmp_path):
    stored, streamed = (fit(tmp_path / str(b), store="auto", disk_budget=b) for b in (1e9, 10.0))
    assert (stored.gradients_stored, streamed.gradients_stored) == (True, False)
    assert not (tmp_path / "10.0" / "gradients.h5").exists()
    one, other = (run.score(examples(3, seed=9)).values for run in (stored, streamed))
    assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()
