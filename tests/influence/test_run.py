"""A run opened again, from anywhere, and what it refuses to be opened with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import influence
from influence import EKFAC, GGN, KFAC, Fisher, Hessian, Identity, Run
from influence.errors import InputError, MismatchError, StoreError
from influence.store import read_json, write_json
from tests.conftest import build_model, examples
from tests.helpers import edit_weights, untouched, write_rows
from tests.influence.toy_runs import N_ROWS, fit, interrupted_fit, small_model, solver_of
from tests.oracles import close

N, PATH = 9, (0.4, 0.8)


SITES = {"layers": 1, "target_modules": ["attn.c_attn"]}


@pytest.fixture(scope="module")
def model():
    return build_model("gpt2", **SITES)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return influence.fit(
        model, examples(N), path=PATH, directory=tmp_path_factory.mktemp("path") / "run"
    )


def test_order_store_batches_and_reopening_change_nothing(model, run, tmp_path, double):
    queries = examples(4, seed=1)
    expected, self_influence = run.score(queries).values, run.self_influence().values
    opened = Run.open(run.directory, model=model, train=run.train)
    assert np.array_equal(opened.score(queries).values, expected)
    assert np.array_equal(opened.self_influence().values, self_influence)
    for number, options in enumerate(
        ({"path": PATH[::-1]}, {"store": "never"}, {"store": "always"}, {"token_budget": 20})
    ):
        other = influence.fit(
            model, run.train, **({"path": PATH} | options), directory=tmp_path / str(number)
        )
        assert other.gradients_stored == (options.get("store") != "never")
        close(other.score(queries).values, expected, 1e-8)
        close(other.self_influence().values, self_influence, 1e-8)


def test_the_model_is_untouched(model, run):
    before = model.snapshot()
    run.score(examples(2, seed=1))
    with pytest.raises(InputError):
        run.score(examples(2, seed=1), measurement="token:99")
    assert torch.equal(model.snapshot(), before)


def test_rows_that_another_version_of_a_library_renders_otherwise_are_refused(model, tmp_path):
    run = influence.fit(
        model, examples(N), path=(1.0,), curvature=Identity(), directory=tmp_path / "run"
    )
    record = read_json(run.directory / "manifest.json")
    record["data"]["tokens"] += 1
    write_json(run.directory / "manifest.json", record)
    with pytest.raises(MismatchError, match=r"render them otherwise than then.*transformers"):
        Run.open(run.directory, model=model, train=run.train)
    record["data"]["tokens"] -= 1
    record["data"]["tokens_digest"] = "0" * 64  # as many, and others
    write_json(run.directory / "manifest.json", record)
    with pytest.raises(MismatchError, match="are others now"):
        Run.open(run.directory, model=model, train=run.train)
    with pytest.raises(MismatchError, match="are others now"):  # nor is the finished run taken up
        influence.fit(
            model, examples(N), path=(1.0,), curvature=Identity(), directory=run.directory
        )
    del record["data"]["tokens_digest"]  # as runs from before it have it
    write_json(run.directory / "manifest.json", record)
    Run.open(run.directory, model=model, train=run.train)


def test_an_unfinished_run_is_not_opened(tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match=r"is not a run directory \(no manifest.json\): make one with influence fit",
    ):
        Run.open(tmp_path, model=small_model(), train=examples(N_ROWS))
    interrupted_fit(monkeypatch, tmp_path, 2)
    message = r"the fit in .* is unfinished: run the same influence fit command again to resume it"
    with untouched(tmp_path), pytest.raises(InputError, match=message):
        Run.open(tmp_path, model=small_model(), train=examples(N_ROWS))


def test_a_run_of_another_format_is_not_opened(tmp_path):
    fit(tmp_path)
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"format": 99})
    with pytest.raises(
        InputError, match="has format 99 and this version reads format 2: fit the run again"
    ):
        Run.open(tmp_path, model=small_model(), train=examples(N_ROWS))
    for damage in ("{", "[]", ""):
        (tmp_path / "manifest.json").write_text(damage)
        for call in (
            lambda: Run.open(tmp_path, model=small_model(), train=examples(N_ROWS)),
            lambda: fit(tmp_path),
        ):
            with (
                untouched(tmp_path),
                pytest.raises(
                    StoreError, match=r"manifest.json (cannot be read|holds no JSON object)"
                ),
            ):
                call()


def add_a_token(base: Path) -> None:
    path = base / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = vocabulary["dog"], vocabulary["fox"]
    path.write_text(json.dumps(rules))


CHANGES = {
    "adapter": lambda at: edit_weights(
        at / "adapter" / "adapter_model.safetensors", lambda t: next(iter(t.values())).mul_(1.001)
    ),
    "base": lambda at: edit_weights(
        at / "base" / "model.safetensors", lambda t: t["model.norm.weight"].mul_(1.01)
    ),
    "data": lambda at: (at / "train.jsonl").write_text(
        (at / "train.jsonl").read_text().replace("fox", "dog", 1)
    ),
    "tokenizer": lambda at: add_a_token(at / "base"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_is_named_and_nothing_is_overwritten(folders, what):
    Run.open(folders / "run", device="cpu")
    CHANGES[what](folders)
    message = f"{what} is [0-9a-f]{{12}} there and [0-9a-f]{{12}} here"
    with untouched(folders / "run"):
        with pytest.raises(
            MismatchError, match=f"was made from something else: {message}. Restore"
        ) as caught:
            Run.open(folders / "run", device="cpu")
        assert str(caught.value).count(" there and ") == 1
        loaded = influence.load(folders / "base", folders / "adapter", device="cpu")
        with pytest.raises(
            MismatchError, match=f"holds a run made from something else: {message}. Give another"
        ):
            influence.fit(
                loaded, influence.read_examples(folders / "train.jsonl"), directory=folders / "run"
            )


def test_a_moved_base_adapter_or_data_set_is_the_same(folders):
    Run.open(folders / "run", device="cpu")
    for name in ("base", "adapter", "train.jsonl"):
        (folders / name).rename(folders / f"moved {name}")
    loaded = influence.load(folders / "moved base", folders / "moved adapter", device="cpu")
    data = influence.read_examples(folders / "moved train.jsonl")
    factors = (folders / "run" / "factors.h5").stat()
    assert Run.open(folders / "run", model=loaded, train=data).gradients_stored
    influence.fit(
        loaded, data, directory=folders / "run"
    )  # finished: only learns where things lie now
    assert (folders / "run" / "factors.h5").stat() == factors
    assert Run.open(folders / "run", device="cpu").gradients_stored


def test_what_was_moved_is_named_with_what_mends_it(folders):
    for name in ("adapter", "train.jsonl"):
        (folders / name).rename(folders / f"moved {name}")
    with pytest.raises(InputError, match="was made from what does not exist any more: ") as error:
        Run.open(folders / "run", device="cpu")
    assert (
        f"{folders / 'adapter'} (--adapter), {folders / 'train.jsonl'} (--train). Where it"
        in str(error.value)
    )
    loaded = influence.load(folders / "base", folders / "moved adapter", device="cpu")
    with pytest.raises(InputError, match=r"any more: \S+train.jsonl \(--train\). Where"):
        Run.open(folders / "run", model=loaded)


@pytest.mark.parametrize("kind", ["columns", "split", "hub"])
def test_a_run_opens_rows_of_every_source_again(folders, kind, monkeypatch, tmp_path_factory):
    """And learns, by the same fit, that they lie elsewhere or have other columns now."""
    from datasets import Dataset

    items = [json.loads(line) for line in (folders / "train.jsonl").read_text().splitlines()]
    dataset, columns, source = Dataset.from_list(items), None, str(folders / "shards:train")
    if kind == "columns":
        columns, source = {"prompt": "asked"}, str(folders / "asked.jsonl")
        asked = [{**item, "asked": item["prompt"], "prompt": "other"} for item in items]
        write_rows(folders / "asked.jsonl", asked)
    elif kind == "split":
        (folders / "shards").mkdir()
        for name in ("test", "train"):
            dataset.to_parquet(folders / "shards" / f"{name}-00000-of-00001.parquet")
    else:
        source = "org/name:train"
        monkeypatch.setattr("datasets.load_dataset", lambda *given, **how: dataset)
    monkeypatch.chdir(folders)
    loaded = influence.load("base", "adapter", device="cpu")
    train = influence.read_examples(source, columns=columns)
    factors = (folders / "run" / "factors.h5").stat()
    influence.fit(loaded, train, directory="run")
    assert (folders / "run" / "factors.h5").stat() == factors
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = Run.open(folders / "run", model=loaded)
    assert again.train == train
    assert (again.manifest.data.path, again.manifest.data.columns) == (source, columns)
    influence.fit(
        loaded, influence.read_examples(folders / "train.jsonl"), directory=folders / "run"
    )
    assert "columns" not in json.loads((folders / "run" / "manifest.json").read_text())["data"]


def test_a_run_opens_from_another_working_directory(folders, monkeypatch, tmp_path_factory):
    """Paths given relative to where fit ran are found from elsewhere."""
    monkeypatch.chdir(folders)
    loaded = influence.load("base", "adapter", device="cpu")
    influence.fit(loaded, influence.read_examples("train.jsonl"), directory="relative")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert Run.open(folders / "relative", device="cpu").gradients_stored


def test_every_curvature_opens_again_with_the_same_scores(tmp_path):
    queries = examples(2, seed=9)
    for curvature in (EKFAC(), KFAC(), Fisher(), Fisher(samples=0), GGN(), Hessian(), Identity()):
        directory = tmp_path / repr(curvature)
        run = influence.fit(
            small_model(),
            examples(N_ROWS),
            directory=directory,
            curvature=curvature,
            damping="mean:1",
        )
        solver = solver_of(curvature.name)
        again = Run.open(directory, model=small_model(), train=examples(N_ROWS))
        assert np.array_equal(
            again.score(queries, solver=solver).values, run.score(queries, solver=solver).values
        )
