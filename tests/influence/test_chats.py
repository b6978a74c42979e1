"""Which tokens of a conversation are targets: turns, prompts, flags, and templates of all kinds.

That tokens and labels are TRL's is tested in `test_trl_equality.py`.
"""

from __future__ import annotations

import re

import pytest

from influence.errors import DataError, InputError
from influence.rows import examples_from_rows
from influence.tokens import Rendering, Tokens, tokenize
from tests.influence.test_tokens import Slow
from tests.influence.toy_tokenizers import CHAT, THINKING, chat, make_tokenizer, pair

#: Drops the thoughts of all turns but the last, as Qwen 3 does, and ends a conversation otherwise
#: than one that goes on, as Phi 3 does.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
#: Has no generation prompt.
PROMPTLESS = "{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }}\n{% endfor %}"
#: Writes calls after what is said, and a call alone without what is said.
CALLING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] %}call {{ c['function']['name'] }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = chat("Hi", "yes", "Sure?", "end", "user?", "no")


def tokens_of(row, template=CHAT, supervise="assistant", **options) -> tuple[Tokens, object]:
    tokenizer = make_tokenizer(template=template, **options)
    (tokens,) = tokenize(examples_from_rows([row]), tokenizer, supervise=supervise)
    return tokens, tokenizer


def targets(row, template=CHAT, supervise="assistant") -> str:
    """The decoded targets, with a bar between those that are no neighbours."""
    tokens, tokenizer = tokens_of(row, template, supervise)
    text, last = "", None
    for place in tokens.supervised.nonzero()[0].tolist():
        text += "|" * (last is not None and place != last + 1)
        text += tokenizer.decode(tokens.input_ids[place : place + 1])
        last = place
    return text


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHAT, "yes<|end|>\n|end<|end|>\n|no<|end|>\n"),
        (THINKING, "yes<|end|>\n|end<|end|>\n|no<|end|>\n"),
        (FORGETFUL, "yes<|end|>\n|end<|end|>\n|no<|end|>\n<eos>"),
    ],
)
def test_every_assistant_turn_with_its_end(template, said):
    assert targets(TALK, template) == said
    assert targets(TALK, template, "last") == said.split("|end<")[-1].split("\n|")[-1]


def test_thoughts_that_the_template_drops_are_no_targets():
    row = chat("Hi", "<think>a</think>yes", "Sure?", "<think>b</think>no")
    assert targets(row, FORGETFUL) == "yes<|end|>\n|<think>b</think>no<|end|>\n<eos>"


def test_a_template_without_a_generation_prompt():
    row = chat("Hi", "yes", "Sure?", "no")
    assert targets(row, PROMPTLESS) == "[assistant]: yes\n|[assistant]: no\n"


def test_turns_that_only_call_a_tool():
    call = [{"type": "function", "function": {"name": "Paris"}}]
    turns = [*chat("Hi", "yes")["messages"], {"role": "user", "content": "go"}]
    turns += [{"role": "assistant", "tool_calls": call}, {"role": "tool", "content": "6"}]
    turns += [{"role": "assistant", "content": "is", "tool_calls": call}]
    row = {"messages": turns}
    said = "yes<|end|>\n|call Paris<|end|>\n|iscall Paris<|end|>\n"
    assert targets(row, CALLING) == said
    assert targets({"messages": turns[:4]}, CALLING, "last") == "call Paris<|end|>\n"


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"weight": 0}, {"loss": False}, {"weight": 0.0}]
)
def test_turns_that_are_marked_are_no_targets(flag):
    row = {"messages": [dict(turn) for turn in TALK["messages"]]}
    row["messages"][3] |= flag
    assert targets(row) == "yes<|end|>\n|no<|end|>\n"
    assert targets(row, supervise="last") == "no<|end|>\n"
    assert targets(row, supervise="all") == targets(TALK, supervise="all")
    two = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    assert "|" in targets(two, supervise="last")
    row["messages"][5] |= flag
    with pytest.raises(DataError, match="all turns that are taken are marked as no targets"):
        targets(row, supervise="last")
    row["messages"][5] |= {"train": True, "weight": 1, "loss": True}
    assert targets(row) == "yes<|end|>\n|no<|end|>\n"


def test_a_weight_between_no_and_one_is_refused():
    row = {
        "messages": [*TALK["messages"][:3], {"role": "assistant", "content": "a", "weight": 0.5}]
    }
    with pytest.raises(DataError, match=r"message 4 has the weight 0.5; only 0 and 1"):
        targets(row)


def test_marks_of_the_template_decide():
    marked = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}"
        "{% endif %}<|end|>\n{% endfor %}"
    )
    assert targets(TALK, marked) == "yes|end|no"
    tokens, tokenizer = tokens_of(TALK, marked)
    assert tokenizer.decode(tokens.input_ids).endswith("<|assistant|>no")  # nothing after it


def test_tools_and_arguments_of_a_row_reach_the_template():
    template = (
        "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}{{ mode }}" + CHAT
    )
    tool = {"type": "function", "function": {"name": "Rome"}}
    row = {**chat("Hi", "yes"), "tools": [tool], "chat_template_kwargs": {"mode": "Italy"}}
    for supervise in ("last", "assistant", "all"):
        tokens, tokenizer = tokens_of(row, template, supervise)
        assert tokenizer.decode(tokens.input_ids).startswith("Rome Italy<|user|>Hi")
    assert targets(row, template) == "yes<|end|>\n"


def test_a_completion_starts_where_its_prompt_ends():
    turns = TALK["messages"]
    two = {"prompt": turns[:3], "completion": turns[3:]}
    assert (
        targets(two, supervise="last")
        == "end<|end|>\n<|user|>user?<|end|>\n<|assistant|>no<|end|>\n"
    )
    assert targets(two) == "end<|end|>\n|no<|end|>\n"
    assert targets(two, supervise="all") == targets(TALK, supervise="all")
    whole, _ = tokens_of(two, supervise="all")
    assert whole.supervised.sum() == len(whole) - 1


def test_all_takes_prompts_of_strings_too():
    tokens, _ = tokens_of(pair("Q: ", "yes"), supervise="all")
    assert tokens.supervised.tolist() == [False] + [True] * (len(tokens) - 1)


def test_a_tokenizer_without_offsets_finds_the_turns_too():
    tokenizer = Slow()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    row = chat("hello", "yes", "sure", "no")
    (tokens,) = tokenize(examples_from_rows([row]), tokenizer, supervise="assistant")
    ids = tokens.input_ids[tokens.supervised].tolist()
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "yes no "


def test_a_note_says_where_the_last_turn_alone_may_not_be_the_trainers(capsys):
    rows = examples_from_rows([TALK, chat("Hi", "yes"), pair()])
    assert Rendering.of_trainer(rows, None, None) == Rendering(None, "last")
    said = capsys.readouterr().err
    assert re.search("note: 1 of 3 rows have several assistant turns, of which only the last", said)
    assert "--supervise all" in said
    for supervise in ("last", "assistant", "all"):
        assert Rendering.of_trainer(rows, 8, supervise) == Rendering(8, supervise)
    assert Rendering.of_trainer(rows[1:], None, None) == Rendering()
    two = {"prompt": TALK["messages"][:5], "completion": TALK["messages"][5:]}
    Rendering.of_trainer(examples_from_rows([two]), None, None)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="supervise 'some' was given; expected last, assistant or"):
        Rendering(None, "some")
