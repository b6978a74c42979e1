"""What the tests of the commands share: rows, hashes, a training that ends on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from influence.run import Run
from tests.helpers import contents
from unlearn.methods import loop

ROWS, FORGET = 10, "r0-1,r0-2,r0-5"
ROOT = Path(__file__).resolve().parents[4]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def no_model(monkeypatch):
    monkeypatch.setattr(Run, "open", lambda *_a, **_k: pytest.fail("the model was loaded"))


def interrupted_after(monkeypatch, steps: int):
    take_step, steps_begun = loop.take_step, []

    def stop(*arguments):
        steps_begun.append(1)
        if len(steps_begun) > steps:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", stop)
