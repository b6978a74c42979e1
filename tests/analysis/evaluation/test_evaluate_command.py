"""`analysis evaluate` writes one record, prints one table, and refuses before it works."""

from __future__ import annotations

import json

import pytest

from analysis.cli import main as analysis


@pytest.mark.slow
def test_the_command_writes_one_record_and_prints_one_table(evaluated, run_main, tmp_path):
    folder, _, record = evaluated
    call = [
        "evaluate",
        "--adapter",
        folder / "adapter",
        "--reference",
        folder / "reference",
        "--dtype",
        "float64",
    ]
    for name in ("forget", "retain", "holdout"):
        call += [f"--{name}", folder / f"{name}.jsonl"]
    done = run_main(
        analysis,
        "analysis",
        *call,
        "--generate",
        3,
        "--token-budget",
        60,
        "--out",
        tmp_path / "e.json",
    )
    assert done.status == 0, done.err
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["sets"]["forget"]["adapter"]["loss"] == pytest.approx(
        record["sets"]["forget"]["adapter"]["loss"]
    )
    assert written["membership"]["attacks"].keys() == record["membership"]["attacks"].keys()
    assert "held-out" in done.out
    assert str(tmp_path / "e.json") in done.out
    refused = run_main(analysis, "analysis", *call, "--out", tmp_path / "e.json")
    assert refused.status == 2
    assert "--overwrite" in refused.err
    shown = run_main(
        analysis,
        "analysis",
        *call[:3],
        *call[7:9],
        "--generate",
        0,
        "--json",
        "--out",
        tmp_path / "e.json",
        "--overwrite",
    )
    assert shown.status == 0, shown.err
    assert shown.json() == json.loads((tmp_path / "e.json").read_text())
    assert shown.json()["reference"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--forget", "missing.jsonl"], "does not exist"),
        (["--holdout", "FOLDER/forget.jsonl"], "that the adapter never saw"),
        (["--probe", "guess"], "expected relearn or quantise"),
        (["--generate", "-2"], "generate -2"),
        (["--reference", "FOLDER/none"], "none' is not a folder"),
        (["--reference", "FOLDER/base"], "is a full model"),
        (["--adapter", "FOLDER/base"], "is a full model"),
        (["--out", "FOLDER/nowhere/e.json"], "there is no folder"),
        (["--texts"], "--texts goes into the record"),
        (["--max-length", "1"], "max_length 1"),
    ],
)
def test_wrong_calls_end_before_a_model_is_loaded(evaluated, run_main, monkeypatch, change, words):
    folder, _, _ = evaluated

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("influence.loading.load", loads)
    given = {"--adapter": folder / "adapter", "--forget": folder / "forget.jsonl"}
    change = [part.replace("FOLDER", str(folder)) for part in change]
    given |= {change[0]: change[1] if len(change) > 1 else None}
    call = [part for pair in given.items() for part in pair if part is not None]
    done = run_main(analysis, "analysis", "evaluate", *call)
    assert done.status == 2, done.err
    assert words in done.err
