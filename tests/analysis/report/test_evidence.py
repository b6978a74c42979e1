"""The section on what the edit did not aim at, as it is read."""

from __future__ import annotations

import math

import pytest

from analysis.report.evidence import section, signed
from analysis.report.page import report
from tests.analysis.report.helpers import (
    HOSTILE,
    Page,
    html,
    made,
    measured,
    save,
    text,
    with_evidence,
)
from unlearn.record.edit_record import EditRecord

TITLE = "Checked by what the edit did not aim at"


def shown(record):
    """The section of a record that is given as a dict."""
    return section(EditRecord.from_json(record))


def test_a_record_without_measurements_has_no_section():
    assert shown(made()) is None
    assert TITLE not in text(made())
    assert shown(with_evidence(made())) is None


def test_every_measurement_is_a_line_with_its_verdict():
    found = [
        measured(),
        measured("membership", "less than unseen", (1.0, 0.043, 0.55), unit="AUC of Min-K%"),
        measured("probe-losses", "more than unseen", (2.9, 3.1, 5.2), unit="nats per token"),
    ]
    page = text(with_evidence(made(), *found))
    assert TITLE in page
    for line in (
        "repeated when prompted ROUGE-L recall 00.51 3 0.90 0.30 0.28 +0.02 [-0.05, +0.07] as unseen",
        "told from held-out rows AUC of Min-K% 00.51 3 1.00 0.04 0.55 -0.51 [-0.05, +0.07] less than unseen",
        "loss of probe rows nats per token 0246 3 2.90 3.10 5.20 -2.10 [-0.05, +0.07] more than unseen",
    ):
        assert line in page
    assert "Unseen: the mean of 2 small models trained without the rows" in page
    assert "90 % of a bootstrap over rows and models" in page
    result = shown(with_evidence(made(), *found))
    assert [line[-1] for line in result["lines"]] == ["good", "warn", "bad"]
    marks = result["lines"][0][3]
    assert marks["goal"] < marks["after"] < marks["before"]
    assert marks["before"] == pytest.approx(6 + 0.9 * 138)


def test_without_unseen_models_it_is_said_and_nothing_is_compared():
    alone = {"unseen": None, "difference": None, "low": None, "high": None, "margin": None}
    found = measured(verdict="not compared", reason="none were trained") | alone
    page = text(with_evidence(made(), found, models=0))
    assert "Not compared: no models that never saw the rows were trained for this edit" in page
    assert "3 0.90 0.30 not compared" in page
    assert "now − unseen" not in page


def test_what_was_not_measured_has_a_reason():
    found = measured(verdict="not measured", values=(None, 0.0, None), reason="(generate 0)")
    page = text(with_evidence(made(), found | {"after": None}))
    assert "Not measured: repeated when prompted ((generate 0))." in page


def test_the_rows_of_which_most_is_left_are_named():
    def row(id, after, unseen):
        return {"id": id, "before": 1.0, "after": after, "unseen": unseen}

    rows = [row("a", 0.5, 0.4), row("b", 0.9, 0.1), row("c", 0.2, 0.4), row("d", 0.7, 0.1)]
    found = measured(verdict="more than unseen", by_row=[*rows, row("e", 0.8, 0.5)])
    page = text(with_evidence(made(), found))
    assert "b (0.90 for 0.10), d (0.70 for 0.10), e (0.80 for 0.50)." in page
    losses = measured("probe-losses", "more than unseen", unit="nats per token", by_row=rows)
    assert "loss of probe rows: c (0.20 for 0.40)." in text(with_evidence(made(), losses))
    assert "Most above" not in text(with_evidence(made(), measured(by_row=rows)))


def test_a_comparison_of_little_worth_is_called_so():
    record = with_evidence(made(), measured())
    record["expected"] = {"faithfulness": 0.6}
    assert "the comparison is of little worth" not in text(record)  # not all of it could be read
    whole = {"loss": 4.0, "low": 3.0, "high": 5.0, "trainings": 3, "near": 16, "others": 20}
    record["expected"] = whole | {"faithfulness": 0.6, "recipe": {}, "row_gradients": 9}
    assert "learnt only 60 % of what the adapter knew" in text(record)
    record["expected"]["faithfulness"] = 0.8
    assert "little worth" not in text(record)


def test_hostile_names_and_values_are_shown_harmless():
    rows = [{"id": id, "before": 0.9, "after": 0.9, "unseen": 0.1} for id in HOSTILE]
    for id in HOSTILE:
        found = measured(id, "more than unseen", reason=id, unit=id, by_row=rows)
        page = html(with_evidence(made(), found, measured(id, id, after=None, reason=id)))
        parsed = Page(page)
        assert "<script>alert" not in page
        assert not {name for _, name, _ in parsed.attributes if name.startswith("on")}
    for value in (math.nan, math.inf, -1e299, None):
        assert TITLE in text(with_evidence(made(), measured(values=(value, value, value))))


def test_signs():
    assert [signed(v) for v in (0.1, -0.1, 0.0, None, math.nan)] == [
        "+0.10",
        "-0.10",
        "+0.00",
        "?",
        "?",
    ]


@pytest.mark.parametrize(
    ("found", "verdict", "headline"),
    [
        ([measured()], "forgotten", ""),
        (
            [measured(verdict="more than unseen")],
            "forgotten by loss, still repeated",
            "Yet more of the old text is left than in models that never saw it: repeated when "
            "prompted 0.30 against 0.28.",
        ),
        (
            [measured("membership", "less than unseen")],
            "forgotten",
            "which is conspicuous: told from held-out rows 0.30 against 0.28.",
        ),
        (
            [measured(verdict="not settled"), measured("membership", "not compared")],
            "forgotten",
            "",
        ),
    ],
)
def test_the_answer_follows_the_loss_and_the_evidence(tmp_path, found, verdict, headline):
    folder = save(tmp_path / "edit", with_evidence(made(), *found))
    result = report(folder, tmp_path / "page.html")
    assert result.verdicts["removed"] == verdict
    assert result.headlines[0].endswith(headline)
    assert ("old text" in result.headlines[0]) is bool(headline)
    assert {each["name"]: result.verdicts[each["name"]] for each in found} == {
        each["name"]: each["verdict"] for each in found
    }
    colour = "good" if not headline else "warn"
    assert (
        f'<div class="tile {colour}"><span class="muted">Removed rows</span><b>{verdict}</b>'
        in (tmp_path / "page.html").read_text(encoding="utf-8")
    )
