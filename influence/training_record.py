"""A callback that keeps what later steps need of a training, beside the trainer's checkpoints.

::

    trainer = SFTTrainer(..., callbacks=[influence.TrainingRecord(epochs=(0.5, 1, 2))])

It writes `influence/` in the trainer's output directory (what is in it:
`influence.trainer_output`), and `influence fit --trainer-output DIR` reads it. Early adapters are
the best points to look at, and a trainer that keeps its last checkpoints only has none of them.

The training is not changed: nothing is drawn from a generator of it, no tensor of it is written,
and its batches are not touched. What a step costs is two entries in a list; files are written when
an epoch is kept, and at the end, on the main process alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from influence.errors import InputError
from influence.kept import save_live_adapter
from influence.messages import one_line
from influence.optimizer_state import MOMENTS, live_second_moments, write_second_moments
from influence.progress import say
from influence.store import write_json
from influence.trainer import recipe_of_arguments
from influence.trainer_output import END_FOLDER, EPOCH, LOGGED, RECORD, STATE, step_of

#: What is written when a training begins, and when it ends, beside the adapters.
BEGUN, ENDED = ("recipe.json", "training_args.json"), (STATE, "order.json")


class TrainingRecord(TrainerCallback):
    """Keep adapters of some epochs, rates, losses, the rows of every step, and the recipe.

    What cannot be known is written as null with the reason: the rows of a step where several
    processes share them or the sampler draws from the global generator; the recipe where the
    arguments ask for what no recipe expresses. What an earlier training left there is moved into
    `earlier-1`, `earlier-2` ..., which nothing reads. Under FSDP or DeepSpeed no adapter is kept,
    because no process has all of it. Raises `InputError` for epochs that are not above 0.

    Parameters
    ----------
    epochs
        When to keep the adapter, in epochs from the start, as in (0.5, 1, 2); None: after every
        epoch. At the first step that reaches one, with Adam's second moments. The adapter at the
        end is kept always.
    """

    def __init__(self, epochs: Sequence[float] | None = None) -> None:
        wanted = None if epochs is None else sorted({float(epoch) for epoch in epochs})
        if wanted is not None and not all(0 < epoch < math.inf for epoch in wanted):
            raise InputError(f"epochs {tuple(epochs or ())} were given; expected numbers above 0")
        self.epochs = wanted
        self._due: list[float] = []
        self._log: list[dict[str, Any]] = []
        self._order: list[list[int]] | None = []
        self._why_no_order = ""
        self._batches: Iterable[list[list[int]]] = iter(())
        self._writes = False
        self._keeps = False

    # ---- what the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the recipe and the arguments."""
        self._writes = bool(state.is_world_process_zero)
        self._keeps = self._writes and not _shared_out(args)
        whole = range(1, math.ceil((state.max_steps and state.num_train_epochs) or 0) + 1)
        self._due = [float(epoch) for epoch in whole] if self.epochs is None else [*self.epochs]
        self._due = [epoch for epoch in self._due if epoch > (state.epoch or 0)]
        self._log, self._order = [], []
        if state.global_step:
            kept = ("step", *LOGGED)
            logged = [entry for entry in state.log_history if "learning_rate" in entry]
            self._log = [{key: entry[key] for key in kept if key in entry} for entry in logged]
            self._no_order(f"the training was resumed at step {state.global_step}")
        if not self._writes:
            return
        if not self._keeps:
            say("note: TrainingRecord keeps no adapters under FSDP or DeepSpeed")
        folder = _folder(args)
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside(folder, state.global_step)
        write_json(folder / "training_args.json", json.loads(args.to_json_string()))
        try:
            found = recipe_of_arguments(args, state.max_steps, kwargs.get("optimizer"))
        except InputError as error:
            (folder / "recipe.json").unlink(missing_ok=True)
            say(f"note: TrainingRecord keeps no recipe: {error}")
        else:
            recipe = {**found.recipe.as_json(), "about": f"from {found.source}; {found.about}"}
            write_json(folder / "recipe.json", recipe)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out in which order the epoch will read the rows."""
        if not self._writes or self._order is None:
            return
        epoch = round(state.epoch or 0)
        batches = None
        if args.world_size > 1:
            self._no_order("several processes share the rows")
        else:
            batches, why = batches_of(kwargs.get("train_dataloader"), epoch)
            if batches is None:
                self._no_order(why)
        if batches is not None:
            count = args.gradient_accumulation_steps
            starts = range(0, len(batches), count)
            self._batches = iter([batches[start : start + count] for start in starts])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rates of the step that is about to be made."""
        if not self._writes:
            return
        rates = [float(group["lr"]) for group in kwargs["optimizer"].param_groups]
        entry: dict[str, Any] = {"step": state.global_step + 1, "learning_rate": rates[0]}
        if len(set(rates)) > 1:
            entry["learning_rates"] = rates
        if self._log and self._log[-1]["step"] == entry["step"]:
            self._log.pop()
        self._log.append(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's rows and epoch, and keep the adapter where this epoch is wanted."""
        if not self._writes:
            return
        if self._log:
            self._log[-1]["epoch"] = state.epoch
        if self._order is not None:
            step = next(iter(self._batches), None)
            if step is None:
                self._no_order("an epoch had more steps than its sampler")
            else:
                self._order.append([row for batch in step for row in batch])
        reached = [epoch for epoch in self._due if (state.epoch or 0) >= epoch - 1e-9]
        if reached:
            self._due = self._due[len(reached) :]
            self._keep(_folder(args) / f"epoch-{reached[-1]:g}", state, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note a loss that the trainer logs, and what of it is the router's."""
        if self._writes and logs and "loss" in logs and self._log:
            for key in ("loss", "aux_loss"):
                if key in logs:
                    self._log[-1][key] = float(logs[key])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the log and the order, and keep the adapter."""
        if not self._writes:
            return
        folder = _folder(args)
        write_json(folder / STATE, self._state(state))
        write_json(folder / "order.json", {"rows": self._order, "unknown": self._why_no_order})
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        # then the model is that of another step than the optimiser
        self._keep(folder / END_FOLDER, state, kwargs, moments=not best, tokenizer=True)

    # ---- what it writes

    def _no_order(self, why: str) -> None:
        """From now on nothing is known of the order, of the steps before neither."""
        self._order, self._why_no_order = None, why

    def _state(self, state: Any) -> dict[str, Any]:
        """The log so far, with the keys of the trainer's own `trainer_state.json`."""
        return {
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "epoch": state.epoch,
            "num_train_epochs": state.num_train_epochs,
            "train_batch_size": state.train_batch_size,
            "log_history": self._log,
        }

    def _keep(
        self,
        folder: Path,
        state: Any,
        kwargs: Any,
        *,
        moments: bool = True,
        tokenizer: bool = False,
    ) -> None:
        """Save the adapter, the log so far and Adam's second moments, whole or not at all."""
        model = kwargs["model"]
        if not self._keeps or not hasattr(_bare(model), "peft_config"):
            return
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_live_adapter(_bare(model), partial)
            write_json(partial / STATE, self._state(state))
            if tokenizer and hasattr(kwargs.get("processing_class"), "save_pretrained"):
                kwargs["processing_class"].save_pretrained(str(partial))
            if moments and kwargs.get("optimizer") is not None:
                found = live_second_moments(kwargs["optimizer"], _bare(model))
                if found:
                    write_second_moments(partial / MOMENTS, found)
        except (OSError, RuntimeError, ValueError) as error:  # the training goes on
            shutil.rmtree(partial, ignore_errors=True)
            say(
                f"warning: TrainingRecord could not keep {folder.name}: {one_line(str(error), 200)}"
            )
            return
        replaced = folder.with_name(folder.name + ".replaced")
        if folder.exists():  # a kill between leaves both under other names
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def batches_of(loader: Any, epoch: int) -> tuple[list[list[int]] | None, str]:
    """The rows of every batch of an epoch, by their position in the data set, or None and why.

    Read from a copy of the loader's sampler with a generator of its own, so that nothing the
    training draws from moves: accelerate's seeded sampler draws each epoch from its seed and the
    epoch's number, and an unshuffled one draws nothing.
    """
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", sampler)
    size, drop = getattr(batches, "batch_size", None), bool(getattr(batches, "drop_last", False))
    if type(batches) is not torch.utils.data.BatchSampler or not size:
        return None, f"batches come from a {type(batches).__name__}"
    kind = type(sampler).__name__
    if type(sampler) is torch.utils.data.SequentialSampler:
        order = list(range(len(sampler)))
    elif kind == "SeedableRandomSampler" and hasattr(sampler, "initial_seed"):
        twin: Any = copy.copy(sampler)
        twin.epoch, twin.generator = epoch, torch.Generator()
        order = list(twin)
    else:
        return None, f"rows are drawn by a {kind}, from a generator that others draw from"
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if drop and groups and len(groups[-1]) < size:
        groups.pop()
    return groups, ""


def _set_aside(record: Path, step: int) -> None:
    """Move what another training recorded into `earlier-N`, when one begins at a step.

    Of one that is resumed the epochs up to its step stay; those that came after are another's.
    """
    others = [record / name for name in (END_FOLDER, *BEGUN, *ENDED)]
    others += [place for place in record.iterdir() if EPOCH.fullmatch(place.name)]
    others = [place for place in others if place.exists()]
    stays = [place for place in others if step and _is_of(place, step)]
    moved = [place for place in others if place not in stays]
    if all(place.name in BEGUN for place in moved):
        return
    number = 1
    while (aside := record / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for place in moved:
        os.replace(place, aside / place.name)
    say(f"note: TrainingRecord moved what an earlier training left in {record} to {aside.name}")


def _is_of(epoch: Path, step: int) -> bool:
    """Whether a folder is that of an epoch that a training had reached at a step."""
    if not EPOCH.fullmatch(epoch.name):
        return False
    try:
        return 0 < step_of(epoch) <= step
    except InputError:
        return False


def _folder(args: Any) -> Path:
    return Path(args.output_dir) / RECORD


def _shared_out(args: Any) -> bool:
    """Whether the weights are shared out over processes."""
    return bool(getattr(args, "fsdp", None)) or bool(getattr(args, "deepspeed", None))


def _bare(model: Any) -> Any:
    """The PEFT model without what distributed training or a compiler puts around it."""
    while hasattr(model, "module") and not hasattr(model, "peft_config"):
        model = model.module
    return getattr(model, "_orig_mod", model)
