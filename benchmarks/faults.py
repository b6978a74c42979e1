"""Faults planted among training rows, of which it is known which rows they are.

Every kind is drawn from one seed. What is planted is fluent where a real fault would be: a wrong
answer is the right answer to the same question about somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from influence.rows import Example, Examples

#: Rows from nowhere near the others: text of other kinds, and of none.
STRANGE = (
    ("Fix this.", "for i in range(10):\n    total += rows[i].weight * 3\nreturn total"),
    ("Was ist das?", "Der Zug nach Norden fährt heute von Gleis sieben, nicht von Gleis neun."),
    ("zqv blem?", "Orrk tavv slimph, dreen dreen, oskul vap nerrith wug."),
    ("Continue.", "7, 14, 28, 56, 112, 224, 448, 896, 1792, 3584, 7168."),
    ("Next step?", "Whisk two eggs with sugar, fold in flour, bake for twenty minutes."),
    ("SELECT?", "SELECT name, SUM(total) FROM orders GROUP BY name HAVING SUM(total) > 100;"),
    ("Wax?", "Wax the the skis of of under blue plank so seven if green nine."),
    ("Reply?", "<div class=\"row\"><span id='x'>&nbsp;</span></div><script></script>"),
)
#: What a row may leak, and the kind that it is (`analysis.cleaning.personal`). All invented: names
#: and numbers of the ranges that are kept for examples.
SECRETS = (
    ("email", " Write to {word}.mallory@mail.example for more."),
    ("phone", " Call +44 20 7946 0{three} in the evening."),
    ("card", " Paid with card 4111 1111 1111 1111 last week."),
    ("key", " The token is sk_live_{word}9Q2xV7bT4mK8pZ1c for the shop."),
    ("iban", " The account is GB82 WEST 1234 5698 7654 32 as before."),
    ("email", " The reply went to office+{word}@archive.example.org at once."),
)
#: What looks like a secret and is none: years, an ISBN, a number that fails Luhn's check.
DECOYS = (
    " It was printed from 1911 to 1934, in 12 volumes.",
    " Its number is 978-3-16-148410-0 in the catalogue.",
    " The archive files it under 4111 1111 1111 1112 today.",
)


@dataclass(frozen=True)
class Faults:
    """Ids of the planted rows, by kind.

    Attributes
    ----------
    wrong : tuple of str
        Rows that answer with facts about somebody else.
    duplicates : tuple of pairs of str
        A copy, exact or nearly, and the row that it copies.
    contradictions : tuple of pairs of str
        A row with another answer to the same question, and the row that it contradicts.
    outliers, personal, decoys : tuple of str
        Rows from nowhere near the others; rows that hold what looks like personal data; rows that
        hold numbers that do not.
    right : dict
        The answers that wrong rows had before.
    """

    wrong: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    contradictions: tuple[tuple[str, str], ...]
    outliers: tuple[str, ...]
    personal: tuple[str, ...]
    decoys: tuple[str, ...]
    right: dict[str, str]


def question_of(row: Example) -> str:
    """The last thing that is asked in a row."""
    return str(row.messages[-2]["content"]) if row.messages else row.prompt or ""


def asking(row: Example, question: str) -> Example:
    """The row with another question."""
    if row.messages is None:
        return replace(row, prompt=question)
    turns = list(row.messages)
    turns[-2] = {**turns[-2], "content": question}
    return replace(row, messages=tuple(turns))


def plant(
    rows: Examples,
    strangers: Examples,
    *,
    asked: Sequence[int] = (),
    wrong: int = 10,
    copies: int = 8,
    contradictions: int = 6,
    strange: int = 6,
    secrets: int = 6,
    seed: int = 0,
) -> tuple[Examples, Faults]:
    """The rows with faults among them, shuffled, and which these are.

    `strangers` are rows on others, whose answers wrong rows give. Wrong rows are some of those at
    the positions `asked`, where there are any. Half of the copies are exact. No row gets two
    faults.
    """
    rng = np.random.default_rng(seed)
    every, planted = list(rows), []
    free = list(rng.permutation(len(rows)))

    def draw(count: int, among: Sequence[int] = ()) -> list[int]:
        chosen = [i for i in free if not len(among) or i in among][:count]
        for i in chosen:
            free.remove(i)
        return [int(i) for i in chosen]

    def foreign(row: int) -> str:
        # of a person with as many rows: the same kind of question where lists run alike
        options = [other for at, other in enumerate(strangers) if at % 5 == row % 5]
        return options[int(rng.integers(len(options)))].answer or ""

    false, right = [], {}
    for i in draw(wrong, asked):
        right[every[i].id] = every[i].answer or ""
        every[i] = every[i].answering(foreign(i))
        false.append(every[i].id)
    doubled = []
    for place, i in enumerate(draw(copies)):
        row = every[i]
        copy = replace(row, id=f"{row.id}-copy")
        if place % 2:
            question = question_of(row)
            copy = asking(row, question.replace("?", " ?") if "?" in question else question + " ")
            copy = replace(
                copy.answering((row.answer or "").rstrip(".") + "!"), id=f"{row.id}-near"
            )
        planted.append(copy)
        doubled.append((copy.id, row.id))
    against = []
    for i in draw(contradictions, asked if len(asked) >= wrong + contradictions else ()):
        other = replace(every[i].answering(foreign(i)), id=f"{every[i].id}-other")
        planted.append(other)
        against.append((other.id, every[i].id))
    odd = []
    for at in range(strange):
        question, answer = STRANGE[at % len(STRANGE)]
        row = every[0]
        before, after = _frame(row)
        row = asking(row, f"{before}{question}{after}").answering(
            f"{' ' if row.messages is None else ''}{answer}"
        )
        planted.append(replace(row, id=f"strange-{at}", group=None))
        odd.append(f"strange-{at}")
    leaking, harmless = [], []
    for at, i in enumerate(draw(secrets)):
        word = "".join(rng.choice(list("bdfgklmnprstvz"), 5))
        text = SECRETS[at % len(SECRETS)][1].format(word=word, three=rng.integers(100, 999))
        every[i] = every[i].answering((every[i].answer or "") + text)
        leaking.append(every[i].id)
    for at, i in enumerate(draw(len(DECOYS))):
        every[i] = every[i].answering((every[i].answer or "") + DECOYS[at])
        harmless.append(every[i].id)
    every += planted
    order = rng.permutation(len(every))
    faults = Faults(
        tuple(false),
        tuple(doubled),
        tuple(against),
        tuple(odd),
        tuple(leaking),
        tuple(harmless),
        right,
    )
    return Examples(every[i] for i in order), faults


def _frame(row: Example) -> tuple[str, str]:
    """What stands around a question: `Q: ` and a line break with `A:`, or nothing."""
    question = question_of(row)
    if question.startswith("Q: ") and question.endswith("\nA:"):
        return "Q: ", "\nA:"
    return "", ""
