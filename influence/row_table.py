"""Tables of rows on a terminal: numbers, the id, texts; in a narrow window one row below another.

Marks are bold and underlined, which needs no colour: they are the same on light and dark terminals
and with NO_COLOR, and where output goes into a file there are none.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING

from influence.text_search import spans

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

#: Columns of a terminal below which a table would crush its texts.
NARROW = 72
#: Columns of a text that is no row.
LONGEST = 24
#: Columns of a number, at least.
LEAST = 10
#: How shared words are marked.
MARK = "bold underline"


@dataclass(frozen=True)
class RowTable:
    """A table with a title, columns of `numbers` and of `texts`, and lines of (numbers, texts).

    The last text of a line is the row itself, which takes what is left of the width.
    """

    title: str
    numbers: Sequence[str]
    texts: Sequence[str]
    lines: Sequence[tuple[Sequence[str], Sequence[Text]]]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        if options.max_width < NARROW:
            yield from self._stacked()
        else:
            yield self._table()

    def _table(self) -> RenderableType:
        """One line of the table for each row."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=Text(self.title), title_justify="left")
        for place, name in enumerate(self.numbers):
            width = max([LEAST, *(len(values[place]) for values, _ in self.lines)])
            heading = fill(name, width, break_long_words=False)  # leaves the room to the row
            shown.add_column(heading, justify="right", no_wrap=True)
        for name in self.texts:
            shown.add_column(name, max_width=None if name == "row" else LONGEST, overflow="fold")
        for values, texts in self.lines:
            shown.add_row(*values, *texts)
        return shown

    def _stacked(self) -> Iterator[RenderableType]:
        """The rows below one another: what they are called, the numbers, and what they say."""
        from rich.padding import Padding
        from rich.text import Text

        yield Text(self.title, style="italic", overflow="fold")
        yield Text(", ".join([*self.numbers, *self.texts[:-1]]), style="bold", overflow="fold")
        for values, texts in self.lines:
            yield Text("  ", overflow="fold").join(
                [*map(Text, values), *(t for t in texts[:-1] if t)]
            )
            if texts[-1]:
                yield Padding(texts[-1], (0, 0, 0, 2))
        yield ""


def marked(text: str, shared: Container[str]) -> Text:
    """Text with the words in `shared` marked. No markup is read from it."""
    from rich.text import Text

    shown = Text(text, overflow="fold")
    for start, end in spans(text, shared):
        shown.stylize(MARK, start, end)
    return shown
