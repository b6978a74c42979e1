"""The commands under torchrun: one answer, one message, and a run that goes on where it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.conftest import rows
from tests.helpers import save, write_rows
from tests.influence.toy_commands import SITES

ROOT = Path(__file__).parents[2]
#: A command of which one process ends in the middle of the pass.
DRIVER = """
import os, signal
import influence.fitted_point as fitting
from influence import distributed
from influence.errors import NumericalError

fitting.CHECKPOINT_SECONDS, distributed.ROUND_SECONDS = -1, 0
real, ran = fitting.PointFit.run_batch, []

def run_batch(self, *arguments):
    ran.append(1)
    if len(ran) == 4 and distributed.rank() == 1:
        END
    return real(self, *arguments)

fitting.PointFit.run_batch = run_batch
if __name__ == "__main__":
    from influence.cli import main
    main()
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
RAISED = "raise NumericalError('the second process found a NaN')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("commands")
    save(at, **SITES)
    write_rows(at / "train.jsonl", rows(20))
    write_rows(at / "queries.jsonl", rows(4, seed=9))
    return at


def call(processes: int, *line: object, script: Path | None = None, program: str = "influence"):
    """A command in some processes, or a script with its arguments."""
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    start = start if processes > 1 else []
    what = ["-m", "--", program] if script is None else [script]
    if processes == 1:
        what = [program] if script is None else [script]
    begin = ["-m"] if processes > 1 or script is None else []
    return subprocess.run(
        [sys.executable, *map(str, [*begin, *start, *what, *line])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def told(text: str) -> list[str]:
    """The lines that tell of errors, without torchrun's own report."""
    return re.findall(r"(?mi)^error: .*", text)


def fit_line(at: Path, run: str) -> list[object]:
    options = {"--model": at / "base", "--adapter": at / "adapter", "--train": at / "train.jsonl"}
    options |= {"--run-dir": at / run, "--token-budget": 20, "--device": "cpu"}
    return ["fit", *(part for pair in options.items() for part in pair)]


def scores(at: Path, run: str, processes: int) -> np.ndarray:
    line = ["--run-dir", at / run, "--queries", at / "queries.jsonl", "--device", "cpu", "--json"]
    result = call(processes, "score", *line)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["shape"] == [4, 20]  # one process prints
    with h5py.File(at / run / "scores.h5") as file:
        return file["scores"][()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "message"),
    [(KILLED, "error: another process of this call ended"), (RAISED, "error: the second process")],
    ids=["killed", "raised"],
)
def test_one_process_ends_and_the_call_goes_on_in_another_number(folder, tmp_path, end, message):
    expected = folder / "expected.npy"
    if not expected.exists():
        whole = call(1, *fit_line(folder, "one"))
        assert whole.returncode == 0, whole.stderr
        np.save(expected, scores(folder, "one", 1))
    script, run = tmp_path / "driver.py", tmp_path.name
    script.write_text(DRIVER.replace("END", end))
    result = call(2, *fit_line(folder, run), script=script)
    assert result.returncode == 1
    assert [line[: len(message)] for line in told(result.stderr)] == [message]
    assert set(re.findall(r"exitcode\s*: (-?\d+)", result.stderr)) <= {"1", "-9", "-15"}
    resumed = call(3, *fit_line(folder, run))
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("resuming at batch") == 1
    found = scores(folder, run, 2)
    assert np.abs(found - np.load(expected)).max() < 1e-5 * np.abs(np.load(expected)).max()


@pytest.mark.slow
def test_wrong_calls_are_told_once(folder):
    """What every process finds wrong, before and after they join."""
    wrong = {
        "error: damping 'mean:x' was given": ["--damping", "mean:x"],
        "Error: No such option: --bad": ["--bad"],
    }
    for message, options in wrong.items():
        result = call(2, *fit_line(folder, "new"), *options)
        assert [line[: len(message)] for line in told(result.stderr)] == [message]
        ended = set(re.findall(r"exitcode\s*: (-?\d+)", result.stderr))
        assert {"2"} <= ended <= {"2", "-15"}  # -15: torchrun was faster
        assert not (folder / "new").exists()


@pytest.mark.slow
def test_what_is_asked_of_a_run_by_several_processes(folder, tmp_path):
    """A choice, a forecast, an edit and subsets: one answer is printed, one process writes."""
    run = folder / "asked"
    assert call(2, *fit_line(folder, "asked")).returncode == 0
    found = {"--run-dir": run, "--device": "cpu"}
    line = [part for pair in found.items() for part in pair]

    def asked(program: str, *words: object) -> dict[str, object]:
        result = call(2, *words, *line, "--json", program=program)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    chosen = asked("analysis", "tune", "--damping", "mean:1", "--damping", "mean:0.1")
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["tuned"]["damping"] in str(chosen["chosen"])
    table = tmp_path / "table.csv"
    forecast = asked("unlearn", "difficulty", "--out", table, "--lr", "1e-3", "--steps", "5")
    assert forecast["rows"] == 20
    assert len(table.read_text().splitlines()) == 21
    row = json.loads((folder / "train.jsonl").read_text().splitlines()[3])["id"]
    options = ["--ids", row, "--until", "steps=1", "--force"]
    edit = asked("unlearn", "remove", "--out", tmp_path / "edited", *options)
    assert edit["written"]
    assert (tmp_path / "edited" / "adapter_model.safetensors").exists()
    assert len((run / "audit.jsonl").read_text().splitlines()) == 1
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"lr": 1e-3, "epochs": 1, "batch_size": 8}))
    where = ["--queries", folder / "queries.jsonl", "--out", tmp_path / "truth.npz"]
    subsets = asked("unlearn", "retrain", "--subsets", 3, "--recipe", recipe, *where)
    assert subsets["subsets"] == 3
    with np.load(tmp_path / "truth.npz") as truth:
        assert truth["query_loss"].shape == (3, 4)
    one = call(2, "retrain", "--ids", row, "--out", tmp_path / "one", *line, program="unlearn")
    assert [text[:30] for text in told(one.stderr)] == ["error: one training is one pro"]
