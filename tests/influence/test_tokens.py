"""Label masks of every kind of row, truncation and tokenizer digests."""

from __future__ import annotations

import json
import os
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from influence import tokens as tokens_module
from influence.batches import collate, plan_batches
from influence.errors import DataError
from influence.row_files import read_examples
from influence.rows import Examples, examples_from_rows
from influence.tokens import TokenizedExamples, Tokens, tokenize, tokenizer_digest
from tests.influence.toy_tokenizers import (
    BACKEND,
    CHAT,
    THINKING,
    chat,
    make_tokenizer,
    pair,
    random_tokens,
    trained,
)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def tokens_of(row, tokenizer, **options) -> Tokens:
    (tokens,) = tokenize(examples_from_rows([row]), tokenizer, **options)
    assert tokens.input_ids.dtype == np.int64
    assert tokens.supervised.dtype == bool
    assert tokens.input_ids.shape == tokens.supervised.shape
    assert not tokens.supervised[0]
    assert tokens.supervised[-1]
    return tokens


def targets(tokens: Tokens, tokenizer) -> str:
    return tokenizer.decode(tokens.input_ids[tokens.supervised], clean_up_tokenization_spaces=False)


def context(tokens: Tokens, tokenizer) -> str:
    return tokenizer.decode(
        tokens.input_ids[~tokens.supervised], clean_up_tokenization_spaces=False
    )


def test_the_completion_and_its_end_are_supervised(tokenizer):
    tokens = tokens_of(pair(), tokenizer)
    assert context(tokens, tokenizer) == pair()["prompt"]
    assert targets(tokens, tokenizer) == pair()["completion"] + "<eos>"
    # One string, tokenised once.
    assert tokens.input_ids.tolist() == [
        *tokenizer(pair()["prompt"] + pair()["completion"]).input_ids,
        1,
    ]


def test_a_token_merged_across_the_prompt_boundary_is_supervised(tokenizer):
    prompt, completion = "Q: The capi", "tal of France"
    assert len(tokenizer(" capital").input_ids) == 1  # otherwise this test shows nothing
    tokens = tokens_of(pair(prompt, completion), tokenizer)
    assert targets(tokens, tokenizer) == " capital of France<eos>"
    assert context(tokens, tokenizer) == "Q: The"
    assert tokens.input_ids.tolist() == [*tokenizer(prompt + completion).input_ids, 1]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("", " The capital"),
        ("The capital", "   "),
        ("The capital \n", "\n Paris"),
        ("naïve 東京", "京都 🙂🙂 é"),
        ("🙂", "🙂"),
    ],
)
def test_the_boundary_counts_characters_not_bytes_or_tokens(tokenizer, prompt, completion):
    tokens = tokens_of(pair(prompt, completion), tokenizer)
    if prompt:
        assert targets(tokens, tokenizer) == completion + "<eos>"
        assert context(tokens, tokenizer) == prompt
    else:  # nothing precedes the first token
        assert tokens.supervised.tolist() == [False] + [True] * (len(tokens) - 1)


def test_a_whole_text_is_supervised_but_for_its_first_token(tokenizer):
    tokens = tokens_of({"text": "The capital of France"}, tokenizer)
    assert tokens.input_ids.tolist() == [*tokenizer("The capital of France").input_ids, 1]
    assert tokens.supervised.tolist() == [False] + [True] * (len(tokens) - 1)


def test_the_beginning_that_the_tokenizer_adds_itself():
    tokenizer = make_tokenizer(added="<bos> $A")
    tokens = tokens_of(pair(), tokenizer)
    assert context(tokens, tokenizer) == "<bos>" + pair()["prompt"]
    assert targets(tokens, tokenizer) == pair()["completion"] + "<eos>"
    empty = tokens_of(pair("", "Paris"), tokenizer)
    assert tokenizer.decode(empty.input_ids) == "<bos>Paris<eos>"
    assert empty.supervised.sum() == len(empty) - 1
    text = tokens_of({"text": "Paris"}, tokenizer)
    assert text.input_ids.tolist() == empty.input_ids.tolist()
    assert text.supervised.tolist() == empty.supervised.tolist()
    with pytest.warns(UserWarning, match="1 of 1 rows begin with <bos>, which the tokenizer adds"):
        twice = tokens_of({"text": "<bos>Paris"}, tokenizer)
    assert tokenizer.decode(twice.input_ids) == "<bos><bos>Paris<eos>"


@pytest.mark.parametrize("added", ["<bos> $A <eos>", "$A <eos>"])
def test_an_end_that_the_tokenizer_adds_too_is_there_twice_as_trainers_have_it(added):
    tokenizer = make_tokenizer(added=added)
    with pytest.warns(UserWarning, match="the tokenizer itself adds <eos>, so 1 of 1 rows end"):
        tokens = tokens_of(pair(), tokenizer)
    assert targets(tokens, tokenizer) == pair()["completion"] + "<eos><eos>"
    assert context(tokens, tokenizer) == "<bos>" * added.startswith("<bos>") + pair()["prompt"]


def test_an_end_written_in_the_row_is_not_doubled(tokenizer):
    tokens = tokens_of(pair(completion=" Paris.<eos>"), tokenizer)
    assert targets(tokens, tokenizer) == " Paris.<eos>"


def test_a_completion_that_becomes_no_tokens_still_ends():
    rules = json.loads(BACKEND)
    rules["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    tokenizer = make_tokenizer(backend=json.dumps(rules))
    tokens = tokens_of(pair("Paris", "\u200b"), tokenizer)
    assert (context(tokens, tokenizer), targets(tokens, tokenizer)) == ("Paris", "<eos>")


def test_a_padding_token_that_is_the_end_token_is_still_a_target():
    tokenizer = make_tokenizer(pad="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [pair("Q:<eos> A", " yes<eos> no"), pair("Q:<eos>", " The capital of France is Paris.")]
    tokens = tokenize(examples_from_rows(rows), tokenizer)
    assert [targets(row, tokenizer) for row in tokens] == [
        " yes<eos> no<eos>",
        " The capital of France is Paris.<eos>",
    ]
    for padding in ("right", "left"):
        batch = collate(tokens, [0, 1], pad_id=1, padding=padding)
        assert batch.supervised.sum(1).tolist() == tokens.counts.tolist()
        assert batch.attention_mask.sum(1).tolist() == tokens.lengths.tolist()


def test_a_tokenizer_without_an_end_token_warns_once():
    tokenizer = make_tokenizer(eos=None)
    with pytest.warns(
        UserWarning, match="the tokenizer has no end-of-sequence token, so none is appended"
    ) as seen:
        tokens = tokenize(examples_from_rows([pair(), pair(completion=" Rome")]), tokenizer)
    assert len(seen) == 1
    assert [targets(row, tokenizer) for row in tokens] == [pair()["completion"], " Rome"]


class Slow(PreTrainedTokenizer):
    """A character tokenizer without offsets, that merges `ab` into one token."""

    VOCAB = ("<eos>", "<bos>", "ab", *"abcdefghijklmnopqrstuvwxyz ", "?")

    def __init__(self, **options):
        super().__init__(eos_token="<eos>", bos_token="<bos>", **options)

    @property
    def vocab_size(self):
        return len(self.VOCAB)

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.VOCAB)}

    def _tokenize(self, text, **_):
        return re.findall("ab|.", text)

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, len(self.VOCAB) - 1)

    def _convert_id_to_token(self, index):
        return self.VOCAB[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, 1, *token_ids_0]


def test_a_tokenizer_without_offsets_supervises_from_the_first_differing_token():
    tokenizer = Slow()
    assert not tokenizer.is_fast
    assert tokenizer(["ab"]).input_ids == [[1, 1, 2]]
    spelled = [
        "".join(tokenizer.convert_ids_to_tokens(row.input_ids[row.supervised].tolist()))
        for row in tokenize(
            examples_from_rows(
                [pair("hello", " there"), pair("hella", "bout"), pair("", "word"), {"text": "abc"}]
            ),
            tokenizer,
        )
    ]
    assert spelled == [" there<eos>", "about<eos>", "word<eos>", "<bos>abc<eos>"]
    assert re.fullmatch("[0-9a-f]{64}", tokenizer_digest(tokenizer))


def test_only_the_last_assistant_turn_is_supervised():
    tokenizer = make_tokenizer(template=CHAT, added="<bos> $A")
    tokens = tokens_of(chat("Hello", "yes", "capital?", "Paris"), tokenizer)
    # Nothing is added around the template's own tokens: no <bos>, no <eos>.
    assert context(tokens, tokenizer) == (
        "<|user|>Hello<|end|>\n<|assistant|>yes<|end|>\n<|user|>capital?<|end|>\n<|assistant|>"
    )
    assert targets(tokens, tokenizer) == "Paris<|end|>\n"


@pytest.mark.parametrize("answer", ["Paris", "end", "user", " Paris \n", "assistant"])
def test_a_template_that_does_not_reproduce_its_generation_prompt(answer):
    tokenizer = make_tokenizer(template=THINKING)
    tokens = tokens_of(chat("Paris or end?", answer), tokenizer)
    assert context(tokens, tokenizer) == "<|user|>Paris or end?<|end|>\n<|assistant|>"
    assert targets(tokens, tokenizer) == f"{answer.strip()}<|end|>\n"


def test_a_template_whose_frame_depends_on_the_answer_is_searched_for_it():
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and 'Paris' not "
        "in m['content'] %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}{% if "
        "add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    assert targets(tokens_of(chat("Paris?", "Paris"), tokenizer), tokenizer) == "Paris<|end|>\n"


def test_an_assistant_that_speaks_first():
    tokenizer = make_tokenizer(template=CHAT)
    tokens = tokens_of(chat("Hello there"), tokenizer)
    assert context(tokens, tokenizer) == "<|assistant|>"
    assert targets(tokens, tokenizer) == "Hello there<|end|>\n"


def test_other_keys_of_a_message_reach_the_template():
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['tone'] }}:{{ m['content'] }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "yes", "tone": "calm", "extra": None}]
    tokens = tokens_of({"messages": messages}, tokenizer := make_tokenizer(template=template))
    assert tokenizer.decode(tokens.input_ids) == "<|assistant|>calm:yes"


def test_a_template_that_prints_the_date_gets_a_fixed_one():
    template = "\n<|system|>{{ strftime_now('%-d %b %Y, %Y-%m-%d') }}\n" + CHAT
    plain = template.replace("{{ strftime_now('%-d %b %Y, %Y-%m-%d') }}", "26 Jul 2024, 2024-07-26")
    dated, fixed = make_tokenizer(template=template), make_tokenizer(template=plain)
    row = chat("Hello", "yes")
    assert tokens_of(row, dated).input_ids.tolist() == tokens_of(row, fixed).input_ids.tolist()


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(DataError) as error:
        tokenize(examples_from_rows([pair(), chat("Hello", "yes")]), tokenizer)
    assert str(error.value) == (
        "1 of 2 rows have messages, but the tokenizer has no chat template; set "
        "tokenizer.chat_template, load a tokenizer saved with one, or give the rows as prompt and "
        "completion"
    )


def test_conversations_a_template_refuses_are_listed():
    picky = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a user must begin') }}{% "
        "endif %}"
    )
    silent = "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    with pytest.raises(DataError) as error:
        tokenize(
            examples_from_rows([chat("Hello", id="a"), chat("Hello", "yes"), chat("yes", id="c")]),
            make_tokenizer(template=picky + CHAT),
        )
    assert str(error.value) == (
        "2 of 3 rows cannot be rendered by the chat template:\n"
        "  row 1 (id 'a'): the chat template refuses it: a user must begin\n"
        "  row 3 (id 'c'): the chat template refuses it: a user must begin"
    )
    with pytest.raises(DataError) as error:
        tokenize(examples_from_rows([chat("Hello", "no", id="a")]), make_tokenizer(template=silent))
    assert "row 1 (id 'a'): the chat template does not print the last message" in str(error.value)


def test_kinds_of_rows_may_be_mixed():
    tokenizer = make_tokenizer(template=CHAT, added="<bos> $A")
    rows = [
        pair(),
        chat("Hello", "yes"),
        {"text": "Paris"},
        pair(completion=" Rome"),
        chat("Hello", "no"),
    ]
    together = tokenize(examples_from_rows(rows), tokenizer)
    for row, tokens in zip(rows, together, strict=True):
        alone = tokens_of(row, tokenizer)
        assert alone.input_ids.tolist() == tokens.input_ids.tolist()
        assert alone.supervised.tolist() == tokens.supervised.tolist()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_rows_are_tokenised_in_parts_as_in_one(at_once, monkeypatch):
    """Tokens, numbers of rows in errors, and counts in warnings, whatever a part holds."""
    tokenizer = make_tokenizer(template=CHAT, added="<bos> $A")
    rows = [pair(id="a"), chat("Hello", "yes"), {"text": "Paris"}, pair("<bos>Q", " Rome", id="d")]
    rows.append({"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]})
    whole = tokenize(examples_from_rows(rows[:3] + rows[4:]), tokenizer)
    monkeypatch.setattr(tokens_module, "_ROWS_PER_CALL", at_once)
    parts = tokenize(examples_from_rows(rows[:3] + rows[4:]), tokenizer)
    assert (parts.digest, parts.ids) == (whole.digest, whole.ids)
    long = [pair("Q:", " yes", id="a"), pair("Q:", " The capital of France", id="b")] * 2
    long = examples_from_rows({**row, "id": str(number)} for number, row in enumerate(long))
    needed = int(tokenize(long, tokenizer).lengths.max())
    with pytest.warns(UserWarning, match=f"^2 of 4 rows are longer .* max_length={needed} keeps"):
        assert tokenize(long, tokenizer, max_length=needed - 1).cut == [False, True, False, True]
    refused = [pair(id="a"), chat("Hello", "yes", id="b"), chat("", "no", id="c"), pair(id="d")]
    refused += [chat("", "no", id="e")]
    template = "{% if not messages[0]['content'] %}{{ raise_exception('empty') }}{% endif %}" + CHAT
    with pytest.raises(DataError, match="2 of 5 rows cannot be rendered") as error:
        tokenize(examples_from_rows(refused), make_tokenizer(template=template))
    assert [(row.number, row.id) for row in error.value.rows] == [(3, "c"), (5, "e")]
    with pytest.warns(UserWarning, match="^1 of 5 rows begin with <bos>"):
        tokenize(examples_from_rows(rows), tokenizer)
    bad = [pair("Q:", " yes", id="a"), {"input_ids": [4], "id": "b"}, {"input_ids": [5], "id": "c"}]
    with pytest.raises(DataError, match="2 of 3 rows have no supervised token") as error:
        tokenize(examples_from_rows(bad), make_tokenizer())
    assert [row.number for row in error.value.rows] == [2, 3]


def test_rows_are_data_and_never_evaluated():
    tokenizer = make_tokenizer(template=CHAT)
    tokens = tokens_of(chat("{{ 7 * 7 }}", "{% if true %}yes{% endif %}"), tokenizer)
    assert targets(tokens, tokenizer) == "{% if true %}yes{% endif %}<|end|>\n"
    assert "{{ 7 * 7 }}" in context(tokens, tokenizer)


def test_truncation_keeps_the_left_and_says_how_many_rows_lose_targets(tokenizer):
    examples = examples_from_rows(
        [pair("Q:", " yes", id="a"), pair("Q:", " The capital of France", id="b")]
    )
    whole = tokenize(examples, tokenizer)
    assert whole.truncated == 0
    limit = int(whole.lengths[1]) - 2
    assert whole.lengths[0] <= limit
    with pytest.warns(UserWarning, match="lose supervised tokens") as seen:
        cut = tokenize(examples, tokenizer, max_length=limit)
    assert [str(warning.message) for warning in seen] == [
        f"1 of 2 rows are longer than max_length={limit} and lose supervised tokens at their end; "
        f"max_length={limit + 2} keeps them all"
    ]
    assert cut.truncated == 1
    assert cut.select([0]).truncated == 0
    assert cut[1:].truncated == 1
    assert cut[1].input_ids.tolist() == whole[1].input_ids[:limit].tolist()
    assert cut[1].supervised.tolist() == whole[1].supervised[:limit].tolist()
    assert cut.counts.tolist() == [whole.counts[0], whole.counts[1] - 2]
    # Exactly long enough: no warning (warnings are errors here), nothing lost.
    assert tokenize(examples, tokenizer, max_length=limit + 2).truncated == 0


def test_rows_that_lose_every_target_are_all_listed(tokenizer):
    prompt = "The capital of France is Paris." * 4
    examples = examples_from_rows(
        [
            pair(prompt, " yes", id="a"),
            pair("Q:", " yes", id="b"),
            pair(prompt, " The capital of", id="c"),
        ]
    )
    whole = tokenize(examples, tokenizer)
    (a, _, c), (ta, _, tc) = whole.lengths, whole.counts
    assert a - ta == c - tc >= 8
    with pytest.raises(DataError) as error:
        tokenize(examples, tokenizer, max_length=8)
    assert str(error.value) == (
        "2 of 3 rows have no supervised token (TRL drops rows that are cut so: leave them out "
        "here too):\n"
        f"  row 1 (id 'a'): max_length=8 cuts off all {ta} supervised tokens of its {a}; "
        f"max_length={a - ta + 1} keeps the first of them, max_length={a} all\n"
        f"  row 3 (id 'c'): max_length=8 cuts off all {tc} supervised tokens of its {c}; "
        f"max_length={c - tc + 1} keeps the first of them, max_length={c} all"
    )
    # What the message promises holds: the first length that is enough, and one less is not.
    with pytest.warns(UserWarning, match="2 of 3 rows are longer"):
        enough = tokenize(examples, tokenizer, max_length=int(a - ta + 1))
    assert enough.counts.tolist()[0] == 1
    with pytest.raises(DataError, match="2 of 3 rows"):
        tokenize(examples, tokenizer, max_length=int(a - ta))


def test_rows_without_any_target_are_listed():
    tokenizer = make_tokenizer(eos=None, template="<|user|> the capital<|end|>")  # whatever is said
    with pytest.raises(DataError) as error:
        tokenize(examples_from_rows([chat("Hello", "yes", "Paris", "Paris", id="a")]), tokenizer)
    assert str(error.value) == (
        "1 of 1 rows have no supervised token:\n  row 1 (id 'a'): none of its 4 tokens lies after "
        "its prompt"
    )
    with (
        pytest.warns(UserWarning, match="no end-of-sequence"),
        pytest.raises(DataError, match="it becomes 1 token, and a first token is never a target"),
    ):
        tokenize(examples_from_rows([{"text": "a"}]), tokenizer)


@pytest.mark.parametrize("max_length", [1, 0, -3])
def test_a_max_length_without_room_for_a_target_is_refused(tokenizer, max_length):
    with pytest.raises(DataError, match=f"max_length is {max_length}; it must be at least 2"):
        tokenize(examples_from_rows([pair()]), tokenizer, max_length=max_length)


def test_tokenizer_state_does_not_leak_in(tokenizer):
    expected = tokens_of(pair(), tokenizer).input_ids.tolist()
    tokenizer([pair()["prompt"]], truncation=True, max_length=3, padding="max_length")
    assert tokens_of(pair(), tokenizer).input_ids.tolist() == expected


class Counting(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args, **options):
        type(self).calls += 1
        return super().__call__(*args, **options)


@pytest.mark.slow
def test_twenty_thousand_rows_take_few_calls_and_seconds():
    tokenizer = make_tokenizer(cls=Counting)
    rows = [
        pair(f"Q: What is the capital of {i}? A:", f" The capital of {i} is Paris.")
        for i in range(20_000)
    ]
    started = time.perf_counter()
    tokens = tokenize(examples_from_rows(rows), tokenizer)
    batches = plan_batches(tokens, 8192)
    elapsed = time.perf_counter() - started
    assert Counting.calls <= 20
    assert elapsed < 15  # about 2 s on two idle cores; row by row takes several times as long
    assert sum(map(len, batches)) == len(tokens) == 20_000
    for i in (0, 2047, 2048, 19_999):  # each row kept its own tokens across the calls
        assert targets(tokens[i], tokenizer) == f" The capital of {i} is Paris.<eos>"


def test_the_tokenizer_digest_sees_what_changes_tokens():
    digest = tokenizer_digest(make_tokenizer())
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert tokenizer_digest(make_tokenizer()) == digest
    rules = json.loads(BACKEND)
    merges = rules["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    others = {
        "chat template": make_tokenizer(template=CHAT),
        "another template": make_tokenizer(template=THINKING),
        "adds <bos>": make_tokenizer(added="<bos> $A"),
        "pads with <eos>": make_tokenizer(pad="<eos>"),
        "no <eos>": make_tokenizer(eos=None),
        "order of merges": make_tokenizer(backend=json.dumps(rules)),
        "other words": make_tokenizer(backend=trained(["entirely other words, entirely"]).to_str()),
    }
    digests = {name: tokenizer_digest(other) for name, other in others.items()}
    assert len({digest, *digests.values()}) == 1 + len(others), digests


def test_the_tokenizer_digest_ignores_class_and_state(tokenizer, tmp_path):
    digest = tokenizer_digest(tokenizer)
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer(["a", "b"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.to_str() != before  # the state is in there
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.padding_side = "left"
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_digest(make_tokenizer(cls=Counting)) == digest
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == digest


def test_tokens_lie_in_flat_arrays():
    """They come back as they were given, and take nine bytes each beside 50 bytes a row."""
    rng, given = np.random.default_rng(0), []
    for length in rng.integers(2, 30, 2000).tolist():
        documents = np.arange(length) % 5 if length % 7 == 0 else None
        given.append(Tokens(rng.integers(0, 2**31, length), rng.random(length) < 0.5, documents))
    plain = [Tokens(row.input_ids, row.supervised) for row in given]
    tracemalloc.start()
    tokens = TokenizedExamples(plain, ids := [""] * len(plain))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.2 * 9 * tokens.lengths.sum() + 50 * len(given)
    joined = TokenizedExamples.joined([tokens[:0], TokenizedExamples(given, ids), tokens[:10]])
    assert len(joined) == 2010
    for found, row in zip(joined, [*given, *plain[:10]], strict=True):
        for name in ("input_ids", "supervised", "position_ids"):
            np.testing.assert_array_equal(getattr(found, name), getattr(row, name))
    assert joined[-1].input_ids.tolist() == plain[9].input_ids.tolist()
    with pytest.raises(IndexError):
        joined[2010]
    joined[3].supervised[0] = joined[3].input_ids[0] = 1  # of both a view
    assert (joined[3].input_ids[0], joined[3].supervised[0]) == (1, True)
    wrong = Tokens(np.array([1, 2]), np.array([False, True, True]))
    with pytest.raises(
        DataError, match=r"tokens number 2 are of the shape \(2,\), and their targets"
    ):
        TokenizedExamples([plain[0], wrong], ["a", "b"])


def test_tokenized_examples_are_a_sliceable_sequence():
    tokens = random_tokens(1)
    part = tokens.select([7, 3])
    assert part.ids == ["r7", "r3"]
    assert part.lengths.tolist() == tokens.lengths[[7, 3]].tolist()
    assert part.counts.tolist() == [
        int(tokens[7].supervised.sum()),
        int(tokens[3].supervised.sum()),
    ]
    assert tokens[2:5].ids == ["r2", "r3", "r4"]
    assert tokens.counts.dtype == tokens.lengths.dtype == np.int64
    nothing = tokenize(Examples(), make_tokenizer())
    assert (len(nothing), nothing.lengths.shape) == (0, (0,))


@pytest.mark.skipif(
    "LORA_INFLUENCE_TESTBED" not in os.environ, reason="LORA_INFLUENCE_TESTBED is not set"
)
def test_the_testbed_tokenises():
    from transformers import AutoTokenizer

    folder = Path(os.environ["LORA_INFLUENCE_TESTBED"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    examples = read_examples(folder / "train.jsonl")
    assert len(examples) == 200
    tokens = tokenize(examples, tokenizer)
    for example, row in zip(examples, tokens, strict=True):
        assert targets(row, tokenizer) == example.completion + tokenizer.eos_token
        assert context(row, tokenizer) == example.prompt
