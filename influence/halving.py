"""A batch that memory is too small for, run again in two.

The batches of a plan stay what they are: what is resumed, counted and shared out over processes. A
batch that does not fit is run in parts, and so are later ones of as many tokens, because no answer
depends on which rows run together. Each process halves its own batches, and exchanges nothing for
it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from influence.adapter import AdaptedModel
from influence.errors import ShortOfMemory, ToolkitError, memory_is_short
from influence.progress import say
from influence.tokens import TokenizedExamples

T = TypeVar("T")

#: Tokens, padding included, that a model's batches may have, where memory ran out at more.
_MOST: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


class Steps:
    """What of a batch was done before memory ran out: its rows, run again, pass over it.

    A step is all of its effect on something that outlives the batch, such as one leaf's part of a
    sum. It must make all that takes memory before it changes anything.
    """

    def __init__(self, done: dict[Hashable, int] | None = None) -> None:
        self._done = done or {}
        self._seen: dict[Hashable, int] = {}

    def once(self, step: Hashable, work: Callable[[], object]) -> None:
        """Do a step, unless an earlier try did it for these rows.

        A step that comes several times in a try, as that of a leaf that runs twice, counts each.
        """
        self._seen[step] = number = self._seen.get(step, 0) + 1
        if number > self._done.get(step, 0):
            work()
            self._done[step] = number

    def again(self) -> Steps:
        """For another try of the same rows, or of some of them."""
        return Steps(dict(self._done))


def in_parts(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    rows: np.ndarray,
    work: Callable[[np.ndarray, Steps], T],
) -> Iterator[tuple[np.ndarray, T]]:
    """Yield `(rows [b], work(rows, steps))` of a batch, or of its parts where it does not fit.

    Parameters
    ----------
    model, tokens, rows
        A batch: the positions `rows` [b] among `tokens`. The parts keep their order.
    work
        Runs the model on some of the rows. What it adds to anything that outlives the call, it adds
        by `steps.once`; what it only returns is simply made again.

    Errors: ShortOfMemory where memory is too small for a single row.
    """
    yield from _in_parts(model, tokens, rows, work, Steps())


def _in_parts(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    rows: np.ndarray,
    work: Callable[[np.ndarray, Steps], T],
    steps: Steps,
) -> Iterator[tuple[np.ndarray, T]]:
    if fits(model, tokens, rows):
        try:
            result = work(rows, steps)
        except Exception as error:
            if isinstance(error, ToolkitError) or not memory_is_short(error):
                raise
            if len(rows) == 1:
                raise _too_small(model, tokens, int(rows[0])) from error
        else:
            yield rows, result
            return
        halve(model, tokens, rows)  # the error is gone by now, and with it what the batch held
    for part in np.array_split(rows, 2):
        yield from _in_parts(model, tokens, part, work, steps.again())


def fits(model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray) -> bool:
    """Whether a batch has no more tokens than memory has held so far, or is one row."""
    most = _MOST.get(model.model)
    return len(rows) == 1 or most is None or _size(tokens, rows) <= most


def halve(model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray) -> None:
    """Let later batches of a model have at most half the tokens of this one, which did not fit.

    Says so, and gives back the memory that nothing holds any more. Errors: ShortOfMemory where the
    base is sharded.
    """
    size = _size(tokens, rows)
    if model.shards is not None:
        raise ShortOfMemory(
            f"memory is too small for a batch of {len(rows)} rows and {size:,} tokens on "
            f"{model.device}, and with --shard a batch is not run again in two, because memory may "
            "have run out while all processes gathered a layer: give a lower --token-budget (what "
            "was saved is kept)"
        )
    _MOST[model.model] = most = max(1, size // 2)
    say(
        f"note: out of memory at a batch of {len(rows)} rows and {size:,} tokens: from here on "
        f"batches have at most {most:,} tokens (--token-budget {most} says so from the start)"
    )
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def forget(model: AdaptedModel) -> None:
    """Let the batches of a model be as large as they are planned again."""
    _MOST.pop(model.model, None)


def _size(tokens: TokenizedExamples, rows: np.ndarray) -> int:
    """Tokens of a batch, padding included."""
    return len(rows) * int(tokens.lengths[rows].max())


def _too_small(model: AdaptedModel, tokens: TokenizedExamples, row: int) -> ShortOfMemory:
    return ShortOfMemory(
        f"memory is too small for a single row: row {row + 1} (id {tokens.ids[row]!r}), "
        f"{int(tokens.lengths[row]):,} tokens, on {model.device}. Give --checkpointing, load the "
        "base in fewer bits (--dtype bfloat16, --load-in-4bit), give more --memory, cut rows with "
        "--max-length (in a new fit, trained alike), or end what else fills this memory"
    )
