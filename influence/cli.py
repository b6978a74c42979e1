"""The `influence` command: fit, score, self, top, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from influence import console

app = console.app("How much did each training row matter for what a LoRA adapter says?")
main = console.main(app)

RunOption = Annotated[Path, typer.Option("--run", help="Run directory made by influence fit.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, for a program.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is already there.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
CurvatureOption = Annotated[
    str | None,
    typer.Option(
        "--curvature", help="Another curvature that the run holds: identity, kfac, ggn, hessian ..."
    ),
]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--checkpointing", help="Recompute activations in the backward: slower, far less memory."
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the base model ships.")
]
DampingOption = Annotated[
    str | None,
    typer.Option(
        "--damping",
        help="Another damping rule than the fit's: mean:0.1, top:0.01, abs:1e-3 or time:0.5.",
    ),
]
#: Said under every table of scores.
ORDER = "Read the order before the size: removing one row of several that teach the same changes far less."
AtOption = Annotated[
    str | None,
    typer.Option(
        "--at", help="Which of the run's points to look at: all, end, or one's label, as in 0.6."
    ),
]


class ManyValues(TyperCommand):
    """A command that takes `--checkpoints A B C` as well as `--checkpoints A --checkpoints B`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its values."""
        spread, option = [], None
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument == "--checkpoints" else None
                spread.append(argument)
            elif option is not None and spread[-1] != option:
                spread += [option, argument]
            else:
                spread.append(argument)
        return super().parse_args(ctx, spread)


@app.command(cls=ManyValues)
def fit(
    adapter: Annotated[str, typer.Option("--adapter", help="PEFT LoRA adapter: folder or hub id.")],
    train: Annotated[
        Path,
        typer.Option(
            "--train", help="The rows it was trained on: .jsonl, .parquet or a datasets folder."
        ),
    ],
    run: Annotated[Path, typer.Option("--run", help="Directory to make.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Base model: folder or hub id. Default: the one the adapter records."
        ),
    ] = None,
    curvature: Annotated[
        str, typer.Option("--curvature", help="ekfac, kfac, fisher, ggn, hessian or identity.")
    ] = "ekfac",
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            help="Label draws per row for ekfac, kfac, fisher (fisher: 0 = the data's labels).",
        ),
    ] = 1,
    damping: Annotated[
        str,
        typer.Option(
            "--damping",
            help="mean:X, top:X (times the block's eigenvalue), abs:X, or time (1 / total learning rate, needs --optimizer).",
        ),
    ] = "mean:0.1",
    reduction: Annotated[
        str,
        typer.Option(
            "--reduction", help="Training loss: mean over tokens, or over examples' means."
        ),
    ] = "token",
    path: Annotated[
        str | None,
        typer.Option(
            "--path",
            help="Where between base (0) and adapter (1) to look; each point is a pass over the rows. Default: "
            "0.4,0.6,0.8, or nowhere but at --checkpoints where these are given. 1.0: at the adapter itself only.",
        ),
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoints", help="Adapter folders that training kept, to look there (one or more)."
        ),
    ] = None,
    geometry: Annotated[
        str,
        typer.Option(
            "--geometry",
            help="raw, function (damping in function space) or adam (the optimiser's metric).",
        ),
    ] = "raw",
    optimizer: Annotated[
        Path | None,
        typer.Option(
            "--optimizer",
            help="Trainer checkpoint with optimizer.pt, for --geometry adam and --damping time.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Truncate rows to so many tokens, as in training."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            "--token-budget",
            help="Tokens per batch, padding included: the memory knob. Default 1024 on a CPU, else 4096.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="The base's type: float32, bfloat16, float16 or float64.")
    ] = "float32",
    store: Annotated[
        str, typer.Option("--store", help="Keep the rows' gradients: auto, always or never.")
    ] = "auto",
    disk_budget: Annotated[
        float,
        typer.Option("--disk-budget", help="Most gigabytes of gradients that --store auto keeps."),
    ] = 50.0,
    seed: Annotated[
        int, typer.Option("--seed", help="Keys the labels sampled from the model.")
    ] = 0,
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Fit a curvature to an adapter on its training rows; a killed fit resumes, a finished one exits at once."""
    import time

    from influence.damping import Damping
    from influence.fitting import fit as fit_run
    from influence.rows import read_examples

    if damping != "time":
        Damping.parse(damping)
    scales = None if path is None else numbers(path, "--path")
    spec = _curvature(curvature, samples)
    examples = read_examples(train)
    loaded = _load(model, adapter, dtype, device, checkpointing, trust_remote_code)
    start = time.perf_counter()
    result = fit_run(
        loaded,
        examples,
        directory=run,
        curvature=spec,
        damping=damping,
        reduction=reduction,
        path=scales,
        checkpoints=checkpoints or (),
        geometry=geometry,
        optimizer=optimizer,
        max_length=max_length,
        token_budget=token_budget,
        store=store,
        disk_budget=disk_budget * 1e9,
        seed=seed,
        overwrite=overwrite,
    )
    manifest = result.manifest
    seconds = time.perf_counter() - start
    stored = "stored" if result.gradients_stored else "not stored (scores will pass over the rows)"
    text = (
        f"{run}: {curvature} on {manifest.data.rows} rows ({manifest.data.supervised_tokens} supervised "
        f"tokens), {manifest.adapter.parameters} LoRA parameters, damping {manifest.damping}; points {', '.join(point.label for point in manifest.points)}; gradients "
        f"{stored}; "
        f"{seconds:.1f} s"
    )
    console.emit({"run": str(run), "seconds": seconds, "manifest": manifest.as_json()}, text, json)


@app.command()
def score(
    run: RunOption,
    queries: Annotated[
        Path, typer.Option("--queries", help="Rows whose loss is explained, in the same formats.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Score file (HDF5). Default: scores.h5 in the run.")
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            "--solver",
            help="direct, cg, pcg (cg preconditioned by EK-FAC), astra, lissa, sgd or datainf (approximate).",
        ),
    ] = "direct",
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Relative residual that an iterative solver goes to."),
    ] = None,
    max_iterations: Annotated[
        int | None,
        typer.Option(
            "--max-iterations",
            help="Most products of an iterative solver, each a pass for ggn, hessian.",
        ),
    ] = None,
    measurement: Annotated[
        str,
        typer.Option(
            "--measurement",
            help="loss (mean, nats), sum (of the completion), margin (log-odds), token:K (loss of completion token K), or "
            "contrast (with --contrast).",
        ),
    ] = "loss",
    contrast: Annotated[
        Path | None,
        typer.Option(
            "--contrast",
            help="The same prompts with other completions: what made it say A rather than B?",
        ),
    ] = None,
    curvature: CurvatureOption = None,
    damping: DampingOption = None,
    at: AtOption = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Also split scores over the rows' tokens.")
    ] = False,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Also split scores over the adapted layers.")
    ] = False,
    device: DeviceOption = "auto",
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Score every training row for every query: the predicted change of the query's loss if the row is removed."""
    import time

    from influence.errors import InputError
    from influence.measurements import Contrast
    from influence.rows import read_examples

    examples = read_examples(queries)
    explained: Any = measurement
    if (measurement == "contrast") != (contrast is not None):
        raise InputError("give --measurement contrast and --contrast FILE together, or neither")
    if contrast is not None:
        explained = Contrast(read_examples(contrast))
    opened = _open(run, device, checkpointing, trust_remote_code)
    out = out or run / "scores.h5"
    start = time.perf_counter()
    scores = opened.score(
        examples,
        out=out,
        solver=solver,
        tolerance=tolerance,
        max_iterations=max_iterations,
        measurement=explained,
        curvature=curvature,
        damping=damping,
        at=at,
        per_token=per_token,
        per_module=per_module,
        overwrite=overwrite,
    )
    seconds = time.perf_counter() - start
    failed = int((~scores.converged).sum())
    worst = float(scores.residuals.max())
    text = (
        f"{out}: scores [{len(scores.query_ids)} queries, {len(scores.train_ids)} rows]; {describe(scores.attributes)}; worst "
        f"residual {worst:.1e}; {seconds:.1f} s"
    )
    result = {
        "out": str(out),
        "shape": list(scores.values.shape),
        "worst_residual": worst,
        "not_converged": failed,
        "seconds": seconds,
    }
    console.emit(result, text, json)
    if (
        failed and solver != "datainf"
    ):  # an approximation by construction: its residual is a fact, not a failure
        raise typer.Exit(1)


@app.command(name="self")
def self_(
    run: RunOption,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="HDF5 file. Default: added to scores.h5 in the run."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many rows to show.")] = 10,
    curvature: CurvatureOption = None,
    damping: DampingOption = None,
    at: AtOption = None,
    device: DeviceOption = "auto",
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Self-influence: the predicted rise of each training row's own loss if it is removed (memorised rows are high)."""
    import numpy as np

    _at_least_one("-k", k)
    opened = _open(run, device, checkpointing, trust_remote_code)
    out = out or run / "scores.h5"
    result = opened.self_influence(
        out=out, curvature=curvature, damping=damping, at=at, overwrite=overwrite
    )
    order = np.argsort(-result.values, kind="stable")[:k]
    rows = [
        {
            "id": result.train_ids[i],
            "self_influence": float(result.values[i]),
            "row": opened.train[int(i)].preview(90),
        }
        for i in order
    ]
    if json:
        console.emit(
            {
                "out": str(out),
                "rows": len(result.values),
                "worst_residual": result.worst_residual,
                "top": rows,
            },
            "",
            True,
        )
        return
    from rich.console import Console

    table = _table(
        f"{out}: the {len(rows)} rows with the highest self-influence of {len(result.values)}",
        "self-influence",
    )
    for row in rows:
        table.add_row(f"{row['self_influence']:+.4f}", _cell(row["id"]), _cell(row["row"]))
    Console().print(table)
    Console().print(
        f"nats per token; {describe(result.attributes)}. {ORDER}", markup=False, highlight=False
    )


@app.command()
def top(
    run: RunOption,
    query: Annotated[
        str, typer.Option("--query", help="Query id, or its position in the query file.")
    ],
    scores: Annotated[
        Path | None, typer.Option("--scores", help="Score file. Default: scores.h5 in the run.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Rows of each kind.")] = 10,
    json: JsonOption = False,
) -> None:
    """Show the rows whose removal would raise (proponents) and lower (opponents) a query's loss the most."""
    from influence.errors import InputError, MismatchError
    from influence.manifest import read_manifest
    from influence.rows import read_examples
    from influence.scorefile import Scores

    _at_least_one("-k", k)
    manifest = read_manifest(run)
    path = scores or run / "scores.h5"
    if not path.exists():
        raise InputError(
            f"{path} does not exist: make it with influence score --run {run} --queries QUERIES"
        )
    loaded = Scores.load(path, detail=False)
    if loaded.attributes.get("run_digest") != manifest.digest:
        raise MismatchError(
            f"{path} belongs to another run than {run}: give the run it was made from"
        )
    position = loaded.query_index(query)
    proponents, opponents = loaded.top(position, k)
    source = manifest.data.path
    train = read_examples(source) if source and Path(source).exists() else None
    if train is not None and train.digest != manifest.data.digest:
        raise MismatchError(
            f"{source} has changed since {run} was fitted: restore it, or fit a new run"
        )
    if json:
        entries = {
            name: [vars(e) for e in part]
            for name, part in (("proponents", proponents), ("opponents", opponents))
        }
        console.emit({"query": loaded.query_ids[position], **entries}, "", True)
        return
    from rich.console import Console

    unit = loaded.attributes.get("unit", "")
    effects = ("raise", "lower") if loaded.attributes.get("rises", True) else ("lower", "raise")
    for name, part, effect in zip(
        ("proponents", "opponents"), (proponents, opponents), effects, strict=True
    ):
        table = _table(
            f"{name} of {console.printable(loaded.query_ids[position])}: removing one would {effect} its {loaded.attributes.get('measurement', 'loss')}",
            f"score ({unit})",
        )
        for entry in part:
            table.add_row(
                f"{entry.score:+.2e}",
                _cell(entry.id),
                _cell(train[entry.index].preview(90)) if train else "",
            )
        Console().print(table)
    if "points" in loaded.attributes:
        Console().print(f"{describe(loaded.attributes)}. {ORDER}", markup=False, highlight=False)


@app.command()
def check(
    adapter: Annotated[str, typer.Option("--adapter", help="PEFT LoRA adapter: folder or hub id.")],
    train: Annotated[Path, typer.Option("--train", help="Rows to check on.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base model. Default: the one the adapter records."),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", help="How many rows to check.")] = 8,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Truncate rows to so many tokens.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="The base's type: float32, bfloat16, float16 or float64.")
    ] = "float32",
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Compare the streamed per-example gradients of *your* model with a plain one-example loop."""
    from influence.gradients import check_gradients
    from influence.rows import read_examples

    _at_least_one("--rows", rows)
    examples = read_examples(train)[:rows]
    result = check_gradients(
        _load(model, adapter, dtype, device, checkpointing, trust_remote_code),
        examples,
        max_length=max_length,
    )
    console.emit(
        {"ok": result.ok, "tolerance": result.tolerance, "errors": result.errors}, str(result), json
    )
    if not result.ok:
        raise typer.Exit(1)


def _curvature(name: str, samples: int) -> Any:
    """The curvature a name stands for; only the command line maps names to objects."""
    from influence.curvature import EKFAC, GGN, KFAC, Fisher, Hessian, Identity
    from influence.errors import InputError

    lowest = 0 if name == "fisher" else 1
    if samples < lowest:
        raise InputError(f"--samples {samples} was given; {name} needs at least {lowest}")
    table = {
        "ekfac": lambda: EKFAC(samples=samples),
        "kfac": lambda: KFAC(samples=samples),
        "fisher": lambda: Fisher(samples=samples),
        "ggn": GGN,
        "hessian": Hessian,
        "identity": Identity,
    }
    if name not in table:
        raise InputError(f"curvature {name!r} was given; expected one of {', '.join(table)}")
    return table[name]()


def describe(attributes: Any) -> str:
    """With what scores were made, in one line."""
    points = ", ".join(str(label) for label in attributes["points"])
    return (
        f"{attributes['geometry']} {attributes['curvature']}, damping {attributes['damping']}, points {points}, size "
        f"{'not calibrated' if attributes['calibration'] == 'none' else 'calibrated by ' + str(attributes['calibration'])}"
    )


def _at_least_one(option: str, value: int) -> None:
    from influence.errors import InputError

    if value < 1:
        raise InputError(f"{option} {value} was given; expected at least 1")


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    from influence.errors import InputError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} {text!r} was given; expected numbers separated by commas, as in 0.4,0.6,0.8"
        ) from None


def _load(
    model: str | None,
    adapter: str,
    dtype: str,
    device: str,
    checkpointing: bool,
    trust_remote_code: bool,
) -> Any:
    from influence.loading import load

    console.quiet_transformers()
    return load(
        model,
        adapter,
        dtype=dtype,
        device=device,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )


def _open(run: Path, device: str, checkpointing: bool, trust_remote_code: bool) -> Any:
    from influence.progress import say
    from influence.run import Run

    console.quiet_transformers()
    opened = Run.open(
        run, device=device, checkpointing=checkpointing, trust_remote_code=trust_remote_code
    )
    if (now := opened.manifest.now) is not None:
        say(
            f"note: this run explains the adapter it was fitted on, before the edits that led to {now.adapter.path}: rows "
            "that they removed or changed are scored as they were. Fit a run of the edited adapter for scores after them"
        )
    return opened


def _table(title: str, first: str) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, justify="right", no_wrap=True)
    table.add_column("id", max_width=24, overflow="fold")
    table.add_column("row", overflow="fold")
    return table


def _cell(text: str) -> Any:
    """Row text as plain text: no markup is read from it."""
    from rich.text import Text

    return Text(console.printable(text))


if __name__ == "__main__":
    main()
