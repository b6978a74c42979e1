"""The training templates are those that TRL's trainer would take, and of no other template there
is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from influence import training_templates
from influence.training_templates import training_template


@pytest.fixture
def without_trl(monkeypatch):
    monkeypatch.setattr(training_templates, "find_spec", lambda name: None)
    training_templates._templates.cache_clear()
    training_templates._say_absent.cache_clear()
    yield
    training_templates._templates.cache_clear()
    training_templates._say_absent.cache_clear()


def test_an_unknown_template_has_none():
    assert training_template("{{ messages }}") is None


def test_every_training_template_is_the_one_that_trl_takes(monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed: pip install -e .[test]")
    from trl import chat_template_utils

    folder = Path(chat_template_utils.__file__).parent / "chat_templates"
    monkeypatch.setattr(chat_template_utils, "supports_tool_calling", lambda _: False)
    compared = 0
    for own in sorted(folder.glob("*.jinja")):
        text = own.read_text(encoding="utf-8")
        if "{% generation" in text or "{%- generation" in text:
            continue  # TRL keeps a template that marks its turns
        try:
            taken = chat_template_utils.get_training_chat_template(
                SimpleNamespace(chat_template=text)
            )
        except ValueError:  # TRL knows the template and has no training template for it
            taken = None
        assert training_template(text) == taken, own.name
        compared += taken is not None
    assert compared > 20


def test_without_trl_it_is_said_once(without_trl, capsys):
    assert training_template("{{ messages }}") is None
    assert training_template("{{ messages }}") is None
    assert capsys.readouterr().err.count("trl is not installed") == 1
