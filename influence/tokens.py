"""Rows to tokens and label masks: which tokens of a row are targets.

::

    Examples -> text of each row (influence.chats) -> token ids and their mask -> TokenizedExamples

A `Rendering` is the whole rule. Which tokens are *supervised* follows from characters of the
rendered string, from TRL's rule where a prompt ends, or from marks of the template, never from what
a token id is: a tokenizer whose padding token is its end-of-sequence token needs no special case.
Rows that are token ids already say it themselves. Nothing is kept after a row's last target, which
no other token of a causal model sees.

Shapes: n examples, T tokens in one of them.
"""

from __future__ import annotations

import hashlib
import json
import operator
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, SupportsIndex, cast, overload

import numpy as np

from influence.chats import (
    SUPERVISE,
    Rendered,
    common_length,
    render,
    several_turns,
    untrained_turns,
)
from influence.errors import BadRow, DataError, InputError, UnusableRow
from influence.progress import say
from influence.rows import Example, Examples, canonical_json, sha256_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_PER_CALL = 2048  # rows given to the tokenizer at once: enough for its threads, little memory


@dataclass(frozen=True)
class Rendering:
    """How rows become tokens: cut to `max_length` tokens, with these supervised.

    `supervise` is `last`, `assistant` or `all`, see `influence.chats`.
    """

    max_length: int | None = None
    supervise: str = "last"

    def __post_init__(self) -> None:
        if self.supervise not in SUPERVISE:
            raise InputError(
                f"supervise {self.supervise!r} was given; expected {', '.join(SUPERVISE[:-1])} or "
                f"{SUPERVISE[-1]}"
            )

    @classmethod
    def of_trainer(cls, rows: Examples, max_length: int | None, supervise: str | None) -> Rendering:
        """The rule for training rows. None is `last`, with a note if that may not be the trainer's.

        That is where conversations have several answers: trainers take more of them than the last.
        """
        several = sum(map(several_turns, rows)) if supervise is None else 0
        if several:
            say(
                f"note: {several} of {len(rows)} rows have several assistant turns, of which only "
                "the last is supervised; trainers mostly take more: TRL every token of a "
                "conversation (--supervise all), or all assistant turns with assistant_only_loss "
                "(--supervise assistant); --supervise last says that yours took the last"
            )
        return cls(max_length, supervise or "last")

    def tokenize(self, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> TokenizedExamples:
        """The tokens of some rows by this rule, see `tokenize`."""
        return tokenize(examples, tokenizer, max_length=self.max_length, supervise=self.supervise)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One tokenised example.

    `input_ids` int64 [T]; `supervised` bool [T]: is token t a target. `supervised[0]` is False,
    because nothing precedes it to predict it from, and the last token is always supervised.
    `position_ids` int64 [T] of a row that holds several documents, 0 where each begins, which is no
    target either. None: 0, 1, ... T - 1.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    position_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class TokenizedExamples(Sequence[Tokens]):
    """The tokens of a sequence of examples in the same order. A slice is `TokenizedExamples` too.

    `lengths` int64 [n]: tokens of each; `counts` int64 [n]: supervised tokens of each (the T_i of
    the convention, at least 1); `ids`: the examples' ids; `truncated`: how many lost supervised
    tokens to `max_length`.

    Rows lie one after the other in flat arrays, nine bytes a token, of which a row that is asked for
    is a view: an array object for each row takes several times that where rows are short.

    Errors: DataError for a row whose targets are not as many as its tokens.
    """

    def __init__(
        self, tokens: Iterable[Tokens], ids: Iterable[str], cut: Iterable[bool] = ()
    ) -> None:
        flat, targets = array("q"), bytearray()
        lengths, counts = array("q"), array("q")
        #: positions of the rows that hold several documents
        self._positions: dict[int, np.ndarray] = {}
        for number, row in enumerate(tokens):
            if row.supervised.shape != row.input_ids.shape:
                raise DataError(
                    f"tokens number {number + 1} are of the shape {row.input_ids.shape}, and their "
                    f"targets {row.supervised.shape}; expected the same, as each says of a token "
                    "whether it is one"
                )
            flat.frombytes(row.input_ids.astype(np.int64).tobytes())
            targets += row.supervised.astype(bool).tobytes()
            lengths.append(len(row))
            counts.append(int(np.count_nonzero(row.supervised)))
            if row.position_ids is not None:
                self._positions[number] = row.position_ids
        self._input_ids = np.frombuffer(flat, dtype=np.int64)
        self._supervised = np.frombuffer(targets, dtype=bool)
        self.ids = list(ids)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.counts = np.array(counts, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        self._cut = np.array([*cut] or [False] * len(lengths), dtype=bool)

    @classmethod
    def joined(cls, parts: Iterable[TokenizedExamples]) -> TokenizedExamples:
        """The rows of all parts, one part after the other."""
        parts = list(parts)
        return cls(
            tokens=chain.from_iterable(parts),
            ids=chain.from_iterable(part.ids for part in parts),
            cut=chain.from_iterable(part.cut for part in parts),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every row's tokens, targets and positions, in order."""
        found = hashlib.sha256()
        for row in self:
            found.update(f"{len(row)} {row.position_ids is not None} ".encode())
            for values in (row.input_ids, row.supervised, row.position_ids):
                if values is not None:
                    found.update(np.ascontiguousarray(values).tobytes())
        return found.hexdigest()

    @property
    def cut(self) -> list[bool]:
        """Which examples lost some, not all, of their supervised tokens to `max_length`, [n]."""
        return self._cut.tolist()

    @property
    def truncated(self) -> int:
        """How many examples lost some, not all, of their supervised tokens to `max_length`."""
        return int(self._cut.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> TokenizedExamples: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Tokens | TokenizedExamples:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        place = range(len(self))[operator.index(index)]
        end = self._ends[place]
        span = slice(end - self.lengths[place], end)
        return Tokens(self._input_ids[span], self._supervised[span], self._positions.get(place))

    def select(self, indices: Iterable[SupportsIndex]) -> TokenizedExamples:
        """Return the examples at these positions, in this order. A position may repeat."""
        at = [operator.index(i) for i in indices]
        return TokenizedExamples(
            tokens=(self[i] for i in at),
            ids=[self.ids[i] for i in at],
            cut=self._cut[at],
        )


def tokenize(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    supervise: str = "last",
) -> TokenizedExamples:
    """Render and tokenise examples, and mark the tokens that are targets, as TRL's trainers do.

    * prompt and completion: concatenated with an end-of-sequence token (unless they end so) and
      tokenised once, as one string, with the special tokens the tokenizer adds; supervised from the
      first token at which they differ from the prompt's own tokens. Under `supervise="all"` every
      token.
    * text: the same with every token supervised.
    * messages: rendered by the tokenizer's chat template and tokenised without adding anything;
      which turns are supervised is `supervise`, see `influence.chats`. Templates that print today's
      date get 26 July 2024 (the default of the Llama 3 templates), so that tokens do not depend on
      the day.
    * input_ids: as they are, whatever `supervise` says.

    The first token of a row, or of a document in it, is never a target. `max_length` (tokens) cuts
    on the right.

    Errors: DataError without a chat template when a row has messages; one DataError that lists
    every row that its template refuses, and one that lists every row left without a supervised
    token. Warnings: a tokenizer without an end-of-sequence token; rows that begin with two
    beginning-of-sequence tokens; rows that lose some of their supervised tokens.
    """
    Rendering(max_length, supervise)  # refuses an unknown word
    if max_length is not None and max_length < 2:
        raise DataError(
            f"max_length is {max_length}; it must be at least 2, because a first token is never a "
            "target"
        )
    _check_template(examples, tokenizer)
    strays: Counter[str] = Counter()
    parts: list[TokenizedExamples] = []
    refused: list[BadRow] = []  # by the template
    bad: list[BadRow] = []
    longest, cut_off = 0, False
    # a part at a time: what a tokenizer answers takes many times the memory of its token ids
    for start in range(0, len(examples), _ROWS_PER_CALL):
        part = examples[start : start + _ROWS_PER_CALL]
        rendered = _render(part, tokenizer, supervise, start, refused)
        if refused:
            continue  # all that the template refuses are listed
        whole = _encode(part, rendered, tokenizer)
        strays += _stray_ends(part, whole, tokenizer)
        tokens: list[Tokens] = []
        cut: list[bool] = []
        for number, (example, row) in enumerate(zip(part, whole, strict=True), start=start + 1):
            targets = np.flatnonzero(row.supervised)
            if not len(targets) or (max_length is not None and targets[0] >= max_length):
                bad.append(BadRow(number, example.id, _unsupervised(row, example, max_length)))
                cut_off |= bool(len(targets))
                continue
            needed = int(targets[-1]) + 1
            longest = max(longest, needed)
            cut.append(max_length is not None and needed > max_length)
            tokens.append(_beginning(row, max_length))
        if not bad:
            parts.append(TokenizedExamples(tokens, part.ids, cut))
    if refused:
        raise DataError(
            f"{len(refused)} of {len(examples)} rows cannot be rendered by the chat template:",
            refused,
        )
    _warn_of_ends(len(examples), strays, tokenizer)
    if bad:
        trl = " (TRL drops rows that are cut so: leave them out here too)" * cut_off
        raise DataError(f"{len(bad)} of {len(examples)} rows have no supervised token{trl}:", bad)
    found = TokenizedExamples.joined(parts)
    if found.truncated:
        warnings.warn(
            f"{found.truncated} of {len(examples)} rows are longer than max_length={max_length} "
            f"and lose supervised tokens at their end; max_length={longest} keeps them all",
            stacklevel=2,
        )
    return found


def _beginning(row: Tokens, max_length: int | None) -> Tokens:
    """The row up to its last target within `max_length` tokens."""
    end = int(np.flatnonzero(row.supervised[:max_length])[-1]) + 1
    positions = None if row.position_ids is None else row.position_ids[:end]
    return Tokens(row.input_ids[:end], row.supervised[:end], positions)


def _unsupervised(row: Tokens, example: Example, max_length: int | None) -> str:
    """Say why a row has no target left."""
    length, targets = len(row), np.flatnonzero(row.supervised)
    if len(targets):
        return (
            f"max_length={max_length} cuts off all {len(targets)} supervised tokens of its "
            f"{length}; max_length={targets[0] + 1} keeps the first of them, "
            f"max_length={targets[-1] + 1} all"
        )
    if length < 2:
        return (
            f"it becomes {length} token{'s' * (length != 1)}, and a first token is never a target"
        )
    if example.input_ids is not None:
        return f"its labels or masks make none of its {length} tokens a target"
    if untrained_turns(example.messages or ()):
        return "all turns that are taken are marked as no targets, by train, weight or loss"
    return f"none of its {length} tokens lies after its prompt"


def _stray_ends(
    examples: Examples, tokens: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase
) -> Counter[str]:
    """How many rows are strings, how many of them begin twice, and how many end twice."""
    found: Counter[str] = Counter()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin, end = str(tokenizer.bos_token), str(tokenizer.eos_token)
    for example, row in zip(examples, tokens, strict=True):
        if example.messages is None and example.input_ids is None:
            text = (example.prompt or "") + (example.completion or example.text or "")
            begins, ends = row.input_ids[:2].tolist(), row.input_ids[-2:].tolist()
            found["strings"] += 1
            found["begin twice"] += text.startswith(begin) and begins == [bos, bos]
            found["end twice"] += not text.endswith(end + end) and ends == [eos, eos]
    return found


def _warn_of_ends(rows: int, strays: Counter[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of strings without an end, and of strings with two ends, as trainers have them."""
    if strays["strings"] and tokenizer.eos_token_id is None:
        warnings.warn(
            "the tokenizer has no end-of-sequence token, so none is appended; "
            "set tokenizer.eos_token if the adapter was trained with one",
            stacklevel=3,
        )
    if strays["begin twice"]:
        warnings.warn(
            f"{strays['begin twice']} of {rows} rows begin with {tokenizer.bos_token}, which the "
            "tokenizer adds too, so they begin with two, as TRL trains on them; take it out of the "
            "rows if your trainer did",
            stacklevel=3,
        )
    if strays["end twice"]:
        warnings.warn(
            f"the tokenizer itself adds {tokenizer.eos_token}, so {strays['end twice']} of {rows} "
            "rows end with two, as TRL trains on them; switch that off in the tokenizer if your "
            "trainer did",
            stacklevel=3,
        )


def _check_template(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows with messages where no chat template writes them."""
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


def _render(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    supervise: str,
    before: int,
    refused: list[BadRow],
) -> list[Rendered | None]:
    """Write every example as one string, but those that are token ids.

    Rows that the template refuses are added to `refused`; `before` rows were written earlier.
    """
    rendered: list[Rendered | None] = []
    for number, example in enumerate(examples, start=before + 1):
        try:
            is_ids = example.input_ids is not None
            rendered.append(None if is_ids else render(example, tokenizer, supervise))
        except UnusableRow as error:
            refused.append(BadRow(number, example.id, str(error)))
    return rendered


def _encode(
    examples: Examples, rendered: Sequence[Rendered | None], tokenizer: PreTrainedTokenizerBase
) -> list[Tokens]:
    """The tokens of every row, uncut. Strings of one kind are tokenised in one call."""
    encoded = [_as_given(example) for example in examples]
    for chat in (False, True):
        rows = [i for i, row in enumerate(rendered) if row is not None and row.chat is chat]
        if rows:
            strings = [cast(Rendered, rendered[i]) for i in rows]
            for i, tokens in zip(rows, _encode_part(strings, tokenizer), strict=True):
                encoded[i] = tokens
    return encoded


def _as_given(example: Example) -> Tokens:
    """The tokens of a row of token ids; nothing of any other."""
    ids = np.array(example.input_ids or (), dtype=np.int64)
    supervised = np.ones(len(ids), dtype=bool)
    if example.targets is not None:
        supervised = np.array(example.targets, dtype=bool)
    positions = None
    if example.document_lengths is not None:
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in example.document_lengths])
        supervised[positions == 0] = False
    supervised[:1] = False
    return Tokens(ids, supervised, positions)


def _encode_part(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Tokens]:
    """Tokenise rows of one kind in one call, two where there are prompts to compare with."""

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

    wholes = call([row.text for row in rendered], offsets=bool(tokenizer.is_fast))
    prompts = [row.prompt for row in rendered if row.prompt is not None]
    prompt_ids = iter(call(prompts)["input_ids"] if prompts else ())
    for place, row in enumerate(rendered):
        ids = wholes["input_ids"][place]
        supervised = np.ones(len(ids), dtype=bool)
        supervised[:1] = False
        if row.prompt is not None:
            supervised[: common_length(ids, next(prompt_ids))] = False
        if row.marks is not None:
            supervised &= np.array(row.marks, dtype=bool)
        if row.spans is not None or row.masked:
            if tokenizer.is_fast:
                starts, ends = np.array(wholes["offset_mapping"][place]).reshape(-1, 2).T
            else:
                cuts = {cut for span in (*(row.spans or ()), *row.masked) for cut in span}
                beginnings = {cut: call([row.text[:cut]])["input_ids"][0] for cut in cuts}
                starts, ends = _estimated_offsets(ids, beginnings, len(row.text))
            if row.spans is not None:
                inside = [(start < ends) & (ends <= end) for start, end in row.spans]
                supervised &= np.any(inside, axis=0)
            for start, end in row.masked:
                supervised &= ~((start < ends) & (starts < end))
        yield Tokens(np.array(ids, dtype=np.int64), supervised)


def _estimated_offsets(
    ids: Sequence[int], beginnings: Mapping[int, Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens start and end, as far as these beginnings of the text tell, for a tokenizer
    without offsets.

    `beginnings` has the ids of the text's first so many characters. A token that the whole has in
    common with them ends there or before; the first other one reaches beyond.
    """
    starts, ends = np.zeros(len(ids), dtype=int), np.full(len(ids), length)
    for cut in sorted(beginnings, reverse=True):
        alike = len(ids) if cut == length else common_length(ids, beginnings[cut])
        ends[:alike] = np.minimum(ends[:alike], cut)
        starts[alike:] = np.maximum(starts[alike:], cut)
    return starts, ends


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
