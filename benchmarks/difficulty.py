"""Forecast of unlearning difficulty against what ascent then took: rank correlations with intervals, beside the baselines.

    python benchmarks/difficulty.py --world FOLDER [--world FOLDER] --out DIR [--optimizer adam] [--rows N] [--edits N]

A world is a folder with base/, adapter/, train.jsonl, heldout.jsonl and, maybe, truth.npz (`analysis.demo.world`); `demo` makes the demo's.
Forecasts are made first, then every row is unlearned alone (`unlearn.difficulty.measured.measure`, whose file is kept in DIR and resumed). For
`--edits N` rows the closed-form edit to the same target is made too, and three policies are compared by the damage they do: always
ascent, always edit, and what the forecast recommends.

Baselines: loss, gradient norm, length, self-influence over the run's path, MRD, counterfactual memorization (an oracle that retrains), gap, base
loss, first-order costs, and the line scan along the first step (`looks=1`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from analysis.demo.world import World, demo_world
from analysis.metrics.lds import read_truth
from analysis.stats import bootstrap_interval, spearman
from analysis.studies.memorization import counterfactual_memorization
from influence.batches import collate, plan_batches
from influence.loss import mean_losses, supervised_logits, token_losses
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.difficulty.forecast import Forecast
from unlearn.difficulty.measured import Measured, Protocol, measure, predict
from unlearn.difficulty.units import units


def mrd(run: Run, *, sigma: float = 1e-3, draws: int = 8, seed: int = 0) -> np.ndarray:
    """Memory removal difficulty (arXiv 2504.06658) of every training row, [n]: `|sum_t mean_delta (p_t(theta + delta) - p_t(theta)) / p_t(theta)|`.

    p_t: log-probability of completion token t; delta: Gaussian noise of standard deviation `sigma` on the LoRA parameters, the same
    draws for every row.
    """
    theta, generator = run.model.snapshot(), torch.Generator().manual_seed(seed)
    before, change = _token_losses(run), None
    for _ in range(draws):
        noise = torch.randn(len(theta), generator=generator).to(theta) * sigma
        with run.model.at(theta + noise):
            after = _token_losses(run)
        found = np.array(
            [((b - a) / np.minimum(-a, -1e-6)).sum() for a, b in zip(before, after, strict=True)]
        )
        change = found if change is None else change + found
    assert change is not None
    return np.abs(change / draws)


def _token_losses(run: Run) -> list[np.ndarray]:
    out: list[np.ndarray] = [np.zeros(0)] * len(run.tokens)
    with run.model.evaluating(), torch.no_grad():
        for rows in plan_batches(run.tokens, run.manifest["token_budget"]):
            part = supervised_logits(
                run.model,
                collate(run.tokens, rows, pad_id=run.model.pad_id, device=run.model.device),
            )
            losses = token_losses(part.logits, part.targets).double().split(part.counts)
            for row, own in zip(rows.tolist(), losses, strict=True):
                out[row] = own.cpu().numpy()
    return out


def rho(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Spearman correlation with its 95 % bootstrap interval over the rows."""
    found = bootstrap_interval(lambda rows: float(spearman(x[rows], y[rows])), len(x))
    return {"spearman": float(spearman(x, y)), "low": found.low, "high": found.high}


def compare(
    run: Run, forecasts: dict[int, Forecast], measured: Measured, truth: Path | None
) -> dict[str, Any]:
    """Every forecast and baseline against steps and damage of the rows whose target was above their loss and was reached."""
    table = forecasts[3].table
    place = {id: k for k, id in enumerate(run.train.ids)}
    at = np.array([place[id] for id in table["id"]])
    usable = np.isfinite(measured.steps) & (measured.steps > 0) & np.isfinite(measured.damage)
    told: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for looks, forecast in forecasts.items():
        told[f"forecast, {looks} look{'s' * (looks > 1)}"] = tuple(
            np.nan_to_num(forecast.table[c].to_numpy(), nan=np.inf) for c in ("steps", "damage")
        )
    groups = [run.train[int(i)].group for i in at]
    known = groups if all(group is not None for group in groups) else None
    calibrated = forecasts[3].calibrated(measured.steps, measured.damage, known)
    told["calibrated, out of fold"] = tuple(
        np.nan_to_num(calibrated.table[c].to_numpy(), nan=np.inf) for c in ("steps", "damage")
    )
    both = lambda values: (values, values)  # noqa: E731
    for name in (
        "loss",
        "base_loss",
        "gap",
        "gradient_norm",
        "tokens",
        "first_order_steps",
        "self_influence",
    ):
        told[name] = both(table[name].to_numpy())
    told["gap / squared gradient norm"] = both(
        table["gap"].to_numpy() / table["gradient_norm"].to_numpy() ** 2
    )
    told["self-influence over the path"] = both(run.self_influence().values[at].astype(float))
    told["MRD"] = both(mrd(run)[at])
    if truth is not None:
        found = read_truth(truth)
        told["counterfactual memorization"] = both(
            counterfactual_memorization(found.train_loss, found.masks).values[at]
        )
    lines = {
        name: {
            "steps": rho(steps[usable], measured.steps[usable]),
            "damage": rho(damage[usable], measured.damage[usable]),
        }
        for name, (steps, damage) in told.items()
    }
    for name in told:
        if name.startswith(("forecast", "calibrated")):
            error = np.abs(told[name][0][usable] / measured.steps[usable] - 1)
            lines[name]["median_relative_error"] = float(np.median(error))
    inside = {}
    half = np.random.default_rng(0).permutation(len(table)) < len(table) // 2
    hidden = [np.where(half, real, np.nan) for real in (measured.steps, measured.damage)]
    other = forecasts[3].calibrated(
        hidden[0], hidden[1], known
    )  # its intervals are judged on the half it did not see
    for column, real in (("steps", measured.steps), ("damage", measured.damage)):
        for name, kept, rows in (
            ("uncalibrated", forecasts[3].table, usable),
            ("calibrated", other.table, usable & ~half),
        ):
            low, high = kept[f"{column}_low"].to_numpy(), kept[f"{column}_high"].to_numpy()
            inside[f"{column}, {name}"] = float(((real >= low) & (real <= high))[rows].mean())
    assert calibrated.calibration is not None
    ratios = {
        c: np.quantile(real[usable] / table[c].to_numpy()[usable], [0.05, 0.5, 0.95]).tolist()
        for c, real in (("steps", measured.steps), ("damage", measured.damage))
    }
    return {
        "rows": int(usable.sum()),
        "of": len(table),
        "steps": np.quantile(measured.steps[usable], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "damage": np.quantile(measured.damage[usable], [0, 0.25, 0.5, 0.75, 1]).tolist(),
        "lines": lines,
        "measured over forecast, quantiles": ratios,
        "share inside the interval": inside,
        "importances": calibrated.calibration.importances,
        "recommended": table["recommended"].value_counts().to_dict(),
    }


def policies(
    run: Run, forecast: Forecast, measured: Measured, unseen: TokenizedExamples, count: int
) -> dict[str, Any]:
    """Damage of always ascent, always edit, and the recommended way, over evenly spaced rows, with paired intervals."""
    import unlearn

    place = {id: k for k, id in enumerate(run.train.ids)}
    sample = np.array([place[id] for id in measured.sample])
    before = measured.retained_before
    entries = []
    for k in np.unique(np.linspace(0, len(forecast) - 1, count).round().astype(int)):
        if not np.isfinite(measured.damage[k]) or measured.steps[k] == 0:
            continue
        edit = unlearn.remove(
            run,
            [measured.names[k]],
            until=f"loss={measured.target[k]:.6f}",
            max_damage=1e6,
            start="original",
        )
        theta = run.model.snapshot()
        with run.model.at(theta + edit.delta.to(theta)):
            rise = mean_losses(run.model, run.tokens.select(sample)) - before
            unseen_after = mean_losses(run.model, unseen)
            own = float(
                mean_losses(run.model, run.tokens.select(np.array([place[measured.names[k]]])))[0]
            )
        kept = np.isfinite(measured.retained[k, -1])
        entries.append(
            {
                "id": measured.names[k],
                "ascent": float(measured.damage[k]),
                "ascent_heldout": float(measured.heldout_damage[k]),
                "edit_heldout": float((unseen_after - measured.heldout_before).mean()),
                "edit": float(rise[kept].mean()),
                "edit_loss": own,
                "target": float(measured.target[k]),
                "ascent_gradients": float(measured.steps[k]),
                "edit_gradients": float(edit.report["cost"]["total"]),
                "recommended": str(forecast.table["recommended"].iloc[k]),
            }
        )
    ways = {name: np.array([entry[name] for entry in entries]) for name in ("ascent", "edit")}
    ways["recommended"] = np.array(
        [entry["ascent" if entry["recommended"] == "ascent" else "edit"] for entry in entries]
    )
    ways["best of both"] = np.minimum(ways["ascent"], ways["edit"])
    cost = {
        name: np.array([entry[f"{name}_gradients"] for entry in entries])
        for name in ("ascent", "edit")
    }
    cost["recommended"] = np.where(
        [entry["recommended"] == "ascent" for entry in entries], cost["ascent"], cost["edit"]
    )
    mean = lambda x: {"mean": float(x.mean()), **_ends(x)}  # noqa: E731
    return {
        "rows": len(entries),
        "damage": {name: mean(values) for name, values in ways.items()},
        "recommended minus": {
            name: mean(ways["recommended"] - ways[name]) for name in ("ascent", "edit")
        },
        "row-gradients": {name: float(values.mean()) for name, values in cost.items()},
        "held-out damage": {
            name: mean(np.array([entry[f"{name}_heldout"] for entry in entries]))
            for name in ("ascent", "edit")
        },
        "entries": entries,
    }


def _ends(values: np.ndarray) -> dict[str, float]:
    found = bootstrap_interval(lambda rows: float(values[rows].mean()), len(values))
    return {"low": found.low, "high": found.high}


def show(name: str, result: dict[str, Any]) -> str:
    """A Markdown table."""
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
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in options.world:
        kept = options.out / Path(folder).name
        kept.mkdir(exist_ok=True)
        world = (
            demo_world(kept)
            if folder == "demo"
            else World(Path(folder).name, Path(folder).resolve(), kept)
        )
        run = world.run()
        rows = np.unique(
            np.linspace(0, len(run.train) - 1, min(options.rows, len(run.train)))
            .round()
            .astype(int)
        )
        ids = [run.train.ids[i] for i in rows]
        for optimizer in options.optimizer or ["adam", "sgd"]:
            protocol = Protocol(optimizer=optimizer)
            clock = time.monotonic()
            forecasts = {
                looks: predict(run, ids, protocol=protocol, looks=looks) for looks in (3, 2, 1)
            }
            told = time.monotonic() - clock
            clock = time.monotonic()
            measured = measure(
                run,
                ids,
                protocol=protocol,
                heldout=world.rows("heldout"),
                out=kept / f"{optimizer}.h5",
            )
            forecasts[3].write(kept / f"{optimizer}.csv", overwrite=True)
            result = compare(run, forecasts, measured, world.truth)
            result["seconds"] = {
                "three forecasts": told,
                "measured (0 where it was read)": time.monotonic() - clock,
            }
            if options.edits and optimizer == "adam":
                result["policies"] = policies(
                    run,
                    forecasts[3],
                    measured,
                    units(run, ids[:1], None, protocol, world.rows("heldout")).heldout,
                    options.edits,
                )
            (options.out / f"{world.name}-{optimizer}.json").write_text(
                json.dumps(result, indent=1)
            )
            print(show(f"{world.name}, {optimizer}", result), "\n")
            print(
                json.dumps(
                    {k: v for k, v in result.items() if k not in ("lines", "importances")}, indent=1
                )[:6000],
                flush=True,
            )


if __name__ == "__main__":
    main()
