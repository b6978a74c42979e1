"""An edit that was made: saved as a new PEFT adapter with its record, the move, and a line in the run's audit chain."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from influence.adapter import weight_key
from influence.errors import InputError, WorkError
from influence.loading import adapter_folder
from influence.manifest import read_manifest
from influence.run import Run
from influence.store import only_writer
from unlearn.record.chain import append, entries
from unlearn.record.change import Change
from unlearn.record.change_files import write_rows
from unlearn.record.folder import seal
from unlearn.record.version import CHANGED
from unlearn.retraining.retrain import refuse_taken

#: The log of a training's steps, in its adapter directory.
LOG = "steps.jsonl"


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit that was made and measured, not yet saved.

    Attributes
    ----------
    change : Change
        What was asked, and of which version of the adapter.
    delta : Tensor [P]
        The move of the LoRA parameters, in `ParamSpace` order: old + delta is the new adapter.
    report : dict
        What `edit.json` will hold (README has the keys).
    log : sequence of dict
        One entry a training step, for `steps.jsonl`; empty for closed-form edits.
    """

    change: Change
    delta: Tensor = field(repr=False)
    report: dict[str, Any] = field(repr=False)
    log: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def theta(self) -> Tensor:
        """The edited adapter's parameters `[P]`."""
        return self.change.version.theta + self.delta

    @property
    def passed(self) -> bool:
        """Whether the retained rows lost no more than was allowed, where there is a limit."""
        return self.report["guard"]["passed"] is not False

    def save(self, out: str | Path, *, force: bool = False, overwrite: bool = False) -> Path:
        """Write the edited adapter to a new directory, its record beside it, and a line in the run's audit chain.

        The directory appears when it is complete. Raises `WorkError` where the guard did not pass and `force` is not given;
        nothing is written then.
        """
        run, out = self.change.version.run, Path(out)
        refuse_out(run, out, overwrite)
        if self.change.version.path and _inside(out, Path(self.change.version.path)):
            raise InputError(
                f"{out} is, or holds, or lies in {self.change.version.path}, which the edit is made from: give a new directory"
            )
        guard = self.report["guard"]
        if not self.passed and not force:
            keep = "" if self.log else "keep more rows in the step (--rest), "
            raise WorkError(
                f"the edit raises the retained rows' loss by {guard['damage']:.1%} and {guard['max_damage']:.1%} are allowed: "
                f"nothing was written. Ask for less (--until), {keep}allow more (--max-damage), or save it nevertheless (--force)"
            )
        partial, replaced = (
            out.with_name(out.name + ".partial"),
            out.with_name(out.name + ".replaced"),
        )
        version = self.change.version
        newest = version.head if version.latest else None

        def publish() -> None:
            if out.exists():
                os.replace(out, replaced)
            os.replace(partial, out)

        with only_writer(out):
            if replaced.exists() and not out.exists():  # a save was killed between the two moves
                os.replace(replaced, out)
            for left in (partial, replaced):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write(partial)
            seal(partial, {**self.report, "guard": {**guard, "forced": not self.passed}})
            try:
                append(run.directory, out, expect=newest, publish=publish)
            except BaseException:
                if not partial.exists() and out.exists():  # published, but not on record: as it was
                    os.replace(out, partial)
                if replaced.exists() and not out.exists():
                    os.replace(replaced, out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        run.manifest = read_manifest(run.directory)
        return out

    def _write(self, folder: Path) -> None:
        """PEFT's configuration and weights, the move, and the contents of changed rows."""
        model = self.change.version.model
        config = model.model.peft_config[model.model.active_adapters[0]]
        source = Path(self.change.version.path or os.devnull)
        if (source / "adapter_config.json").is_file():
            for path in sorted(adapter_folder(source).iterdir()):
                if path.is_file() and _belongs(path.name):
                    shutil.copyfile(path, folder / path.name)
        else:
            config.save_pretrained(str(folder))
        names = [weight_key(leaf) for leaf in model.space.leaves]
        for name, flat in (
            ("adapter_model.safetensors", self.theta),
            ("delta.safetensors", self.delta),
        ):
            tensors = {
                key: part.detach().cpu().contiguous()
                for key, part in zip(names, model.space.split(flat), strict=True)
            }
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(
                0o644
            )  # as the other files: services of other users load adapters
        if self.log:
            (folder / LOG).write_text(
                "".join(json.dumps(entry) + "\n" for entry in self.log), encoding="utf-8"
            )
        changed = set(self.report["lineage"]["changed"])
        if changed:  # by earlier edits too, so that this folder alone tells the rows
            write_rows((row for row in self.change.after if row.id in changed), folder / CHANGED)


def _belongs(name: str) -> bool:
    """Whether a file of the old adapter's folder is copied: configuration, tokenizer and recipe; never weights."""
    if not name.endswith((".json", ".txt", ".model", ".jinja")):
        return False
    known = (
        "adapter_config.json",
        "recipe.json",
        "vocab",
        "merges.txt",
        "added_tokens.json",
        "spiece",
        "sentencepiece",
    )
    return name.startswith((*known, "tokenizer", "special_tokens", "chat_template"))


def refuse_out(run: Run, out: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something, or that the run, its base, its adapter, its rows or an edit needs."""
    sources = [
        str(run.directory),
        *(part.path for part in (run.manifest.adapter, run.manifest.base, run.manifest.data)),
    ]
    for place in sources:
        if place and Path(place).exists() and _inside(out, Path(place)):
            raise InputError(
                f"{out} is, or holds, or lies in {place}, which the edit is made from: give a new directory"
            )
    known, own = entries(run.directory), str(out.resolve())
    for entry in known:
        if entry["edit"] != own and _inside(out, Path(entry["edit"])):
            raise InputError(
                f"{out} holds, or lies in, the edit {entry['edit']}, which is on record: give a new directory"
            )
    refuse_taken(out, overwrite)
    if (
        overwrite
        and out.is_dir()
        and any(out.iterdir())
        and not (out / "adapter_config.json").exists()
    ):
        raise InputError(
            f"{out} holds other things than an adapter, and only one may be replaced: give a new directory"
        )
    made = {entry["adapter_after"] for entry in known if entry["edit"] == own}
    later = [entry for entry in known if entry["adapter_before"] in made and entry["edit"] != own]
    if later:
        raise InputError(
            f"{later[0]['edit']} was made from the adapter in {out}, which therefore stays: give a new directory"
        )


def _inside(out: Path, place: Path) -> bool:
    """Whether one of two paths is, or lies in, the other."""
    out, place = out.resolve(), place.resolve()
    return out == place or out in place.parents or place in out.parents
