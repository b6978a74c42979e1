"""Results as a line and as a card: short, and hostile text in them is inert."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import influence
from influence import Run, Scores
from influence.cards import card, line, number

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u202e\x1b[2J\n" + "y" * 500


class Tags(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def inert(page: str) -> Tags:
    found = Tags(page)
    assert found.tags <= {"div", "table", "tr", "td", "bdi"}
    assert found.attributes <= {"style"}
    assert "\u202e" not in page
    assert "\x1b" not in page
    return found


def test_everything_in_a_card_is_escaped():
    page = card(HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE], [[HOSTILE]], HOSTILE)
    found = inert(page)
    assert found.text.count("<script>alert(1)</script>") == 6
    assert "y" * 200 not in page
    assert len(page) < 5000


def test_a_line_is_one_line_without_controls():
    found = line("Run", HOSTILE, "", "b")
    assert found.startswith("Run(<script>")
    assert found.endswith(", b)")
    assert found.isprintable()


def test_numbers_that_are_not_known_are_a_dash():
    assert [number(value) for value in (None, float("nan"), 0.0, 1234.5)] == [
        "–",
        "–",
        "0",
        "1.23e+03",
    ]


@pytest.fixture(scope="module")
def run(made):
    return Run.open(made / "run", device="cpu")


def test_a_run_says_what_it_is(run, made):
    assert repr(run) == (
        f"Run({str(made / 'run')!r}, 20 training rows, ekfac, damping {run.manifest.damping}, points "
        f"{', '.join(point.label for point in run.manifest.points)})"
    )
    text = inert(run._repr_html_()).text
    assert f"({run.model.space.size:,} parameters)" in text
    assert "whole gradients" in text
    hostile = replace(run.manifest, adapter=replace(run.manifest.adapter, path=HOSTILE))
    inert(replace(run, manifest=hostile)._repr_html_())


def test_scores_show_their_strongest_rows(run):
    queries = influence.examples_from_rows(
        [
            {"id": HOSTILE if k == 0 else f"q{k}", "prompt": "the", "completion": " red"}
            for k in range(5)
        ]
    )
    scores = run.score(queries, per_module=True)
    assert repr(scores) == (
        "Scores(5 queries x 20 training rows, loss in nats per token, credit "
        f"{scores.attributes['credit']}, by module)"
    )
    text = inert(scores._repr_html_()).text
    for query in range(3):
        for entries in scores.top(query, 1):
            assert f"{entries[0].score:+.2e}" in text
            assert entries[0].id in text
            assert run.train[entries[0].index].preview(60) in text
    assert "and 2 more queries" in text
    assert "q3" not in text
    failed = replace(scores, converged=np.array([True, False, False, True, True]))
    assert "2 queries not converged" in repr(failed)
    assert "2 queries" in inert(failed._repr_html_()).text


def test_scores_of_others_have_a_card_too():
    bare = Scores(np.array([[1.0]]), ["q"], ["a"], np.array([]), np.array([]))
    assert repr(bare) == "Scores(1 queries x 1 training rows, loss in ?, credit additive)"
    assert "+1.00e+00" in inert(bare._repr_html_()).text
