"""The record of every edit: append-only, hash-chained, and verified from the files alone.

    OUT/edit.json       the record of one edit, with the SHA-256 of every other file of its adapter directory
    run/audit.jsonl     one line per saved edit: the SHA-256 of its edit.json, and the hash of the line before
    run/manifest.json   key `audit`: how many lines there are and the hash of the last one, the chain's head

A line is the canonical JSON of its entry, `hash` = SHA-256 over the canonical JSON without `hash` (linked time-stamps:
Haber and Stornetta 1991). So a change of any byte of a line, a record or an adapter is found, and so are lines that
were removed, added, repeated or reordered. The chain holds no secret: who can write the run *and* every adapter can
make another consistent history. A copy of the head, which `verify` prints, kept where they cannot write, closes that
gap.

An append writes the line, then the manifest. A kill between the two leaves one line more than the manifest counts,
which is accepted and settled by the next append; a kill inside the line leaves an unfinished one, which is told apart
from damage by the manifest's head (it is the line before) and removed by the next append.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from influence.adapter import DTYPES, adapter_folder
from influence.console import printable
from influence.errors import InputError, MismatchError, StoreError
from influence.run import read_manifest
from influence.store import only_writer, read_json, write_json

FORMAT = 1
CHAIN, MANIFEST, RECORD = "audit.jsonl", "manifest.json", "edit.json"
CONFIG, WEIGHTS, DELTA = "adapter_config.json", "adapter_model.safetensors", "delta.safetensors"
#: What the first line has in place of the hash of the line before.
START = "0" * 64
#: How often, and after how many seconds, an append asks again for the lock: an edit is too dear to lose for it.
ATTEMPTS, PAUSE = 50, 0.1

_ENTRY = {"number": int, "ids": list} | dict.fromkeys(
    ("time", "kind", "edit", "record", "adapter_before", "adapter_after", "run", "previous", "hash"), str
)
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
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


@dataclass(frozen=True)
class _Chain:
    """The lines that are sound in themselves with their places, what is wrong, and where an append goes on."""

    path: Path
    lines: list[tuple[int, dict[str, Any]]]
    problems: list[str]
    head: str  # hash of the last line
    size: int  # bytes of the complete lines
    pending: bool = False  # one line more than the manifest counts
    torn: str | None = None  # the sentence about an unfinished line


# ---- writing -------------------------------------------------------------------------------------------------


def seal(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write `folder/edit.json`: the record, with the SHA-256 of every other file of the folder under `files`.

    NaN and infinity become null. Raises `InputError` for a subfolder or anything else that is no plain file. Returns
    the record as written.
    """
    folder, files = Path(folder), {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path} is no plain file: the folder of an edit holds plain files only; take it away")
        if path.name not in (RECORD, RECORD + ".partial"):
            files[path.name] = _sha256(path)
    sealed = {key: _plain(value) for key, value in record.items()} | {"files": files}
    write_json(folder / RECORD, sealed)
    return sealed


def append(
    run_directory: Path, folder: Path, *, expect: str | None = None, publish: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Append the sealed edit in `folder`, its final place, to the run's chain; return the entry.

    `publish` is called under the chain's lock, before the line is written, to move the folder to its place. `expect`:
    the hash that the last line must still have, where the edit was made from the last one's adapter. An edit that the chain
    has already (same place, same record) is not appended twice. Raises `StoreError` naming the
    line where the chain so far is broken, or the file where the folder is not as its record says: nothing is appended
    then; `MismatchError` where the edit is of another run, or another edit was saved meanwhile.
    """
    run_directory, folder = Path(run_directory), Path(folder).resolve()
    with _lock(run_directory / CHAIN):
        manifest = _manifest(run_directory)
        chain = _sound_chain(run_directory, manifest)
        if expect is not None and chain.head != expect:
            raise MismatchError(
                f"another edit was saved to {chain.path} while this one was made ({chain.lines[-1][1]['edit'] if chain.lines else 'none'}"
                " is the last now), and this one does not contain it: nothing was written. Make the edit again, or say with "
                "--start which adapter it is meant for"
            )
        if publish is not None:
            publish()
        entry = _entry(folder, chain, manifest)
        there = [old for _, old in chain.lines if (old["edit"], old["record"]) == (entry["edit"], entry["record"])]
        if chain.pending or there:
            _settle(run_directory, len(chain.lines), chain.head, chain.lines[-1][1])
        if there:
            return there[-1]
        _write_line(chain, _canonical(entry) + b"\n")
        _settle(run_directory, entry["number"], entry["hash"], entry)
    return entry


def _entry(folder: Path, chain: _Chain, manifest: dict[str, Any]) -> dict[str, Any]:
    """The next line: what it repeats from the record, checked against the folder, the run and the lines so far."""
    try:
        data = _bytes(folder / RECORD)
        facts = _facts(_parse(data))
    except (OSError, ValueError, RecursionError, StoreError) as error:
        raise StoreError(f"{folder / RECORD} cannot be recorded: {_reason(error)}; save the edit again") from error
    if facts["run"] != manifest["digest"]:
        raise MismatchError(
            f"{folder} is an edit of the run {facts['run'][:12]} and {chain.path.parent} is the run "
            f"{manifest['digest'][:12]}: give the run that it was made from"
        )
    entry: dict[str, Any] = {"number": len(chain.lines) + 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    entry |= facts | {"edit": str(folder), "record": hashlib.sha256(data).hexdigest(), "previous": chain.head}
    entry["hash"] = hashlib.sha256(_canonical(entry)).hexdigest()
    found = Verification()
    _check_folder(found, folder, entry, f"line {entry['number']}")
    if entry["adapter_before"] not in _adapters(manifest, [old for _, old in chain.lines]):
        found.problems.append(f"{folder / RECORD}: {_unknown_before(entry)}")
    if not found.passed:
        raise StoreError(f"nothing was appended to {chain.path}: {'; '.join(found.problems)}")
    return entry


def _write_line(chain: _Chain, line: bytes) -> None:
    """Write a line after the last complete one and wait until it is on the disk."""
    try:
        with open(os.open(chain.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as handle:
            handle.truncate(chain.size)  # an unfinished line, if there is one, was never counted
            handle.seek(chain.size)
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise StoreError(
            f"{chain.path} could not be written: {_reason(error)}; mend that, then save the edit again"
        ) from error


def _settle(run_directory: Path, count: int, head: str, last: Mapping[str, Any]) -> None:
    """The manifest follows: the chain's length and head, and the adapter that the last edit made."""
    manifest = read_json(run_directory / MANIFEST)  # the latest: others write their keys too
    write_json(run_directory / MANIFEST, manifest | {"audit": {"entries": count, "head": head}, "now": _now(last)})


def _now(last: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of the adapter that the last line made."""
    return _plain({"adapter": {"path": last["edit"], "digest": last["adapter_after"]}})


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        for attempt in range(ATTEMPTS):
            try:
                stack.enter_context(only_writer(path))
                break
            except StoreError:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(PAUSE)
        yield


# ---- the chain -----------------------------------------------------------------------------------------------


def entries(run_directory: Path) -> list[dict[str, Any]]:
    """The chain's lines, checked; `StoreError` naming the bad line where it is broken. An unfinished one is no line."""
    run_directory = Path(run_directory)
    return [entry for _, entry in _sound_chain(run_directory, _manifest(run_directory)).lines]


def _sound_chain(run_directory: Path, manifest: dict[str, Any]) -> _Chain:
    chain = _chain(run_directory, manifest)
    if chain.problems:
        more = f" (and {len(chain.problems) - 1} more: unlearn verify lists them)" if len(chain.problems) > 1 else ""
        raise StoreError(
            f"the record of edits is broken: {chain.problems[0]}{more}. Restore it from a copy; or move {chain.path} away "
            "as evidence, delete the key audit of manifest.json, and begin a new one"
        )
    return chain


def _chain(run_directory: Path, manifest: dict[str, Any]) -> _Chain:
    """Read and check `audit.jsonl`: each line, how it follows from the one before, and the manifest's count and head."""
    path, problems = run_directory / CHAIN, []
    try:
        data = _bytes(path)
    except FileNotFoundError:
        data = b""
    except (OSError, StoreError) as error:
        return _Chain(path, [], [f"{path}: {_reason(error)}"], START, 0)
    *raws, tail = data.split(b"\n")
    lines: list[tuple[int, dict[str, Any]]] = []
    known = _adapters(manifest, [])
    hashes: list[str | None] = [START]  # of each line as it states it; None where it cannot be read
    number = 0
    for place, raw in enumerate(raws, 1):
        entry, wrong = _line(raw)
        if entry is None:
            hashes.append(None)
            number += 1
        else:
            if not wrong:
                lines.append((place, entry))
            if entry["number"] != number + 1:
                wrong.append(f"its number is {entry['number']}, expected {number + 1}: lines were removed or moved")
            if hashes[-1] is not None and entry["previous"] != hashes[-1]:
                wrong.append(f"it follows a line with hash {entry['previous']}, the line before has {hashes[-1]}")
            if entry["run"] != manifest["digest"]:
                wrong.append(f"it is of run {entry['run']}, expected {manifest['digest']}: was the run fitted anew?")
            if entry["adapter_before"] not in known:
                wrong.append(_unknown_before(entry))
            known.add(entry["adapter_after"])
            hashes.append(entry["hash"])
            number = entry["number"]
        problems += [f"{path} line {place}: {_clip(reason)}" for reason in wrong]

    count, head = _audit(manifest)
    told = f"{run_directory / MANIFEST} counts {count} with head {head}"
    pending, torn = False, None
    if tail and len(raws) == count and hashes[-1] == head:
        torn = (
            f"{path} line {count + 1} is unfinished: an append was killed there. The {count} before it are those that "
            "manifest.json counts; the next edit that is saved removes it"
        )
    elif tail:
        problems.append(f"{path} line {len(raws) + 1} has no end, and {told}: the file was cut or changed")
    elif len(raws) == count + 1 and hashes[count] == head:
        pending = not problems
    elif len(raws) != count:
        problems.append(f"{path} has {len(raws)} lines, and {told}: lines were removed or added")
    elif hashes[-1] != head:
        problems.append(f"{path} line {count}: its hash is {hashes[-1]}, and {told}")
    return _Chain(path, lines, problems, hashes[-1] or START, len(data) - len(tail), pending, torn)


def _line(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """One line by itself: its entry (None if it is none), and what is wrong with it."""
    try:
        entry = _parse(raw)
    except (ValueError, RecursionError) as error:
        return None, [f"it is no JSON object ({_reason(error)})"]
    wrong = [
        f"{key} is {_show(entry.get(key))}, expected {_KINDS[kind]}"
        for key, kind in _ENTRY.items()
        if type(entry.get(key)) is not kind
    ]
    wrong += [f"it has an unknown key {_show(key)}" for key in entry if key not in _ENTRY]
    if not wrong and not all(type(id) is str for id in entry["ids"]):
        wrong.append("ids holds something else than text")
    if not wrong and not 1 <= entry["number"] < 2**31:
        wrong.append("its number is none of a line")
    if not wrong and not os.path.isabs(entry["edit"]):
        wrong.append(f"edit is {_show(entry['edit'])}, expected an absolute path")
    if wrong:
        return None, wrong
    if _canonical(entry) != raw:
        wrong.append("its bytes are not the canonical JSON of its content: it was written by something else")
    content = hashlib.sha256(_canonical({key: value for key, value in entry.items() if key != "hash"})).hexdigest()
    if content != entry["hash"]:
        wrong.append(f"its hash is {entry['hash']}, its content has {content}: it was changed")
    return entry, wrong


def _adapters(manifest: dict[str, Any], before: list[dict[str, Any]]) -> set[str]:
    """Digests of the adapters that a line may start from: the run's own, and what earlier lines made."""
    return {manifest["identity"]["adapter"], *(entry["adapter_after"] for entry in before)}


def _unknown_before(entry: dict[str, Any]) -> str:
    return f"it starts from adapter {entry['adapter_before']}, which is neither the run's nor made by an earlier line"


def _manifest(run_directory: Path) -> dict[str, Any]:
    """The manifest of a finished run; `InputError` where there is none, `StoreError` where it is damaged."""
    path = run_directory / MANIFEST
    try:
        if os.path.lexists(path):
            _parse(_bytes(path))  # whatever read_manifest would stumble over
        manifest = read_manifest(run_directory)
        digest, identity = _get(manifest, "digest", str), _get(manifest, "identity", dict)
        _get(manifest, "identity.adapter", str)
        _audit(manifest)
        content = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if content != digest:
            raise StoreError(f"its digest is {digest}, its identity has {content}: it was changed")
    except (OSError, ValueError, RecursionError, StoreError) as error:
        raise StoreError(f"{path} is damaged: {_reason(error)}") from error
    return manifest


def _audit(manifest: dict[str, Any]) -> tuple[int, str]:
    """How many lines the manifest counts, and the hash of the last."""
    if "audit" not in manifest:
        return 0, START
    count, head = _get(manifest, "audit.entries", int), _get(manifest, "audit.head", str)
    if not 0 <= count < 2**31:
        raise StoreError("audit.entries is no count of lines")
    return count, head


# ---- verifying -----------------------------------------------------------------------------------------------


def verify(run_directory: Path | None = None, *, adapter: Path | None = None, apply: bool = False) -> Verification:
    """Check a run's chain and every adapter it records; or one adapter directory, wherever it lies now.

    Parameters
    ----------
    run_directory
        The run. Its whole chain is checked, and for every line the adapter directory where it was saved.
    adapter
        Check this directory only: against its own record, and against the chain of `run_directory`, or of the run
        that the record names where that is still there.
    apply
        Also read the weights: old adapter + `delta.safetensors`, added in the delta's type, must be the new adapter
        bit for bit.

    Damage of whatever kind is told in `problems`, never raised. Raises `InputError` for a wrong call: no run there, no
    such directory. The adapters' digests are compared as they stand: computing them takes the base (its order of sites).
    """
    found = Verification()
    if adapter is not None:
        _verify_adapter(found, Path(adapter), None if run_directory is None else Path(run_directory), apply)
    elif run_directory is not None:
        _verify_run(found, Path(run_directory), apply)
    else:
        raise InputError("nothing was given to verify: give a run (--run), an edited adapter (--adapter) or both")
    parts = (found.checked, found.problems, found.notes)
    return Verification(*([printable(text).replace("\n", " ") for text in part] for part in parts))


def render(verification: Verification) -> str:
    """The findings as lines for a terminal: what holds, notes, problems, and the verdict last."""
    lines = [f"ok       {text}" for text in verification.checked]
    lines += [f"note     {text}" for text in verification.notes]
    lines += [f"PROBLEM  {text}" for text in verification.problems]
    count = len(verification.problems)
    verdict = "verified" if verification.passed else f"NOT verified: {count} problem{'s' * (count > 1)}"
    return "\n".join([*lines, verdict])


def _verify_run(found: Verification, run_directory: Path, apply: bool) -> None:
    chain = _checked_chain(found, run_directory)
    if chain is None:
        return
    if not chain.lines and not chain.problems and chain.torn is None:
        found.notes.append(f"no edits yet: {chain.path} has no line")
    if chain.problems:
        found.notes.append(
            "the directory that a damaged line names was not checked: --adapter DIR checks one by itself"
        )
    last = {entry["edit"]: place for place, entry in chain.lines}
    for place, entry in chain.lines:
        name = f"line {place}"
        if last[entry["edit"]] != place:
            found.notes.append(f"{name}: the edit of line {last[entry['edit']]} replaced its directory {entry['edit']}")
        else:
            _check_folder(found, Path(entry["edit"]), entry, name, apply)


def _verify_adapter(found: Verification, folder: Path, run_directory: Path | None, apply: bool) -> None:
    if not folder.is_dir():
        raise InputError(f"there is no adapter directory {folder}: give the directory that an edit made")
    where, digest, record = folder / RECORD, "", {}
    with _naming([], where):  # _check_folder tells what is wrong with it
        data = _bytes(where)
        digest, record = hashlib.sha256(data).hexdigest(), _parse(data)
    chain = None
    if run_directory is not None:
        chain = _checked_chain(found, run_directory)
    else:
        place = _at(record, "run.path")
        if isinstance(place, str) and os.path.lexists(os.path.join(place, MANIFEST)):
            with _naming(found.problems, f"{where} names the run {place}"):
                chain = _checked_chain(found, Path(place))
        else:
            found.notes.append(f"{where} names no run that is there, so nothing vouches for it itself: give --run RUN")
    name, entry = str(folder), None
    if chain is not None:
        line = _line_of(chain, folder, digest, record)
        if line is None:
            found.problems.append(f"no line of {chain.path} records {where} (sha256 {digest or 'unknown'})")
        else:
            name, entry = f"line {line[0]}", line[1]
            if entry["edit"] != str(folder.resolve()):
                found.notes.append(f"{name} was saved at {entry['edit']} and is checked at {folder}")
    _check_folder(found, folder, entry, name, apply)


def _line_of(chain: _Chain, folder: Path, digest: str, record: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """The line of an adapter directory: with this very record, else of this adapter, else of this place."""
    wanted = {"record": digest, "adapter_after": _at(record, "adapter.after.digest"), "edit": str(folder.resolve())}
    for key, value in wanted.items():
        for line in reversed(chain.lines):
            if line[1][key] == value:
                return line
    return None


def _checked_chain(found: Verification, run_directory: Path) -> _Chain | None:
    """The chain, with what was found about it; None where the manifest is damaged."""
    try:
        manifest = _manifest(run_directory)
    except StoreError as error:
        found.problems.append(f"{error}; the record of edits cannot be checked without it")
        return None
    chain = _chain(run_directory, manifest)
    found.problems.extend([*chain.problems, *([chain.torn] if chain.torn else [])])
    count = len(chain.lines)
    now, last = manifest.get("now"), chain.lines[-1][1] if chain.lines else None
    told = _now(last) if last else None
    if now != told and not chain.pending and not chain.problems:
        found.problems.append(
            f"{run_directory / MANIFEST}: now is {_show(now)}, and the last line of {chain.path} says {_show(told)}: lines or "
            "the whole chain were taken away, or the manifest was changed"
        )
    if chain.pending:
        found.notes.append(
            f"{chain.path} line {count} is complete, and {run_directory / MANIFEST} does not count it yet: an append was "
            "killed between the two; the next edit that is saved settles it"
        )
    if count and not chain.problems:
        found.checked.append(
            f"{chain.path}: {count} line{'s' * (count > 1)}, each unchanged and following the one before; head {chain.head} "
            "(a copy of it kept elsewhere also guards against a whole new history)"
        )
    return chain


def _check_folder(
    found: Verification, folder: Path, entry: dict[str, Any] | None, name: str, apply: bool = False
) -> None:
    """An adapter directory against its record, and its record against the line of the chain (None: no chain there)."""
    before, where = len(found.problems), folder / RECORD
    if not os.path.isdir(folder):
        found.problems.append(
            f"{name}: its adapter was saved at {folder}, where no directory is now; --adapter DIR checks one that was moved"
        )
        return
    with _naming(found.problems, where):
        data = _bytes(where)
        digest = hashlib.sha256(data).hexdigest()
        if entry is not None and digest != entry["record"]:
            found.problems.append(
                f"{where}: its sha256 is {digest}, {name} recorded {entry['record']}: it was changed, so it vouches for no file"
            )
            return
        record = _parse(data)
        for key, value in _facts(record).items():
            if entry is not None and entry[key] != value:
                found.problems.append(f"{where}: {key} is {_show(value)}, {name} of the chain has {_show(entry[key])}")
        files = _get(record, "files", dict)
        for file in (CONFIG, WEIGHTS, DELTA):
            if file not in files:
                found.problems.append(f"{where}: it records no {file}, so nothing vouches for that file")
        for file, expected in files.items():
            _check_file(found.problems, folder, file, expected)
        for file in sorted(os.listdir(folder)):
            if file in files or file == RECORD:
                continue
            if _LOADED.fullmatch(file):
                found.problems.append(f"{folder / file} is not in the record, and loaders may read it: take it away")
            else:
                found.notes.append(f"{folder / file} is not in the record; no loader of the adapter reads it")
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
    method = _at(record, "method.name")
    return f" by {_clip(printable(method), 60)}" if isinstance(method, str) else ""


def _check_file(problems: list[str], folder: Path, file: str, expected: Any) -> None:
    if file in ("", ".", "..", RECORD) or "/" in file:
        problems.append(f"{folder / RECORD}: files names {_show(file)}, expected plain file names of the directory")
        return
    with _naming(problems, folder / file):
        digest = _sha256(folder / file)
        if digest != expected:
            problems.append(f"{folder / file}: its sha256 is {digest}, expected {_show(expected)}: it was changed")


def _check_delta(found: Verification, folder: Path, record: dict[str, Any], name: str) -> None:
    """Old adapter + delta = new adapter, bit for bit, and nothing that scales the matrices differs."""
    before, place = len(found.problems), record["adapter"]["before"].get("path")
    with _naming(found.problems, f"{name}: the adapter before the edit, {_show(place)}, cannot be read"):
        if not isinstance(place, str):
            raise StoreError("its place was not recorded")
        old = adapter_folder(place)
        _bytes(old / CONFIG)
        with _tensors(old / WEIGHTS):
            pass
    if len(found.problems) > before:
        return
    with _naming(found.problems, f"{name}: the settings of {old} and {folder}"):
        was, now = _parse(_bytes(old / CONFIG)), _parse(_bytes(folder / CONFIG))
        for key in _SCALING:
            if (was.get(key) or None) != (now.get(key) or None):
                values = _show(now.get(key)), _show(was.get(key))
                found.problems.append(f"{folder / CONFIG}: {key} is {values[0]}, before the edit it was {values[1]}")
    with (
        _naming(found.problems, f"{name}: the weights of {folder}"),
        _tensors(old / WEIGHTS) as olds,
        _tensors(folder / DELTA) as deltas,
        _tensors(folder / WEIGHTS) as news,
    ):
        keys = [set(file.keys()) for file in (olds, deltas, news)]
        for file, held in zip((old / WEIGHTS, folder / DELTA, folder / WEIGHTS), keys, strict=True):
            if missing := sorted(set.union(*keys) - held):
                found.problems.append(f"{file} lacks {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")
        same = sorted(set.intersection(*keys))
        for key in same:
            with _naming(found.problems, f"{folder / WEIGHTS}: {key}"):
                reason = _difference(olds.get_tensor(key), deltas.get_tensor(key), news.get_tensor(key))
                if reason:
                    found.problems.append(f"{folder / WEIGHTS}: {key}: {reason}")
        if len(found.problems) == before:
            found.checked.append(f"{name}: {old} + {DELTA} is {folder}, bit for bit, in {len(same)} matrices")


def _difference(old: torch.Tensor, delta: torch.Tensor, new: torch.Tensor) -> str | None:
    """Why `old + delta`, in the delta's type, is not `new` to the bit; None if it is."""
    if not old.shape == delta.shape == new.shape:
        return f"its shapes are {tuple(old.shape)} before, {tuple(delta.shape)} of the delta, {tuple(new.shape)} after"
    if delta.dtype not in DTYPES.values() or new.dtype != delta.dtype:
        return f"its type is {new.dtype} and the delta's {delta.dtype}, expected the same floating type"
    bits = [part.contiguous().reshape(-1).view(torch.uint8) for part in (old.to(delta.dtype) + delta, new)]
    if torch.equal(*bits):
        return None
    count = int((bits[0] != bits[1]).view(-1, new.element_size()).any(1).sum())
    return f"{count} of {new.numel()} entries are not old + delta: the delta, or one of the two adapters, was changed"


@contextmanager
def _tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; nothing else is ever read as tensors."""
    _plain_file(path)
    with safe_open(path, framework="pt") as file:
        yield file


# ---- the small tools -----------------------------------------------------------------------------------------


@contextmanager
def _naming(problems: list[str], what: object) -> Iterator[None]:
    """Turn whatever a damaged or hostile file makes its reader do into a problem that names the file."""
    try:
        yield
    except Exception as error:  # any other kind of error would be a file that stops its own verification
        problems.append(f"{what}: {_reason(error)}")


def _facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a line of the chain repeats from a record; `StoreError` names the key that is wrong."""
    if record.get("format") != FORMAT:
        raise StoreError(f"format is {_show(record.get('format'))}, this version reads {FORMAT}")
    return {
        "kind": _get(record, "kind", str),
        "ids": [_get(request, "id", str) for request in _get(record, "requests", list)],
        "adapter_before": _get(record, "adapter.before.digest", str),
        "adapter_after": _get(record, "adapter.after.digest", str),
        "run": _get(record, "run.digest", str),
    }


def _at(value: Any, keys: str) -> Any:
    """The value at `a.b.c`, None where there is none."""
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _get(record: Any, keys: str, kind: type) -> Any:
    """The value at `a.b.c`, which must be of this type."""
    value = _at(record, keys)
    if type(value) is not kind:
        raise StoreError(f"{keys} is {_show(value)}, expected {_KINDS[kind]}")
    return value


def _parse(data: bytes) -> dict[str, Any]:
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{_show(value)} is no JSON object")
    return value


def _canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def _plain_file(path: Path) -> None:
    """Refuse a folder, pipe or device before it is opened: reading one may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreError("it is no plain file")


def _bytes(path: Path) -> bytes:
    _plain_file(path)
    return path.read_bytes()


def _sha256(path: Path) -> str:
    _plain_file(path)
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """What JSON in UTF-8 can hold: NaN and infinity as null, arrays as lists, unpaired surrogates escaped."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _clip((error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__)


def _show(value: Any) -> str:
    return _SHORT.repr(value)


def _clip(text: str, width: int = 400) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
