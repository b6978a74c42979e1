"""A metric is one function of arrays: one defined here goes through the seam of those handed on."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from analysis.evaluation.evaluation import evaluate
from analysis.evaluation.options import Options
from analysis.metrics import PerRow, accuracy
from analysis.metrics.likelihood import checked_tokens
from analysis.metrics.outputs import Outputs
from influence.errors import InputError
from tests.conftest import examples, rows


def surprise(log_probs) -> PerRow:
    """The least likely token of each row, nats, and the mean over rows."""
    values = np.array([-row.min() for row in checked_tokens(log_probs, "log_probs", float)])
    return PerRow(values, float(values.mean()))


def test_a_new_metric_takes_plain_arrays_as_the_others_do():
    result = surprise([[-0.5, -2.0], [-1.0]])
    np.testing.assert_array_equal(result.values, [2, 1])
    assert result.value == 1.5
    assert type(result) is type(accuracy([np.array([True])]))
    with pytest.raises(InputError, match=r"log_probs has no rows; expected one array of tokens"):
        surprise([])


def test_evaluate_takes_further_metrics(tiny):
    seen: list[Outputs] = []

    def hits(out: Outputs) -> PerRow:
        return accuracy(out.right)

    def remembered(out: Outputs) -> PerRow:
        seen.append(out)
        return surprise(out.log_probs)

    holdout = influence.examples_from_rows(rows(3, seed=5))
    options = Options(generate=0)
    metrics = {"surprise": remembered, "hits": hits}
    plain = evaluate(tiny, examples(4), holdout=holdout, options=options)
    record = evaluate(tiny, examples(4), holdout=holdout, options=options, metrics=metrics)
    assert [len(out.ids) for out in seen] == [4, 3]
    for name, out in zip(("forget", "holdout"), seen, strict=True):
        entries = [row["adapter"] for row in record["rows"] if row["set"] == name]
        lowest = [-values.min() for values in out.log_probs]
        assert [entry["metrics"]["surprise"] for entry in entries] == lowest
        of_set = record["sets"][name]["adapter"]
        assert of_set["metrics"]["surprise"] == pytest.approx(np.mean(lowest))
        assert of_set["metrics"]["hits"] == of_set["accuracy"]
    for entry in (*record["rows"], *filter(None, record["sets"].values())):
        entry["adapter"].pop("metrics")
    assert record == plain, "what was measured before stays as it was"


def test_a_metric_without_a_value_for_each_row_is_refused(tiny):
    with pytest.raises(InputError, match=r"metric 'mean' returned values of shape \(1,\) for 4"):
        evaluate(
            tiny,
            examples(4),
            options=Options(generate=0),
            metrics={"mean": lambda out: PerRow(np.array([out.loss.mean()]), 0.0)},
        )
