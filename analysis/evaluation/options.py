"""How an evaluation is made: its options, without the libraries that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from influence.errors import InputError
from influence.options import BudgetOption, LengthOption, option

#: Attempts to bring forgotten rows back, see `analysis.metrics.probes`.
PROBES = ("relearn", "quantise")


@dataclass(frozen=True, kw_only=True)
class Options(LengthOption, BudgetOption):
    """How to evaluate.

    The help beside each field says what it is. Raises `InputError` for a number out of range, and
    for a probe that there is none of.
    """

    generate: int = option(
        "Continue at most so many prompts of each set, for ROUGE; 0: none.", default=32
    )
    #: Tokens after which a continuation ends; not on the command line.
    max_new_tokens: int = 128
    probes: tuple[str, ...] = option(
        "relearn (train on a few forget rows, watch the others) or quantise. May be repeated.",
        default=(),
        flag="--probe",
        typed=list[str] | None,
        read=tuple,
    )
    texts: bool = option(
        "Write the rows' texts and what was generated into the record too.", default=False
    )
    seed: int = option("Of the bootstrap, and of the rows learned again.", default=0)

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
