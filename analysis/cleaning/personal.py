"""Patterns of what looks like personal data, and how it is shown without being told.

A match is what a pattern takes for personal data, no more: names, addresses in words and birthdays
have no pattern here, and a number of an example may look like a real one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


def luhn(number: str) -> bool:
    """Whether the digits of a number pass the check of payment cards (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = [d if at % 2 == 0 else d * 2 - 9 * (d > 4) for at, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def _card(text: str) -> bool:
    digits = [c for c in text if c.isdigit()]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(text)


def _iban(text: str) -> bool:
    """Whether an account's check digits are right (ISO 13616: the rearranged number modulo 97)."""
    compact = re.sub(r"\s", "", text)
    if not 15 <= len(compact) <= 34:
        return False
    turned = compact[4:] + compact[:4]
    return int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _phone(text: str) -> bool:
    return 9 <= sum(c.isdigit() for c in text) <= 15


def _mixed(text: str) -> bool:
    """Whether a word holds digits, capitals and small letters, as drawn keys do."""
    return all(any(map(test, text)) for test in (str.isdigit, str.isupper, str.islower))


def _always(_: str) -> bool:
    return True


@dataclass(frozen=True)
class Pattern:
    """A kind of personal data: its name, how it is written, and what else must hold of a match."""

    name: str
    written: re.Pattern[str]
    holds: Callable[[str], bool] = _always


#: What is looked for, the surest first: a match takes its characters from later ones.
PATTERNS = (
    Pattern("email", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")),
    Pattern(
        "private key",
        re.compile(r"-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY-----[A-Za-z0-9+/=\s]{0,8000}"),
    ),
    Pattern(
        "key",
        re.compile(
            r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,255}|xox[abprs]-[A-Za-z0-9-]{10,200}"
            r"|AIza[\w-]{35}|(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,200}"
            r"|eyJ[\w-]{10,2000}\.[\w-]{10,4000}\.[\w-]{5,2000})"
        ),
    ),
    Pattern("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    Pattern("card", re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-])"), _card),
    Pattern(
        "phone",
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
        ),
        _phone,
    ),
    Pattern("us social security number", re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")),
    Pattern("secret word", re.compile(r"(?<![^:=\s\"'`(,])[A-Za-z0-9+/_-]{24,128}(?![\w+/-])"), _mixed),
)  # fmt: skip


@dataclass(frozen=True)
class Match:
    """What looks like personal data in a text: its kind, its place, and how it may be shown."""

    kind: str
    start: int
    end: int
    masked: str


def matches(text: str) -> list[Match]:
    """What looks like personal data in a text, in its order, no two matches overlapping."""
    found: list[Match] = []
    for pattern in PATTERNS:
        for match in pattern.written.finditer(text):
            start, end = match.span()
            free = all(end <= other.start or other.end <= start for other in found)
            if free and pattern.holds(match[0]):
                found.append(Match(pattern.name, start, end, masked(match[0])))
    return sorted(found, key=lambda match: match.start)


def masked(secret: str) -> str:
    """A secret as it may be shown: its first two characters, and how many there are in all.

    Of fewer than eight characters nothing is shown.
    """
    shown = secret[:2] if len(secret) >= 8 else ""
    return f"{shown}***({len(secret)})"


def without_secrets(text: str) -> str:
    """A text with every match masked."""
    shown, at = [], 0
    for match in matches(text):
        shown += [text[at : match.start], match.masked]
        at = match.end
    return "".join([*shown, text[at:]])
