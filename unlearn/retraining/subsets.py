"""Adapters trained again on many subsets of the rows, and their losses, which scores are judged by.

They are the truth of `analysis lds`: what a row's absence does to a loss, seen over many trainings.
Several processes (`influence.distributed`) deal the subsets out; the first collects the losses.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from influence import distributed
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.store import only_writer
from influence.tokens import TokenizedExamples, tokenizer_digest
from unlearn.retraining.recipe import Recipe, recipe_of
from unlearn.retraining.retrain import (
    digests_of,
    fresh_adapter,
    own_randomness,
    renewed_adapter,
    save_adapter,
    train,
)


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
    """Draw `count` random subsets of n rows: bool [count, n], True where a row is kept.

    Each has `fraction` of the rows. With `groups` [n] (any labels) whole groups are kept or left
    out, `fraction` of the groups in each subset. Subset k depends on the seed and k only: a longer
    list begins with the shorter one. Raises `InputError` where a subset would keep everything or
    nothing.
    """
    labels = np.arange(n)
    if groups is not None:
        labels = np.unique([str(group) for group in groups], return_inverse=True)[1]
    if len(labels) != n:
        raise InputError(f"{len(labels)} groups were given for {n} rows; give one per row")
    units = int(labels.max()) + 1 if n else 0
    kept = round(fraction * units)
    if count < 1 or not 1 <= kept < units:
        parts = "rows" if groups is None else "groups"
        raise InputError(
            f"{count} subsets of {fraction:g} of {units} {parts} were asked for; expected at least "
            "one "
            "subset, which keeps something and leaves something out"
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
    """Train an adapter on every subset of the rows and measure its losses.

    Called again after a kill, with the same request, it goes on with the first subset that is not
    done; a finished one returns at once. The file is replaced whole after each subset (of several
    processes: after each has trained one or some), and holds the subsets that are done: it can be
    read at any time. Any number of processes goes on with it.

    Parameters
    ----------
    run
        As in `retrain`.
    masks : bool array [S, n]
        True where a row is kept, as from `random_halves`.
    queries
        Rows whose losses are measured beside those of the training rows, truncated like these.
    out
        The `.npz` to write, or a directory, for `truth.npz` in it. It holds `masks`, `query_loss`,
        `train_loss` and `seeds` of the subsets that are done, `done` [S], `train_ids`, `query_ids`,
        and `request` (JSON: the recipe and the digests of all that the losses depend on) with the
        `run_digest` of the run they were made from.
    recipe
        As in `retrain`.
    seeds
        Seed of each subset, `[S]`, in place of the recipe's.
    keep_adapters
        Also save every adapter, as `subset-000`, ... in the directory (for `truth.npz`: in a
        directory `truth`).
    overwrite
        Replace a file that was made from another request.

    Raises
    ------
    InputError
        For masks or seeds that do not fit the rows.
    MismatchError
        For a file of another request, naming what differs.
    StoreError
        For a damaged file, or one that cannot be written.
    NumericalError
        When all others are done and saved, naming the subsets whose losses were not finite.
    """
    masks = _checked_masks(masks, len(run.train))
    recipe = recipe or recipe_of(run)
    seeds = [recipe.seed] * len(masks) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != len(masks):
        raise InputError(f"{len(seeds)} seeds were given for {len(masks)} subsets; give one each")
    queries = queries or Examples()
    work = _Subsets(run, masks, queries, run.query_tokens(queries), recipe, seeds)
    file, folder = _places(Path(out))
    file.parent.mkdir(parents=True, exist_ok=True)
    with distributed.held_by_first(only_writer(file)):

        def resumed() -> _Losses:
            """What is done already."""
            losses = _resumed(file, work, overwrite)
            if keep_adapters:
                for k in range(len(masks)):
                    losses.done[k] &= (_adapter_of(folder, k) / "retrain.json").exists()
            return losses

        losses = distributed.at_first(resumed)
        losses, failed = _train_the_rest(work, losses, file, folder if keep_adapters else None)
    if failed:
        shown = "; ".join(f"subset {k}: {reason}" for k, reason in list(failed.items())[:5])
        raise NumericalError(
            f"{len(failed)} of {len(masks)} subsets have no finite losses ({shown}); the "
            f"{int(losses.done.sum())} others are in {file}"
        )
    return Retrained(file, masks, losses.query, losses.train)


@dataclass(frozen=True, eq=False)
class _Subsets:
    """What is trained and measured: the run's rows by masks [S, n], by a recipe with seeds [S]."""

    run: Run
    masks: np.ndarray
    queries: Examples
    query_tokens: TokenizedExamples
    recipe: Recipe
    seeds: list[int]


@dataclass(frozen=True, eq=False)
class _Losses:
    """Which subsets are done [S], and the losses [S, Q] and [S, n], NaN where there is none yet."""

    done: np.ndarray
    query: np.ndarray
    train: np.ndarray

    @classmethod
    def empty(cls, work: _Subsets) -> _Losses:
        """Nothing done."""
        subsets = len(work.masks)
        queries = np.full((subsets, len(work.queries)), np.nan)
        return cls(np.zeros(subsets, bool), queries, np.full(work.masks.shape, np.nan))


def _train_the_rest(
    work: _Subsets, losses: _Losses, file: Path, folder: Path | None
) -> tuple[_Losses, dict[int, str]]:
    """Train the subsets that are not done, writing the file after each.

    Adapters are saved in `folder`, where there is one. Returns all losses, and why some subsets have
    no finite ones. Of several processes each trains some.
    """
    run, masks = work.run, work.masks
    names = {
        "train_ids": np.array(run.train.ids, dtype=np.str_),
        "query_ids": np.array(work.queries.ids, dtype=np.str_),
        "request": np.array(json.dumps(_request(work))),
        "run_digest": np.array(run.digest),
    }
    missing = np.flatnonzero(~losses.done)
    failed: dict[int, str] = {}
    start, count = time.monotonic(), 0
    for made in distributed.rounds(_trained(work, distributed.shard(missing).tolist(), folder)):
        collected = dict(distributed.gathered(made))
        losses_of = {k: found for k, found in collected.items() if not isinstance(found, str)}
        for k, found in losses_of.items():
            losses.done[k], losses.query[k], losses.train[k] = True, *found
        if losses_of:  # in the first process
            _write(
                file,
                masks=masks[losses.done],
                query_loss=losses.query[losses.done],
                train_loss=losses.train[losses.done],
                seeds=np.array(work.seeds, dtype=np.int64)[losses.done],
                done=losses.done,
                **names,
            )
        count += len(collected)
        for k, found in collected.items():
            if isinstance(found, str):
                failed[k] = found
                say(f"warning: subset {k} failed: {found}")
                continue
            seconds = (time.monotonic() - start) / count * (len(missing) - count)
            ahead = f", about {seconds:.0f} s left" if count < len(missing) else ""
            say(f"retrained subset {k}: {int(losses.done.sum())} of {len(masks)} done{ahead}")
    return distributed.at_first(lambda: (losses, failed))


def _trained(
    work: _Subsets, subsets: list[int], folder: Path | None
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray] | str]]:
    """Train some subsets: the losses [Q] and [n] of each, or why it has none."""
    run, model = work.run, None
    for k in subsets:
        kept, recipe = np.flatnonzero(work.masks[k]), replace(work.recipe, seed=work.seeds[k])
        try:
            with own_randomness(run.model):
                if model is None:
                    model = fresh_adapter(run.model, recipe.seed)
                else:
                    model = renewed_adapter(model, run.model, recipe.seed)
                loss = train(model, run.tokens.select(kept), recipe)
            query_loss = mean_losses(model, work.query_tokens)
            train_loss = mean_losses(model, run.tokens)
        except NumericalError as error:
            yield k, str(error)
            continue
        if folder is not None:
            record = {
                "subset": k,
                "rows": len(kept),
                "epoch": recipe.last_epoch(len(kept)),
                "recipe": recipe.as_json(),
                "loss": loss,
            }
            save_adapter(model, _adapter_of(folder, k), record | digests_of(run, model))
        yield k, (query_loss, train_loss)


def _adapter_of(folder: Path, subset: int) -> Path:
    """The directory of a subset's adapter."""
    return folder / f"subset-{subset:03d}"


def _checked_masks(masks: Any, n: int) -> np.ndarray:
    """The masks as an array, or an `InputError` where they do not fit n rows, or one keeps none."""
    masks = np.asarray(masks)
    if masks.dtype != np.bool_ or masks.ndim != 2 or masks.shape[1] != n or len(masks) == 0:
        raise InputError(
            f"masks of type {masks.dtype} and shape {masks.shape} were given; expected bool "
            f"[subsets, {n}], True where a row of the run is kept: make them with "
            "unlearn.random_halves"
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty):
        raise InputError(
            f"subsets {', '.join(map(str, empty[:5]))} keep no row: nothing is left to train on"
        )
    return masks


def _places(out: Path) -> tuple[Path, Path]:
    """The truth file, and the directory of the adapters."""
    if out.suffix == ".npz":
        return out, out.with_suffix("")
    if out.is_file():
        raise InputError(
            f"{out} is a file that does not end in .npz: give FILE.npz, or a directory"
        )
    return out / "truth.npz", out


def _request(work: _Subsets) -> dict[str, Any]:
    """All that the losses depend on, in JSON's own types."""
    run = work.run
    config = run.model.model.peft_config[run.model.model.active_adapters[0]].to_dict()
    settings = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "init_lora_weights",
        "rank_pattern",
        "alpha_pattern",
    )
    adapter = {"space": run.model.space.digest, **{key: config.get(key) for key in settings}}
    objective = run.manifest.objective
    request = {
        "base": run.model.base_digest,
        "adapter configuration": _sha256(json.dumps(adapter, sort_keys=True, default=str).encode()),
        "training rows": run.train.digest,
        "queries": work.queries.digest,
        "tokenizer": tokenizer_digest(run.model.tokenizer),
        "max_length": objective.max_length,
        **({} if objective.supervise == "last" else {"supervise": objective.supervise}),
        "dtype": str(next(run.model.model.parameters()).dtype).removeprefix("torch."),
        "number of subsets": len(work.masks),
        "masks": _sha256(np.packbits(work.masks).tobytes()),
        "seeds": list(work.seeds),
        **{f"recipe's {name}": value for name, value in work.recipe.as_json().items()},
    }
    return json.loads(json.dumps(request))


def _resumed(file: Path, work: _Subsets, overwrite: bool) -> _Losses:
    """The losses so far, from a file of the same request.

    A damaged file or one of another request is refused, or with `overwrite` taken for nothing.
    """
    losses, request = _Losses.empty(work), _request(work)
    if not file.exists():
        return losses
    try:
        with open(file, "rb") as handle, zipfile.ZipFile(handle):
            pass  # numpy would also take a single array
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        recorded = json.loads(str(arrays["request"])) if "request" in arrays else {}
        differences = [
            f"{key} is {_short(recorded.get(key))}, now {_short(value)}"
            for key, value in request.items()
            if recorded.get(key, ...) != value
        ]
        if not differences:
            losses.done[:] = arrays["done"]
            losses.query[losses.done] = arrays["query_loss"]
            losses.train[losses.done] = arrays["train_loss"]
    except (
        OSError,
        KeyError,
        ValueError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if overwrite:
            return _Losses.empty(work)
        raise StoreError(
            f"{file} is damaged or no .npz ({error}): move it away, or --overwrite"
        ) from error
    if differences and not overwrite:
        if not recorded:
            raise InputError(
                f"{file} was not written by retraining subsets: give another file, or --overwrite"
            )
        raise MismatchError(
            f"{file} holds other subsets: {'; '.join(differences)}. Ask for the same ones to go "
            "on, "
            "give another file, or --overwrite"
        )
    return losses


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
    """A value of a request as an error shows it."""
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def _sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
