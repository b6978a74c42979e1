"""Everything that is measured of an adapter on forget, retained and held-out rows, in one record and one table.

`forget` are the rows that should be gone, `retain` rows that should still be there, `holdout` rows of the same kind that no adapter
ever saw. A `reference`, where there is one, is another adapter of the same configuration on the same base: best one that was
trained without the forget rows, since what it scores is what "never seen" looks like here.

**Two cautions.** A membership attack compares forget with held-out rows, so it also answers whether these are different
kinds of rows: read its AUC beside the reference's, which never saw either. And forgetting that is measured from outside may be
hiding: the probes (`analysis.metrics.probes`) try to undo it.

The formulas are in `analysis.metrics`. Losses are mean cross-entropies per completion token, nats; the loss of a set is the mean over
its rows. What cannot be computed is null in the record, with the reason under the same name in its `notes`; notes whose
name begins with `remark` tell what else to know of the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis.evaluation.answers import (
    PARAPHRASED,
    PERTURBED,
    Rows,
    answering,
    completion,
    without_answers,
)
from analysis.evaluation.table import UNASKED
from analysis.metrics import likelihood, mia, tofu
from analysis.metrics.exposure import generalized_exposure, relative_exposure
from analysis.metrics.extraction import exact_memorization, extraction_strength
from analysis.metrics.outputs import Outputs, continuable, generate, gradient_norms, outputs
from analysis.metrics.probes import Relearned, crossing, quantise, relearn
from analysis.report.agreement import divergence
from influence.adapter import AdaptedModel
from influence.errors import AdapterError, InputError, NumericalError
from influence.fitting import versions
from influence.loading import adapter_folder
from influence.loss import check_rows, mean_losses
from influence.path import read_parameters, scaled
from influence.progress import track
from influence.rows import Examples
from influence.run import spaced
from influence.tokens import TokenizedExamples, tokenize

SETS = ("forget", "retain", "holdout")
PROBES = ("relearn", "quantise")
#: Rows of a side below which membership attacks say little.
FEW = 10
#: Share of the base's loss on the forget rows below which a reference must have seen them.
KNOWS = 0.5
_BITS = (8, 4)


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes
    ----------
    generate : int
        At most so many rows of each set are continued from their prompt, evenly spaced; 0: none.
    max_new_tokens : int
        Where a continuation ends at the latest.
    probes : tuple of str
        Of `relearn` and `quantise`.
    max_length : int or None
        Tokens that a row is cut to, as in training.
    token_budget : int or None
        Tokens per batch, padding included; None: 1,024 on a CPU, else 4,096.
    seed : int
        Of the bootstrap, and of the rows that are learned again.
    texts : bool
        Whether the record holds the rows' texts and what was generated.
    """

    generate: int = 32
    max_new_tokens: int = 128
    probes: tuple[str, ...] = ()
    max_length: int | None = None
    token_budget: int | None = None
    seed: int = 0
    texts: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (
            ("generate", self.generate, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_length", self.max_length, 2),
            ("token_budget", self.token_budget, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} {value} was given; expected at least {least}")
        for probe in self.probes:
            if probe not in PROBES:
                raise InputError(f"probe {probe!r} was given; expected {' or '.join(PROBES)}")


# ---- the evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Set:
    """One set of rows, ready for a model: its tokens, and the positions of the rows that are continued."""

    name: str
    rows: Rows
    tokens: TokenizedExamples
    continued: np.ndarray


@dataclass(frozen=True, eq=False)
class _Under:
    """What was measured of one set under one adapter; NaN where a row was not continued or has no other answers."""

    out: Outputs
    norms: np.ndarray | None
    generated: dict[int, str]
    rouge1: np.ndarray
    rougeL: np.ndarray
    ratios: np.ndarray
    accuracy: np.ndarray
    extraction: np.ndarray


def evaluate(
    model: AdaptedModel,
    forget: Rows | Examples,
    retain: Rows | Examples | None = None,
    holdout: Rows | Examples | None = None,
    *,
    reference: str | Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Measure an adapter, and a reference adapter beside it; the model is left as it was.

    Parameters
    ----------
    model
        Base and adapter, from `influence.load`.
    forget, retain, holdout
        Rows that should be forgotten, that should not, and that were never seen; see the module.
    reference
        Folder or hub id of another adapter with the same configuration.
    options
        See `Options`.

    Returns
    -------
    dict
        Ready for JSON: `adapter`, `reference`, `base`, `settings`, `sets` (aggregates of each set), `kl`, `membership`,
        `forget_quality`, `generalized_exposure`, `relative_exposure`, `utility`, `probes`, `notes`, and `rows`, one per row.
        `table` shows it.

    Raises
    ------
    InputError
        Where two sets share a row, or a row does not fit the model; `AdapterError` for a reference of another configuration.
    """
    options = options or Options()
    given = {"forget": forget, "retain": retain, "holdout": holdout}
    named = {
        name: one if isinstance(one, Rows) else without_answers(one)
        for name, one in given.items()
        if one is not None
    }
    budget = options.token_budget or (1024 if model.device.type == "cpu" else 4096)
    places = {"adapter": model.snapshot(), "base": scaled(model, 0.0)}
    if reference is not None:
        places["reference"] = _reference(model, reference)
    named, notes = parted(named)
    sets = {name: _prepared(model, name, one, options, notes) for name, one in named.items()}
    return _Evaluation(model, options, budget, places, sets, notes).record(reference)


def _reference(model: AdaptedModel, folder: str | Path) -> Tensor:
    try:
        return read_parameters(model, adapter_folder(folder))
    except AdapterError as error:
        raise AdapterError(
            f"the reference must be an adapter of the same rank and layers, on the same base: {error}"
        ) from error


def parted(sets: Mapping[str, Rows]) -> tuple[dict[str, Rows], dict[str, str]]:
    """The sets, no row's content in two of them, and notes: rows to forget are left out of the retained ones.

    Raises `InputError` where a row that was never seen is one of the others, or no retained row is left.
    """
    found, notes = dict(sets), {}
    contents = {
        name: {example.content_hash for example in one.examples} for name, one in sets.items()
    }
    if shared := contents.get("retain", set()) & contents["forget"]:
        kept = [
            i for i, row in enumerate(sets["retain"].examples) if row.content_hash not in shared
        ]
        if not kept:
            raise InputError("every retained row is a row to forget: give rows that should stay")
        found["retain"] = sets["retain"].select(kept)
        notes["remark.retain"] = (
            f"{len(sets['retain'].examples) - len(kept)} of the given rows are rows to forget and were left out"
        )
    for name in ("forget", "retain"):
        if shared := contents.get("holdout", set()) & contents.get(name, set()):
            first = next(row.id for row in sets["holdout"].examples if row.content_hash in shared)
            raise InputError(
                f"{len(shared)} rows of the holdout set have the content of rows of the {name} set (the first is {first!r}): give rows "
                "that the adapter never saw"
            )
    return found, notes


def _prepared(
    model: AdaptedModel, name: str, one: Rows, options: Options, notes: dict[str, str]
) -> _Set:
    """Tokenise a set and choose the rows to continue."""
    tokens = tokenize(one.examples, model.tokenizer, max_length=options.max_length)
    check_rows(model, tokens)
    able = (
        np.flatnonzero(continuable(model, one.examples))
        if options.generate
        else np.zeros(0, dtype=int)
    )
    if options.generate == 0:
        notes[f"sets.{name}.rougeL"] = "nothing was generated (generate is 0)"
    elif not len(able):
        notes[f"sets.{name}.rougeL"] = "the rows have no prompt that the model could continue"
    continued = able[spaced(len(able), options.generate)] if len(able) else able
    if not any(one.perturbed):
        notes[f"sets.{name}.truth_ratio"] = f"the rows carry no {PARAPHRASED[0]} and {PERTURBED[0]}"
    return _Set(name, one, tokens, continued)


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One evaluation under way: what is measured, where the adapter can be put, and what could not be measured."""

    model: AdaptedModel
    options: Options
    budget: int
    places: dict[str, Tensor]
    sets: dict[str, _Set]
    notes: dict[str, str]

    @property
    def who(self) -> list[str]:
        """`adapter`, and `reference` where there is one."""
        return [name for name in ("adapter", "reference") if name in self.places]

    def record(self, reference: str | Path | None) -> dict[str, Any]:
        """Measure everything and write it down."""
        jobs = [(where, name) for where in self.places for name in self.sets]
        found: dict[str, dict[str, _Under]] = {where: {} for where in self.who}
        base: dict[str, np.ndarray] = {}
        for where, name in track(jobs, "evaluating, sets"):
            with self.model.at(self.places[where]):
                if where == "base":
                    base[name] = mean_losses(
                        self.model, self.sets[name].tokens, token_budget=self.budget
                    )
                else:
                    found[where][name] = self.measured(self.sets[name])
        if "reference" in found:
            known, under = (
                float(found["reference"]["forget"].out.loss.mean()),
                float(base["forget"].mean()),
            )
            if known < KNOWS * under:
                self.notes["remark.reference"] = (
                    f"the reference's loss on the forget rows is {known:.2f} and the base's {under:.2f}: it seems to have seen them, so "
                    "it does not say what never seen looks like"
                )
        scores = (
            {where: self.scores(found[where], base) for where in self.who}
            if "holdout" in self.sets
            else {}
        )
        generalized, relative = self.exposures(found)
        adapters = {where: self.identity(where, reference) for where in ("adapter", "reference")}
        return {
            "format": 1,
            "versions": versions(),
            **adapters,
            "base": {"path": self.model.base or None, "digest": self.model.base_digest},
            "settings": {
                "max_length": self.options.max_length,
                "token_budget": self.budget,
                "generate": self.options.generate,
                "max_new_tokens": self.options.max_new_tokens,
                "seed": self.options.seed,
            },
            "sets": {name: self.aggregates(name, found, base) for name in SETS},
            "kl": self.divergences(),
            "membership": self.membership(scores),
            "forget_quality": self.forget_quality(found),
            "generalized_exposure": None if generalized is None else generalized.value,
            "relative_exposure": {where: one.value for where, one in relative.items()} or None,
            "utility": self.utility(found),
            "probes": self.probes(found),
            "notes": self.notes,
            "rows": [
                row
                for name in self.sets
                for row in self.rows(name, found, base, scores, generalized, relative)
            ],
        }

    def identity(self, where: str, reference: str | Path | None) -> dict[str, Any] | None:
        """Path and digest of an adapter."""
        if where not in self.places:
            return None
        path = self.model.adapter or None
        if where == "reference":
            path = (
                str(Path(str(reference)).resolve())
                if Path(str(reference)).exists()
                else str(reference)
            )
        with self.model.at(self.places[where]):
            return {"path": path, "digest": self.model.adapter_digest}

    # ---- one set under one adapter ----

    def measured(self, one: _Set) -> _Under:
        """Run a set where the model is now."""
        out = outputs(self.model, one.tokens, token_budget=self.budget)
        attacked = "holdout" in self.sets and one.name != "retain"
        norms = (
            gradient_norms(self.model, one.tokens, token_budget=self.budget) if attacked else None
        )
        rouge1, rougeL = np.full((2, len(one.tokens)), np.nan)
        generated: dict[int, str] = {}
        if len(one.continued):
            chosen = one.rows.examples.select(one.continued)
            texts = generate(
                self.model,
                chosen,
                max_new_tokens=self.options.max_new_tokens,
                token_budget=self.budget,
            )
            generated = dict(zip(one.continued.tolist(), texts, strict=True))
            recall = tofu.rouge([completion(example) for example in chosen], texts)
            rouge1[one.continued], rougeL[one.continued] = (
                recall.rouge1_recall,
                recall.rougeL_recall,
            )
        accuracy = exact_memorization(out.right)
        strength = extraction_strength(out.right)
        return _Under(out, norms, generated, rouge1, rougeL, self.ratios(one), accuracy, strength)

    def ratios(self, one: _Set) -> np.ndarray:
        """Truth ratios `[n]` of a set's rows where the model is now; NaN for rows without other answers."""
        ratios = np.full(len(one.tokens), np.nan)
        able = [place for place, wrong in enumerate(one.rows.perturbed) if wrong]
        if not able:
            return ratios
        answers = [
            answering(one.rows.examples[place], text)
            for place in able
            for text in (str(one.rows.paraphrased[place]), *one.rows.perturbed[place])
        ]
        tokens = tokenize(
            Examples(answers), self.model.tokenizer, max_length=self.options.max_length
        )
        check_rows(self.model, tokens)
        losses = iter(mean_losses(self.model, tokens, token_budget=self.budget).tolist())
        for place in able:
            paraphrased = next(losses)
            wrong = [next(losses) for _ in one.rows.perturbed[place]]
            ratios[place] = tofu.truth_ratio([paraphrased], [wrong])[0]
        return ratios

    def aggregates(
        self, name: str, found: dict[str, dict[str, _Under]], base: dict[str, np.ndarray]
    ) -> dict[str, Any] | None:
        """The numbers of one set."""
        if name not in self.sets:
            self.notes[f"sets.{name}"] = f"no {name} rows were given"
            return None
        one = self.sets[name]
        return {
            "source": one.rows.examples.source,
            "digest": one.rows.examples.digest,
            "rows": len(one.tokens),
            "tokens": int(one.tokens.counts.sum()),
            "generated": len(one.continued),
            "base": {"loss": float(base[name].mean())},
            **{
                where: _aggregate(found[where][name]) if where in found else None
                for where in ("adapter", "reference")
            },
        }

    def rows(
        self,
        name: str,
        found: dict[str, dict[str, _Under]],
        base: dict[str, np.ndarray],
        scores: dict[str, dict[str, dict[str, np.ndarray]]],
        generalized: likelihood.PerRow | None,
        relative: dict[str, likelihood.PerRow],
    ) -> Iterable[dict[str, Any]]:
        """One record per row of a set."""
        one = self.sets[name]
        for i, example in enumerate(one.rows.examples):
            row: dict[str, Any] = {
                "id": example.id,
                "set": name,
                "tokens": int(one.tokens.counts[i]),
            }
            row["base"] = {"loss": float(base[name][i])}
            for where in ("adapter", "reference"):
                row[where] = None
                if where in found:
                    row[where] = _of_row(found[where][name], i)
                    own = scores.get(where, {}).get(name)
                    row[where]["membership"] = (
                        None if own is None else {key: float(own[key][i]) for key in own}
                    )
                    if name == "forget":
                        row[where]["relative_exposure"] = (
                            float(relative[where].values[i]) if where in relative else None
                        )
            if name == "forget":
                row["generalized_exposure"] = (
                    None if generalized is None else float(generalized.values[i])
                )
            if self.options.texts:
                row["prompt"], row["completion"] = example.prompt, completion(example)
                row["generated"] = {where: found[where][name].generated.get(i) for where in found}
            yield row

    # ---- sets against one another ----

    def divergences(self) -> dict[str, float | None] | None:
        """`KL(reference || adapter)` of every set."""
        if "reference" not in self.places:
            self.notes["kl"] = self.notes["reference"] = "no reference adapter was given"
            return None
        theta = self.places["adapter"], self.places["reference"]
        return {
            name: divergence(
                self.model, self.sets[name].tokens, theta[1], theta[0], token_budget=self.budget
            )
            if name in self.sets
            else None
            for name in SETS
        }

    def scores(
        self, found: dict[str, _Under], base: dict[str, np.ndarray]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Every attack's score of the forget and held-out rows under one adapter, higher = more like a member."""
        made: dict[str, dict[str, np.ndarray]] = {}
        for name in ("forget", "holdout"):
            under = found[name]
            assert under.norms is not None
            out, rows = under.out, self.sets[name].tokens
            supervised = [
                item.input_ids[-int(count) :] for item, count in zip(rows, rows.counts, strict=True)
            ]
            texts = [
                self.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in supervised
            ]
            made[name] = {
                "loss": mia.loss_score(out.loss),
                "zlib": mia.zlib_score(out.sums, texts),
                "min_k": mia.min_k(out.log_probs),
                "min_40": mia.min_k(out.log_probs, 0.4),
                "min_k_plus_plus": mia.min_k_plus_plus(out.log_probs, out.mean, out.std),
                "base": mia.reference_score(out.loss, base[name]),
                "gradient_norm": mia.gradient_norm_score(under.norms),
            }
        return made

    def membership(
        self, scores: dict[str, dict[str, dict[str, np.ndarray]]]
    ) -> dict[str, Any] | None:
        """Forget rows as members against held-out rows, attack by attack; PrivLeak where there is a reference."""
        if not scores:
            self.notes["membership"] = (
                "the attacks compare forget with holdout rows, and no holdout rows were given"
            )
            return None
        made = {
            where: {
                key: mia.attack(own["forget"][key], own["holdout"][key], seed=self.options.seed)
                for key in own["forget"]
            }
            for where, own in scores.items()
        }
        first = made["adapter"]["loss"]
        if min(first.n, first.m) < FEW:
            self.notes["remark.membership"] = (
                f"{first.n} forget and {first.m} held-out rows are too few for the attacks: their intervals are too short, and one row "
                "moves PrivLeak by much"
            )
        return {
            "members": first.n,
            "non_members": first.m,
            "level": first.interval.level,
            "resamples": first.interval.resamples,
            "attacks": {
                key: {
                    "adapter": _attack(one),
                    "reference": _attack(made["reference"][key]) if "reference" in made else None,
                    "privleak": self.privleak(key, one, made["reference"][key])
                    if "reference" in made
                    else None,
                }
                for key, one in made["adapter"].items()
            },
        }

    def privleak(self, key: str, own: mia.Attack, reference: mia.Attack) -> float | None:
        """PrivLeak of one attack, percent."""
        try:
            return mia.privleak(own.auc, reference.auc)
        except InputError as error:
            self.notes[f"membership.attacks.{key}.privleak"] = str(error)
            return None

    def forget_quality(self, found: dict[str, dict[str, _Under]]) -> dict[str, Any] | None:
        """TOFU's test of the forget rows' truth ratios against the reference's."""
        ratios = {where: own["forget"].ratios for where, own in found.items()}
        if "reference" not in ratios or np.isnan(ratios["adapter"]).all():
            missing = (
                "a reference adapter"
                if "reference" not in ratios
                else "forget rows with other answers"
            )
            self.notes["forget_quality"] = f"it needs {missing}"
            return None
        known = {where: values[~np.isnan(values)] for where, values in ratios.items()}
        result = tofu.forget_quality(known["adapter"], known["reference"])
        return {
            "value": result.value,
            "statistic": result.statistic,
            "rows": result.n,
            "floor": result.floor,
        }

    def exposures(
        self, found: dict[str, dict[str, _Under]]
    ) -> tuple[likelihood.PerRow | None, dict[str, likelihood.PerRow]]:
        """Exposure of the forget rows: against the reference, and, under each adapter, against the held-out rows."""
        generalized, relative = None, {}
        losses = {where: own["forget"].out.loss for where, own in found.items()}
        if "reference" in losses:
            generalized = generalized_exposure(losses["adapter"], [losses["reference"]])
        else:
            self.notes["generalized_exposure"] = "no reference adapter was given"
        if "holdout" in self.sets:
            relative = {
                where: relative_exposure(losses[where], own["holdout"].out.loss)
                for where, own in found.items()
            }
        else:
            self.notes["relative_exposure"] = "no holdout rows were given"
        return generalized, relative

    def utility(self, found: dict[str, dict[str, _Under]]) -> dict[str, Any] | None:
        """Model utility by what the retained rows alone tell of it."""
        if "retain" not in self.sets:
            self.notes["utility"] = "no retain rows were given"
            return None
        made: dict[str, Any] = {"adapter": None, "reference": None}
        for where, own in found.items():
            under = own["retain"]
            part = tofu.UtilitySet(
                probability=tofu.answer_probability(under.out.loss),
                rouge=_known(under.rougeL),
                truth_ratio=_known(under.ratios),
            )
            result = tofu.model_utility({"retain": part})
            made[where] = {
                "value": result.value,
                "parts": dict(result.parts),
                "missing": list(result.missing),
            }
        return made

    # ---- probes ----

    def probes(self, found: dict[str, dict[str, _Under]]) -> dict[str, Any]:
        """What the probes bring back, as far as they were asked for."""
        made: dict[str, Any] = {"relearn": None, "quantise": None}
        for name, probe in (
            ("relearn", lambda: self.relearned(found)),
            ("quantise", self.quantised),
        ):
            if name in self.options.probes:
                made[name] = self.tried(f"probes.{name}", probe)
            else:
                self.notes[f"probes.{name}"] = f"{UNASKED} (--probe {name})"
        return made

    def tried(self, name: str, probe: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A probe's result, or null and its reason where it cannot be made of these rows or this base."""
        try:
            return probe()
        except (InputError, NumericalError) as error:
            self.notes[name] = str(error)
            return None

    def relearned(self, found: dict[str, dict[str, _Under]]) -> dict[str, Any]:
        """Relearning curves of every adapter, on the same rows, and when the others are back."""
        curves: dict[str, Relearned] = {}
        for where in self.who:
            with self.model.at(self.places[where]):
                tokens = self.sets["forget"].tokens
                curves[where] = relearn(
                    self.model, tokens, seed=self.options.seed, token_budget=self.budget
                )
        level, source = self.level(
            found, {where: float(curve.held_back[0]) for where, curve in curves.items()}
        )
        first = curves["adapter"]
        return {
            "steps": first.steps.tolist(),
            "trained_ids": first.trained_ids,
            "level": level,
            "level_source": source,
            **{
                where: _curve(curves[where], level) if where in curves else None
                for where in ("adapter", "reference")
            },
        }

    def level(
        self, found: dict[str, dict[str, _Under]], start: dict[str, float]
    ) -> tuple[float | None, str | None]:
        """The loss at which forgotten rows count as back: a reference's that knows them better, else the retained rows'."""
        if "reference" in start and start["reference"] < start["adapter"]:
            return start["reference"], "the reference's loss on them"
        if "retain" in self.sets:
            return float(
                found["adapter"]["retain"].out.loss.mean()
            ), "the adapter's loss on the retained rows"
        self.notes["probes.relearn.level"] = (
            "it needs retain rows, or a reference that knows the forget rows better"
        )
        return None, None

    def quantised(self) -> dict[str, Any]:
        """Losses of every set under every adapter with its layers rounded."""
        made: dict[str, Any] = {}
        for bits in track(_BITS, "rounding"):
            made[str(bits)] = {name: {} for name in self.sets}
            for where in self.who:
                with self.model.at(self.places[where]), quantise(self.model, bits=bits):
                    for name, one in self.sets.items():
                        losses = mean_losses(self.model, one.tokens, token_budget=self.budget)
                        made[str(bits)][name][where] = float(losses.mean())
        return made


def _known(values: np.ndarray) -> np.ndarray | None:
    known = values[~np.isnan(values)]
    return known if len(known) else None


def _mean(values: np.ndarray) -> float | None:
    known = _known(values)
    return None if known is None else float(known.mean())


def _aggregate(under: _Under) -> dict[str, Any]:
    out, ratios = under.out, _known(under.ratios)
    return {
        "loss": float(out.loss.mean()),
        "probability": float(tofu.answer_probability(out.loss).mean()),
        "perplexity": likelihood.perplexity(out.loss, out.counts).value,
        "accuracy": likelihood.accuracy(out.right).value,
        "exact_memorization": float(under.accuracy.mean()),
        "extraction_strength": float(under.extraction.mean()),
        "extracted": int((under.extraction == 1).sum()),
        "rouge1": _mean(under.rouge1),
        "rougeL": _mean(under.rougeL),
        "truth_ratio": None
        if ratios is None
        else {
            "rows": len(ratios),
            "median": float(np.median(ratios)),
            "truthful": float(np.maximum(0, 1 - ratios).mean()),
        },
    }


def _of_row(under: _Under, i: int) -> dict[str, Any]:
    maybe = {"rouge1": under.rouge1[i], "rougeL": under.rougeL[i], "truth_ratio": under.ratios[i]}
    return {
        "loss": float(under.out.loss[i]),
        "exact_memorization": float(under.accuracy[i]),
        "extraction_strength": float(under.extraction[i]),
        **{key: None if np.isnan(value) else float(value) for key, value in maybe.items()},
    }


def _attack(result: mia.Attack) -> dict[str, Any]:
    interval = result.interval
    tpr = {f"{fpr:g}": share for fpr, share in result.tpr.items()}
    return {"auc": result.auc, "low": interval.low, "high": interval.high, "tpr": tpr}


def _curve(curve: Relearned, level: float | None) -> dict[str, Any]:
    back = None if level is None else crossing(curve.steps, curve.held_back, level)
    return {
        "trained": curve.trained.tolist(),
        "held_back": curve.held_back.tolist(),
        "back_after": back,
    }
