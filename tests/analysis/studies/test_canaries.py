"""Canaries: exposure by ranks of summed losses, refusals, files."""

from __future__ import annotations

import math
from statistics import mean

import pytest

import influence
from analysis.studies.canaries import read_canaries
from analysis.studies.memorization import memorization
from influence.errors import DataError, InputError
from tests.analysis.studies.helpers import plain
from tests.conftest import build_model


def test_exposure_ranks_summed_losses_and_ties_share_their_rank(run):
    """Words unknown to the tokenizer are one token: what differs in them only ties with the
    secret.
    """
    canaries = {
        "r0-0": [
            " the",
            " the red fox runs over a lazy dog",
            " birds sing loud songs at dawn",
            " old cats",
            " sun",
        ],
        "r0-1": [
            " the",
            " the red fox runs over a lazy dog",
            " birds sing loud songs at dawn",
            " old cats",
            " sun",
        ],
        "secret-1": [" qq runs", " kk runs", " sun"],
        "secret-2": [" qq runs"],
    }
    found = memorization(run, canaries=canaries, dampings=[]).table["exposure"]
    by_mean = []
    for i, example in enumerate(run.train):
        if example.id not in canaries:
            assert math.isnan(found[i])
            continue
        others = [
            influence.Example("x", prompt=example.prompt, completion=text)
            for text in canaries[example.id]
        ]
        losses = [plain(run.model.model, one, run.model.tokenizer)[0] for one in (example, *others)]
        own, *sums = map(sum, losses)
        rank = 1 + sum(s < own - 1e-6 for s in sums) + sum(abs(s - own) < 1e-6 for s in sums) / 2
        assert found[i] == pytest.approx(math.log2((len(sums) + 1) / rank), rel=1e-12)
        by_mean.append(rank != 1 + sum(mean(one) < mean(losses[0]) for one in losses[1:]))
    assert any(by_mean[:2])  # sums and means disagree, so that it matters which of them ranks
    assert found[6] == pytest.approx(math.log2(2 / 1.5))


def test_canaries_that_cannot_be_ranked_are_listed(run):
    own = run.train[0].completion
    with pytest.raises(DataError) as error:
        memorization(
            run,
            canaries={
                "nobody": [" a"],
                "r0-0": [" a", own],
                "r0-1": [],
                "r0-2": [" a", ""],
                "r0-3": [" a", " a"],
                "r0-4": ["\ud800"],
            },
        )
    text = str(error.value)
    for part in (
        "6 of 6",
        "no training row has this id",
        "own completion",
        "no candidates",
        "non-empty",
        "twice",
        "surrogate",
    ):
        assert part in text
    with pytest.raises(InputError, match="no canaries were given"):
        memorization(run, canaries={})
    with pytest.raises(DataError, match="not a list of non-empty strings"):
        memorization(run, canaries={"r0-0": " word"})


def test_texts_and_cut_rows_are_no_canaries(tmp_path):
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    train = influence.examples_from_rows(
        [{"id": "t", "text": "the red fox"}, {"id": "p", "prompt": "the", "completion": " fox"}]
    )
    cut = influence.fit(
        model,
        train,
        path=(1.0,),
        curvature=influence.Identity(),
        directory=tmp_path / "run",
        max_length=5,
    )
    with pytest.raises(DataError, match="it is a text"):
        memorization(cut, canaries={"t": [" dog"]})
    with (
        pytest.warns(UserWarning, match="longer than"),
        pytest.raises(InputError, match=r"max_length \(5\)"),
    ):
        memorization(cut, canaries={"p": [" the red fox runs over a dog"]})


def test_reading_canaries(tmp_path):
    path = tmp_path / "canaries.jsonl"
    path.write_text(
        '{"id": "a", "candidates": [" x"], "note": 1}\n\n{"id": 7, "candidates": [" y", " z"]}\n'
    )
    assert read_canaries(path) == {"a": [" x"], "7": [" y", " z"]}
    path.write_text(
        '{"id": "a"}\n{"id": "a", "candidates": []}\n{"id": "a", "candidates": []}\n[1]\n{"id": '
        'true, "candidates": []}\nno\n'
    )
    with pytest.raises(DataError) as error:
        read_canaries(path)
    assert [row.number for row in error.value.rows] == [1, 3, 4, 5, 6]
    path.write_text("\n")
    with pytest.raises(DataError, match="has no canaries"):
        read_canaries(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_canaries(tmp_path / "missing.jsonl")
