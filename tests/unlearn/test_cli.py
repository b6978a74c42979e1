"""The `unlearn` command as a whole: its help, its ids, and lines that start with torchrun.

What the commands do is tested beside what they do it with (`test_by_influence_commands`,
`test_train_commands`, `test_difficulty_commands`, `test_retrain`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import influence
from influence.row_files import read_examples
from tests.conftest import rows
from tests.helpers import save, write_rows
from unlearn.cli import main, numbers, rows_of
from unlearn.retraining.options import epochs

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"torch", "transformers", "peft", "pandas", "scipy", "datasets", "numpy", "h5py"}
COMMANDS = [
    *("retrain", "without", "verify", "remove", "relabel", "correct", "edit", "train", "methods"),
    "difficulty",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base, adapter, train.jsonl and run."""
    folder = tmp_path_factory.mktemp("cli")
    base, adapter = save(folder, layers=1, target_modules=["q_proj", "v_proj"])
    train = read_examples(write_rows(folder / "train.jsonl", rows(6)))
    model = influence.load(base, adapter, device="cpu")
    influence.fit(model, train, directory=folder / "run", path=(0.6,))
    return folder


@pytest.fixture
def unlearn(run_main):
    return lambda *arguments: run_main(main, "unlearn", *arguments)


# ---- help ----------------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from unlearn.cli import main\n"
        f"for command in {[[], *([name] for name in COMMANDS)]!r}:\n"
        "    sys.argv = ['unlearn', *command, '--help']\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        f"slow = {SLOW!r} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: unlearn") == 1 + len(COMMANDS)


def test_the_commands_are_listed_in_order(unlearn):
    text = unlearn("--help").out
    listed = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == COMMANDS


def test_help_of_a_training_says_how_several_processes_share_it(unlearn):
    text = " ".join(unlearn("train", "--help").out.split())
    assert "torchrun --nproc-per-node N -m -- unlearn train ... shares the rows out." in text
    assert "--run-dir and --start-from are taken for them" in text


# ---- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["remove", "edit", "train", "difficulty"])
@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (("--ids", "a", "--ids-file", "FILE"), "--ids and --ids-file were both given"),
        (("--ids", " , "), "no ids were given: name at least one row"),
        (("--ids-file", "EMPTY"), "empty is empty: name at least one row"),
    ],
)
def test_ids_that_name_nothing(unlearn, made, tmp_path, command, ids, sentence):
    (tmp_path / "empty").touch()
    (tmp_path / "ids").write_text("r0-1\n")
    places = {"FILE": tmp_path / "ids", "EMPTY": tmp_path / "empty"}
    more = {"train": ["--method", "ga"]}.get(command, [])
    out = tmp_path / ("out.csv" if command == "difficulty" else "out")
    typed = [places.get(word, word) for word in ids]
    result = unlearn(command, "--run", made / "run", "--out", out, *more, *typed)
    assert result.status == 2
    assert sentence in result.err
    assert not out.exists()


def test_rows_are_read_and_ids_checked_before_the_model_is(made):
    assert [row.id for row in rows_of(made / "run", ["r0-1"])] == [f"r0-{i}" for i in range(6)]
    with pytest.raises(influence.errors.DataError, match="the nearest are"):
        rows_of(made / "run", ["r0-1", "r0-11"])


# ---- what is typed -------------------------------------------------------------------------------


def test_numbers_of_a_method():
    assert numbers(["beta=0.5", " top-k =3"]) == {"beta": 0.5, "top_k": 3.0}
    for text in ("beta", "beta=", "beta=x", "=", ""):
        with pytest.raises(influence.errors.InputError, match="expected NAME=NUMBER"):
            numbers(["a=1", text])


def test_epochs_are_whole_numbers_in_order():
    assert epochs("10,1,3,3") == (1, 3, 10)
    for text in ("", "1,", "1.5", "all"):
        with pytest.raises(influence.errors.InputError, match="expected whole numbers, as in"):
            epochs(text)


# ---- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_without_the_dashes(made, tmp_path):
    """`--run-dir` and `--start-from` reach the command also where torchrun reads the line first."""
    how = ["--method", "ga", "--ids", "r0-1,r0-2", "--until", "steps=3", "--lr", "0.01"]
    how += ["--device", "cpu", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def written(start: list[str], run: str, begin: str, out: Path) -> dict:
        line = [*start, "unlearn", "train", run, made / "run", begin, "original", "--out", out]
        result = subprocess.run(
            [sys.executable, "-m", *map(str, line), *how],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["written"] is True  # one process speaks
        return load_file(out / "adapter_model.safetensors")

    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    one = written([], "--run", "--start", tmp_path / "one")
    two = written(torchrun, "--run-dir", "--start-from", tmp_path / "two")
    assert one.keys() == two.keys()
    for key, weights in one.items():
        assert (weights - two[key]).abs().max() < 1e-5
