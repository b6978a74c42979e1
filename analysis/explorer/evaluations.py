"""The page's sections on evaluations of adapters, and on whether scores agree with retraining."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.explorer.blocks import Block, axis, column, facts, finite, table, text
from analysis.explorer.inputs import in_text
from influence.manifest import Manifest

NATS = "nats per token"
#: Rows whose answers are shown.
ANSWERS = 60
_SETS = {"forget": "forget", "retain": "retained", "holdout": "held-out"}
#: Measures of a set: key, label, type, unit, help.
_MEASURES = (
    ("loss", "loss", "number", NATS, "Mean cross-entropy per completion token."),
    ("perplexity", "perplexity", "number", "", "The exponential of the loss."),
    ("probability", "probability", "number", "", "Mean of exp(-loss) over the rows."),
    ("accuracy", "tokens right", "percent", "%", "Tokens whose likeliest prediction is right."),
    ("exact_memorization", "exact memorization", "percent", "%", "Tokens recited in place."),
    ("extraction_strength", "extraction strength", "percent", "%", "Share that can be drawn out."),
    ("extracted", "drawn out whole", "whole", "rows", "Rows that decoding recites whole."),
    ("rouge1", "ROUGE-1", "number", "recall", "Words of the answer that generations share."),
    ("rougeL", "ROUGE-L", "number", "recall", "Longest common subsequence with the answer."),
)


def blocks(evaluations: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Block]:
    """Tables of every evaluation, and what the adapters answered where the record has it."""
    return [each for name, record in evaluations for each in _evaluation(Path(name).name, record)]


def _evaluation(name: str, record: Mapping[str, Any]) -> Iterator[Block]:
    columns = [
        column("rows", "text", "", "Which set of rows."),
        column("under", "text", "", "Which adapter they were measured under."),
        column("how many", "whole", "rows", "Rows of the set."),
        *(column(label, type, unit, help) for _, label, type, unit, help in _MEASURES),
    ]
    lines = []
    for key, entry in _object(record.get("sets")).items():
        for who in ("base", "adapter", "reference"):
            measured = _object(_object(entry).get(who))
            if measured:
                values = [finite(measured.get(key)) for key, *_ in _MEASURES]
                lines.append([_SETS.get(key, key), who, finite(entry.get("rows")), *values])
    place = _object(record.get("adapter")).get("path")
    yield table(f"{name}: {place or 'the adapter'}", columns, lines)
    others = ("membership", "kl", "forget_quality", "utility", "probes", "generalized_exposure")
    scalars = [
        (f"{key}{path}".replace("_", " "), value)
        for key in others
        for path, value in _scalars(record.get(key))
    ]
    if scalars:
        columns = [
            column("measure", "text", "", "Where it stands in the record."),
            column("value", "number", "", "As the record has it (docs/methods.md has the units)."),
        ]
        yield table(f"{name}: further measures", columns, scalars[:100])
    if answers := list(_answers(record)):
        more = f" (the first {ANSWERS})" if len(answers) > ANSWERS else ""
        yield {
            "kind": "answers",
            "title": f"{name}: what the adapters answer{more}",
            "answers": answers[:ANSWERS],
        }


def _answers(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What adapters gave for rows beside the rows' own completions."""
    for row in record["rows"] if isinstance(record.get("rows"), list) else ():
        said = {who: text for who, text in _object(_object(row).get("generated")).items() if text}
        if said:
            own = [["the row itself", str(row.get("completion") or "")]]
            found = own + [[str(who), str(text)] for who, text in said.items()]
            yield {"id": str(row.get("id")), "prompt": str(row.get("prompt") or ""), "said": found}


def _scalars(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Numbers of a nested object with where they stand."""
    if (number := finite(value)) is not None:
        yield path, number
    elif isinstance(value, Mapping) and depth < 4:
        for key, inner in value.items():
            yield from _scalars(inner, f"{path}, {key}", depth + 1)


def faithfulness(
    manifest: Manifest, judged: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Block]:
    """Agreement of scores with retraining, where it was measured, and what was tuned."""
    found: list[Block] = []
    for name, record in judged:
        mean, low, high = (finite(record.get(key)) for key in ("lds", "low", "high"))
        level = finite(record.get("level")) or 0.95
        interval = "" if low is None or high is None else f" ({level:.0%}: {low:.3f} to {high:.3f})"
        shown = "not defined" if mean is None else f"{mean:.3f}{interval}"
        entries = [
            ("LDS", shown, "Rank correlation of predicted and measured losses; 1 is perfect."),
            ("retrained adapters", _whole(record.get("subsets")), "Losses that were measured."),
            ("queries", _whole(record.get("queries")), "Queries that it is a mean over."),
        ]
        found.append(facts(f"{Path(name).name}: agreement with retraining", entries))
        values = record.get("per_query")
        if isinstance(values, list) and values:
            ids = record.get("query_ids")
            if not isinstance(ids, list) or len(ids) != len(values):
                ids = list(range(len(values)))
            pairs = sorted(zip(ids, map(finite, values), strict=True), key=_highest_first)
            found.append(
                {
                    "kind": "plot",
                    "plot": "bars",
                    "title": "Agreement by query",
                    "help": "Spearman correlation of each query's predicted and measured losses.",
                    "x": axis("query"),
                    "y": axis("Spearman correlation", "1 is perfect"),
                    "names": [str(id) for id, _ in pairs],
                    "values": [value for _, value in pairs],
                }
            )
    if (tuned := manifest.tuned) is not None:
        entries = [
            ("curvature", tuned.curvature, "What analysis tune chose."),
            ("damping", tuned.damping, "The damping that it chose."),
            ("points", tuned.at, "Where between base and adapter."),
            ("why", tuned.found, "What it was chosen by."),
        ]
        found.append(facts("Chosen by analysis tune", entries))
    for name, record in manifest.calibration.items():
        entries = [
            ("factor", f"{record.factor:.3g} times", "Scores are multiplied by it."),
            ("measured by", in_text(record.source), "What the size was told from."),
        ]
        found.append(facts(f"Size of the scores ({name})", entries))
    if not judged:
        found.append(
            text(
                "Agreement with retraining was not given: analysis lds --json > F.json, --lds F.json"
            )
        )
    return found


def _highest_first(pair: tuple[Any, float | None]) -> float:
    return 2.0 if pair[1] is None else -pair[1]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> str | None:
    number = finite(value)
    return None if number is None else f"{number:,.0f}"
