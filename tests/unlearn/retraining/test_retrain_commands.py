"""The command `unlearn retrain`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import influence
import unlearn
from tests.conftest import add_lora, build_base, build_tokenizer, rows
from tests.unlearn.retraining.helpers import (
    WEIGHTS,
    arrays,
)
from unlearn.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, train.jsonl, queries.jsonl, recipe.json and run/."""
    at = tmp_path_factory.mktemp("retrain")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    for name, items in (("train", rows(8)), ("queries", rows(3, seed=9))):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (at / "recipe.json").write_text('{"epochs": 3, "batch_size": 4, "lr": 0.02}')
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model,
        influence.read_examples(at / "train.jsonl"),
        curvature=influence.Identity(),
        directory=at / "run",
    )
    return at


@pytest.fixture
def command(made, run_main):
    """Call `unlearn retrain` in this process: status, standard output, standard error."""
    fixed = [
        "unlearn",
        "retrain",
        "--run",
        made / "run",
        "--recipe",
        made / "recipe.json",
        "--device",
        "cpu",
    ]
    return lambda *arguments: run_main(main, *fixed, *arguments)


def test_the_command_trains_without_rows_or_on_all_and_keeps_epochs(command, tmp_path):
    result = command("--ids", "r0-1,r0-2", "--out", tmp_path / "without")
    assert (result.status, result.out) == (
        0,
        f"{tmp_path / 'without'}: trained without 2 rows\n",
    ), result.err
    result = command(
        "--all-rows", "--keep-epochs", "2,1", "--stop-after", 2, "--out", tmp_path / "all", "--json"
    )
    assert json.loads(result.out) == {
        "out": str(tmp_path / "all"),
        "removed": [],
        "checkpoints": [1, 2],
    }
    assert (tmp_path / "all" / "epoch-2" / WEIGHTS).read_bytes() == (
        tmp_path / "all" / WEIGHTS
    ).read_bytes()


def test_the_command_retrains_subsets_and_says_how_long_it_takes(command, made, tmp_path):
    arguments = [
        "--subsets",
        3,
        "--subset-seed",
        4,
        "--queries",
        made / "queries.jsonl",
        "--out",
        tmp_path / "t.npz",
    ]
    result = command(*arguments, "--fraction", 0.75)
    assert result.status == 0, result.err
    assert (
        result.out
        == f"{tmp_path / 't.npz'}: losses of 3 queries and 8 rows under 3 retrained adapters\n"
    )
    assert "retrained subset 0: 1 of 3 done, about " in result.err
    np.testing.assert_array_equal(
        arrays(tmp_path / "t.npz")["masks"], unlearn.random_halves(8, 3, 4, fraction=0.75)
    )
    again = command(*arguments, "--fraction", 0.75)
    assert (again.status, again.out) == (0, result.out)
    assert "retrained subset" not in again.err
    other = command(*arguments)
    assert (other.status, other.out) == (2, "")
    assert "holds other subsets: masks is" in other.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [],
            "give exactly one of --ids A,B,C, --ids-file FILE (one id per line), --all-rows, "
            "--edit DIR and --subsets N: none of",
        ),
        (["--ids", "r0-1", "--subsets", 3], "--ids and --subsets was given"),
        (["--ids", "r0-1", "--all-rows"], "--ids and --all-rows was given"),
        (["--ids", " , "], "no ids were given"),
        (["--ids", "r0-1", "--queries", "q"], "--queries goes with --subsets N only"),
        (
            ["--all-rows", "--fraction", 0.3, "--subset-seed", 0],
            "--fraction, --subset-seed goes with --subsets N only",
        ),
        (["--subsets", 3, "--keep-epochs", "1"], "--keep-epochs cannot go with --subsets"),
        (["--subsets", 3], "name their file with --queries FILE"),
        (
            ["--all-rows", "--keep-epochs", "one"],
            "--keep-epochs 'one' was given; expected whole numbers",
        ),
        (
            ["--all-rows", "--keep-epochs", "4"],
            "checkpoints after epochs 4 were asked for; expected 1 to 3",
        ),
        (["--all-rows", "--stop-after", 0], "stop_after 0 was given; the recipe has epochs 1 to 3"),
    ],
)
def test_wrong_calls_exit_with_two_and_write_nothing(command, tmp_path, arguments, sentence):
    result = command(*arguments, "--out", tmp_path / "new")
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert result.out == ""
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_of_subsets(command, made, tmp_path):
    for options, sentence in (
        (["--subsets", 0], "0 subsets of 0.5 of 8 rows"),
        (["--subsets", 2, "--fraction", 1], "2 subsets of 1 of 8 rows"),
    ):
        result = command(*options, "--queries", made / "queries.jsonl", "--out", tmp_path / "t.npz")
        assert result.status == 2
        assert sentence in result.err
    assert not list(tmp_path.iterdir())
