"""`unlearn train` killed, gone on, and shared out by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import influence
from influence.run import Run
from tests.unlearn.methods.commands.helpers import (
    FORGET,
    ROOT,
    interrupted_after,
)
from unlearn.cli import main


def test_an_interrupted_command_goes_on(train, run, tmp_path, monkeypatch):
    how = ("--until", "steps=7", "--lr", 0.01, "--schedule", "cosine", "--save-every", 2)
    assert train(*how, "--out", tmp_path / "whole").status == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 5)
        stopped = train(*how, "--start", "original")
    assert stopped.status not in (0, 2)
    assert "Traceback" not in stopped.err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["state.pt"]
    other = train(*how, "--lr", 0.02, "--start", "original")
    assert other.status == 2
    assert "holds another training: it differs in lr. Ask for the same one to go on" in " ".join(
        other.err.split()
    )
    done = train(*how, "--start", "original")
    assert done.status == 0
    assert "going on after step 4 of 7" in done.err
    assert not (tmp_path / "out.training").exists()
    whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_interrupt_says_that_the_same_command_goes_on(train, monkeypatch):
    interrupted_after(monkeypatch, 3)
    stopped = train("--until", "steps=7", "--save-every", 1)
    assert "interrupted" in stopped.err
    assert "train" in stopped.err.replace("retrain", "")


def test_overwrite_begins_anew(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, 3)
        train("--until", "steps=5", "--save-every", 1)
    done = train("--until", "steps=4", "--save-every", 1, "--overwrite")
    assert done.status == 0
    assert "going on" not in done.err
    assert len((tmp_path / "out" / "steps.jsonl").read_text().splitlines()) == 4
    state = tmp_path / "two.training" / "state.pt"
    state.parent.mkdir()
    state.write_bytes(b"damaged")
    call = ("--until", "steps=4", "--out", tmp_path / "two", "--start", "original")
    refused = train(*call)
    assert refused.status == 1
    assert "state.pt is damaged" in refused.err
    assert train(*call, "--overwrite").status == 0
    assert not state.parent.exists()


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }


def command(run: Path, out: Path, *arguments) -> list[str]:
    options = [
        "train",
        "--run",
        run,
        "--device",
        "cpu",
        "--out",
        out,
        "--start",
        "original",
        *arguments,
    ]
    return ["unlearn", *map(str, options)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("--method", "ga-gd", "--schedule", "linear", "--lr", 0.001, "--batch-size", 2),
        ("--method", "ngdiff", "--batch-size", 2, "--retain-batch-size", 4),
    ],
    ids=["Adam", "ngdiff"],
)
def test_a_killed_command_goes_on_bit_for_bit(run, tmp_path, how):
    """SIGKILL at whatever it does when its first state is there, and once more later."""
    how = (*how, "--ids", FORGET, "--until", "steps=400", "--save-every", 1)
    whole = subprocess.run(
        [sys.executable, "-m", *command(run, tmp_path / "whole", *how)],
        env=environment(),
        capture_output=True,
    )
    assert whole.returncode == 0, whole.stderr.decode()
    state, before = tmp_path / "out.training" / "state.pt", -1
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-m", *command(run, tmp_path / "out", *how)],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 120
        while time.monotonic() < end and child.poll() is None:
            if state.exists() and torch.load(state, weights_only=True)["done"] > before + 20:
                break
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        before = torch.load(state, weights_only=True)["done"]
        assert 0 < before < 400
    done = subprocess.run(
        [sys.executable, "-m", *command(run, tmp_path / "out", *how)],
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "going on after step" in done.stderr.decode()
    assert not state.parent.exists()
    whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    first, second = ((tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "out"))
    assert first == second


@pytest.mark.parametrize("place", ["help", "methods.md"])
def test_the_torchrun_command_that_is_told_can_be_called(run_main, place, capfd):
    """torchrun's own parser, on the line as it stands, with options that every training has."""
    from torch.distributed.run import parse_args

    if place == "help":
        text = " ".join(run_main(main, "unlearn", "train", "--help").out.split())
    else:
        text = (ROOT / "docs" / place).read_text(encoding="utf-8")
    line = text.split("torchrun ")[1].split(" ...")[0].split("\n")[0]
    words = line.replace(" N ", " 2 ").split()
    try:
        result = parse_args(
            [*words, "--run", "run", "--ids", "a", "--method", "ga", "--out", "out"]
        )
    except SystemExit:
        pytest.fail(capfd.readouterr().err.splitlines()[-1])
    assert result.training_script == "unlearn"
    assert result.training_script_args[:3] == ["train", "--run", "run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (
            "float64",
            ("--method", "ga-kl", "--ids", FORGET, "--batch-size", 2, "--retain-batch-size", 3),
        ),
        ("float32", ("--method", "npo", "--ids", "r0-1", "--retain-batch-size", 1)),
        ("float64", ("--method", "ngdiff", "--ids", "r0-1,r0-2", "--retain-batch-size", 5)),
    ],
    ids=["ga-kl", "one row", "ngdiff"],
)
def test_torchrun_gives_what_one_process_gives(made, tmp_path, dtype, how):
    model = influence.load(made / "base", made / "adapter", dtype=dtype, device="cpu")
    run = tmp_path / "run"
    influence.fit(model, influence.read_examples(made / "train.jsonl"), directory=run, path=(0.6,))
    how = (*how, "--until", "steps=12", "--lr", "auto" if "ngdiff" in how else 0.01, "--json")
    alone = subprocess.run(
        [sys.executable, "-m", *command(run, tmp_path / "one", *how)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
    ]
    two = subprocess.run(
        [*torchrun, *command(run, tmp_path / "two", *how)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["written"] is True  # one process speaks
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")
    )
    for key in first:
        torch.testing.assert_close(
            first[key], second[key], rtol=0, atol=1e-9 if dtype == "float64" else 1e-5
        )
    assert Run.open(run, model=model).manifest.audit.entries == 2
    refused = subprocess.run(
        [
            *torchrun,
            *command(run, tmp_path / "three", "--method", "ga", "--ids", FORGET),
            *("--max-damage", "0.001", "--lr", "0.1", "--until", "steps=8"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert refused.returncode != 0  # and nobody waits for ever
    assert "nothing was written" in refused.stderr
    assert not (tmp_path / "three").exists()
