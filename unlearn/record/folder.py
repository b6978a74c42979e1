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

from influence.adapter_files import adapter_folder
from influence.base_files import DTYPES
from influence.errors import InputError, StoreError
from influence.messages import printable
from influence.store import write_json
from unlearn.record.edit_record import RECORD, EditRecord, facts_of
from unlearn.record.plain import (
    clipped,
    json_value,
    parse_object,
    read_plain,
    reason_of,
    refuse_unless_plain,
    sha256_of_file,
    shortened,
    typed_value_at,
    value_at,
)

#: PEFT's two files of an adapter, and the move that made it, in the same layout.
CONFIG, WEIGHTS, DELTA = "adapter_config.json", "adapter_model.safetensors", "delta.safetensors"

#: Settings of a LoRA configuration that scale or shape the matrices.
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

#: Files that PEFT, transformers or `influence.load` would read beside the recorded ones, or that
#: are pickles.
_LOADED = re.compile(
    r"(adapter_|tokenizer|special_tokens|added_tokens|chat_template|config\.json|model"
    r"|pytorch_model|vocab|merges|spiece|sentencepiece|processor|generation_config).*"
    r"|.*\.(bin|pt|pth|ckpt|pkl|pickle|py)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verification:
    """What a verification came to: what holds, what does not, and what else is worth knowing.

    Attributes
    ----------
    checked, problems, notes : list of str
        One sentence each.
    of_record : list of str
        Those of the problems that are of the record itself, whatever lies in its directories.
    damaged : set of int
        Lines of the chain, from 1, whose adapter directory is not as it was recorded.
    replaced : mapping of int to int
        Lines whose directory a later edit replaced, each with the line of that edit.
    """

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    of_record: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)
    replaced: dict[int, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def seal(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write `folder/edit.json`: the record, with the SHA-256 of every other file under `files`.

    NaN and infinity become null. Raises `InputError` for a subfolder or anything else that is no
    plain file. Returns the record as written.
    """
    folder, files = Path(folder), {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise InputError(
                f"{path} is no plain file: the folder of an edit holds plain files only; take it "
                "away"
            )
        if path.name not in (RECORD, RECORD + ".partial"):
            files[path.name] = sha256_of_file(path)
    sealed = {key: json_value(value) for key, value in record.items()} | {"files": files}
    write_json(folder / RECORD, sealed)
    return sealed


def check_folder(
    result: Verification, folder: Path, line: dict[str, Any] | None, name: str, apply: bool = False
) -> None:
    """Check an adapter directory against its record, and its record against the line of the chain.

    `line` is None where there is no chain; `name` is what the sentences call the edit. With `apply`
    the weights are read too. What is found is added to `result`.
    """
    if not os.path.isdir(folder):
        result.problems.append(
            f"{name}: its adapter was saved at {folder}, where no directory is now; "
            "--adapter DIR checks one that was moved"
        )
        return
    before = len(result.problems)
    with naming(result.problems, folder / RECORD):
        data = read_plain(folder / RECORD)
        if line is not None and not _is_of_line(result.problems, folder / RECORD, data, line, name):
            return
        record = parse_object(data)
        files = _check_facts(result.problems, folder / RECORD, record, line, name)
        for file, expected in files.items():
            _check_file(result.problems, folder, file, expected)
        _check_other_files(result, folder, files)
        if len(result.problems) == before:
            read = EditRecord.salvaged(record)
            of_chain = "" if line is None else ", its record is the one of the chain"
            rows = f"{len(read.requests)} row{'s' * (len(read.requests) != 1)}"
            method = (
                f" by {clipped(printable(read.method.name), 60)}"
                if read.method.name is not None
                else ""
            )
            result.checked.append(
                f"{name}: {read.kind} of {rows}{method} in {folder}: {len(files)} files have the "
                f"sha256 that was recorded{of_chain}"
            )
        if apply:
            check_delta(result, folder, value_at(record, "adapter.before.path"), name)


def _is_of_line(
    problems: list[str], where: Path, data: bytes, line: dict[str, Any], name: str
) -> bool:
    """Whether the bytes of a record are those that a line of the chain names."""
    digest = hashlib.sha256(data).hexdigest()
    if digest == line["record"]:
        return True
    problems.append(
        f"{where}: its sha256 is {digest}, {name} recorded {line['record']}: it was changed, so it "
        "vouches for no file"
    )
    return False


def _check_facts(
    problems: list[str], where: Path, record: dict[str, Any], line: dict[str, Any] | None, name: str
) -> dict[str, Any]:
    """Check what the line repeats of a record, and return the digests of its files by name."""
    for key, value in facts_of(record).items():
        if line is not None and line[key] != value:
            problems.append(
                f"{where}: {key} is {shortened(value)}, {name} of the chain has "
                f"{shortened(line[key])}"
            )
    files = typed_value_at(record, "files", dict)
    problems += [
        f"{where}: it records no {file}, so nothing vouches for that file"
        for file in (CONFIG, WEIGHTS, DELTA)
        if file not in files
    ]
    return files


def _check_file(problems: list[str], folder: Path, file: str, expected: Any) -> None:
    """Check one file of the folder against its recorded SHA-256."""
    if file in ("", ".", "..", RECORD) or "/" in file:
        problems.append(
            f"{folder / RECORD}: files names {shortened(file)}, expected plain file names of the "
            "directory"
        )
        return
    with naming(problems, folder / file):
        digest = sha256_of_file(folder / file)
        if digest != expected:
            problems.append(
                f"{folder / file}: its sha256 is {digest}, expected {shortened(expected)}: it was "
                "changed"
            )


def _check_other_files(result: Verification, folder: Path, files: Mapping[str, Any]) -> None:
    """Name the files that the record does not, as a problem where a loader may read them."""
    for file in sorted(os.listdir(folder)):
        if file in files or file == RECORD:
            continue
        if _LOADED.fullmatch(file):
            result.problems.append(
                f"{folder / file} is not in the record, and loaders may read it: take it away"
            )
        else:
            result.notes.append(
                f"{folder / file} is not in the record; no loader of the adapter reads it"
            )


def check_delta(result: Verification, folder: Path, place: Any, name: str) -> None:
    """Check that the adapter at `place` + delta is that in `folder`, bit for bit, and scaled alike.

    `place` is what the record says, of whatever type.
    """
    before = len(result.problems)
    with naming(
        result.problems, f"{name}: the adapter before the edit, {shortened(place)}, cannot be read"
    ):
        if not isinstance(place, str):
            raise StoreError("its place was not recorded")
        old = adapter_folder(place)
        read_plain(old / CONFIG)
        with _tensors(old / WEIGHTS):
            pass
    if len(result.problems) > before:
        return
    with naming(result.problems, f"{name}: the settings of {old} and {folder}"):
        config_before = parse_object(read_plain(old / CONFIG))
        config = parse_object(read_plain(folder / CONFIG))
        for key in _SCALING:
            if (config_before.get(key) or None) != (config.get(key) or None):
                result.problems.append(
                    f"{folder / CONFIG}: {key} is {shortened(config.get(key))}, before the edit it "
                    "was "
                    f"{shortened(config_before.get(key))}"
                )
    with (
        naming(result.problems, f"{name}: the weights of {folder}"),
        _tensors(old / WEIGHTS) as olds,
        _tensors(folder / DELTA) as deltas,
        _tensors(folder / WEIGHTS) as news,
    ):
        places = (old / WEIGHTS, folder / DELTA, folder / WEIGHTS)
        keys = [{key for key in file.keys() if ".lora_" in key} for file in (olds, deltas, news)]  # noqa: SIM118
        result.problems.extend(_other_tensors(old / WEIGHTS, olds, folder / WEIGHTS, news))
        for place_of, held in zip(places, keys, strict=True):
            if missing := sorted(set.union(*keys) - held):
                more = ", ..." * (len(missing) > 3)
                result.problems.append(f"{place_of} lacks {', '.join(missing[:3])}{more}")
        common = sorted(set.intersection(*keys))
        for key in common:
            with naming(result.problems, f"{folder / WEIGHTS}: {key}"):
                tensors = (file.get_tensor(key) for file in (olds, deltas, news))
                reason = _difference(*tensors)
                if reason:
                    result.problems.append(f"{folder / WEIGHTS}: {key}: {reason}")
        if len(result.problems) == before:
            result.checked.append(
                f"{name}: {old} + {DELTA} is {folder}, bit for bit, in {len(common)} matrices"
            )


def _other_tensors(old: Path, olds: Any, new: Path, news: Any) -> list[str]:
    """Problems of the tensors that are no LoRA matrix: an edit must leave them as they were.

    They are weights of the base, such as the head under an adapted one, which PEFT would load.
    """
    held = [{key for key in file.keys() if ".lora_" not in key} for file in (olds, news)]  # noqa: SIM118
    problems = [f"{new} lacks {key}" for key in sorted(held[0] - held[1])]
    problems += [f"{new} holds {key}, and {old} does not" for key in sorted(held[1] - held[0])]
    for key in sorted(held[0] & held[1]):
        before, after = olds.get_tensor(key), news.get_tensor(key)
        if before.dtype != after.dtype or not torch.equal(before, after):
            problems.append(f"{new}: {key} is not what it was before the edit")
    return problems


def _difference(old: torch.Tensor, delta: torch.Tensor, new: torch.Tensor) -> str | None:
    """Why `old + delta`, in the delta's type, is not `new` to the bit, or None if it is."""
    if not old.shape == delta.shape == new.shape:
        shapes = [tuple(tensor.shape) for tensor in (old, delta, new)]
        return f"its shapes are {shapes[0]} before, {shapes[1]} of the delta, {shapes[2]} after"
    if delta.dtype not in DTYPES.values() or new.dtype != delta.dtype:
        return (
            f"its type is {new.dtype} and the delta's {delta.dtype}, expected the same floating "
            "type"
        )
    # Compared as bytes: -0 equals 0 as a number, and NaN equals nothing.
    bits = [
        part.contiguous().reshape(-1).view(torch.uint8)
        for part in (old.to(delta.dtype) + delta, new)
    ]
    if torch.equal(*bits):
        return None
    count = int((bits[0] != bits[1]).view(-1, new.element_size()).any(1).sum())
    return (
        f"{count} of {new.numel()} entries are not old + delta: the delta, or one of the two "
        "adapters, was changed"
    )


@contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file. Nothing else is ever read as tensors."""
    refuse_unless_plain(path)
    with safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def naming(problems: list[str], what: object) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes its reader do into a problem that names it."""
    try:
        yield
    # Any kind of error: one that got through would be a file that stops its own verification.
    except Exception as error:
        problems.append(f"{what}: {reason_of(error)}")
