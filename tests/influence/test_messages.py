"""Words that messages share."""

from __future__ import annotations

import datetime

import pytest

from influence.messages import kind_of, listed, one_line


def test_names_are_listed_in_quotes():
    assert listed(["prompt", "text"]) == "'prompt', 'text'"
    assert listed([]) == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "a boolean"),
        (3, "an integer"),
        (0.5, "a number"),
        ("x", "a string"),
        ([], "a list"),
        ((), "a list"),
        ({}, "an object"),
        (None, "null"),
        (datetime.date(2024, 7, 26), "a date"),
    ],
)
def test_kinds_are_in_words_of_the_file(value, words):
    assert kind_of(value) == words


def test_one_line_is_short_and_moves_no_cursor():
    assert one_line("a\n\tb  c", 10) == "a b c"
    assert one_line("\x1b[2Jred", 10) == "[2Jred"
    assert one_line("abcdefghij", 5) == "abcd…"
    assert one_line("abc  efghij", 5) == "abc…"
    assert one_line("abcde", 5) == "abcde"
