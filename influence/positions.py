"""Positions of tokens: how long rows may be, the documents in a row, and RoPE that knows lengths.

A row that packs several documents has positions that begin again at 0. Models of transformers keep
documents apart by them, if no mask is given; `refuse_mixed_documents` sees whether this one does.

Dynamic and long RoPE take their frequencies from the longest row of a batch, and dynamic RoPE from
batches before, too. `rope_of_each_row` gives every row the frequencies that it has alone, so that
no result depends on the batches.

Shapes: b rows in a batch, T tokens in the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence.adapter import AdaptedModel, accepts
from influence.errors import AdapterError
from influence.tokens import TokenizedExamples, Tokens

#: RoPE whose frequencies depend on how long a row is.
_BY_LENGTH = ("dynamic", "longrope")
#: Largest relative difference between a document's logits in a packed row and alone, by the type's
#: rounding. A choice: rounding differs by far less, and another document's words by far more.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.05


def length_of(row: Tokens) -> int:
    """How many positions a row's tokens take: its longest document. The last is only a target."""
    if row.position_ids is None:
        return len(row) - 1
    return int(row.position_ids[:-1].max()) + 1


def most_positions(config: Any) -> int | None:
    """How many positions a model can take. None: any number.

    That is `max_position_embeddings`, or what scaled RoPE reaches: its factor times the positions
    that the base was trained on. Dynamic RoPE has no end.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    reached = positions
    for scaling in _scalings(config):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "dynamic":
            return None
        if kind in ("linear", "yarn", "llama3", "longrope"):
            original = scaling.get("original_max_position_embeddings") or positions
            reached = max(reached, int((scaling.get("factor") or 1) * original))
    return reached


def _scalings(config: Any) -> list[Mapping[str, Any]]:
    """The RoPE parameters of a configuration, of which some models have a set for each kind of
    layer.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, Mapping):
        return []
    nested = [part for part in given.values() if isinstance(part, Mapping)]
    return nested or [given]


# ---- documents of one row ------------------------------------------------------------------------


def documents(row: Tokens) -> list[slice]:
    """Where the documents of a row are in its tokens."""
    if row.position_ids is None:
        return [slice(0, len(row))]
    starts = np.flatnonzero(row.position_ids == 0).tolist()
    ends = [*starts[1:], len(row)]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def refuse_mixed_documents(model: AdaptedModel, tokens: TokenizedExamples) -> None:
    """Refuse rows of several documents where this model would let these see one another.

    Two short documents are run in one row, and the second alone: its logits must be the same.
    Errors: AdapterError.
    """
    packed = next((row for row in tokens if len(documents(row)) > 1), None)
    if packed is None:
        return
    why = "its forward takes no position_ids"
    if accepts(model.model, "position_ids"):
        first, second, *_ = (packed.input_ids[part][:16] for part in documents(packed))
        ids = torch.from_numpy(np.concatenate([first, second])).to(model.device)
        places = torch.cat([torch.arange(len(first)), torch.arange(len(second))]).to(model.device)
        base = model.model.get_base_model()
        uncached = {"use_cache": False} if accepts(model.model, "use_cache") else {}
        with model.evaluating(), torch.no_grad():
            # two rows, as some attention tells documents apart in a batch of one row only
            both = {"input_ids": ids.repeat(2, 1), "position_ids": places.repeat(2, 1)}
            pair = base(**both, **uncached).logits
            alone = base(input_ids=ids[None, len(first) :], **uncached).logits[0]
        difference = float((pair[:, len(first) :] - alone).abs().max() / alone.abs().max())
        if difference <= _TOLERANCE.get(alone.dtype, _TOLERANCE_16_BITS):
            return
        why = f"with one before it, a document's logits differ by {difference:.0e}"
    attention = getattr(model.model.get_base_model().config, "_attn_implementation", None)
    raise AdapterError(
        f"rows hold several documents (position_ids or seq_lengths), which this model does not "
        f"keep apart ({why}; attention {attention}): give each document as a row of its own"
    )


# ---- RoPE that depends on the length -------------------------------------------------------------


@contextmanager
def rope_of_each_row(model: AdaptedModel, position_ids: Tensor, real: Tensor) -> Iterator[None]:
    """Within the block, dynamic and long RoPE go by each row's own length.

    `position_ids` [b, T] are those of the whole rows and `real` bool [b, T] says which tokens are
    no padding. Models without such RoPE are left alone.
    """
    rotaries = [
        module
        for module in model.model.modules()
        if getattr(module, "rope_type", None) in _BY_LENGTH and hasattr(module, "original_inv_freq")
    ]
    if not rotaries:
        yield
        return
    before = {module: vars(module).get("forward") for module in rotaries}
    try:
        for module in rotaries:
            module.forward = _by_row(module, module.forward, position_ids, real)
        yield
    finally:
        for module, forward in before.items():
            del module.forward  # the class's own runs again, or one that was set on the instance
            if forward is not None:
                module.forward = forward
            fresh_rope(module)


def _by_row(
    module: nn.Module, forward: Callable[..., Any], position_ids: Tensor, real: Tensor
) -> Callable[..., Any]:
    """The forward of a rotary embedding, row by row."""
    whole_rows = position_ids.masked_fill(~real, 0)

    def run(x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        parts = []
        for row in range(len(whole_rows)):
            fresh_rope(module)
            whole = whole_rows[row : row + 1]
            cos, sin = forward(x[:1], whole, *args, **options)
            parts.append((cos[:, : position_ids.shape[1]], sin[:, : position_ids.shape[1]]))
        return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])

    return run


def fresh_rope(model: nn.Module) -> None:
    """Put dynamic RoPE back to the frequencies that it begins with, whatever ran before."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and hasattr(module, "original_inv_freq"):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)  # type: ignore[union-attr]
