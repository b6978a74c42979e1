"""Planted faults: what `analysis clean` finds of them, and what removing its list changes.

    python benchmarks/cleaning.py WORLD --folder DIR [--base DIR] --work DIR [--apply] [--seeds N]

WORLD is `demo` (the folder of `make demo`), `tofu` or `real` (folders with `adapter/`, `train.jsonl`,
`query.jsonl`, of which number j paraphrases row 2 + 5 j, and `heldout.jsonl`; `--base` where the base
lies elsewhere). Faults are planted by `faults.py`, an adapter is trained on the rows with them by the
world's own recipe, and a run is fitted. Half of the queries, every second, are the good rows; the
others are held out.

Printed is the average precision of every reason's scores over all rows, and precision and recall of
what it lists, beside

    loss, base, self-influence    rows in the order of these
    BM25                          words in common: with a row that asks alike, or with any other
    cleanlab                      label quality of the supervised tokens (the least of a row's), and
                                  outliers of the text's directions; where cleanlab is installed
    chance                        the share of the wanted rows

With --apply the adapter is trained again: without what is suggested, without what `harms` and `label`
list, without the planted wrong rows themselves, and without as many rows as are suggested at random
(three draws; the control, as fewer rows are also fewer steps); the gain on both halves of the queries
is printed beside the predicted one, and above the random draws' on the same queries.

What is trained is kept in the work folder; a killed call goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults import Faults, plant, question_of
from tasks import average_precision

import influence
from analysis.cleaning import Cleaning, apply, clean
from analysis.cleaning.files import ROWS
from analysis.cleaning.texts import vectors
from analysis.demo.corpus import fact_of
from analysis.spreadsheets import escaped
from analysis.stats import bootstrap_interval
from influence.batches import collate, plan_batches
from influence.loss import mean_losses, supervised_logits
from influence.path import scaled
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.store import write_json
from influence.text_search import bm25
from influence.tokens import tokenize
from unlearn.record.change_files import write_rows
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, train

#: How each world's adapter is trained, and how many of which fault are planted. The demo has wrong
#: rows and strange ones of its own.
RECIPES = {
    "demo": Recipe(),
    "tofu": Recipe(),
    "real": Recipe(lr=1e-3, weight_decay=0.01, epochs=6, batch_size=10, seed=0),
}
COUNTS = {
    "demo": {"wrong": 0, "strange": 0},
    "tofu": {},
    "real": {"wrong": 6, "copies": 4, "contradictions": 4, "strange": 4},
}
#: Controls: how often as many rows as are suggested are drawn at random.
DRAWS = 3


def planted(world: str, folder: Path, base: str, work: Path) -> tuple[Run, Faults]:
    """The run on an adapter trained with faults, and which these are. Made once."""
    rows = influence.read_examples(folder / "train.jsonl")
    asked = () if world == "demo" else range(2, len(rows), 5)
    strangers = influence.read_examples(folder / "heldout.jsonl")
    rows, faults = plant(rows, strangers, asked=asked, **COUNTS[world])
    if world == "demo":
        own = json.loads((folder / "planted.json").read_text(encoding="utf-8"))
        copies = tuple((copy, copy.removesuffix("-copy")) for copy in own["copies"])
        faults = dataclasses.replace(
            faults,
            wrong=tuple(own["wrong"]),
            outliers=tuple(own["odd"]),
            duplicates=(*faults.duplicates, *copies),
        )
    work.mkdir(parents=True, exist_ok=True)
    path, adapter, recipe = work / "train.jsonl", work / "adapter", RECIPES[world]
    if not adapter.exists():
        write_rows(rows, path)
        write_json(work / "faults.json", dataclasses.asdict(faults))
        model = influence.load(base, str(folder / "adapter"), device="cpu")
        fresh = fresh_adapter(model, recipe.seed)
        train(fresh, tokenize(influence.read_examples(path), model.tokenizer), recipe)
        partial = work / "adapter.partial"
        fresh.model.save_pretrained(str(partial), save_embedding_layers=False)
        write_json(partial / "recipe.json", recipe.as_json())
        partial.rename(adapter)
    model = influence.load(base, str(adapter), device="cpu")
    run = influence.fit(model, influence.read_examples(path), directory=work / "run")
    return run, faults


def halves(world: str, folder: Path) -> tuple[Examples, Examples]:
    """The good rows and the held-out ones: every second query each."""
    name = "queries.jsonl" if world == "demo" else "query.jsonl"
    queries = influence.read_examples(folder / name)
    every = np.arange(len(queries))
    return queries.select(every[::2]), queries.select(every[1::2])


def asked_of(world: str, run: Run, folder: Path, good: Examples) -> np.ndarray:
    """Whether a good row asks what a training row answers, bool [n]."""
    if world == "demo":
        facts = {fact_of(row.id) for row in good}
        return np.array([fact_of(id) in facts for id in run.train.ids])
    rows = influence.read_examples(folder / "train.jsonl")
    every = influence.read_examples(folder / "query.jsonl")
    names = {rows.ids[2 + 5 * j] for j, query in enumerate(every) if query.id in good}
    return np.array([id.removesuffix("-other") in names for id in run.train.ids])


# ---- rivals --------------------------------------------------------------------------------------


def rivals(run: Run) -> dict[str, dict[str, np.ndarray]]:
    """Scores `[n]` of others, by the reason that they compete for; larger = more suspicious."""
    rows, texts = run.train, [_text(row) for row in run.train]
    losses = mean_losses(run.model, run.tokens)
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(run.model, run.tokens)
    self_influence = run.self_influence().values.astype(float)
    plain = {"loss": losses, "base": base, "self-influence": self_influence}
    asking = _in_common([question_of(row) for row in rows])
    answering = _in_common([row.answer or "" for row in rows])
    whole = _in_common(texts)
    n = np.arange(len(rows))
    near = asking.argmax(1)
    label = {**plain, "BM25": -answering.max(1)}
    contradiction = {**plain, "BM25": asking.max(1) * (1 - np.minimum(answering[n, near], 1))}
    duplicate = {**plain, "BM25": whole.max(1)}
    outlier = {**plain, "BM25": -whole.max(1)}
    try:
        label["cleanlab"] = contradiction["cleanlab"] = label_quality(run)
        outlier["cleanlab"] = out_of_distribution(texts)
    except ImportError:
        say("note: cleanlab is not installed, and left out")
    return {
        "harms": label,
        "label": label,
        "contradiction": contradiction,
        "duplicate": duplicate,
        "outlier": outlier,
        "personal": plain,
    }


def _text(row: influence.Example) -> str:
    """Question and answer."""
    return f"{question_of(row)} {row.answer or ''}"


def _in_common(texts: Sequence[str]) -> np.ndarray:
    """BM25 of every text with every other one, as a share of its score with itself, `[n, n]`."""
    scores = bm25(texts, texts)
    own = np.maximum(np.diagonal(scores), 1e-9)[:, None]
    shares = scores / own
    np.fill_diagonal(shares, 0)
    return shares


def label_quality(run: Run) -> np.ndarray:
    """Cleanlab's label quality of supervised tokens, less of it larger, `[n]`."""
    from cleanlab.token_classification.rank import get_label_quality_scores

    worst = np.empty(len(run.tokens))
    for part in plan_batches(run.tokens, 2048):
        batch = collate(run.tokens, part, pad_id=run.model.pad_id, device=run.model.device)
        with run.model.evaluating(), torch.no_grad():
            found = supervised_logits(run.model, batch)
            given = found.logits.float().softmax(-1).cpu().numpy()
        targets = found.targets.cpu().numpy()
        ends = np.cumsum(run.tokens.counts[part])[:-1]
        labels = [each.tolist() for each in np.split(targets, ends)]
        scores, _ = get_label_quality_scores(labels, np.split(given, ends))
        worst[part] = -scores
    return worst


def out_of_distribution(texts: Sequence[str]) -> np.ndarray:
    """Cleanlab's distance to the nearest rows, in the directions of the texts' vectors, `[n]`."""
    from cleanlab.outlier import OutOfDistribution
    from sklearn.decomposition import TruncatedSVD

    made = vectors(texts)
    directions = min(64, *(size - 1 for size in made.shape))
    features = TruncatedSVD(directions, random_state=0).fit_transform(made)
    return -OutOfDistribution().fit_score(features=np.asarray(features), verbose=False)


# ---- what is found -------------------------------------------------------------------------------


def wanted(run: Run, faults: Faults, asked: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each reason, which rows it should find, and which count at all, bool `[n]` each."""
    ids = run.train.ids

    def marked(names: Sequence[str]) -> np.ndarray:
        return np.isin(ids, list(names))

    place = {id: at for at, id in enumerate(ids)}
    later = [max(pair, key=place.__getitem__) for pair in faults.duplicates]
    other = marked([pair[0] for pair in faults.contradictions])
    contradicted = marked([pair[1] for pair in faults.contradictions])
    false, every = marked(faults.wrong) | other, np.ones(len(ids), bool)
    return {
        "harms": (false & asked, ~(false & ~asked)),
        "label": (false, ~contradicted),
        "contradiction": (other | contradicted, every),
        "duplicate": (marked(later), every),
        "outlier": (marked(faults.outliers), every),
        "personal": (marked(faults.personal), every),
    }


def judged(result: Cleaning, faults: Faults, asked: np.ndarray) -> list[dict[str, Any]]:
    """Average precision, precision and recall of every reason, beside the rivals'."""
    run, lines = result.run, []
    others = rivals(run)
    for reason, (want, counts) in wanted(run, faults, asked).items():
        found = result.found[reason]
        listed = np.zeros(len(want), bool)
        listed[[each.row for each in found.findings]] = True
        hits = int((listed & want & counts).sum())
        named = int((listed & counts).sum())
        lines.append(
            {
                "reason": reason,
                "wanted": int(want.sum()),
                "listed": named,
                "precision": hits / named if named else float("nan"),
                "recall": hits / max(int(want.sum()), 1),
                "ap": _ap(found.scores[counts], want[counts]),
                "chance": float(want[counts].mean()),
                "others": {
                    name: _ap(values[counts], want[counts])
                    for name, values in others[reason].items()
                },
            }
        )
    return lines


def _ap(scores: np.ndarray, want: np.ndarray) -> float:
    """Average precision; rows that a reason says nothing of are last."""
    least = scores[np.isfinite(scores)].min(initial=0.0) - 1
    return average_precision(np.where(np.isfinite(scores), scores, least), want)


def relabelling(result: Cleaning, faults: Faults) -> tuple[int, int, int]:
    """How many better answers are suggested, how many of them for false rows, and how many right.

    Right is one that has half of the words of the answer that was there before (of a wrong row), or
    that of the row that was contradicted.
    """
    ids, texts = result.run.train.ids, result.texts
    place = {id: at for at, id in enumerate(ids)}
    truth = dict(faults.right) | {
        other: texts[place[first]].answer for other, first in faults.contradictions
    }
    known = {id: set(answer.lower().split()) for id, answer in truth.items()}
    false = set(faults.wrong) | {pair[0] for pair in faults.contradictions}
    right = 0
    for row, answer in result.relabel.items():
        words = known.get(ids[row])
        right += bool(words) and len(words & set(answer.lower().split())) >= len(words) / 2
    return len(result.relabel), sum(ids[row] in false for row in result.relabel), right


def sides(result: Cleaning, faults: Faults) -> tuple[int, int]:
    """How many rows of contradictions are suggested to go or change, and how many of them are false."""
    ids, false = result.run.train.ids, {pair[0] for pair in faults.contradictions}
    named = [each.row for each in result.found["contradiction"].findings if each.suggested]
    return len(named), sum(ids[row] in false for row in named)


# ---- what it changes -----------------------------------------------------------------------------


def sets_of(result: Cleaning, faults: Faults, draws: int = DRAWS) -> dict[str, list[str]]:
    """Ids of the rows that trainings leave out: suggested, planted, doubted, and drawn at random.

    A draw is of as many rows as are suggested for removal, of all rows alike.
    """
    ids = result.run.train.ids
    doubted = {each.row for reason in ("harms", "label") for each in result.found[reason].findings}
    sets = {
        "suggested": [ids[row] for row in result.remove],
        "planted wrong rows": [*faults.wrong, *(pair[0] for pair in faults.contradictions)],
        "harms and label": [ids[row] for row in sorted(doubted)],
    }
    for draw in range(draws):
        drawn = np.random.default_rng(draw).permutation(len(ids))[: len(result.remove)]
        sets[f"random rows, draw {draw}"] = [ids[row] for row in sorted(drawn.tolist())]
    return sets


def trainings(
    result: Cleaning,
    sets: dict[str, list[str]],
    folder: Path,
    good: Examples,
    heldout: Examples,
    seeds: int,
) -> dict[str, dict[str, Any]]:
    """What `apply` measures without each set of rows; one that was measured before is read again."""
    before, found = (folder / ROWS).read_text(encoding="utf-8"), {}
    try:
        for name, removed in sets.items():
            kept = folder.parent / f"without {name}.json"
            part = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
            if part.get("removed") != removed or part.get("seeds") != seeds:
                say(f"{name}: {len(removed)} rows")
                lines = [f'"{escaped(id)}",remove' for id in removed]
                (folder / ROWS).write_text(
                    "\n".join(["id,decision", *lines]) + "\n", encoding="utf-8"
                )
                part = apply(
                    folder, result.run, queries=good, holdout=heldout, seeds=seeds, overwrite=True
                )
                write_json(kept, part | {"removed": removed})
            found[name] = part
            _print_gains(name, part)
    finally:
        (folder / ROWS).write_text(before, encoding="utf-8")
    _print_random(found)
    return found


def _print_gains(name: str, part: dict[str, Any]) -> None:
    """What was measured without a set of rows, beside what was predicted."""
    for which, values in part["sets"].items():
        predicted = values["predicted"]
        said = "" if predicted is None else f", predicted {predicted['gain']:+.4f}"
        print(
            f"without {name} ({len(part['removed'])}), {which} {values['before']:.3f}: gain "
            f"{values['gain']:+.4f} [{values['low']:+.4f}, {values['high']:+.4f}]{said}",
            flush=True,
        )


def _print_random(found: dict[str, dict[str, Any]]) -> None:
    """The mean gain of the random draws, and how much more a set gains of the same rows."""
    drawn = [part for name, part in found.items() if name.startswith("random")]
    for which in ("good", "heldout"):
        each = np.array([part["sets"][which]["gains"] for part in drawn])
        means = ", ".join(f"{mean:+.4f}" for mean in each.mean(axis=1))
        print(f"random rows, {which}: mean gain {each.mean():+.4f} of {means}")
        for name, part in found.items():
            if name.startswith("random"):
                continue
            more = np.array(part["sets"][which]["gains"]) - each.mean(axis=0)
            interval = bootstrap_interval(
                lambda chosen, more=more: float(more[chosen].mean()), len(more), level=0.95
            )
            print(
                f"{name} above random, {which}: {more.mean():+.4f} "
                f"[{interval.low:+.4f}, {interval.high:+.4f}]"
            )


def main() -> None:
    """Plant, look, and print what was found; with --apply, train again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("world", choices=list(RECIPES))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--base")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--apply", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    base = args.base or str(args.folder / "base")
    run, faults = planted(args.world, args.folder, base, args.work)
    good, heldout = halves(args.world, args.folder)
    folder = args.work / "list"
    result = clean(run, good, out=folder, overwrite=True)
    record: dict[str, Any] = {
        "world": args.world,
        "rows": len(run.train),
        "found": judged(result, faults, asked_of(args.world, run, args.folder, good)),
        "relabelling": relabelling(result, faults),
        "sides": sides(result, faults),
        "predicted": result.summary["predicted"],
    }
    print(f"{args.world}: {len(run.train)} rows, {len(good)} good ones")
    for line in record["found"]:
        others = "  ".join(f"{name} {value:.2f}" for name, value in line["others"].items())
        print(
            f"{line['reason']:14} AP {line['ap']:.2f}  lists {line['listed']:2}: precision "
            f"{line['precision']:.2f}, recall {line['recall']:.2f} of {line['wanted']:2}; "
            f"{others}  chance {line['chance']:.2f}"
        )
    suggested, false, right = record["relabelling"]
    print(f"better answers: {suggested}, of false rows {false}, known to be right {right}")
    named, right = record["sides"]
    print(f"of contradictions {named} rows are suggested to go or change, {right} of them planted")
    if args.apply:
        sets = sets_of(result, faults)
        record["applied"] = trainings(result, sets, folder, good, heldout, args.seeds)
    write_json(args.work / "cleaning.json", record)


if __name__ == "__main__":
    main()
