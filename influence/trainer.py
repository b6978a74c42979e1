"""From a live trainer to a model and its rows: what it trains, and exactly what it trains it on.

::

    model, rows = influence.from_trainer(trainer)
    run = influence.fit(model, rows, directory="run")

Rows are taken from the trainer's own data set, one by one, through its own collator: token ids and
labels are those of its batches, whatever template, mask, truncation or packing made them. A trainer
that minimises anything but the mean cross-entropy of these labels is refused; only the load-balancing
loss that a router adds to it is said instead, and no part of the scores. The trainer is not changed, but for what `influence.from_peft` says of its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from influence.adapter import AdaptedModel
from influence.errors import InputError, refuse
from influence.loading import from_peft
from influence.progress import say
from influence.recipe import Recipe, Recorded
from influence.row_content import IGNORED
from influence.rows import Examples, examples_from_rows, is_label
from influence.trainer_output import Training, TrainingLog, has_rates

#: Tokens of a row, before its first target and from there on, whose text is kept for people.
SHOWN = 60
#: Rows that are collated twice, to see whether a collator draws anything.
REPEATED = 4


def from_trainer(trainer: Any, *, tokenizer: Any = None) -> tuple[AdaptedModel, Examples]:
    """The model of a transformers `Trainer` or a TRL `SFTTrainer`, and the rows as it batches them.

    Rows have the data set's `id` and `group` where these columns survive and ids are texts or whole
    numbers that differ, else their position in `trainer.train_dataset` ("0", "1", ...). A row that
    no token of is supervised is left out, with a note: no loss reaches it. A packed row is one row.

    What is known of the training (recipe, logged losses) is kept beside the model, and `fit` writes
    it into the run.

    Raises `InputError` with every reason at once for a trainer whose rows or objective are not to
    be had: no PEFT model, no training rows or a stream of them, another loss than the labels'
    cross-entropy (label smoothing, a loss function of its own, NEFTune, DPO, rewards ...), a
    collator that draws at random.

    Parameters
    ----------
    trainer
        Before or after `train()`; its model is a `PeftModel`. It is put in evaluation mode, its
        LoRA parameters in float32 (`influence.from_peft`); `train()` sets it back.
    tokenizer
        The tokenizer, where the trainer has none (`processing_class`). Rows come with token ids: it
        reads queries, and rows of other runs.
    """
    refuse("this trainer cannot be attributed", refusals(trainer))
    live = _unwrapped(trainer)
    tokenizer = tokenizer or _tokenizer(trainer)
    if tokenizer is None:
        raise InputError(
            "the trainer has no tokenizer (processing_class): give it as from_trainer(trainer, "
            "tokenizer=...)"
        )
    if factor := router_factor(trainer):
        say(
            f"note: the trainer minimises the router's load-balancing loss too, {factor:g} times; "
            "scores are of the cross-entropy alone (router_aux_loss_coef=0 trains without)"
        )
    rows = _rows(trainer, tokenizer)
    base = str(getattr(live.get_base_model().config, "_name_or_path", "") or "")
    if base and Path(base).exists():
        base = str(Path(base).resolve())
    model = from_peft(live, tokenizer, base=base)
    return replace(model, training=training_of(trainer, len(rows))), rows


# ---- what is refused -----------------------------------------------------------------------------


def refusals(trainer: Any) -> list[str]:
    """Every reason why a trainer's model, rows or objective are not what scores are of."""
    lacking = [
        name
        for name in ("model", "args", "train_dataset", "data_collator")
        if not hasattr(trainer, name)
    ]
    if lacking:
        return [
            f"a {type(trainer).__name__} was given, without {', '.join(lacking)}; expected a "
            "transformers Trainer or a TRL SFTTrainer"
        ]
    return [*_other_models(trainer), *_other_rows(trainer), *_other_losses(trainer)]


def _other_models(trainer: Any) -> Iterator[str]:
    from peft import PeftModel

    if getattr(trainer, "is_fsdp_enabled", False) or getattr(
        trainer, "is_deepspeed_enabled", False
    ):
        yield (
            "its weights are shared out by FSDP or DeepSpeed: save the adapter, and fit from files "
            "(influence fit --trainer-output)"
        )
    elif not isinstance(_unwrapped(trainer), PeftModel):
        yield (
            f"its model is a {type(_unwrapped(trainer)).__name__} and no PeftModel: influence is "
            "that of LoRA parameters; train an adapter (peft_config=LoraConfig(...))"
        )


def _other_rows(trainer: Any) -> Iterator[str]:
    rows = trainer.train_dataset
    if rows is None:
        yield "it has no training rows (train_dataset is None), as for evaluation alone"
    elif not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        yield (
            f"its rows are a stream (a {type(rows).__name__}): nothing says which row is which; "
            "give the trainer a data set with a length"
        )
    elif len(rows) == 0:
        yield "its train_dataset is empty"
    if getattr(trainer.data_collator, "mlm", False):
        yield "its collator masks tokens at random (mlm=True): that is no causal language model"
    if getattr(trainer, "_is_vision_dataset", False):
        yield "its rows have images, and only text is attributed"


def _other_losses(trainer: Any) -> Iterator[str]:
    arguments, kinds = trainer.args, [kind.__name__ for kind in type(trainer).__mro__]
    for kind in type(trainer).__mro__:
        ours = kind.__name__ in ("SFTTrainer", "_BaseTrainer") or not kind.__module__.startswith(
            "trl."
        )
        if not ours and kind.__name__.endswith("Trainer"):
            yield (
                f"a {kind.__name__} minimises another objective than the cross-entropy of labels; "
                "Trainer and SFTTrainer are understood"
            )
            break
    if getattr(arguments, "label_smoothing_factor", 0):
        yield f"label_smoothing_factor={arguments.label_smoothing_factor}: targets are not labels"
    if getattr(trainer, "compute_loss_func", None) is not None:
        yield "it has a compute_loss_func of its own: the objective is not known"
    if getattr(arguments, "loss_type", None) not in (None, "nll", "chunked_nll"):
        yield f"loss_type={arguments.loss_type!r}: tokens are weighted otherwise than here"
    if getattr(arguments, "neftune_noise_alpha", None):
        yield "neftune_noise_alpha: training adds noise to the embeddings"
    if getattr(arguments, "use_liger_kernel", False):
        yield (
            "use_liger_kernel=True: its kernels write over what a second backward needs; fit from "
            "files (influence fit --trainer-output), which loads the model without them"
        )
    module = next((k.__module__ for k in type(trainer).__mro__ if "compute_loss" in vars(k)), "")
    if kinds and not module.startswith(("transformers.", "trl.")):
        yield (
            f"{kinds[0]} computes its loss by itself (compute_loss of {module}): if it is the mean "
            "cross-entropy of the labels, fit from files (influence fit --trainer-output), which "
            "compares the losses"
        )


# ---- the rows ------------------------------------------------------------------------------------


def _rows(trainer: Any, tokenizer: Any) -> Examples:
    """The trainer's rows, token ids and labels as its collator makes them."""
    loader = trainer.get_train_dataloader()  # makes the data set and collator that training uses
    rows, collate = loader.dataset, loader.collate_fn
    for index in range(min(REPEATED, len(rows))):
        if _as_batched(collate, rows[index]) != _as_batched(collate, rows[index]):
            raise InputError(
                "the trainer's collator makes another batch of the same row each time: it draws at "
                "random, so what training saw of a row is not to be had"
            )
    names = groups = None
    if len(rows) == len(trainer.train_dataset):
        names = _names(trainer.train_dataset, "id", unique=True)
        groups = _names(trainer.train_dataset, "group", unique=False)
    made, empty = [], 0
    for index in range(len(rows)):
        row = _as_batched(collate, rows[index])
        if not any(label != IGNORED for label in row["labels"][1:]):
            empty += 1
            continue
        row["shown"] = _text(row, tokenizer)
        row["id"] = str(index) if names is None else names[index]
        if groups is not None and groups[index] is not None:
            row["group"] = groups[index]
        made.append(row)
    if empty:
        say(f"note: {empty} of {len(rows)} rows have no supervised token, and are left out")
    if not made:
        raise InputError("no row of the trainer has a supervised token: its labels are all -100")
    return examples_from_rows(made)


def _text(row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """What a row says before its first target and from there on, as far as a table shows it."""
    ids = row["input_ids"]
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    parts = ids[max(0, first - SHOWN) : first], ids[first : first + SHOWN]
    return [tokenizer.decode(part, skip_special_tokens=True) for part in parts]


def _as_batched(collate: Any, item: Any) -> dict[str, Any]:
    """One row as the collator batches it alone, without its padding."""
    batch = collate([item])
    if "input_ids" not in batch or "labels" not in batch:
        held = ", ".join(sorted(map(str, batch)))
        raise InputError(
            f"the trainer's collator makes no input_ids and labels, but {held}: expected a causal "
            "language model's"
        )
    ids, labels = _flat(batch["input_ids"]), _flat(batch["labels"])
    if len(ids) != len(labels):
        raise InputError(
            f"the collator makes {len(ids)} tokens and {len(labels)} labels of a row; expected as "
            "many"
        )
    real = _real(batch, item, len(ids))
    labels[: real.argmax() + 1] = IGNORED  # nothing precedes the first token
    row = {"input_ids": ids[real].tolist(), "labels": labels[real].tolist()}
    if "position_ids" in batch:
        positions = _flat(batch["position_ids"])[real]
        if not np.array_equal(positions, np.arange(len(positions))):
            row["position_ids"] = positions.tolist()
    return row


def _real(batch: Mapping[str, Any], item: Any, length: int) -> np.ndarray:
    """Which tokens of a batch of one row are its own, `[T]` bool."""
    if "attention_mask" in batch:
        mask = _flat(batch["attention_mask"])
        if len(mask) == length:
            return mask.astype(bool)
    own = item.get("input_ids") if isinstance(item, Mapping) else None
    # without a mask (padding_free) rows follow each other, and padding follows them all
    return np.arange(length) < (length if own is None else len(own))


def _flat(values: Any) -> np.ndarray:
    """A batch of one row as int64 `[T]`."""
    values = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.array(values, dtype=np.int64).reshape(-1)


def _names(rows: Any, column: str, *, unique: bool) -> list[Any] | None:
    """A column of texts or whole numbers, one a row; None where the rows have none that serves."""
    names = getattr(rows, "column_names", None)
    if names is not None:
        values = list(rows[column]) if column in names else None
    else:
        items = [rows[index] for index in range(len(rows))]
        given = all(isinstance(item, Mapping) and column in item for item in items)
        values = [item[column] for item in items] if given else None
    if values is None:
        return None
    usable = all(is_label(value) for value in values if unique or value is not None)
    if not usable or (unique and len(set(map(str, values))) < len(values)):
        say(
            f"note: the column {column!r} holds more than texts and whole numbers"
            f"{' that differ' * unique} (an empty text and one with a NUL serve neither), and is "
            "not used"
        )
        return None
    return values


# ---- the model and its training ------------------------------------------------------------------


def _unwrapped(trainer: Any) -> Any:
    """The trainer's model without what distributed training puts around it."""
    model = trainer.model
    while hasattr(model, "module") and not hasattr(model, "peft_config"):
        model = model.module
    return getattr(model, "_orig_mod", model)


def _tokenizer(trainer: Any) -> Any:
    """The trainer's tokenizer, that of a processor too."""
    processor = getattr(trainer, "processing_class", None)
    return getattr(processor, "tokenizer", processor)


def router_factor(trainer: Any) -> float:
    """By what a trainer multiplies the router's load-balancing loss in its objective; 0: none."""
    config = _unwrapped(trainer).get_base_model().config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(config, "router_aux_loss_coef", None) or 0.0
    if not getattr(trainer, "aux_loss_enabled", getattr(config, "output_router_logits", False)):
        return 0.0
    return float(getattr(trainer, "router_aux_loss_coef", own))


def training_of(trainer: Any, rows: int) -> Training:
    """How a live trainer trained its model on so many rows."""
    state = trainer.state
    if state.global_step == 0:
        return Training(None, None)
    log = TrainingLog.of(
        {
            "log_history": state.log_history,
            "global_step": state.global_step,
            "max_steps": state.max_steps,
            "num_train_epochs": state.num_train_epochs,
            "train_batch_size": state.train_batch_size,
        },
        "the trainer's log",
    )
    router = router_factor(trainer)
    try:
        found = recipe_of_arguments(trainer.args, state.max_steps, trainer.optimizer)
        if not has_rates(found.recipe, log):
            raise InputError(
                "the rates that the trainer logged are not those of its arguments (an optimiser or "
                "schedule of its own?)"
            )
        return Training(log, found, router)
    except InputError as error:
        say(f"note: the recipe of the training is not kept: {error}")
        return Training(log, None, router)


def recipe_of_arguments(arguments: Any, steps: int, optimizer: Any = None) -> Recorded:
    """The recipe of live `TrainingArguments`, for a training of so many steps by an optimiser.

    Rows of all processes and devices together make its batches. Raises `InputError` for what a
    recipe cannot express.
    """
    values = json.loads(arguments.to_json_string())
    values["per_device_train_batch_size"] = arguments.train_batch_size * arguments.world_size
    about = "they do not say in which order it saw the rows"
    if optimizer is not None:
        groups = list(islice(_groups(optimizer), 100))
        rates = {float(group.get("initial_lr", group.get("lr", 0.0))) for group in groups}
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        if not kind.lower().removeprefix("paged").startswith("adamw"):
            raise InputError(f"the optimiser is a {kind}, and a recipe's is AdamW")
        if len(rates) > 1:
            about += (
                "; its parameters had different learning rates (as LoRA+ has), of which the recipe "
                "has one"
            )
    recipe = Recipe.of_training_arguments(values, "the trainer's arguments", steps=steps)
    return Recorded(recipe, "the trainer's arguments", about)


def _groups(optimizer: Any) -> Sequence[Mapping[str, Any]]:
    """The optimiser's groups that hold parameters."""
    return [group for group in optimizer.param_groups if len(group["params"])]
