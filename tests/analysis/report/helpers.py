"""Records as they are written, and pages as they are read."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from analysis.report.page import page
from unlearn.record.edit_record import EditRecord

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
    """A record whose rows have these losses before, after and expected.

    Of a relabelled row they are the old content's.
    """
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


def measured(name="generations", verdict="as unseen", values=(0.9, 0.3, 0.28), **changes):
    """A measurement that the edit did not aim at, under before, after and unseen models."""
    before, after, unseen = values
    entry = {"name": name, "unit": "ROUGE-L recall", "rows": 3, "heldout": None, "before": before}
    difference = None if after is None or unseen is None else after - unseen
    entry |= {"after": after, "unseen": unseen, "difference": difference}
    entry |= {"low": -0.05, "high": 0.07, "margin": 0.1, "verdict": verdict, "reason": None}
    return entry | {"by_row": []} | changes


def with_evidence(record, *measurements, models=2):
    """The record with these measurements."""
    found = {"models": models, "level": 0.9, "resamples": 2000, "seed": 0, "probes": None}
    return record | {"evidence": found | {"measurements": list(measurements)}}


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


def html(record, folder="/edits/e1") -> str:
    """The page of a record that is given as a dict."""
    return page(EditRecord.from_json(record), folder)


def text(record) -> str:
    """The visible text of its page."""
    return " ".join(Page(html(record)).text.replace("\N{NO-BREAK SPACE}", " ").split())


def drop(record, *path):
    """Set the value at a path to null."""
    for key in path[:-1]:
        record = record[key]
    record[path[-1]] = None


def paths(value, at=()):
    """Every place in a record."""
    yield at
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value[:1]):
            yield from paths(part, (*at, key))


#: Every value of a record that may be null.
NULLABLE = [
    ("created",),
    ("versions",),
    ("run",),
    ("run", "path"),
    ("run", "digest"),
    ("base",),
    ("adapter", "before"),
    ("adapter", "after"),
    ("data",),
    ("data", "before"),
    ("data", "rows_before"),
    ("tokenizer",),
    ("method", "name"),
    ("method", "until"),
    ("residual",),
    ("residual", "solver"),
    ("residual", "tolerance"),
    ("residual", "objective"),
    ("residual", "objective", "before"),
    ("stopped",),
    ("steps",),
    ("delta",),
    ("delta", "relative"),
    ("losses", "edited"),
    ("losses", "retained"),
    ("losses", "heldout"),
    ("losses", "edited", "before"),
    ("losses", "edited", "predicted"),
    ("losses", "retained", "after"),
    ("losses", "retained", "standard_error"),
    ("losses", "heldout", "rows"),
    ("losses", "heldout", "source"),
    ("comparable",),
    ("comparable", "source"),
    ("guard",),
    ("comparable", "rows"),
    ("guard", "max_damage"),
    ("guard", "damage"),
    ("guard", "passed"),
    ("guard", "forced"),
    ("cost",),
    ("cost", "total"),
    ("cost", "seconds"),
    ("cost", "ratio"),
    ("agreement",),
    ("files",),
    ("requests", 0, "content_before"),
    *(
        ("rows", 1, key)
        for key in (
            "before",
            "after",
            "target",
            "base",
            "extraction_before",
            "extraction_after",
            "rank",
        )
    ),
]
