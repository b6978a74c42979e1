"""What forget rows are trained towards, the frozen adapter that is asked for it, and a side of a step against plain loops."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import influence
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.cost import Cost
from influence.errors import InputError
from influence.loss import supervised_logits
from influence.rows import Examples
from influence.tokens import TokenizedExamples, Tokens, tokenize
from tests.conftest import (
    WORDS,
    add_lora,
    build_base,
    build_model,
    build_tokenizer,
    examples,
    tokens_of,
)
from unlearn.methods import targets, terms
from unlearn.methods.batches import TermBatches
from unlearn.methods.reference import ReferenceAdapter, frozen
from unlearn.methods.targets import REFUSALS, Setup, Target
from unlearn.methods.terms import Term

KINDS = ["llama", "gpt2", "phi", "gemma", "qwen2", "mistral"]
EOS = 1
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


def odd_rows() -> Examples:
    """Rows of one supervised token or many, no prompt, an end token inside the completion, and one that is only a text."""
    return influence.examples_from_rows(
        [
            {"id": "plain", "prompt": "the red fox", "completion": " runs over a lazy dog"},
            {"id": "short", "prompt": "birds sing loud", "completion": " songs"},
            {"id": "no prompt", "prompt": "", "completion": "old cats sleep"},
            {
                "id": "ends inside",
                "prompt": "at dawn",
                "completion": " birds <eos> sing <unk> songs",
            },
            {"id": "ends in prompt", "prompt": "the <eos> sun", "completion": " and cats"},
            {"id": "text", "text": "warm sun at dawn"},
        ]
    )


@contextmanager
def setup_of(
    model: AdaptedModel,
    rows: Examples,
    *,
    seed: int = 0,
    token_budget: int = 4096,
    tokens: TokenizedExamples | None = None,
) -> Iterator[Setup]:
    """A setup while the adapter before is held."""

    def predicted() -> Any:
        raise AssertionError("nobody asked for predictions")

    tokens = tokens_of(model, rows) if tokens is None else tokens
    with model.evaluating(model.parameters), frozen(model) as before:
        yield Setup(model, rows, tokens, before, seed, None, token_budget, predicted)


def labels_of(make: Any, model: AdaptedModel, rows: Examples, **options: Any) -> list[list[int]]:
    with setup_of(model, rows, **options) as setup:
        made = make(setup)
    assert made.other is None
    assert made.wanted is None
    return [own.tolist() for own in made.labels]


# ---- random labels -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> AdaptedModel:
    return build_model("gpt2", layers=1)


def test_own_labels_change_nothing(small):
    with setup_of(small, odd_rows()) as setup:
        made = targets.own(setup)
    assert (made.labels, made.other, made.wanted) == (None, None, None)


def test_random_labels_are_there_for_supervised_tokens_only_and_special_ones_stay(small):
    rows = odd_rows()
    tokens = tokens_of(small, rows)
    labels = labels_of(targets.random, small, rows)
    assert [len(own) for own in labels] == tokens.counts.tolist()
    kept = 0
    for item, own in zip(tokens, labels, strict=True):
        true = item.input_ids[item.supervised].tolist()
        for token, label in zip(true, own, strict=True):
            assert (label == token) if token in (0, 1, 2) else (3 <= label < 3 + len(WORDS))
            kept += token in (0, 1, 2)
        assert own[-1] == EOS
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
    assert len({tuple(own) for own in drawn}) == 8  # rows have draws of their own
    assert all(len(set(own[:-1])) > 1 for own in drawn)  # and so have tokens


def numbered(n: int, completion: str) -> Examples:
    """Rows with one completion and a prompt of their own each."""
    prompts = [f"{WORDS[i % 22]} {WORDS[i // 22]}" for i in range(n)]
    return influence.examples_from_rows(
        [
            {"id": str(i), "prompt": prompt, "completion": completion}
            for i, prompt in enumerate(prompts)
        ]
    )


def test_what_a_row_is_trained_towards_does_not_depend_on_the_other_rows(small):
    """One label, or one refusal, is asked for in two unlearnings, alone and among others: "the seed and the row alone"."""
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
    """A chi-square test over 22 words and 4,400 draws, at a seed; and no memory from one token of a row to the next."""
    rows = numbered(20, " the" * 220)
    drawn = np.array([own[:-1] for own in labels_of(targets.random, small, rows, seed=3)])
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
        labels_of(targets.adversarial, one, rows, token_budget=4096) for one in (model, plain)
    )
    assert ours == theirs
    drawn = labels_of(targets.random, model, rows)
    true = [item.input_ids[item.supervised] for item in tokens_of(model, rows)]
    assert all(
        (np.array(own)[ids == EOS] == EOS).all() for own, ids in zip(drawn, true, strict=True)
    )


def test_special_tokens_of_a_chat_format_are_special():
    """Turn markers are often special words that are no bos, eos, pad or unk: `all_special_ids` does not list them."""
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


# ---- adversarial labels --------------------------------------------------------------------------------------


def alone(model: AdaptedModel, ids: np.ndarray) -> np.ndarray:
    """Plain transformers: all logits `[T, V]` of one row, float64."""
    base = model.model.get_base_model()
    with torch.no_grad():
        return (
            base(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double().numpy()
        )


def best_wrong(logits: np.ndarray, item: Any) -> list[int]:
    """Position by position: the likeliest word but the true one, read where that word is predicted."""
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
        a != b for own, ids in zip(labels, true, strict=True) for a, b in zip(own, ids, strict=True)
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
        wanted = [own.tolist() for own in targets.adversarial(setup).labels or []]
        with model.at(model.snapshot() * -3):
            moved = [best_wrong(alone(model, item.input_ids), item) for item in tokens]
            labels = [own.tolist() for own in targets.adversarial(setup).labels or []]
    assert labels == wanted != moved


def test_adversarial_labels_of_rows_known_by_heart_are_the_second_words():
    """Rows of which every word is what the model says anyway: the truth is the likeliest word throughout."""
    model = build_model("gpt2", layers=1)
    known = []
    for start in ([3, 4, 5], [20], [9, 1]):
        ids = list(start)
        for _ in range(6):
            ids.append(int(alone(model, np.array(ids))[-1].argmax()))
        known.append(Tokens(np.array(ids), np.arange(len(ids)) >= len(start)))
    tokens = TokenizedExamples(known, ["a", "b", "c"], [False] * 3)
    labels = labels_of(targets.adversarial, model, examples(3), tokens=tokens)
    for item, own in zip(known, labels, strict=True):
        logits = alone(model, item.input_ids)[:-1][item.supervised[1:]]
        assert own == np.argsort(-logits, axis=-1)[:, 1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adversarial_labels_in_half_precision_are_never_the_truth(dtype):
    """Half precision makes ties; a tie with the truth must not give the truth."""
    model = build_model("llama", layers=1, dtype=dtype)
    rows = odd_rows()
    labels = labels_of(targets.adversarial, model, rows)
    for own, item in zip(labels, tokens_of(model, rows), strict=True):
        assert len(own) == int(item.supervised.sum())
        assert all(
            a != b for a, b in zip(own, item.input_ids[item.supervised].tolist(), strict=True)
        )


def test_labels_of_conversations_are_those_of_the_last_answer():
    """Earlier turns, the assistant's own too, are prompt; the end of the answer is a special token and supervised."""
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


# ---- refusals ------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(
        targets,
        "tokenize",
        lambda rows, *rest, **more: (seen.append(rows), tokenize(rows, *rest, **more))[1],
    )
    refused(model, rows, seed=seed)
    monkeypatch.undo()
    return seen[0]


def test_refusals_follow_the_completions_space(small, monkeypatch):
    """` songs` is answered by ` I do not know.`, so that the prompt's last word stays a word of its own; `songs` without it."""
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
        setup = Setup(**{**vars(setup), "max_length": 5})
        with pytest.warns(UserWarning, match="lose supervised tokens"):
            other = targets.refusals(setup).other
    assert other is not None
    assert max(len(item) for item in other) == 5


def test_predicted_targets_are_asked_for_once():
    model = build_model("gpt2", layers=1)
    with setup_of(model, odd_rows()) as setup:
        answer = lambda rows: torch.zeros(1)  # noqa: E731
        setup = Setup(**{**vars(setup), "predicted": lambda: answer})
        assert targets.predicted(setup).wanted is answer


# ---- the frozen adapter --------------------------------------------------------------------------------------


def state(model: AdaptedModel) -> dict[str, Any]:
    """All that must be as it was: names, bits, flags, modes, adapters, random numbers, the parameters' identity."""
    peft = model.model
    return {
        "keys": list(peft.state_dict()),
        "bits": {key: value.clone() for key, value in peft.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in peft.named_parameters()},
        "modes": {name: module.training for name, module in peft.named_modules()},
        "configurations": {name: config.to_dict() for name, config in peft.peft_config.items()},
        "adapters": (list(peft.peft_config), peft.active_adapter, list(peft.active_adapters)),
        "layers": [
            (list(site.layer.active_adapters), dict(site.layer.scaling)) for site in model.sites
        ],
        "parameters": [id(parameter) for parameter in model.parameters],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("random"), after.pop("random"))
    bits, found = before.pop("bits"), after.pop("bits")
    assert all(torch.equal(bits[key], found[key]) for key in bits)
    assert before == after


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {
        "rank_pattern": {"q_proj": 3, "c_attn": 4},
        "alpha_pattern": {"v_proj": 7, "c_attn": 9},
    },
    "some layers": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [1]},
    "a pattern": {"target_modules": r".*(q_proj|v_proj|c_attn).*"},
    "heavy dropout": {"lora_dropout": 0.9},
    "tied": {"tie": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_held_adapter_is_the_model_before_while_the_other_moves(kind, name):
    """Bit for bit, even with a graph of the moved one alive, whose gradient afterwards is what it would have been."""
    model = build_model(kind, **ADAPTERS[name])
    tokens, some = tokens_of(model, odd_rows()), np.array([3, 0, 5, 1])
    batch = collate(tokens, some, pad_id=model.pad_id)
    model.model.train()  # so that dropout and modes are at stake
    for parameter in model.parameters[::2]:
        parameter.requires_grad_(False)
    begun = state(model)
    with model.evaluating(model.parameters):
        then = supervised_logits(model, batch).logits.detach()
        theta = model.snapshot()
        with model.at(theta * 1.3):
            now = supervised_logits(model, batch).logits
            plain = torch.autograd.grad(now.double().logsumexp(-1).sum(), model.parameters)
        with frozen(model) as before:
            assert all(
                parameter.requires_grad for parameter in model.parameters
            )  # of methods that never ask, too
            assert torch.equal(supervised_logits(model, batch).logits, then)
            assert torch.equal(before.logits(tokens, some)[0], then)
            model.restore(theta * 1.3)
            alive = supervised_logits(model, batch).logits
            found, true, counts = before.logits(tokens, some)
            assert torch.equal(found, then)
            assert not found.requires_grad
            assert counts == tokens.counts[some].tolist()
            assert (
                true.tolist()
                == np.concatenate(
                    [tokens[i].input_ids[tokens[i].supervised] for i in some]
                ).tolist()
            )
            wanted = torch.nn.functional.cross_entropy(
                then if then.dtype == torch.float64 else then.float(), true, reduction="none"
            )
            assert torch.equal(torch.cat(before.losses(tokens, some, true)), wanted)
            assert torch.equal(alive, now)
            assert all(parameter.requires_grad for parameter in model.parameters)
            own = torch.autograd.grad(alive.double().logsumexp(-1).sum(), model.parameters)
            assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
            assert torch.equal(supervised_logits(model, batch).logits, now)
            assert before.asked == 3 * len(some)
            model.restore(theta)
    assert_same(begun, state(model))


def fail_inside(model: AdaptedModel, tokens: TokenizedExamples, while_asked: bool) -> None:
    with model.evaluating(model.parameters), frozen(model) as before:
        before.logits(tokens, np.arange(2))
        if while_asked:
            with before._active():
                raise RuntimeError("stop")
        raise RuntimeError("stop")


def test_the_model_is_as_before_after_an_exception():
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, odd_rows())
    begun = state(model)
    for while_asked in (False, True):
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(model, tokens, while_asked)
        assert_same(dict(begun), state(model))
    with model.evaluating(model.parameters), frozen(model) as before:  # and can be held again
        assert before.asked == 0


def test_a_failed_question_leaves_the_trained_adapter_active(monkeypatch):
    model = build_model("llama", layers=1)
    tokens = tokens_of(model, odd_rows())
    with model.evaluating(model.parameters), frozen(model) as before:
        now = supervised_logits(model, collate(tokens, np.arange(2), pad_id=0)).logits.detach()
        monkeypatch.setattr("unlearn.methods.reference.supervised_logits", _stop)
        with pytest.raises(RuntimeError, match="stop"):
            before.logits(tokens, np.arange(2))
        with model.at(model.snapshot() * 2):
            later = supervised_logits(model, collate(tokens, np.arange(2), pad_id=0)).logits
        assert not torch.equal(later, now)
        assert later.requires_grad


def _stop(*_: Any) -> Any:
    raise RuntimeError("stop")


def test_an_adapter_beside_others_is_held_alone():
    """A model with a second adapter that is not active: it is neither asked nor changed."""
    from peft import LoraConfig

    base = build_base("llama", layers=1)
    peft = add_lora(base, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.add_adapter(
            "second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    for name, parameter in peft.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(parameter)
    peft.set_adapter("default")
    model = influence.from_peft(peft.double(), build_tokenizer())
    tokens = tokens_of(model, odd_rows())
    begun = state(model)
    with model.evaluating(model.parameters):
        then = supervised_logits(model, collate(tokens, np.arange(3), pad_id=0)).logits.detach()
        with frozen(model) as before, model.at(model.snapshot() * 2):
            assert torch.equal(before.logits(tokens, np.arange(3))[0], then)
    assert_same(begun, state(model))


def test_a_scaling_that_was_set_by_hand_is_held_too():
    """PEFT's `set_scale` and its kin change the layer, not the configuration; sites and digests read the layer."""
    model = build_model("llama", layers=1)
    for site in model.sites:
        site.layer.scaling["default"] *= 2
    tokens = tokens_of(model, odd_rows())
    with model.evaluating(model.parameters):
        then = supervised_logits(model, collate(tokens, np.arange(3), pad_id=0)).logits.detach()
        with frozen(model) as before:
            assert torch.equal(before.logits(tokens, np.arange(3))[0], then)


# ---- a side of a step against plain loops --------------------------------------------------------------------


def plain_logits(model: AdaptedModel, item: Any) -> Tensor:
    """`[T_i, V]` of one row, unpadded, attached to the graph: position by position, read where each token is predicted."""
    whole = model.model.get_base_model()(
        input_ids=torch.from_numpy(item.input_ids)[None], use_cache=False
    ).logits[0]
    return torch.stack([whole[t - 1] for t in range(1, len(item)) if item.supervised[t]])


def cross_entropy(logits: Tensor, labels: Any) -> Tensor:
    chosen = [row.logsumexp(0) - row[int(label)] for row, label in zip(logits, labels, strict=True)]
    return torch.stack(chosen)


def true_labels(item: Any) -> list[int]:
    return item.input_ids[item.supervised].tolist()


def log_sigma(x: Tensor) -> Tensor:
    return -(1 + (-x).exp()).log()


def plain_term(
    name: str, model: AdaptedModel, tokens: Any, target: Target, theta: Tensor
) -> Tensor:
    """The value of a term over all rows, one row after the other, the reference by really going back to it."""

    def losses(items: Any, labels: list[Any]) -> list[Tensor]:
        return [
            cross_entropy(plain_logits(model, item), own)
            for item, own in zip(items, labels, strict=True)
        ]

    labels = (
        [true_labels(item) for item in tokens]
        if target.labels is None
        else [own.tolist() for own in target.labels]
    )
    others = list(target.other or [])
    other_labels = [true_labels(item) for item in others]
    with model.at(theta), torch.no_grad():
        before, other_before = losses(tokens, labels), losses(others, other_labels)
        wanted = [plain_logits(model, item).log_softmax(-1) for item in tokens]
    n, total = len(tokens), sum(len(own) for own in labels)
    now, other_now = losses(tokens, labels), losses(others, other_labels)
    if name in ("ascent", "descent"):
        value = sum(own.sum() for own in now) / total
        return torch.as_tensor(-value if name == "ascent" else value)
    if name in ("divergence", "matching"):
        if target.wanted is not None:
            wanted = [target.wanted(np.array([i])) for i in range(n)]
        logs = [plain_logits(model, item).log_softmax(-1) for item in tokens]
        return torch.as_tensor(
            sum((q.exp() * (q - p)).sum() for q, p in zip(wanted, logs, strict=True)) / total
        )
    x = [a.sum() - b.sum() for a, b in zip(now, before, strict=True)]
    if name == "simnpo":
        x = [own.mean() - 0.25 for own in now]  # gamma / beta
    if name == "dpo":
        x = [a - (b.sum() - c.sum()) for a, b, c in zip(x, other_now, other_before, strict=True)]
    return torch.as_tensor(sum(-2 / 0.4 * log_sigma(0.4 * one) for one in x) / n)


SIDES: dict[str, tuple[Term, str]] = {
    "ascent": (terms.ascent, "own"),
    "descent to random labels": (terms.descent, "random"),
    "descent to adversarial labels": (terms.descent, "adversarial"),
    "divergence": (terms.divergence, "own"),
    "matching": (terms.matching, "predicted"),
    "npo": (terms.npo(0.4), "own"),
    "npo of random labels": (terms.npo(0.4), "random"),
    "simnpo": (terms.simnpo(0.4, 0.1), "own"),
    "dpo": (terms.dpo(0.4), "refusals"),
}


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("token_budget", [12, 4096])
def test_a_sides_value_and_gradient_are_those_of_a_plain_loop(small, name, token_budget):
    """Away from the reference, in batches of a budget, in the order of a permutation: as one row after the other."""
    model, rows = small, odd_rows()[:5]
    tokens = tokens_of(model, rows)
    term, kind = SIDES[name]
    generator = torch.Generator().manual_seed(0)
    logs = [
        torch.randn(int(c), 25, generator=generator, dtype=torch.float64).log_softmax(-1)
        for c in tokens.counts
    ]
    theta = model.snapshot()
    with setup_of(model, rows, tokens=tokens) as setup:
        setup = Setup(
            **{
                **vars(setup),
                "predicted": lambda: lambda some: torch.cat([logs[row] for row in some.tolist()]),
            }
        )
        target = getattr(targets, kind)(setup)
        side = TermBatches(
            model, tokens, term, target, setup.before, len(tokens), token_budget, 0, 31, Cost()
        )
        side.look(0)  # what is known of the reference is known from here on
        with model.at(
            theta + 0.1 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        ):
            value = plain_term(name.split()[0], model, tokens, target, theta)
            wanted = model.space.flatten(list(torch.autograd.grad(value, model.parameters)))  # type: ignore[arg-type]
            own = [
                cross_entropy(plain_logits(model, item), true_labels(item)).mean().item()
                for item in tokens
            ]
            for step in (1, 2):
                look = side.look(step)
                assert look.value == pytest.approx(value.item(), rel=1e-10)
                assert float((look.gradient - wanted).norm() / wanted.norm()) < 1e-10
                assert look.losses == pytest.approx(np.array(own)[look.rows], rel=1e-10)
                assert side.mean_loss(look.rows) == pytest.approx(look.loss, rel=1e-10)


def test_the_references_losses_are_asked_once_a_row(small):
    """NPO's reference costs one forward a row, KL's one a row and step."""
    tokens = tokens_of(small, odd_rows()[:5])
    asked = {}
    with small.evaluating(small.parameters), frozen(small) as before:
        for name, term in (
            ("npo", terms.npo()),
            ("divergence", terms.divergence),
            ("ascent", terms.ascent),
        ):
            side = TermBatches(small, tokens, term, Target(), before, 2, 4096, 0, 31, Cost())
            start = before.asked
            for step in range(6):  # two epochs
                side.look(step)
            asked[name] = before.asked - start
            assert side.cost.forwards == asked[name]
            assert side.cost.gradients == 10
    assert asked == {"npo": 5, "divergence": 10, "ascent": 0}


def test_a_before_counts_in_rows(small):
    with small.evaluating(small.parameters), frozen(small) as before:
        assert isinstance(before, ReferenceAdapter)
        before.logits(tokens_of(small, odd_rows()), np.array([0, 0, 3]))
        assert before.asked == 3
