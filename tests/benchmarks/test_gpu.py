"""The benchmark for one GPU, run whole on a CPU with a tiny shape."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import gpu  # pyright: ignore[reportMissingImports]

STEPS = ["build", "gradients", "bare", "fit few", "pass", "fit", "score", "remove", "forecast"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A fit on few rows that leaves rows for the long one, and products in TF32 as they were."""
    monkeypatch.setattr(gpu, "FEW", 4)
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def ran(tmp_path, *options: str, shapes: str = "tiny"):
    """The record of a run, which its file holds too."""
    arguments = ["--device", "cpu", "--shapes", shapes, "--rows", "12", "--queries", "2"]
    out = tmp_path / "gpu.json"
    record = gpu.main([*arguments, "--r", "4", "--out", str(out), *options])
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    return record


@pytest.mark.slow
def test_every_step_is_measured(tmp_path, capsys):
    record = ran(tmp_path)
    steps = record["shapes"]["tiny"]
    assert list(steps) == STEPS
    assert [name for name, step in steps.items() if {"error", "skipped"} & step.keys()] == []
    assert 0 < max(steps["gradients"]["relative_errors"]) < 0.02  # bfloat16
    assert max(steps["gradients"]["relative_errors_in_float32"]) < 1e-5
    for name in ("bare", "pass", "fit"):
        assert steps[name]["tokens_per_second"] > 0
        assert 0 < steps[name]["share_of_peak"] < 1
    assert steps["pass"]["tokens"] == steps["bare"]["tokens"]
    assert 1 <= steps["pass"]["profile"]["stops"] <= 10
    assert len(steps["pass"]["profile"]["kernels"]) == 15
    assert steps["fit"]["rows"] == 12
    assert steps["score"]["shape"] == [2, 12]
    assert steps["score"]["finite"]
    assert steps["remove"]["finite"]
    assert steps["forecast"]["rows"] == 10
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_fails_is_told_and_what_is_slow_is_stopped(tmp_path, monkeypatch, capsys):
    def fails(self):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(gpu.Bench, "fit_few", fails)
    monkeypatch.setattr(gpu.Bench, "bare", lambda self: time.sleep(60))
    monkeypatch.setattr(gpu, "STEP_SHARE", 0.0)
    monkeypatch.setattr(gpu, "LEAST", 1.5)
    monkeypatch.setattr(gpu.Bench, "build", unhurried(gpu.Bench.build))
    monkeypatch.setattr(gpu.Bench, "gradients", unhurried(gpu.Bench.gradients))
    steps = ran(tmp_path)["shapes"]["tiny"]
    assert "broken on purpose" in steps["fit few"]["error"]
    assert "in fails" in steps["fit few"]["traceback"]
    assert steps["bare"]["error"].startswith("TimeoutError: stopped after")
    assert steps["bare"]["seconds"] < 30
    assert steps["score"] == {"skipped": "nothing was fitted"}
    assert "relative_errors" in steps["gradients"]
    assert "FAILED: RuntimeError: broken on purpose" in capsys.readouterr().out


def unhurried(step):
    """A step whose clock is put off."""

    def work(self):
        gpu.signal.setitimer(gpu.signal.ITIMER_REAL, 0)
        return step(self)

    return work


def test_nothing_begins_once_the_budget_is_over(tmp_path):
    steps = ran(tmp_path, "--budget", "0", shapes="tiny,1b")["shapes"]
    for shape in ("tiny", "1b"):
        assert list(steps[shape]) == STEPS
        assert all(list(step) == ["skipped"] for step in steps[shape].values())


def test_a_fit_gets_the_rows_that_there_is_time_for(tmp_path):
    """A pass of 100 tokens a second, 2.5 of them a fit, and 4 seconds that rows do not change."""
    bench = gpu.Bench.__new__(gpu.Bench)
    bench.steps = {
        "pass": {"tokens_per_second": 100.0},
        "fit few": {"rows": 2, "seconds": 4 + 2.5 * 0.2},
    }
    tokens = type("Tokens", (), {"lengths": gpu.np.full(9, 10), "__len__": lambda self: 9})()
    assert bench.rows_for(tokens, 4 + 2.5 * 0.6) == 6
    assert bench.rows_for(tokens, 1000.0) == 9
    with pytest.raises(gpu.Skipped, match="too few"):
        bench.rows_for(tokens, 4.2)


def test_wrong_calls_are_refused(capsys):
    for arguments, why in ((["--shapes", "2b"], "unknown shapes 2b"), ([], "there is no GPU")):
        if why.startswith("there") and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert why in capsys.readouterr().err
