"""Verification of a run's edits, or of one edit's folder, from the files alone."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from influence.errors import InputError, StoreError
from influence.messages import printable
from unlearn.record.chain import MANIFEST, Chain, checked_manifest, newest_adapter, read_chain
from unlearn.record.edit_record import RECORD, EditRecord
from unlearn.record.folder import Verification, check_folder, naming
from unlearn.record.plain import parse_object, read_plain, shortened


def verify(
    run_directory: Path | None = None, *, adapter: Path | None = None, apply: bool = False
) -> Verification:
    """Check a run's chain and every adapter it records, or one adapter directory, wherever it lies.

    Damage of whatever kind is told in `problems`, never raised. The adapters' digests are compared
    as they stand: computing them takes the base, whose order of sites they follow.

    Parameters
    ----------
    run_directory
        The run. Its whole chain is checked, and for every line the adapter directory where it was
        saved.
    adapter
        Check this directory only: against its own record, and against the chain of `run_directory`,
        or of the run that the record names where that is still there.
    apply
        Also read the weights: old adapter + `delta.safetensors`, added in the delta's type, must be
        the new adapter bit for bit.

    Raises
    ------
    InputError
        For a wrong call: nothing to verify, no run there, no such directory.
    """
    result = Verification()
    if adapter is not None:
        _verify_adapter(
            result, Path(adapter), None if run_directory is None else Path(run_directory), apply
        )
    elif run_directory is not None:
        _verify_run(result, Path(run_directory), apply)
    else:
        raise InputError(
            "nothing was given to verify: give a run (--run), an edited adapter (--adapter) or both"
        )
    parts = (result.checked, result.problems, result.notes, result.of_record)
    sentences = ([printable(text).replace("\n", " ") for text in part] for part in parts)
    return Verification(*sentences, damaged=result.damaged, replaced=result.replaced)


def render(verification: Verification) -> str:
    """The findings as lines for a terminal: what holds, notes, problems, and the verdict last."""
    lines = [f"ok       {text}" for text in verification.checked]
    lines += [f"note     {text}" for text in verification.notes]
    lines += [f"PROBLEM  {text}" for text in verification.problems]
    count = len(verification.problems)
    verdict = (
        "verified" if verification.passed else f"NOT verified: {count} problem{'s' * (count > 1)}"
    )
    return "\n".join([*lines, verdict])


def _verify_run(result: Verification, run_directory: Path, apply: bool) -> None:
    """Check the chain, and the directory of every line that no later one replaced."""
    chain = _checked_chain(result, run_directory)
    result.of_record.extend(result.problems)
    if chain is None:
        return
    if not chain.lines and not chain.problems and chain.torn is None:
        result.notes.append(f"no edits yet: {chain.path} has no line")
    if chain.problems:
        result.notes.append(
            "the directory that a damaged line names was not checked: --adapter DIR checks one by "
            "itself"
        )
    last = {entry["edit"]: place for place, entry in chain.lines}
    for place, entry in chain.lines:
        name, later, before = f"line {place}", last[entry["edit"]], len(result.problems)
        if later != place:
            result.replaced[place] = later
            result.notes.append(
                f"{name}: the edit of line {later} replaced its directory {entry['edit']}"
            )
        else:
            check_folder(result, Path(entry["edit"]), entry, name, apply)
        if len(result.problems) > before:
            result.damaged.add(place)


def _verify_adapter(
    result: Verification, folder: Path, run_directory: Path | None, apply: bool
) -> None:
    """Check one adapter directory, against the chain of its run where that is there."""
    if not folder.is_dir():
        raise InputError(
            f"there is no adapter directory {folder}: give the directory that an edit made"
        )
    where, digest, record = folder / RECORD, "", EditRecord.salvaged({})
    with naming([], where):  # check_folder tells what is wrong with it
        data = read_plain(where)
        record = EditRecord.salvaged(parse_object(data))
        digest = hashlib.sha256(data).hexdigest()
    chain = None
    if run_directory is not None:
        chain = _checked_chain(result, run_directory)
    else:
        place = record.run.path
        if place is not None and os.path.lexists(os.path.join(place, MANIFEST)):
            with naming(result.problems, f"{where} names the run {place}"):
                chain = _checked_chain(result, Path(place))
        else:
            result.notes.append(
                f"{where} names no run that is there, so nothing vouches for it itself: give --run "
                "RUN"
            )
    name, entry = str(folder), None
    if chain is not None:
        line = _line_of(chain, folder, digest, record)
        if line is None:
            result.problems.append(
                f"no line of {chain.path} records {where} (sha256 {digest or 'unknown'})"
            )
        else:
            name, entry = f"line {line[0]}", line[1]
            if entry["edit"] != str(folder.resolve()):
                result.notes.append(
                    f"{name} was saved at {entry['edit']} and is checked at {folder}"
                )
    check_folder(result, folder, entry, name, apply)


def _line_of(
    chain: Chain, folder: Path, digest: str, record: EditRecord
) -> tuple[int, dict[str, Any]] | None:
    """The line of an adapter directory: of this very record, else this adapter, else this place."""
    wanted = {
        "record": digest,
        "adapter_after": record.adapter.after.digest,
        "edit": str(folder.resolve()),
    }
    for key, value in wanted.items():
        for line in reversed(chain.lines):
            if line[1][key] == value:
                return line
    return None


def _checked_chain(result: Verification, run_directory: Path) -> Chain | None:
    """The chain, its problems added to the result, or None where the manifest is damaged."""
    try:
        manifest = checked_manifest(run_directory)
    except StoreError as error:
        result.problems.append(f"{error}; the record of edits cannot be checked without it")
        return None
    chain = read_chain(run_directory, manifest)
    result.problems.extend([*chain.problems, *([chain.torn] if chain.torn else [])])
    count = len(chain.lines)
    in_chain = newest_adapter(chain.lines[-1][1]) if count else None
    if manifest.now != in_chain and not chain.pending and not chain.problems:
        now, last = (
            shortened(None if newest is None else asdict(newest))
            for newest in (manifest.now, in_chain)
        )
        result.problems.append(
            f"{run_directory / MANIFEST}: now is {now}, and the last line of {chain.path} says "
            f"{last}: "
            "lines or the whole chain were taken away, or the manifest was changed"
        )
    if chain.pending:
        result.notes.append(
            f"{chain.path} line {count} is complete, and {run_directory / MANIFEST} does not count "
            "it "
            "yet: an append was killed between the two; the next edit that is saved settles it"
        )
    if count and not chain.problems:
        result.checked.append(
            f"{chain.path}: {count} line{'s' * (count > 1)}, each unchanged and following the one "
            f"before; head {chain.head} (a copy of it kept elsewhere also guards against a whole "
            "new "
            "history)"
        )
    return chain
