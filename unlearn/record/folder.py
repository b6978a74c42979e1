"""The folder of an edit: its record with the digests of its files, and the check of both."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from influence.console import printable
from influence.errors import InputError, StoreError
from influence.loading import DTYPES, adapter_folder
from influence.store import write_json
from unlearn.record.plain import (
    as_json,
    clipped,
    parse_object,
    read_plain,
    reason_of,
    refuse_unless_plain,
    sha256_of_file,
    shortened,
    typed_value_at,
    value_at,
)

FORMAT = 1


RECORD = "edit.json"


CONFIG, WEIGHTS, DELTA = "adapter_config.json", "adapter_model.safetensors", "delta.safetensors"


#: Settings of a LoRA configuration that scale or shape the matrices.
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


#: Files that PEFT, transformers or `influence.load` would read beside the recorded ones, or that are pickles.
_LOADED = re.compile(
    r"(adapter_|tokenizer|special_tokens|added_tokens|chat_template|config\.json|model|pytorch_model|vocab|merges|spiece"
    r"|sentencepiece|processor|generation_config).*"
    r"|.*\.(bin|pt|pth|ckpt|pkl|pickle|py)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verification:
    """What `verify` found: sentences of what holds, of what does not, and of what else is worth knowing."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def seal(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write `folder/edit.json`: the record, with the SHA-256 of every other file of the folder under `files`.

    NaN and infinity become null. Raises `InputError` for a subfolder or anything else that is no plain file. Returns
    the record as written.
    """
    folder, files = Path(folder), {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise InputError(
                f"{path} is no plain file: the folder of an edit holds plain files only; take it away"
            )
        if path.name not in (RECORD, RECORD + ".partial"):
            files[path.name] = sha256_of_file(path)
    sealed = {key: as_json(value) for key, value in record.items()} | {"files": files}
    write_json(folder / RECORD, sealed)
    return sealed


def check_folder(
    found: Verification, folder: Path, entry: dict[str, Any] | None, name: str, apply: bool = False
) -> None:
    """An adapter directory against its record, and its record against the line of the chain (None: no chain there)."""
    before, where = len(found.problems), folder / RECORD
    if not os.path.isdir(folder):
        found.problems.append(
            f"{name}: its adapter was saved at {folder}, where no directory is now; --adapter DIR checks one that was moved"
        )
        return
    with naming(found.problems, where):
        data = read_plain(where)
        digest = hashlib.sha256(data).hexdigest()
        if entry is not None and digest != entry["record"]:
            found.problems.append(
                f"{where}: its sha256 is {digest}, {name} recorded {entry['record']}: it was changed, so it vouches for no file"
            )
            return
        record = parse_object(data)
        for key, value in facts_of(record).items():
            if entry is not None and entry[key] != value:
                found.problems.append(
                    f"{where}: {key} is {shortened(value)}, {name} of the chain has {shortened(entry[key])}"
                )
        files = typed_value_at(record, "files", dict)
        for file in (CONFIG, WEIGHTS, DELTA):
            if file not in files:
                found.problems.append(
                    f"{where}: it records no {file}, so nothing vouches for that file"
                )
        for file, expected in files.items():
            _check_file(found.problems, folder, file, expected)
        for file in sorted(os.listdir(folder)):
            if file in files or file == RECORD:
                continue
            if _LOADED.fullmatch(file):
                found.problems.append(
                    f"{folder / file} is not in the record, and loaders may read it: take it away"
                )
            else:
                found.notes.append(
                    f"{folder / file} is not in the record; no loader of the adapter reads it"
                )
        if len(found.problems) == before:
            of = "" if entry is None else ", its record is the one of the chain"
            rows = f"{len(record['requests'])} row{'s' * (len(record['requests']) != 1)}"
            found.checked.append(
                f"{name}: {record['kind']} of {rows}{_by(record)} in {folder}: {len(files)} files have the sha256 that was recorded{of}"
            )
        if apply:
            _check_delta(found, folder, record, name)


def _by(record: dict[str, Any]) -> str:
    """The method, as the record names it."""
    method = value_at(record, "method.name")
    return f" by {clipped(printable(method), 60)}" if isinstance(method, str) else ""


def _check_file(problems: list[str], folder: Path, file: str, expected: Any) -> None:
    if file in ("", ".", "..", RECORD) or "/" in file:
        problems.append(
            f"{folder / RECORD}: files names {shortened(file)}, expected plain file names of the directory"
        )
        return
    with naming(problems, folder / file):
        digest = sha256_of_file(folder / file)
        if digest != expected:
            problems.append(
                f"{folder / file}: its sha256 is {digest}, expected {shortened(expected)}: it was changed"
            )


def _check_delta(found: Verification, folder: Path, record: dict[str, Any], name: str) -> None:
    """Old adapter + delta = new adapter, bit for bit, and nothing that scales the matrices differs."""
    before, place = len(found.problems), record["adapter"]["before"].get("path")
    with naming(
        found.problems, f"{name}: the adapter before the edit, {shortened(place)}, cannot be read"
    ):
        if not isinstance(place, str):
            raise StoreError("its place was not recorded")
        old = adapter_folder(place)
        read_plain(old / CONFIG)
        with _tensors(old / WEIGHTS):
            pass
    if len(found.problems) > before:
        return
    with naming(found.problems, f"{name}: the settings of {old} and {folder}"):
        was, now = parse_object(read_plain(old / CONFIG)), parse_object(read_plain(folder / CONFIG))
        for key in _SCALING:
            if (was.get(key) or None) != (now.get(key) or None):
                values = shortened(now.get(key)), shortened(was.get(key))
                found.problems.append(
                    f"{folder / CONFIG}: {key} is {values[0]}, before the edit it was {values[1]}"
                )
    with (
        naming(found.problems, f"{name}: the weights of {folder}"),
        _tensors(old / WEIGHTS) as olds,
        _tensors(folder / DELTA) as deltas,
        _tensors(folder / WEIGHTS) as news,
    ):
        keys = [set(file.keys()) for file in (olds, deltas, news)]
        for file, held in zip((old / WEIGHTS, folder / DELTA, folder / WEIGHTS), keys, strict=True):
            if missing := sorted(set.union(*keys) - held):
                found.problems.append(
                    f"{file} lacks {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
                )
        same = sorted(set.intersection(*keys))
        for key in same:
            with naming(found.problems, f"{folder / WEIGHTS}: {key}"):
                reason = _difference(
                    olds.get_tensor(key), deltas.get_tensor(key), news.get_tensor(key)
                )
                if reason:
                    found.problems.append(f"{folder / WEIGHTS}: {key}: {reason}")
        if len(found.problems) == before:
            found.checked.append(
                f"{name}: {old} + {DELTA} is {folder}, bit for bit, in {len(same)} matrices"
            )


def _difference(old: torch.Tensor, delta: torch.Tensor, new: torch.Tensor) -> str | None:
    """Why `old + delta`, in the delta's type, is not `new` to the bit; None if it is."""
    if not old.shape == delta.shape == new.shape:
        return f"its shapes are {tuple(old.shape)} before, {tuple(delta.shape)} of the delta, {tuple(new.shape)} after"
    if delta.dtype not in DTYPES.values() or new.dtype != delta.dtype:
        return f"its type is {new.dtype} and the delta's {delta.dtype}, expected the same floating type"
    bits = [
        part.contiguous().reshape(-1).view(torch.uint8)
        for part in (old.to(delta.dtype) + delta, new)
    ]
    if torch.equal(*bits):
        return None
    count = int((bits[0] != bits[1]).view(-1, new.element_size()).any(1).sum())
    return f"{count} of {new.numel()} entries are not old + delta: the delta, or one of the two adapters, was changed"


@contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; nothing else is ever read as tensors."""
    refuse_unless_plain(path)
    with safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def naming(problems: list[str], what: object) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes its reader do into a problem that names the file."""
    try:
        yield
    except (
        Exception
    ) as error:  # any other kind of error would be a file that stops its own verification
        problems.append(f"{what}: {reason_of(error)}")


def facts_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a line of the chain repeats from a record; `StoreError` names the key that is wrong."""
    if record.get("format") != FORMAT:
        raise StoreError(
            f"format is {shortened(record.get('format'))}, this version reads {FORMAT}"
        )
    return {
        "kind": typed_value_at(record, "kind", str),
        "ids": [
            typed_value_at(request, "id", str)
            for request in typed_value_at(record, "requests", list)
        ],
        "adapter_before": typed_value_at(record, "adapter.before.digest", str),
        "adapter_after": typed_value_at(record, "adapter.after.digest", str),
        "run": typed_value_at(record, "run.digest", str),
    }
