"""Rows with their supervised tokens marked, for a person who asks what is trained on.

The rows' own text is shown, with what no terminal prints as escapes, so that no row can move a
cursor, colour a line, or pass for a mark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from influence.positions import documents
from influence.tokens import Rendering, TokenizedExamples, Tokens

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

#: What stands around supervised tokens.
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of one document that are all supervised, or all not, and their text."""

    supervised: bool
    text: str
    input_ids: list[int]


def parts_of(row: Tokens, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Part]]:
    """The parts of each document of a row, in order."""
    for document in documents(row):
        tokens = zip(
            row.supervised[document].tolist(), row.input_ids[document].tolist(), strict=True
        )
        found = []
        for supervised, group in groupby(tokens, key=lambda token: token[0]):
            ids = [token for _, token in group]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            found.append(Part(supervised, str(text), ids))
        yield found


def record(
    tokens: TokenizedExamples, tokenizer: PreTrainedTokenizerBase, rendering: Rendering
) -> dict[str, Any]:
    """The rows for a program."""
    rows = [
        {
            "id": id,
            "tokens": len(row),
            "supervised_tokens": int(row.supervised.sum()),
            "documents": [[asdict(part) for part in each] for each in parts_of(row, tokenizer)],
        }
        for id, row in zip(tokens.ids, tokens, strict=True)
    ]
    return {**asdict(rendering), "rows": rows}


def marked(tokens: TokenizedExamples, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The rows for a terminal: supervised tokens in double brackets, and green with colours."""
    from rich.text import Text

    page = Text()
    for id, row in zip(tokens.ids, tokens, strict=True):
        count = int(row.supervised.sum())
        title = f"{_inert(id)}: {count} of {len(row)} tokens are supervised"
        page.append(title, style="bold").append("\n")
        for document in parts_of(row, tokenizer):
            for part in document:
                text = _inert(part.text)
                if part.supervised:
                    page.append(OPEN + text + CLOSE, style="green")
                else:
                    page.append(text)
            page.append("\n")
        page.append("\n")
    page.rstrip()
    return page


def _inert(text: str) -> str:
    """Text on one line, with escapes for what is not printed and for the marks."""
    return "".join(
        c if c.isprintable() and c not in (OPEN, CLOSE) else ascii(c)[1:-1] for c in text
    )
