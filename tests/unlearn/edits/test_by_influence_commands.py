"""The commands `unlearn remove`, `relabel`, `correct`, `edit`, `verify` and `analysis report`."""

from __future__ import annotations

import json
import shutil

import pytest

import influence
from analysis.cli import main as analysis
from influence.run import Run
from tests.conftest import rows
from tests.helpers import save, write_rows
from unlearn.cli import main as unlearn


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base, adapter, rows and a run of 10 rows."""
    folder = tmp_path_factory.mktemp("commands")
    save(folder, layers=1, target_modules=["q_proj", "v_proj"])
    write_rows(folder / "train.jsonl", rows(10))
    model = influence.load(folder / "base", folder / "adapter")
    train = influence.read_examples(folder / "train.jsonl")
    influence.fit(model, train, directory=folder / "run", path=(0.6,))
    return folder


@pytest.fixture
def run(made, tmp_path):
    """The run of a copy of that folder, as if it had been made there."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), str(tmp_path)))
    return tmp_path / "run"


def test_edits_follow_one_another_and_verify(run, run_main, tmp_path):
    first = run_main(
        unlearn,
        "unlearn",
        "remove",
        "--run",
        run,
        "--ids",
        "r0-1,r0-2",
        "--out",
        tmp_path / "one",
        "--max-damage",
        9,
        "--json",
    )
    assert first.status == 0, first.err
    assert first.json()["written"]
    assert first.json()["data"]["rows_after"] == 8
    write_rows(
        tmp_path / "new.jsonl",
        [{"id": "r0-3", "completion": " old cats"}, {"id": "r0-4", "prompt": "at dawn"}],
    )
    mixed = (
        "edit",
        "--run",
        run,
        "--changes",
        tmp_path / "new.jsonl",
        "--ids",
        "r0-5",
        "--out",
        tmp_path / "two",
    )
    two = run_main(unlearn, "unlearn", *mixed, "--max-damage", 9)
    assert two.status == 0, two.err
    assert "changed 3 rows" in two.out
    for part in (
        "removed rows",
        "new contents",
        "the contents they replace",
        "retained rows (sample)",
        "Ship its configuration",
    ):
        assert part in two.out
    checked = run_main(unlearn, "unlearn", "verify", "--run", run, "--apply")
    assert checked.status == 0
    assert "verified" in checked.out
    page = run_main(
        analysis, "analysis", "report", "--edit", tmp_path / "two", "--out", tmp_path / "two.html"
    )
    assert page.status == 0
    (tmp_path / "one" / "delta.safetensors").write_bytes(b"x")
    broken = run_main(unlearn, "unlearn", "verify", "--run", run)
    assert broken.status == 1
    assert "delta.safetensors" in broken.out


def test_a_dry_run_changes_nothing(run, run_main, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = run_main(unlearn, "unlearn", "remove", "--run", run, "--ids", "r0-1", "--dry-run")
    assert result.status == 0
    assert "nothing was changed or written" in result.out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert (
        run_main(
            unlearn, "unlearn", "remove", "--run", run, "--ids", "r0-1", "--dry-run", "--json"
        ).json()["cost"]["row_gradients"]
        > 0
    )


def test_an_edit_that_does_too_much_damage_is_not_written(run, run_main, tmp_path, monkeypatch):
    """What the command makes of a guard that did not pass."""
    monkeypatch.setattr("unlearn.record.save.Edit.passed", property(lambda _: False))
    call = ("remove", "--run", run, "--ids", "r0-1", "--out", tmp_path / "out", "--steps", 1)
    refused = run_main(unlearn, "unlearn", *call, "--json")
    assert refused.status == 1
    assert refused.json()["written"] is False
    assert "nothing was written" in refused.err
    assert not (tmp_path / "out").exists()
    assert not (run / "audit.jsonl").exists()
    assert run_main(unlearn, "unlearn", *call, "--force", "--json").json()["guard"]["forced"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("remove", "--ids", "r0-99", "--out", "out"),
            "no example has the id 'r0-99', among 10; the nearest are",
        ),
        (("remove", "--ids", "r0-1,r0-1", "--out", "out"), "ids are given more than once: 'r0-1'"),
        (
            ("remove", "--ids", ",".join(f"r0-{i}" for i in range(10)), "--out", "out"),
            "all rows would be removed",
        ),
        (("remove", "--out", "out"), "name the rows to remove"),
        (("remove", "--ids", "r0-1"), "name the adapter directory to make: --out DIR"),
        (
            ("remove", "--ids", "r0-1", "--out", "out", "--until", "soon"),
            "stopping rule 'soon' was given",
        ),
        (
            ("relabel", "--changes", "same.jsonl", "--out", "out"),
            "relabel of 'r0-3' changes nothing",
        ),
        (("correct", "--out", "out"), "name the changes: --changes FILE"),
        (("relabel", "--changes", "none.jsonl", "--out", "out"), "none.jsonl cannot be read"),
    ],
)
def test_wrong_calls_exit_with_two_and_write_nothing(
    run, run_main, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "same.jsonl", [{"id": "r0-3", "completion": rows(10)[3]["completion"]}])
    result = run_main(unlearn, "unlearn", *arguments, "--run", run)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_the_runs_is_refused(run, run_main, tmp_path):
    call = ("remove", "--run", run, "--ids", "r0-1", "--out", tmp_path / "out")
    result = run_main(unlearn, "unlearn", *call, "--start", tmp_path / "base")
    assert result.status == 2
    assert "is no adapter of the run" in result.err
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    result = run_main(unlearn, "unlearn", *call)
    assert result.status == 2
    assert "adapter is" in result.err
    assert not (tmp_path / "out").exists()


def test_retraining_on_the_rows_after_an_edit_and_the_page_that_compares(run, run_main, tmp_path):
    write_rows(tmp_path / "new.jsonl", [{"id": "r0-3", "completion": " old cats"}])
    edit = (
        "relabel",
        "--run",
        run,
        "--changes",
        tmp_path / "new.jsonl",
        "--out",
        tmp_path / "one",
        "--max-damage",
        9,
    )
    assert run_main(unlearn, "unlearn", *edit).status == 0
    (tmp_path / "recipe.json").write_text(json.dumps({"epochs": 1}))
    again = (
        "retrain",
        "--run",
        run,
        "--edit",
        tmp_path / "one",
        "--recipe",
        tmp_path / "recipe.json",
        "--out",
        tmp_path / "again",
    )
    assert run_main(unlearn, "unlearn", *again).status == 0
    assert json.loads((tmp_path / "again" / "retrain.json").read_text())["rows"] == 10
    page = (
        "report",
        "--edit",
        tmp_path / "one",
        "--retrained",
        tmp_path / "again",
        "--out",
        tmp_path / "one.html",
    )
    assert run_main(analysis, "analysis", *page).status == 0
    assert "trained again" in (tmp_path / "one.html").read_text()
    other = (
        "retrain",
        "--run",
        run,
        "--ids",
        "r0-1",
        "--recipe",
        tmp_path / "recipe.json",
        "--out",
        tmp_path / "other",
    )
    assert run_main(unlearn, "unlearn", *other).status == 0
    wrong = (
        "report",
        "--edit",
        tmp_path / "one",
        "--retrained",
        tmp_path / "other",
        "--out",
        tmp_path / "two.html",
    )
    result = run_main(analysis, "analysis", *wrong)
    assert result.status == 2
    assert "was trained without 1 rows" in result.err


def test_the_run_says_that_scores_are_of_the_adapter_before(run, run_main, tmp_path):
    edit = ("remove", "--run", run, "--ids", "r0-1", "--out", tmp_path / "one", "--max-damage", 9)
    assert run_main(unlearn, "unlearn", *edit).status == 0
    from influence.cli import main

    result = run_main(main, "influence", "self", "--run", run)
    assert "before the edits that led to" in result.err
    overwrite = (
        "fit",
        "--adapter",
        tmp_path / "adapter",
        "--model",
        tmp_path / "base",
        "--train",
        tmp_path / "train.jsonl",
    )
    result = run_main(main, "influence", *overwrite, "--run", run, "--overwrite")
    assert result.status == 2
    assert "which is evidence" in result.err
    assert Run.open(run).manifest.audit.entries == 1
