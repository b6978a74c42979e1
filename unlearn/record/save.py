"""An edit that was made, saved as a PEFT adapter with its record and a line of the chain."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from influence.adapter import weight_key
from influence.adapter_files import adapter_folder, base_weights
from influence.errors import MismatchError, WorkError
from influence.manifest import read_manifest
from influence.run import Run
from influence.store import only_writer
from unlearn import cards
from unlearn.record.chain import append
from unlearn.record.change import Change
from unlearn.record.change_files import write_rows
from unlearn.record.edit_record import EditRecord
from unlearn.record.folder import DELTA, WEIGHTS, seal
from unlearn.record.outputs import refuse_out, refuse_source
from unlearn.record.version import CHANGED

#: The log of a training's steps, in its adapter directory.
LOG = "steps.jsonl"

#: Files of the old adapter's folder that are copied: by what their names begin with, and end with.
#: Configuration, tokenizer and recipe are among them, weights never are.
_COPIED = (
    "adapter_config.json",
    "recipe.json",
    "vocab",
    "merges.txt",
    "added_tokens.json",
    "spiece",
    "sentencepiece",
    "tokenizer",
    "special_tokens",
    "chat_template",
)
_COPIED_ENDS = (".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit that was made and measured, not yet saved.

    Attributes
    ----------
    change : Change
        What was asked, and of which version of the adapter.
    delta : Tensor [P]
        The move of the LoRA parameters, in `ParamSpace` order: old + delta is the new adapter.
    record : EditRecord
        What was measured and how the edit was made: what `edit.json` will hold.
    log : sequence of dict
        One entry a training step, for `steps.jsonl`; empty for edits by influence.
    """

    change: Change
    delta: Tensor = field(repr=False)
    record: EditRecord = field(repr=False)
    log: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __repr__(self) -> str:
        return cards.edit_line(self.record)

    def _repr_html_(self) -> str:
        return cards.edit_card(self.record)

    @cached_property
    def report(self) -> dict[str, Any]:
        """The record as a dict, with the keys of `edit.json` (`unlearn.record.edit_record`)."""
        return self.record.as_json()

    @property
    def theta(self) -> Tensor:
        """The edited adapter's parameters `[P]`."""
        return self.change.version.theta + self.delta

    @property
    def passed(self) -> bool:
        """Whether the retained rows lost no more than was allowed, where there is a limit."""
        return self.record.guard.passed is not False

    def save(self, out: str | Path, *, force: bool = False, overwrite: bool = False) -> Path:
        """Write the edited adapter and its record to a new directory, and a line to the chain.

        The directory appears when it is complete. Raises `WorkError` where the guard did not pass
        and `force` is not given, `InputError` for a directory that holds something else; nothing is
        written then.
        """
        run, version, out = self.change.version.run, self.change.version, Path(out)
        refuse_out(run, out, overwrite)
        if version.path:
            refuse_source(out, version.path)
        if not self.passed and not force:
            self._refuse_damage()
        _refuse_other_base(run)
        newest = version.head if version.latest else None
        with only_writer(out), _replaced_when_published(out) as (partial, publish):
            self._write(partial)
            seal(partial, self.record.saved(forced=not self.passed).as_json())
            append(run.directory, out, expect=newest, publish=publish)
        run.manifest = read_manifest(run.directory)
        return out

    def _refuse_damage(self) -> None:
        """Raise the error of a guard that did not pass."""
        guard = self.record.guard
        keep = "" if self.log else "keep more rows in the step (--rest), "
        raise WorkError(
            f"the edit raises the retained rows' loss by {guard.damage:.1%} and "
            f"{guard.max_damage:.1%} are allowed: nothing was written. Ask for less (--until), "
            f"{keep}allow more (--max-damage), or save it nevertheless (--force)"
        )

    def _write(self, folder: Path) -> None:
        """PEFT's configuration and weights, the move, and the contents of changed rows."""
        model = self.change.version.model
        config = model.model.peft_config[model.model.active_adapters[0]]
        source = Path(self.change.version.path or os.devnull)
        if (source / "adapter_config.json").is_file():
            for path in sorted(adapter_folder(source).iterdir()):
                if path.is_file() and is_copied(path.name):
                    shutil.copyfile(path, folder / path.name)
        else:
            config.save_pretrained(str(folder))
        names = [weight_key(leaf) for leaf in model.space.leaves]
        for name, flat in ((WEIGHTS, self.theta), (DELTA, self.delta)):
            parts = zip(names, model.space.split(flat), strict=True)
            tensors = {key: part.detach().cpu().contiguous() for key, part in parts}
            if name == WEIGHTS:
                tensors |= base_weights(source)
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # As the other files, and not as safetensors leaves it: services of other users load
            # adapters.
            (folder / name).chmod(0o644)
        if self.log:
            lines = "".join(json.dumps(entry) + "\n" for entry in self.log)
            (folder / LOG).write_text(lines, encoding="utf-8")
        changed = set(self.record.lineage.changed or ())
        if changed:  # by earlier edits too, so that this folder alone tells the rows
            write_rows((row for row in self.change.after if row.id in changed), folder / CHANGED)


def _refuse_other_base(run: Run) -> None:
    """Hash the base for what is put on record: a run may be opened by a remembered digest."""
    if run.model.files is not None and run.model.hashed_base() != run.manifest.base.digest:
        raise MismatchError(
            f"the base {run.manifest.base.path} is another one than {run.directory} was fitted on, "
            "although its files have the sizes and times of before: restore it, and make the edit "
            "again (LORA_INFLUENCE_CACHE= hashes it each time)"
        )


@contextmanager
def _replaced_when_published(out: Path) -> Iterator[tuple[Path, Any]]:
    """An empty folder beside `out`, and the function that puts it in its place.

    A block that fails after that leaves `out` as it was. What was there before lies aside until the
    block has ended, and a save that was killed between the two moves is undone first.
    """
    partial = out.with_name(out.name + ".partial")
    replaced = out.with_name(out.name + ".replaced")

    def restore() -> None:
        """Put back what was there before, where nothing took its place."""
        if replaced.exists() and not out.exists():
            os.replace(replaced, out)

    def publish() -> None:
        """Move the folder into its place."""
        if out.exists():
            os.replace(out, replaced)
        os.replace(partial, out)

    restore()
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial, publish
    except BaseException:
        if not partial.exists() and out.exists():  # published, but not on record
            os.replace(out, partial)
        restore()
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def is_copied(name: str) -> bool:
    """Whether a file of the old adapter's folder goes with the new adapter."""
    return name.startswith(_COPIED) and name.endswith(_COPIED_ENDS)
