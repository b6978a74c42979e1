"""How near an edited adapter is to one that was trained again on the rows after the edit: losses and outputs.

`kl` is `KL(retrained || edited)` of the next-token distributions at the completion tokens, nats per token, averaged over
rows. Two trainings with other seeds differ too: their distance is the floor, and one retrained adapter does not tell it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate, plan_batches
from influence.errors import MismatchError
from influence.loading import adapter_folder
from influence.loss import mean_losses, supervised_logits
from influence.path import read_parameters
from influence.rows import Examples
from influence.run import Run
from influence.store import read_json
from influence.tokens import TokenizedExamples
from unlearn.record.sample import guard_sample
from unlearn.record.version import ORIGINAL, Version, version

#: Positions whose distributions are compared at a time: in float64 they take more room than the forward.
POSITIONS = 256


def agreement(
    run: Run, edit: Path, retrained: Path, heldout: Examples | None = None
) -> dict[str, Any]:
    """Compare an edit of `run` with a retrained adapter; the `agreement` of a record.

    `edited` are the rows that the edit changed (removed ones as they were, others with their new content), `retained` the
    others that were measured then, `heldout` rows that neither adapter saw. Raises `MismatchError` where
    `retrained` records another training set (`retrain.json`) than the edit's rows.
    """
    made = version(run, edit)
    record = read_json(edit / "edit.json")
    _refuse_other_rows(retrained, made)
    theta = read_parameters(run.model, adapter_folder(retrained))
    changed = [request["id"] for request in record["requests"]]
    edited = _tokens(version(run, record["adapter"]["before"]["path"] or ORIGINAL), made, changed)
    gone = {request["content_before"] for request in record["requests"]}
    others = np.array(
        [place for place, id in enumerate(made.rows.ids) if id not in set(changed)], dtype=int
    )
    sets: dict[str, TokenizedExamples | None] = {
        "edited": edited,
        "retained": made.tokens.select(
            guard_sample(made.rows, others, record["method"]["seed"], gone)
        ),
        "heldout": None,
    }
    if heldout is not None:
        sets["heldout"] = run.tokenized(heldout)
    losses, kl = {}, {}
    for name, tokens in sets.items():
        losses[name] = kl[name] = None
        if tokens is None or len(tokens) == 0:
            continue
        with run.model.at(theta) as model:
            losses[name] = float(
                mean_losses(model, tokens, token_budget=run.manifest["token_budget"]).mean()
            )
        kl[name] = divergence(
            run.model, tokens, theta, made.theta, token_budget=run.manifest["token_budget"]
        )
    return {"adapter": str(Path(retrained).resolve()), **losses, "kl": kl}


def divergence(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    reference: Tensor,
    other: Tensor,
    *,
    token_budget: int = 4096,
) -> float:
    """`KL(reference || other)` per completion token, nats, averaged over rows; both are parameters `[P]`."""
    total = 0.0
    for rows in plan_batches(tokens, token_budget):
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        logits = []
        for theta in (reference, other):
            with model.at(theta), model.evaluating(), torch.no_grad():
                logits.append(supervised_logits(model, batch).logits)
        values = torch.cat(
            [
                _divergences(*some)
                for some in zip(*(one.split(POSITIONS) for one in logits), strict=True)
            ]
        )
        total += sum(float(own.mean()) for own in values.split(tokens.counts[rows].tolist()))
    return total / len(tokens)


def _divergences(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` of logits `[N, V]`, `[N]`, in float64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _tokens(before: Version, made: Version, ids: list[str]) -> TokenizedExamples:
    """Rows by id: as they are after the edit, or, where they are gone, as they were before it."""
    there = {id: place for place, id in enumerate(made.rows.ids)}
    rows = [
        made.tokens[there[id]] if id in there else before.tokens[before.rows.index(id)]
        for id in ids
    ]
    return TokenizedExamples(rows, ids)


def _refuse_other_rows(retrained: Path, made: Version) -> None:
    path = adapter_folder(retrained) / "retrain.json"
    if not path.exists():
        return
    found = read_json(path)
    gone, changed = set(found.get("removed") or []), found.get("rows_digest")
    if gone != set(made.removed) or (made.changed and changed != made.rows.digest):
        raise MismatchError(
            f"{retrained} was trained without {len(gone)} rows, and after the edit {len(made.removed)} rows are gone and "
            f"{len(made.changed)} changed: train the comparison by unlearn retrain --run RUN --edit {made.path} --out DIR"
        )
