"""Planted rows: new, matched in length, of their kind. Refusals. Files."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import influence
from analysis.studies.planting import KINDS, _pieces, plain_rows, plant, write_rows
from influence.errors import InputError
from tests.analysis.studies.ood_cases import HOSTILE
from tests.conftest import WORDS, build_tokenizer, examples, rows


def planted(**options):
    options = {"per_kind": 3} | options
    return plant(
        examples(8), examples(12, seed=1), examples(9, seed=2), build_tokenizer(), **options
    )


def tokens(text: str) -> list[int]:
    return build_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("seed", range(4))
def test_planted_rows_are_new_matched_and_of_their_kind(seed):
    found = planted(seed=seed)
    held, other, train = examples(12, seed=1), examples(9, seed=2), examples(8)
    assert found.rows[:8] == train
    assert found.original == train.ids
    assert Counter(found.kinds.values()) == dict.fromkeys(KINDS, 3)
    assert found.ids == [f"planted-{kind}-00{j}" for kind in KINDS for j in range(3)]
    rows_ = {id: found.rows[found.rows.index(id)] for id in found.ids}
    for id, row in rows_.items():
        count = (
            len(tokens(row.prompt + row.completion)) - len(tokens(row.prompt)) + 1
        )  # and the end
        assert found.tokens[id] == count
        partner = found.partners[id]
        assert partner == id.replace(found.kinds[id], "in")
        assert abs(count - found.tokens[partner]) <= max(1, 0.1 * found.tokens[partner])
    contents = [row.content_hash for row in rows_.values()]
    assert len(set(contents)) == 12
    assert not set(contents) & {row.content_hash for row in train}

    prompts = {row.prompt: row.completion for row in held}
    for id in found.of("in"):
        assert prompts[rows_[id].prompt].startswith(rows_[id].completion)
    for id in found.of("shuffled"):
        words = rows_[id].completion.split()
        whole = prompts[rows_[id].prompt].split()
        assert not Counter(words) - Counter(whole)
    assert any(
        rows_[id].completion.split() != prompts[rows_[id].prompt].split()
        for id in found.of("shuffled")
    )
    for id in found.of("other"):
        assert any(
            row.prompt == rows_[id].prompt and row.completion.startswith(rows_[id].completion)
            for row in other
        )
    for id in found.of("random"):
        assert set(rows_[id].completion.split()) <= set(WORDS)
        assert 2 not in tokens(rows_[id].completion), "no token is unknown"
        assert len(tokens(rows_[id].prompt)) == max(
            1, len(tokens(rows_[found.partners[id]].prompt))
        )

    used = {rows_[id].prompt for id in (*found.of("in"), *found.of("shuffled"))}
    assert len(found.holdout) == 6
    assert not used & {row.prompt for row in found.holdout} or len(set(prompts)) < 12


def test_a_seed_draws_the_same_rows_and_another_seed_others():
    assert planted(seed=1).rows.digest == planted(seed=1).rows.digest
    assert planted(seed=1).rows.digest != planted(seed=2).rows.digest


def test_repeats_are_copies_and_are_measured_once():
    found = planted(repeats=3)
    assert len(found.rows) == 8 + 36
    assert found.original == examples(8).ids
    assert len(found.ids) == 12
    copies = Counter(row.content_hash for row in found.rows[8:])
    assert set(copies.values()) == {3}
    assert found.rows.ids[8:11] == ["planted-in-000", "planted-in-000#2", "planted-in-000#3"]


def test_rows_that_need_no_cut_are_preferred():
    held = influence.examples_from_rows(
        [
            {"prompt": f"{WORDS[i]}", "completion": " a" * (9 if i % 2 else 1) + f" {WORDS[i]}"}
            for i in range(14)
        ]
    )
    other = influence.examples_from_rows(
        [{"prompt": f"old {WORDS[i]}", "completion": " the dog"} for i in range(4)]
    )
    found = plant(examples(4), held, other, build_tokenizer(), per_kind=3)
    assert {found.tokens[id] for id in found.ids} == {3}
    assert all(
        found.rows[found.rows.index(id)].completion in {row.completion for row in held}
        for id in found.of("in")
    )


def test_what_cannot_be_planted_is_refused():
    tokenizer, train, held, other = (
        build_tokenizer(),
        examples(8),
        examples(12, seed=1),
        examples(9, seed=2),
    )
    with pytest.raises(InputError, match=r"12 of 12 held-out rows .* and 13 are needed"):
        plant(train, held, other, tokenizer, per_kind=6)
    with pytest.raises(InputError, match=r"9 of 9 other rows .* and 10 are needed"):
        plant(train, examples(30, seed=1), other, tokenizer, per_kind=10)
    for files in ((train, other), (held, train)):
        with pytest.raises(InputError, match=r"8 of 8 .* have the content of training rows"):
            plant(train, *files, tokenizer, per_kind=3)
    with pytest.raises(InputError, match="per_kind 1, repeats 1"):
        plant(train, held, other, tokenizer, per_kind=1)
    texts = influence.examples_from_rows(
        [{"text": "the dog"}, {"messages": [{"role": "assistant", "content": "a"}]}]
    )
    with pytest.raises(
        InputError, match="0 of 2 other rows are different prompts with a completion"
    ):
        plant(train, held, texts, tokenizer, per_kind=3)
    short = influence.examples_from_rows([{"prompt": w, "completion": f" {w}"} for w in WORDS])
    uncut = influence.examples_from_rows(
        [{"prompt": w, "completion": f" {w}" + ",a" * 9} for w in WORDS]
    )
    with pytest.raises(
        InputError, match=r"could not be matched in length: planted-other-00\d has 20 .* partner 2"
    ):
        plant(train, short, uncut, tokenizer, per_kind=3)


def test_hostile_rows_are_planted_as_text():
    bad = [
        {"prompt": f"{HOSTILE}{i}", "completion": f" fox {HOSTILE} {'dog ' * (i % 5)}"}
        for i in range(12)
    ]
    train = influence.examples_from_rows(
        [{"id": "planted-in-000", "text": HOSTILE}, {"id": "planted--", "text": "a"}]
    )
    other = influence.examples_from_rows(
        [{"id": HOSTILE, "prompt": "", "completion": "\n\t \u2028 a dog"}, *rows(4)]
    )
    found = plant(train, influence.examples_from_rows(bad), other, build_tokenizer(), per_kind=2)
    assert len(set(found.rows.ids)) == 2 + 8
    assert not set(found.ids) & set(train.ids)
    assert all(row.completion.strip() for row in found.rows[2:])


def test_random_tokens_are_those_that_are_read_as_written():
    """A token that the tokenizer never makes of text (here it splits at the dash) is not drawn."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    known = json.loads(build_tokenizer().backend_tokenizer.to_str())
    known["model"]["vocab"] |= {"un-seen": 25, "no space": 26, "\x07": 27}
    raw = Tokenizer.from_str(json.dumps(known))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    assert {word for _, word in _pieces(tokenizer)} == set(WORDS)


def test_rows_come_back_from_their_file(tmp_path):
    given = influence.examples_from_rows(
        [
            {
                "id": HOSTILE.replace("\n", "."),
                "group": "g",
                "prompt": HOSTILE,
                "completion": " a\u2028b\x00",
            },
            {
                "messages": [
                    {"role": "user", "content": HOSTILE},
                    {"role": "assistant", "content": "b", "more": [1]},
                ]
            },
            {"text": "\ufefftext"},
        ]
    )
    write_rows(given, tmp_path / "rows.jsonl")
    assert influence.read_examples(tmp_path / "rows.jsonl").digest == given.digest


def test_plain_rows_are_different_rows():
    found = plain_rows(30)
    assert len({row.content_hash for row in found}) == 30
    assert found.digest == plain_rows(30).digest != plain_rows(30, seed=1).digest
    sums = [row for row in found if row.prompt.startswith("Compute")]
    for row in sums:
        total = sum(map(int, row.prompt.removeprefix("Compute ").rstrip(":").split(" + ")))
        assert row.completion.endswith(f"gives {total}.")
