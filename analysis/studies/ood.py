"""Are rows from outside the training distribution harder to unlearn, and is their trade-off better? Planted, unlearned, measured.

Baluta et al. 2024, arXiv 2411.04388, report (abstract) that out-of-distribution examples need more ascent steps but have a better
trade-off, and that in-distribution ones wreck the model quickly. Here both are tested, on an adapter of one's own. Rows that
neither base nor adapter saw are planted among its training rows: rows of the same domain (`in`) and, of the same lengths, rows of
another one, shuffled rows and random tokens (`analysis.studies.planting`). The adapter is trained again with the planted rows, each once or
`repeats` times, and again without them: reference adapters, which never saw one. Every planted row is then unlearned alone by
gradient ascent (`unlearn.difficulty.measured`) until it has the base model's loss. What is compared with the partners, by bootstrap over
them:

    steps       ratio of the mean steps to the target; a row that did not reach it counts with the most steps allowed
    damage      difference of the rise of the loss of original training rows at the target, nats per token
    area        difference of the area under that rise against the share of the gap
    per_nat     difference of damage per nat forgotten, both summed over the rows
    matched     difference of damage where both have forgotten as many nats as the one with the smaller gap; the rise is taken as
                straight between levels, which, as it bends upwards, overstates the damage of the one with the larger gap

A claim is answered `yes` or `no` where the interval over all kinds excludes equality and no single kind's interval says the contrary,
else `undecided`. **Steps**: more are needed. **Trade-off**: the damage at the target is smaller. `per_nat` and `matched` are told
beside it: the base gives an unlikely row a high loss, so its target is far away, and who goes further pays more. Single rows say
little of what a set costs, so whole kinds are unlearned at once too (`whole_sets`). Planted rows never count as damage.

Exposure (`analysis.metrics.exposure`) is told along the way: generalized, against the reference adapters; relative, against other
held-out rows. At the target a row has the base's loss, not the references', so its generalized exposure need not be 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis.metrics.exposure import generalized_exposure, relative_exposure
from analysis.metrics.likelihood import checked
from analysis.stats import bootstrap_interval, spearman
from analysis.studies.planting import KINDS, OUTSIDE, Planted, plant, write_rows
from influence.console import _finite
from influence.curvature.identity import Identity
from influence.errors import InputError, MismatchError, StoreError
from influence.fitting import fit
from influence.loss import mean_losses
from influence.measurements import MeanLoss
from influence.path import END, read_parameters, scaled
from influence.progress import say
from influence.rows import Examples, read_examples
from influence.run import Run
from influence.solvers.direct import Direct
from influence.store import only_writer, read_json, write_json
from unlearn.difficulty.measured import Measured, Protocol, measure
from unlearn.difficulty.units import SAMPLE_ROWS
from unlearn.retraining.recipe import Recipe, recipe_of, recorded_recipe
from unlearn.retraining.retrain import fresh_adapter, retrain, train

#: What equality is, for each comparison with the partners.
EQUAL = {"steps": 1.0, "damage": 0.0, "area": 0.0, "per_nat": 0.0, "matched": 0.0}
#: Random partitions that groups of one difficulty are compared with.
MIXTURES = 3
_PARTS = (
    "train.jsonl",
    "adapter",
    "run",
    "difficulty.h5",
    "groups.h5",
    "ood.csv",
    "ood.json",
    "ood.png",
)


# ---- what is measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Exposures:
    """Exposure of n rows on their way, bits per token.

    Attributes
    ----------
    levels : array [c + 1]
        Shares of the way, 0 (the adapter) first.
    losses, generalized, relative : arrays [n, c + 1]
        Mean loss (nats per token), GenEx and RelEx; NaN where a level was not reached, and RelEx without held-out rows.
    """

    levels: NDArray[np.float64]
    losses: NDArray[np.float64] = field(repr=False)
    generalized: NDArray[np.float64] = field(repr=False)
    relative: NDArray[np.float64] = field(repr=False)


def exposures(measured: Measured, reference: ArrayLike) -> Exposures:
    """GenEx and RelEx of every row at every level of its way to the target.

    A row's own loss at a level is `start + level (target - start)`, or `start` where it began beyond that. `reference` [K, n] are the
    rows' mean losses under models that saw none of them; RelEx compares with `measured.heldout`.
    """
    levels = np.concatenate([[0.0], measured.levels])
    start, gap = measured.start[:, None], (measured.target - measured.start)[:, None]
    wanted = start + np.maximum(levels * gap, 0)
    highest = np.fmax.reduce(measured.losses, axis=1)[:, None]
    losses = np.where((highest >= wanted) | (levels == 0), wanted, np.nan)
    reference = checked(reference, "reference", ndim=2)
    if reference.shape[1] != len(losses):
        raise InputError(
            f"reference has losses of {reference.shape[1]} rows; expected {len(losses)}, as were measured"
        )
    reached = np.isfinite(losses)
    generalized, relative = np.full(losses.shape, np.nan), np.full(losses.shape, np.nan)
    held = np.concatenate(
        [
            np.broadcast_to(measured.heldout_before, (len(losses), 1, measured.heldout.shape[2])),
            measured.heldout,
        ],
        axis=1,
    )
    for level in range(len(levels)):
        rows = np.flatnonzero(reached[:, level])
        if len(rows):
            generalized[rows, level] = generalized_exposure(
                losses[rows, level], reference[:, rows]
            ).values
        for row in rows if held.shape[2] else ():
            if np.isfinite(held[row, level]).all():
                relative[row, level] = relative_exposure(
                    losses[row : row + 1, level], held[row, level]
                ).value
    return Exposures(levels, losses, generalized, relative)


def steps_to_levels(measured: Measured) -> NDArray[np.float64]:
    """Fractional steps to every level, 0 first, [n, c + 1]; NaN where it was not reached. Crossings as `difficulty` finds them."""
    levels = np.concatenate([[0.0], measured.levels])
    wanted = measured.start[:, None] + levels * (measured.target - measured.start)[:, None]
    found = np.full(wanted.shape, np.nan)
    for (row, level), goal in np.ndenumerate(wanted):
        losses = measured.losses[row]
        above = np.flatnonzero(losses >= goal)
        if level == 0 or (len(above) and above[0] == 0):
            found[row, level] = 0.0
        elif len(above):
            k = above[0]
            found[row, level] = k - 1 + (goal - losses[k - 1]) / (losses[k] - losses[k - 1])
    return found


def original_alone(measured: Measured, original: Sequence[str]) -> Measured:
    """The measurements with damage told by rows that were not planted."""
    known = set(original)
    kept = np.array([id in known for id in measured.sample])
    if not kept.any():
        raise InputError(
            f"none of the {len(kept)} training rows that tell the damage is an original one: sample more, or plant fewer"
        )
    return replace(
        measured,
        retained=measured.retained[:, :, kept],
        retained_before=measured.retained_before[kept],
        sample=tuple(id for id in measured.sample if id in known),
    )


def leverage(run: Run, rows: Examples) -> NDArray[np.float64]:
    """`g^T (C + lambda I)^-1 g` of every row's mean loss under the run's curvature, [n]: how far it lies from what was trained on.

    At the run's last point, with its own damping. Large for a row whose gradient points where the training rows' do not.
    """
    point = run.points[-1]
    gradients = point.query_gradients(run.tokenized(rows), MeanLoss())
    solved = Direct().solve(point.operator(), gradients).values
    return (gradients.double() * solved.double()).sum(1).cpu().numpy()


def compare(
    table: pd.DataFrame, most: int, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Every kind, and all of them together, against their partners; see the module for the measures.

    `table` has a line per planted row: `id`, `kind`, `partner`, `steps` (infinite: not reached within `most`), `damage`, `area`,
    `gap` (nats from the adapter to the target), `matched` and `matched_partner` (as `matched_damage` gives them). Each result has
    `kind` (one of them, or `all`), `measure`, `value`, `low`, `high`, `pairs` and `equal`. Partners are resampled; a pair of which
    one side's damage is unknown is left out of it.
    """
    by = {id: row for id, row in zip(table["id"], table.to_dict("records"), strict=True)}
    found = []
    kinds = [kind for kind in OUTSIDE if kind in set(table["kind"])]
    for kind in [*kinds, "all"]:
        pairs: dict[str, list[dict[str, Any]]] = {}
        for row in by.values():
            if row["kind"] == kind or (kind == "all" and row["kind"] in kinds):
                pairs.setdefault(row["partner"], []).append(row)
        for quantity in EQUAL:
            own = np.array(
                [[_part(row, quantity, most) for row in rows] for rows in pairs.values()]
            ).mean(1)
            if quantity == "matched":
                theirs = np.array(
                    [[(row["matched_partner"], 1.0) for row in rows] for rows in pairs.values()]
                ).mean(1)
            else:
                theirs = np.array([_part(by[partner], quantity, most) for partner in pairs])
            known = np.isfinite(own).all(1) & np.isfinite(theirs).all(1)
            own, theirs = own[known], theirs[known]
            value = low = high = float("nan")
            if len(own):
                statistic = lambda some, own=own, theirs=theirs, name=quantity: _versus(
                    own[some], theirs[some], name
                )
                value = statistic(np.arange(len(own)))
                interval = bootstrap_interval(
                    statistic, len(own), level=level, resamples=resamples, seed=seed
                )
                low, high = interval.low, interval.high
            found.append(
                {
                    "kind": kind,
                    "measure": quantity,
                    "value": value,
                    "low": low,
                    "high": high,
                    "pairs": len(own),
                }
                | {"equal": EQUAL[quantity]}
            )
    return found


def matched_damage(
    levels: NDArray[np.float64],
    gap: NDArray[np.float64],
    curve: NDArray[np.float64],
    partner: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Damage of every row, and of its partner, where each has forgotten as many nats as the one with the smaller gap, [n] each.

    `curve` [n, c] at `levels` [c] of the way, between which it is straight; `gap` [n] nats; `partner` [n] positions.
    """
    nats = np.minimum(gap, gap[partner]).clip(0)
    own, theirs = (
        np.array(
            [
                np.interp(far, levels * max(gap[i], 0), curve[i])
                for i, far in zip(rows, nats, strict=True)
            ]
        )
        for rows in (np.arange(len(gap)), partner)
    )
    return own, theirs


def _part(row: Mapping[str, Any], quantity: str, most: int) -> tuple[float, float]:
    """Numerator and denominator of one row, for `_versus`."""
    if quantity == "steps":
        return min(row["steps"], most), 1.0
    return row["damage" if quantity == "per_nat" else quantity], max(
        row["gap"], 0
    ) if quantity == "per_nat" else 1.0


def _versus(own: NDArray[np.float64], theirs: NDArray[np.float64], quantity: str) -> float:
    """Ratio of mean steps, or difference of the other measures, of pairs [m, 2] (numerator, denominator)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (values[:, 0].sum() / values[:, 1].sum() for values in (own, theirs))
        found = one / two if quantity == "steps" else one - two
    return float(found) if np.isfinite(found) else float("nan")


def verdict(comparisons: Sequence[Mapping[str, Any]], quantity: str) -> str:
    """`yes`, `no` or `undecided`: do rows from outside need more steps (`steps`), or cost less (any other measure)?

    By the interval of all kinds; where that of a single kind says the contrary, `undecided`.
    """
    answers = {one["kind"]: _answer(one) for one in comparisons if one["measure"] == quantity}
    contrary = {"yes": "no", "no": "yes"}.get(answers["all"])
    return "undecided" if contrary in answers.values() else answers["all"]


def _answer(one: Mapping[str, Any]) -> str:
    above, below = one["low"] > one["equal"], one["high"] < one["equal"]  # NaN is neither
    if one["measure"] != "steps":
        above, below = below, above
    return "yes" if above else "no" if below else "undecided"


def correlations(
    table: pd.DataFrame, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Spearman's rho of a row's distance from the training rows with its steps, damage and area, with intervals over rows.

    Each result has `forecast` (`base_loss`, `leverage`), `measure`, `spearman`, `low`, `high`, `rows`, and `within`: the mean rho
    over the kinds taken one by one, where the kinds' own differences play no part.
    """
    found = []
    for forecast in ("base_loss", "leverage"):
        for name in ("steps", "damage", "area"):
            x, y = table[forecast].to_numpy(float), table[name].to_numpy(float)
            known = np.isfinite(x) & ~np.isnan(y)  # infinite steps are the last rank
            x, y, kinds = x[known], y[known], table["kind"].to_numpy()[known]
            rho = float(spearman(x, y)) if len(x) > 2 else float("nan")
            low = high = float("nan")
            if not np.isnan(rho):
                statistic = lambda some, x=x, y=y: float(spearman(x[some], y[some]))  # noqa: E731
                interval = bootstrap_interval(
                    statistic, len(x), level=level, resamples=resamples, seed=seed
                )
                low, high = interval.low, interval.high
            each = [
                float(spearman(x[kinds == k], y[kinds == k]))
                for k in KINDS
                if (kinds == k).sum() > 2
            ]
            within = float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
            found.append(
                {"forecast": forecast, "measure": name, "spearman": rho, "low": low, "high": high}
                | {"within": within, "rows": len(x)}
            )
    return found


# ---- groups of one difficulty --------------------------------------------------------------------------------


def by_difficulty(names: Sequence[str], steps: ArrayLike, parts: int = 3) -> dict[str, list[str]]:
    """Groups `part 1` (fewest steps) to `part K` of nearly equal size, by measured or forecast steps [n]; infinite ones are last."""
    steps = np.asarray(steps, dtype=np.float64)
    if steps.shape != (len(names),) or np.isnan(steps).any():
        raise InputError(
            f"steps of shape {steps.shape} were given for {len(names)} rows; expected one number each"
        )
    if not 2 <= parts <= len(names):
        raise InputError(
            f"{parts} parts of {len(names)} rows were asked for; expected 2 to {len(names)}"
        )
    split = np.array_split(np.argsort(steps, kind="stable"), parts)
    return {f"part {k + 1}": [str(names[i]) for i in rows] for k, rows in enumerate(split)}


def mixtures(
    groups: Mapping[str, Sequence[str]], count: int = MIXTURES, seed: int = 0
) -> dict[str, list[str]]:
    """The same rows in random groups of the same sizes, `count` times: `mixture M, part K`."""
    names: list[str] = [name for group in groups.values() for name in group]
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    found: dict[str, list[str]] = {}
    for m in range(count):
        order = np.random.default_rng([seed, m]).permutation(len(names))
        for k, rows in enumerate(np.split(order, ends)):
            found[f"mixture {m + 1}, part {k + 1}"] = [names[i] for i in rows.tolist()]
    return found


def apart(
    measured: Measured, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Do groups of one difficulty cost less than mixed ones? From measured groups named as `by_difficulty` and `mixtures` name them.

    RUM (Zhao et al. 2024, arXiv 2406.01257) unlearns homogeneous groups one after the other; what is compared here is the sum of the
    damages of groups that are each unlearned from the same adapter, of one difficulty against mixed ones of the same sizes. The
    interval is over the training rows that tell the damage. `together`: all rows as one group, once.
    """
    last = dict(zip(measured.names, measured.retained[:, -1], strict=True))
    homogeneous = np.sum([rise for name, rise in last.items() if name.startswith("part ")], axis=0)
    mixed = [rise for name, rise in last.items() if name.startswith("mixture ")]
    draws = len({name.partition(",")[0] for name in last if name.startswith("mixture ")})
    average = np.sum(mixed, axis=0) / draws
    difference = homogeneous - average
    low = high = float("nan")
    if np.isfinite(difference).all():
        statistic = lambda some: float(difference[some].mean())  # noqa: E731
        interval = bootstrap_interval(
            statistic, len(difference), level=level, resamples=resamples, seed=seed
        )
        low, high = interval.low, interval.high
    return {
        "homogeneous": float(homogeneous.mean()),
        "mixed": float(average.mean()),
        "together": float(last["together"].mean()) if "together" in last else float("nan"),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "helps": "yes" if high < 0 else "no" if low > 0 else "undecided",
        "parts": sum(name.startswith("part ") for name in last),
        "mixtures": draws,
    }


# ---- the study -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Study:
    """What became of the planted rows.

    Attributes
    ----------
    table : DataFrame
        One line per planted row: `id`, `kind`, `partner`, `tokens` (of the completion), `start`, `target`, `gap` (nats per token),
        `steps`, `damage`, `area`, `matched`, `matched_partner`, `base_loss`, `leverage`, `genex_start`, `genex_end`, `relex_start`, `relex_end` (bits per token).
    steps, exposure, damage : arrays [n, c + 1]
        Of every row at every level of its way, 0 first: fractional steps, GenEx, rise of the original training rows' loss.
    comparisons, correlations : list of dict
        As of `compare` and `correlations`.
    sets : DataFrame
        As of `whole_sets`.
    apart : dict
        As of `apart`.
    verdicts : dict of str to str
        `steps`, `damage` (the two claims), `area`, `per_nat` and `matched`: yes, no or undecided.
    protocol, recipe : dict
    notes : list of str
    """

    table: pd.DataFrame = field(repr=False)
    steps: NDArray[np.float64] = field(repr=False)
    exposure: NDArray[np.float64] = field(repr=False)
    damage: NDArray[np.float64] = field(repr=False)
    comparisons: list[dict[str, Any]]
    correlations: list[dict[str, Any]]
    sets: pd.DataFrame = field(repr=False)
    apart: dict[str, Any]
    verdicts: dict[str, str]
    protocol: dict[str, Any]
    recipe: dict[str, Any]
    notes: list[str]
    level: float = 0.95

    def paths(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> dict[str, tuple[NDArray, NDArray]]:
        """Two of the arrays `[n, c + 1]`, kind by kind, as `analysis.studies.pictures.paths_plot` takes them."""
        kinds = self.table["kind"].to_numpy()
        return {kind: (x[kinds == kind], y[kinds == kind]) for kind in KINDS}

    def compared(self, kind: str, quantity: str) -> dict[str, Any]:
        """One of the comparisons."""
        return next(
            one for one in self.comparisons if (one["kind"], one["measure"]) == (kind, quantity)
        )

    def record(self) -> dict[str, Any]:
        """Everything but the rows, ready for `influence.console.emit`."""
        means = _finite_means(self.table)
        return {
            "verdicts": self.verdicts,
            "comparisons": self.comparisons,
            "correlations": self.correlations,
            "kinds": {str(kind): values.to_dict() for kind, values in means.iterrows()},
            "sets": self.sets.to_dict("records"),
            "apart": self.apart,
            "level": self.level,
            "protocol": self.protocol,
            "recipe": self.recipe,
            "notes": self.notes,
        }


def study(
    run: Run,
    heldout: Examples,
    other: Examples,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    per_kind: int = 8,
    repeats: int = 1,
    references: int = 2,
    protocol: Protocol | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
    overwrite: bool = False,
) -> Study:
    """Plant, train, unlearn, compare; see the module.

    Trains `references + 1` adapters, one less where the run's adapter is recorded to be the recipe's result, and measures `4 per_kind`
    rows. What is finished in `out` is used again by the same request; another optimizer needs new measurements, but no new adapters.

    Parameters
    ----------
    run
        A finished run; its curvature tells the leverage.
    heldout, other, per_kind, repeats
        As in `plant`.
    out
        Folder for train.jsonl, kinds.json, adapter, reference-1 ..., run, difficulty.h5, groups.h5, ood.csv, ood.json and ood.png.
    recipe
        How to train; by default as `unlearn.retraining.recipe.recipe_of` finds it recorded.
    references
        Adapters trained without the planted rows, with seeds of their own.
    protocol
        Of the ascent.
    overwrite
        Replace what is in `out`, if it is of another request.
    """
    if references < 1:
        raise InputError(f"references {references} was given; expected at least 1")
    out, protocol = Path(out), protocol or Protocol()
    planted = plant(
        run.train,
        heldout,
        other,
        run.model.tokenizer,
        per_kind=per_kind,
        repeats=repeats,
        max_length=run.manifest["objective"]["max_length"],
        seed=seed,
    )
    recipe = recipe or recipe_of(run)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        _claim(out, run, planted, recipe, overwrite)
        with_planted = _planted_run(out, run, planted, recipe)
        losses = _reference_losses(out, run, planted, recipe, references)
        return _measure(
            out,
            run,
            planted,
            with_planted,
            losses,
            recipe,
            protocol,
            level,
            resamples,
            seed,
            overwrite,
        )


def _claim(out: Path, run: Run, planted: Planted, recipe: Recipe, overwrite: bool) -> None:
    """Write rows and kinds, or accept those of the same request; with `overwrite` clear another one's away."""
    request = {"run": run.digest, "rows": planted.rows.digest, "recipe": asdict(recipe)}
    request = json.loads(json.dumps(request))
    path, known = out / "kinds.json", None
    parts = [
        part
        for part in [*(out / name for name in _PARTS), *out.glob("reference-*")]
        if part.exists()
    ]
    if path.exists():
        known = read_json(path).get("request")
    if not isinstance(known, dict):
        if path.exists() or parts:
            names = ", ".join(part.name for part in ([path] if path.exists() else parts))
            raise InputError(
                f"{out} has {names} of something else, which a study would replace: give another --out"
            )
        if any(out.iterdir()) and not overwrite:
            raise InputError(
                f"{out} is not empty and holds no study: give another --out, or --overwrite"
            )
    differing = [key for key, value in request.items() if (known or {}).get(key) != value]
    if known and differing and not overwrite:
        raise MismatchError(
            f"{out} is of another study: {', '.join(differing)} differ. Ask for the same one to go on, give another --out, or "
            "--overwrite"
        )
    if differing:
        for part in parts:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        write_json(
            path,
            {
                "request": request,
                "kinds": planted.kinds,
                "partners": planted.partners,
                "tokens": planted.tokens,
            },
        )
    if not (out / "train.jsonl").exists():
        write_rows(planted.rows, out / "train.jsonl")


def _planted_run(out: Path, run: Run, planted: Planted, recipe: Recipe) -> Run:
    """A run on the adapter that was trained with the planted rows; trained now, if it is not there."""
    folder, about = out / "adapter", run.manifest
    devices = [run.model.device] if run.model.device.type == "cuda" else []
    rows = read_examples(out / "train.jsonl")
    if rows.digest != planted.rows.digest:
        raise StoreError(
            f"{out / 'train.jsonl'} is not what was written there: give --overwrite after moving {out} away"
        )
    with torch.random.fork_rng(devices=devices):
        model = fresh_adapter(run.model, recipe.seed)
        if not (folder / "retrain.json").exists():
            say(f"training the adapter with {len(planted.kinds)} planted rows")
            loss = train(model, run.tokenized(rows), recipe)
            partial = folder.with_name("adapter.partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.model.save_pretrained(
                str(partial), safe_serialization=True, save_embedding_layers=False
            )
            record = {
                "rows": len(rows),
                "epoch": recipe.epochs,
                "recipe": asdict(recipe),
                "loss": loss,
            }
            write_json(partial / "retrain.json", record)
            partial.rename(folder)
    model.restore(read_parameters(model, folder))
    return fit(
        replace(model, adapter=str(folder.resolve())),
        rows,
        directory=out / "run",
        curvature=Identity(),
        path=END,
        reduction=about["objective"]["reduction"],
        max_length=about["objective"]["max_length"],
        token_budget=about["token_budget"],
        store="never",
    )


def _reference_losses(
    out: Path, run: Run, planted: Planted, recipe: Recipe, references: int
) -> NDArray[np.float64]:
    """Losses [K, n] of the planted rows under adapters that never saw them."""
    rows = Examples(planted.rows[planted.rows.index(id)] for id in planted.ids)
    tokens, budget = run.tokenized(rows), run.manifest["token_budget"]
    found = []
    for k in range(references):
        folder = out / f"reference-{k + 1}"
        if k == 0 and recorded_recipe(run) == recipe:
            theta = run.model.snapshot()
        else:
            if not (folder / "retrain.json").exists():
                say(f"training reference adapter {k + 1} of {references}")
                retrain(run, out=folder, recipe=replace(recipe, seed=recipe.seed + k))
            theta = read_parameters(run.model, folder)
        with run.model.at(theta):
            found.append(mean_losses(run.model, tokens, token_budget=budget))
    return np.array(found)


def _measure(
    out: Path,
    run: Run,
    planted: Planted,
    with_planted: Run,
    reference: NDArray[np.float64],
    recipe: Recipe,
    protocol: Protocol,
    level: float,
    resamples: int,
    seed: int,
    overwrite: bool,
) -> Study:
    """Unlearn every planted row, then whole kinds and groups of one difficulty; and write everything."""
    original = planted.original
    options: dict[str, Any] = {
        "protocol": protocol,
        "heldout": planted.heldout,
        "sample_rows": -(-SAMPLE_ROWS * len(planted.rows) // len(original)),
        "seed": seed,
        "overwrite": overwrite,
    }
    single = original_alone(
        measure(with_planted, planted.ids, out=out / "difficulty.h5", **options), original
    )
    parts = by_difficulty(planted.ids, single.steps)
    groups = (
        {f"kind {kind}": planted.of(kind) for kind in KINDS} | parts | mixtures(parts, seed=seed)
    )
    groups["together"] = planted.ids
    whole = original_alone(
        measure(with_planted, groups=groups, out=out / "groups.h5", **options), original
    )
    rows = Examples(planted.rows[planted.rows.index(id)] for id in planted.ids)
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(
            run.model, run.tokenized(rows), token_budget=run.manifest["token_budget"]
        )
    exposed = exposures(single, reference)
    curve, gap = (
        np.concatenate([np.zeros((len(base), 1)), single.curve], axis=1),
        single.target - single.start,
    )
    at = np.array([planted.ids.index(id) for id in planted.partners.values()])
    matched, matched_partner = matched_damage(exposed.levels, gap, curve, at)
    table = pd.DataFrame(
        {
            "id": planted.ids,
            "kind": list(planted.kinds.values()),
            "partner": list(planted.partners.values()),
            "tokens": list(planted.tokens.values()),
            "start": single.start,
            "target": single.target,
            "gap": gap,
            "steps": single.steps,
            "damage": single.damage,
            "area": single.area,
            "matched": matched,
            "matched_partner": matched_partner,
            "base_loss": base,
            "leverage": leverage(run, rows),
            "genex_start": exposed.generalized[:, 0],
            "genex_end": exposed.generalized[:, -1],
            "relex_start": exposed.relative[:, 0],
            "relex_end": exposed.relative[:, -1],
        }
    )
    intervals = {"level": level, "resamples": resamples, "seed": seed}
    comparisons = compare(table, protocol.steps, **intervals)
    made = Study(
        table,
        steps_to_levels(single),
        exposed.generalized,
        curve,
        comparisons,
        correlations(table, **intervals),
        whole_sets(whole, {kind: len(planted.of(kind)) for kind in KINDS}, **intervals),
        apart(whole, **intervals),
        {name: verdict(comparisons, name) for name in EQUAL},
        protocol.record(),
        asdict(recipe),
        _notes(table, protocol, single, len(reference)),
        level,
    )
    _write(out, made)
    return made


def whole_sets(
    whole: Measured,
    counts: Mapping[str, int],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whole kinds unlearned at once, from measured groups `kind K`: `kind`, `rows` (as in `counts`), `start`, `target`, `steps`,
    `damage`, `area`, and `more`, `low`, `high`: the damage less that of `in`, with an interval over the training rows that tell it.

    There is one set of each kind: what another draw of its rows would cost is not in the interval.
    """
    at = [whole.names.index(f"kind {kind}") for kind in counts]
    columns = {
        name: getattr(whole, name)[at] for name in ("start", "target", "steps", "damage", "area")
    }
    more = whole.retained[at, -1] - whole.retained[whole.names.index("kind in"), -1]
    ends = np.full((len(at), 2), np.nan)
    for place in np.flatnonzero(np.isfinite(more).all(1)):
        statistic = lambda some, place=place: float(more[place, some].mean())  # noqa: E731
        interval = bootstrap_interval(
            statistic, more.shape[1], level=level, resamples=resamples, seed=seed
        )
        ends[place] = interval.low, interval.high
    found = {"kind": list(counts), "rows": list(counts.values()), **columns, "more": more.mean(1)}
    return pd.DataFrame({**found, "low": ends[:, 0], "high": ends[:, 1]})


def _notes(table: pd.DataFrame, protocol: Protocol, single: Measured, references: int) -> list[str]:
    """What else to know of the figures."""
    found = [
        f"damage: of {len(single.sample)} original training rows; relative exposure: against {len(single.heldout_before)} held-out "
        f"rows; generalized exposure: against {references} adapter{'s' * (references > 1)} that never saw the planted rows"
    ]
    late = table[np.isinf(table["steps"])]
    if len(late):
        found.append(
            f"{len(late)} of {len(table)} rows did not reach their target within {protocol.steps} steps "
            f"({', '.join(sorted(set(late['kind'])))}): they count with that many steps, and are left out of the damage"
        )
    done = table[table["gap"] <= 0]
    if len(done):
        found.append(
            f"{len(done)} rows were not learned (their loss is the base's or more) and cost nothing to unlearn"
        )
    return found


def _write(out: Path, made: Study) -> None:
    """Write ood.csv, ood.json and ood.png, each whole."""
    from analysis.studies.pictures import paths_plot

    made.table.to_csv(out / "ood.csv.partial", index=False)
    os.replace(out / "ood.csv.partial", out / "ood.csv")
    write_json(out / "ood.json", _finite(made.record()))
    panels = {
        "Steps": made.paths(made.steps, made.exposure),
        "Trade-off": made.paths(made.exposure, made.damage),
    }
    figure = paths_plot(panels, "Unlearning planted rows", labels=(STEPS_LABELS, TRADE_LABELS))
    figure.savefig(out / "ood.partial.png")
    os.replace(out / "ood.partial.png", out / "ood.png")


STEPS_LABELS = ("ascent steps", "generalized exposure, bits per token")
TRADE_LABELS = ("generalized exposure, bits per token", "rise of other training rows' loss, nats")


def _finite_means(table: pd.DataFrame) -> pd.DataFrame:
    """Means by kind; rows that never reached their target are left out of the steps' and what follows from them."""
    numbers = table.drop(columns=["id", "kind", "partner"]).replace([np.inf], np.nan)
    return pd.DataFrame({kind: numbers[table["kind"] == kind].mean() for kind in KINDS}).T


# ---- for a person --------------------------------------------------------------------------------------------

_HEADS = {
    "tokens": ("tok", ".0f"),
    "start": ("loss", ".2f"),
    "target": ("goal", ".2f"),
    "steps": ("steps", ".1f"),
    "damage": ("damage", ".3f"),
    "area": ("area", ".3f"),
    "leverage": ("lever", ".3g"),
    "genex_start": ("gen", ".1f"),
    "genex_end": ("gen end", ".1f"),
    "relex_start": ("rel", ".1f"),
    "relex_end": ("rel end", ".1f"),
}


def tables(made: Study) -> list[Table]:
    """Means by kind, and the comparisons with the partners; at most 100 columns wide."""
    means = _table("means of the planted rows, each unlearned alone", "kind")
    for short, _ in _HEADS.values():
        means.add_column(short, justify="right", no_wrap=True)
    for kind, found in _finite_means(made.table).iterrows():
        values = [(found[name], form) for name, (_, form) in _HEADS.items()]
        means.add_row(
            Text(str(kind)),
            *("" if np.isnan(value) else f"{value:{form}}" for value, form in values),
        )
    means.caption = Text(
        "nats per token; gen, rel: generalized and relative exposure, bits per token, before and at the goal (base's loss)"
    )
    means.caption_justify = "left"
    against = _table(f"against partners of the same length, {made.level:.0%} intervals", "kind")
    heads = {
        "steps": "steps, ratio",
        "damage": "damage, difference",
        "matched": "at equal nats, difference",
    }
    for head in heads.values():
        against.add_column(head, justify="right", overflow="fold")
    for kind in (*OUTSIDE, "all"):
        found = [made.compared(kind, name) for name in heads]
        digits = (2, 4, 4)
        against.add_row(
            Text(kind),
            *(
                f"{o['value']:.{d}f} [{o['low']:.{d}f}, {o['high']:.{d}f}]"
                for o, d in zip(found, digits, strict=True)
            ),
        )
    return [means, against]


def _table(title: str, first: str) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column(first, no_wrap=True)
    return table


def lines(made: Study) -> list[str]:
    """The two verdicts, what speaks beside them, and notes."""
    said = made.verdicts
    rhos = "; ".join(
        f"{one['forecast']} with {one['measure']} {one['spearman']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
        for one in made.correlations
        if one["measure"] != "damage"
    )
    sets = "; ".join(
        f"{one['kind']} {one['damage']:.3f}"
        + ("" if one["kind"] == "in" else f" [{one['low']:+.3f}, {one['high']:+.3f}]")
        for one in made.sets.to_dict("records")
    )
    one = made.apart
    return [
        f"do rows from outside need more steps? {said['steps']}",
        f"is their trade-off better (less damage at the goal)? {said['damage']} "
        f"(at equal nats forgotten: {said['matched']}; per nat: {said['per_nat']})",
        f"damage of whole kinds unlearned at once, and how much more than in: {sets}",
        f"Spearman over all rows: {rhos}",
        f"groups of one difficulty instead of mixed ones: damage {one['homogeneous']:.3f} instead of {one['mixed']:.3f}, difference "
        f"[{one['low']:.3f}, {one['high']:.3f}]; does it help? {one['helps']}",
        *(f"note: {note}" for note in made.notes),
    ]
