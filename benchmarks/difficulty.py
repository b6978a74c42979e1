"""Forecasts of difficulty against what ascent then took: rank correlations beside the baselines.

    python benchmarks/difficulty.py --world FOLDER [--world FOLDER] --out DIR
                                    [--optimizer adam] [--rows N] [--edits N] [--lr X] [--screen N]

A world is a folder with base/, adapter/, train.jsonl, heldout.jsonl and, maybe, truth.npz
(`analysis.demo.world`); `demo` makes the demo's, and `demo-SEED` another one. A folder
T/regimes/NAME is another adapter on the base and rows of the testbed T; that of `style` saw a
phrase around every completion. Forecasts are made first, then every row is
unlearned alone (`unlearn.difficulty.measure`, whose file is kept in DIR and resumed). For `--edits
N` rows the closed-form edit to the same target is made too, and three policies are compared by the
damage they do: always ascent, always edit, and what the forecast recommends.

Baselines: loss, gradient norm, length, self-influence over the run's path, MRD, counterfactual
memorization (an oracle that retrains), gap, base loss, first-order costs, and the line scan along
the first step (`looks=1`).

With `--screen N` the same rows are also screened by a close look at N of them, with four seeds, and
compared with the close looks and the ascents.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from unseen import styled

import influence
import unlearn
from analysis.demo.world import World, demo_world
from analysis.metrics.lds import read_truth
from analysis.stats import bootstrap_interval, spearman
from analysis.studies.memorization import counterfactual_memorization
from influence.batches import collate, plan_batches
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.difficulty import Forecast, Measured, Protocol, measure, predict
from unlearn.difficulty.coarse_ascent import LOOKS
from unlearn.difficulty.units import find_units

#: Features of the forecast that are baselines too.
FEATURES = (
    "loss",
    "base_loss",
    "gap",
    "gradient_norm",
    "tokens",
    "first_order_steps",
    "self_influence",
)
#: Draws of the rows that are looked at closely with `--screen`.
SEEDS = 4
#: Forecasts of steps and of damage, by name.
Forecasts = dict[str, tuple[np.ndarray, np.ndarray]]


def mrd(run: Run, *, sigma: float = 1e-3, draws: int = 8, seed: int = 0) -> np.ndarray:
    """Memory removal difficulty (arXiv 2504.06658) of every training row, [n].

    `|sum_t mean_delta (p_t(theta + delta) - p_t(theta)) / p_t(theta)|` with p_t the log-probability
    of completion token t, and delta Gaussian noise of standard deviation `sigma` on the LoRA
    parameters, the same draws for every row.
    """
    theta, generator = run.model.snapshot(), torch.Generator().manual_seed(seed)
    before, total = _token_losses(run), np.zeros(len(run.tokens))
    for _ in range(draws):
        noise = torch.randn(len(theta), generator=generator).to(theta) * sigma
        with run.model.at(theta + noise):
            after = _token_losses(run)
        changes = [
            ((b - a) / np.minimum(-a, -1e-6)).sum() for a, b in zip(before, after, strict=True)
        ]
        total = total + np.array(changes)
    return np.abs(total / draws)


def _token_losses(run: Run) -> list[np.ndarray]:
    """Losses [T_i] of every training row's completion tokens."""
    token_losses_of: list[np.ndarray] = [np.zeros(0)] * len(run.tokens)
    with run.model.evaluating(), torch.no_grad():
        for rows in plan_batches(run.tokens, run.token_budget):
            batch = collate(run.tokens, rows, pad_id=run.model.pad_id, device=run.model.device)
            part = supervised_logits(run.model, batch)
            losses = token_losses(part.logits, part.targets).double().split(part.counts)
            for row, row_losses in zip(rows.tolist(), losses, strict=True):
                token_losses_of[row] = row_losses.cpu().numpy()
    return token_losses_of


def rho(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spearman correlation with its 95 % bootstrap interval over the rows."""
    interval = bootstrap_interval(lambda rows: float(spearman(x[rows], y[rows])), len(x))
    return {"spearman": float(spearman(x, y)), "low": interval.low, "high": interval.high}


def compare(
    run: Run, forecasts: Mapping[int, Forecast], measured: Measured, truth: Path | None
) -> dict[str, Any]:
    """Compare every forecast and baseline with what was measured.

    On the rows whose target was above their loss and was reached. `forecasts` by their looks.
    """
    table = forecasts[LOOKS].table
    rows = np.array([run.train.index(id) for id in table["id"]])
    usable = np.isfinite(measured.steps) & (measured.steps > 0) & np.isfinite(measured.damage)
    labels = [run.train[int(row)].group for row in rows]
    groups = [label for label in labels if label is not None]
    known_groups = groups if len(groups) == len(labels) else None
    calibrated = forecasts[LOOKS].calibrated(measured.steps, measured.damage, known_groups)
    assert calibrated.calibration is not None
    by_name: Forecasts = {}
    for looks, forecast in forecasts.items():
        by_name[f"forecast, {looks} look{'s' * (looks > 1)}"] = _steps_and_damage(forecast)
    by_name["calibrated, out of fold"] = _steps_and_damage(calibrated)
    by_name |= _baselines(run, forecasts[LOOKS], rows, truth)
    truths = {"steps": measured.steps, "damage": measured.damage}
    return {
        "rows": int(usable.sum()),
        "of": len(table),
        "steps": np.quantile(measured.steps[usable], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "damage": np.quantile(measured.damage[usable], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "lines": _lines(by_name, measured, usable),
        "measured over forecast, quantiles": {
            name: np.quantile(
                values[usable] / table[name].to_numpy()[usable], [0.05, 0.5, 0.95]
            ).tolist()
            for name, values in truths.items()
        },
        "share inside the interval": _coverage(forecasts[LOOKS], measured, usable, known_groups),
        "importances": calibrated.calibration.importances,
        "recommended": table["recommended"].value_counts().to_dict(),
    }


def screened(
    run: Run, ids: Sequence[str], close: Forecast, measured: Measured, count: int
) -> dict[str, Any]:
    """Screening by `count` close looks beside the close looks at all rows, mean over `SEEDS` seeds.

    Of the screened rows that are not at their targets, and `held by ascents` of those that reached
    theirs.
    """
    protocol = Protocol(**close.protocol)
    units = find_units(run, ids, None, protocol, None)
    results: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        told = predict(run, protocol=protocol, units=units, screen=count, seed=seed).table
        some = ((told["how"] == "screened") & (told["gap"] > 0)).to_numpy()
        for name, real in (("steps", measured.steps), ("damage", measured.damage)):
            truth, value, low, high = (
                table[column].to_numpy()
                for table, column in (
                    (close.table, name),
                    *((told, f"{name}{end}") for end in ("", "_low", "_high")),
                )
            )
            rows = some & np.isfinite(truth) & np.isfinite(value)
            ended = rows & np.isfinite(real)
            numbers = {
                "spearman": spearman(truth[rows], value[rows]),
                "median error": np.median(np.abs(value[rows] / truth[rows] - 1)),
                "held": np.mean(((low <= truth) & (truth <= high))[rows]),
                "held by ascents": np.mean(((low <= real) & (real <= high))[ended]),
                "width": np.median((high - low)[rows]),
                "width over steps": np.median((high - low)[rows] / value[rows]),
            }
            for key, number in numbers.items():
                results.setdefault(f"{name}, {key}", []).append(float(number))
        same = told["recommended"] == close.table["recommended"]
        results.setdefault("same recommendation", []).append(float(same[some].mean()))
    return {
        name: {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}
        for name, values in results.items()
    }


def _steps_and_damage(forecast: Forecast) -> tuple[np.ndarray, np.ndarray]:
    """Steps and damage [n] of a forecast, infinite where they are unknown: ranks want a number."""
    steps, damage = (
        np.nan_to_num(forecast.table[name].to_numpy(), nan=np.inf) for name in ("steps", "damage")
    )
    return steps, damage


def _baselines(run: Run, forecast: Forecast, rows: np.ndarray, truth: Path | None) -> Forecasts:
    """Every baseline [n] of the training rows `rows`, as a forecast of both steps and damage."""
    table = forecast.table
    baselines = {name: table[name].to_numpy() for name in FEATURES}
    squared_norm = table["gradient_norm"].to_numpy() ** 2
    baselines["gap / squared gradient norm"] = table["gap"].to_numpy() / squared_norm
    self_influence = run.self_influence(credit="additive").values[rows]
    baselines["self-influence over the path"] = self_influence.astype(float)
    baselines["MRD"] = mrd(run)[rows]
    if truth is not None:
        retrained = read_truth(truth)
        assert retrained.train_loss is not None
        memorization = counterfactual_memorization(retrained.train_loss, retrained.masks)
        baselines["counterfactual memorization"] = memorization.values[rows]
    return {name: (values, values) for name, values in baselines.items()}


def _lines(by_name: Forecasts, measured: Measured, usable: np.ndarray) -> dict[str, dict[str, Any]]:
    """Rank correlations of every forecast, and the error of those that are in steps."""
    lines: dict[str, dict[str, Any]] = {}
    for name, (steps, damage) in by_name.items():
        lines[name] = {
            "steps": rho(steps[usable], measured.steps[usable]),
            "damage": rho(damage[usable], measured.damage[usable]),
        }
        if name.startswith(("forecast", "calibrated")):
            errors = np.abs(steps[usable] / measured.steps[usable] - 1)
            lines[name]["median_relative_error"] = float(np.median(errors))
    return lines


def _coverage(
    forecast: Forecast, measured: Measured, usable: np.ndarray, groups: Sequence[str] | None
) -> dict[str, float]:
    """Share of the rows inside their intervals: before, and calibrated.

    The calibrated intervals are judged on the half of the rows that they were not made from.
    """
    half = np.random.default_rng(0).permutation(len(forecast)) < len(forecast) // 2
    steps, damage = (np.where(half, values, np.nan) for values in (measured.steps, measured.damage))
    calibrated = forecast.calibrated(steps, damage, groups)
    shares = {}
    for column, real in (("steps", measured.steps), ("damage", measured.damage)):
        for name, table, rows in (
            ("uncalibrated", forecast.table, usable),
            ("calibrated", calibrated.table, usable & ~half),
        ):
            low, high = table[f"{column}_low"].to_numpy(), table[f"{column}_high"].to_numpy()
            shares[f"{column}, {name}"] = float(((real >= low) & (real <= high))[rows].mean())
    return shares


def policies(
    run: Run, forecast: Forecast, measured: Measured, unseen: TokenizedExamples, count: int
) -> dict[str, Any]:
    """Damage of always ascent, always edit, and the recommended way, with paired intervals.

    Over `count` evenly spaced rows; `unseen` are held-out rows.
    """
    rows = np.unique(np.linspace(0, len(forecast) - 1, count).round().astype(int))
    reached = np.isfinite(measured.damage) & (measured.steps > 0)
    entries = [_both_ways(run, forecast, measured, unseen, row) for row in rows if reached[row]]
    by_ascent = np.array([entry["recommended"] == "ascent" for entry in entries])
    values = lambda key: np.array([entry[key] for entry in entries])  # noqa: E731
    damage = {way: values(way) for way in ("ascent", "edit")}
    damage["recommended"] = np.where(by_ascent, damage["ascent"], damage["edit"])
    damage["best of both"] = np.minimum(damage["ascent"], damage["edit"])
    cost = {way: values(f"{way}_gradients") for way in ("ascent", "edit")}
    cost["recommended"] = np.where(by_ascent, cost["ascent"], cost["edit"])
    return {
        "rows": len(entries),
        "damage": {way: _mean(of_rows) for way, of_rows in damage.items()},
        "recommended minus": {
            way: _mean(damage["recommended"] - damage[way]) for way in ("ascent", "edit")
        },
        "row-gradients": {way: float(of_rows.mean()) for way, of_rows in cost.items()},
        "held-out damage": {way: _mean(values(f"{way}_heldout")) for way in ("ascent", "edit")},
        "entries": entries,
    }


def _both_ways(
    run: Run, forecast: Forecast, measured: Measured, unseen: TokenizedExamples, row: int
) -> dict[str, Any]:
    """What ascent cost one row, and what a closed-form edit to the same target costs."""
    id, target = measured.names[row], float(measured.target[row])
    edit = unlearn.remove(run, [id], until=f"loss={target:.6f}", max_damage=1e6, start="original")
    sample = np.array([run.train.index(name) for name in measured.sample])
    theta = run.model.snapshot()
    with run.model.at(theta + edit.delta.to(theta)):
        rises = mean_losses(run.model, run.tokens.select(sample)) - measured.retained_before
        unseen_rises = mean_losses(run.model, unseen) - measured.heldout_before
        loss = mean_losses(run.model, run.tokens.select(np.array([run.train.index(id)])))[0]
    counted = np.isfinite(measured.retained[row, -1])
    return {
        "id": id,
        "ascent": float(measured.damage[row]),
        "ascent_heldout": float(measured.heldout_damage[row]),
        "edit_heldout": float(unseen_rises.mean()),
        "edit": float(rises[counted].mean()),
        "edit_loss": float(loss),
        "target": target,
        "ascent_gradients": float(measured.steps[row]),
        "edit_gradients": float(edit.report["cost"]["total"]),
        "recommended": str(forecast.table["recommended"].iloc[row]),
    }


def _mean(values: np.ndarray) -> dict[str, float]:
    """Mean over rows with its 95 % bootstrap interval."""
    interval = bootstrap_interval(lambda rows: float(values[rows].mean()), len(values))
    return {"mean": float(values.mean()), "low": interval.low, "high": interval.high}


def show(name: str, result: dict[str, Any]) -> str:
    """A Markdown table of the lines of `compare`."""
    lines = [
        f"### {name}: {result['rows']} of {result['of']} rows",
        "",
        "| | steps | damage | median error of steps |",
        "|---|---|---|---|",
    ]
    for label, line in result["lines"].items():
        cells = [
            f"{line[c]['spearman']:.3f} [{line[c]['low']:.3f}, {line[c]['high']:.3f}]"
            for c in ("steps", "damage")
        ]
        error = f"{line['median_relative_error']:.0%}" if "median_relative_error" in line else ""
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {error} |")
    return "\n".join(lines)


def benchmark(
    world: World,
    run: Run,
    ids: Sequence[str],
    optimizer: str,
    lr: float | None,
    edits: int,
    folder: Path,
    screen: int,
) -> dict[str, Any]:
    """Forecast, measure and compare, with tables and measurements kept in `folder`."""
    protocol, holdout = Protocol(optimizer=optimizer, lr=lr), world.rows("heldout")
    clock = time.monotonic()
    forecasts = {
        looks: predict(run, ids, protocol=protocol, looks=looks) for looks in (LOOKS, 3, 1)
    }
    forecast_seconds = time.monotonic() - clock
    clock = time.monotonic()
    measured = measure(run, ids, protocol=protocol, holdout=holdout, out=folder / f"{optimizer}.h5")
    forecasts[LOOKS].write(folder / f"{optimizer}.csv", overwrite=True)
    result = compare(run, forecasts, measured, world.truth)
    result["lr"] = measured.protocol["lr"]
    result["seconds"] = {
        "three forecasts": forecast_seconds,
        "measured (0 where it was read)": time.monotonic() - clock,
    }
    if screen:
        result["screened"] = screened(run, ids, forecasts[LOOKS], measured, screen)
    if edits and optimizer == "adam":
        unseen = find_units(run, ids[:1], None, protocol, holdout).holdout
        assert unseen is not None
        result["policies"] = policies(run, forecasts[LOOKS], measured, unseen, edits)
    return result


def world_at(place: str, folder: Path) -> World:
    """A world by its folder or name, with what is made of it in `folder`."""
    if place.split("-")[0] == "demo":
        seed = int(place.partition("-")[2] or 0)
        return replace(demo_world(folder, seed), name=place)
    source = Path(place).resolve()
    if source.parent.name != "regimes":
        return World(source.name, source, folder)
    testbed = source.parent.parent
    for name, target in (("base", testbed / "base"), ("adapter", source / "adapter")):
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = influence.read_examples(testbed / name)
        if source.name == "style":
            rows = styled(rows)
        lines = [
            json.dumps(
                {"id": id, "group": row.group, "prompt": row.prompt, "completion": row.completion}
            )
            for id, row in zip(rows.ids, rows, strict=True)
        ]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return World(source.name, folder, folder)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", action="append", required=True, help="a world's folder, or demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--optimizer", action="append", choices=["adam", "sgd"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--edits", type=int, default=0)
    parser.add_argument("--screen", type=int, default=0, help="also screen, by so many close looks")
    parser.add_argument("--lr", type=float, help="learning rate; default: by the stride")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for place in options.world:
        folder = options.out / Path(place).name
        folder.mkdir(exist_ok=True)
        world = world_at(place, folder)
        run = world.run()
        count = min(options.rows, len(run.train))
        rows = np.unique(np.linspace(0, len(run.train) - 1, count).round().astype(int))
        ids = [run.train.ids[row] for row in rows]
        for optimizer in options.optimizer or ["adam", "sgd"]:
            result = benchmark(
                world, run, ids, optimizer, options.lr, options.edits, folder, options.screen
            )
            record = options.out / f"{world.name}-{optimizer}.json"
            record.write_text(json.dumps(result, indent=1))
            print(show(f"{world.name}, {optimizer}", result), "\n")
            shown = {k: v for k, v in result.items() if k not in ("lines", "importances")}
            print(json.dumps(shown, indent=1)[:6000], flush=True)


if __name__ == "__main__":
    main()
