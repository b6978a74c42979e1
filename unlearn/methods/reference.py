"""The adapter before unlearning, held as a second, frozen PEFT adapter beside the one that is trained.

Nothing is copied when it is asked, so it may be asked while a graph of the other one is alive.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.loss import supervised_logits, token_losses
from influence.tokens import TokenizedExamples

NAME = "before-unlearning"


@dataclass(eq=False)
class ReferenceAdapter:
    """Asks the frozen adapter; made by `frozen`. `asked`: how many rows it has run forward, in this process."""

    model: AdaptedModel
    asked: int = 0

    def logits(
        self, tokens: TokenizedExamples, rows: np.ndarray
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Its logits `[N, V]` at the completion tokens of some rows, without gradient; their true labels and counts."""
        self.asked += len(rows)
        batch = collate(tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        with self._active(), torch.no_grad():
            part = supervised_logits(self.model, batch)
        return part.logits, part.targets, part.counts

    def losses(
        self, tokens: TokenizedExamples, rows: np.ndarray, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Its cross-entropy, per row `[T_i]`, nats: of the rows' own tokens, or of other labels `[N]`."""
        logits, true, counts = self.logits(tokens, rows)
        return list(
            token_losses(logits, true if labels is None else labels.to(true.device)).split(counts)
        )

    @contextmanager
    def _active(self) -> Iterator[None]:
        trained = self.model.model.active_adapters[0]
        try:
            for site in self.model.sites:
                site.layer.set_adapter(NAME, inference_mode=True)
            yield
        finally:
            for site in self.model.sites:
                site.layer.set_adapter(trained)


@contextmanager
def frozen(model: AdaptedModel) -> Iterator[ReferenceAdapter]:
    """Within the block the adapter as it is now is there a second time, under another name; afterwards it is gone.

    Meant for the inside of `model.evaluating(model.parameters)`: asking it leaves the trained adapter requiring gradients.
    """
    peft, trained = model.model, model.model.active_adapters[0]
    config = copy.deepcopy(peft.peft_config[trained])
    config.inference_mode, config.init_lora_weights = True, False
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        peft.add_adapter(NAME, config)
    try:
        with torch.no_grad():
            for site in model.sites:
                for own, held in ((site.A, site.layer.lora_A), (site.B, site.layer.lora_B)):
                    held[NAME].to(own.weight.device, own.weight.dtype)
                    held[NAME].weight.copy_(own.weight)
                    held[NAME].weight.requires_grad_(False)
                site.layer.scaling[NAME] = site.layer.scaling[trained]
                site.layer.set_adapter(trained)  # adding one froze it
        peft.eval()
        yield ReferenceAdapter(model)
    finally:
        peft.delete_adapter(NAME)
