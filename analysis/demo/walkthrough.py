"""The toolkit's main job on a world small enough to check.

Invented people, a few wrong facts, a retraining.

`demo(out)` makes everything it needs and downloads nothing:

1. a corpus (`make_corpus`): questions and answers about people who do not exist. The base model's
text is
   about some of them, the adapter's training rows are about twelve others, each fact in three
   phrasings. A few rows are planted: *wrong* ones (they contradict the fact's other phrasings),
   exact *copies*, and *odd* ones;
2. a small Llama (`train_base`) and a LoRA adapter on it (`train_adapter`); 3. an EK-FAC run
directory on which every other command works, and scores of questions in a fourth phrasing; 4. three
of these questions with their top proponents and opponents, as tables; 5. the rows ranked by how
much they oppose the questions about their own person (`opposition`), and how many
   planted wrong rows are among the first, beside the number that chance would give;
6. one prediction checked: the adapter is trained again with the slot of one row left empty, and the
predicted
   change of the question's loss is shown beside the measured one;
7. one person's rows removed by an edit, beside what `run.without` predicted of that and an adapter
trained again without them; the edit's record verified.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.demo.corpus import (
    N_BASE,
    N_COPIES,
    N_PEOPLE,
    N_WRONG,
    ODD,
    Corpus,
    Row,
    fact_of,
    make_corpus,
)
from analysis.demo.training import mean_losses, train_adapter, train_base
from influence.console import quiet_transformers
from influence.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from influence import Run, Scores


def opposition(
    scores: np.ndarray,
    self_influence: np.ndarray,
    groups: Sequence[str | None],
    query_groups: Sequence[str | None],
) -> np.ndarray:
    """How much each training row opposes the questions about its questions group.

    `o_i = mean over q with query_groups[q] = groups[i] of -score[q, i] / sqrt(self_influence[i])`

    The root takes out the length of the row's questions gradient: a row is high because it pulls
    *against* the questions, not because it pulls hard.

    Parameters
    ----------
    scores : array [query, train]
    self_influence : array [train]
    groups, query_groups : the group of each training row and of each query

    Returns
    -------
    array [train], NaN for rows about whose group nothing is asked
    """
    opposed = np.full(len(groups), np.nan)
    for i, group in enumerate(groups):
        questions = [
            q for q, other in enumerate(query_groups) if group is not None and other == group
        ]
        if questions:
            opposed[i] = -scores[questions, i].astype(np.float64).mean() / np.sqrt(
                max(float(self_influence[i]), 1e-30)
            )
    return opposed


def hits(values: np.ndarray, wanted: Collection[int]) -> tuple[int, float]:
    """How many of `wanted` are among the highest values, and the number that chance would give.

    NaN values are not ranked. Chance draws k of the N ranked rows, K of them wanted: `k K / N`, the
    mean of the hypergeometric distribution.
    """
    ranked = np.flatnonzero(~np.isnan(values))
    k = len(wanted)
    top = ranked[np.argsort(-values[ranked], kind="stable")[:k]]
    present = sum(int(i) in wanted for i in ranked)
    return sum(int(i) in wanted for i in top), min(k, len(ranked)) * present / max(1, len(ranked))


_MADE = (
    "base",
    "adapter",
    "run",
    "check",
    "edited",
    "train.jsonl",
    "queries.jsonl",
    "heldout.jsonl",
    "planted.json",
)


def demo(
    out: str | Path, *, seed: int = 0, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Make a small world under `out`, attribute in it, and check what comes out.

    Parameters
    ----------
    out
        A new or empty directory; receives base/, adapter/, train.jsonl, queries.jsonl,
        heldout.jsonl, planted.json, run/ (the run directory), check/ (the retrained adapters) and
        edited/ (without one person).
    seed
        Of corpus, base, adapter and sampled labels.
    overwrite
        Replace what an earlier demo left there; other files in `out` are not touched.
    console
        Where the tables go; standard output by default.

    Returns
    -------
    dict
        `out`, `seconds`, `losses`, `shown`, `wrong_rows`, `check` and `removal`, as printed; JSON
        can hold it.

    Raises `InputError` where `out` holds something and `overwrite` is not given.
    """
    from rich.console import Console

    import influence

    start = time.monotonic()
    out = _claim(Path(out), overwrite)
    console = console or Console()
    quiet_transformers()
    corpus = make_corpus(seed)
    corpus.write(out)
    say = _narrator(console, start)
    say(
        f"{N_BASE} invented people for the base model, {N_PEOPLE} others for the adapter: "
        f"{len(corpus.train)} training rows ({N_WRONG} planted wrong, {N_COPIES} copies, "
        f"{len(ODD)} odd), {len(corpus.queries)} questions"
    )
    train_base(corpus.base_texts, out / "base", seed)
    train_adapter(out / "base", corpus.train, out / "adapter", seed)
    losses = _losses(out, corpus)
    say("base and adapter trained")
    _print_losses(console, losses)

    model = influence.load(str(out / "base"), str(out / "adapter"), device="cpu")
    train = influence.read_examples(out / "train.jsonl")
    run = influence.fit(model, train, directory=out / "run", seed=seed)
    scores = run.score(
        influence.read_examples(out / "queries.jsonl"), out=out / "run" / "scores.h5"
    )
    say(
        f"EK-FAC fitted, {scores.values.shape[0]} x {scores.values.shape[1]} scores written to "
        f"{out / 'run'}"
    )

    chosen = _choose(corpus)
    shown = [_show(console, scores, corpus, number, reason) for number, reason in chosen]
    wrong = _find_wrong(console, run, scores, corpus, losses["rows"])
    check = _check(console, out, corpus, scores, query=chosen[-1][0], seed=seed)
    removal = _remove(console, out, corpus, run, seed)
    say(f"done; try: influence top --run {out / 'run'} --query {scores.query_ids[chosen[0][0]]}")
    return {
        "out": str(out),
        "seconds": time.monotonic() - start,
        "losses": losses["table"],
        "shown": shown,
        "wrong_rows": wrong,
        "check": check,
        "removal": removal,
    }


def _claim(out: Path, overwrite: bool) -> Path:
    """Make `out` a directory without earlier results, or say why not."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the demo")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(
            f"{out} is not empty: give a new directory, or --overwrite to replace an earlier demo "
            "there"
        )
    for name in _MADE:
        made = out / name
        if made.is_dir() and not made.is_symlink():
            shutil.rmtree(made)
        else:
            made.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _narrator(console: Console, start: float) -> Callable[[str], None]:
    """Return a function that prints one plain line with the seconds since `start`."""

    def say(text: str) -> None:
        console.print(
            f"{time.monotonic() - start:5.0f} s  {text}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    return say


def _losses(out: Path, corpus: Corpus) -> dict[str, Any]:
    """Mean losses of each kind of row, as `table`.

    Each training row's under the adapter, as `rows`.
    """
    kind = {row_id: name for name, ids in corpus.planted.items() for row_id in ids}
    sets: dict[str, list[Row]] = {
        "training rows, right": [],
        "planted wrong": [],
        "copies": [],
        "odd": [],
    }
    names = {"wrong": "planted wrong", "copies": "copies", "odd": "odd"}
    for row in corpus.train:
        sets[names.get(kind.get(row["id"], ""), "training rows, right")].append(row)
    sets |= {
        "questions (new phrasing)": list(corpus.queries),
        "held-out people": list(corpus.heldout),
    }
    everything = [row for rows in sets.values() for row in rows]
    before = dict(zip(_ids(everything), mean_losses(out / "base", None, everything), strict=True))
    after = dict(
        zip(_ids(everything), mean_losses(out / "base", out / "adapter", everything), strict=True)
    )
    table = {
        name: {
            "rows": len(rows),
            "base": float(np.mean([before[i] for i in _ids(rows)])),
            "adapter": float(np.mean([after[i] for i in _ids(rows)])),
        }
        for name, rows in sets.items()
    }
    return {"table": table, "rows": np.array([after[row["id"]] for row in corpus.train])}


def _ids(rows: Sequence[Row]) -> list[str]:
    return [row["id"] for row in rows]


def _table(title: str, columns: Mapping[str, str]) -> Any:
    """An empty rich table without markup in its title. `columns` maps heading to left or right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for heading, side in columns.items():
        right = side == "right"
        table.add_column(
            heading, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return table


def _print_losses(console: Console, losses: Mapping[str, Any]) -> None:
    table = _table(
        "mean loss, nats per token",
        {"": "left", "rows": "right", "base": "right", "adapter": "right"},
    )
    for name, entry in losses["table"].items():
        table.add_row(name, str(entry["rows"]), f"{entry['base']:.2f}", f"{entry['adapter']:.2f}")
    console.print(table)


def _choose(corpus: Corpus) -> list[tuple[int, str]]:
    """Three questions to show: on a fact with a wrong row, with a copied row, with neither."""
    disputed = {fact_of(row_id) for row_id in corpus.planted["wrong"]}
    copied = {fact_of(row_id) for row_id in corpus.planted["copies"]}
    facts = [fact_of(row["id"]) for row in corpus.queries]
    kinds = (
        ("one of the rows on this fact is planted wrong", lambda fact: fact in disputed),
        ("one of the rows on this fact occurs twice", lambda fact: fact in copied),
        ("nothing planted on this fact", lambda fact: fact not in disputed | copied),
    )
    return [
        (next(n for n, fact in enumerate(facts) if wanted(fact)), reason)
        for reason, wanted in kinds
    ]


def _show(
    console: Console, scores: Scores, corpus: Corpus, number: int, reason: str
) -> dict[str, Any]:
    """Print one question with its strongest proponents and opponents.

    And where its planted wrong row is.
    """
    rows = {row["id"]: row for row in corpus.train}
    notes = {"wrong": "wrong", "copies": "copy", "odd": "odd"}
    planted = {row_id: notes[kind] for kind, ids in corpus.planted.items() for row_id in ids}
    query = corpus.queries[number]
    proponents, opponents = scores.top(number, 4)
    columns = {"score": "right", "planted": "left", "question and answer": "left", "id": "left"}
    table = _table(f"{_readable(query)}\n{query['id']}: {reason}", columns)
    for entries in (proponents, opponents):
        for entry in entries:
            note = planted.get(entry.id, "")
            table.add_row(f"{entry.score:+.3f}", note, _readable(rows[entry.id]), entry.id)
        table.add_section()
    console.print()
    console.print(table)
    wrong = [
        row_id for row_id in corpus.planted["wrong"] if fact_of(row_id) == fact_of(query["id"])
    ]
    result: dict[str, Any] = {"query": query["id"], "reason": reason}
    for row_id in wrong:
        score = scores.values[number, scores.train_ids.index(row_id)]
        place = int((scores.values[number] <= score).sum())
        answer = rows[row_id]["completion"].strip()
        text = f"its planted wrong row {row_id} ({answer}): score {score:+.3f}, "
        text += f"number {place} of {len(rows)} from the strongest opponent"
        console.print(text, markup=False, highlight=False)
        result["wrong"] = {"id": row_id, "score": float(score), "place": place}
    parts = (("proponents", proponents), ("opponents", opponents))
    return result | {name: [{"id": e.id, "score": e.score} for e in part] for name, part in parts}


def _readable(row: Row) -> str:
    """Question and answer on one line."""
    return f"{row['prompt'].removeprefix('Q: ').removesuffix(chr(10) + 'A:')}{row['completion']}"


def _find_wrong(
    console: Console, run: Run, scores: Scores, corpus: Corpus, losses: np.ndarray
) -> dict[str, Any]:
    """Rank the rows three ways and count the planted wrong ones among the first k."""
    self_influence = run.self_influence(out=run.directory / "scores.h5").values
    groups = [row.get("group") for row in corpus.train]
    opposed = opposition(
        scores.values, self_influence, groups, [row["group"] for row in corpus.queries]
    )
    unasked = np.isnan(opposed)
    wrong = {i for i, row in enumerate(corpus.train) if row["id"] in corpus.planted["wrong"]}
    rankings = {
        "opposition to own questions": opposed,
        "loss": np.where(unasked, np.nan, losses),
        "self-influence": np.where(unasked, np.nan, self_influence.astype(np.float64)),
    }
    ranked, k = int((~unasked).sum()), len(wrong)
    chance = hits(opposed, wrong)[1]
    counts = {name: hits(values, wrong)[0] for name, values in rankings.items()}
    table = _table(
        f"planted wrong rows among the first {k} of {ranked}, ranked by",
        {"": "left", f"of {k}": "right"},
    )
    for name, count in counts.items():
        table.add_row(name, str(count))
    table.add_row("chance", f"{chance:.2f}")
    console.print()
    console.print(table)
    order = np.argsort(np.where(unasked, np.inf, -opposed), kind="stable")[:k]
    return {
        "k": k,
        "ranked": ranked,
        "chance": chance,
        "found": counts,
        "first": [corpus.train[int(i)]["id"] for i in order],
    }


def _check(
    console: Console, out: Path, corpus: Corpus, scores: Scores, *, query: int, seed: int
) -> dict[str, Any]:
    """Train again without a question's top proponent and compare with the predicted change.

    Measured twice: with the adapter's own seed, and between two adapters of another seed
    (initialisation and row order), which shows how far the truth itself depends on chance.
    """
    entry = scores.top(query, 1)[0][0]
    row, base = entry.id, out / "base"
    measured = []
    for number, other in enumerate((seed, seed + 1)):
        full, without = out / "adapter", out / "check" / f"seed-{other}-without"
        if number:
            full = out / "check" / f"seed-{other}"
            train_adapter(
                base, corpus.train, full, other, label=f"training on all rows, seed {other}"
            )
        label = f"training without {row}, seed {other}"
        train_adapter(base, corpus.train, without, other, absent={row}, label=label)
        after, before = (
            np.array(mean_losses(base, adapter, corpus.queries)) for adapter in (without, full)
        )
        measured.append(after - before)
    predicted = scores.values[:, entry.index].astype(np.float64)
    result = {
        "query": scores.query_ids[query],
        "row": row,
        "predicted": float(predicted[query]),
        "measured": float(measured[0][query]),
        "measured_other_seed": float(measured[1][query]),
        "others_predicted": _mean_size(predicted, query),
        "others_measured": _mean_size(measured[0], query),
        "others_measured_other_seed": _mean_size(measured[1], query),
        "place": int((measured[0] >= measured[0][query]).sum()),
        "questions": len(predicted),
    }
    _print_check(console, result, seed)
    return result


def _mean_size(changes: np.ndarray, leave_out: int) -> float:
    """Mean absolute change of all questions but one."""
    return float(np.abs(np.delete(changes, leave_out)).mean())


def _print_check(console: Console, result: Mapping[str, Any], seed: int) -> None:
    heads = ["predicted", f"measured, seed {seed}", f"measured, seed {seed + 1}"]
    table = _table(
        f"change of loss (nats) when {result['row']} is removed and training is repeated",
        {"": "left", **dict.fromkeys(heads, "right")},
    )
    keys = ("predicted", "measured", "measured_other_seed")
    table.add_row(result["query"], *(f"{result[key]:+.3f}" for key in keys))
    others = f"the other {result['questions'] - 1} questions, mean absolute"
    table.add_row(others, *(f"{result['others_' + key]:.3f}" for key in keys))
    console.print()
    console.print(table)
    console.print(verdict(result), markup=False, highlight=False)


def verdict(result: Mapping[str, Any]) -> str:
    """One paragraph that says how far prediction and measurement are apart."""
    predicted, measured = result["predicted"], result["measured"]
    place = (
        f"Of the {result['questions']} questions it is number {result['place']} by measured rise."
    )
    if measured == 0:
        return (
            f"The removal changed nothing that can be measured; {predicted:+.3f} was predicted. "
            f"{place}"
        )
    factor = abs(predicted / measured)
    size = f"{factor:.1f} times too large" if factor >= 1 else f"{1 / factor:.1f} times too small"
    if predicted * measured < 0:
        return (
            f"The direction is wrong: {predicted:+.3f} predicted, {measured:+.3f} measured. {place}"
        )
    return (
        f"The direction is right; the predicted size is {size}. {place} Another seed moves the "
        "measured change itself, so one row's size is right within a factor of a few at best."
    )


def _remove(console: Console, out: Path, corpus: Corpus, run: Run, seed: int) -> dict[str, Any]:
    """Take one person's rows out of the adapter by an edit, and compare with a retraining."""
    import influence
    import unlearn

    person = corpus.queries[0]["group"]
    gone = {row["id"] for row in corpus.train if row.get("group") == person}
    effect = run.without(sorted(gone), influence.read_examples(out / "queries.jsonl"))
    ahead = {each.id: each.predicted for each in (*effect.removed, *effect.queries)}
    edit = unlearn.remove(run, sorted(gone))
    edited = edit.save(out / "edited", force=True)
    verified = unlearn.verify(run.directory, apply=True).passed
    again = out / "check" / f"seed-{seed}-without-person"
    train_adapter(
        out / "base", corpus.train, again, seed, absent=gone, label=f"training without {person}"
    )
    sets = {
        f"the {len(gone)} rows about {person}": [row for row in corpus.train if row["id"] in gone],
        "questions about them": [row for row in corpus.queries if row["group"] == person],
        "other training rows": [row for row in corpus.train if row["id"] not in gone],
        "other questions": [row for row in corpus.queries if row["group"] != person],
        "held-out people": list(corpus.heldout),
    }
    adapters = {"before": out / "adapter", "edited": edited, "trained again": again}
    losses = {
        name: {
            key: float(np.mean(mean_losses(out / "base", adapter, rows)))
            for key, adapter in adapters.items()
        }
        for name, rows in sets.items()
    }
    predicted = {
        name: float(np.mean([ahead[row["id"]] for row in rows]))
        for name, rows in sets.items()
        if all(row["id"] in ahead for row in rows)
    }
    table = _table(
        f"mean loss (nats per token) when the rows about {person} are removed",
        {"": "left", **dict.fromkeys(["before", "predicted", "edited", "trained again"], "right")},
    )
    for name, means in losses.items():
        before, *after = (f"{value:.2f}" for value in means.values())
        table.add_row(name, before, f"{predicted[name]:.2f}" if name in predicted else "", *after)
    console.print()
    console.print(table)
    cost, target = edit.report["cost"], edit.report["losses"]["edited"]["target"]
    console.print(
        f"The edit expected {target:.2f} for the removed rows, took {cost['seconds']:.0f} s and "
        f"{cost['total']:.0f} row-gradients, and its record "
        f"{'verifies' if verified else 'DOES NOT VERIFY'}: unlearn verify --run {run.directory}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return {
        "person": person,
        "losses": losses,
        "predicted": predicted,
        "expected": target,
        "cost": cost["total"],
        "verified": verified,
    }
