"""Patterns: what they take and leave, that checks are checks, and that no secret is shown."""

from __future__ import annotations

import time

import pytest

from analysis.cleaning.personal import PATTERNS, luhn, masked, matches, without_secrets


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to ada.lovelace+x@mail.example.org now", "email"),
        ("call +44 20 7946 0123 at noon", "phone"),
        ("call (212) 555-0187 at noon", "phone"),
        ("card 4111 1111 1111 1111.", "card"),
        ("card 378282246310005", "card"),
        ("to GB82 WEST 1234 5698 7654 32 please", "iban"),
        ("to DE89370400440532013000", "iban"),
        ("AKIAIOSFODNN7EXAMPLE is the id", "key"),
        ("use sk_live_9Q2xV7bT4mK8pZ1c", "key"),
        ("token=aZ8kQ2mV7xN4tB1cR9wL5yDs", "secret word"),
        ("aZ8kQ2mV7xN4tB1cR9wL5yDs", "secret word"),
        ("the key:\naZ8kQ2mV7xN4tB1cR9wL5yDs", "secret word"),
        ('{"key":"aZ8kQ2mV7xN4tB1cR9wL5yDs"}', "secret word"),
        ("her number is 219-09-9999", "us social security number"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=", "private key"),
    ],
)
def test_what_looks_like_personal_data(text, kind):
    assert [match.kind for match in matches(text)] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "from 1911 to 1934, in 12 volumes",
        "ISBN 978-3-16-148410-0",
        "card 4111 1111 1111 1112",
        "to GB82 WEST 1234 5698 7654 33 please",
        "0000 0000 0000 0000",
        "x@y is no address, nor is @somebody",
        "a thousand: 1,000,000,000,000.00",
        "https://site.example/wiki/Some2_Article_of_the_World",
        "Donaudampfschifffahrtsgesellschaft was long",
        "",
    ],
)
def test_what_does_not(text):
    assert matches(text) == []


def test_every_pattern_is_tried():
    kinds = {"email", "phone", "card", "iban", "key", "secret word", "private key"}
    assert {pattern.name for pattern in PATTERNS} == kinds | {"us social security number"}


def test_luhn_by_hand():
    """7992739871 with each last digit: one of the ten is right."""
    assert [d for d in range(10) if luhn(f"7992739871{d}")] == [3]


def test_no_secret_is_told():
    secrets = ["ada@mail.example.org", "4111 1111 1111 1111", "sk_live_9Q2xV7bT4mK8pZ1c"]
    text = f"A {secrets[0]}, B {secrets[1]}; C {secrets[2]}!"
    shown = without_secrets(text)
    assert shown == "A ad***(20), B 41***(19); C sk***(24)!"
    assert masked("a@b.io") == "***(6)"
    assert without_secrets("nothing to hide") == "nothing to hide"


def test_a_long_hostile_text_takes_no_time():
    hostile = ["a." * 20_000, "1 " * 20_000, "A1" * 20_000, "+1" * 20_000, "@".join("a" * 20_000)]
    start = time.perf_counter()
    for text in hostile:
        matches(text)
    assert time.perf_counter() - start < 5
