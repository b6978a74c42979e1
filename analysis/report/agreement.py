"""Comparison of an edited adapter with one that was trained again on the rows after the edit.

`kl` is `KL(retrained || edited)` of the next-token distributions at the completion tokens, nats per
token, averaged over rows. Two trainings with other seeds differ too: their distance is the floor,
and one retrained adapter does not tell it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.adapter_files import adapter_folder
from influence.batches import collate, plan_batches
from influence.errors import MismatchError
from influence.halving import Steps, in_parts
from influence.loss import mean_losses, supervised_logits
from influence.path import read_parameters
from influence.rows import Examples
from influence.run import Run
from influence.store import read_json
from influence.tokens import TokenizedExamples
from unlearn.record.edit_record import RECORD, EditRecord
from unlearn.record.sample import guard_sample
from unlearn.record.version import ORIGINAL, Version, version

#: Positions whose distributions are compared at a time (a choice): in float64 they take more room
#: than the forward.
POSITIONS = 256


def agreement(
    run: Run, edit: Path, retrained: Path, holdout: Examples | None = None
) -> dict[str, Any]:
    """Compare an edit of `run` with a retrained adapter: the `agreement` of a record.

    Parameters
    ----------
    run
        The run that is edited.
    edit, retrained
        Folders of the two adapters.
    holdout
        Rows that neither adapter saw.

    Returns
    -------
    dict
        `adapter`, the folder of the retrained one; its mean loss on three sets of rows, nats per
        token, None without any; and `kl`, the divergence on each. `edited` are the rows that the
        edit changed (removed ones as they were, others with their new content), `retained` the
        others that were measured then, `heldout` those given here.

    Raises
    ------
    MismatchError
        Where `retrained` records another training set (`retrain.json`) than the edit's rows.
    """
    made = version(run, edit)
    record = EditRecord.salvaged(read_json(edit / RECORD))
    _refuse_other_rows(retrained, made)
    theta = read_parameters(run.model, adapter_folder(retrained))
    requested = [request.id for request in record.requests]
    before = version(run, record.adapter.before.path or ORIGINAL)
    contents = [request.content_before for request in record.requests]
    others = [place for place, id in enumerate(made.rows.ids) if id not in set(requested)]
    seed = record.method.settings["seed"]
    copied = {content for content in contents if content is not None}
    sample = guard_sample(made.rows, np.array(others, dtype=int), seed, copied)
    sets: dict[str, TokenizedExamples | None] = {
        "edited": _tokens(before, made, requested),
        "retained": made.tokens.select(sample),
        "heldout": None if holdout is None else run.tokenized(holdout),
    }
    budget = run.token_budget
    losses: dict[str, float | None] = dict.fromkeys(sets)
    kl: dict[str, float | None] = dict.fromkeys(sets)
    for name, tokens in sets.items():
        if tokens is None or len(tokens) == 0:
            continue
        with run.model.at(theta) as model:
            losses[name] = float(mean_losses(model, tokens, token_budget=budget).mean())
        kl[name] = divergence(run.model, tokens, theta, made.theta, token_budget=budget)
    return {"adapter": str(Path(retrained).resolve()), **losses, "kl": kl}


def divergence(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    reference: Tensor,
    other: Tensor,
    *,
    token_budget: int = 4096,
) -> float:
    """`KL(reference || other)` per completion token, nats, averaged over rows.

    Both are parameters `[P]`; at most `token_budget` tokens run at a time.
    """
    total = 0.0

    def run(rows: np.ndarray, _: Steps) -> float:
        batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
        logits = []
        for theta in (reference, other):
            with model.at(theta), model.evaluating(), torch.no_grad():
                logits.append(supervised_logits(model, batch).logits)
        parts = zip(*(whole.split(POSITIONS) for whole in logits), strict=True)
        values = torch.cat([_divergences(*pair) for pair in parts])
        return sum(float(row.mean()) for row in values.split(tokens.counts[rows].tolist()))

    for rows in plan_batches(tokens, token_budget):
        total += sum(value for _, value in in_parts(model, tokens, rows, run))
    return total / len(tokens)


def _divergences(p: Tensor, q: Tensor) -> Tensor:
    """`KL(p || q)` of logits `[N, V]`, `[N]`, in float64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _tokens(before: Version, made: Version, ids: list[str]) -> TokenizedExamples:
    """Rows by id: as they are after the edit, or, where they are gone, as they were before it."""
    places = {id: place for place, id in enumerate(made.rows.ids)}
    rows = [
        made.tokens[places[id]] if id in places else before.tokens[before.rows.index(id)]
        for id in ids
    ]
    return TokenizedExamples(rows, ids)


def _refuse_other_rows(retrained: Path, made: Version) -> None:
    """Refuse an adapter whose `retrain.json` names other training rows than the edit has."""
    path = adapter_folder(retrained) / "retrain.json"
    if not path.exists():
        return
    record = read_json(path)
    gone, digest = set(record.get("removed") or []), record.get("rows_digest")
    if gone != set(made.removed) or (made.changed and digest != made.rows.digest):
        raise MismatchError(
            f"{retrained} was trained without {len(gone)} rows, and after the edit "
            f"{len(made.removed)} rows are gone and {len(made.changed)} changed: train the "
            f"comparison by unlearn retrain --run RUN --edit {made.path} --out DIR, with the "
            "--recipe of the adapter's training where the run records none"
        )
