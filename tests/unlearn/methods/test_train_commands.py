"""`unlearn train` and `unlearn methods` as a person calls them: saved, refused, resumed, shared."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import influence
from analysis.cli import main as analysis
from influence.run import Run
from tests.conftest import rows
from tests.helpers import contents, save, untouched, write_rows
from unlearn.cli import main
from unlearn.methods import loop
from unlearn.methods.methods import METHODS

ROWS, FORGET = 10, "r0-1,r0-2,r0-5"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, adapter, train.jsonl and a run on disk."""
    at = tmp_path_factory.mktemp("train")
    save(at, layers=1, target_modules=["q_proj", "v_proj"])
    write_rows(at / "train.jsonl", rows(ROWS))
    write_rows(at / "other.jsonl", rows(3, seed=7))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    influence.fit(
        model, influence.read_examples(at / "train.jsonl"), directory=at / "run", path=(0.6,)
    )
    return at


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def train(run, run_main, tmp_path):
    """The command on this run. `out` unless --out is given."""

    def call(*arguments, ids=FORGET):
        given = list(arguments)
        if "--out" not in given:
            given += ["--out", tmp_path / "out"]
        if ids is not None:
            given += ["--ids", ids]
        if "--method" not in given:
            given += ["--method", "ga"]
        return run_main(main, "unlearn", "train", "--run", run, "--device", "cpu", *given)

    return call


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


# ---- what is saved -------------------------------------------------------------------------------


def test_a_trained_adapter_is_peft_s_and_on_record(train, run, made, run_main, tmp_path):
    """Loaded and merged by PEFT, checked by verify, followed by a closed-form edit and another
    training, and reported.
    """
    inputs = [made / "base", made / "adapter"]
    before = [hashes(folder) for folder in inputs]
    write_rows(tmp_path / "heldout.jsonl", rows(9, seed=9))
    out = tmp_path / "out"
    done = train(
        "--method",
        "ga-kl",
        "--until",
        "steps=4",
        "--lr",
        0.01,
        "--holdout",
        tmp_path / "heldout.jsonl",
        "--json",
    )
    assert done.status == 0, done.err
    assert [hashes(folder) for folder in inputs] == before
    answer = done.json()
    assert answer["written"] is True
    assert answer["out"] == str(out)
    assert not (tmp_path / "out.training").exists()

    record = json.loads(
        (out / "edit.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    closed = (
        "remove",
        "--run",
        run,
        "--ids",
        "r0-1",
        "--out",
        tmp_path / "closed",
        "--force",
        "--start",
        "original",
    )
    assert run_main(main, "unlearn", *closed).status == 0
    other = json.loads((tmp_path / "closed" / "edit.json").read_text())
    assert set(record) == set(other)  # whose keys tests/unlearn/record/test_save.py has
    parts = {key for key in other if isinstance(other[key], dict)} - {"method", "files"}
    shared = ("run", "base", "adapter", "data", "residual", "delta")
    assert parts >= {*shared, "losses", "guard", "cost", "comparable", "lineage"}
    for key in parts:
        assert set(record[key]) == set(other[key]), key
    named = "name curvature geometry damping points lambda solver steps until seed"
    assert set(named.split()) <= set(record["method"])
    for key in ("edited", "retained"):
        assert set(record["losses"][key]) == set(other["losses"][key]), key
    assert {"rows", "before", "after", "source"} <= set(record["losses"]["heldout"])
    assert set(record["rows"][0]) == set(other["rows"][0])
    assert record["kind"] == "remove"
    assert record["lineage"] == {"edits": 1, "removed": ["r0-1", "r0-2", "r0-5"], "changed": []}
    assert record["data"]["rows_after"] == ROWS - 3
    assert record["method"]["name"] == "ga-kl"
    assert record["method"]["steps_taken"] == 4
    assert record["files"] == {
        name: value for name, value in hashes(out).items() if name != "edit.json"
    }
    assert record["losses"]["heldout"]["rows"] == 9

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
    for row in rows(ROWS)[1], rows(ROWS)[2], rows(ROWS)[5]:
        for name, data in contents(out).items():
            assert (row["prompt"] + row["completion"]).encode() not in data, name

    old, delta, new = (
        load_file(folder / name)
        for folder, name in (
            (made / "adapter", "adapter_model.safetensors"),
            (out, "delta.safetensors"),
            (out, "adapter_model.safetensors"),
        )
    )
    assert old.keys() == delta.keys() == new.keys()
    assert all(torch.equal(old[key] + delta[key], new[key]) for key in old)
    assert any(delta[key].any() for key in delta)

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

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

    page = run_main(analysis, "analysis", "report", "--edit", out, "--out", tmp_path / "page.html")
    assert page.status == 0, page.err
    text = (tmp_path / "page.html").read_text()
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


def no_model(monkeypatch):
    monkeypatch.setattr(Run, "open", lambda *_a, **_k: pytest.fail("the model was loaded"))


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


# ---- methods -------------------------------------------------------------------------------------

COLUMNS = {
    "name": str,
    "title": str,
    "source": str,
    "targets": str,
    "forget": str | None,
    "retain": str | None,
    "combine": str,
    "finish": str | None,
    "needs_retain": bool,
    "needs_reference": bool,
    "retain_rows": str | None,
    "cost_per_step": dict,
    "optimizer": str,
    "lr": float | str | None,
    "stride": float | None,
    "until": str,
    "steps": int,
}


def test_methods_as_json(run_main):
    result = run_main(main, "unlearn", "methods", "--json")
    assert result.status == 0, result.err
    table = result.json()
    assert [row["name"] for row in table] == list(METHODS)
    for row in table:
        for key, kind in COLUMNS.items():
            assert isinstance(row[key], kind), (row["name"], key)
        assert set(row["cost_per_step"]) == {"per_forget_row", "per_retain_row"}
        assert (
            row["needs_retain"] == (row["retain"] is not None) == (row["retain_rows"] is not None)
        )
        assert hasattr(torch.optim, row["optimizer"])
        assert row["source"]
        assert row["title"]
    assert {row["name"] for row in table if row["lr"] == "auto"} == {"ngdiff"}
    assert "<" not in result.out.replace("<eos>", "")  # no address of an object, no <lambda>


def test_methods_for_a_person(run_main):
    result = run_main(main, "unlearn", "methods")
    assert result.status == 0
    for name in METHODS:
        assert (
            f"\n{name}: {METHODS[name]().title}\n    {METHODS[name]().source}\n"
            in "\n" + result.out
        )
    assert max(len(line) for line in result.out.splitlines()) < 220


def test_help_names_every_option_with_a_sentence(run_main):
    result = run_main(main, "unlearn", "train", "--help")
    assert result.status == 0
    text = " ".join(result.out.split())
    for part in (
        "--method",
        "--retain",
        "--until",
        "--set",
        "--stop-damage",
        "--control",
        "--save-every",
        "the same command goes on",
    ):
        assert part in text, part
    assert "torchrun" in text
    assert "Yao" not in text
    group = run_main(main, "unlearn", "--help")
    assert "train" in group.out
    assert "methods" in group.out


OWN = '''"""A method of ten lines."""
from unlearn import Method, Term
from unlearn.terms import descent


def capped(cap: float = 5.0) -> Method:
    """Ascent that ends where a token's loss is at the cap."""
    term = Term("capped", lambda part: -part.losses.clamp(max=cap))
    return Method("capped", forget=term, retain=descent, lr=0.01, steps=5, until="steps=5",
                  title="capped ascent")


plain = capped()
'''


def test_a_method_of_ones_own_runs(train, tmp_path, run_main):
    (tmp_path / "mine.py").write_text(OWN)
    call = ("--method", f"{tmp_path / 'mine.py'}:capped", "--set", "cap=3", "--json")
    done = train(*call)
    assert done.status == 0, done.err
    result = done.json()
    assert result["method"]["name"] == "capped"
    assert result["method"]["steps_taken"] == 5
    page = run_main(
        analysis, "analysis", "report", "--edit", tmp_path / "out", "--out", tmp_path / "page.html"
    )
    assert page.status == 0
    assert "capped: capped ascent, 5 gradient steps" in (tmp_path / "page.html").read_text()
    value = train(
        "--method",
        f"{tmp_path / 'mine.py'}:plain",
        "--out",
        tmp_path / "two",
        "--start",
        "original",
        "--json",
    )
    assert value.status == 0
    assert (value.json()["delta"]["norm"] == result["delta"]["norm"]) is False  # another cap
    missing = train("--method", f"{tmp_path / 'mine.py'}:lost", "--out", tmp_path / "three")
    assert missing.status == 2
    assert "has no method 'lost'" in missing.err


WRONG = [
    ("def mine():\n    return 7\n", "another thing"),
    pytest.param("def mine(a):\n    return a\n", "more"),
]


@pytest.mark.parametrize(("text", "what"), WRONG)
def test_what_is_no_method_is_told(train, tmp_path, monkeypatch, text, what):
    no_model(monkeypatch)
    (tmp_path / "mine.py").write_text(text)
    result = train("--method", f"{tmp_path / 'mine.py'}:mine")
    assert result.status == 2, what


def test_a_file_may_hold_dataclasses_and_postponed_annotations(train, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from unlearn import Method\n"
        "from unlearn.terms import ascent, descent\n"
        "@dataclass(frozen=True)\n"
        "class Half:\n"
        "    weight: float = 0.5\n"
        "    def __call__(self, forget, retain, step):\n"
        "        return forget + self.weight * retain\n"
        "mine = Method('mine', forget=ascent, retain=descent, combine=Half(), until='steps=2')\n"
    )
    assert train("--method", f"{tmp_path / 'mine.py'}:mine").status == 0


# ---- killed, and gone on -------------------------------------------------------------------------


def interrupted_after(monkeypatch, steps: int):
    take_step, steps_begun = loop.take_step, []

    def stop(*arguments):
        steps_begun.append(1)
        if len(steps_begun) > steps:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", stop)


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


@pytest.mark.parametrize("place", ["help", "methods.md", "choosing.md"])
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
