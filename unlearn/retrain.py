"""The exact answer: train the adapter again, on other rows.

`retrain` starts from the run's base, makes a fresh LoRA adapter of the same configuration, and trains it by a
`Recipe` on the rows that are kept; `retrain_subsets` does so for many subsets and measures the losses that
scores are judged by (the truth of `analysis lds`). Everything that is random is keyed by the recipe's seed: the
initial A matrices (`torch.manual_seed(seed)` before PEFT makes them), dropout, and the order of the rows (a
generator of its own, one permutation per epoch). With the recipe an adapter was trained by, and no row removed,
this gives that adapter again, up to rounding.

The loss of a batch is the cross-entropy averaged over its supervised tokens, what Hugging Face trainers minimise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence.adapter import AdaptedModel, from_peft
from influence.data import Examples, TokenizedExamples, collate, plan_batches, tokenizer_digest
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.progress import say, track
from influence.run import Run
from influence.store import only_writer, write_json
from unlearn.versions import version

#: Tokens that a training step runs at a time, padding included; larger batches are split, which changes rounding only.
MICRO_TOKENS = 16384
SCHEDULES = ("linear", "constant", "cosine")

#: Initial values of LoRA matrices that change no weight of the base and read no data: those that can be drawn again.
_REPEATABLE = (True, False, "gaussian", "orthogonal")


# ---- the recipe ----------------------------------------------------------------------------------------------


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
        whole = all(type(getattr(self, name)) is int for name in ("epochs", "batch_size", "warmup", "seed"))
        numbers = (self.lr, self.weight_decay, self.eps, *self.betas, self.max_grad_norm or 1.0)
        real = all(type(value) in (int, float) and np.isfinite(value) for value in numbers)
        if not (whole and real and type(self.dropout) is bool):
            raise InputError(
                "a recipe needs whole epochs, batch_size, warmup and seed, dropout true or false, and else finite "
                f"numbers: {self}"
            )
        positive = self.lr > 0 and self.eps > 0 and self.epochs >= 1 and self.batch_size >= 1 and self.warmup >= 0
        if not (positive and self.weight_decay >= 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise InputError(
                "a recipe needs lr and eps above 0, epochs and batch_size of at least 1, warmup and weight_decay of at least "
                f"0, betas in [0, 1): {self}"
            )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe from a JSON object with this class's fields; unknown ones are an error."""
        return cls.of(_read_object(Path(path), "recipe"), f"recipe {path}")

    @classmethod
    def of(cls, found: Mapping[str, Any], source: str) -> Recipe:
        """Make a recipe from a mapping with this class's fields; `source` is named in errors."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(found) - known)
        if unknown:
            raise InputError(f"{source} has unknown keys: {', '.join(unknown)}; expected {', '.join(sorted(known))}")
        betas = found.get("betas", cls.betas)
        if not (isinstance(betas, list | tuple) and len(betas) == 2):
            raise InputError(f"{source} has betas {betas!r}; expected two numbers, as in [0.9, 0.999]")
        try:
            return cls(**{**found, "betas": tuple(betas)})
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def of_training_arguments(cls, found: Mapping[str, Any], source: str) -> Recipe:
        """Translate Hugging Face `TrainingArguments` (its `to_json_string`), for one device.

        Only the numbers: a trainer draws the order of the rows in its own way, so the retrained adapter is one of
        another order. What a recipe cannot express, and a key that is missing, is an error that lists them.
        """
        names = {
            "lr": "learning_rate",
            "weight_decay": "weight_decay",
            "eps": "adam_epsilon",
            "schedule": "lr_scheduler_type",
            "seed": "seed",
        }
        plain = {"warmup_ratio": 0, "max_steps": -1, "label_smoothing_factor": 0, "neftune_noise_alpha": 0}
        plain |= dict.fromkeys(("packing", "dataloader_drop_last", "group_by_length"), 0)
        others = ("adam_beta1", "adam_beta2", "num_train_epochs", "max_grad_norm", "optim")
        batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
        missing = [name for name in (*names.values(), *others) if name not in found]
        missing += [name for name in batch if type(found.get(name)) is not int]
        strange = [f"{key}={found[key]!r}" for key, value in plain.items() if (found.get(key) or 0) not in (0, value)]
        if found.get("loss_type") not in (None, "nll"):
            strange.append(f"loss_type={found['loss_type']!r}")
        if not str(found.get("optim", "adamw")).startswith("adamw"):
            strange.append(f"optim={found['optim']!r}")
        if missing or strange:
            problems = [f"it lacks {', '.join(missing)}"] * bool(missing)
            problems += [f"a recipe cannot express {', '.join(strange)}"] * bool(strange)
            raise InputError(f"{source} cannot be followed: {'; '.join(problems)}. Give a recipe (--recipe FILE.json)")
        epochs = found["num_train_epochs"]
        return cls.of(
            {
                **{ours: found[theirs] for ours, theirs in names.items()},
                "betas": (found["adam_beta1"], found["adam_beta2"]),
                "epochs": int(epochs) if isinstance(epochs, float) and epochs.is_integer() else epochs,
                "batch_size": found[batch[0]] * found[batch[1]],
                "max_grad_norm": found["max_grad_norm"] or None,
                "warmup": found.get("warmup_steps") or 0,
            },
            source,
        )

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * {"linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2, "constant": 1.0}[self.schedule]


def recipe_of(run: Run) -> Recipe:
    """How the run's adapter was trained, as recorded in its folder; else the defaults of `Recipe`, with a warning.

    Read, the first that is there: `recipe.json` (the fields of `Recipe`), `retrain.json` (which `retrain` writes),
    `training_args.json` (a trainer's arguments as JSON; its pickled `.bin` is never opened).
    """
    found = _recorded(run)
    if found is None:
        recipe = Recipe()
        say(f"warning: no recipe was given; training by {recipe}, which may not be how this adapter was trained")
        return recipe
    recipe, path = found
    if path.name == "training_args.json":
        say(f"note: {path} says how the adapter was trained, but not in which order it saw the rows")
    say(f"training by {path}: {recipe}")
    return recipe


def recorded_recipe(run: Run) -> Recipe | None:
    """The recipe recorded in the adapter's folder; None where there is none that can be followed. Says nothing."""
    try:
        found = _recorded(run)
    except InputError:
        return None
    return None if found is None else found[0]


def _recorded(run: Run) -> tuple[Recipe, Path] | None:
    folder = Path(run.manifest["adapter"]["path"] or os.devnull)
    if (path := folder / "recipe.json").is_file():
        return Recipe.read(path), path
    if (path := folder / "retrain.json").is_file():
        found = _read_object(path, "record")
        recipe = Recipe.of(found.get("recipe") or {}, f"record {path}")
        if found.get("epoch") != recipe.epochs:
            raise InputError(
                f"{path} says that this adapter's training stopped after epoch {found.get('epoch')} of {recipe.epochs}: "
                "give the recipe to train by (--recipe FILE.json)"
            )
        return recipe, path
    if (path := folder / "training_args.json").is_file():
        return Recipe.of_training_arguments(_read_object(path, "training arguments"), str(path)), path
    return None


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{what} {path} holds no JSON object; expected one, as in {{...}}")
    return found


# ---- one adapter ---------------------------------------------------------------------------------------------


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
        How to train; without one as `recipe_of` finds it recorded.
    checkpoints
        Epochs (from 1) after which the adapter is saved too, as `out/epoch-N`: a directory like `out`, whose
        `retrain.json` has `epoch`, `step` (taken so far), `lr` (of the last step), `sum_lr` (of all steps so far)
        and `loss` (of the last batch, nats per token).
    stop_after
        Stop after this epoch. The learning rates stay those of the whole recipe, so this gives the adapter that a
        whole training passes through.
    edit
        Train on the rows as they are after this edit (its folder): what a removal, relabelling or correction stands in
        for. `remove` may be empty then.

    Returns the directory.
    """
    out = Path(out)
    start = None if edit is None else version(run, edit)
    tokens, rows = (run.tokens, run.train) if start is None else (start.tokens, start.rows)
    kept = kept_rows(rows, remove)
    refuse_taken(out, overwrite)
    recipe = recipe or recipe_of(run)
    last = _last_epoch(recipe, stop_after)
    wrong = sorted({epoch for epoch in checkpoints if not 1 <= epoch <= last})
    if wrong:
        raise InputError(
            f"checkpoints after epochs {', '.join(map(str, wrong))} were asked for; expected 1 to {last}, the epochs "
            "that are trained: change --keep-epochs, --stop-after or the recipe"
        )
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)

    def save(state: TrainingState) -> None:
        if state.epoch in checkpoints:
            _save(model, partial / f"epoch-{state.epoch}", {**asdict(state), **about, **_digests(run, model)})
        if state.epoch == last:
            _save(model, partial, {**asdict(state), **about, **_digests(run, model)})

    gone = [id for id in run.train.ids if start is not None and id in start.removed]
    about: dict[str, Any] = {"removed": [*gone, *remove], "rows": len(kept), "recipe": asdict(recipe)}
    if start is not None:
        about |= {"edit": start.path, "rows_digest": rows.digest}
    with _own_randomness(run.model):
        model = fresh_adapter(run.model, recipe.seed)
        train(model, tokens.select(kept), recipe, stop_after=last, after_epoch=save)
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(out)
    return out


def kept_rows(rows: Examples, remove: Sequence[str]) -> np.ndarray:
    """Positions of the rows that stay; unknown ids, repeated ids and nothing left are errors."""
    removed = [rows.index(id) for id in remove]
    if len(set(removed)) != len(removed):
        repeated = sorted(id for id, times in Counter(remove).items() if times > 1)
        raise InputError(f"ids are given more than once: {', '.join(repeated)}; name each row once")
    kept = np.setdiff1d(np.arange(len(rows)), removed)
    if len(kept) == 0:
        raise InputError("all rows would be removed: nothing is left to train on")
    return kept


def fresh_adapter(model: AdaptedModel, seed: int) -> AdaptedModel:
    """A new, untrained adapter of the same configuration on a copy of the same base."""
    import copy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model.model).unload()
    return _attach(base, model, seed)


def renewed_adapter(fresh: AdaptedModel, like: AdaptedModel, seed: int) -> AdaptedModel:
    """`fresh_adapter(like, seed)` on the base of an earlier one, `fresh`, whose adapter is thrown away: no copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = fresh.model.unload()
    return _attach(base, like, seed)


def _attach(base: Any, like: AdaptedModel, seed: int) -> AdaptedModel:
    """Put a new adapter of the configuration of `like` on a bare base; the seed is set just before PEFT draws it."""
    import copy

    from peft import get_peft_model

    config = copy.deepcopy(like.model.peft_config[like.model.active_adapters[0]])
    if config.init_lora_weights not in _REPEATABLE:
        raise InputError(
            f"the adapter was initialised by init_lora_weights={config.init_lora_weights!r}, which changes the base or "
            f"reads data; retraining starts from one of {', '.join(map(str, _REPEATABLE))}: train such an adapter by "
            "the program that made it"
        )
    config.inference_mode = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for parameter in base.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # as a freshly loaded base has it; PEFT freezes it
        torch.manual_seed(seed)
        return from_peft(get_peft_model(base, config), like.tokenizer, base=like.base)


@contextmanager
def _own_randomness(model: AdaptedModel) -> Iterator[None]:
    """Within the block torch's generators may be seeded; afterwards they are as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands after an epoch: steps taken, rate of the last one, sum of all rates, last batch's loss."""

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
) -> float:
    """Train the adapter in place; returns the last batch's loss. Raises `NumericalError` if the loss is not finite.

    `after_epoch` is called with the state after each epoch; `stop_after` ends after that epoch, the rates being
    those of the whole recipe.
    """
    parameters: list[Any] = model.parameters
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.model.train(recipe.dropout)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas, eps=recipe.eps
    )
    order = torch.Generator().manual_seed(recipe.seed)
    last = _last_epoch(recipe, stop_after)
    per_epoch = -(-len(tokens) // recipe.batch_size)
    steps, loss, sum_lr = recipe.epochs * per_epoch, float("nan"), 0.0
    batches = (
        rows.numpy()
        for _ in range(last)
        for rows in torch.randperm(len(tokens), generator=order).split(recipe.batch_size)
    )
    for step, rows in enumerate(track(batches, "training steps", total=last * per_epoch)):
        lr = recipe.rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss, count = 0.0, int(tokens.counts[rows].sum())
        for some in _micro_batches(tokens, rows):  # their losses add up to the batch's mean over its tokens
            part = supervised_logits(model, collate(tokens, some, pad_id=model.pad_id, device=model.device))
            losses = token_losses(part.logits, part.targets)
            mean = losses.mean() if len(some) == len(rows) else losses.sum() / count
            mean.backward()
            loss += float(mean.detach())
        if not np.isfinite(loss):
            raise NumericalError(f"the training loss is {loss} at step {step + 1} of {steps}: lower the recipe's lr")
        if recipe.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        sum_lr += lr
        if after_epoch is not None and (step + 1) % per_epoch == 0:
            after_epoch(TrainingState((step + 1) // per_epoch, step + 1, float(lr), float(sum_lr), loss))
    model.model.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return loss


def _micro_batches(tokens: TokenizedExamples, rows: np.ndarray) -> list[np.ndarray]:
    """A batch in parts of at most `MICRO_TOKENS` tokens, padding included; one part where it fits."""
    if len(rows) * int(tokens.lengths[rows].max()) <= MICRO_TOKENS:
        return [rows]
    return [rows[part] for part in plan_batches(tokens.select(rows), MICRO_TOKENS)]


def _last_epoch(recipe: Recipe, stop_after: int | None) -> int:
    """The epoch after which a training ends."""
    if stop_after is not None and not 1 <= stop_after <= recipe.epochs:
        raise InputError(
            f"stop_after {stop_after} was given; the recipe has epochs 1 to {recipe.epochs}: give one of them"
        )
    return stop_after or recipe.epochs


def refuse_taken(out: Path, overwrite: bool) -> None:
    """Refuse an output directory that is a file, or that holds something without `overwrite`."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; an adapter is a directory: give another --out")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give another directory, or --overwrite")


def _digests(run: Run, model: AdaptedModel) -> dict[str, str]:
    return {
        "base_digest": run.manifest["base"]["digest"],
        "data_digest": run.manifest["data"]["digest"],
        "adapter_digest": model.adapter_digest,
    }


def _save(model: AdaptedModel, folder: Path, record: Mapping[str, Any]) -> None:
    """Save the adapter as PEFT reads it, with the record of its training beside it."""
    model.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    write_json(folder / "retrain.json", record)


# ---- many subsets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Retrained:
    """Losses measured under retrained adapters, one row per subset.

    Attributes
    ----------
    path : Path
        The `.npz` that holds them.
    masks : bool array [S, n]
        True where a training row was kept.
    query_loss : array [S, Q]
        Mean cross-entropy per completion token of each query, nats.
    train_loss : array [S, n]
        The same of every training row, kept or not.
    """

    path: Path
    masks: np.ndarray = field(repr=False)
    query_loss: np.ndarray = field(repr=False)
    train_loss: np.ndarray = field(repr=False)


def random_halves(
    n: int, count: int, seed: int = 0, groups: Sequence[Any] | None = None, *, fraction: float = 0.5
) -> np.ndarray:
    """Draw `count` random subsets of n rows, each of `fraction` of them: bool [count, n], True = kept.

    With `groups` [n] (any labels) whole groups are kept or left out, `fraction` of the groups in each subset.
    Subset k depends on the seed and k only: a longer list begins with the shorter one.
    """
    labels = np.arange(n) if groups is None else np.unique([str(g) for g in groups], return_inverse=True)[1]
    if len(labels) != n:
        raise InputError(f"{len(labels)} groups were given for {n} rows; give one per row")
    units = int(labels.max()) + 1 if n else 0
    kept = round(fraction * units)
    if count < 1 or not 1 <= kept < units:
        raise InputError(
            f"{count} subsets of {fraction:g} of {units} {'rows' if groups is None else 'groups'} were asked for; "
            "expected at least one subset, which keeps something and leaves something out"
        )
    masks = np.empty((count, n), bool)
    for k in range(count):
        chosen = np.random.default_rng([seed, k]).permutation(units)[:kept]
        masks[k] = np.isin(labels, chosen)
    return masks


def retrain_subsets(
    run: Run,
    masks: np.ndarray,
    queries: Examples | None = None,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    seeds: Sequence[int] | None = None,
    keep_adapters: bool = False,
    overwrite: bool = False,
) -> Retrained:
    """Train an adapter on every subset of the rows and measure its losses: what scores are judged by.

    Called again after a kill, with the same request, it goes on with the first subset that is not done; a finished
    one returns at once. The file is replaced whole after each subset, and holds the subsets that are done: it can
    be read at any time.

    Parameters
    ----------
    run
        As in `retrain`.
    masks : bool array [S, n]
        True where a row is kept, as from `random_halves`.
    queries
        Rows whose losses are measured beside those of the training rows, truncated like these.
    out
        The `.npz` to write, or a directory, for `truth.npz` in it. It holds `masks`, `query_loss`, `train_loss` and
        `seeds` of the subsets that are done, `done` [S], `train_ids`, `query_ids`, and `request` (JSON: the recipe
        and the digests of all that the losses depend on) with the `run_digest` of the run they were made from.
    recipe
        As in `retrain`.
    seeds
        Seed of each subset, `[S]`, in place of the recipe's.
    keep_adapters
        Also save every adapter, as `subset-000`, ... in the directory (for `truth.npz`: in a directory `truth`).
    overwrite
        Replace a file that was made from another request.

    Raises
    ------
    InputError
        For masks that do not fit the rows; `MismatchError`, naming what differs, for a file of another request.
    NumericalError
        When all others are done and saved, naming the subsets whose losses were not finite.
    """
    masks = _check_masks(masks, len(run.train))
    recipe = recipe or recipe_of(run)
    seeds = [recipe.seed] * len(masks) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != len(masks):
        raise InputError(f"{len(seeds)} seeds were given for {len(masks)} subsets; give one each")
    queries = queries or Examples()
    query_tokens = run.tokenized(queries)
    file, folder = _places(Path(out))
    request = _request(run, masks, queries, recipe, seeds)
    file.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(file):
        done, query_loss, train_loss = _resume(file, request, masks.shape, len(queries), overwrite)
        if keep_adapters:
            done &= [(folder / f"subset-{k:03d}" / "retrain.json").exists() for k in range(len(masks))]
        names = {
            "train_ids": np.array(run.train.ids, dtype=np.str_),
            "query_ids": np.array(queries.ids, dtype=np.str_),
            "request": np.array(json.dumps(request)),
            "run_digest": np.array(run.digest),
        }
        left = np.flatnonzero(~done)
        failed: dict[int, str] = {}
        start, model = time.monotonic(), None
        for count, k in enumerate(left.tolist(), start=1):
            kept = np.flatnonzero(masks[k])
            own = replace(recipe, seed=seeds[k])
            try:
                with _own_randomness(run.model):
                    model = (
                        fresh_adapter(run.model, own.seed)
                        if model is None
                        else renewed_adapter(model, run.model, own.seed)
                    )
                    loss = train(model, run.tokens.select(kept), own)
                query_loss[k] = mean_losses(model, query_tokens)
                train_loss[k] = mean_losses(model, run.tokens)
            except NumericalError as error:
                failed[k] = str(error)
                say(f"warning: subset {k} failed: {error}")
                continue
            if keep_adapters:
                record = {"subset": k, "rows": len(kept), "epoch": own.epochs, "recipe": asdict(own), "loss": loss}
                _save(model, folder / f"subset-{k:03d}", {**record, **_digests(run, model)})
            done[k] = True
            _write(
                file,
                masks=masks[done],
                query_loss=query_loss[done],
                train_loss=train_loss[done],
                seeds=np.array(seeds, dtype=np.int64)[done],
                done=done,
                **names,
            )
            seconds = (time.monotonic() - start) / count * (len(left) - count)
            ahead = f", about {seconds:.0f} s left" if count < len(left) else ""
            say(f"retrained subset {k}: {int(done.sum())} of {len(masks)} done{ahead}")
    if failed:
        shown = "; ".join(f"subset {k}: {reason}" for k, reason in list(failed.items())[:5])
        raise NumericalError(
            f"{len(failed)} of {len(masks)} subsets have no finite losses ({shown}); the {int(done.sum())} others are in "
            f"{file}"
        )
    return Retrained(file, masks, query_loss, train_loss)


def _check_masks(masks: Any, n: int) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.dtype != np.bool_ or masks.ndim != 2 or masks.shape[1] != n or len(masks) == 0:
        raise InputError(
            f"masks of type {masks.dtype} and shape {masks.shape} were given; expected bool [subsets, {n}], True where a "
            "row of the run is kept: make them with unlearn.random_halves"
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty):
        raise InputError(f"subsets {', '.join(map(str, empty[:5]))} keep no row: nothing is left to train on")
    return masks


def _places(out: Path) -> tuple[Path, Path]:
    """The truth file, and the directory of the adapters."""
    if out.suffix == ".npz":
        return out, out.with_suffix("")
    if out.is_file():
        raise InputError(f"{out} is a file that does not end in .npz: give FILE.npz, or a directory")
    return out / "truth.npz", out


def _request(run: Run, masks: np.ndarray, queries: Examples, recipe: Recipe, seeds: Sequence[int]) -> dict[str, Any]:
    """All that the losses depend on, in JSON's own types."""
    config = run.model.model.peft_config[run.model.model.active_adapters[0]].to_dict()
    told = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")
    kind = {"space": run.model.space.digest, **{key: config.get(key) for key in told}}
    packed = np.packbits(masks).tobytes()
    request = {
        "base": run.model.base_digest,
        "adapter configuration": _sha256(json.dumps(kind, sort_keys=True, default=str).encode()),
        "training rows": run.train.digest,
        "queries": queries.digest,
        "tokenizer": tokenizer_digest(run.model.tokenizer),
        "max_length": run.manifest["objective"]["max_length"],
        "dtype": str(next(run.model.model.parameters()).dtype).removeprefix("torch."),
        "number of subsets": len(masks),
        "masks": _sha256(packed),
        "seeds": list(seeds),
        **{f"recipe's {name}": value for name, value in asdict(recipe).items()},
    }
    return json.loads(json.dumps(request))


def _resume(
    file: Path, request: dict[str, Any], shape: tuple[int, int], queries: int, overwrite: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Done flags [S] and losses [S, Q], [S, n] so far; NaN where there is none yet."""
    done, query_loss, train_loss = (
        np.zeros(shape[0], bool),
        np.full((shape[0], queries), np.nan),
        np.full(shape, np.nan),
    )
    if not file.exists():
        return done, query_loss, train_loss
    try:
        with open(file, "rb") as handle, zipfile.ZipFile(handle):
            pass  # numpy would also take a single array
        with np.load(file, allow_pickle=False) as found:
            arrays = {key: found[key] for key in found.files}
        known = json.loads(str(arrays["request"])) if "request" in arrays else {}
        differences = [
            f"{key} is {_short(known.get(key))}, now {_short(value)}"
            for key, value in request.items()
            if known.get(key, ...) != value
        ]
        if not differences:
            done[:] = arrays["done"]
            query_loss[done], train_loss[done] = arrays["query_loss"], arrays["train_loss"]
    except (OSError, KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if overwrite:
            return np.zeros(shape[0], bool), query_loss, train_loss
        raise StoreError(f"{file} is damaged or no .npz ({error}): move it away, or --overwrite") from error
    if differences and not overwrite:
        if not known:
            raise InputError(f"{file} was not written by retraining subsets: give another file, or --overwrite")
        raise MismatchError(
            f"{file} holds other subsets: {'; '.join(differences)}. Ask for the same ones to go on, give another file, or "
            "--overwrite"
        )
    return done, query_loss, train_loss


def _write(file: Path, **arrays: np.ndarray) -> None:
    """Write the file whole beside its name and move it into place."""
    partial = file.with_name(file.name + ".partial")
    try:
        with open(partial, "wb") as handle:
            np.savez(handle, **arrays)  # pyright: ignore[reportArgumentType]
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"{file} could not be written: {error}") from error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
