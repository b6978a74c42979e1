"""What forget rows are trained towards: labels, refusals, predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import influence
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.errors import InputError
from influence.rows import Examples
from influence.tokens import Rendering, TokenizedExamples, Tokens, tokenize
from tests.conftest import (
    WORDS,
    add_lora,
    build_base,
    build_model,
    build_tokenizer,
    examples,
    tokens_of,
)
from tests.unlearn.methods.helpers import numbered, odd_rows, setup_of
from unlearn.methods import targets
from unlearn.methods.targets import REFUSALS, Setup

KINDS = ["llama", "gpt2", "phi", "gemma", "qwen2", "mistral"]


EOS = 1


CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def labels_of(make: Any, model: AdaptedModel, rows: Examples, **options: Any) -> list[list[int]]:
    with setup_of(model, rows, **options) as setup:
        made = make(setup)
    assert made.other is None
    assert made.wanted is None
    return [row_labels.tolist() for row_labels in made.labels]


# ---- random labels -------------------------------------------------------------------------------


def test_own_labels_change_nothing(small):
    with setup_of(small, odd_rows()) as setup:
        made = targets.own(setup)
    assert (made.labels, made.other, made.wanted) == (None, None, None)


def test_random_labels_are_there_for_supervised_tokens_only_and_special_ones_stay(small):
    rows = odd_rows()
    tokens = tokens_of(small, rows)
    labels = labels_of(targets.random, small, rows)
    assert [len(row_labels) for row_labels in labels] == tokens.counts.tolist()
    kept = 0
    for item, row_labels in zip(tokens, labels, strict=True):
        true = item.input_ids[item.supervised].tolist()
        for token, label in zip(true, row_labels, strict=True):
            assert (label == token) if token in (0, 1, 2) else (3 <= label < 3 + len(WORDS))
            kept += token in (0, 1, 2)
        assert row_labels[-1] == EOS
    assert kept == 6 + 2  # every row's end, and the two inside one completion


def test_random_labels_of_a_row_depend_on_the_seed_and_not_on_batches(small):
    rows = odd_rows()
    labels = labels_of(targets.random, small, rows)
    assert labels_of(targets.random, small, rows, token_budget=1) == labels
    assert (
        labels_of(targets.random, small, rows) == labels
    )  # drawn once, whatever was drawn elsewhere
    assert labels_of(targets.random, small, rows, seed=1) != labels
    drawn = labels_of(targets.random, small, numbered(8, " the" * 6))
    assert len({tuple(row_labels) for row_labels in drawn}) == 8  # rows have draws of their own
    assert all(len(set(row_labels[:-1])) > 1 for row_labels in drawn)  # and so have tokens


def test_what_a_row_is_trained_towards_does_not_depend_on_the_other_rows(small):
    """One label, or one refusal, is asked for in two unlearnings, alone and among others: "the seed
    and the row alone".
    """
    rows = odd_rows()[:5]
    assert labels_of(targets.random, small, rows.select([3])) == [
        labels_of(targets.random, small, rows)[3]
    ]
    model = words()
    for at in range(5):
        assert np.array_equal(
            refused(model, rows.select([at]))[0].input_ids, refused(model, rows)[at].input_ids
        )


def test_random_labels_are_uniform_over_the_words(small):
    """A chi-square test over 22 words and 4,400 draws, and no memory from token to token."""
    rows = numbered(20, " the" * 220)
    drawn = np.array(
        [row_labels[:-1] for row_labels in labels_of(targets.random, small, rows, seed=3)]
    )
    assert drawn.shape == (20, 220)
    seen = np.bincount(drawn.ravel() - 3, minlength=len(WORDS))
    assert len(seen) == len(WORDS)
    assert 0.01 < chisquare(seen).pvalue < 0.999
    repeats = (drawn[:, 1:] == drawn[:, :-1]).mean()
    assert repeats == pytest.approx(1 / len(WORDS), abs=4 * (1 / len(WORDS) / 4380) ** 0.5)


def wider(more: int) -> AdaptedModel:
    """A base whose vocabulary is padded by `more` words that the tokenizer does not know."""
    base = build_base("gpt2", layers=1)
    torch.manual_seed(0)
    base.resize_token_embeddings(25 + more, mean_resizing=False)
    return influence.from_peft(
        add_lora(base.double(), target_modules=["c_attn"]).double(), build_tokenizer()
    )


def test_random_labels_are_words_that_tokenizer_and_model_both_know(small):
    row = {"id": "a", "prompt": "the", "completion": " the" * 2000}
    rows = influence.examples_from_rows([row])
    assert set(labels_of(targets.random, wider(7), rows)[0]) == {EOS, *range(3, 25)}
    model = build_model("gpt2", layers=1)  # and a tokenizer with more words than the model embeds
    model.tokenizer.add_tokens(["moon", "stars"])
    assert set(labels_of(targets.random, model, rows)[0]) == {EOS, *range(3, 25)}


def test_a_tokenizer_that_pads_with_its_end_token_is_no_special_case():
    model = build_model("gpt2", layers=1)
    model.tokenizer.pad_token = "<eos>"
    rows = odd_rows()
    assert model.pad_id == EOS
    plain = build_model("gpt2", layers=1)
    ours, theirs = (
        labels_of(targets.adversarial, each, rows, token_budget=4096) for each in (model, plain)
    )
    assert ours == theirs
    drawn = labels_of(targets.random, model, rows)
    true = [item.input_ids[item.supervised] for item in tokens_of(model, rows)]
    assert all(
        (np.array(row_labels)[ids == EOS] == EOS).all()
        for row_labels, ids in zip(drawn, true, strict=True)
    )


def test_special_tokens_of_a_chat_format_are_special():
    """Turn markers are often special words that are no bos, eos, pad or unk: `all_special_ids` does
    not list them.
    """
    from tokenizers import AddedToken

    base = build_base("gpt2", layers=1)
    base.resize_token_embeddings(28, mean_resizing=False)
    tokenizer = build_tokenizer()
    markers: Any = [AddedToken("<|eot|>", special=True), AddedToken("<|start|>", special=True)]
    tokenizer.add_tokens(markers, special_tokens=True)
    model = influence.from_peft(
        add_lora(base.double(), target_modules=["c_attn"]).double(), tokenizer
    )
    rows = influence.examples_from_rows(
        [{"id": "a", "prompt": "the", "completion": " red <|eot|> fox" + " fox" * 500}]
    )
    true = tokens_of(model, rows)[0].input_ids[-504:].tolist()
    assert true[1] == 25
    labels = labels_of(targets.random, model, rows)[0]
    assert labels[1] == 25  # it stays
    assert labels.count(25) == 1  # and is not drawn elsewhere
    assert 26 not in labels


# ---- adversarial labels --------------------------------------------------------------------------


def alone(model: AdaptedModel, ids: np.ndarray) -> np.ndarray:
    """Plain transformers: all logits `[T, V]` of one row, float64."""
    base = model.model.get_base_model()
    with torch.no_grad():
        return (
            base(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double().numpy()
        )


def best_wrong(logits: np.ndarray, item: Any) -> list[int]:
    """At each position the likeliest word but the true one, read where that word is predicted."""
    out = []
    for t in range(1, len(item.input_ids)):
        if item.supervised[t]:
            order = np.argsort(-logits[t - 1], kind="stable").tolist()
            order.remove(int(item.input_ids[t]))
            out.append(order[0])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_budget", [1, 30, 4096])
def test_adversarial_labels_are_the_references_best_alternatives_at_their_own_positions(
    kind, token_budget
):
    model = build_model(kind, layers=1)
    rows = odd_rows()
    tokens = tokens_of(model, rows)
    with model.evaluating():
        wanted = [best_wrong(alone(model, item.input_ids), item) for item in tokens]
    labels = labels_of(targets.adversarial, model, rows, token_budget=token_budget)
    assert labels == wanted
    true = [item.input_ids[item.supervised].tolist() for item in tokens]
    assert all(
        a != b
        for row_labels, ids in zip(labels, true, strict=True)
        for a, b in zip(row_labels, ids, strict=True)
    )
    with model.evaluating():  # one position off would be something else
        shifted = [
            alone(model, item.input_ids)[item.supervised].argmax(-1).tolist() for item in tokens
        ]
    assert labels != shifted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adversarial_labels_are_those_of_a_left_padded_batch(kind):
    model = build_model(kind, layers=1)
    rows = odd_rows()
    tokens = tokens_of(model, rows)
    batch = collate(tokens, np.arange(len(tokens)), pad_id=7, padding="left")
    with model.evaluating(), torch.no_grad():
        logits = model.model.get_base_model()(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits.numpy()
    wanted = [best_wrong(logits[i, -len(item) :], item) for i, item in enumerate(tokens)]
    assert labels_of(targets.adversarial, model, rows) == wanted


def test_adversarial_labels_are_the_references_wherever_the_model_is():
    """The adapter that moves is not asked."""
    model = build_model("gpt2", layers=1)
    rows = odd_rows()
    tokens = tokens_of(model, rows)
    with setup_of(model, rows, tokens=tokens) as setup:
        wanted = [row_labels.tolist() for row_labels in targets.adversarial(setup).labels or []]
        with model.at(model.snapshot() * -3):
            moved = [best_wrong(alone(model, item.input_ids), item) for item in tokens]
            labels = [row_labels.tolist() for row_labels in targets.adversarial(setup).labels or []]
    assert labels == wanted != moved


def test_adversarial_labels_of_rows_known_by_heart_are_the_second_words():
    """Rows of which every word is what the model says anyway: the truth is the likeliest word
    throughout.
    """
    model = build_model("gpt2", layers=1)
    by_heart = []
    for start in ([3, 4, 5], [20], [9, 1]):
        ids = list(start)
        for _ in range(6):
            ids.append(int(alone(model, np.array(ids))[-1].argmax()))
        by_heart.append(Tokens(np.array(ids), np.arange(len(ids)) >= len(start)))
    tokens = TokenizedExamples(by_heart, ["a", "b", "c"], [False] * 3)
    labels = labels_of(targets.adversarial, model, examples(3), tokens=tokens)
    for item, row_labels in zip(by_heart, labels, strict=True):
        logits = alone(model, item.input_ids)[:-1][item.supervised[1:]]
        assert row_labels == np.argsort(-logits, axis=-1)[:, 1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adversarial_labels_in_half_precision_are_never_the_truth(dtype):
    """Half precision makes ties. A tie with the truth must not give the truth."""
    model = build_model("llama", layers=1, dtype=dtype)
    rows = odd_rows()
    labels = labels_of(targets.adversarial, model, rows)
    for row_labels, item in zip(labels, tokens_of(model, rows), strict=True):
        assert len(row_labels) == int(item.supervised.sum())
        assert all(
            a != b
            for a, b in zip(row_labels, item.input_ids[item.supervised].tolist(), strict=True)
        )


def test_labels_of_conversations_are_those_of_the_last_answer():
    """Earlier turns, the assistant's own too, are prompt.

    The end of the answer is a special token and supervised.
    """
    model = words()
    turns = [
        ("user", "the red fox"),
        ("assistant", "runs"),
        ("user", "over a dog"),
        ("assistant", "and old cats sleep"),
    ]
    rows = influence.examples_from_rows(
        [
            {
                "id": "chat",
                "messages": [{"role": role, "content": content} for role, content in turns],
            }
        ]
    )
    (item,) = tokens_of(model, rows)
    assert item.input_ids[item.supervised].tolist() == [
        *model.tokenizer("and old cats sleep")["input_ids"],
        EOS,
    ]
    (drawn,) = labels_of(targets.random, model, rows)
    assert len(drawn) == 5
    assert drawn[-1] == EOS
    (best,) = labels_of(targets.adversarial, model, rows)
    with model.evaluating():
        assert best == best_wrong(alone(model, item.input_ids), item)


# ---- refusals ------------------------------------------------------------------------------------


def refused(model: AdaptedModel, rows: Examples, *, seed: int = 0) -> TokenizedExamples:
    with setup_of(model, rows, seed=seed) as setup:
        made = targets.refusals(setup)
    assert made.labels is None
    assert made.other is not None
    return made.other


def words() -> AdaptedModel:
    """A model whose tokenizer can spell every refusal."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spoken = sorted(
        {word.strip(".") for text in REFUSALS for word in text.split()}
        | {"user", "assistant", ":", "."}
    )
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {
        word: i + 3 for i, word in enumerate([*WORDS, *spoken])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    base = build_base("gpt2", layers=1)
    base.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    return influence.from_peft(
        add_lora(base.double(), target_modules=["c_attn"]).double(), tokenizer
    )


def test_refusals_keep_the_prompt_and_answer_with_a_refusal():
    model = words()
    rows = odd_rows()[:5]
    tokens, other = tokens_of(model, rows), refused(model, rows)
    assert other.ids == tokens.ids
    for row, item, new in zip(rows, tokens, other, strict=True):
        prompt = model.tokenizer(row.prompt)["input_ids"]
        assert item.input_ids[: len(prompt)].tolist() == prompt
        assert new.input_ids[: len(prompt)].tolist() == prompt
        assert np.array_equal(new.supervised, np.arange(len(new)) >= max(len(prompt), 1))
        answer = new.input_ids[len(prompt) :].tolist()
        assert answer[-1] == EOS
        said = (
            model.tokenizer.decode(answer[:-1], clean_up_tokenization_spaces=False)
            .replace(" .", ".")
            .strip()
        )
        assert said in REFUSALS


def test_refusals_of_conversations_keep_every_earlier_turn():
    model = words()
    turns = [
        ("user", "the red fox"),
        ("assistant", "runs"),
        ("user", "over a dog"),
        ("assistant", "and old cats sleep"),
    ]
    rows = influence.examples_from_rows(
        [
            {
                "id": "chat",
                "messages": [{"role": role, "content": content} for role, content in turns],
            }
        ]
    )
    (item,), (new,) = tokens_of(model, rows), refused(model, rows)
    assert new.input_ids[~new.supervised].tolist() == item.input_ids[~item.supervised].tolist()
    said = (
        model.tokenizer.decode(new.input_ids[new.supervised])
        .replace(" .", ".")
        .replace("<eos>", "")
        .strip()
    )
    assert said in REFUSALS
    assert rows[0].messages is not None
    assert rows[0].messages[-1]["content"] == "and old cats sleep"  # the row itself is as it was


def test_a_text_has_no_prompt_to_refuse(small):
    with (
        setup_of(small, odd_rows()) as setup,
        pytest.raises(InputError, match="row 'text' is one text without a prompt"),
    ):
        targets.refusals(setup)


def refused_rows(
    model: AdaptedModel, rows: Examples, monkeypatch: pytest.MonkeyPatch, seed: int = 0
) -> Examples:
    """The refusals as rows, before they become tokens."""
    seen: list[Examples] = []
    own = Rendering.tokenize
    monkeypatch.setattr(
        Rendering, "tokenize", lambda rule, rows, by: (seen.append(rows), own(rule, rows, by))[1]
    )
    refused(model, rows, seed=seed)
    monkeypatch.undo()
    return seen[0]


def test_token_ids_have_no_prompt_to_refuse(small):
    rows = influence.examples_from_rows([{"id": "ids", "input_ids": [4, 5, 6]}])
    with (
        setup_of(small, rows) as setup,
        pytest.raises(InputError, match="row 'ids' is token ids without a prompt"),
    ):
        targets.refusals(setup)


def test_labels_are_drawn_for_the_supervised_tokens_wherever_they_are(small):
    """Random labels keep special tokens, which here stand between and after the targets."""
    ids, labels = [4, 5, EOS, 7, 8, EOS], [-100, 5, EOS, -100, 8, -100]
    rows = influence.examples_from_rows([{"id": "ids", "input_ids": ids, "labels": labels}])
    with setup_of(small, rows) as setup:
        drawn = targets.random(setup).labels
    assert drawn is not None
    assert drawn[0][1] == EOS
    assert len(drawn[0]) == 3


def test_refusals_are_the_last_answer_whatever_the_training_supervised():
    model = words()
    turns = ["the red fox", "runs", "over a dog", "and old cats sleep"]
    talk = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * 2, turns, strict=True)
    ]
    rows = influence.examples_from_rows([{"id": "chat", "messages": talk}])
    with setup_of(model, rows) as setup:
        expected = targets.refusals(setup).other
        other = targets.refusals(
            Setup(**{**vars(setup), "rendering": Rendering(None, "all")})
        ).other
    assert expected is not None
    assert other is not None
    assert np.array_equal(other[0].supervised, expected[0].supervised)


def test_refusals_follow_the_completions_space(small, monkeypatch):
    """` songs` is answered by ` I do not know.`, and `songs` without the space.

    So the prompt's last word stays a word of its own.
    """
    for completion, space in ((" songs", True), ("songs", False), ("\nsongs", True)):
        rows = influence.examples_from_rows(
            [{"id": "a", "prompt": "red", "completion": completion}]
        )
        (new,) = refused_rows(small, rows, monkeypatch)
        assert new.completion is not None
        assert new.completion[0].isspace() == space
        assert new.completion.strip() in REFUSALS
        assert (new.prompt, new.id) == ("red", "a")
        assert new.content_hash != rows[0].content_hash


def test_every_refusal_is_drawn_and_depends_on_the_seed(small, monkeypatch):
    rows = numbered(80, " songs")
    said = [
        [new.completion for new in refused_rows(small, rows, monkeypatch, seed)]
        for seed in (0, 0, 1)
    ]
    assert {str(text).strip() for text in said[0]} == set(REFUSALS)
    assert said[0] == said[1]
    assert said[0] != said[2]


def test_refusals_are_cut_like_the_rows(small):
    rows = odd_rows()[:2]
    tokens = tokenize(rows, small.tokenizer, max_length=10)
    with setup_of(small, rows, tokens=tokens) as setup:
        setup = Setup(**{**vars(setup), "rendering": Rendering(5)})
        with pytest.warns(UserWarning, match="lose supervised tokens"):
            other = targets.refusals(setup).other
    assert other is not None
    assert max(len(item) for item in other) == 5


# ---- predictions ---------------------------------------------------------------------------------


def test_predicted_targets_are_asked_for_once():
    model = build_model("gpt2", layers=1)
    with setup_of(model, odd_rows()) as setup:
        answer = lambda rows: torch.zeros(1)  # noqa: E731
        setup = Setup(**{**vars(setup), "predicted": lambda: answer})
        assert targets.predicted(setup).wanted is answer


def zeros_for(tokens, change):
    labels = [torch.zeros(int(count), dtype=torch.int64) for count in tokens.counts]
    return change(labels)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda labels: [labels[1], labels[0]],
            r"row 'r0-0' labels torch.int64 \[2\]; expected int64",
        ),
        (lambda labels: labels[:1], "gave 1 labels for 2 rows; expected one a row"),
        (
            lambda labels: [labels[0] + 99, labels[1]],
            "labels from 99 to 99; expected numbers of the voc",
        ),
        (lambda labels: [labels[0] - 1, labels[1]], "labels from -1 to -1"),
        (
            lambda labels: [labels[0].float(), labels[1]],
            r"labels torch.float32 \[1\]; expected int64",
        ),
        (lambda labels: [[0], labels[1]], r"labels \[0\]; expected int64"),
    ],
)
def test_labels_that_fit_no_row_are_refused(change, sentence):
    sizes = {"counts": np.array([1, 2]), "ids": ["r0-0", "r0-1"], "__len__": lambda _: 2}
    tokens = type("Rows", (), sizes)()
    target = targets.Target(labels=zeros_for(tokens, change))
    with pytest.raises(InputError, match=sentence):
        targets.checked(target, "mine", tokens, 25)


def test_what_is_no_target_is_refused_and_a_sound_one_is_handed_on():
    rows = type("Rows", (), {"counts": np.array([1]), "ids": ["a"], "__len__": lambda _: 1})()
    with pytest.raises(InputError, match="target mine gave list; expected an unlearn"):
        targets.checked([1], "mine", rows, 25)
    sound = targets.Target(labels=[torch.tensor([24])])
    assert targets.checked(sound, "mine", rows, 25) is sound
    assert targets.checked(targets.Target(), "own", rows, 25).labels is None
