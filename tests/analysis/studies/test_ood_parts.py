"""What a study keeps is used again, and nothing of somebody else is replaced."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

import unlearn
from influence.errors import MismatchError
from tests.analysis.studies.ood_cases import ask
from unlearn.difficulty.measured import Protocol


def test_what_is_finished_is_used_again(ood_folder, studied):
    out, found = studied
    kept = [
        "adapter/adapter_model.safetensors",
        "reference-1/retrain.json",
        "difficulty.h5",
        "groups.h5",
        "train.jsonl",
    ]
    before = {name: (out / name).stat().st_mtime_ns for name in kept}
    again = ask(ood_folder, out)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.verdicts == found.verdicts
    for options in ({"seed": 1}, {"per_kind": 2}, {"recipe": unlearn.Recipe(epochs=1)}):
        with pytest.raises(MismatchError, match=r"is of another study: (rows|recipe) differ"):
            ask(ood_folder, out, **options)
    with pytest.raises(MismatchError, match="measurements of another request"):
        ask(ood_folder, out, protocol=Protocol(optimizer="sgd"))
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == before


def test_what_somebody_else_made_is_never_replaced(ood_folder, ood_command, tmp_path):
    """`--out` next to somebody's own adapter, run and rows: their names are those that a study
    writes.
    """
    for name in ("adapter", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("")
    result = ood_command("--out", tmp_path, "--overwrite")
    assert (result.status, "adapter, run of something else" in result.err) == (2, True), result.err
    for text, status in (('{"kinds": 1}', 2), ("{", 1)):
        other = tmp_path / f"other-{status}"
        other.mkdir()
        (other / "kinds.json").write_text(text)
        result = ood_command("--out", other, "--overwrite")
        assert result.status == status, result.err
        assert (other / "kinds.json").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("mine")) == ["mine", "mine"]


def test_a_study_killed_before_its_rows_were_written_goes_on(ood_folder, studied, tmp_path):
    out, found = studied
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "kinds.json").write_bytes((out / "kinds.json").read_bytes())
    for name in ("adapter", "reference-1", "run"):
        shutil.copytree(out / name, tmp_path / "o" / name)
    for name in ("difficulty.h5", "groups.h5"):
        shutil.copy(out / name, tmp_path / "o")
    assert (
        ask(ood_folder, tmp_path / "o", references=1).table["steps"].tolist()
        == found.table["steps"].tolist()
    )
