"""`unlearn train` as a person calls it: what is saved, which rows it retains, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import influence
from analysis.cli import main as analysis
from tests.conftest import rows
from tests.helpers import contents, untouched, write_rows
from tests.unlearn.methods.commands.helpers import (
    ROWS,
    hashes,
    no_model,
)
from unlearn.cli import main

# ---- what is saved -------------------------------------------------------------------------------


def test_a_trained_adapter_is_peft_s_and_on_record(train, run, made, run_main, tmp_path):
    """Its record, its log, its weights, what PEFT makes of them, and a page about it."""
    inputs = [made / "base", made / "adapter"]
    before = [hashes(folder) for folder in inputs]
    write_rows(tmp_path / "heldout.jsonl", rows(9, seed=9))
    out = tmp_path / "out"
    how = ("--method", "ga-kl", "--until", "steps=4", "--lr", 0.01)
    done = train(*how, "--holdout", tmp_path / "heldout.jsonl", "--json")
    assert done.status == 0, done.err
    assert [hashes(folder) for folder in inputs] == before
    answer = done.json()
    assert answer["written"] is True
    assert answer["out"] == str(out)
    assert not (tmp_path / "out.training").exists()
    text = (out / "edit.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    closed = ("remove", "--run", run, "--ids", "r0-1", "--out", tmp_path / "closed")
    assert run_main(main, "unlearn", *closed, "--force", "--start", "original").status == 0
    check_record(record, json.loads((tmp_path / "closed" / "edit.json").read_text()), out)
    check_log(out, record)
    for row in rows(ROWS)[1], rows(ROWS)[2], rows(ROWS)[5]:
        for name, data in contents(out).items():
            assert (row["prompt"] + row["completion"]).encode() not in data, name
    check_weights(made, out)
    page = run_main(analysis, "analysis", "report", "--edit", out, "--out", tmp_path / "page.html")
    assert page.status == 0, page.err
    check_page((tmp_path / "page.html").read_text())


def check_record(record, closed, out: Path) -> None:
    """The record has every key of a edit by influence's, which tests/unlearn/record lists."""
    assert set(record) == set(closed)
    parts = {key for key in closed if isinstance(closed[key], dict)}
    parts -= {"method", "files", "expected"}
    assert closed["expected"]["trainings"] == 3
    assert record["expected"] is None  # no step looks at it
    shared = ("run", "base", "adapter", "data", "residual", "delta")
    assert parts >= {*shared, "losses", "guard", "cost", "comparable", "lineage"}
    for key in parts:
        assert set(record[key]) == set(closed[key]), key
    named = "name curvature geometry damping points lambda solver steps until seed"
    assert set(named.split()) <= set(record["method"])
    for key in ("edited", "retained"):
        assert set(record["losses"][key]) == set(closed["losses"][key]), key
    assert {"rows", "before", "after", "source"} <= set(record["losses"]["heldout"])
    assert set(record["rows"][0]) == set(closed["rows"][0])
    assert record["kind"] == "remove"
    assert record["lineage"] == {"edits": 1, "removed": ["r0-1", "r0-2", "r0-5"], "changed": []}
    assert record["data"]["rows_after"] == ROWS - 3
    assert record["method"]["name"] == "ga-kl"
    assert record["method"]["steps_taken"] == 4
    files = {name: digest for name, digest in hashes(out).items() if name != "edit.json"}
    assert record["files"] == files
    assert record["losses"]["heldout"]["rows"] == 9


def check_log(out: Path, record) -> None:
    """Four steps, every number of which is finite."""
    lines = (out / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert entry["step"] == number
        assert all(
            isinstance(value, int | float) and math.isfinite(value) for value in entry.values()
        )
        assert (entry["forget_rows"], entry["retain_rows"]) == (3, 7)
        assert entry["lr"] == 0.01
    assert entry["row_gradients"] <= record["cost"]["total"]


def check_weights(made: Path, out: Path) -> None:
    """New is old + delta; PEFT's outputs of it, plain and merged, are those of the model there."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    files = [made / "adapter" / "adapter_model.safetensors", out / "delta.safetensors"]
    old, delta, new = map(load_file, [*files, out / "adapter_model.safetensors"])
    assert old.keys() == delta.keys() == new.keys()
    assert all(torch.equal(old[key] + delta[key], new[key]) for key in old)
    assert any(delta[key].any() for key in delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, str(out)).eval()
        ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
        model = influence.load(made / "base", made / "adapter", device="cpu")
        with torch.no_grad():
            plain = loaded(input_ids=ids).logits
            merged = loaded.merge_and_unload()(input_ids=ids).logits
            first = model.model(input_ids=ids).logits
            leaves = [f"base_model.model.{leaf.name}.weight" for leaf in model.space.leaves]
            with model.at(torch.cat([(old[key] + delta[key]).flatten() for key in leaves])):
                expected = model.model(input_ids=ids).logits
    assert not torch.allclose(expected, first, atol=1e-3)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def check_page(text: str) -> None:
    """The page speaks of gradient steps, not of the closed formula, and of nothing infinite."""
    assert "4 gradient steps" in text
    assert "steps.jsonl has each" in text
    assert "ga-kl: gradient ascent + KL on in-distribution rows" in text
    assert (
        "closed formula" not in text.split("<footer")[0]
        or "One step of the closed formula" not in text
    )
    assert "inf" not in [part.strip(" %.,()") for part in text.split()]


def test_edits_and_trainings_follow_one_another(train, run, run_main, tmp_path):
    """Each starts from the last.

    A row that is gone cannot be unlearned again. All of it verifies, move by move.
    """
    assert train("--until", "steps=2", "--out", tmp_path / "one", ids="r0-1").status == 0
    closed = (
        "remove",
        "--run",
        run,
        "--ids",
        "r0-3",
        "--out",
        tmp_path / "two",
        "--steps",
        1,
        "--force",
    )
    assert run_main(main, "unlearn", *closed).status == 0
    assert (
        train(
            "--until", "steps=2", "--method", "npo", "--out", tmp_path / "three", ids="r0-5"
        ).status
        == 0
    )
    records = [
        json.loads((tmp_path / name / "edit.json").read_text()) for name in ("one", "two", "three")
    ]
    for before, after in itertools.pairwise(records):
        assert after["adapter"]["before"]["digest"] == before["adapter"]["after"]["digest"]
    assert records[2]["lineage"] == {"edits": 3, "removed": ["r0-1", "r0-3", "r0-5"], "changed": []}
    assert records[2]["method"]["retain"]["rows"] == ROWS - 3  # removed rows are no retained rows
    gone = train("--out", tmp_path / "four", ids="r0-3")
    assert gone.status == 2
    assert "'r0-3' was removed by an earlier edit" in gone.err
    again = train(
        "--out", tmp_path / "five", "--start", "original", "--until", "steps=1", ids="r0-3"
    )
    assert again.status == 0
    checked = run_main(main, "unlearn", "verify", "--run", run, "--apply", "--json")
    assert checked.status == 0, checked.out
    assert checked.json()["passed"]
    (tmp_path / "three" / "steps.jsonl").write_text("")
    broken = run_main(main, "unlearn", "verify", "--run", run)
    assert broken.status == 1
    assert "steps.jsonl" in broken.out


def test_what_a_person_reads(train, tmp_path):
    done = train("--until", "steps=3")
    for part in (
        "ga against 3 rows: 3 steps were taken",
        "removed rows",
        "retained rows (sample)",
        "row-gradients",
        "steps.jsonl",
    ):
        assert part in done.out, part
    assert "nan" not in done.out.lower()


def test_nothing_nonsensical_is_said_where_no_limit_was_set(train):
    assert "inf" not in train("--until", "steps=1").out.split("retained loss")[1].split(";")[0]


def test_nothing_to_do_writes_nothing(train, run, tmp_path):
    with untouched(run):
        done = train("--until", "loss=0.1")
    assert done.status == 2
    assert "nothing to do: the forget rows' mean loss is" in done.err
    assert not (tmp_path / "out").exists()


def test_too_much_damage_is_not_written_and_force_does(train, run, tmp_path):
    how = ("--until", "steps=8", "--lr", 0.1, "--max-damage", 0.001)
    with untouched(run):
        refused = train(*how, "--json")
    assert refused.status == 1
    assert refused.json()["written"] is False
    assert refused.json()["guard"]["passed"] is False
    assert "nothing was written" in refused.err
    assert not (tmp_path / "out").exists()
    forced = train(*how, "--force", "--json")
    assert forced.status == 0
    assert forced.json()["guard"] | {"since_the_fit": None} == forced.json()["guard"]
    assert forced.json()["guard"]["forced"] is True
    assert forced.json()["guard"]["damage"] > 0.001
    assert json.loads((tmp_path / "out" / "edit.json").read_text())["guard"]["forced"] is True
    fine = train(
        "--until",
        "steps=1",
        "--lr",
        1e-6,
        "--max-damage",
        0.5,
        "--force",
        "--out",
        tmp_path / "fine",
        "--start",
        "original",
    )
    assert fine.status == 0
    assert json.loads((tmp_path / "fine" / "edit.json").read_text())["guard"]["forced"] is False


def test_the_refusal_names_options_that_there_are(train):
    refused = train("--until", "steps=8", "--lr", 0.1, "--max-damage", 0.001)
    assert "--rest" not in refused.err


def test_out_is_replaced_only_when_asked(train, run, tmp_path):
    assert train("--until", "steps=1").status == 0
    refused = train("--until", "steps=2")
    assert refused.status == 2
    assert "is not empty: give another directory, or --overwrite" in refused.err
    assert train("--until", "steps=2", "--overwrite", "--start", "original").status == 0
    assert len((tmp_path / "out" / "steps.jsonl").read_text().splitlines()) == 2


# ---- retained rows -------------------------------------------------------------------------------


def test_retained_rows_of_a_file(train, tmp_path):
    write_rows(tmp_path / "kept.jsonl", rows(4, seed=7))
    done = train(
        "--method",
        "ga-gd-general",
        "--retain",
        tmp_path / "kept.jsonl",
        "--until",
        "steps=2",
        "--json",
    )
    assert done.status == 0
    result = done.json()["method"]["retain"]
    assert (result["rows"], result["source"]) == (4, str(tmp_path / "kept.jsonl"))
    assert "is meant for general rows" not in done.err
    assert (
        done.json()["losses"]["retained"]["rows"] == ROWS - 3
    )  # what is measured stays the run's other rows
    plain = train(
        "--method",
        "ga-gd-general",
        "--until",
        "steps=2",
        "--out",
        tmp_path / "plain",
        "--start",
        "original",
    )
    assert "warning: ga-gd-general is meant for general rows (--retain F)" in plain.err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            lambda: [*rows(2, seed=7), rows(ROWS)[5] | {"id": "x"}],
            "1 retained rows are rows to unlearn, word for word (r0-5)",
        ),
        (list, "kept.jsonl"),
        (lambda: [{"id": "a", "text": ""}], "row 1"),
        (lambda: [{"id": "a"}], "row 1"),
    ],
)
def test_retained_rows_that_cannot_be_used(train, run, tmp_path, content, sentence):
    write_rows(tmp_path / "kept.jsonl", content())
    with untouched(run):
        result = train("--method", "ga-gd", "--retain", tmp_path / "kept.jsonl")
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in result.err


# ---- wrong calls ---------------------------------------------------------------------------------


EARLY = [
    (
        ("--method", "gaa"),
        "method 'gaa' was given (did you mean ga?); expected one of ga, random-labels",
    ),
    (("--method", "mine.py:x"), "there is no file mine.py: give FILE.py:NAME"),
    (("--set", "beta=0.1"), "method ga has no number called beta: it has none"),
    (
        ("--method", "npo", "--set", "gamma=1"),
        "no number called gamma: expected beta, retain_weight",
    ),
    (
        ("--method", "npo", "--set", "beta"),
        "--set 'beta' was given; expected NAME=NUMBER, as in beta=0.05",
    ),
    (("--method", "npo", "--set", "beta=x"), "expected NAME=NUMBER"),
    (("--lr", "fast"), "--lr 'fast' was given; expected a number above 0, or auto"),
    (("--lr", "-1"), "expected a number above 0, or auto"),
    (("--lr", "nan"), "expected a number above 0, or auto"),
    (("--stride", "-1"), "stride -1.0 was given; expected a number above 0"),
    (
        ("--stride", "0.1", "--lr", "0.1"),
        "lr 0.1 and stride 0.1 were given, and one follows from the other",
    ),
    (("--until", "soon"), "stopping rule 'soon' was given; expected one of base, expected, loss=X"),
    (("--until", "steps=0"), "stopping rule 'steps=0' was given"),
    (("--steps", "0"), "steps 0 was given; expected 1 or more"),
    (("--batch-size", "0"), "batch_size 0 was given"),
    (("--retain-batch-size", "-2"), "retain_batch_size -2 was given"),
    (("--save-every", "0"), "save_every 0 was given"),
    (
        ("--optimizer", "Adamm"),
        "optimizer 'Adamm' was given; expected a class of torch.optim, as in Adam, AdamW or SGD",
    ),
    (("--optimizer", "LBFGS"), "optimizer 'LBFGS' was given"),
    (("--schedule", "step"), "schedule 'step' was given"),
    (("--warmup", "-1"), "warmup"),
    (("--max-grad-norm", "nan"), "max_grad_norm nan was given"),
    (("--stop-damage", "-1"), "stop_damage -1.0 was given"),
    (("--max-damage", "inf"), "max_damage inf was given"),
    (("--seed", "-1"), "seed -1 was given"),
    (("--method", "ga-gd", "--retain", "none.jsonl"), "none.jsonl does not exist"),
    (("--holdout", "none.jsonl"), "none.jsonl does not exist"),
    (
        ("--method", "control", "--set", "bar=2"),
        "control 2 was given; expected a share of the likelihood between 0 and 1",
    ),
]


@pytest.mark.parametrize(("arguments", "sentence"), EARLY, ids=[" ".join(a) for a, _ in EARLY])
def test_wrong_options_are_refused_before_the_model_is_loaded(
    train, run, tmp_path, monkeypatch, arguments, sentence
):
    no_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with untouched(run):
        result = train(*arguments)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


LATE = [
    (("--control", "1.5"), "control 1.5 was given"),
    (("--lr", "auto"), "lr auto reads the retained rows' loss"),
    (("--method", "ngdiff", "--schedule", "cosine"), "lr auto and schedule 'cosine' were given"),
    (("--until", "steps=3", "--steps", "5"), "until steps=3 and steps 5 were given"),
    (("--retain", "other.jsonl"), "method ga looks at no retained rows"),
]


@pytest.mark.parametrize(("arguments", "sentence"), LATE, ids=[" ".join(a) for a, _ in LATE])
def test_wrong_options_that_need_no_model_are_refused_before_it_too(
    train, made, monkeypatch, arguments, sentence
):
    no_model(monkeypatch)
    monkeypatch.chdir(made)
    result = train(*arguments)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())


@pytest.mark.parametrize(("arguments", "sentence"), LATE, ids=[" ".join(a) for a, _ in LATE])
def test_they_are_refused(train, run, made, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.chdir(made)
    with untouched(run):
        result = train(*arguments)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "arguments", "sentence"),
    [
        (None, (), "name the rows to unlearn: --ids A,B,C or --ids-file FILE (one id per line)"),
        ("r0-1", ("--ids-file", "ids.txt"), "--ids"),
        ("r0-99", (), "no example has the id 'r0-99', among 10; the nearest are"),
        (" , ", (), "no ids were given"),
        (None, ("--ids-file", "empty.txt"), "empty.txt is empty: name at least one row"),
        (None, ("--ids-file", "none.txt"), "none.txt"),
    ],
)
def test_ids_are_checked_before_the_model_is_loaded(
    train, tmp_path, monkeypatch, ids, arguments, sentence
):
    no_model(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("r0-1\n")
    (tmp_path / "empty.txt").write_text("\n")
    result = train(*arguments, ids=ids)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())


def test_ids_from_a_file(train, tmp_path):
    (tmp_path / "ids.txt").write_text("r0-1\nr0-4\n")
    done = train("--ids-file", tmp_path / "ids.txt", "--until", "steps=1", "--json", ids=None)
    assert [row["id"] for row in done.json()["rows"]] == ["r0-1", "r0-4"]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ("r0-1,r0-1", "given more than once: 'r0-1'"),
        (",".join(f"r0-{i}" for i in range(ROWS)), "all rows would be removed"),
    ],
)
def test_ids_that_make_no_training(train, run, ids, sentence):
    with untouched(run):
        result = train(ids=ids)
    assert result.status == 2
    assert sentence in " ".join(result.err.split())


ODD = ["beta=0", "beta=-1", "beta=nan"]


@pytest.mark.parametrize("number", ODD)
def test_numbers_that_mean_nothing_are_refused(train, number):
    result = train("--method", "npo", "--set", number, "--until", "steps=2")
    assert result.status == 2
    assert "Traceback" not in result.err


def test_a_number_that_is_none_writes_nothing(train, run, tmp_path):
    with untouched(run):
        result = train("--method", "npo", "--set", "retain_weight=nan", "--until", "steps=2")
    assert result.status in (1, 2)
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["run", "base", "adapter", "run/inner", ""])
def test_out_may_not_be_what_it_is_made_from(train, run, made, place):
    home = run.parent if place.startswith("run") else made
    before = contents(made)
    result = train("--out", home / place, "--overwrite")
    assert result.status == 2
    assert contents(made) == before
    assert not list(made.glob("*.training"))
