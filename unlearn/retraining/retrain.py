"""Training of an adapter again, on other rows: the exact answer for edits and scores.

`retrain` starts from the run's base, makes a fresh LoRA adapter of the same configuration, and
trains it by a `Recipe` on the rows that are kept. Everything that is random is keyed by the
recipe's seed: the initial A matrices (`torch.manual_seed(seed)` before PEFT makes them), dropout,
and the order of the rows (a generator of its own, one permutation per epoch). With the recipe an
adapter was trained by, and no row removed, this gives that adapter again, up to rounding.

The loss of a batch is the cross-entropy averaged over its supervised tokens, what Hugging Face
trainers minimise.
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import InputError, NumericalError
from influence.halving import Steps, in_parts
from influence.loading import from_peft
from influence.loss import supervised_logits, token_losses
from influence.memory import bounds
from influence.progress import track
from influence.rows import Examples
from influence.run import Run
from influence.store import write_json
from influence.tokens import TokenizedExamples
from unlearn.record.outputs import refuse_taken
from unlearn.record.version import version
from unlearn.retraining.recipe import Recipe, recipe_of

#: Tokens that a training step runs at a time, padding included (a choice). Larger batches are
#: split, which changes rounding only.
MICRO_TOKENS = 16384

#: Initial values of LoRA matrices that change no weight of the base and read no data: those that
#: can be drawn again.
_REPEATABLE = (True, False, "gaussian", "orthogonal")


def retrain(
    run: Run,
    remove: Sequence[str] = (),
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    checkpoints: Sequence[int] = (),
    stop_after: int | None = None,
    edit: str | Path | None = None,
    overwrite: bool = False,
    to_come: int = 0,
) -> Path:
    """Train a fresh adapter of the run's configuration on its rows, without those in `remove`.

    Returns the directory.

    Parameters
    ----------
    run
        The run whose base, adapter configuration, rows and truncation are used.
    remove
        Ids of the rows to leave out; an unknown or repeated id is an error.
    out
        The adapter directory to make: it loads with `PeftModel.from_pretrained`; beside it
        `retrain.json` says what was done. It appears when the training is complete, not before.
    recipe
        How to train; without one as `recipe_of` finds it recorded.
    checkpoints
        Epochs (from 1) after which the adapter is saved too, as `out/epoch-N`: a directory like
        `out`, whose `retrain.json` has `epoch`, `step` (taken so far), `lr` (of the last step),
        `sum_lr` (of all steps so far) and `loss` (of the last batch, nats per token).
    stop_after
        Stop after this epoch. The learning rates stay those of the whole recipe, so this gives the
        adapter that a whole training passes through.
    edit
        Train on the rows as they are after this edit (its folder): what a removal, relabelling or
        correction stands in for. `remove` may be empty then.
    to_come
        Trainings like this one that the caller makes after it: the time of all is said.
    """
    out = Path(out)
    start = None if edit is None else version(run, edit)
    tokens, rows = (run.tokens, run.train) if start is None else (start.tokens, start.rows)
    kept = kept_rows(rows, remove)
    refuse_taken(out, overwrite)
    recipe = recipe or recipe_of(run)
    last = _last_epoch(recipe, len(kept), stop_after)
    _refuse_epochs(checkpoints, last)
    gone = [id for id in run.train.ids if start is not None and id in start.removed]
    about: dict[str, Any] = {
        "removed": [*gone, *remove],
        "rows": len(kept),
        "recipe": recipe.as_json(),
    }
    if start is not None:
        about |= {"edit": start.path, "rows_digest": rows.digest}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    def save(state: TrainingState) -> None:
        """Save the adapter where this epoch is asked for, and at the end."""
        folders = [partial / f"epoch-{state.epoch}"] if state.epoch in checkpoints else []
        for folder in [*folders, partial] if state.epoch == last else folders:
            save_adapter(model, folder, {**asdict(state), **about, **digests_of(run, model)})

    with own_randomness(run.model):
        model = fresh_adapter(run.model, recipe.seed)
        train(
            model,
            tokens.select(kept),
            recipe,
            stop_after=last,
            after_epoch=save,
            to_come=to_come,
        )
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(out)
    return out


def _refuse_epochs(checkpoints: Sequence[int], last: int) -> None:
    """Refuse epochs that are not trained, where the adapter was to be saved after them."""
    wrong = sorted({epoch for epoch in checkpoints if not 1 <= epoch <= last})
    if wrong:
        raise InputError(
            f"checkpoints after epochs {', '.join(map(str, wrong))} were asked for; expected 1 to "
            f"{last}, the epochs that are trained: change --keep-epochs, --stop-after or the recipe"
        )


def kept_rows(rows: Examples, remove: Sequence[str]) -> np.ndarray:
    """Positions of the rows that stay `[k]`.

    Raises `DataError` for an unknown id, `InputError` for a repeated one, or where nothing is left.
    """
    removed = [rows.index(id) for id in remove]
    if len(set(removed)) != len(removed):
        repeated = sorted(id for id, times in Counter(remove).items() if times > 1)
        raise InputError(f"ids are given more than once: {', '.join(repeated)}; name each row once")
    kept = np.setdiff1d(np.arange(len(rows)), removed)
    if len(kept) == 0:
        raise InputError("all rows would be removed: nothing is left to train on")
    return kept


def fresh_adapter(model: AdaptedModel, seed: int) -> AdaptedModel:
    """A new, untrained adapter of the same configuration on a copy of the same base.

    Raises `InputError` for an initialisation that changes the base or reads data.
    """
    import copy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model.model).unload()
    return _attach(base, model, seed)


def renewed_adapter(fresh: AdaptedModel, like: AdaptedModel, seed: int) -> AdaptedModel:
    """The same as `fresh_adapter(like, seed)`, on the base of an earlier one.

    The adapter of `fresh` is thrown away, and no base is copied.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = fresh.model.unload()
    return _attach(base, like, seed)


def _attach(base: Any, like: AdaptedModel, seed: int) -> AdaptedModel:
    """Put a new adapter of the configuration of `like` on a bare base."""
    import copy

    from peft import get_peft_model

    refuse_unrepeatable(like)
    config = copy.deepcopy(like.model.peft_config[like.model.active_adapters[0]])
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # as a freshly loaded base has it; PEFT freezes it
        torch.manual_seed(seed)  # just before PEFT draws the A matrices
        return from_peft(get_peft_model(base, config), like.tokenizer, base=like.base)


def refuse_unrepeatable(model: AdaptedModel) -> None:
    """Refuse, with an `InputError`, an adapter that cannot be drawn again from its seed."""
    config = model.model.peft_config[model.model.active_adapters[0]]
    if config.init_lora_weights not in _REPEATABLE:
        raise InputError(
            f"the adapter was initialised by init_lora_weights={config.init_lora_weights!r}, which "
            "changes the base or reads data; retraining starts from one of "
            f"{', '.join(map(str, _REPEATABLE))}: train such an adapter by the program that made it"
        )


@contextmanager
def own_randomness(model: AdaptedModel) -> Iterator[None]:
    """A block in which torch's generators may be seeded, and are afterwards as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def gradients_kept(model: AdaptedModel) -> Iterator[None]:
    """Give the parameters' `.grad` back as it was when the block ends."""
    gradients = [parameter.grad for parameter in model.parameters]
    try:
        yield
    finally:
        for parameter, gradient in zip(model.parameters, gradients, strict=True):
            parameter.grad = gradient


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands after an epoch.

    Attributes
    ----------
    epoch, step : int
        How many are done.
    lr, sum_lr : float
        The learning rate of the last step, and the sum of all so far.
    loss : float
        Of the last batch, nats per token.
    """

    epoch: int
    step: int
    lr: float
    sum_lr: float
    loss: float


def train(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    recipe: Recipe,
    *,
    stop_after: int | None = None,
    after_epoch: Callable[[TrainingState], None] | None = None,
    label: str = "training steps",
    to_come: int = 0,
) -> float:
    """Train the adapter in place, and return the last batch's loss, nats per token.

    `after_epoch` is called with the state after each epoch; `stop_after` ends after that epoch, the
    rates being those of the whole recipe; `label` names the training on its bar. After a tenth of it
    the time left is said of this training and of the `to_come` others like it. Raises
    `NumericalError` if a loss is not finite.
    """
    parameters: list[Any] = model.parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.model.train(recipe.dropout)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        eps=recipe.eps,
    )
    order = torch.Generator().manual_seed(recipe.seed)
    last = _last_epoch(recipe, len(tokens), stop_after)
    per_epoch = -(-len(tokens) // recipe.batch_size)
    steps, loss, sum_lr = recipe.steps(len(tokens)), float("nan"), 0.0
    taken = min(steps, last * per_epoch)
    batches = (
        rows.numpy()
        for _ in range(last)
        for rows in torch.randperm(len(tokens), generator=order).split(recipe.batch_size)
    )
    for step, rows in enumerate(track(islice(batches, taken), label, total=taken, passes=to_come)):
        lr = recipe.rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(model, tokens, rows)
        if not np.isfinite(loss):
            raise NumericalError(
                f"the training loss is {loss} at step {step + 1} of {steps}: lower the recipe's lr"
            )
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        sum_lr += lr
        if after_epoch is not None and ((step + 1) % per_epoch == 0 or step + 1 == taken):
            epoch = -(-(step + 1) // per_epoch)
            after_epoch(TrainingState(epoch, step + 1, float(lr), float(sum_lr), loss))
    model.model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return loss


def _backward(model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray) -> float:
    """Add up the gradient of a batch's mean loss over its supervised tokens, and return it."""
    loss, count = 0.0, int(tokens.counts[rows].sum())

    def run(some: np.ndarray, _: Steps) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        batch = collate(tokens, some, pad_id=model.pad_id, device=model.device)
        part = supervised_logits(model, batch)
        losses = token_losses(part.logits, part.targets)
        # The parts' shares add up to the mean; a batch in one part keeps the rounding of a plain
        # mean.
        mean = losses.mean() if len(some) == len(rows) else losses.sum() / count
        slopes = torch.autograd.grad(mean, model.parameters, allow_unused=True)
        return float(mean.detach()), slopes

    for micro_batch in _micro_batches(tokens, rows):
        for _, (mean, slopes) in in_parts(model, tokens, micro_batch, run):
            loss += mean
            for parameter, slope in zip(model.parameters, slopes, strict=True):
                if slope is not None:
                    parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
    return loss


def _micro_batches(tokens: TokenizedExamples, rows: np.ndarray) -> list[np.ndarray]:
    """A batch in parts of at most `MICRO_TOKENS` tokens, or of what is bounded, padding included."""
    most = min(MICRO_TOKENS, bounds().token_budget or MICRO_TOKENS)
    if len(rows) * int(tokens.lengths[rows].max()) <= most:
        return [rows]
    return [rows[part] for part in plan_batches(tokens.select(rows), most)]


def _last_epoch(recipe: Recipe, rows: int, stop_after: int | None) -> int:
    """The epoch after which a training on so many rows ends."""
    last = recipe.last_epoch(rows)
    if stop_after is not None and not 1 <= stop_after <= last:
        raise InputError(
            f"stop_after {stop_after} was given; the recipe has epochs 1 to {last}: give one of "
            "them"
        )
    return stop_after or last


def digests_of(run: Run, model: AdaptedModel) -> dict[str, str]:
    """Digests of the base, the training rows and the trained adapter, for the record beside it."""
    return {
        "base_digest": run.manifest.base.digest,
        "data_digest": run.manifest.data.digest,
        "adapter_digest": model.adapter_digest,
    }


def save_adapter(model: AdaptedModel, folder: Path, record: Mapping[str, Any]) -> None:
    """Save the adapter as PEFT reads it, with the record of its training beside it."""
    model.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    write_json(folder / "retrain.json", record)
