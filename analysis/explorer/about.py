"""What the run is, in words."""

from __future__ import annotations

from typing import Any

from analysis.explorer.blocks import Block, facts
from analysis.explorer.data import Explored

_SHORT = 16
_CREDIT = {
    "shared": "shared: rows that teach the same share it",
    "additive": "additive: each row gets it whole",
}
_REDUCTION = {
    "token": "mean over all supervised tokens",
    "example": "mean over the rows' means",
}


def blocks(explored: Explored) -> list[Block]:
    """The facts of a run: what it was made from, how, and what its scores are."""
    manifest, table = explored.manifest, explored.table
    objective, data = manifest.objective, manifest.data
    digest_help = "SHA-256, shortened: the same digits, the same content."
    made = facts(
        "Made from",
        [
            ("run", str(explored.directory.resolve()), "The directory of influence fit."),
            ("base model", manifest.base.path, f"Its digest begins {manifest.base.digest[:12]}."),
            ("adapter", manifest.adapter.path, "The LoRA adapter that is explained."),
            ("LoRA parameters", f"{manifest.adapter.parameters:,}", "Numbers that were trained."),
            ("training rows", f"{data.rows:,} rows of {data.path}", "What it was trained on."),
            (
                "tokens",
                f"{data.tokens:,} tokens, {data.supervised_tokens:,} of them supervised",
                "Supervised tokens are those whose loss was trained.",
            ),
            ("made", manifest.created, "When influence fit began, UTC."),
        ],
    )
    digests = facts(
        "Digests",
        [
            (name, digest[:_SHORT], digest_help)
            for name, digest in (
                ("run", manifest.digest),
                ("base", manifest.base.digest),
                ("adapter", manifest.adapter.digest),
                ("rows", data.digest),
                ("tokenizer", manifest.tokenizer.digest),
            )
        ],
    )
    options = manifest.curvature_options
    how = facts(
        "How",
        [
            (
                "training loss",
                _REDUCTION.get(objective.reduction, objective.reduction),
                "The objective that the adapter is read as an optimum of.",
            ),
            (
                "longest row",
                None if objective.max_length is None else f"{objective.max_length:,} tokens",
                "Rows are cut there.",
            ),
            (
                "curvature",
                f"{manifest.curvature_name} ({_listed(options)})"
                if options
                else manifest.curvature_name,
                "The approximation of the training loss's second derivative.",
            ),
            ("damping", manifest.damping, "The rule of the constant added to the curvature."),
            (
                "points",
                ", ".join(point.label for point in manifest.points),
                "Where between base (0) and adapter (1) gradients were taken.",
            ),
            ("geometry", manifest.geometry, "The coordinates that damping acts in."),
            ("numbers", f"{manifest.dtype}, computed in {_computed(explored)}", "Their type."),
            (
                "loss of the rows",
                None
                if manifest.path is None
                else f"{manifest.path.base:.3f} under the base, {manifest.path.adapter:.3f} under "
                "the adapter, nats per token",
                "Mean cross-entropy of the training rows, weighted as in training.",
            ),
            ("versions", _listed(manifest.versions), "Of the toolkit and what it stands on."),
        ],
    )
    if table is None:
        return [made, how, digests]
    attributes = table.attributes
    scored = facts(
        "Scores",
        [
            ("file", str(table.path), "Made by influence score."),
            (
                "what of a query",
                table.measurement,
                "Positive scores: removing the row raises it."
                if table.rises
                else "Negative scores: removing the row lowers it, which makes the model worse.",
            ),
            ("unit", table.unit, "Of every score: the predicted change if the row is removed."),
            (
                "credit",
                _CREDIT.get(str(attributes.get("credit", "additive"))),
                "How a score counts other rows that teach the same.",
            ),
            (
                "curvature, solver",
                f"{attributes.get('curvature')}, {attributes.get('solver')}, damping "
                f"{attributes.get('damping')}",
                "What these scores were made with.",
            ),
            (
                "kept",
                None if table.kept is None else f"the {table.kept:,} strongest of either end",
                "Other rows have no score in the file.",
            ),
            ("meaning", str(attributes.get("convention", "")), "As the file says it."),
        ],
    )
    return [made, how, scored, digests]


def _computed(explored: Explored) -> str:
    manifest = explored.manifest
    return manifest.dtype if manifest.compute == "own" else manifest.compute


def _listed(options: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
