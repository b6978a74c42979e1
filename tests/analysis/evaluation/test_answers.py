"""Rows with other answers to their prompts: read, and refused with a list."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset

import influence
from analysis.evaluation.answers import read_rows, rows
from influence.errors import DataError
from tests.helpers import write_rows

ROW = {"id": "a", "prompt": "the fox", "completion": " runs over"}


def test_other_answers_are_read(tmp_path):
    """Ours stand as they are.

    TOFU's get the completion's white space. Rows without any are rows all the same.
    """
    data = [
        ROW | {"paraphrased_completion": "sleep", "perturbed_completions": [" sing", "at dawn"]},
        ROW
        | {
            "id": "b",
            "paraphrased_answer": "sleep",
            "perturbed_answer": ["sing", "at dawn"],
            "question": "fox?",
        },
        ROW
        | {
            "id": "c",
            "perturbed_answer": "sing",
            "paraphrased_answer": "sleep",
            "paraphrased_completion": None,
        },
        ROW | {"id": "d"},
    ]
    write_rows(tmp_path / "rows.jsonl", data)
    (tmp_path / "rows.jsonl").write_text(
        "\ufeff\n" + (tmp_path / "rows.jsonl").read_text() + "\n  \n", encoding="utf-8"
    )
    found = read_rows(tmp_path / "rows.jsonl")
    assert found.examples.ids == ["a", "b", "c", "d"]
    assert found.paraphrased == ("sleep", " sleep", " sleep", None)
    assert found.perturbed == ((" sing", "at dawn"), (" sing", " at dawn"), (" sing",), ())
    assert found.examples == influence.read_examples(tmp_path / "rows.jsonl")
    assert rows(data).perturbed == found.perturbed


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_other_answers_are_read_from_files_of_every_kind(tmp_path, name):
    tofu = {"paraphrased_answer": "sleep", "perturbed_answer": ["sing", "at dawn"]}
    data = [{"question": "fox?", "answer": "naps", "id": "a", **tofu}]
    path = tmp_path / name
    if name == "rows.parquet":
        Dataset.from_list(data).to_parquet(path)
    elif name == "rows.json":
        path.write_text(json.dumps(data, indent=1))
    else:
        path.write_bytes(gzip.compress(json.dumps(data[0]).encode()))
    found = read_rows(path)
    assert (found.paraphrased, found.perturbed) == (("sleep",), (("sing", "at dawn"),))
    assert found.examples[0].messages is not None
    named = read_rows(path, {"prompt": "question", "completion": "answer"})
    assert named.examples[0].completion == "naps"
    assert named.perturbed == found.perturbed


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"paraphrased_completion": "sleep"}, "a list of strings 'perturbed_completions'"),
        ({"perturbed_completions": ["sleep"]}, "a string 'paraphrased_completion'"),
        ({"paraphrased_completion": "sleep", "perturbed_completions": []}, "all non-empty"),
        ({"paraphrased_completion": "sleep", "perturbed_completions": ["a", 3]}, "list of strings"),
        ({"paraphrased_completion": "", "perturbed_completions": ["a"]}, "all non-empty"),
        ({"paraphrased_completion": 3, "perturbed_completions": ["a"]}, "row 2 \\(id 'a'\\)"),
    ],
)
def test_unusable_other_answers_are_named(extra, words):
    with pytest.raises(DataError, match=words):
        rows([ROW | {"id": "first"}, ROW | extra])


def test_a_text_has_no_other_answers():
    with pytest.raises(DataError, match="a text has no completion"):
        rows(
            [
                {
                    "id": "t",
                    "text": "the fox",
                    "paraphrased_completion": "a",
                    "perturbed_completions": ["b"],
                }
            ]
        )
