"""Rows to tokens and label masks: which tokens of a row are targets.

::

    Examples -> text of each row -> token ids and the first target -> TokenizedExamples

Every row becomes one token sequence of which a suffix is *supervised*: the completion with its
end-of-sequence token, the last assistant turn, or a whole text. Where that suffix starts is found
from character positions in the rendered string, never by comparing token ids, so a tokenizer whose
padding token is its end-of-sequence token needs no special case, and a token merged across the end
of the prompt is supervised because it spells part of the completion. The suffix reaches the end of
the sequence, so no token is kept after the last supervised one.

The mask of a chat is `chat_mask_start`; that of a prompt with its completion is in `_render`; how
characters become tokens is `_encode_part`.

Shapes: n examples, T tokens in one of them.
"""

from __future__ import annotations

import json
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, SupportsIndex, cast, overload

import numpy as np

from influence.errors import BadRow, DataError, UnusableRow
from influence.rows import Examples, canonical_json, sha256_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_PER_CALL = 2048  # rows given to the tokenizer at once: enough for its threads, little memory


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenised example.

    `input_ids` int64 [T]; `supervised` bool [T]: is token t a target. `supervised[0]` is False,
    because nothing precedes it to predict it from, and the last token is always supervised.
    """

    input_ids: np.ndarray
    supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


class TokenizedExamples(Sequence[Tokens]):
    """The tokens of a sequence of examples in the same order. A slice is `TokenizedExamples` too.

    `lengths` int64 [n]: tokens of each; `counts` int64 [n]: supervised tokens of each (the T_i of
    the convention, at least 1); `ids`: the examples' ids; `truncated`: how many lost supervised
    tokens to `max_length`.
    """

    def __init__(
        self, tokens: Iterable[Tokens], ids: Iterable[str], cut: Iterable[bool] = ()
    ) -> None:
        self._tokens = tuple(tokens)
        self.ids = list(ids)
        self._cut = list(cut) or [False] * len(self._tokens)
        self.lengths = np.array([len(row.input_ids) for row in self._tokens], dtype=np.int64)
        self.counts = np.array(
            [np.count_nonzero(row.supervised) for row in self._tokens], dtype=np.int64
        )

    @property
    def truncated(self) -> int:
        """How many examples lost some, not all, of their supervised tokens to `max_length`."""
        return sum(self._cut)

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> TokenizedExamples: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Tokens | TokenizedExamples:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._tokens[operator.index(index)]

    def __iter__(self) -> Iterator[Tokens]:
        return iter(self._tokens)

    def select(self, indices: Iterable[SupportsIndex]) -> TokenizedExamples:
        """Return the examples at these positions, in this order. A position may repeat."""
        at = [operator.index(i) for i in indices]
        return TokenizedExamples(
            tokens=[self._tokens[i] for i in at],
            ids=[self.ids[i] for i in at],
            cut=[self._cut[i] for i in at],
        )


@dataclass(frozen=True)
class _Rendered:
    """A row as one string, and how to read it.

    Tokens that end after character `boundary` are supervised (-1: all are); a `chat` already
    carries its special tokens and its end of turn as text.
    """

    text: str
    boundary: int
    chat: bool


def tokenize(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> TokenizedExamples:
    """Render and tokenise examples, and mark the tokens that are targets.

    * prompt and completion: concatenated and tokenised once, as one string, with the special tokens
      the tokenizer adds; supervised from the first token that ends beyond the prompt;
      end-of-sequence appended and supervised, unless the last token is one already.
    * text: the same with every token supervised but the first.
    * messages: rendered by the tokenizer's chat template and tokenised without adding anything;
      supervised from where the template's own generation prompt ends or, if the template writes
      something else there before an answer, from where the answer starts. Templates that print
      today's date get 26 July 2024 (the default of the Llama 3 templates), so that tokens do not
      depend on the day.

    A tokenizer without offsets (a slow one) supervises from the first token at which prompt and
    whole differ. `max_length` (tokens, the appended one included) cuts on the right.

    Errors: DataError without a chat template when a row has messages; one DataError that lists
    every row that its template refuses, and one that lists every row left without a supervised
    token. Warnings: a tokenizer without an end-of-sequence token; rows that lose some of their
    supervised tokens.
    """
    if max_length is not None and max_length < 2:
        raise DataError(
            f"max_length is {max_length}; it must be at least 2, because a first token is never a "
            "target"
        )
    rendered = _render(examples, tokenizer)
    if tokenizer.eos_token_id is None and not all(row.chat for row in rendered):
        warnings.warn(
            "the tokenizer has no end-of-sequence token, so none is appended; "
            "set tokenizer.eos_token if the adapter was trained with one",
            stacklevel=2,
        )
    tokens: list[Tokens] = []
    cut: list[bool] = []
    bad: list[BadRow] = []
    longest = 0
    for number, (ids, first) in enumerate(_encode(rendered, tokenizer), start=1):
        first = max(first, 1)
        length = len(ids)
        if first >= length or (max_length is not None and first >= max_length):
            bad.append(
                BadRow(number, examples[number - 1].id, _unsupervised(length, first, max_length))
            )
            continue
        cut.append(max_length is not None and length > max_length)
        longest = max(longest, length)
        input_ids = np.array(ids[:max_length], dtype=np.int64)
        tokens.append(Tokens(input_ids, np.arange(len(input_ids)) >= first))
    if bad:
        raise DataError(f"{len(bad)} of {len(examples)} rows have no supervised token:", bad)
    if any(cut):
        warnings.warn(
            f"{sum(cut)} of {len(examples)} rows are longer than max_length={max_length} and lose "
            f"supervised tokens at their end; max_length={longest} keeps them all",
            stacklevel=2,
        )
    return TokenizedExamples(tokens, examples.ids, cut)


def _unsupervised(length: int, first: int, max_length: int | None) -> str:
    """Say why a row of `length` tokens, supervised from position `first`, has no target left."""
    if first < length:
        return (
            f"max_length={max_length} cuts off all {length - first} supervised tokens of its "
            f"{length}; max_length={first + 1} keeps the first of them, max_length={length} all"
        )
    if length < 2:
        return (
            f"it becomes {length} token{'s' * (length != 1)}, and a first token is never a target"
        )
    return f"none of its {length} tokens lies after its prompt"


def _render(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[_Rendered]:
    """Write every example as one string."""
    conversations = sum(example.messages is not None for example in examples)
    if conversations:
        try:
            tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            place = getattr(tokenizer, "name_or_path", "")
            raise DataError(
                f"{conversations} of {len(examples)} rows have messages, but the tokenizer"
                f"{f' of {place}' * bool(place)} has no chat template; set "
                "tokenizer.chat_template, load a tokenizer saved with one, or give the rows as "
                "prompt and completion"
            ) from error
    rendered: list[_Rendered] = []
    bad: list[BadRow] = []
    for number, example in enumerate(examples, start=1):
        if example.text is not None:
            rendered.append(_Rendered(example.text, -1, chat=False))
        elif example.messages is None:
            prompt, completion = cast(str, example.prompt), cast(str, example.completion)
            rendered.append(_Rendered(prompt + completion, len(prompt), chat=False))
        else:
            try:
                rendered.append(_render_chat(example.messages, tokenizer))
            except UnusableRow as error:
                bad.append(BadRow(number, example.id, str(error)))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(examples)} rows cannot be rendered by the chat template:", bad
        )
    return rendered


def _render_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> _Rendered:
    """Render a conversation by the tokenizer's chat template and find where its mask starts."""
    program = _without_clock(cast(str, tokenizer.get_chat_template()))

    def render(turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        return cast(
            str,
            tokenizer.apply_chat_template(
                cast(list[dict[str, str]], [dict(turn) for turn in turns]),
                chat_template=program,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            ),
        )

    # A template is a program of the model's author: it may refuse a conversation with any error.
    try:
        whole = render(messages)
    except Exception as error:
        raise UnusableRow(
            f"the chat template refuses it: {error or type(error).__name__}"
        ) from error
    return _Rendered(whole, chat_mask_start(whole, messages, render), chat=True)


def chat_mask_start(
    whole: str, messages: Sequence[Mapping[str, Any]], render: Callable[..., str]
) -> int:
    """The label mask of a chat: the character of its text after which tokens are targets.

    This decides which tokens of a conversation are supervised: those of the last answer, with the
    end of turn that the template writes after it. `whole` is `render(messages)`, and
    `render(turns, add_generation_prompt=False)` asks the chat template. Three ways, in this order:

    1. where the template's own generation prompt ends, if the chat starts with it;
    2. where a marker in place of the answer stands, if the chat starts with what precedes it;
    3. where the answer last occurs in the chat.

    Errors: UnusableRow where the template does not print the answer at all.
    """
    try:
        prompt = render(messages[:-1], add_generation_prompt=True)
    except Exception:  # many refuse a conversation without a user's turn
        prompt = None
    if prompt is not None and whole.startswith(prompt):
        return len(prompt)

    # Asking the template where another answer would stand is exact where searching for a short
    # answer is not ("end" occurs in "<|im_end|>"), and works for templates that strip or rewrite
    # what they print.
    answer, marker = str(messages[-1]["content"]), "b1946ac92492d2347c6235b4d2611184"
    try:
        marked = render([*messages[:-1], {**messages[-1], "content": marker}])
    except Exception:
        marked = ""
    before, printed, _ = marked.partition(marker)
    if printed and whole.startswith(before):
        return len(before)
    start = whole.rfind(answer.strip() or answer)
    if start < 0:
        raise UnusableRow(
            "the chat template does not print the last message, so its tokens are unknown"
        )
    return start


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


def _encode(
    rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], int]]:
    """Tokenise strings in large calls: the ids and the first supervised position of each row."""
    encoded: list[tuple[list[int], int]] = [([], 0)] * len(rendered)
    eos = cast("int | None", tokenizer.eos_token_id)
    for chat in (False, True):
        rows = [i for i, row in enumerate(rendered) if row.chat is chat]
        for start in range(0, len(rows), _ROWS_PER_CALL):
            part = rows[start : start + _ROWS_PER_CALL]
            pairs = _encode_part([rendered[i] for i in part], tokenizer)
            for i, (ids, first) in zip(part, pairs, strict=True):
                if not chat and eos is not None:
                    if not ids or ids[-1] != eos:
                        ids = [*ids, eos]
                    first = min(first, len(ids) - 1)
                encoded[i] = ids, first
    return encoded


def _encode_part(
    rendered: Sequence[_Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Tokenise rows of one kind in one call, two for a tokenizer without offsets.

    Yields what `_encode` returns, with nothing appended yet.
    """

    def call(texts: list[str], offsets: bool = False) -> Mapping[str, Any]:
        return tokenizer(
            texts,
            add_special_tokens=not rendered[0].chat,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    if tokenizer.is_fast:
        out = call([row.text for row in rendered], offsets=True)
        for row, ids, spans in zip(rendered, out["input_ids"], out["offset_mapping"], strict=True):
            # Added special tokens span (0, 0): before the completion they do not count, after it
            # they follow.
            ends_after = (t for t, (_, end) in enumerate(spans) if end > row.boundary)
            yield ids, next(ends_after, len(ids))
        return
    wholes = call([row.text for row in rendered])["input_ids"]
    prompts = call([row.text[: max(row.boundary, 0)] for row in rendered])["input_ids"]
    for row, ids, prompt in zip(rendered, wholes, prompts, strict=True):
        differs = (t for t, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
        yield ids, 0 if row.boundary < 0 else next(differs, min(len(ids), len(prompt)))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256, in hex, of everything that decides token ids or rendering.

    That is the tokenizer's own JSON (the sorted vocabulary of one that has none), the special token
    ids, the chat template, and what it makes of a probe with and without special tokens. Not the
    class, the name, or the truncation and padding state, which every call changes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    if backend is not None:
        rules: Any = json.loads(backend.to_str())
        for state in ("truncation", "padding"):
            rules.pop(state, None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    probe = "The 1st probe: naïve,\n  don't? 東京 🙂"
    calls = [
        tokenizer(probe, add_special_tokens=special, padding=False, truncation=False)["input_ids"]
        for special in (True, False)
    ]
    special_ids = {
        name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk")
    }
    return sha256_of_text(
        canonical_json([rules, special_ids, getattr(tokenizer, "chat_template", None), calls])
    )
