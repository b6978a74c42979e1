"""Saving a training on the way, and taking it up after a kill.

The state of a training is one file, replaced as a whole: a kill in the middle of a save leaves the
one before. It holds the request, all that the training depends on, and is taken up by the same
request alone. Which rows a step takes depends on the seed and the step's number, so the state holds
no draws.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.cost import Cost
from influence.errors import MismatchError, StoreError
from influence.progress import say
from unlearn.methods.preparation import Work

STATE = "state.pt"
PARTIAL = STATE + ".partial"
#: What a record says of a training that does not change its steps.
NOT_COMPARED = ("title", "max_damage", "token_budget")


@dataclass(eq=False)
class Progress:
    """How far a training is.

    Attributes
    ----------
    steps_done : int
        Steps that were taken.
    rate : float, optional
        The learning rate; None before the first step where it follows from the stride.
    anchor : Tensor [P], optional
        Where the forget rows were last seen below their goal.
    log : list of dict
        The lines of `steps.jsonl`.
    seconds : float
        Time that earlier processes took.
    """

    steps_done: int = 0
    rate: float | None = None
    anchor: Tensor | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(eq=False)
class Checkpoint:
    """The folder that a training's state is kept in.

    Attributes
    ----------
    work : Work
        The training.
    folder : Path, optional
        Where the state is; without one nothing is kept.
    restart : bool
        Begin anew where the folder holds another training, or a damaged one.
    begun_at : float
        When this process began, by `time.monotonic`.
    """

    work: Work
    folder: Path | None
    restart: bool
    begun_at: float

    def save(self, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Keep where the training stands."""
        if distributed.rank() != 0 or self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "request": json.dumps(request(self.work)),
            "theta": self.work.version.model.snapshot(),
            "anchor": progress.anchor,
            "seconds": progress.seconds + time.monotonic() - self.begun_at,
            "optimizer": optimizer.state_dict(),
            "done": progress.steps_done,
            "rate": progress.rate,
            "cost": asdict(self.work.cost),
            "log": json.dumps(progress.log),
        }
        try:
            with open(self.folder / PARTIAL, "wb") as handle:
                torch.save(state, handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(self.folder / PARTIAL, self.folder / STATE)
        except OSError as error:
            raise StoreError(f"{self.folder} could not be written: {error}") from error

    def take_up(self, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Put model, optimizer and cost where they were saved, and give the progress.

        None where the training begins anew; the optimizer may then hold part of a damaged state.
        Raises `StoreError` for a damaged state and `MismatchError` for another training's.
        """
        path = None if self.folder is None else self.folder / STATE
        if path is None or not path.exists():
            return None
        model, requested = self.work.version.model, request(self.work)
        try:
            state = torch.load(path, map_location=model.device, weights_only=True)
            saved = json.loads(state["request"])
            progress = Progress(
                steps_done=int(state["done"]),
                rate=state["rate"],
                anchor=state["anchor"],
                log=list(json.loads(state["log"])),
                seconds=float(state["seconds"]),
            )
            cost = Cost(**state["cost"])
            differences = [key for key in requested if saved.get(key, ...) != requested[key]]
            if not differences:
                optimizer.load_state_dict(state["optimizer"])
                model.restore(state["theta"])
        except Exception as error:  # whatever a damaged file makes its reader do
            if self.restart:
                return None
            raise StoreError(
                f"{path} is damaged ({type(error).__name__}): "
                f"delete {self.folder}, or --overwrite, to begin anew"
            ) from error
        if differences:
            if self.restart:
                return None
            self._refuse_other(differences)
        self._agree_on(progress.steps_done)
        self.work.cost.gradients, self.work.cost.forwards = cost.gradients, cost.forwards
        if distributed.rank() == 0:
            say(f"going on after step {progress.steps_done} of {self.work.steps}")
        return progress

    def _refuse_other(self, differences: list[str]) -> None:
        """Refuse another training's state, by what differs."""
        moved = ""
        if "adapter" in differences:
            moved = (
                " (an edit saved meanwhile moved the start: "
                "--start names the adapter to begin with)"
            )
        raise MismatchError(
            f"{self.folder} holds another training: it differs in {', '.join(differences)}{moved}. "
            "Ask for the same one to go on, give another --out, or --overwrite to begin anew"
        )

    def _agree_on(self, steps_done: int) -> None:
        """Refuse states of different steps on different processes."""
        if float(distributed.first(np.array([steps_done]))[0]) != steps_done:
            raise StoreError(
                f"the processes hold different states of this training in {self.folder}: "
                "give a folder that all see"
            )


def request(work: Work) -> dict[str, Any]:
    """All that a training's steps depend on, in JSON's own types."""
    description = work.describe([], None)
    depends_on = {
        "run": work.run.digest,
        "adapter": work.version.digest,
        "rows": [row.record() for row in work.change.requests],
        "retained rows": work.retained_digest,
        "held-out rows": None if work.holdout is None else work.holdout.digest,
        **{key: value for key, value in description.items() if key not in NOT_COMPARED},
    }
    if work.needs_expected:
        depends_on["recipe"] = work.recipe.as_json()
    return json.loads(json.dumps(depends_on, default=str))


def discard(checkpoint: str | Path) -> None:
    """Delete the state of a training whose result is saved, and its folder where that is empty."""
    folder = Path(checkpoint)
    for name in (STATE, PARTIAL):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
