"""Folders as a user has them, rows on disk, and work in two processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import (
    add_lora,
    build_base,
    build_tokenizer,
)


def save_base(folder: Path, kind: str = "llama", *, layers: int = 2, seed: int = 0) -> Path:
    """A tiny base (float32) and its tokenizer as a local folder."""
    build_base(kind, layers=layers, seed=seed, dtype=torch.float32).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save(
    folder: Path, kind: str = "llama", *, layers: int = 2, seed: int = 0, std: float = 0.3, **lora
):
    """A tiny base and an adapter as two local folders, as a user has them."""
    base = save_base(folder / "base", kind, layers=layers, seed=seed)
    model = add_lora(
        build_base(kind, layers=layers, seed=seed, dtype=torch.float32), std=std, **lora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    edit_config(folder / "adapter", base_model_name_or_path=str(base))
    return base, folder / "adapter"


def edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def untouched(*directories: Path):
    """No file in these directories changes within the block; a new `.partial` to go on with may
    appear, with the `.parts` beside it.
    """
    before = [contents(directory) for directory in directories]
    yield
    for directory, files in zip(directories, before, strict=True):
        after = {
            name: data
            for name, data in contents(directory).items()
            if name in files or not (".partial" in name or name.endswith(".parts"))
        }
        assert sorted(after) == sorted(files)
        assert [name for name in files if after[name] != files[name]] == []


def write_rows(path: Path, items) -> Path:
    """Rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
    return path


def in_two_processes(work, folder: Path) -> None:
    """Call `work(rank)` in two forked processes that talk by gloo; each one's failure is ours."""
    assert statuses(work, folder, 2) == [0, 0]


def statuses(work, folder: Path, count: int) -> list[int | None]:
    """Call `work(rank)` in `count` forked processes that talk by gloo; their exit statuses."""
    fork = multiprocessing.get_context("fork")
    meeting = tempfile.mkdtemp(dir=folder)

    def joined(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo", f"file://{meeting}/meet", rank=rank, world_size=count
        )
        work(rank)
        torch.distributed.destroy_process_group()

    children = [fork.Process(target=joined, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
        child.kill()  # one that waits for the others for ever has no status
    return [child.exitcode for child in children]
