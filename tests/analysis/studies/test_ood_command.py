"""`analysis ood` end to end."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from analysis.studies.planting import KINDS
from unlearn.difficulty.optimizers import SGD


@pytest.mark.slow
def test_the_command_as_json_files_and_overwriting(ood_folder, ood_command, tmp_path, monkeypatch):
    monkeypatch.setattr(SGD, "stride", 0.05)  # few steps
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("")
    result = ood_command("--out", out, "--references", 1, "--json", "--overwrite")
    assert result.status == 0, result.err
    found = result.json()
    assert set(found["verdicts"].values()) <= {"yes", "no", "undecided"}
    assert set(found["kinds"]) == set(KINDS)
    kept = json.loads((out / "ood.json").read_text())
    assert kept["verdicts"] == found["verdicts"]
    table = pd.read_csv(out / "ood.csv")
    names = "id kind partner tokens steps damage area base_loss leverage "
    names += "genex_start genex_end relex_start relex_end"
    assert set(names.split()) <= set(table.columns)
    assert len(table) == 12
    assert (out / "ood.png").read_bytes().startswith(b"\x89PNG")
    adapter = (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    result = ood_command("--out", out, "--references", 1, "--optimizer", "sgd")
    assert (result.status, "--overwrite" in result.err) == (2, True)
    result = ood_command("--out", out, "--references", 1, "--optimizer", "sgd", "--overwrite")
    assert result.status == 0, result.err
    assert json.loads((out / "ood.json").read_text())["protocol"]["optimizer"] == "sgd"
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == adapter
    assert not list(out.rglob("*partial*"))
    assert (out / "thesis.txt").exists(), "what is not of a study stays"


@pytest.mark.slow
def test_the_command_for_people(ood_folder, studied, ood_command):
    out, _ = studied
    result = ood_command("--out", out)
    assert result.status == 0, result.err
    assert "do rows from outside need more steps? " in result.out
    assert "is their trade-off better (less damage at the goal)? " in result.out
    assert "\x1b" not in result.out
    table = result.out.partition("do rows from outside")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert all(kind in table for kind in KINDS)


def test_the_command_refuses(ood_folder, ood_command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for arguments, message in (
        (["--out", tmp_path / "mine"], "is not empty and holds no study"),
        (["--out", tmp_path / "o", "--per-kind", 6], "12 of 12 held-out rows"),
        (["--out", tmp_path / "o", "--references", 0], "references 0 was given"),
        (["--out", tmp_path / "o", "--optimizer", "lion"], "expected adam or sgd"),
        (["--out", tmp_path / "o", "--seed", -1], "--seed -1 was given"),
        (
            ["--out", tmp_path / "o", "--heldout", ood_folder / "train.jsonl"],
            "have the content of training rows",
        ),
    ):
        result = ood_command(*arguments)
        assert (result.status, message in result.err) == (2, True), result.err
    assert not (tmp_path / "o").exists()
    assert (tmp_path / "mine" / "thesis.txt").exists()
