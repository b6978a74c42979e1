"""Rows as text: what a chat template makes of a conversation, and which of it is supervised.

`render` writes a row as one string, with what decides its label mask:

===========  ====================================================================================
supervise    targets of a conversation
===========  ====================================================================================
`last`       the last assistant turn; of a prompt and completion, the completion
`assistant`  every assistant turn, as TRL's `assistant_only_loss` has it
`all`        every token, TRL's default for conversations (`completion_only_loss=False` otherwise)
===========  ====================================================================================

A completion begins where the tokens of the whole row depart from those of its prompt alone, which
is TRL's rule. Assistant turns are what a template marks by `{% generation %}`. TRL swaps templates
of known models, which have no marks, for its own training templates, and so does this module
(`influence.training_templates`). For any other template `turn_span` finds each turn by asking the
template itself.

A turn with `train: false`, `weight: 0` or `loss: false` is no target under `last` and `assistant`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from influence.errors import UnusableRow
from influence.row_content import TURN_FLAGS
from influence.rows import Example
from influence.training_templates import training_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Which tokens of a conversation can be supervised.
SUPERVISE = ("last", "assistant", "all")
#: Stands in place of a turn's content, to see where the template prints it.
_MARKER = "b1946ac92492d2347c6235b4d2611184"

Turns = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A row as one string, and which of its tokens are targets: those that all parts allow.

    Attributes
    ----------
    text : str
    chat : bool
        It already carries its special tokens and its end of turn as text.
    prompt : str, optional
        Tokens that the row begins with as this text does are no targets.
    spans : tuple of (start, end), optional
        Only tokens that end within these characters are targets.
    masked : tuple of (start, end)
        Tokens that reach into these characters are no targets.
    marks : tuple of bool, optional
        The mask of the tokens that a template's own marks give.
    """

    text: str
    chat: bool
    prompt: str | None = None
    spans: tuple[Span, ...] | None = None
    masked: tuple[Span, ...] = ()
    marks: tuple[bool, ...] | None = None


def render(example: Example, tokenizer: PreTrainedTokenizerBase, supervise: str) -> Rendered:
    """Write a row that is no token ids as one string.

    Text without a template gets the end-of-sequence token, unless it ends so. Errors: UnusableRow
    where the chat template refuses the row, or where a turn cannot be found in what it printed.
    """
    if example.messages is not None:
        return _render_chat(example, example.messages, tokenizer, supervise)
    prompt = None if supervise == "all" else example.prompt
    text = (
        cast(str, example.text)
        if example.prompt is None
        else example.prompt + str(example.completion)
    )
    end = cast("str | None", tokenizer.eos_token)
    return Rendered(text if end is None or text.endswith(end) else text + end, False, prompt)


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    shorter = min(len(first), len(second))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), shorter)


def several_turns(example: Example) -> bool:
    """Whether a row is a conversation with more than one answer, of which `last` takes one."""
    turns = example.messages or ()
    return sum(turn["role"] == "assistant" for turn in turns[example.prompt_turns or 0 :]) > 1


def _render_chat(
    example: Example, turns: Turns, tokenizer: PreTrainedTokenizerBase, supervise: str
) -> Rendered:
    """Render a conversation by the tokenizer's chat template and find its targets."""
    given: dict[str, Any] = dict(example.template_options or {})
    if example.tools is not None:
        given["tools"] = [dict(tool) for tool in example.tools]
    program = _program(cast(str, tokenizer.get_chat_template(tools=given.get("tools"))), supervise)
    given["chat_template"] = program

    def text_of(turns: Turns, add_generation_prompt: bool = False) -> str:
        return cast(
            str,
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], [dict(turn) for turn in turns]),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **given,
            ),
        )

    whole = _asked(text_of, turns)
    if supervise == "all":
        return Rendered(whole, chat=True)
    prompt = None
    if example.prompt_turns is not None:
        prompt = _asked(text_of, turns[: example.prompt_turns], add_generation_prompt=True)
    spans = marks = None
    if supervise == "assistant" and _marked(program) and tokenizer.is_fast:
        marks = _marks(turns, tokenizer, given)
    elif supervise == "assistant":
        answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        spans = tuple(turn_span(whole, turns, k, text_of) for k in answers)
    elif prompt is None:
        spans = (turn_span(whole, turns, len(turns) - 1, text_of),)
    masked = tuple(turn_span(whole, turns, k, text_of) for k in untrained_turns(turns))
    return Rendered(whole, True, prompt, spans, masked, marks)


def _asked(text_of: Callable[..., str], turns: Turns, **options: bool) -> str:
    """What the template prints. It is a program of the model's author, and may raise any error."""
    try:
        return text_of(turns, **options)
    except Exception as error:
        raise UnusableRow(
            f"the chat template refuses it: {error or type(error).__name__}"
        ) from error


def untrained_turns(turns: Turns) -> list[int]:
    """Positions of the assistant turns that say of themselves that they are no targets."""
    found = []
    for k, turn in enumerate(turns):
        values = [turn[key] for key in TURN_FLAGS if key in turn and turn["role"] == "assistant"]
        for value in values:
            if isinstance(value, (int, float)) and value not in (0, 1):
                raise UnusableRow(
                    f"message {k + 1} has the weight {value}; only 0 and 1 can be followed"
                )
        if any(value is False or value == 0 for value in values):
            found.append(k)
    return found


def _marked(program: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", program) is not None


def _marks(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any]
) -> tuple[bool, ...]:
    """The mask of a template's own marks, by transformers, as trainers take it."""
    found = tokenizer.apply_chat_template(
        cast(list[dict[str, str]], [dict(turn) for turn in turns]),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **given,
    )
    return tuple(bool(bit) for bit in cast(Mapping[str, Any], found)["assistant_masks"])


# ---- turns in the text of a template that marks none ---------------------------------------------


def turn_span(whole: str, turns: Turns, k: int, text_of: Callable[..., str]) -> Span:
    """The characters of assistant turn `k` in its conversation's text: what the model has to say.

    That is the answer with the end of turn that the template writes after it; the last turn reaches
    the end of the text. `whole` is `text_of(turns)`, and `text_of(turns,
    add_generation_prompt=False)` asks the chat template. The turn begins, in this order:

    1. where the template's own generation prompt ends, if the text starts with it;
    2. where a marker in place of the answer stands, if the text starts with what precedes it;
    3. where the answer last occurs in the text before the next turn.

    Asking for a marker is exact where searching for a short answer is not ("end" occurs in
    "<|im_end|>"), and works for templates that strip or rewrite what they print, as those that drop
    the thoughts of earlier turns.

    Errors: UnusableRow where the template does not print the turn at all.
    """
    marked = _tried(text_of, [*turns[:k], {**turns[k], "content": _MARKER}, *turns[k + 1 :]])
    before, printed, after = marked.partition(_MARKER)
    end = _turn_end(whole, turns, k, text_of, after if printed else None)
    prompt = _tried(text_of, turns[:k], add_generation_prompt=True)
    if prompt and whole.startswith(prompt):
        return len(prompt), end
    if printed and whole.startswith(before):
        return len(before), end
    answer = str(turns[k].get("content", ""))
    start = whole.rfind(answer.strip() or answer, 0, end) if answer else -1
    if start < 0:
        which = "last message" if k == len(turns) - 1 else f"message {k + 1}"
        raise UnusableRow(
            f"the chat template does not print the {which}, so its tokens are unknown"
        )
    return start, end


def _turn_end(
    whole: str, turns: Turns, k: int, text_of: Callable[..., str], after: str | None
) -> int:
    """Where turn k ends in the text: after what is printed alike if the conversation ends there.

    `after` is what follows the turn's marker in the conversation's text, if it is printed. Some
    templates end a conversation, or print its last turn, otherwise than one that goes on.
    """
    if k == len(turns) - 1:
        return len(whole)
    alone = _tried(text_of, turns[: k + 1])
    if alone and whole.startswith(alone):
        return len(alone)
    if after is not None and whole.endswith(after):
        final = _tried(text_of, [*turns[:k], {**turns[k], "content": _MARKER}])
        rest = final.partition(_MARKER)[2]
        return len(whole) - len(after) + common_length(rest, after)
    return common_length(whole, alone)


def _tried(text_of: Callable[..., str], turns: Turns, **options: bool) -> str:
    """What the template prints, or nothing: many refuse a conversation without a user's turn."""
    try:
        return text_of(turns, **options)
    except Exception:
        return ""


# ---- the program ---------------------------------------------------------------------------------


def _program(template: str, supervise: str) -> str:
    """The template that a row is rendered by."""
    if supervise == "assistant" and not _marked(template):
        template = training_template(template) or template
    return _without_clock(template)


def _without_clock(program: str) -> str:
    """Give a chat template a fixed day.

    A macro of its own hides the clock that transformers lends it. The line break after the macro is
    eaten by the block before it, so a template renders as it did.
    """
    if "strftime_now" not in program:
        return program
    day = datetime(2024, 7, 26)
    replaced = "".join(
        f" | replace('%{d}', '{day.strftime('%' + d)}')" for d in "aAbBdeFHIjmMpSTyY"
    )
    replaced += " | replace('%-d', '26') | replace('%-m', '7')"
    return "{%- macro strftime_now(format) %}{{ format" + replaced + " }}{% endmacro %}\n" + program
