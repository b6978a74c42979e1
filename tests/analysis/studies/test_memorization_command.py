"""`analysis memorization` end to end: JSON, files, a narrow and harmless table, refusals."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import influence
import unlearn
from analysis.cli import main
from analysis.studies.counterfactual import counterfactual_memorization
from tests.conftest import add_lora, build_base, build_tokenizer, rows

HOSTILE = "evil\x1b[2J[red]\nforged  " + "x" * 300


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with run/ (one id is hostile), truth.npz by retraining, canaries.jsonl and
    heldout.jsonl.
    """
    at = tmp_path_factory.mktemp("memorization-command")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    items = rows(6)
    items[2]["id"] = HOSTILE
    canaries = [{"id": HOSTILE, "candidates": [" the", " old cats"]}]
    for name, lines in (("train", items), ("heldout", rows(3, seed=5)), ("canaries", canaries)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    fitted = influence.fit(
        model, influence.read_examples(at / "train.jsonl"), path=(1.0,), directory=at / "run"
    )
    masks = unlearn.random_halves(6, 6)
    unlearn.retrain_subsets(
        fitted, masks, out=at / "truth.npz", recipe=unlearn.Recipe(epochs=2, batch_size=4, lr=0.02)
    )
    return at


@pytest.fixture
def command(made, run_main):
    """Call `analysis memorization` in this process."""
    fixed = ["analysis", "memorization", "--run", made / "run", "--device", "cpu", "--resamples", 5]
    return lambda *arguments: run_main(main, *fixed, *arguments)


def everything(made):
    return [
        "--truth",
        made / "truth.npz",
        "--canaries",
        made / "canaries.jsonl",
        "--heldout",
        made / "heldout.jsonl",
    ]


def test_command_as_json_and_files(made, command, tmp_path):
    result = command(
        *everything(made), "--damping", "mean:1", "--out", tmp_path / "t.csv", "--json"
    )
    assert result.status == 0, result.err
    found = result.json()
    assert found["out"] == str(tmp_path / "t.csv")
    assert [row["id"] for row in found["rows"]][2] == HOSTILE
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["id"].tolist()[2] == HOSTILE
    assert table.columns.tolist() == list(found["rows"][0])
    with np.load(made / "truth.npz") as truth:
        expected = counterfactual_memorization(
            truth["train_loss"].astype(float), truth["masks"]
        ).values
    np.testing.assert_allclose(table["counterfactual_memorization"], expected, rtol=1e-12)
    assert [row["exposure"] is None for row in found["rows"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert found["reliability"]["models"] == 6
    assert {one["forecast"] for one in found["agreement"]} >= {
        "self_influence",
        "self_influence mean:1",
        "gap",
    }
    assert found["resamples"] == 5


def test_command_for_people_is_narrow_and_harmless(made, command, tmp_path):
    result = command(*everything(made), "-k", 4, "--out", tmp_path / "t.parquet")
    assert result.status == 0, result.err
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == 6
    assert "highest counterfactual memorization: 4 of 6 rows" in result.out
    assert re.search(r"Spearman with the counterfactual memorization \(\d rows\)", result.out)
    assert "reliability of the counterfactual memorization" in result.out
    assert "\x1b" not in result.out
    assert "forged" not in result.out.split("Spearman")[1]
    head = result.out.partition("self-influence is with")[0]
    assert max(map(len, head.splitlines())) <= 80
    alone = command("-k", 99)
    assert alone.status == 0, alone.err
    assert "highest self-influence: 6 of 6 rows" in alone.out
    assert "evil [2J[red]" in alone.out
    assert "Spearman" not in alone.out


def test_command_refuses_before_it_works(made, command, tmp_path):
    (tmp_path / "there.csv").write_text("mine")
    for arguments, words in (
        (["--out", tmp_path / "there.csv"], "exists: name another"),
        (["--out", tmp_path / "t.xlsx"], "ends in .csv or .parquet"),
        (["--damping", "0.1"], "damping '0.1' was given"),
        (["--truth", tmp_path / "no.npz"], "There is no file"),
        (["--canaries", tmp_path / "no.jsonl"], "cannot be read"),
        (["--heldout", made / "train.jsonl"], "held-out rows have the content of training rows"),
        (["-k", 0], "-k 0 was given"),
        (["--seed", -1], "expected at least 0 and 1"),
    ):
        result = command(*arguments)
        assert result.status == 2, arguments
        assert words in result.err
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert command("--out", tmp_path / "there.csv", "--overwrite").status == 0
