"""The chain of edits of a run: append-only, hash-chained, and verified from the files alone.

    OUT/edit.json       the record of one edit, with the SHA-256 of every file of its folder
    run/audit.jsonl     a line per saved edit: the SHA-256 of its edit.json, the line before's hash
    run/manifest.json   key `audit`: how many lines there are, and the hash of the last, the head

A line is the canonical JSON of its entry, `hash` = SHA-256 over the canonical JSON without `hash`
(linked time-stamps: Haber and Stornetta 1991). So a change of any byte of a line, a record or an
adapter is found, and so are lines that were removed, added, repeated or reordered. The chain holds
no secret: who can write the run *and* every adapter can make another consistent history. A copy of
the head, which `verify` prints, kept where they cannot write, closes that gap.

An append writes the line, then the manifest. A kill between the two leaves one line more than the
manifest counts, which is accepted and settled by the next append; a kill inside the line leaves an
unfinished one, which is told apart from damage by the manifest's head (it is the line before) and
removed by the next append.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence.errors import MismatchError, StoreError
from influence.manifest import (
    AUDIT,
    NAME,
    AuditRecord,
    Manifest,
    NowRecord,
    Source,
    change_under_lock,
    digest_of,
    read_manifest,
)
from influence.store import only_writer
from unlearn.record.edit_record import RECORD, facts_of
from unlearn.record.folder import Verification, check_folder
from unlearn.record.plain import (
    KINDS,
    canonical,
    clipped,
    json_value,
    parse_object,
    read_plain,
    reason_of,
    shortened,
)

#: The chain's file, and the file that counts its lines.
CHAIN, MANIFEST = AUDIT, NAME
#: What the first line has in place of the hash of the line before.
START = "0" * 64
#: How often, and after how many seconds, an append asks again for the lock (a choice: five seconds
#: in all). An edit is too dear to lose for a lock that another save holds for an instant.
ATTEMPTS, PAUSE = 50, 0.1

#: The keys of a line, with the type of each.
_ENTRY = {"number": int, "ids": list} | dict.fromkeys(
    (
        "time",
        "kind",
        "edit",
        "record",
        "adapter_before",
        "adapter_after",
        "run",
        "previous",
        "hash",
    ),
    str,
)


@dataclass(frozen=True)
class Chain:
    """The chain as it was read.

    Attributes
    ----------
    path : Path
        Its file.
    lines : list of (int, dict)
        The lines that are sound in themselves, each with its place, from 1.
    problems : list of str
        What is wrong, a sentence each.
    head : str
        Hash of the last line.
    size : int
        Bytes of the complete lines: an append goes on there.
    pending : bool
        Whether there is one line more than the manifest counts.
    torn : str or None
        The sentence about an unfinished line.
    """

    path: Path
    lines: list[tuple[int, dict[str, Any]]]
    problems: list[str]
    head: str
    size: int
    pending: bool = False
    torn: str | None = None


def append(
    run_directory: Path,
    folder: Path,
    *,
    expect: str | None = None,
    publish: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Append the sealed edit in `folder`, its final place, to the run's chain and return its line.

    Parameters
    ----------
    run_directory
        The run.
    folder
        Where the edit will lie for good.
    expect
        The hash that the last line must still have, where the edit was made from the last one's
        adapter.
    publish
        Called under the chain's lock, before the line is written, to move the folder to its place.

    An edit that the chain has already (same place, same record) is not appended twice.

    Raises
    ------
    StoreError
        Naming the line where the chain so far is broken, or the file where the folder is not as its
        record says. Nothing is appended then.
    MismatchError
        Where the edit is of another run, or another edit was saved meanwhile.
    """
    run_directory, folder = Path(run_directory), Path(folder).resolve()
    with _lock(run_directory / CHAIN):
        manifest = checked_manifest(run_directory)
        chain = sound_chain(run_directory, manifest)
        if expect is not None and chain.head != expect:
            last = chain.lines[-1][1]["edit"] if chain.lines else "none"
            raise MismatchError(
                f"another edit was saved to {chain.path} while this one was made ({last} is the "
                "last "
                "now), and this one does not contain it: nothing was written. Make the edit again, "
                "or "
                "say with --start which adapter it is meant for"
            )
        if publish is not None:
            publish()
        entry = _entry(folder, chain, manifest)
        appended_before = [
            line
            for _, line in chain.lines
            if (line["edit"], line["record"]) == (entry["edit"], entry["record"])
        ]
        if chain.pending or appended_before:
            _settle(run_directory, len(chain.lines), chain.head, chain.lines[-1][1])
        if appended_before:
            return appended_before[-1]
        _write_line(chain, canonical(entry) + b"\n")
        _settle(run_directory, entry["number"], entry["hash"], entry)
    return entry


def _entry(folder: Path, chain: Chain, manifest: Manifest) -> dict[str, Any]:
    """The next line, checked against the folder, the run and the lines so far."""
    try:
        data = read_plain(folder / RECORD)
        facts = facts_of(parse_object(data))
    except (OSError, ValueError, RecursionError, StoreError) as error:
        raise StoreError(
            f"{folder / RECORD} cannot be recorded: {reason_of(error)}; save the edit again"
        ) from error
    if facts["run"] != manifest.digest:
        raise MismatchError(
            f"{folder} is an edit of the run {facts['run'][:12]} and {chain.path.parent} is the "
            "run "
            f"{manifest.digest[:12]}: give the run that it was made from"
        )
    entry: dict[str, Any] = {
        "number": len(chain.lines) + 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    entry |= facts | {
        "edit": str(folder),
        "record": hashlib.sha256(data).hexdigest(),
        "previous": chain.head,
    }
    entry["hash"] = hashlib.sha256(canonical(entry)).hexdigest()
    result = Verification()
    check_folder(result, folder, entry, f"line {entry['number']}")
    if entry["adapter_before"] not in _adapters(manifest, [line for _, line in chain.lines]):
        result.problems.append(f"{folder / RECORD}: {_unknown_before(entry)}")
    if not result.passed:
        raise StoreError(f"nothing was appended to {chain.path}: {'; '.join(result.problems)}")
    return entry


def _write_line(chain: Chain, line: bytes) -> None:
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
            f"{chain.path} could not be written: {reason_of(error)}; mend that, then save the edit "
            "again"
        ) from error


def _settle(run_directory: Path, count: int, head: str, last: Mapping[str, Any]) -> None:
    """Let the manifest follow: the chain's length and head, and the adapter of the last edit."""
    change_under_lock(run_directory, audit=AuditRecord(count, head), now=newest_adapter(last))


def newest_adapter(last: Mapping[str, Any]) -> NowRecord:
    """What the manifest says of the adapter that the last line made."""
    return NowRecord(Source(json_value(last["edit"]), last["adapter_after"]))


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The chain's lock, asked for again for a while where another process holds it."""
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


def entries(run_directory: Path) -> list[dict[str, Any]]:
    """The chain's lines, oldest first. An unfinished one is no line.

    `StoreError` names the bad line where the chain is broken.
    """
    run_directory = Path(run_directory)
    return [entry for _, entry in sound_chain(run_directory, checked_manifest(run_directory)).lines]


def sound_chain(run_directory: Path, manifest: Manifest) -> Chain:
    """The chain of a run, or a `StoreError` that says what is wrong with it and what to do."""
    chain = read_chain(run_directory, manifest)
    if chain.problems:
        more = (
            f" (and {len(chain.problems) - 1} more: unlearn verify lists them)"
            if len(chain.problems) > 1
            else ""
        )
        raise StoreError(
            f"the record of edits is broken: {chain.problems[0]}{more}. Restore it from a copy; or "
            f"move {chain.path} away as evidence, delete the key audit of manifest.json, and begin "
            "a "
            "new one"
        )
    return chain


def read_chain(run_directory: Path, manifest: Manifest) -> Chain:
    """Read and check `audit.jsonl`: each line, its link to the one before, and their count."""
    path = run_directory / CHAIN
    try:
        data = read_plain(path)
    except FileNotFoundError:
        data = b""
    except (OSError, StoreError) as error:
        return Chain(path, [], [f"{path}: {reason_of(error)}"], START, 0)
    *raws, tail = data.split(b"\n")
    lines: list[tuple[int, dict[str, Any]]] = []
    problems: list[str] = []
    possible_starts = _adapters(manifest, [])
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
            wrong += _wrong_link(entry, number, hashes[-1], manifest, possible_starts)
            possible_starts.add(entry["adapter_after"])
            hashes.append(entry["hash"])
            number = entry["number"]
        problems += [f"{path} line {place}: {clipped(reason)}" for reason in wrong]
    size, head = len(data) - len(tail), hashes[-1] or START
    problem, torn = _against_manifest(run_directory, manifest, hashes, unfinished=bool(tail))
    if problem:
        problems.append(problem)
    one_more = not tail and len(raws) == _counted(manifest)[0] + 1
    pending = one_more and not problems
    return Chain(path, lines, problems, head, size, pending, torn)


def _wrong_link(
    entry: dict[str, Any],
    number: int,
    previous: str | None,
    manifest: Manifest,
    possible_starts: set[str],
) -> list[str]:
    """What is wrong with how a line follows from those before.

    `number` and `previous` are the number and the hash of the last one.
    """
    wrong = []
    if entry["number"] != number + 1:
        wrong.append(
            f"its number is {entry['number']}, expected {number + 1}: lines were removed or moved"
        )
    if previous is not None and entry["previous"] != previous:
        wrong.append(
            f"it follows a line with hash {entry['previous']}, the line before has {previous}"
        )
    if entry["run"] != manifest.digest:
        wrong.append(
            f"it is of run {entry['run']}, expected {manifest.digest}: was the run fitted anew?"
        )
    if entry["adapter_before"] not in possible_starts:
        wrong.append(_unknown_before(entry))
    return wrong


def _against_manifest(
    run_directory: Path, manifest: Manifest, hashes: list[str | None], *, unfinished: bool
) -> tuple[str | None, str | None]:
    """What is wrong with the chain beside the manifest, and the sentence about a torn line.

    `hashes` are `START` and those of the complete lines. An unfinished line after those that are
    counted comes from an append that was killed, and so does one complete line more.
    """
    path, lines = run_directory / CHAIN, len(hashes) - 1
    count, head = _counted(manifest)
    counted = f"{run_directory / MANIFEST} counts {count} with head {head}"
    if unfinished and lines == count and hashes[-1] == head:
        return None, (
            f"{path} line {count + 1} is unfinished: an append was killed there. The {count} "
            "before it "
            "are those that manifest.json counts; the next edit that is saved removes it"
        )
    if unfinished:
        return (
            f"{path} line {lines + 1} has no end, and {counted}: the file was cut or changed",
            None,
        )
    if lines == count + 1 and hashes[count] == head:
        return None, None
    if lines != count:
        return f"{path} has {lines} lines, and {counted}: lines were removed or added", None
    if hashes[-1] != head:
        return f"{path} line {count}: its hash is {hashes[-1]}, and {counted}", None
    return None, None


def _line(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """One line by itself: its entry (None if it is none), and what is wrong with it."""
    try:
        entry = parse_object(raw)
    except (ValueError, RecursionError) as error:
        return None, [f"it is no JSON object ({reason_of(error)})"]
    wrong = [
        f"{key} is {shortened(entry.get(key))}, expected {KINDS[kind]}"
        for key, kind in _ENTRY.items()
        if type(entry.get(key)) is not kind
    ]
    wrong += [f"it has an unknown key {shortened(key)}" for key in entry if key not in _ENTRY]
    if not wrong and not all(type(id) is str for id in entry["ids"]):
        wrong.append("ids holds something else than text")
    if not wrong and not 1 <= entry["number"] < 2**31:
        wrong.append("its number is none of a line")
    if not wrong and not os.path.isabs(entry["edit"]):
        wrong.append(f"edit is {shortened(entry['edit'])}, expected an absolute path")
    if wrong:
        return None, wrong
    if canonical(entry) != raw:
        wrong.append(
            "its bytes are not the canonical JSON of its content: it was written by something else"
        )
    without_hash = {key: value for key, value in entry.items() if key != "hash"}
    content = hashlib.sha256(canonical(without_hash)).hexdigest()
    if content != entry["hash"]:
        wrong.append(f"its hash is {entry['hash']}, its content has {content}: it was changed")
    return entry, wrong


def _adapters(manifest: Manifest, before: list[dict[str, Any]]) -> set[str]:
    """Digests of the adapters that a line may start from: the run's, and those of earlier lines."""
    return {manifest.identity["adapter"], *(entry["adapter_after"] for entry in before)}


def _unknown_before(entry: dict[str, Any]) -> str:
    """The sentence about an edit that starts from nowhere."""
    return (
        f"it starts from adapter {entry['adapter_before']}, which is neither the run's nor made by "
        "an "
        "earlier line"
    )


def checked_manifest(run_directory: Path) -> Manifest:
    """The manifest of a finished run.

    `InputError` where there is none, `StoreError` where it is damaged.
    """
    path = run_directory / MANIFEST
    try:
        if os.path.lexists(path):
            parse_object(read_plain(path))  # whatever read_manifest would stumble over
        manifest = read_manifest(run_directory)
        if not isinstance(manifest.identity.get("adapter"), str):
            adapter = shortened(manifest.identity.get("adapter"))
            raise StoreError(f"identity.adapter is {adapter}, expected text")
        _counted(manifest)
        content = digest_of(manifest.identity)
        if content != manifest.digest:
            raise StoreError(
                f"its digest is {manifest.digest}, its identity has {content}: it was changed"
            )
    except (OSError, ValueError, RecursionError, StoreError) as error:
        raise StoreError(f"{path} is damaged: {reason_of(error)}") from error
    return manifest


def _counted(manifest: Manifest) -> tuple[int, str]:
    """How many lines the manifest counts, and the hash of the last."""
    if manifest.audit is None:
        return 0, START
    if not 0 <= manifest.audit.entries < 2**31:
        raise StoreError("audit.entries is no count of lines")
    return manifest.audit.entries, manifest.audit.head
