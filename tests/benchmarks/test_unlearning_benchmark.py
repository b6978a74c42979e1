"""The benchmark of unlearning methods: its rule of tuning, its tables, and the docs' own method."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import unlearn
from tests.conftest import build_model, examples, fit_end
from unlearn.methods.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import unlearning  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit_end(
        build_model(layers=1), examples(12), directory=tmp_path_factory.mktemp("benchmark") / "run"
    )


@pytest.fixture
def bounded(tmp_path):
    """The method of docs/methods.md, as it stands there."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# bounded\.py\n.*?)```", page, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "bounded.py").write_text(block)
    return f"{tmp_path / 'bounded.py'}:bounded"


def test_the_method_of_the_docs_runs_in_the_loop(run, bounded):
    """What it minimises at first is the mean probability of the forget rows' completion tokens, by
    a plain forward.
    """
    edit = unlearn.train(run, bounded, run.train.ids[:3], until="steps=3")
    probabilities = []
    for row in run.tokens[:3]:
        ids = torch.as_tensor(row.input_ids)[None]
        with torch.no_grad():
            p = (
                run.model.model(input_ids=ids)
                .logits.softmax(-1)[0, :-1]
                .gather(-1, ids[0, 1:, None])[:, 0]
            )
        probabilities += p[torch.as_tensor(row.supervised)[1:]].tolist()
    assert len(edit.log) == 3
    assert edit.log[0]["forget_term"] == pytest.approx(np.mean(probabilities), rel=1e-9)
    assert edit.report["method"]["name"] == "bounded"


def test_the_method_of_the_docs_runs_in_the_benchmark(run, bounded):
    (method,) = unlearning.methods([], [bounded])
    case = SimpleNamespace(run=run, ids=run.train.ids[:3])
    edit = unlearning.run_method(case, method, 3.0, 0, 1e9, None)
    assert len(edit.log) == unlearning.STEPS
    assert edit.log[0]["lr"] == pytest.approx(3 * method.lr)


def test_a_rate_is_scaled_where_it_is_found_automatically(run):
    """Three times NGDiff's stride: the first move is three times as long, unless GeN changed it."""
    case = SimpleNamespace(run=run, ids=run.train.ids[:3])
    first = [
        unlearning.run_method(case, METHODS["ga"](), factor, 0, 1e9, None).log[0]["move_norm"]
        for factor in (1.0, 3.0)
    ]
    assert first[1] == pytest.approx(3 * first[0], rel=1e-6)


def line(factor, forget, retained, reached, **more):
    return {
        "method": "m",
        "factor": factor,
        "seed": 0,
        "forget": forget,
        "retained": retained,
        "reached": reached,
    } | more


def test_the_kept_rate_reaches_the_goal_at_the_least_damage():
    """Of two that reach the goal the one with the lower retained loss, not the lowest of all.

    Else the nearest to the goal.
    """
    lines = [line(0.3, 2.0, 0.8, False), line(1.0, 4.1, 1.2, True), line(3.0, 4.3, 1.5, True)]
    assert unlearning.kept_factor(lines, 4.0) == 1.0
    assert unlearning.kept_factor([lines[0], line(3.0, 2.5, 2.0, False)], 4.0) == 3.0
    assert (
        unlearning.kept_factor([{"factor": 3.0, "failed": "NaN"}, line(0.3, 2.0, 0.8, False)], 4.0)
        == 0.3
    )


def test_a_table_has_means_ranges_and_the_spread_over_rates(tmp_path):
    """Distances |f / 4 - 1| + |r / 1 - 1| of 0.25 + 0.5, 0.2 and 10 (failed): a spread of 9.8."""
    lines = unlearning.Lines(tmp_path / "runs.jsonl")
    lines.add({"method": unlearning.BEFORE, "goal": 4.0, "forget": 1.0, "retained": 0.9})
    lines.add(
        {"method": unlearning.RETRAINED, "seed": 0, "forget": 4.0, "retained": 1.0, "cost": 200.0}
    )
    lines.add(line(0.3333, 5.0, 1.5, True, cost=10.0))
    lines.add(line(1.0, 4.0, 1.2, True, cost=20.0))
    lines.add(line(3.0, 0, 0, False) | {"failed": "NaN"})
    lines.add(line(1.0, 4.2, 1.4, True, cost=20.0) | {"seed": 1})
    row = unlearning.summary(unlearning.Lines(tmp_path / "runs.jsonl"), "m")
    assert row["factor"] == 1.0
    assert row["spread"] == pytest.approx(10 - 0.2)
    assert row["forget"] == pytest.approx([4.1, 4.0, 4.2])
    assert row["ratio"] == pytest.approx(0.1)
    assert row["reached"] == row["seeds"] == 2
    text, rows = unlearning.table(
        lines, 10, [unlearning.BEFORE, unlearning.RETRAINED, "m", "other"]
    )
    assert "| m | 1 | 4.10 [4.00, 4.20] | 1.30 [1.20, 1.40] |" in text
    assert len(rows) == 3
    unlearning.plot(rows, 10, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
