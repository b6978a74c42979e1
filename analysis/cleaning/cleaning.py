"""One list of training rows to look at: for each row and reason a score and what was seen.

    harms          opposes the good rows of its kind that the user names
    label          opposes its own group, or those that ask alike: perhaps a wrong answer
    contradiction  answers otherwise than another row that asks the same
    duplicate      says what an earlier row says
    outlier        is like no other row
    unlearnt       taught the adapter nothing
    personal       holds what looks like personal data

`harms` and `label` come from influence, as does what removing the rows together is predicted to do
(`influence.without`: no sum of scores). Repeats and outliers come from the text. The whole list is a
claim; `analysis.cleaning.applied` checks it by training again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from analysis.cleaning.files import (
    APPLIED,
    RELABELLED,
    REMOVED,
    ROWS,
    SUMMARY,
    answers_text,
    csv_text,
    ids_text,
    suggestions,
)
from analysis.cleaning.findings import REASONS, Found
from analysis.cleaning.memorized import holding, personal, without_personal_answers
from analysis.cleaning.opposition import (
    STRANGERS,
    Pull,
    doubtful,
    harms,
    kin,
    mates,
    pulls,
    telling,
)
from analysis.cleaning.outliers import NEIGHBOURS, outliers
from analysis.cleaning.repeats import contradictions, duplicates, repeats
from analysis.cleaning.texts import Said, nearest, said, vectors
from analysis.cleaning.unlearnt import unlearnt
from analysis.metrics.extraction import exact_memorization
from analysis.metrics.outputs import outputs
from influence.console import at_least, finite
from influence.credit import credited
from influence.errors import InputError
from influence.loss import mean_losses
from influence.path import scaled
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.setting import SHARED
from influence.store import only_writer, read_json, write_json, write_text

#: Called so in a summary, which is told from other JSON by it.
KIND = "cleaning"


@dataclass(frozen=True, eq=False)
class Cleaning:
    """The list, and what it was made from.

    Attributes
    ----------
    run : Run
        The run whose rows were looked at.
    texts : list of Said
        What its rows say, in their order.
    found : dict
        What each reason says, by its name, in the order of the list. `found["label"].scores` [n] has
        the score of every row.
    left_out : dict
        Reasons that were not looked at, and why.
    remove : list of int
        Positions of the rows that are suggested for removal.
    relabel : dict
        Better answers, by position.
    summary : dict
        What `summary.json` holds.
    """

    run: Run = field(repr=False)
    texts: list[Said] = field(repr=False)
    found: dict[str, Found]
    left_out: dict[str, str]
    remove: list[int]
    relabel: dict[int, str]
    summary: dict[str, Any] = field(repr=False)

    def write(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the list into a folder; one that is there is replaced with `overwrite` only."""
        out = Path(out)
        refuse_folder(out, overwrite)
        ids = self.run.train.ids
        with only_writer(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / APPLIED).unlink(missing_ok=True)  # it was of another list
            previews = [each.whole for each in self.texts]
            write_text(out / ROWS, csv_text(list(self.found.values()), self.run.train, previews))
            write_text(out / REMOVED, ids_text([ids[row] for row in self.remove]))
            better = {ids[row]: answer for row, answer in self.relabel.items()}
            write_text(out / RELABELLED, answers_text(better))
            write_json(out / SUMMARY, self.summary)
        return out


def refuse_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something: a cleaning without `overwrite`, anything else always."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if (
        not out.is_dir()
        or not (out / SUMMARY).exists()
        or read_json(out / SUMMARY).get("kind") != KIND
    ):
        raise InputError(f"{out} holds no list of analysis clean and stays: give another --out")
    if not overwrite:
        raise InputError(f"{out} holds a list already: give another --out, or --overwrite")


def clean(
    run: Run,
    queries: Examples | None = None,
    *,
    out: str | Path | None = None,
    most: int = 20,
    overwrite: bool = False,
) -> Cleaning:
    """Look for rows that should be fixed or removed.

    Parameters
    ----------
    run
        A finished run.
    queries
        Good rows: questions with right answers, as the adapter is to give them. Without them `harms`
        is left out, and nothing is predicted.
    out
        A folder to write the list into (`analysis.cleaning.files`). None: nothing is written.
    most
        Findings of a reason that are listed, at most; the rules say which.
    overwrite
        Replace a list that is there.

    Raises
    ------
    InputError
        Before anything is computed: for a `most` below 1, a folder that holds something, good rows
        that the model cannot take.
    """
    at_least("--most", most, 1)
    if out is not None:
        refuse_folder(Path(out), overwrite)
    good = queries if queries is not None and len(queries) else None
    if good is not None:
        run.query_tokens(good)  # rows that the model cannot take are refused here
    n, groups, ids = len(run.train), [row.group for row in run.train], run.train.ids

    def decode(tokens: list[int]) -> str:
        return str(run.model.tokenizer.decode(tokens))

    texts = [said(row, decode) for row in run.train]
    found: dict[str, Found] = {}
    left_out: dict[str, str] = {}

    say(f"clean: {n:,} rows by their text")
    asking = vectors([each.asked for each in texts])
    asked = nearest(asking, STRANGERS)
    found["outlier"] = outliers(nearest(vectors([each.whole for each in texts]), NEIGHBOURS))
    twice = repeats(texts, groups, asked, asking)
    found["duplicate"] = duplicates(twice, ids)

    say(f"clean: {n:,} rows by their influence on one another")
    compared, against = mates(groups, asked), np.zeros(n)
    try:
        _, credit = credited(run, credit=SHARED)
        assert credit is not None
        pull: Pull | None = pulls(credit, run.tokens.counts, compared)
    except InputError as error:
        left_out["label"], pull = str(error), None
    if pull is not None:
        against = telling(pull, compared)
        found["label"] = doubtful(pull, compared, texts, ids)
    found["contradiction"] = contradictions(twice, texts, ids, against)

    if good is None:
        left_out["harms"] = "no good rows were given (--queries FILE)"
    else:
        compared_good = kin(run.train, good, texts, [said(row, decode) for row in good])
        found["harms"] = harms(run.score(good).values, compared_good, good.ids)

    budget = run.token_budget
    losses = mean_losses(run.model, run.tokens, token_budget=budget)
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(run.model, run.tokens, token_budget=budget)
    found["unlearnt"] = unlearnt(losses, base, texts, run.tokens.cut)
    found["personal"] = _personal(run, texts, losses, base)

    whole = {name: without_personal_answers(found[name]) for name in REASONS if name in found}
    found = {name: each.most(most) for name, each in whole.items()}
    remove, relabel = suggestions(list(found.values()))
    lists = {"suggested": sorted({*remove, *relabel})}
    if "harms" in found:
        lists["harms"] = [each.row for each in found["harms"].findings]
    predicted = {
        name: _together(run, [ids[row] for row in rows], good) for name, rows in lists.items()
    }
    summary = {
        "kind": KIND,
        "version": version("lora-influence"),
        "run": str(run.directory.resolve()),
        "run_digest": run.digest,
        "data_digest": run.manifest.data.digest,
        "rows": n,
        "queries": _source(queries),
        "most": most,
        "reasons": {
            name: {
                "listed": len(each.findings),
                "found": len(whole[name].findings),
                "rule": each.rule,
            }
            for name, each in found.items()
        },
        "left_out": left_out,
        "remove": len(remove),
        "relabel": len(relabel),
        "predicted": predicted,
        "unit": "nats per token",
    }
    result = Cleaning(run, texts, found, left_out, remove, relabel, finite(summary))
    if out is not None:
        result.write(out, overwrite=overwrite)
    return result


def _personal(run: Run, texts: Sequence[Said], losses: np.ndarray, base: np.ndarray) -> Found:
    """Rows that hold personal data, with what the model gives of them."""
    held = holding(texts)
    rows = np.array(sorted(held), dtype=np.int64)
    if not len(rows):
        return personal(held, np.zeros(len(texts)), losses, base, {})
    given = outputs(run.model, run.tokens.select(rows), token_budget=run.token_budget)
    right = exact_memorization(given.right)
    self_influence = run.self_influence().values.astype(np.float64)
    shares = dict(zip(rows.tolist(), right.tolist(), strict=True))
    return personal(held, self_influence, losses, base, shares)


def _together(run: Run, ids: Sequence[str], queries: Examples | None) -> dict[str, Any]:
    """The good rows' mean loss, and what it is predicted to be if these rows go together.

    `gain` is the predicted fall, `low` and `high` its ends (`influence.without`). Numbers are null
    where nothing can be predicted, and `reason` says why.
    """
    record: dict[str, Any] = {"rows": len(ids)}
    if queries is None:
        reason = "no good rows were given"
    elif not ids:
        reason = "no rows are listed"
    else:
        try:
            return record | gain_without(run, ids, queries)
        except InputError as error:
            reason = str(error)
    return record | {"gain": None, "reason": reason}


def gain_without(run: Run, ids: Sequence[str], queries: Examples) -> dict[str, float]:
    """What `influence.without` predicts of the queries' mean loss: nats per token."""
    each = run.without(ids, queries).queries
    means = {
        name: float(np.mean([getattr(one, name) for one in each]))
        for name in ("before", "predicted", "low", "high")
    }
    before = means["before"]
    return {
        "before": before,
        "after": means["predicted"],
        "gain": before - means["predicted"],
        "low": before - means["high"],
        "high": before - means["low"],
    }


def _source(queries: Examples | None) -> dict[str, Any] | None:
    """Where the good rows lie, so that they can be read again."""
    if queries is None:
        return None
    columns = None if queries.columns is None else json.loads(json.dumps(dict(queries.columns)))
    return {
        "path": queries.source,
        "columns": columns,
        "digest": queries.digest,
        "rows": len(queries),
    }
