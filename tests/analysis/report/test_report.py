"""The page on one edit: what it says follows from the record's numbers, and nothing in the record can do harm."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import math
import random
import re
import shlex
import tomllib
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.cli import main
from analysis.report import page as module
from analysis.report.page import (
    agreement,
    damage,
    forgetting,
    groups,
    learning,
    page,
    read_record,
    report,
)
from influence.errors import InputError, StoreError, ToolkitError
from influence.store import write_json

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = [
    "x" * 200,
    "<script>alert(1)</script>",
    "</style></title><img src=https://evil.example/x.png onerror=alert(1)>",
    "\u202eשלום עולם\u2066",
    "مرحبا بالعالم",
    "a\" onmouseover='alert(1)' b=",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[2J\x00red\n\nline\u2028",
    "-rf",
    "a,b",
    " padded ",
    "\ud800 half a pair",
    "$(rm -rf ~)`x`",
    "é" * 5000,
]


def made(ids=("a17", "b4", "c9"), kind="remove", losses=(0.2, 4.6, 4.7)):
    """A record whose rows have these losses before, after and expected; of a relabelled row the old content's."""
    before, after, target = losses
    actions = [
        kind if kind != "mixed" else ("remove", "relabel", "correct")[i % 3]
        for i in range(len(ids))
    ]
    rows = []
    for id, action in zip(ids, actions, strict=True):
        row = {
            "id": id,
            "action": action,
            "before": before,
            "after": after,
            "target": target,
            "base": 4.9,
        }
        row |= {"extraction_before": 0.9, "extraction_after": 0.05, "rank": 0.4}
        if action != "remove":
            row |= {
                "before": after,
                "after": before,
                "target": None,
                "rank": None,
                "old_before": before,
                "old_after": 4.0,
            }
        rows.append(row)
    mean = {"rows": len(ids), "before": before, "after": after}
    return {
        "format": 1,
        "kind": kind,
        "created": "2026-11-21T12:00:00Z",
        "versions": {"lora-influence": "0.1.0", "torch": "2.13.0"},
        "run": {"path": "/data/my run", "digest": "1" * 64},
        "base": {"path": "/data/base", "digest": "2" * 64},
        "adapter": {
            "before": {"path": "/data/adapter", "digest": "3" * 64},
            "after": {"digest": "4" * 64},
        },
        "data": {
            "before": "5" * 64,
            "after": "6" * 64,
            "rows_before": 4000,
            "rows_after": 4000 - len(ids),
        },
        "tokenizer": {"digest": "7" * 64},
        "requests": [
            {"id": id, "action": action, "content_before": "8" * 16, "content_after": None}
            for id, action in zip(ids, actions, strict=True)
        ],
        "method": {
            "name": "re-linearised",
            "curvature": "ekfac",
            "points": ["0.4", "0.6"],
            "until": "expected",
        },
        "residual": {
            "solver": 3e-7,
            "tolerance": 1e-5,
            "objective": {"before": 0.0123, "after": 0.0031},
        },
        "stopped": "The expected loss was reached.",
        "steps": [
            {
                "step": 1,
                "length": 0.1,
                "radius": 0.2,
                "predicted": 0.9,
                "measured": 0.8,
                "accepted": True,
            },
            {
                "step": 2,
                "length": 0.1,
                "radius": 0.2,
                "predicted": 0.9,
                "measured": 0.1,
                "accepted": False,
            },
        ],
        "delta": {"norm": 1.3, "relative": 0.083},
        "losses": {
            "edited": mean | {"target": target, "predicted": 3.9},
            "retained": {
                "rows": 64,
                "before": 0.18,
                "after": 0.185,
                "change": 0.031,
                "standard_error": 0.006,
            },
            "heldout": {"rows": 400, "before": 4.8, "after": 4.83, "source": "/data/holdout.jsonl"},
        },
        "rows": rows,
        "comparable": {"source": "held-out rows", "rows": 400},
        "guard": {"max_damage": 0.1, "damage": 0.031, "passed": True, "forced": False},
        "cost": {
            "row_gradients": 800,
            "row_forwards": 1200,
            "total": 1200.0,
            "seconds": 94.2,
            "retraining": 60000,
        }
        | {"ratio": 0.02},
        "agreement": None,
        "files": {"adapter_model.safetensors": "9" * 64, "delta.safetensors": "a" * 64},
    }


def save(folder: Path, record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "edit.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Tags, attributes and visible text of a page, without a browser."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self._inside = set(), [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside.append(tag)
        self.text += " " if tag in ("td", "th") else ""

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._inside:
            self.text += data


def text(record) -> str:
    return " ".join(Page(page(record, "/edits/e1")).text.replace("\N{NO-BREAK SPACE}", " ").split())


def drop(record, *path):
    """Set the value at a path to null."""
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = None


# ---- the rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((0.2, 4.7, 4.7), "forgotten"),
        ((0.0, 0.9, 1.0), "forgotten"),  # 0.9 of the target, exactly
        ((0.0, 0.899, 1.0), "partly forgotten"),
        ((0.0, 0.1, 1.0), "partly forgotten"),  # a tenth of the way, exactly
        ((0.0, 0.099, 1.0), "not forgotten"),
        ((0.5, 0.52, 1.0), "not forgotten"),
        ((0.5, 0.2, 1.0), "not forgotten"),
        ((None, 0.5, 1.0), "not forgotten"),  # no progress can be shown
        ((None, 0.95, 1.0), "forgotten"),
        ((0.2, 4.0, None), "not judged"),
        ((0.2, None, 4.7), "not judged"),
        ((0.2, math.nan, 4.7), "not judged"),
        ((0.2, math.inf, 4.7), "not judged"),
    ],
)
def test_forgetting(losses, word):
    assert forgetting(*losses) == word


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ((5.0, 0.0, 1.0), "taken up"),
        ((1.0, 0.1, 0.0), "taken up"),  # 0.9 of the way, exactly
        ((1.0, 0.11, 0.0), "partly taken up"),
        ((10.0, 9.0, 0.0), "partly taken up"),  # a tenth of the way, exactly
        ((1.0, 0.91, 0.0), "not taken up"),
        ((1.0, 2.0, 0.0), "not taken up"),
        ((0.5, 0.6, 0.5), "not taken up"),  # it was known well enough and no longer is
        ((0.5, 0.5, 0.6), "taken up"),
        ((None, 0.5, 0.1), "not taken up"),
        ((5.0, 1.0, None), "not judged"),
        ((5.0, None, 1.0), "not judged"),
    ],
)
def test_learning(losses, word):
    assert learning(*losses) == word


@pytest.mark.parametrize(
    ("guard", "word"),
    [
        ({"damage": 0.1, "max_damage": 0.1}, "within the limit"),
        ({"damage": 0.1001, "max_damage": 0.1}, "beyond the limit"),
        ({"damage": -0.3, "max_damage": 0.1}, "within the limit"),
        ({"damage": 0.1, "max_damage": None}, "no limit set"),
        ({"damage": None, "max_damage": 0.1}, "not measured"),
        ({"damage": math.nan, "max_damage": 0.1}, "not measured"),
        (None, "not measured"),
    ],
)
def test_damage(guard, word):
    assert damage(guard) == word


def test_agreement_compares_each_loss_with_the_retrained_adapters():
    record = made()
    assert agreement(record) == ("not compared", ())
    record["agreement"] = {
        "adapter": "/x",
        "edited": 4.6 / 1.09,
        "retained": 0.185,
        "heldout": None,
        "kl": None,
    }
    assert agreement(record) == ("agrees", ())
    record["agreement"] |= {"edited": 4.6 / 1.11, "heldout": 4.83 / 0.89}
    assert agreement(record) == ("differs", ("edited", "heldout"))
    assert "More than 10 % from an adapter trained again on: edited rows, held-out rows." in text(
        record
    )
    assert "unlearn retrain" not in text(record)


def test_a_group_is_judged_by_its_means_and_says_so_where_a_row_falls_short():
    record = made()
    (group,) = groups(record)
    assert group.verdict == "forgotten"
    record["rows"][1]["after"] = 3.9  # below 0.9 x 4.7; the mean, 4.37, is above
    (group,) = groups(record)
    assert group.verdict == "forgotten on average"
    assert (
        text(record).count(
            "On average the 3 removed rows are now about as unfamiliar to the adapter as rows it never saw"
        )
        == 1
    )
    assert "loss 4.37 against 4.70 expected; 1 of them falls short." in text(record)
    assert "Rows: 2 forgotten, 1 partly forgotten." in text(record)
    record["rows"][1]["after"] = 0.3
    (group,) = groups(record)
    assert group.verdict == "partly forgotten"


def test_means_are_over_the_rows_where_both_numbers_are_known():
    record = made()
    record["rows"][0] |= {"target": None, "after": 0.0}
    (group,) = groups(record)
    assert group.mean("after", "goal") == pytest.approx(4.6)
    assert group.mean("after") == pytest.approx(9.2 / 3)
    assert (
        group.verdict == "forgotten on average"
    )  # which a row that cannot be judged does not make `forgotten`
    assert "Rows: 2 forgotten, 1 not judged." in text(record)
    assert "4.70 expected; 1 of them cannot be judged." in text(record)


# ---- the sentences ---------------------------------------------------------------------------------------------


def test_the_answer_comes_first():
    said = text(made())
    answer = "The 3 removed rows are now about as unfamiliar to the adapter as rows it never saw: loss 4.60 against 4.70 expected."
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
            "The 3 removed rows are partly forgotten: loss 2.00, 0.20 before, against 4.70 expected of rows",
        ),
        (
            (0.2, 0.21, 4.7),
            "The 3 removed rows are not forgotten: loss 0.21, 0.20 before, against 4.70 expected of rows",
        ),
        ((0.2, 9.0, 4.7), "a conspicuously high loss can itself give away"),
        ((4.5, 4.6, 4.7), "3 rows had such a loss before the edit already."),
        (
            (0.2, 4.6, None),
            "cannot be said: the record has no loss to expect. Loss before 0.20, now 4.60.",
        ),
        (
            (0.2, None, 4.7),
            "Whether the 3 removed rows are forgotten cannot be said: their losses were not measured row by row.",
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
        "against 4.70 expected. Of 1 of them the adapter can still be made to recite more than half."
        in text(record)
    )
    assert 'class="tile warn"' in page(record, "/e")
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
        "The new content of the 3 changed rows is taken up: loss 0.20, 4.60 before, against 0.20 that the old content"
        in said
    )
    assert (
        "Old content: loss 0.20 before, 4.00 now; the adapter now prefers the new to the old in 3 of 3."
        in said
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
        "0.012 before, 0.0031 now: norm for the retained rows, 0 only at their optimum (Guo et al. 2020)"
        in said
    )
    assert (
        "work 1,200 row gradients (forward and backward of one row); time 94.2 s; against training again 2 %."
        in said
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


NULLABLE = [
    ("created",), ("versions",), ("run",), ("run", "path"), ("run", "digest"), ("base",), ("adapter", "before"),
    ("adapter", "after"), ("data",), ("data", "before"), ("data", "rows_before"), ("tokenizer",), ("method", "name"),
    ("method", "until"), ("residual",), ("residual", "solver"), ("residual", "tolerance"), ("residual", "objective"),
    ("residual", "objective", "before"), ("stopped",), ("steps",), ("delta",), ("delta", "relative"),
    ("losses", "edited"), ("losses", "retained"), ("losses", "heldout"), ("losses", "edited", "before"),
    ("losses", "edited", "predicted"), ("losses", "retained", "after"), ("losses", "retained", "standard_error"),
    ("losses", "heldout", "rows"), ("losses", "heldout", "source"), ("comparable",), ("comparable", "source"), ("guard",),
    ("comparable", "rows"), ("guard", "max_damage"), ("guard", "damage"), ("guard", "passed"), ("guard", "forced"), ("cost",),
    ("cost", "total"), ("cost", "seconds"), ("cost", "ratio"), ("agreement",), ("files",), ("requests", 0, "content_before"),
    *(("rows", 1, key) for key in ("before", "after", "target", "base", "extraction_before", "extraction_after", "rank")),
]  # fmt: skip


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


def test_a_record_of_nulls_claims_nothing(tmp_path):
    record = made()
    for path in NULLABLE:
        if len(path) == 1:
            drop(record, *path)
    record["adapter"] = {"before": None, "after": None}
    record["losses"] = dict.fromkeys(("edited", "retained", "heldout"))
    for row in record["rows"]:
        row.update(dict.fromkeys(key for key in row if key not in ("id", "action")))
    folder = save(tmp_path / "edit", record)
    result = report(folder, tmp_path / "page.html")
    assert result.verdicts == {
        "removed": "not judged",
        "others": "not measured",
        "retraining": "not compared",
    }
    record["rows"] = []  # nothing measured at all
    assert (
        report(save(folder, record), tmp_path / "page.html", overwrite=True).verdicts
        == result.verdicts
    )


# ---- drawings --------------------------------------------------------------------------------------------------


def test_the_drawn_points_lie_at_the_recorded_losses():
    record = made([f"r{i}" for i in range(8)])
    draw = random.Random(0)
    for row in record["rows"]:
        row |= {
            "before": draw.uniform(0, 1),
            "after": draw.uniform(3, 6),
            "target": draw.uniform(3, 6),
        }
    html = page(record, "/e")
    scale = re.findall(r'<svg width="190\.?0?" height="13" aria-hidden.*?</svg>', html, re.DOTALL)[
        0
    ]
    (x0, t0), *_, (x1, t1) = [
        tuple(map(float, tick)) for tick in re.findall(r'<text x="([\d.]+)"[^>]*>([\d.]+)<', scale)
    ]
    lines = re.findall(r'<tr><td class="id"><bdi dir="auto">(\w+)</bdi>.*?</tr>', html, re.DOTALL)
    drawn = re.findall(r'aria-label="loss before.*?</svg>', html, re.DOTALL)
    assert len(lines) == len(drawn) == 8
    ratios = []
    for id, svg in zip(lines, drawn, strict=True):
        row = next(row for row in record["rows"] if row["id"] == id)
        for pattern, key in (
            ('"before" cx', "before"),
            ('"now" cx', "after"),
            ('"goal" x1', "target"),
        ):
            x = float(re.search(pattern + r'="([\d.]+)"', svg)[1])
            assert t0 + (x - x0) * (t1 - t0) / (x1 - x0) == pytest.approx(row[key], abs=0.01)
        ratios.append(row["after"] / row["target"])
    assert sorted(ratios) == ratios  # least forgotten first


def test_ten_thousand_rows_are_a_distribution_and_thirty_lines(tmp_path):
    record = made([f"row-{i:05}-" + "é" * 190 for i in range(10_000)])
    draw = random.Random(0)
    for row in record["rows"]:
        row |= {"before": abs(draw.gauss(0.2, 0.1)), "after": draw.gauss(4.8, 0.5), "target": 4.7}
    record["rows"][77] |= {"after": 0.3, "target": 4.7}
    record["rows"][78] |= {"after": 400.0}
    result = report(save(tmp_path / "edit", record), tmp_path / "page.html")
    html = result.path.read_text(encoding="utf-8")
    assert result.path.stat().st_size < 300_000
    assert html.count('<td class="id">') == 30
    said = " ".join(Page(html).text.split())
    assert "10,000 training rows removed" in said
    assert "9,970 more rows are in edit.json." in said
    assert re.search(r"row-(\d{5})", said)[1] == "00077"  # the least forgotten stands first
    assert "beyond the axis are counted in the last bar" in said
    after = sorted(row["after"] for row in record["rows"])
    values = [float(part) for part in re.search(r"\bnow ((?:[\d.]+ ){7})", said)[1].split()]
    assert values[0] == pytest.approx(after[0], abs=0.006)
    assert values[3] == pytest.approx((after[4999] + after[5000]) / 2, abs=0.006)
    assert values[6] == 400.0


def test_the_bars_hold_every_row_once():
    axis = module.Axis.over([0.0, 4.0], 560)
    values = module.np.array([0.0, 0.1, 3.9, 4.0, 9.0, *[2.0] * 5])
    bars = module._histogram(values, axis, 100)
    tallest = 5
    assert sum(round(height * tallest / 100) for _, _, height in bars) == len(values)
    assert bars[-1][0] + bars[-1][1] == pytest.approx(560 - axis.inset)


@pytest.mark.parametrize(
    "values", [[], [None], [0.0], [0.0, 0.0], [math.nan], [5e-8], [1e299], [-3.0, 2.0], [4.7, 4.7]]
)
def test_any_losses_have_an_axis(values):
    axis = module.Axis.over(values, 190)
    assert len(axis.ticks) <= 8
    for value in values:
        x = axis.x(value)
        assert x is None or axis.inset <= x <= 190 - axis.inset
    assert all(a < b for (a, _), (b, _) in zip(axis.labels, axis.labels[1:], strict=False))


# ---- hostile records -------------------------------------------------------------------------------------------

TAGS = set(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "p",
        "bdi",
        "h1",
        "h2",
        "div",
        "span",
        "b",
        "section",
        "table",
        "tr",
        "th",
        "td",
        "svg",
        "circle",
        "line",
        "rect",
        "text",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "code",
        "pre",
        "details",
        "summary",
    ]
)


@pytest.mark.parametrize("kind", ["remove", "mixed"])
def test_hostile_texts_are_text_and_nothing_else(tmp_path, kind):
    record = made(HOSTILE, kind)
    nasty = HOSTILE[2]
    record |= {
        "created": nasty,
        "stopped": nasty,
        "versions": {nasty: nasty},
        "files": {nasty: nasty},
    }
    record["method"] |= {"name": nasty, "until": nasty, nasty: [nasty], "x": {nasty: nasty}}
    for place in ("run", "base"):
        record[place] = {"path": nasty, "digest": nasty}
    record["adapter"]["before"] = {"path": nasty, "digest": nasty}
    record["losses"]["heldout"]["source"] = record["comparable"]["source"] = nasty
    record["requests"][0]["content_before"] = nasty
    record["agreement"] = {
        "adapter": nasty,
        "edited": 4.6,
        "retained": None,
        "heldout": None,
        "kl": {nasty: nasty},
    }
    html_path = report(save(tmp_path / "a<b>&'c", record), tmp_path / "page.html").path
    html = html_path.read_bytes().decode("utf-8")
    parsed = Page(html)
    assert parsed.tags <= TAGS
    names = {name for _, name, _ in parsed.attributes}
    assert not {
        name
        for name in names
        if name.startswith("on") or name in ("src", "href", "style", "srcset", "action")
    }
    assert not [
        value for _, name, value in parsed.attributes if "http" in value and name != "title"
    ]
    assert "<script" not in html.lower()
    assert "url(" not in html
    assert "@import" not in html
    for id in (
        "x" * 200,
        "<script>alert(1)</script>",
        "{{ 7 * 7 }}{% raw %}",
        "a\" onmouseover='alert(1)' b=",
        "$(rm -rf ~)`x`",
    ):
        assert id in parsed.text
    assert not set("\u202e\u2066\x1b\x00\u2028") & set(html)
    assert "(5,000 characters)" in parsed.text
    assert (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        in html
    )


def paths(value, at=()):
    """Every place in a record."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value[:1]):
            yield from paths(part, (*at, key))


def test_a_value_of_any_type_anywhere_is_shown_or_refused_and_never_crashes(tmp_path):
    for kind in ("remove", "mixed"):
        whole = made(kind=kind)
        whole["agreement"] = {
            "adapter": "/x",
            "edited": 4.6,
            "retained": 0.2,
            "heldout": 4.8,
            "kl": {"edited": 0.1},
        }
        for path in list(paths(whole))[1:]:
            for value in (
                None,
                True,
                -7,
                10**400,
                1e299,
                math.nan,
                -math.inf,
                "text",
                "",
                [],
                [1],
                {},
                {"a": [None]},
            ):
                record = copy.deepcopy(whole)
                holder = record
                for key in path[:-1]:
                    holder = holder[key]
                holder[path[-1]] = value
                save(tmp_path, record)
                with suppress(ToolkitError):
                    assert "</html>" in page(read_record(tmp_path), tmp_path)


def test_a_missing_key_is_named(tmp_path):
    whole = made()
    strict = [
        path
        for path in paths(whole)
        if path and isinstance(path[-1], str) and path[0] not in ("versions", "files")
    ]
    free = {"step", "radius", "forget", "retained", "curvature", "points", "until"}
    for path in strict:
        if path[-1] in free and path[0] in ("method", "steps"):
            continue
        record = copy.deepcopy(whole)
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        with pytest.raises(StoreError, match=re.escape(str(path[-1])) + " is missing"):
            read_record(save(tmp_path, record))


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        ("{", StoreError, "cannot be read"),
        ("[" * 100_000, StoreError, "nested too deeply"),
        ("[]", StoreError, "holds no JSON object"),
        ("\udcff", StoreError, "cannot be read"),
        ("{}", StoreError, "the key format is missing"),
        ('{"format": 2}', InputError, "has format 2; this version reads format 1"),
        ('{"format": "1"}', InputError, "has format 1; this version reads format 1"),
        ('{"format": true}', InputError, "has format True"),
        ('{"format": 1}', StoreError, "the key kind is missing"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, content, kind, sentence):
    (tmp_path / "edit.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(kind, match=re.escape(sentence)):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(requests=[], rows=[]), "requests is empty"),
        (lambda r: r.update(kind="erase"), "kind is 'erase'"),
        (lambda r: r["requests"][0].update(action="burn"), "requests[0].action is 'burn'"),
        (lambda r: r["rows"][1].update(action="burn"), "rows[1].action is 'burn'"),
        (
            lambda r: r["rows"][1].update(action="relabel"),
            "rows[1] is of the row 'b4', which requests does not name so",
        ),
        (lambda r: r["rows"][1].update(id="else"), "rows[1] is of the row 'else'"),
        (
            lambda r: r["rows"][1].update(id="a17"),
            "rows[1] is of the row 'a17', which rows named before",
        ),
        (
            lambda r: r["rows"][2].update(old_after="x"),
            "rows[2].old_after is a text; expected a number or null",
        ),
        (lambda r: r["guard"].update(passed=1), "guard.passed is a number; expected true or false"),
        (lambda r: r.update(rows={}), "rows is an object; expected a list"),
        (lambda r: r.update(losses=None), "losses is null; expected an object"),
        (lambda r: r["requests"][1].update(id=4), "requests[1].id is a number; expected a text"),
    ],
)
def test_a_record_that_contradicts_itself(tmp_path, change, sentence):
    record = made()
    change(record)
    with pytest.raises(StoreError, match=re.escape(sentence)):
        read_record(save(tmp_path, record))


# ---- the file and the command ----------------------------------------------------------------------------------


def test_the_page_is_a_function_of_the_record_and_names_its_digest(tmp_path):
    (tmp_path / "edit").mkdir()
    write_json(tmp_path / "edit" / "edit.json", made())
    one = report(tmp_path / "edit", tmp_path / "one.html").path.read_bytes()
    two = report(tmp_path / "edit", tmp_path / "deep" / "er" / "two.html").path.read_bytes()
    assert one == two
    assert (
        hashlib.sha256((tmp_path / "edit" / "edit.json").read_bytes()).hexdigest() in one.decode()
    )
    for digit in "1234567":
        assert digit * 64 in one.decode()  # in full, in the folded part
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "edit", "one.html"]


def test_the_command(tmp_path, run_main):
    folder, out = save(tmp_path / "edit", made()), tmp_path / "page.html"

    def analysis(*arguments):
        return run_main(main, "analysis", "report", *arguments)

    done = analysis("--edit", folder, "--out", out)
    assert done.status == 0
    assert done.out.startswith(
        f"{out}: 3 training rows removed\nThe 3 removed rows are now about as unfamiliar"
    )
    first = out.read_bytes()
    again = analysis("--edit", folder, "--out", out)
    assert again.status == 2
    assert "exists and would be replaced: give another --out, or --overwrite" in again.err
    assert analysis("--edit", folder, "--out", out, "--overwrite", "--json").json() == {
        "out": str(out),
        "kind": "remove",
        "rows": 3,
        "verdicts": {
            "removed": "forgotten",
            "others": "within the limit",
            "retraining": "not compared",
        },
        "headlines": [done.out.strip().split("\n")[1]],
    }
    assert out.read_bytes() == first
    for wrong in (tmp_path / "page.txt", folder / "edit.json", folder):
        refused = analysis("--edit", folder, "--out", wrong, "--overwrite")
        assert (refused.status, "expected a file name that ends in .html" in refused.err) == (
            2,
            True,
        )
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "missing", folder / "edit.json"):
        refused = analysis("--edit", nothing, "--out", tmp_path / "new.html")
        assert (refused.status, "holds no edit.json" in refused.err) == (2, True)
    (tmp_path / "file").write_text("")
    failed = analysis("--edit", folder, "--out", tmp_path / "file" / "page.html")
    assert (failed.status, "could not be written" in failed.err) == (1, True)
    (folder / "edit.json").write_text("{")
    damaged = analysis("--edit", folder, "--out", tmp_path / "new.html")
    assert (damaged.status, "edit.json cannot be read" in damaged.err) == (1, True)
    assert not (tmp_path / "new.html").exists()


def test_the_template_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["analysis"]
    templates = [
        path.relative_to(ROOT / "analysis") for path in (ROOT / "analysis" / "templates").iterdir()
    ]
    assert templates
    assert [
        path
        for path in templates
        if not any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns)
    ] == []
