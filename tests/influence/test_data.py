"""Reading, rendering, label masks, truncation, batches and digests, on tiny tokenizers trained here."""

from __future__ import annotations

import json
import os
import pickle
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from influence.batches import collate, plan_batches
from influence.errors import DataError
from influence.rows import Example, Examples, examples_from_rows, read_examples
from influence.tokens import TokenizedExamples, Tokens, tokenize, tokenizer_digest

CORPUS = [
    "Q: What is the capital of France? A: The capital of France is Paris.",
    "Q: What is the capital of Italy? A: The capital of Italy is Rome.",
    "user assistant system end Hello there, the answer is yes.",
]
SPECIALS = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The generation prompt opens a thought that a finished answer does not have; the answer is stripped.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def trained(corpus=CORPUS, vocab=420) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


BACKEND = trained().to_str()


def make_tokenizer(
    *,
    template=None,
    added="$A",
    pad="<pad>",
    eos="<eos>",
    backend=BACKEND,
    cls=PreTrainedTokenizerFast,
):
    """Wrap a copy of the trained backend; `added` says which special tokens it adds by itself."""
    backend = Tokenizer.from_str(backend)
    backend.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer = cls(tokenizer_object=backend, pad_token=pad, bos_token="<bos>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def pair(
    prompt="Q: What is the capital of France? A:",
    completion=" The capital of France is Paris.",
    **more,
):
    return {"prompt": prompt, "completion": completion, **more}


def chat(*turns, **more):
    roles = (
        ["user", "assistant"] * len(turns)
        if len(turns) % 2 == 0
        else ["assistant", "user"] * len(turns)
    )
    return {
        "messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)],
        **more,
    }


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


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ examples


def test_examples_are_a_sliceable_sequence_with_ids_and_digest():
    examples = examples_from_rows(
        [pair(id=f"a{i}", completion=f" {i}", group="g") for i in range(5)]
    )
    assert len(examples) == 5
    assert examples.ids == ["a0", "a1", "a2", "a3", "a4"]
    assert isinstance(examples[1:3], Examples)
    assert examples[1:3].ids == ["a1", "a2"]
    assert examples[-1].completion == " 4"
    assert examples.select(np.array([4, 0, 4])).ids == ["a4", "a0", "a4"]
    assert examples.index("a3") == 3
    assert "a3" in examples
    assert "b3" not in examples
    assert examples[::1] == examples
    assert examples[1:] != examples
    assert pickle.loads(pickle.dumps(examples)).digest == examples.digest


def test_an_unknown_id_names_the_nearest():
    examples = examples_from_rows([pair(id="train-017"), pair(id="train-018"), pair(id="zebra")])
    with pytest.raises(DataError) as error:
        examples.index("train-07")
    assert str(error.value) == (
        "no example has the id 'train-07', among 3; the nearest are 'train-017', 'train-018'"
    )
    with pytest.raises(
        DataError, match=re.escape("no example has the id '???', among 3; there are 'train-017'")
    ):
        examples.index("???")


def test_the_digest_sees_id_group_content_and_order_and_nothing_else():
    rows = [pair(id="a", group="g", note=1), pair(id="b", completion=" no")]
    digest = examples_from_rows(rows).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert examples_from_rows([{**rows[0], "note": 2}, rows[1]]).digest == digest
    changed = [
        [{**rows[0], "id": "c"}, rows[1]],
        [{**rows[0], "group": "h"}, rows[1]],
        [{**rows[0], "group": None}, rows[1]],
        [{**rows[0], "completion": " yes"}, rows[1]],
        rows[::-1],
        rows[:1],
    ]
    assert len({digest, *(examples_from_rows(other).digest for other in changed)}) == 1 + len(
        changed
    )


def test_the_content_hash_is_of_the_content_alone():
    base = Example("a", prompt="p", completion="c")
    # printf '%s' '{"completion":"c","prompt":"p"}' | sha256sum
    assert base.content_hash == "f99316a91c82852d"
    assert Example("b", group="g", prompt="p", completion="c").content_hash == base.content_hash
    # The boundary is part of the content: the same string split elsewhere is another example.
    assert Example("a", prompt="pc", completion="").content_hash != base.content_hash
    assert Example("a", text="pc").content_hash != base.content_hash
    one, other = ({"role": "assistant", "content": "x"}, {"content": "x", "role": "assistant"})
    assert (
        Example("a", messages=(one,)).content_hash == Example("a", messages=(other,)).content_hash
    )


@pytest.mark.parametrize(
    "content", [{}, {"prompt": "p"}, {"text": "t", "prompt": "p"}, {"messages": ()}]
)
def test_an_example_has_exactly_one_kind_of_content(content):
    with pytest.raises(
        DataError, match="give it 'prompt' and 'completion', or 'messages', or 'text'"
    ):
        Example("a", **content)


def test_rows_without_id_get_their_hash_and_duplicates_a_number():
    name = examples_from_rows([pair()])[0].content_hash
    examples = examples_from_rows(
        [pair(), pair(completion=" other"), pair(), pair(id="mine"), pair()]
    )
    assert [examples.ids[i] for i in (0, 2, 3, 4)] == [name, f"{name}#2", "mine", f"{name}#3"]
    assert len(set(examples.ids)) == 5
    # An explicit id keeps its name, wherever it stands in the file.
    assert examples_from_rows([pair(), pair(), pair(id=f"{name}#2")]).ids == [
        name,
        f"{name}#3",
        f"{name}#2",
    ]
    assert examples_from_rows([pair(), pair(id=name)]).ids == [f"{name}#2", name]


def test_integer_ids_and_groups_become_strings():
    example = examples_from_rows([pair(id=7, group=np.int64(3))])[0]
    assert (example.id, example.group) == ("7", "3")


@pytest.mark.parametrize("width", [20, 33, 60])
def test_a_preview_is_one_short_line(width):
    for row in (
        pair("a\nb\x1b[2J " * 20, "c d " * 30),
        pair("short?", "c d " * 30),
        {"text": "one\ttwo\n" * 40},
        chat("why?\n" * 30, "because"),
        chat("only the assistant speaks"),
    ):
        preview = examples_from_rows([row])[0].preview(width)
        assert len(preview) <= width
        assert preview.isprintable()
    assert examples_from_rows([pair("Who?\nA:", " Me.")])[0].preview() == "Who? A: → Me."
    assert examples_from_rows([chat("x", "y", "Who?", "Me.")])[0].preview() == "Who? → Me."
    # A long prompt leaves room for the answer.
    assert examples_from_rows([pair("word " * 50, " Me.")])[0].preview(30).endswith("… → Me.")


# ------------------------------------------------------------------------------------------------ reading

FORMS = "'prompt' and 'completion', or 'messages', or 'text'"
BAD_ROWS = [
    ("just text", f"not an object but a string; expected an object with {FORMS}"),
    ([1, 2], f"not an object but a list; expected an object with {FORMS}"),
    (None, f"not an object but null; expected an object with {FORMS}"),
    (
        {"question": "q", "id": "x"},
        f"has no content, only the keys 'question', 'id'; expected {FORMS}",
    ),
    ({}, f"has no content, only the keys (none); expected {FORMS}"),
    ({"prompt": "p"}, "has 'prompt' but no 'completion'"),
    ({"completion": "c"}, "has 'completion' but no 'prompt'"),
    ({"prompt": 3, "completion": "c"}, "'prompt' must be a string, not an integer"),
    ({"prompt": "p", "completion": True}, "'completion' must be a string, not a boolean"),
    ({"prompt": "p", "completion": ""}, "'completion' is empty; there is nothing to supervise"),
    (
        {"prompt": "p", "completion": "\ud83d"},
        "'completion' holds a lone surrogate, which is not text",
    ),
    (
        {
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "c"}],
        },
        "'prompt' is a conversation, not a string; put all its turns in 'messages'",
    ),
    (
        {"prompt": "p", "completion": "c", "text": "t"},
        f"is ambiguous, with 'prompt', 'completion', 'text'; keep one of: {FORMS}",
    ),
    (
        {"prompt": "p", "messages": []},
        f"is ambiguous, with 'prompt', 'messages'; keep one of: {FORMS}",
    ),
    ({"text": ""}, "'text' is empty; there is nothing to supervise"),
    ({"text": ["t"]}, "'text' must be a string, not a list"),
    ({"messages": "hello"}, "'messages' must be a list, not a string"),
    ({"messages": []}, "'messages' is empty; expected turns of which the last is the assistant's"),
    ({"messages": ["hello"]}, "message 1 must be an object, not a string"),
    ({"messages": [{"content": "c"}]}, "'role' of message 1 is missing"),
    ({"messages": [{"role": "assistant"}]}, "'content' of message 1 is missing"),
    (
        {"messages": [{"role": "user", "content": 1.5}, {"role": "assistant", "content": "c"}]},
        "'content' of message 1 must be a string, not a number",
    ),
    (
        {"messages": [{"role": "assistant", "content": ""}]},
        "'content' of message 1 is empty; there is nothing to supervise",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}]},
        "the last message is by 'user'; it must be by 'assistant'",
    ),
    (pair(id=1.5), "'id' must be a string or an integer, not a number"),
    (pair(id=False), "'id' must be a string or an integer, not a boolean"),
    (pair(id=""), "'id' is empty; leave it out or give it a value"),
    (pair(id="a\0b"), "'id' holds a NUL or a lone surrogate, which no score file can store"),
    (pair(group=["g"]), "'group' must be a string or an integer, not a list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_every_reason_a_row_cannot_be_used(row, reason):
    with pytest.raises(DataError) as error:
        examples_from_rows([pair(), row])
    (bad,) = error.value.rows
    assert (bad.number, bad.reason) == (2, reason)
    assert str(error.value).startswith("1 of 2 rows cannot be used:\n  row 2")


def test_all_bad_rows_are_listed_at_once(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(id="good"), *(row for row, _ in BAD_ROWS)])
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert [bad.reason for bad in error.value.rows] == [reason for _, reason in BAD_ROWS]
    assert str(error.value).splitlines()[0] == (
        f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 1} rows of {path} cannot be used:"
    )
    assert "  row 5 (id 'x'): has no content" in str(error.value)


def test_an_explicit_id_may_not_repeat():
    with pytest.raises(DataError) as error:
        examples_from_rows([pair(id="a"), pair(id=1), pair(id="1"), pair(id="a", completion=" x")])
    assert [(bad.number, bad.id) for bad in error.value.rows] == [(3, "1"), (4, "a")]
    assert error.value.rows[1].reason == (
        "its id is already that of row 1; ids must differ: use `group` for what several rows share"
    )


def test_json_lines_are_numbered_as_an_editor_numbers_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(pair(completion=" caf\u00e9 \u2028 two"), ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"prompt": "p",}',
        good,
        b'{"text": "\xff"}',
        b"[" * 100_000,
        good,
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        read_examples(path)
    numbers, reasons = zip(*((bad.number, bad.reason) for bad in error.value.rows), strict=True)
    assert numbers == (3, 5, 6)
    assert reasons[0].startswith("not JSON (")
    assert reasons[0].endswith(", at character 16)")
    assert reasons[1] == "not UTF-8 (byte 11: invalid start byte)"
    assert reasons[2].startswith("not JSON")
    path.write_bytes(b"\n".join([lines[0], b"", good]))
    assert [row.completion for row in read_examples(path)] == [" caf\u00e9 \u2028 two"] * 2


def test_files_that_cannot_be_read_say_what_to_give(tmp_path):
    formats = "a .jsonl, .json or .parquet file, or a folder saved by Dataset.save_to_disk"
    missing = tmp_path / "none.jsonl"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt,completion\n")
    array = tmp_path / "array.json"
    array.write_text(json.dumps([pair()], indent=1))
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and then nothing")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, message in (
        (missing, f"{missing} does not exist; give {formats}"),
        (empty, f"there are no rows of {empty}; give at least one"),
        (csv, f"{csv} has the suffix '.csv', which is not read; give {formats}"),
        (array, f"{array} starts with '[': one JSON array; write one JSON object per line instead"),
        (damaged, f"{damaged} is not a readable Parquet file: "),
        (
            folder,
            f"{folder} is a folder without a saved dataset (it has no state.json); give {formats}",
        ),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            read_examples(path)
    with pytest.raises(DataError, match="there are no rows; give at least one"):
        examples_from_rows([])
    with pytest.raises(DataError, match="expected an iterable of rows, got one dict"):
        examples_from_rows(pair())


def test_parquet_and_a_datasets_folder_equal_json_lines(tmp_path):
    from datasets import Dataset, DatasetDict, Features, List, Value

    pairs = [pair(id=f"p{i}", completion=f" {i}", group=f"g{i % 2}", note=i) for i in range(2500)]
    chats = [chat(f"hello {i}", "yes") for i in range(3)]
    chats[1]["messages"][0]["name"] = (
        "ann"  # the other rows get a null here, which is no name at all
    )
    mixed = [pair(), {"text": "only text"}, pair()]  # nulls in every row, and duplicates
    message = {"role": Value("string"), "content": Value("string"), "name": Value("string")}
    kinds = {
        "pairs": (pairs, None),
        "chats": (chats, Features({"messages": List(message)})),
        "mixed": (
            mixed,
            Features({key: Value("string") for key in ("prompt", "completion", "text")}),
        ),
    }
    for kind, (rows, features) in kinds.items():
        expected = read_examples(write_jsonl(tmp_path / f"{kind}.jsonl", rows))
        assert len(expected) == len(rows)
        assert expected.source == str((tmp_path / f"{kind}.jsonl").resolve())
        keys = list(features) if features else list(rows[0])
        full = [{key: row.get(key) for key in keys} for row in rows]
        if kind == "chats":
            full = [{"messages": [{"name": None, **m} for m in row["messages"]]} for row in full]
        dataset = Dataset.from_list(full, features=features)
        dataset.to_parquet(tmp_path / f"{kind}.parquet")
        dataset.save_to_disk(tmp_path / kind)
        for other in (read_examples(tmp_path / f"{kind}.parquet"), read_examples(tmp_path / kind)):
            assert other == expected
            assert other.digest == expected.digest
        DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / f"{kind}-splits")

    splits = tmp_path / "pairs-splits"
    with pytest.raises(DataError) as error:
        read_examples(splits)
    assert str(error.value) == (
        f"{splits} is a DatasetDict with the splits 'train', 'test'; give one of them, for example {splits / 'train'}"
    )
    assert len(read_examples(splits / "train")) == 2500
    Dataset.from_list([{"question": "q"}]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=re.escape(f"has the columns 'question'; expected {FORMS}")):
        read_examples(tmp_path / "other.parquet")


# ------------------------------------------------------------------------------------------------ tokenising


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


@pytest.mark.parametrize("added", ["<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_special_tokens_the_tokenizer_adds_itself(added):
    tokenizer = make_tokenizer(added=added)
    begin = "<bos>" * added.startswith("<bos>")
    tokens = tokens_of(pair(), tokenizer)
    assert context(tokens, tokenizer) == begin + pair()["prompt"]
    assert targets(tokens, tokenizer) == pair()["completion"] + "<eos>"  # one end, whoever adds it
    empty = tokens_of(pair("", "Paris"), tokenizer)
    assert tokenizer.decode(empty.input_ids) == begin + "Paris<eos>"
    assert empty.supervised.sum() == len(empty) - 1
    text = tokens_of({"text": "Paris"}, tokenizer)
    assert text.input_ids.tolist() == empty.input_ids.tolist()
    assert text.supervised.tolist() == empty.supervised.tolist()


def test_an_end_written_in_the_row_is_not_doubled(tokenizer):
    tokens = tokens_of(pair(completion=" Paris.<eos>"), tokenizer)
    assert targets(tokens, tokenizer) == " Paris.<eos>"


@pytest.mark.parametrize("added", ["$A", "$A <eos>"])
def test_a_completion_that_becomes_no_tokens_still_ends(added):
    rules = json.loads(BACKEND)
    rules["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    tokenizer = make_tokenizer(added=added, backend=json.dumps(rules))
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


# ------------------------------------------------------------------------------------------------ chats


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
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if m['role'] == 'assistant' and 'Paris' not in m['content'] %}<think></think>{% endif %}"
        "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
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
        "1 of 2 rows have messages, but the tokenizer has no chat template; set tokenizer.chat_template, "
        "load a tokenizer saved with one, or give the rows as prompt and completion"
    )


def test_conversations_a_template_refuses_are_listed():
    picky = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('a user must begin') }}{% endif %}"
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


def test_rows_are_data_and_never_evaluated():
    tokenizer = make_tokenizer(template=CHAT)
    tokens = tokens_of(chat("{{ 7 * 7 }}", "{% if true %}yes{% endif %}"), tokenizer)
    assert targets(tokens, tokenizer) == "{% if true %}yes{% endif %}<|end|>\n"
    assert "{{ 7 * 7 }}" in context(tokens, tokenizer)


# ------------------------------------------------------------------------------------------------ truncation


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
        "2 of 3 rows have no supervised token:\n"
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
        "1 of 1 rows have no supervised token:\n  row 1 (id 'a'): none of its 4 tokens lies after its prompt"
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


# ------------------------------------------------------------------------------------------------ digests


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


# ------------------------------------------------------------------------------------------------ batches


def random_tokens(seed: int, n: int = 200, longest: int = 90) -> TokenizedExamples:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(2, longest, size=n):
        supervised = np.arange(length) >= rng.integers(1, length)
        rows.append(Tokens(rng.integers(5, 100, size=length), supervised))
    return TokenizedExamples(rows, [f"r{i}" for i in range(n)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("budget", "max_rows"), [(1, None), (64, None), (500, None), (500, 3), (10**6, None)]
)
def test_batches_hold_every_index_once_within_the_budget(seed, budget, max_rows):
    tokens = random_tokens(seed)
    batches = plan_batches(tokens, budget, max_rows=max_rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(tokens)))
    sizes = []
    for batch in batches:
        assert batch.dtype == np.int64
        padded = len(batch) * int(tokens.lengths[batch].max())
        assert padded <= budget or len(batch) == 1
        assert max_rows is None or len(batch) <= max_rows
        sizes.append(padded)
    assert sizes == sorted(sizes, reverse=True)  # memory runs out at the first batch or never
    # Rows of a batch are neighbours in length: lengths do not interleave between batches.
    spans = sorted((tokens.lengths[batch].min(), tokens.lengths[batch].max()) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    again = plan_batches(tokens, budget, max_rows=max_rows)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_batches_are_as_full_as_the_budget_allows():
    tokens = random_tokens(0)
    assert len(plan_batches(tokens, 10**6)) == 1
    # A fifth more than without any padding: what a row too many, and the last batch, leave empty.
    assert len(plan_batches(tokens, 900)) <= 1.2 * tokens.lengths.sum() / 900 + 1
    assert [len(batch) for batch in plan_batches(tokens, 10**6, max_rows=150)] == [150, 50]


def test_batches_refuse_nonsense_and_accept_nothing():
    with pytest.raises(DataError, match="token_budget is 0; it must be at least 1"):
        plan_batches(random_tokens(0), 0)
    with pytest.raises(DataError, match="max_rows is -1; it must be at least 1"):
        plan_batches(random_tokens(0), 10, max_rows=-1)
    assert plan_batches(random_tokens(0)[:0], 10) == []


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_batch_pads_on_either_side(padding):
    rows = [
        Tokens(np.array([5, 6, 7]), np.array([False, True, True])),
        Tokens(np.array([8, 9, 10, 11, 12]), np.array([False, False, False, True, True])),
    ]
    batch = collate(TokenizedExamples(rows, ["a", "b"]), [1, 0], pad_id=99, padding=padding)
    left = padding == "left"
    assert batch.indices.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [
        [8, 9, 10, 11, 12],
        [99, 99, 5, 6, 7] if left else [5, 6, 7, 99, 99],
    ]
    assert batch.attention_mask.tolist() == [[1] * 5, [0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0]]
    assert batch.supervised.tolist() == [
        [False, False, False, True, True],
        [False, False, False, True, True] if left else [False, True, True, False, False],
    ]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.position_ids[1][batch.attention_mask[1] == 1].tolist() == [0, 1, 2]
    assert 0 <= int(batch.position_ids.min()) <= int(batch.position_ids.max()) < 5
    integers = (batch.input_ids, batch.attention_mask, batch.position_ids)
    assert all(tensor.dtype == torch.int64 for tensor in integers)
    assert batch.supervised.dtype == torch.bool


def test_a_batch_moves_to_a_device():
    batch = collate(random_tokens(0), [0, 1], device="meta")
    assert batch.input_ids.device.type == batch.supervised.device.type == "meta"
    moved = collate(random_tokens(0), [0, 1]).to(torch.device("meta"))
    fields = ("input_ids", "attention_mask", "supervised", "position_ids")
    assert all(getattr(moved, name).device.type == "meta" for name in fields)


def test_collate_refuses_nonsense():
    with pytest.raises(DataError, match="at least one index"):
        collate(random_tokens(0), [])
    with pytest.raises(DataError, match="padding is 'middle'"):
        collate(random_tokens(0), [0], padding="middle")


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


# ------------------------------------------------------------------------------------------------ the testbed


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
