"""The adapter before unlearning, held as a second, frozen PEFT adapter beside the trained one.

Nothing is copied when it runs, so it may run while a graph of the trained adapter is alive.
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
    """The adapter before unlearning, which `frozen` makes.

    `rows_run` counts the rows that it has run forward in this process.
    """

    model: AdaptedModel
    rows_run: int = 0

    def logits(
        self, tokens: TokenizedExamples, rows: np.ndarray
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Logits `[N, V]` at some rows' completion tokens without gradient, labels and counts.

        The labels `[N]` are the rows' own tokens; the counts `[b]` sum to N.
        """
        self.rows_run += len(rows)
        batch = collate(tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        with self._active(), torch.no_grad():
            run = supervised_logits(self.model, batch)
        return run.logits, run.targets, run.counts

    def losses(
        self, tokens: TokenizedExamples, rows: np.ndarray, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Cross-entropy per row `[T_i]`, nats, of the rows' own tokens or of other labels `[N]`."""
        logits, true, counts = self.logits(tokens, rows)
        labels = true if labels is None else labels.to(true.device)
        return list(token_losses(logits, labels).split(counts))

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
    """Hold a copy of the adapter as it is now, under another name, until the block ends.

    Meant for the inside of `model.evaluating(model.parameters)`: running the copy leaves the
    trained adapter requiring gradients.
    """
    peft, trained = model.model, model.model.active_adapters[0]
    config = copy.deepcopy(peft.peft_config[trained])
    config.inference_mode, config.init_lora_weights = True, False
    # PEFT draws weights for a new adapter before they are overwritten: the user's draws stay.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        peft.add_adapter(NAME, config)
    try:
        with torch.no_grad():
            for site in model.sites:
                pairs = ((site.A, site.layer.lora_A), (site.B, site.layer.lora_B))
                for trained_matrix, matrices in pairs:
                    matrices[NAME].to(trained_matrix.weight.device, trained_matrix.weight.dtype)
                    matrices[NAME].weight.copy_(trained_matrix.weight)
                    matrices[NAME].weight.requires_grad_(False)
                # From the layer, not the configuration: a scaling may have been set by hand.
                site.layer.scaling[NAME] = site.layer.scaling[trained]
                site.layer.set_adapter(trained)  # adding one froze it
        peft.eval()
        yield ReferenceAdapter(model)
    finally:
        peft.delete_adapter(NAME)
