"""What a run keeps of its own, so that it can be opened again: rows and adapters from no file.

    run/rows.jsonl     the training rows as JSON lines, as `read_examples` reads them
    run/adapter/       the adapter as PEFT saves it, with its tokenizer
    run/recipe.json    how the adapter was trained (`influence.recipe`)

Rows that were made in Python or by a trainer, and a model that was given live, have no place that a
command could read them from. What is kept is read back once and compared, so that a run which says
it can be opened can be.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from influence.adapter import AdaptedModel
from influence.base_files import not_loaded_so
from influence.errors import ToolkitError
from influence.manifest import ADAPTER, NAME, ROWS
from influence.progress import say
from influence.recipe import Recorded
from influence.row_files import read_examples
from influence.rows import Example, Examples
from influence.store import read_json, write_json
from influence.tokens import tokenizer_digest

RECIPE = "recipe.json"


def keep_rows(directory: Path, train: Examples) -> Path | None:
    """Write the rows into the run's directory, unless they are there; None where they cannot be.

    They cannot where JSON does not hold them as they are (a message with a date in it): what is
    read back must have the same digest.
    """
    path = directory / ROWS
    if _reads_as(path, train):
        return path
    partial = path.with_name(f"{ROWS}.partial.jsonl")
    with open(partial, "w", encoding="utf-8") as handle:
        for example in train:
            handle.write(json.dumps(as_row(example), ensure_ascii=False) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    if not _reads_as(partial, train):
        partial.unlink()
        say(
            "note: the rows came from no file and cannot be kept as JSON lines: open this run with "
            "Run.open(..., train=rows)"
        )
        return None
    os.replace(partial, path)
    say(f"note: the rows came from no file; {path} keeps them, so that commands can read them")
    return path


def _reads_as(path: Path, train: Examples) -> bool:
    """Whether the file is there and holds exactly these rows."""
    try:
        return path.is_file() and read_examples(path).digest == train.digest
    except ToolkitError:
        return False


def as_row(example: Example) -> dict[str, Any]:
    """An example as a row of a file: its id, its group if it has one, and its content."""
    group = {} if example.group is None else {"group": example.group}
    shown = {} if example.shown is None else {"shown": list(example.shown)}
    return {"id": example.id, **group, **example.content(), **shown}


def keep_adapter(directory: Path, model: AdaptedModel) -> Path | None:
    """Save the adapter and its tokenizer into the run's directory, in place of any that is there.

    None, with a note, where the base has no name to load it by again, or where the saved tokenizer
    does not load as the same.
    """
    path = directory / ADAPTER
    if not model.base:
        say(
            "note: the base was given live and records no folder or hub id: commands cannot open "
            "this run; in Python, Run.open(..., model=model)"
        )
        return None
    if other := not_loaded_so(model.model.get_base_model()):
        say(
            f"note: the base was quantised {other}, which loading does not repeat: commands cannot "
            "open this run; in Python, Run.open(..., model=model)"
        )
        return None
    partial = path.with_name(f"{ADAPTER}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_live_adapter(model.model, partial)
    model.tokenizer.save_pretrained(str(partial))
    if not _loads_as(partial, model.tokenizer):
        shutil.rmtree(partial)
        say(
            "note: the tokenizer does not load as the same once it is saved, so the adapter is not "
            "kept: commands cannot open this run; in Python, Run.open(..., model=model)"
        )
        return None
    shutil.rmtree(path, ignore_errors=True)  # a fit that was killed may have left another's
    partial.rename(path)
    say(f"note: the adapter came from no folder; {path} keeps it, so that commands can load it")
    return path


def forget_adapter(directory: Path) -> None:
    """Remove the adapter that a run kept in its directory, before the run is replaced."""
    record = read_json(directory / NAME).get("adapter")
    if isinstance(record, dict) and record.get("path") == ADAPTER:
        shutil.rmtree(directory / ADAPTER, ignore_errors=True)


def save_live_adapter(model: Any, folder: Path) -> None:
    """Save the active adapter of a `PeftModel` as PEFT reads it, whatever its name.

    Into the folder itself, and without asking the hub for the base. Draws nothing at random.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = model.active_adapters[0]
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.peft_config[name].save_pretrained(str(folder))


def _loads_as(folder: Path, tokenizer: Any) -> bool:
    """Whether the tokenizer saved in a folder is the given one."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder))
        return tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def keep_recipe(directory: Path, recipe: Recorded) -> None:
    """Write the recipe with what is to be said of it, unless the directory has one."""
    path = directory / RECIPE
    if not path.is_file():
        about = "; ".join(text for text in (f"from {recipe.source}", recipe.about) if text)
        write_json(path, {**recipe.recipe.as_json(), "about": about})
