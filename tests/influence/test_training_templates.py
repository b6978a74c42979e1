"""The training templates are those of trl, and of no other template there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence.training_templates import training_template


def test_an_unknown_template_has_none():
    assert training_template("{{ messages }}") is None


def test_every_training_template_is_trls():
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e .[test]")
    folder = Path(trl.__file__).parent / "chat_templates"
    pairs = [
        (folder / file.name.replace("_training", ""), file)
        for file in folder.glob("*_training.jinja")
    ]
    assert len(pairs) > 20
    for own, training in pairs:
        found = training_template(own.read_text(encoding="utf-8"))
        assert found == training.read_text(encoding="utf-8"), own.name
