from __future__ import annotations

import shutil

import numpy as np
import pytest

from analysis.explorer.data import gather
from influence.errors import InputError, MismatchError
from tests.analysis.explorer.helpers import rows_of, write_rows, write_run, write_scores


def test_what_is_gathered(world):
    found = world.explored
    assert (len(found.rows), len(found.queries), found.title) == (12, 4, "tiny-adapter")
    assert found.queries.parts(1)[0] == ["prompt", "What is number 1 of the querys?"]
    assert found.self_influence.tolist() == world.own.tolist()
    assert found.position["row-7"] == 7


def test_what_is_known_of_a_row(world):
    facts = {fact["label"]: fact for fact in world.explored.facts_of(3)}
    assert facts["self-influence"]["value"] == f"{world.own[3]:+.3g} nats per token"
    assert facts["to unlearn it"]["value"] == "4.5 steps"
    assert facts["damage by then"]["value"] == "+0.03 nats per token"
    assert facts["advice"] == {"label": "advice", "value": "ascent", "help": "it is cheap"}
    reasons = [fact for fact in world.explored.facts_of(3) if fact["label"] == "to look at"]
    assert [(each["value"], each["help"]) for each in reasons] == [
        ("duplicate", "the same as row-4"),
        ("outlier", "far from all"),
    ]
    assert {fact["value"] for fact in world.explored.facts_of(2)} >= {"out of reach"}


def test_a_run_with_nothing_but_its_rows(tmp_path):
    write_run(tmp_path / "run", rows_of(2))
    found = gather(tmp_path / "run")
    assert (found.table, found.self_influence, len(found.queries)) == (None, None, 0)
    assert found.facts_of(0) == []


def test_a_file_with_self_influences_alone_is_no_score_file(tmp_path):
    from influence.store import write_file

    manifest = write_run(tmp_path / "run", rows_of(2))
    write_file(
        tmp_path / "run" / "scores.h5",
        {"self_influence": np.ones(2)},
        attrs={"run_digest": manifest.digest},
        strings={"train_ids": ["row-0", "row-1"]},
    )
    assert gather(tmp_path / "run").table is None
    write_scores(
        tmp_path / "run", np.ones((1, 2)), rows_of(1, "query"), name="strongest.h5", kept=1
    )
    found = gather(tmp_path / "run")
    assert found.table.kept == 1
    assert found.self_influence.tolist() == [1, 1]


def test_rows_and_queries_that_are_gone_leave_their_ids(tmp_path, capsys):
    write_run(tmp_path / "run", rows_of(2))
    write_scores(tmp_path / "run", np.ones((1, 2)), rows_of(1, "query"))
    for path in tmp_path.glob("*.jsonl"):
        path.rename(path.with_suffix(".moved"))
    found = gather(tmp_path / "run")
    assert (found.rows.ids, found.rows.preview(0)) == (["row-0", "row-1"], "")
    assert (found.queries.ids, found.queries.preview(0)) == (["query-0"], "")
    said = capsys.readouterr().err
    assert "the training rows are not where they were" in said
    assert "of the queries only the ids are shown: they are not where they were" in said
    again = gather(
        tmp_path / "run", queries=str(write_rows(tmp_path / "q.jsonl", rows_of(1, "query")))
    )
    assert again.queries.preview(0).startswith("What is number 0")


def test_queries_that_have_changed_are_not_shown_as_scored(tmp_path):
    write_run(tmp_path / "run", rows_of(2))
    write_scores(tmp_path / "run", np.ones((1, 2)), rows_of(1, "query"))
    other = [{**rows_of(1, "query")[0], "completion": " something else"}]
    write_rows(tmp_path / "run-scores.h5.jsonl", other)
    assert gather(tmp_path / "run").queries.preview(0) == ""
    path = write_rows(tmp_path / "other.jsonl", other)
    with pytest.raises(MismatchError, match="not what was scored"):
        gather(tmp_path / "run", queries=str(path))


def test_scores_of_another_run_and_no_run(world, tmp_path):
    write_run(tmp_path / "run", rows_of(3))
    with pytest.raises(MismatchError, match="another run"):
        gather(tmp_path / "run", scores=world.directory / "scores.h5")
    with pytest.raises(InputError, match="not a run directory"):
        gather(tmp_path)
    shutil.rmtree(tmp_path / "run")


def test_pages_on_scores_alone_do_not_wait_for_torch(world):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from analysis.explorer.data import gather; "
        "from analysis.explorer.page import write; "
        f"write(gather(Path({str(world.directory)!r})), {str(world.root / 'light.html')!r}); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
