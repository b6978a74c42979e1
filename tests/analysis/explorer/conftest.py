"""A small run that everything on the page can be told from."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.explorer.data import gather
from tests.analysis.explorer.helpers import rows_of, write_run, write_scores

ROWS, QUERIES, MODULES = 12, 4, 3


def write_csv(path, columns, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`explored`, the run's `directory`, the arrays that were written, and the files beside it."""
    root = tmp_path_factory.mktemp("explorer")
    rng = np.random.default_rng(0)
    modules = rng.normal(size=(QUERIES, MODULES, ROWS)).astype(np.float32)
    values = modules.sum(1)
    own = np.exp(rng.normal(size=ROWS)).astype(np.float32)
    rows, queries = rows_of(ROWS), rows_of(QUERIES, "query")
    write_run(root / "run", rows)
    write_scores(root / "run", values, queries, self_influence=own, modules=modules)
    (root / "clean").mkdir()
    write_csv(
        root / "clean" / "rows.csv",
        ["id", "reason", "rank", "score", "gain", "evidence", "suggested", "decision", "text"],
        [
            ["row-3", "duplicate", 1, "0.97", "0.02", "the same as row-4", "remove", "", "t"],
            ["row-3", "outlier", 2, "0.5", "", "far from all", "", "keep", "t"],
            ["'row-9", "duplicate", 3, "nan", "", "'=of row-3, another answer", "", "", "t"],
            ["gone", "outlier", 4, "0.1", "", "no row of this run", "remove", "", "t"],
        ],
    )
    write_csv(
        root / "difficulty.csv",
        ["id", "steps", "damage", "recommended", "reason"],
        [
            [f"row-{k}", "inf" if k == 2 else k + 1.5, k / 100, "ascent", "it is cheap"]
            for k in range(ROWS)
        ],
    )
    evaluation = {
        "adapter": {"path": "/adapters/new"},
        "sets": {
            "forget": {
                "rows": 2,
                "base": {"loss": 3.0},
                "adapter": {"loss": 2.5, "accuracy": 0.25},
            },
            "retain": None,
        },
        "membership": {"adapter": {"loss": {"auc": 0.61}}},
        "rows": [
            {
                "id": "row-1",
                "prompt": "Who?",
                "completion": " Ann.",
                "generated": {"adapter": " Bob."},
            },
            {"id": "row-2", "generated": {"adapter": None}},
        ],
    }
    (root / "evaluation.json").write_text(json.dumps(evaluation))
    lds = {"lds": 0.46, "low": 0.41, "high": 0.49, "level": 0.95, "subsets": 40, "queries": 4}
    lds |= {"per_query": [0.1, 0.9, None, 0.4], "query_ids": [f"query-{q}" for q in range(4)]}
    (root / "lds.json").write_text(json.dumps(lds))
    given = {
        "cleaning": root / "clean",
        "difficulty": root / "difficulty.csv",
        "evaluations": [root / "evaluation.json"],
        "lds": [root / "lds.json"],
    }
    return SimpleNamespace(
        root=root,
        directory=root / "run",
        values=values,
        modules=modules,
        own=own,
        given=given,
        explored=gather(root / "run", **given),
    )
