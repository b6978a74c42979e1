"""What a model says of rows, against plain forwards of one row and plain greedy decoding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import influence
from analysis.metrics import outputs as module
from analysis.metrics.outputs import generate, gradient_norms, outputs
from influence.errors import DataError, InputError, NumericalError
from tests.analysis.evaluation.helpers import greedy, logs_of, plain
from tests.conftest import WORDS, build_model, examples, tokens_of
from tests.conftest import rows as made_rows

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_outputs_are_those_of_a_plain_forward(kind, monkeypatch):
    monkeypatch.setattr(module, "_POSITIONS", 3)  # distributions are reduced in several pieces
    model = build_model(kind, layers=1)
    tokens = tokens_of(model, examples(7))
    tokens[2].input_ids[-1] = int(
        logs_of(model.model, tokens[2].input_ids)[-1].argmax()
    )  # one that is guessed
    found = outputs(model, tokens, token_budget=25)
    assert found.ids == tokens.ids
    for i, row in enumerate(plain(model.model, tokens)):
        p, logs = row["logs"].exp(), row["logs"]
        mean = [
            sum(float(a) * float(b) for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        square = [
            sum(float(a) * float(b) ** 2 for a, b in zip(*pair, strict=True))
            for pair in zip(p, logs, strict=True)
        ]
        np.testing.assert_allclose(found.log_probs[i], row["own"], rtol=1e-9)
        np.testing.assert_allclose(found.loss[i], -row["own"].mean(), rtol=1e-9)
        np.testing.assert_allclose(found.sums[i], -row["own"].sum(), rtol=1e-9)
        np.testing.assert_allclose(found.mean[i], mean, rtol=1e-9)
        np.testing.assert_allclose(
            found.std[i], np.sqrt(np.array(square) - np.square(mean)), rtol=1e-7
        )
        assert found.right[i].tolist() == [
            int(log.argmax()) == label for log, label in zip(logs, row["labels"], strict=True)
        ]
        assert found.counts[i] == len(row["labels"])
    assert found.right[2][-1]
    assert not all(right.all() for right in found.right)


def test_of_a_flat_and_of_a_cut_distribution():
    """V equal tokens: log p = -log V everywhere, no spread. (2, 1, 1, never)/4: mean (2 log 1/2 + 2
    log 1/4)/4 = -1.5 log 2, spread sqrt(1/2 (1/2)^2 + 1/2 (1/2)^2) log 2 = log 2 / 2; the token
    that is never said adds nothing.
    """
    logits = torch.zeros(1, 8)
    own, mean, std, right = module._reduced(logits, torch.tensor([5]))
    assert (float(own), float(mean), float(std)) == (
        pytest.approx(-math.log(8)),
        pytest.approx(-math.log(8)),
        pytest.approx(0, abs=1e-12),
    )
    logits = torch.tensor([[math.log(2), 0.0, 0.0, -math.inf]], dtype=torch.float64)
    own, mean, std, right = module._reduced(logits, torch.tensor([0]))
    assert float(own) == pytest.approx(-math.log(2))
    assert float(mean) == pytest.approx(-1.5 * math.log(2))
    assert float(std) == pytest.approx(math.log(2) / 2)
    assert bool(right)


def test_outputs_of_a_broken_model_are_refused(tiny):
    tiny.sites[0].B.weight.data.fill_(math.nan)
    with pytest.raises(NumericalError, match="the loss of 3 rows"):
        outputs(tiny, tokens_of(tiny, examples(3)))


def test_gradient_norms_are_those_of_autograd():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, examples(5))
    found = gradient_norms(model, tokens, token_budget=30)
    parameters = [p for name, p in model.model.named_parameters() if "lora_" in name]
    for p in parameters:
        p.requires_grad_(True)
    for i, row in enumerate(tokens):
        ids, first = torch.from_numpy(row.input_ids), int(row.supervised.argmax())
        loss = nn.functional.cross_entropy(
            model.model(input_ids=ids[None]).logits[0, first - 1 : -1], ids[first:]
        )
        grads = torch.autograd.grad(loss, parameters)
        assert found[i] == pytest.approx(
            math.sqrt(sum(float((g**2).sum()) for g in grads)), rel=1e-9
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
