"""Worlds: what is there is used, rows are found by either name, and the demo's is made by the
corpus.
"""

from __future__ import annotations

import json

import pytest

import analysis.demo.world as module
from analysis.demo.world import World, demo_world, worlds
from influence.errors import InputError
from tests.conftest import rows
from tests.helpers import save, write_rows


@pytest.fixture
def world(tmp_path) -> World:
    """A tiny base and adapter with rows. Queries lie in query.jsonl."""
    save(tmp_path / "w", layers=1)
    for name, seed in (("train", 0), ("query", 1), ("heldout", 2)):
        write_rows(tmp_path / "w" / f"{name}.jsonl", rows(4, seed=seed))
    return World("w", tmp_path / "w", tmp_path / "kept")


def test_rows_are_found_by_either_name(world):
    assert world.rows("queries").ids == [row["id"] for row in rows(4, seed=1)]
    (world.folder / "query.jsonl").rename(world.folder / "queries.jsonl")
    assert world.rows("queries").ids == [row["id"] for row in rows(4, seed=1)]
    (world.folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"w has no queries\.jsonl or query\.jsonl; a world needs"):
        world.rows("queries")


def test_a_truth_is_there_or_not(world):
    assert world.truth is None
    (world.folder / "truth.npz").write_bytes(b"")
    assert world.truth == world.folder / "truth.npz"


def test_a_run_is_fitted_once_where_things_are_kept(world):
    run = world.run()
    assert run.directory == world.kept / "run"
    made = (run.directory / "factors.h5").stat().st_mtime_ns
    assert world.run().digest == run.digest
    assert (run.directory / "factors.h5").stat().st_mtime_ns == made
    assert not (world.folder / "run").exists()


def test_worlds_are_the_demo_s_and_the_one_that_the_environment_names(world, tmp_path, monkeypatch):
    kept = tmp_path / "worlds"
    monkeypatch.setenv("LORA_INFLUENCE_WORLDS", str(kept))
    monkeypatch.delenv("LORA_INFLUENCE_TESTBED", raising=False)
    monkeypatch.setattr(module, "demo_world", lambda folder: World("demo", folder, folder))
    assert [(made.name, made.kept) for made in worlds()] == [("demo", kept / "demo")]
    monkeypatch.setenv("LORA_INFLUENCE_TESTBED", str(world.folder))
    _, second = worlds()
    assert (second.name, second.folder, second.kept) == ("w", world.folder, kept / "w")
    assert second.kept.is_dir()


def test_the_demo_s_world_is_made_once(tmp_path, monkeypatch):
    """Training is counted, not done: the adapter's weights say that a world is complete."""
    calls = []

    def base(texts, folder, seed):
        calls.append("base")

    def adapter(base, rows, folder, seed):
        calls.append("adapter")
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr("analysis.demo.training.train_base", base)
    monkeypatch.setattr("analysis.demo.training.train_adapter", adapter)
    first, again = demo_world(tmp_path / "d"), demo_world(tmp_path / "d")
    assert first == again
    assert calls == ["base", "adapter"]
    lines = (tmp_path / "d" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"id", "prompt", "completion"} <= set(json.loads(lines[0]))
