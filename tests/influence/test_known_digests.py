"""The base's digest is remembered as long as its files are what they were, and no longer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import influence
from influence import known_digests, loading
from influence.adapter import AdaptedModel
from influence.known_digests import BaseFiles, cache_folder
from tests.helpers import save


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base and an adapter, an empty cache, and the count of what is hashed."""
    monkeypatch.setenv("LORA_INFLUENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "YOUNG_SECONDS", 0.0)
    hashed = []
    real = AdaptedModel.hashed_base

    def counted(model):
        hashed.append(model)
        return real(model)

    monkeypatch.setattr(AdaptedModel, "hashed_base", counted)
    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj"])

    def digest(**options) -> tuple[str, int]:
        """The digest, and whether it was hashed for it."""
        hashed.clear()
        found = influence.load(base, adapter, device="cpu", **options).base_digest
        return found, len(hashed)

    return base, digest


def changed(base: Path, *, keep_times: bool) -> None:
    """One weight of the base another one, in a file of the same size."""
    (file,) = base.glob("*.safetensors")
    before = file.stat()
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    draft = base.parent / "draft.safetensors"
    save_file(tensors, draft, metadata={"format": "pt"})
    data = draft.read_bytes()
    with open(file, "r+b") as handle:  # in place: the same inode
        handle.write(data)
    assert file.stat().st_size == before.st_size == len(data)
    assert file.stat().st_ino == before.st_ino
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_unchanged_files_are_not_hashed_again(world):
    _, digest = world
    first, hashed = digest()
    assert hashed == 1
    assert digest() == (first, 0)
    other, hashed = digest(dtype="float64")  # other numbers in memory
    assert hashed == 1
    assert other != first
    assert digest(dtype="float64") == (other, 0)


@pytest.mark.parametrize("keep_times", [False, True], ids=["another time", "the time set back"])
def test_a_changed_file_of_the_same_size_is_noticed(world, keep_times):
    base, digest = world
    first, _ = digest()
    changed(base, keep_times=keep_times)
    second, hashed = digest()
    assert hashed == 1
    assert second != first


def test_a_touched_file_is_hashed_again_and_is_the_same(world):
    base, digest = world
    first, _ = digest()
    (file,) = base.glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    assert digest() == (first, 1)
    assert digest() == (first, 0)


def test_young_files_and_no_cache_are_always_hashed(world, monkeypatch):
    _, digest = world
    monkeypatch.setattr(known_digests, "YOUNG_SECONDS", 3600.0)
    assert [digest()[1], digest()[1]] == [1, 1]
    monkeypatch.setattr(known_digests, "YOUNG_SECONDS", 0.0)
    monkeypatch.setenv("LORA_INFLUENCE_CACHE", "")
    assert cache_folder() is None
    assert [digest()[1], digest()[1]] == [1, 1]


def test_weights_that_were_changed_in_memory_are_hashed_and_not_remembered(world, tmp_path):
    base, digest = world
    adapter = next(path for path in tmp_path.iterdir() if (path / "adapter_config.json").exists())
    model = influence.load(base, adapter, device="cpu")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[0, 0] += 1
    live = model.base_digest
    first, hashed = digest()
    assert hashed == 1
    assert first != live
    again = influence.load(base, adapter, device="cpu")
    with torch.no_grad():
        again.model.get_input_embeddings().weight[0, 0] += 1
    assert again.base_digest == live  # although the files' digest is remembered by now


def test_weights_that_are_other_tensors_are_hashed(world, tmp_path):
    """As after a layer was replaced, or given other numbers past torch's count."""
    _, digest = world
    first, _ = digest()
    adapter = next(path for path in tmp_path.iterdir() if (path / "adapter_config.json").exists())
    for way in ("another parameter", "other numbers"):
        model = influence.load(tmp_path / "base", adapter, device="cpu")
        weights = model.model.get_input_embeddings()
        moved = weights.weight.detach().clone() + 1
        if way == "other numbers":
            weights.weight.data = moved
        else:
            weights.weight = torch.nn.Parameter(moved)
        assert model.base_digest != first, way
    assert digest() == (first, 0)


def test_another_version_that_is_fetched_while_loading_is_not_taken_for_the_first(
    world, tmp_path, monkeypatch
):
    """A hub's cache has a folder for each version, and which is current is told by the loading."""
    base, digest = world
    first, _ = digest()
    newer = tmp_path / "newer"
    shutil.copytree(base, newer)
    changed(newer, keep_times=False)
    adapter = next(path for path in tmp_path.iterdir() if (path / "adapter_config.json").exists())
    folders = iter([base, newer])
    monkeypatch.setattr(loading, "_folder_of", lambda _: next(folders))
    model = influence.load(newer, adapter, device="cpu")
    assert model.base_digest == model.hashed_base() != first


def test_a_folder_of_others_and_a_damaged_entry_are_not_trusted(world):
    _, digest = world
    first, _ = digest()
    folder = cache_folder()
    assert folder is not None
    (entry,) = folder.iterdir()
    for text in ("", "0" * 63, "z" * 64):
        entry.write_text(text)
        assert digest() == (first, 1)
    folder.chmod(0o777)
    assert cache_folder() is None
    assert digest() == (first, 1)


def test_files_that_change_while_they_are_loaded_are_not_remembered(world):
    base, _ = world
    files = BaseFiles.before_loading([base], "how")
    assert files is not None
    changed(base, keep_times=False)
    assert files.digest(True, lambda: "a" * 64) == "a" * 64
    folder = cache_folder()
    assert folder is None or list(folder.iterdir()) == []


def test_a_base_that_lies_nowhere_is_hashed(tmp_path):
    assert BaseFiles.before_loading([tmp_path / "nowhere"]) is None
