"""Digests of bases, remembered by the sizes and times of their files.

The digest of a base is that of its weights as they are loaded, which a base of many gigabytes takes
long to give. It is kept in the user's cache folder (`LORA_INFLUENCE_CACHE`, else the system's; an
empty one keeps nothing), under a name that is made of the base's and the adapter's files, how they
are loaded, and the libraries that load them. That trusts three things: that a file whose size,
inode, time of change and time of status change (which no program sets) are what they were holds what
it held; that only the user writes into the folder, which is looked at; and that nobody changed the
weights in memory by a way that torch does not count. Weights that are other tensors than those that
were loaded are hashed. An edit is recorded after hashing for real (`unlearn.record.save`), and
`unlearn verify` reads nothing of this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

#: Files changed so shortly before they were read are hashed again the next time: a clock may not
#: tell two changes apart that follow one another at once.
YOUNG_SECONDS = 2.0
LIBRARIES = ("torch", "transformers", "peft", "safetensors", "bitsandbytes", "lora-influence")


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """The files that a base in memory was loaded from, as they were before.

    `folders` hold them, `how` says how they were loaded, `seen` [files] is their state then, and
    `settled` whether none of them was young.
    """

    folders: tuple[Path, ...]
    how: str
    seen: tuple[tuple[Any, ...], ...]
    settled: bool

    @classmethod
    def before_loading(cls, folders: Sequence[Path], *how: object) -> BaseFiles | None:
        """Look at the files of these folders; None where one is no folder."""
        if not all(folder.is_dir() for folder in folders):
            return None
        places = tuple(folder.resolve() for folder in folders)
        seen = tuple(_states(places))
        newest = max((max(state[2:4]) for state in seen), default=0) / 1e9
        return cls(places, repr(how), seen, newest < time.time() - YOUNG_SECONDS)

    def after_loading(self, folders: Sequence[Path]) -> BaseFiles | None:
        """These files once they are loaded from `folders`: None where those are others by now, as
        where a hub's newer version was fetched, or hold other files.
        """
        places = tuple(folder.resolve() for folder in folders)
        return self if places == self.folders and self._are_there else None

    @property
    def _are_there(self) -> bool:
        """Whether the files are what they were."""
        return all(folder.is_dir() for folder in self.folders) and (
            tuple(_states(self.folders)) == self.seen
        )

    def digest(self, unchanged: bool, hashed: Callable[[], str]) -> str:
        """The digest that is remembered of these files, else `hashed()`, which is then remembered.

        Neither where the weights in memory are not `unchanged` since they were loaded.
        """
        folder = cache_folder()
        if folder is None or not unchanged or not self.settled:
            return hashed()
        place = folder / self.name
        if (known := _read(place)) is not None:
            return known
        found = hashed()
        if self._are_there:
            _write(place, found)
        return found

    @property
    def name(self) -> str:
        """The name of what is remembered: SHA-256 of all that it depends on."""
        told = [[str(folder) for folder in self.folders], self.how, self.seen, _versions()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class LoadedTensors:
    """The tensors of a base as they were once it was loaded: which, where their numbers lie, and how
    often they had been written in place, as torch counts it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._known = {
            name: (weakref.ref(tensor), tensor.data_ptr(), tensor._version)
            for name, tensor in tensors.items()
        }

    def are(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether they are these very tensors, and nothing was written into them since."""
        if tensors.keys() != self._known.keys():
            return False
        return all(
            known() is tensor and (place, written) == (tensor.data_ptr(), tensor._version)
            for tensor, (known, place, written) in zip(
                (tensors[name] for name in self._known), self._known.values(), strict=True
            )
        )


def cache_folder() -> Path | None:
    """Where digests are remembered: a folder that only this user can write. None: nowhere."""
    named = os.environ.get("LORA_INFLUENCE_CACHE")
    if named == "" or not hasattr(os, "getuid"):
        return None
    system = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(system) / "lora-influence"
    folder = folder / "bases"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError:
        return None
    return folder if state.st_uid == os.getuid() and not state.st_mode & 0o022 else None


def _states(folders: Sequence[Path]) -> Iterator[tuple[Any, ...]]:
    """Name, size, times of change and of status change [ns], inode and device of every file."""
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.is_file():  # what a link points to: the hub's cache is made of links
                it = path.stat()
                yield path.name, it.st_size, it.st_mtime_ns, it.st_ctime_ns, it.st_ino, it.st_dev


def _versions() -> list[str]:
    found = []
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{library} {version(library)}")
    return found


def _read(place: Path) -> str | None:
    try:
        text = place.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _write(place: Path, digest: str) -> None:
    """Atomically, and not at all where the disk refuses."""
    draft = place.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        draft.write_text(digest)
        draft.replace(place)
