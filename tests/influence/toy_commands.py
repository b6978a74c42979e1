"""A folder to call the `influence` command in, the call of a fit, and a call that is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from influence.cli import main
from tests.conftest import rows
from tests.helpers import save, untouched, write_rows

SITES = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


def make_folder(at: Path) -> Path:
    """Make base/, adapter/, train.jsonl, queries.jsonl, and run/ with scores and self-influence."""
    save(at, **SITES)
    write_rows(at / "train.jsonl", rows(20))
    write_rows(at / "queries.jsonl", rows(4, seed=9))
    fit = ["fit", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--run", at / "run"]
    score = ["score", "--run", at / "run", "--queries", at / "queries.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (fit, score, ["self", "--run", at / "run"]):
            patch.setattr(sys, "argv", ["influence", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code
    return at


def fit_arguments(at: Path, **changes) -> list:
    """A fit of the folder's rows into `new`; `changes` replaces or adds options."""
    options = {
        "model": at / "base",
        "adapter": at / "adapter",
        "train": at / "train.jsonl",
        "run": at / "new",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return ["fit", *(part for name, value in options.items() for part in (f"--{name}", value))]


def wrong(influence, at, arguments, *sentences, status=2) -> None:
    """Assert that the call exits with this status, says all sentences in one error, writes nothing.

    It says them without a traceback.
    """
    with untouched(at):
        result = influence(*arguments)
    assert result.status == status, result.err
    text = " ".join(result.err.split())
    for sentence in sentences:
        assert sentence in text
    assert result.out == ""
    assert "Traceback" not in result.err
    assert not (at / "new").exists()
