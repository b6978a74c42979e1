"""Rows and adapters from no file, kept in the run so that it opens again, wherever it is moved."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest

import influence
from influence import Run
from influence.errors import InputError
from influence.kept import as_row, keep_rows
from influence.manifest import read_manifest
from influence.rows import Example, Examples
from tests.conftest import build_tokenizer, examples
from tests.helpers import save
from tests.influence.toy_runs import small_model

LORA = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


def live(folder, name="default"):
    """A PEFT model on a base from a folder, with its tokenizer, given live."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter = save(folder, **LORA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(adapter), adapter_name=name
        )
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # another than the base's
    return influence.from_peft(model, tokenizer, base=str(base))


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_run_of_a_live_model_and_rows_opens_by_itself(tmp_path, name):
    run = influence.fit(live(tmp_path, name), examples(6), directory=tmp_path / "run")
    expected = run.score(examples(2, seed=9)).values
    shutil.rmtree(tmp_path / "adapter")
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(tmp_path / "run", moved)
    shutil.rmtree(tmp_path / "run")
    again = Run.open(moved, device="cpu")
    assert again.train == examples(6)
    np.testing.assert_array_equal(again.score(examples(2, seed=9)).values, expected)
    manifest = json.loads((moved / "manifest.json").read_text())
    assert (manifest["data"]["path"], manifest["adapter"]["path"]) == ("rows.jsonl", "adapter")
    assert read_manifest(moved).data.path == str(moved.resolve() / "rows.jsonl")


def test_what_has_a_place_is_not_copied(tmp_path):
    base, adapter = save(tmp_path, **LORA)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(as_row(row)) + "\n" for row in examples(6)))
    run = influence.fit(
        influence.load(base, adapter, device="cpu"),
        influence.read_examples(data),
        directory=tmp_path / "run",
    )
    assert run.manifest.data.path == str(data)
    kept = {path.name for path in run.directory.iterdir()}
    assert not kept & {"rows.jsonl", "adapter", "recipe.json"}
    # the same rows from memory are the same run, which keeps its place
    again = influence.fit(run.model, examples(6), directory=tmp_path / "run")
    assert again.manifest.data.path == str(data)
    assert not (run.directory / "rows.jsonl").exists()


def test_rows_with_other_columns_are_kept_in_the_usual_form(tmp_path):
    table = [{"question": "the red", "answer": " fox"}, {"question": "a lazy", "answer": " dog"}]
    columns = {"prompt": "question", "completion": "answer"}
    named = influence.examples_from_rows(table, columns=columns)
    run = influence.fit(small_model(), named, directory=tmp_path / "run")
    assert Run.open(tmp_path / "run", model=run.model).train == named


def test_a_base_without_a_name_is_said(tmp_path, capsys):
    run = influence.fit(small_model(), examples(6), directory=tmp_path / "run")
    assert "commands cannot open this run; in Python, Run.open(..., model=model)" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(InputError, match="an adapter that came from no folder: pass it as model="):
        Run.open(tmp_path / "run")
    assert Run.open(tmp_path / "run", model=run.model).train == examples(6)


def test_rows_of_every_kind_are_read_back():
    turns = ({"role": "user", "content": "ä\u2028?"}, {"role": "assistant", "content": "<b>"})
    kinds = [
        Example(id="a", group="g", prompt="p", completion=" c"),
        Example(id="b", text="line\nbreak\ttab"),
        Example(id="c", messages=turns),
        Example(id="d", messages=turns, tools=({"name": "f"},), prompt_turns=1),
        Example(id="e", input_ids=(3, 4, 5, 6), targets=(False, True, False, True)),
        Example(id="f", input_ids=(3, 4, 5, 6), document_lengths=(2, 2)),
    ]
    again = influence.examples_from_rows([as_row(row) for row in kinds])
    assert list(again) == kinds
    assert again.digest == Examples(kinds).digest


def test_rows_that_json_cannot_hold_are_not_kept(tmp_path, capsys):
    rows = Examples(
        [Example(id="7", text="x"), Example(id="7", text="y")]
    )  # no file has an id twice
    assert keep_rows(tmp_path, rows) is None
    assert "cannot be kept as JSON lines: open this run with" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_fit_that_replaces_a_run_replaces_what_it_kept(tmp_path):
    model = live(tmp_path)
    influence.fit(model, examples(6), directory=tmp_path / "run")
    with model.moved(model.snapshot()):  # another adapter: twice as long
        influence.fit(model, examples(5), directory=tmp_path / "run", overwrite=True)
        assert Run.open(tmp_path / "run", device="cpu").train == examples(5)


def test_an_unfinished_run_leaves_no_adapter_to_the_run_that_replaces_it(tmp_path, monkeypatch):
    """Nor does a folder that no manifest tells of: the adapter is written anew."""

    def killed(*_):
        raise KeyboardInterrupt

    model, run = live(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("influence.fitting.fit_points", killed)
        with pytest.raises(KeyboardInterrupt):
            influence.fit(model, examples(6), directory=run, path=(1.0,))
    record = json.loads((run / "manifest.json").read_text())
    assert (record["adapter"]["path"], record["data"]["path"]) == ("adapter", "rows.jsonl")
    record["adapter"]["path"] = None  # killed before the manifest told of it
    (run / "manifest.json").write_text(json.dumps(record))
    with model.moved(model.snapshot()):  # another adapter: twice as long
        influence.fit(model, examples(6), directory=run, path=(1.0,), overwrite=True)
        assert Run.open(run, device="cpu").train == examples(6)
