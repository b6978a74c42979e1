"""What is refused before a training, and which rows it retains."""

from __future__ import annotations

import pytest
import torch

import influence
from influence.errors import InputError
from tests.conftest import build_tokenizer, rows
from tests.helpers import untouched
from tests.unlearn.methods.helpers import (
    FORGET,
    ROWS,
    Oracle,
    assert_same,
    close,
    everything,
    run_of,
    train,
)
from unlearn.methods.batches import TermBatches


def test_text_rows_are_trained_on_and_have_no_refusal(fitted, tmp_path):
    run = run_of(
        fitted,
        tmp_path,
        [
            {"id": f"t{i}", "text": row["prompt"] + row["completion"]}
            for i, row in enumerate(rows(6))
        ],
    )
    assert train(run, "ga-gd", ["t0", "t3"]).delta.any()
    with (
        untouched(run.directory),
        pytest.raises(
            InputError, match=r"row 't0' is one text without a prompt.*use another method"
        ),
    ):
        train(run, "idk-dpo", ["t0", "t3"])


def test_messages_get_a_refusal_in_the_assistants_place(fitted, tmp_path, monkeypatch):
    _, models = fitted
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    monkeypatch.setattr(models["float64"].tokenizer, "chat_template", template, raising=False)
    data = [
        {
            "id": f"m{i}",
            "messages": [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["completion"].strip()},
            ],
        }
        for i, row in enumerate(rows(6))
    ]
    run = run_of(fitted, tmp_path, data)
    seen = []
    each = TermBatches._part

    def part(self, rows, wanted):
        run_forward = each(self, rows, wanted)
        if self.target.other is not None:
            seen.extend(self.target.other)
        return run_forward

    monkeypatch.setattr(TermBatches, "_part", part)
    edit = train(run, "idk-dpo", ["m0", "m3"])
    assert edit.delta.any()
    vocabulary = run.model.tokenizer.get_vocab()
    for item, row in zip(seen[:2], (rows(6)[0], rows(6)[3]), strict=True):
        prompt = [vocabulary[word] for word in row["prompt"].split()]
        assert list(item.input_ids[: len(prompt)]) == prompt
        assert (
            2 in item.input_ids[len(prompt) :]
        )  # words of the refusal are unknown to this tokenizer


def test_retained_rows_of_a_file_are_those_that_are_run(run):
    given = influence.examples_from_rows(rows(3, seed=7))
    edit = train(run, "ga-gd", retain=given, lr=0.02)
    seen = edit.report["method"]["retain"]
    assert (seen["rows"], seen["digest"]) == (3, given.digest)
    assert all(entry["retain_rows"] == 3 for entry in edit.log)
    assert float((edit.delta - train(run, "ga-gd", lr=0.02).delta).norm()) > 1e-3
    oracle = Oracle(run)
    vocabulary = build_tokenizer().get_vocab()
    for row in rows(3, seed=7):
        prompt, answer = (
            [vocabulary[word] for word in row[key].split()] for key in ("prompt", "completion")
        )
        oracle.rows[row["id"]] = (torch.tensor([*prompt, *answer, 1]), len(answer) + 1)

    def direction(k, _):
        return oracle.gradient(oracle.ascent(FORGET) + oracle.descent(given.ids))

    close(edit.theta, oracle.walk(direction, 3, lr=0.02))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ids": ["r0-99"]}, "no example has the id 'r0-99'"),
        ({"ids": ["r0-1", "r0-1"]}, "given more than once: 'r0-1'"),
        ({"ids": "r0-1"}, "were given as one string; expected a list"),
        ({"ids": []}, "name at least one row"),
        ({"ids": [f"r0-{i}" for i in range(ROWS)]}, "all rows would be removed"),
        ({"method": "gaa"}, "method 'gaa' was given"),
        ({"method": "nowhere.py:mine"}, "there is no file nowhere.py"),
        ({"lr": 0}, "expected a number above 0, or auto"),
        ({"lr": "fast"}, "expected a number above 0, or auto"),
        ({"lr": float("nan")}, "expected a number above 0, or auto"),
        ({"lr": "auto"}, "lr auto reads the retained rows' loss, and method ga runs none"),
        ({"method": "ngdiff", "schedule": "linear"}, "lr auto and schedule 'linear' were given"),
        ({"stride": 0}, "stride 0 was given; expected a number above 0, as in 0.015"),
        ({"stride": float("nan")}, "stride nan was given"),
        (
            {"stride": 0.01, "lr": 0.1},
            "lr 0.1 and stride 0.01 were given, and one follows from the other: give one",
        ),
        ({"optimizer": "LBFGS"}, "optimizer 'LBFGS' was given"),
        ({"optimizer": "lr_scheduler"}, "expected a class of torch.optim"),
        ({"schedule": "steps"}, "schedule 'steps' was given"),
        ({"warmup": -1}, "warmup"),
        ({"batch_size": 0}, "batch_size 0 was given"),
        ({"save_every": 0}, "save_every 0 was given"),
        ({"seed": -1}, "seed -1 was given"),
        ({"control": 1.5}, "expected a share of the likelihood between 0 and 1"),
        ({"stop_damage": -0.1}, "stop_damage -0.1 was given"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm inf was given"),
        ({"until": "soon"}, "stopping rule 'soon' was given"),
        ({"until": "steps=2.5"}, "N whole"),
        ({"until": "loss=-1"}, "X above 0"),
        ({"until": "base=3"}, "stopping rule 'base=3' was given"),
        ({"start": "nowhere"}, "nowhere is no adapter of the run"),
    ],
)
def test_wrong_calls_are_refused(run, options, sentence):
    before = everything(run.model)
    with untouched(run.directory), pytest.raises(InputError) as error:
        train(run, **options)
    assert sentence in str(error.value)
    assert_same(before, everything(run.model))


def test_retained_rows_that_are_forget_rows_are_refused(run):
    data = [*rows(3, seed=7), rows(ROWS)[4] | {"id": "another-name"}]
    with pytest.raises(
        InputError, match=r"1 retained rows are rows to unlearn, word for word \(r0-4\)"
    ):
        train(run, "ga-gd", retain=influence.examples_from_rows(data))
    with pytest.raises(InputError, match="the file of retained rows has no rows"):
        train(run, "ga-gd", retain=influence.Examples([]))
    with pytest.raises(
        InputError, match="method ga looks at no retained rows, and some were given: leave them out"
    ):
        train(run, "ga", retain=influence.examples_from_rows(rows(3, seed=7)))


def test_held_out_rows_that_are_retained_rows_are_refused(run):
    same = influence.examples_from_rows(rows(5, seed=9))
    with pytest.raises(InputError, match="held-out"):
        train(run, "ga-gd", retain=same, holdout=same)


def test_two_numbers_of_steps_are_refused(run):
    with pytest.raises(InputError):
        train(run, "ga", until="steps=2", steps=5)


def test_copies_of_rows_to_unlearn_are_not_retained(fitted, tmp_path, capfd):
    """Of 6 rows two have the text of the first: 3 are retained, a warning names the copies.

    With nothing else left it is an error.
    """
    data = rows(6)
    copies = [{**data[0], "id": name} for name in ("copy-a", "copy-b")]
    run = run_of(fitted, tmp_path, [*data[:4], *copies])
    edit = train(run, "ga-gd", [data[0]["id"]], until="steps=1")
    assert edit.report["method"]["retain"]["rows"] == 3
    assert "stands in 2 other rows too (copy-a, copy-b)" in capfd.readouterr().err
    with pytest.raises(InputError, match="every other row is a row to unlearn word for word"):
        train(run, "ga-gd", [row["id"] for row in data[:4]], until="steps=1")
