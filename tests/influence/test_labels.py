"""Supervised tokens are marked, whatever the row's own text says."""

from __future__ import annotations

import io
import json

from rich.console import Console

from influence.labels import marked, record
from influence.rows import examples_from_rows
from influence.tokens import Rendering
from tests.influence.toy_tokenizers import CHAT, chat, make_tokenizer, pair


def shown(rows, *, supervise="last", colour=False) -> str:
    tokenizer = make_tokenizer(template=CHAT)
    tokens = Rendering(None, supervise).tokenize(examples_from_rows(rows), tokenizer)
    page = Console(file=io.StringIO(), force_terminal=colour, no_color=not colour, width=200)
    page.print(marked(tokens, tokenizer), markup=False, highlight=False, soft_wrap=True)
    return page.file.getvalue()


def test_supervised_tokens_stand_in_brackets_without_colours():
    talk = chat("Hi", "yes", "Sure?", "no", id="a")
    head = "<|user|>Hi<|end|>\\n<|assistant|>"
    middle = "<|user|>Sure?<|end|>\\n<|assistant|>"
    assert shown([talk]).splitlines() == [
        "a: 4 of 21 tokens are supervised",
        f"{head}yes<|end|>\\n{middle}⟦no<|end|>\\n⟧",
    ]
    assert f"{head}⟦yes<|end|>\\n⟧{middle}⟦no<|end|>\\n⟧" in shown([talk], supervise="assistant")
    assert "<|user|>⟦Hi<|end|>" in shown([talk], supervise="all")
    assert shown([pair("Q:", " yes", id="b")]).splitlines()[1] == "Q:⟦ yes<eos>⟧"


def test_hostile_text_stays_text():
    row = pair("[bold]\x1b[2J⟦fake⟧\r", " [/bold]\x07\n", id="i\x1b[31m")
    plain = shown([row])
    assert "\x1b" not in plain
    assert "\r" not in plain
    assert plain.splitlines()[1] == ("[bold]\\x1b[2J\\u27e6fake\\u27e7\\r⟦ [/bold]\\x07\\n<eos>⟧")
    coloured = shown([row], colour=True)
    assert "\x1b[32m⟦ [/bold]" in coloured
    assert "\x1b[2J" not in coloured


def test_documents_of_a_row_stand_on_lines_of_their_own_and_a_program_gets_the_ids():
    row = {"id": "p", "input_ids": [10, 11, 12, 13, 14], "seq_lengths": [2, 3]}
    assert len(shown([row]).splitlines()) == 3
    tokenizer = make_tokenizer()
    rendering = Rendering(None, "all")
    tokens = rendering.tokenize(examples_from_rows([row]), tokenizer)
    found = json.loads(json.dumps(record(tokens, tokenizer, rendering)))
    assert (found["supervise"], found["max_length"]) == ("all", None)
    (entry,) = found["rows"]
    assert (entry["id"], entry["tokens"], entry["supervised_tokens"]) == ("p", 5, 3)
    flat = [[(p["supervised"], p["input_ids"]) for p in each] for each in entry["documents"]]
    assert flat == [[(False, [10]), (True, [11])], [(False, [12]), (True, [13, 14])]]
