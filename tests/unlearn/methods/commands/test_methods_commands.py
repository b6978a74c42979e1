"""`unlearn methods`, and methods of one's own on the command line."""

from __future__ import annotations

import pytest
import torch

from analysis.cli import main as analysis
from tests.unlearn.methods.commands.helpers import (
    no_model,
)
from unlearn.cli import main
from unlearn.methods.methods import METHODS

COLUMNS = {
    "name": str,
    "title": str,
    "source": str,
    "targets": str,
    "forget": str | None,
    "retain": str | None,
    "combine": str,
    "finish": str | None,
    "needs_retain": bool,
    "needs_reference": bool,
    "retain_rows": str | None,
    "cost_per_step": dict,
    "optimizer": str,
    "lr": float | str | None,
    "stride": float | None,
    "until": str,
    "steps": int,
}


def test_methods_as_json(run_main):
    result = run_main(main, "unlearn", "methods", "--json")
    assert result.status == 0, result.err
    table = result.json()
    assert [row["name"] for row in table] == list(METHODS)
    for row in table:
        for key, kind in COLUMNS.items():
            assert isinstance(row[key], kind), (row["name"], key)
        assert set(row["cost_per_step"]) == {"per_forget_row", "per_retain_row"}
        assert (
            row["needs_retain"] == (row["retain"] is not None) == (row["retain_rows"] is not None)
        )
        assert hasattr(torch.optim, row["optimizer"])
        assert row["source"]
        assert row["title"]
    assert {row["name"] for row in table if row["lr"] == "auto"} == {"ngdiff"}
    assert "<" not in result.out.replace("<eos>", "")  # no address of an object, no <lambda>


def test_methods_for_a_person(run_main):
    result = run_main(main, "unlearn", "methods")
    assert result.status == 0
    for name in METHODS:
        assert (
            f"\n{name}: {METHODS[name]().title}\n    {METHODS[name]().source}\n"
            in "\n" + result.out
        )
    assert max(len(line) for line in result.out.splitlines()) < 220


def test_help_names_every_option_with_a_sentence(run_main):
    result = run_main(main, "unlearn", "train", "--help")
    assert result.status == 0
    text = " ".join(result.out.split())
    for part in (
        "--method",
        "--retain",
        "--until",
        "--set",
        "--stop-damage",
        "--control",
        "--save-every",
        "the same command goes on",
    ):
        assert part in text, part
    assert "torchrun" in text
    assert "Yao" not in text
    group = run_main(main, "unlearn", "--help")
    assert "train" in group.out
    assert "methods" in group.out


OWN = '''"""A method of ten lines."""
from unlearn import Method, Term
from unlearn.terms import descent


def capped(cap: float = 5.0) -> Method:
    """Ascent that ends where a token's loss is at the cap."""
    term = Term("capped", lambda part: -part.losses.clamp(max=cap))
    return Method("capped", forget=term, retain=descent, lr=0.01, steps=5, until="steps=5",
                  title="capped ascent")


plain = capped()
'''


def test_a_method_of_ones_own_runs(train, tmp_path, run_main):
    (tmp_path / "mine.py").write_text(OWN)
    call = ("--method", f"{tmp_path / 'mine.py'}:capped", "--set", "cap=3", "--json")
    done = train(*call)
    assert done.status == 0, done.err
    result = done.json()
    assert result["method"]["name"] == "capped"
    assert result["method"]["steps_taken"] == 5
    page = run_main(
        analysis, "analysis", "report", "--edit", tmp_path / "out", "--out", tmp_path / "page.html"
    )
    assert page.status == 0
    assert "capped: capped ascent, 5 gradient steps" in (tmp_path / "page.html").read_text()
    value = train(
        "--method",
        f"{tmp_path / 'mine.py'}:plain",
        "--out",
        tmp_path / "two",
        "--start",
        "original",
        "--json",
    )
    assert value.status == 0
    assert (value.json()["delta"]["norm"] == result["delta"]["norm"]) is False  # another cap
    missing = train("--method", f"{tmp_path / 'mine.py'}:lost", "--out", tmp_path / "three")
    assert missing.status == 2
    assert "has no method 'lost'" in missing.err


WRONG = [
    ("def mine():\n    return 7\n", "another thing"),
    pytest.param("def mine(a):\n    return a\n", "more"),
]


@pytest.mark.parametrize(("text", "what"), WRONG)
def test_what_is_no_method_is_told(train, tmp_path, monkeypatch, text, what):
    no_model(monkeypatch)
    (tmp_path / "mine.py").write_text(text)
    result = train("--method", f"{tmp_path / 'mine.py'}:mine")
    assert result.status == 2, what


def test_a_file_may_hold_dataclasses_and_postponed_annotations(train, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from unlearn import Method\n"
        "from unlearn.terms import ascent, descent\n"
        "@dataclass(frozen=True)\n"
        "class Half:\n"
        "    weight: float = 0.5\n"
        "    def __call__(self, forget, retain, step):\n"
        "        return forget + self.weight * retain\n"
        "mine = Method('mine', forget=ascent, retain=descent, combine=Half(), until='steps=2')\n"
    )
    assert train("--method", f"{tmp_path / 'mine.py'}:mine").status == 0
