"""Rows as the page shows them: id, group, and what they say, by role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from influence.messages import one_line
from influence.rows import Example, Examples, canonical_json

#: Characters of a row in a list.
PREVIEW = 140


@dataclass(frozen=True)
class Texts:
    """The `ids` and `groups` ("" where there is none) of rows, and the rows themselves.

    `examples` is None where the rows are not known any more: only ids are shown then.
    """

    ids: Sequence[str]
    groups: Sequence[str]
    examples: Examples | None = field(repr=False)

    @classmethod
    def of(cls, examples: Examples) -> Texts:
        """Those of examples."""
        return cls(examples.ids, [each.group or "" for each in examples], examples)

    @classmethod
    def named(cls, ids: Sequence[str]) -> Texts:
        """Those of rows of which only the ids are known."""
        return cls(list(ids), [""] * len(ids), None)

    def __len__(self) -> int:
        return len(self.ids)

    def preview(self, index: int) -> str:
        """A row as one line; "" where it is not known."""
        return "" if self.examples is None else self.examples[index].preview(PREVIEW)

    def parts(self, index: int) -> list[list[str]]:
        """What a row says, as `[role, text]` pairs in order; none where it is not known."""
        return [] if self.examples is None else parts_of(self.examples[index])

    @cached_property
    def searched(self) -> list[str]:
        """What is searched of every row: id, group and all that it says, in lower case. Made once."""
        return [
            "\n".join([self.ids[k], self.groups[k], *(text for _, text in self.parts(k))]).lower()
            for k in range(len(self))
        ]


def parts_of(example: Example) -> list[list[str]]:
    """What a row says, as `[role, text]` pairs in order."""
    if example.messages is not None:
        return [[str(turn.get("role", "")), _said(turn)] for turn in example.messages]
    if example.text is not None:
        return [["text", example.text]]
    if example.input_ids is not None:
        shown = example.shown or ("", one_line(" ".join(map(str, example.input_ids)), 2000))
        named = zip(("prompt", "completion"), shown, strict=True)
        return [[role, text] for role, text in named if text]
    return [["prompt", example.prompt or ""], ["completion", example.completion or ""]]


def _said(turn: Mapping[str, Any]) -> str:
    """What a turn of a conversation says, or the tools that it calls."""
    content = turn.get("content")
    if isinstance(content, str) and content:
        return content
    return canonical_json(content or turn.get("tool_calls") or "")
