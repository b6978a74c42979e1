"""How many tokens a batch has: as asked, as a run records, or as many as a bound on memory holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from influence import distributed
from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.gradients import tape
from influence.memory import bounds, enforce, free_memory
from influence.progress import say
from influence.tokens import TokenizedExamples

#: Share of the free memory that a batch may take: the rest is for what is added up meanwhile.
SHARE = 0.5


def usual_budget(device: torch.device) -> int:
    """Tokens of a batch where nobody says how many."""
    return 1024 if device.type == "cpu" else 4096


def bounded_budget(model: AdaptedModel, tokens: TokenizedExamples, otherwise: int) -> int:
    """Tokens of a batch of these rows: `otherwise`, or what bounds allow (`influence.bounded`).

    A bound on memory never makes batches larger. It costs a forward and a backward of the longest
    row. All processes get the same. Errors: InputError where the model alone is beyond the bound.
    """
    if (asked := bounds().token_budget) is not None:
        enforce(model.device)
        return asked
    if bounds().memory is None:
        return otherwise
    enforce(model.device)
    each = bytes_per_token(model, tokens)
    here = max(1, min(otherwise, int(SHARE * free_memory(model.device) / each)))
    budget = int(-distributed.largest(-float(here)))
    if budget < otherwise:
        say(f"note: batches have at most {budget:,} tokens, as --memory holds them")
    return budget


def bytes_per_token(model: AdaptedModel, tokens: TokenizedExamples) -> float:
    """Bytes that a forward and backward hold at once for a token, told from the longest row.

    The row's own gradient, which does not grow with its tokens, is left out.
    """
    longest = np.array([int(tokens.lengths.argmax())])
    batch = collate(tokens, longest, pad_id=model.pad_id, device=model.device)
    with tape(model) as recorder:

        def work() -> None:
            recorder.run(batch, None)

        work()  # what is made once, such as a device's workspaces, is no batch's
        most = most_held(work, model.device)
    own = model.space.size * model.dtype.itemsize
    return max(1.0, (most - own) / int(tokens.lengths[longest[0]]))


def most_held(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that some work holds at once, beside what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with Held() as held:
        work()
    return held.most


class Held(TorchDispatchMode):
    """The most bytes at once in tensors that are made within: `.most`.

    What an operation makes inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Count what an operation makes, and what is gone since the last one."""
        results = func(*args, **(kwargs or {}))
        known = {
            each.untyped_storage()._cdata
            for each in tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor)
        }
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:  # else a view, or written in place
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        alive = self._alive.items()
        self._alive = {key: (ref, size) for key, (ref, size) in alive if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return results
