"""Continuations of rows, against plain greedy decoding of one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence
from influence.errors import DataError, InputError
from influence.generation import continued, generate, openings
from tests.analysis.evaluation.helpers import greedy
from tests.conftest import WORDS, build_model, examples
from tests.conftest import rows as made_rows

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def said(new: list[int]) -> str:
    """The words of tokens. Special ones (0 to 2) say nothing."""
    return "".join(WORDS[token - 3] for token in new if token > 2)


def ending(kind: str = "llama"):
    """A model that sometimes ends what it says."""
    model = build_model(kind, layers=1, seed=3)
    head = model.model.get_base_model().lm_head
    head.weight.data[1] *= 4
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_greedy_row_by_row(kind):
    model = ending(kind)
    data = examples(9)
    texts = generate(
        model, data, max_new_tokens=6, token_budget=40
    )  # several batches, prompts of mixed lengths
    lengths = []
    for text, example in zip(texts, data, strict=True):
        prompt = model.tokenizer(example.prompt)["input_ids"]
        new = greedy(model.model, prompt, 6)
        lengths.append(len(new))
        assert text == said(new)
    assert min(lengths) < 6 == max(lengths)  # some end, some are cut
    assert len(set(texts)) > 3
    assert generate(model, data, max_new_tokens=6) == texts


def test_generation_follows_the_adapter_and_not_the_completion():
    model = ending()
    data = influence.examples_from_rows(
        [{"id": "a", "prompt": "the red fox", "completion": " sleep"}]
    )
    other = influence.examples_from_rows(
        [{"id": "a", "prompt": "the red fox", "completion": " birds sing at dawn"}]
    )
    assert generate(model, data, max_new_tokens=8) == generate(model, other, max_new_tokens=8)
    with model.at(model.snapshot() * 0):
        without = generate(model, data, max_new_tokens=8)
    with model.model.disable_adapter():
        prompt = model.tokenizer("the red fox")["input_ids"]
        assert without == [said(greedy(model.model, prompt, 8))]
    assert without != generate(model, data, max_new_tokens=8)


def test_generation_is_plain_greedy_whatever_the_base_asks_for():
    """The base's own configuration (sampling, penalties, other lengths) plays no part, and is its
    own again afterwards.
    """
    model, data = ending(), examples(4)
    expected = generate(model, data, max_new_tokens=5)
    config = model.model.get_base_model().generation_config
    config.update(
        do_sample=True,
        temperature=3.0,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        max_length=3,
    )
    torch.manual_seed(0)
    assert generate(model, data, max_new_tokens=5) == expected
    assert model.model.get_base_model().generation_config is config
    assert config.temperature == 3.0
    assert not model.model.training


def test_every_end_token_of_a_chat_model_ends():
    model, data = ending(), examples(6)
    first = [text for text in generate(model, data, max_new_tokens=6) if text]
    stop = next(i for i, word in enumerate(WORDS) if any(word in text for text in first)) + 3
    model.model.get_base_model().generation_config.eos_token_id = [1, stop]
    assert not any(WORDS[stop - 3] in text for text in generate(model, data, max_new_tokens=6))


def test_generation_continues_a_conversation_after_the_template():
    model = ending()
    model.tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "runs over"}]
    data = influence.examples_from_rows([{"id": "c", "messages": turns}])
    prompt = model.tokenizer("user the fox <eos> assistant ")["input_ids"]
    assert generate(model, data, max_new_tokens=4) == [said(greedy(model.model, prompt, 4))]


def test_generation_answers_the_last_turn_of_a_completion_too():
    model = build_model("llama")
    model.tokenizer.chat_template = CHAT
    roles, said = ("user", "assistant") * 2, ("fox", "runs", "dog", "sleep")
    talk = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    whole, parts = {"messages": talk}, {"prompt": talk[:1], "completion": talk[1:]}
    texts = generate(model, influence.examples_from_rows([whole, parts]), max_new_tokens=6)
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_generation_ends_at_the_last_position():
    """2,048 learned positions: a prompt of 2,046 tokens has two more, whatever the others may
    say.
    """
    model = ending("gpt2")
    words = [
        word
        for word in WORDS
        if len(greedy(model.model, model.tokenizer(f"{word} " * 2046)["input_ids"], 2)) == 2
    ]
    prompt = f"{words[0]} " * 2046
    data = influence.examples_from_rows(
        [{"id": "long", "prompt": prompt, "completion": " runs"}, *made_rows(3)]
    )
    first, *others = generate(model, data, max_new_tokens=6)
    assert first == said(greedy(model.model, model.tokenizer(prompt)["input_ids"], 2))
    assert others == generate(model, data[1:], max_new_tokens=6)


def test_generation_refuses_rows_that_cannot_be_continued(tiny):
    data = [
        *made_rows(2),
        {"id": "t", "text": "the fox"},
        {"id": "e", "prompt": "", "completion": "fox runs"},
    ]
    data = influence.examples_from_rows(
        [*data, {"id": "long", "prompt": "fox " * 2048, "completion": " runs"}]
    )
    with pytest.raises(DataError, match="3 of 5 rows cannot be continued") as caught:
        generate(tiny, data)
    assert [(row.number, row.id) for row in caught.value.rows] == [(3, "t"), (4, "e"), (5, "long")]
    with pytest.raises(InputError, match="expected at least 1"):
        generate(tiny, examples(2), max_new_tokens=0)


# ---- each row as far as it goes by itself --------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_of_one_batch_are_continued_each_to_its_own_limit(kind):
    model, data = ending(kind), examples(7)
    found = openings(model, data)
    limits = np.array([1, 2, 3, 6, 1, 5, 4])
    texts = continued(model, found.prompts, limits, token_budget=40)
    for text, example, limit in zip(texts, data, limits.tolist(), strict=True):
        prompt = model.tokenizer(example.prompt)["input_ids"]
        assert text == said(greedy(model.model, prompt, limit))
    assert len({len(text) for text in texts}) > 2


def test_what_a_row_begins_with_and_says_then():
    """A prompt where there is one, else the first half; token ids as their labels say."""
    model = build_model("llama", layers=1)
    model.tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "runs over"}]
    data = influence.examples_from_rows(
        [
            {"id": "pair", "prompt": "the red", "completion": " fox runs"},
            {"id": "text", "text": "old cats sleep in warm"},
            {"id": "short prompt", "prompt": "the", "completion": " fox runs over"},
            {"id": "talk", "messages": turns},
            {"id": "ids", "input_ids": [4, 5, 6, 7, 8, 9]},
            {"id": "labels", "input_ids": [4, 5, 6, 7], "labels": [-100, -100, -100, 7]},
            {"id": "two", "input_ids": [4, 5, 6, 7], "seq_lengths": [2, 2]},
            {"id": "long", "prompt": "fox " * 2048, "completion": " runs"},
        ]
    )
    found = openings(model, data)

    def ids(text):
        return model.tokenizer(text)["input_ids"]

    assert found.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert [row.input_ids.tolist() for row in found.prompts] == [
        ids("the red"),
        ids("old cats sleep"),  # of six tokens, the end among them
        ids("the"),
        ids("user fox <eos> assistant"),
        [4, 5, 6],
        [4, 5, 6],
    ]
    assert [answer.tolist() for answer in found.answers] == [
        [*ids("fox runs"), 1],
        [*ids("in warm"), 1],
        [*ids("fox runs over"), 1],
        [*ids("runs over"), 1],
        [7, 8, 9],
        [7],
    ]
    assert found.prompts.ids == ["pair", "text", "short prompt", "talk", "ids", "labels"]


def test_a_model_is_left_as_it_was_bit_for_bit():
    model, data = ending(), examples(5)
    model.model.train()
    base = model.model.get_base_model()

    def state():
        modes = [module.training for module in model.model.modules()]
        flags = [parameter.requires_grad for parameter in model.model.parameters()]
        told = [base.config.to_dict(), base.generation_config.to_dict()]
        keys = [sorted(vars(module)) for module in model.model.modules()]
        return modes, flags, told, keys

    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    before = state()
    continued(model, openings(model, data).prompts, np.full(5, 6))
    assert state() == before
    assert all(
        torch.equal(value, weights[name]) for name, value in model.model.state_dict().items()
    )
