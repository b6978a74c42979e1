"""How an evaluation is made: its options, without the libraries that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from influence.errors import InputError

#: Attempts to bring forgotten rows back, see `analysis.metrics.probes`.
PROBES = ("relearn", "quantise")


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes
    ----------
    generate : int
        At most so many rows of each set are continued from their prompt, evenly spaced; 0: none.
    max_new_tokens : int
        Where a continuation ends at the latest.
    probes : tuple of str
        Of `relearn` and `quantise`.
    max_length : int or None
        Tokens that a row is cut to, as in training.
    token_budget : int or None
        Tokens per batch, padding included; None: 1,024 on a CPU, else 4,096.
    seed : int
        Of the bootstrap, and of the rows that are learned again.
    texts : bool
        Whether the record holds the rows' texts and what was generated.
    """

    generate: int = 32
    max_new_tokens: int = 128
    probes: tuple[str, ...] = ()
    max_length: int | None = None
    token_budget: int | None = None
    seed: int = 0
    texts: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("generate", self.generate, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_length", self.max_length, 2),
            ("token_budget", self.token_budget, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} {value} was given; expected at least {least}")
        for probe in self.probes:
            if probe not in PROBES:
                raise InputError(f"probe {probe!r} was given; expected {' or '.join(PROBES)}")
