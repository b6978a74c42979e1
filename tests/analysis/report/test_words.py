"""The sentences of the page, and that every null is said."""

from __future__ import annotations

import math
import re
import shlex

import pytest

from analysis.report.reading import read_record
from tests.analysis.report.helpers import (
    NULLABLE,
    drop,
    html,
    made,
    save,
    text,
)


def test_the_answer_comes_first():
    said = text(made())
    answer = (
        "The 3 removed rows are now about as unfamiliar to the adapter as rows it never saw: loss "
        "4.60 against 4.70 expected."
    )
    assert said.index("3 training rows removed") < said.index(answer) < said.index("Removed rows")
    assert (
        "Typical probability of the right next token: 82 % → 1.0 %." in said
    )  # exp(-0.2), exp(-4.6)
    assert "The loss of the other training rows rose by 3.1 % (limit: 10 %)." in said
    one = text(made(["a"]))
    assert "The removed row is now about as unfamiliar to the adapter as a row it never saw" in one
    assert "one by one" not in one


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        (
            (0.2, 2.0, 4.7),
            "The 3 removed rows are partly forgotten: loss 2.00, 0.20 before, against 4.70 "
            "expected of rows",
        ),
        (
            (0.2, 0.21, 4.7),
            "The 3 removed rows are not forgotten: loss 0.21, 0.20 before, against 4.70 expected "
            "of rows",
        ),
        ((0.2, 9.0, 4.7), "a conspicuously high loss can itself give away"),
        ((4.5, 4.6, 4.7), "3 rows had such a loss before the edit already."),
        (
            (0.2, 4.6, None),
            "cannot be said: the record has no loss to expect. Loss before 0.20, now 4.60.",
        ),
        (
            (0.2, None, 4.7),
            "Whether the 3 removed rows are forgotten cannot be said: their losses were not "
            "measured row by row.",
        ),
        ((0.2, math.inf, 4.7), "not a finite number"),
    ],
)
def test_the_sentence_for(losses, sentence):
    assert sentence in text(made(losses=losses))


def test_a_row_that_is_recited_is_said_beside_the_answer_whatever_its_loss():
    record = made()
    record["rows"][0]["extraction_after"] = 0.5
    assert "recite more than half" not in text(record)
    record["rows"][0]["extraction_after"] = 0.51
    assert (
        "against 4.70 expected. Of 1 of them the adapter can still be made to recite more than "
        "half." in text(record)
    )
    assert 'class="tile warn"' in html(record)
    assert "Of it the adapter" in text(made(["a"]) | {"rows": [record["rows"][0] | {"id": "a"}]})
    relabelled = made(kind="relabel")
    relabelled["rows"][0]["extraction_after"] = 1.0  # as it should be
    assert "recite more than half" not in text(relabelled)


def test_a_loss_that_was_asked_for_is_not_called_that_of_unseen_rows():
    record = made()
    record["method"]["until"] = "loss=4.7"
    said = text(record)
    assert "The 3 removed rows have reached the loss asked for: 4.60 against 4.70." in said
    assert "unfamiliar to the adapter" not in said


def test_beyond_the_limit_by_force_and_a_guard_that_contradicts_itself():
    record = made()
    record["guard"] = {"max_damage": 0.1, "damage": 0.412, "passed": False, "forced": True}
    assert "rose by 41 % (limit: 10 %). It was saved all the same, by force." in text(record)
    record["guard"]["passed"] = True
    assert "The record says that the limit was kept, which its own numbers deny." in text(record)
    record["guard"] = {"max_damage": 0.1, "damage": -0.02, "passed": True, "forced": True}
    said = text(record)
    assert "fell by 2 % (limit: 10 %). Force was given and not needed." in said
    assert "deny" not in said


def test_changed_rows_read_the_other_way_round():
    record = made(kind="relabel")
    said = text(record)
    assert "3 training rows relabelled" in said
    assert (
        "The new content of the 3 changed rows is taken up: loss 0.20, 4.60 before, against 0.20 "
        "that the old content" in said
    )
    assert (
        "Old content: loss 0.20 before, 4.00 now; the adapter now prefers the new to the old in 3 "
        "of 3." in said
    )
    assert "unlearn retrain --run '/data/my run' \\ --edit /edits/e1" in said
    for row in record["rows"]:
        row["old_after"] = 0.1
    assert "prefers the new to the old in 0 of 3" in text(record)
    both = text(made(kind="mixed"))
    assert "1 training row removed, 1 relabelled, 1 corrected" in both
    assert "The removed row is now about as unfamiliar" in both
    assert "The new content of the 2 changed rows is taken up" in both


def test_how_exact_what_it_cost_and_how_to_check():
    said = text(made())
    assert "with gradients taken anew at each (1 of 2 tried steps kept)" in said
    assert "3e-07, within the tolerance 1e-05 (worst relative residual)" in said
    assert (
        "0.012 before, 0.0031 now: norm for the retained rows, 0 only at their optimum (Guo et al. "
        "2020)" in said
    )
    assert (
        "work 1,200 row gradients (forward and backward of one row); time 94.2 s; against training "
        "again 2 %." in said
    )
    assert "unlearn verify --run '/data/my run' unlearn verify --adapter /edits/e1" in said
    assert "delta.safetensors beside the new adapter leads back to the old one" in said
    record = made()
    record["residual"]["solver"] = 0.1
    del record["files"]["delta.safetensors"]
    assert "0.1, NOT within the tolerance 1e-05" in text(record)
    assert "leads back" not in text(record)


def test_the_retraining_command_can_be_pasted():
    said = text(made())
    assert "was not compared with an adapter that was trained again" in said
    command = re.search(r"unlearn retrain .* --out RETRAINED", said)[0].replace("\\ ", "")
    assert shlex.split(command)[:4] == ["unlearn", "retrain", "--run", "/data/my run"]
    assert shlex.split(command)[4:] == ["--edit", "/edits/e1", "--out", "RETRAINED"]
    shown = re.search(r"analysis report .* --out PAGE.html", said)[0].replace("\\ ", "")
    assert shlex.split(shown)[2:6] == ["--edit", "/edits/e1", "--retrained", "RETRAINED"]
    record = made()
    for path in (None, "-rf", "/a\nb", "/\u202eb"):
        record["run"]["path"] = path
        assert "unlearn verify --run RUN unlearn" in text(record), path


@pytest.mark.parametrize("path", NULLABLE, ids=lambda path: ".".join(map(str, path)))
def test_every_null_is_said(tmp_path, path):
    record = made()
    drop(record, *path)
    said = text(read_record(save(tmp_path, record)))
    assert not re.search(r"\bNone\b|\bnan\b|\{\{", said)
    gone = {"not measured", "not recorded", "not judged", "No held-out rows", "no limit"}
    quiet = {
        ("guard", "passed"),
        ("guard", "forced"),
        ("agreement",),
        ("method", "until"),
        ("run", "path"),
        ("files",),
    }
    quiet |= {
        ("losses", "retained", "standard_error"),
        ("losses", "heldout", "source"),
        ("residual", "tolerance"),
    }
    quiet |= {("data", "rows_before"), ("rows", 1, "base"), ("versions",)}
    plain = text(made())
    if path not in quiet:
        assert sum(said.count(word) for word in gone) > sum(plain.count(word) for word in gone)
