"""Gradients of the sampled training rows' mean losses, in memory or in a temporary file.

Every forecast multiplies with them: the cross-influence of an ascent on the sampled rows. Sixteen
rows of 42 M parameters take 2.7 GB. Where that is too much, they lie in a temporary file and come
back one at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import plan_batches
from influence.gradients import max_rows, stream_gradients
from influence.tokens import TokenizedExamples


class SampleGradients:
    """Gradients [P] of the mean losses of m rows at the adapter, nats per token.

    Parameters
    ----------
    model, tokens, token_budget
        The adapter where it is now, the rows, and how many tokens run at a time.
    dtype
        What the gradients are held in.
    memory : int
        Bytes that they may take. Where m P numbers are more, they lie in a temporary file, and the
        gradients of no more rows are computed at a time than fit.
    """

    def __init__(
        self,
        model: AdaptedModel,
        tokens: TokenizedExamples,
        *,
        token_budget: int,
        dtype: torch.dtype,
        memory: int,
    ) -> None:
        self._device, size = model.device, model.space.size
        row_bytes = size * dtype.itemsize
        self.in_memory = len(tokens) * row_bytes <= memory
        #: rows in memory, or bytes of each row in the file
        self._rows: list[Tensor] = []
        self._file: np.memmap | None = None
        self._dtype, self._count = dtype, len(tokens)
        if self.in_memory:
            self._rows = [torch.empty(0)] * len(tokens)
        else:
            with tempfile.TemporaryFile(prefix="difficulty-") as file:  # the map outlives it
                self._file = np.memmap(file, np.uint8, "w+", shape=(len(tokens), row_bytes))
        most = max(1, min(max_rows(model.space), memory // (3 * row_bytes)))
        batches = plan_batches(tokens, token_budget, max_rows=most)
        for rows, gradients, _ in stream_gradients(model, tokens, batches=batches):
            for row, gradient in zip(rows.tolist(), gradients, strict=True):
                self._put(row, gradient.to(dtype) / int(tokens.counts[row]))

    def _put(self, row: int, gradient: Tensor) -> None:
        if self._file is None:
            self._rows[row] = gradient
        else:
            self._file[row] = gradient.cpu().contiguous().view(torch.uint8).numpy()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        """The gradients [P] of the rows, in their order, on the model's device."""
        if self._file is None:
            yield from self._rows
            return
        for stored in self._file:
            yield torch.from_numpy(np.array(stored)).view(self._dtype).to(self._device)

    def products(self, vectors: Tensor) -> np.ndarray:
        """Products of `vectors` [c, P] with every gradient, [c, m] float64."""
        columns = [(vectors @ gradient).double().cpu().numpy() for gradient in self]
        return np.stack(columns, axis=1)

    @cached_property
    def mean(self) -> Tensor:
        """Mean gradient of the rows, [P]."""
        total = None
        for gradient in self:
            total = gradient.clone() if total is None else total.add_(gradient)
        assert total is not None
        return total / len(self)
