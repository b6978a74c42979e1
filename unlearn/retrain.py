"""The exact answer: train the adapter again, on other rows.

`retrain` starts from the run's base, makes a fresh LoRA adapter of the same configuration, and trains it by a
`Recipe` on the rows that are kept. Everything that is random is keyed by the recipe's seed: the initial A
matrices (`torch.manual_seed(seed)` before PEFT makes them) and the order of the rows (a generator of its own, one
permutation per epoch). With the recipe an adapter was trained by, and no row removed, this gives that adapter
again, up to rounding.

The loss of a batch is the cross-entropy averaged over its supervised tokens, what Hugging Face trainers minimise.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence.adapter import AdaptedModel, from_peft
from influence.data import TokenizedExamples, collate
from influence.errors import InputError, NumericalError
from influence.loss import supervised_logits, token_losses
from influence.progress import say, track
from influence.run import Run
from influence.store import write_json

SCHEDULES = ("linear", "constant", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How an adapter was trained: AdamW on shuffled batches.

    `schedule` multiplies `lr` at step k of K (after `warmup` steps of a linear rise): `linear` by 1 - k / K,
    `cosine` by (1 + cos(pi k / K)) / 2, `constant` by 1. `max_grad_norm` clips the gradient's norm, None does not.
    """

    lr: float = 5e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    epochs: int = 15
    batch_size: int = 16
    schedule: str = "linear"
    warmup: int = 0
    max_grad_norm: float | None = None
    dropout: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule {self.schedule!r} was given; expected one of {', '.join(SCHEDULES)}")
        if not (self.lr > 0 and self.epochs >= 1 and self.batch_size >= 1 and self.warmup >= 0):
            raise InputError(
                f"a recipe needs lr > 0, epochs and batch_size of at least 1, warmup of at least 0: {self}"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON object with this class's fields; unknown ones are an error."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"recipe {path} cannot be read: {error}") from error
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(found) - known) if isinstance(found, dict) else ["(no JSON object)"]
        if unknown:
            raise InputError(
                f"recipe {path} has unknown keys: {', '.join(unknown)}; expected {', '.join(sorted(known))}"
            )
        if "betas" in found:
            found["betas"] = tuple(found["betas"])
        return cls(**found)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2, "constant": 1.0}[self.schedule]


def retrain(
    run: Run,
    remove: Sequence[str] = (),
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
) -> Path:
    """Train a fresh adapter of the run's configuration on its rows without those of the ids in `remove`.

    Parameters
    ----------
    run
        The run whose base, adapter configuration, rows and truncation are used.
    remove
        Ids of the rows to leave out; an unknown or repeated id is an error.
    out
        The adapter directory to make: it loads with `PeftModel.from_pretrained`; beside it `retrain.json` says
        what was done. It appears when the training is complete, not before.
    recipe
        How to train; without one the defaults of `Recipe`, with a warning, because they may not be how this
        adapter was trained.

    Returns the directory.
    """
    out = Path(out)
    kept = kept_rows(run, remove)
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give another directory, or --overwrite")
    if recipe is None:
        recipe = Recipe()
        say(f"warning: no recipe was given; training by {recipe}, which may not be how this adapter was trained")
    tokens = run.tokens.select(kept)
    model = fresh_adapter(run.model, recipe.seed)
    final = train(model, tokens, recipe)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.model.save_pretrained(str(partial), safe_serialization=True)
    write_json(
        partial / "retrain.json",
        {
            "removed": list(remove),
            "rows": len(kept),
            "recipe": asdict(recipe),
            "last_loss": final,
            "base_digest": run.manifest["base"]["digest"],
            "data_digest": run.manifest["data"]["digest"],
            "adapter_digest": model.adapter_digest,
        },
    )
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(out)
    return out


def kept_rows(run: Run, remove: Sequence[str]) -> np.ndarray:
    """Positions of the rows that stay; unknown ids, repeated ids and nothing left are errors."""
    removed = [run.train.index(id) for id in remove]
    if len(set(removed)) != len(removed):
        repeated = sorted({id for id in remove if list(remove).count(id) > 1})
        raise InputError(f"ids are given more than once: {', '.join(repeated)}; name each row once")
    kept = np.setdiff1d(np.arange(len(run.train)), removed)
    if len(kept) == 0:
        raise InputError("all rows would be removed: nothing is left to train on")
    return kept


def fresh_adapter(model: AdaptedModel, seed: int) -> AdaptedModel:
    """A new, untrained adapter of the same configuration on a copy of the same base."""
    import copy

    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model.model).unload()
        for parameter in base.parameters():
            parameter.requires_grad_(True)  # as a freshly loaded base has it; PEFT freezes it
        config = copy.deepcopy(model.model.peft_config[model.model.active_adapters[0]])
        config.inference_mode = False
        torch.manual_seed(seed)
        return from_peft(get_peft_model(base, config), model.tokenizer, base=model.base)


def train(model: AdaptedModel, tokens: TokenizedExamples, recipe: Recipe) -> float:
    """Train the adapter in place; returns the last batch's loss. Raises `NumericalError` if the loss is not finite."""
    parameters: list[Any] = model.parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.model.train(recipe.dropout)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas, eps=recipe.eps
    )
    order = torch.Generator().manual_seed(recipe.seed)
    per_epoch = -(-len(tokens) // recipe.batch_size)
    steps, loss = recipe.epochs * per_epoch, float("nan")
    batches = (
        rows.numpy()
        for _ in range(recipe.epochs)
        for rows in torch.randperm(len(tokens), generator=order).split(recipe.batch_size)
    )
    for step, rows in enumerate(track(batches, "training steps", total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, steps)
        part = supervised_logits(model, collate(tokens, rows, pad_id=model.pad_id, device=model.device))
        mean = token_losses(part.logits, part.targets).mean()
        loss = float(mean.detach())
        if not np.isfinite(loss):
            raise NumericalError(f"the training loss is {loss} at step {step + 1} of {steps}: lower the recipe's lr")
        optimizer.zero_grad(set_to_none=True)
        mean.backward()
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
    model.model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return loss
