"""The command that says by small trainings what the model would lose without some rows."""

from __future__ import annotations

import csv
import json

import pytest

import influence
import unlearn
from tests.conftest import rows
from tests.helpers import write_rows
from unlearn.cli import main
from unlearn.retraining.recipe import Recipe

RECIPE = Recipe(lr=1e-2, epochs=2, batch_size=4, dropout=False, seed=3)


def test_the_command_says_what_python_does(run, tmp_path, run_main):
    queries = write_rows(tmp_path / "queries.jsonl", rows(3, seed=1))
    recipe, out = tmp_path / "recipe.json", tmp_path / "table.csv"
    recipe.write_text(json.dumps(RECIPE.as_json()))
    asked = ["unlearn", "without", "--run", run.directory, "--ids", ",".join(run.train.ids[:2])]
    asked += ["--queries", queries, "--recipe", recipe]
    done = run_main(main, *asked, "--json")
    found = unlearn.without(run, run.train.ids[:2], influence.read_examples(queries), recipe=RECIPE)
    assert json.loads(done.out) == json.loads(json.dumps(found.as_json()))
    done = run_main(main, *asked, "--out", out)
    text = " ".join(done.out.split())
    assert "queries without 2 training rows" in text
    assert "by small trainings on 10 near rows" in text
    with out.open() as lines:
        table = list(csv.DictReader(lines))
    assert [row["kind"] for row in table] == ["queries"] * 3 + ["removed"] * 2
    done = run_main(main, *asked, "--out", out)
    assert done.status == 2
    assert "exists: give another --out" in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name the rows to do without"),
        (("--ids", "nobody"), "nobody"),
        (("--ids", "r0-0", "--seed", "-1"), "--seed"),
        (("--ids", "r0-0", "--recipe", "nowhere.json"), "nowhere.json"),
    ],
)
def test_a_wrong_call_says_what_to_do(run, run_main, options, said):
    done = run_main(main, "unlearn", "without", "--run", run.directory, *options)
    assert done.status == 2
    assert said in done.err
