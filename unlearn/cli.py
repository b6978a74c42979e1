"""The `unlearn` command: remove, relabel, correct, edit, verify, retrain, train, methods, difficulty."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from influence import console
from influence.cli import (
    CheckpointingOption,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    RunOption,
    TrustOption,
)
from influence.errors import InputError
from unlearn.words import difficulty_text, dry_run_text, edit_text, methods_text

app = console.app("Change an adapter as if training rows had been absent or different.")


main = console.main(app)


@app.callback()
def _group() -> None:
    """Change an adapter as if training rows had been absent or different."""


@app.command()
def retrain(
    run: RunOption,
    out: Annotated[
        Path,
        typer.Option("--out", help="Adapter directory to make; with --subsets the npz of losses."),
    ],
    ids: Annotated[
        str | None, typer.Option("--ids", help="Ids of the rows to leave out, separated by commas.")
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", help="File with one id per line.")
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Leave no row out: replay the training.")
    ] = False,
    edit: Annotated[
        Path | None,
        typer.Option(
            "--edit", help="Train on the rows as they are after this edit (its directory)."
        ),
    ] = None,
    keep_epochs: Annotated[
        str | None,
        typer.Option("--keep-epochs", help="Also save the adapter after these epochs: 1,3,6,10."),
    ] = None,
    stop_after: Annotated[
        int | None,
        typer.Option(
            "--stop-after", help="Stop after this epoch, at the rates of the whole recipe."
        ),
    ] = None,
    subsets: Annotated[
        int | None,
        typer.Option(
            "--subsets", help="Retrain on this many random subsets and measure their losses."
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option("--fraction", help="Share of the rows in a subset. Default: 0.5."),
    ] = None,
    subset_seed: Annotated[
        int | None, typer.Option("--subset-seed", help="Seed that draws the subsets. Default: 0.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries", help="Rows whose losses are measured under every subset's adapter."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="JSON: lr, epochs, batch_size, schedule, seed ..."),
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Train the adapter again without some rows: the exact answer that scores and edits predict.

    Or, with --subsets, on many random subsets, for analysis lds --truth; killed, the same command goes on.
    """
    from influence.rows import read_examples
    from influence.run import Run
    from unlearn.retraining.recipe import Recipe
    from unlearn.retraining.retrain import retrain as train_again
    from unlearn.retraining.subsets import random_halves, retrain_subsets

    _one_form(ids, ids_file, all_rows, edit, subsets)
    for_one = {"--keep-epochs": keep_epochs, "--stop-after": stop_after}
    for_many = {"--fraction": fraction, "--subset-seed": subset_seed, "--queries": queries}
    _refuse_given(for_many if subsets is None else for_one, subsets is not None)
    how = None if recipe is None else Recipe.read(recipe)
    if subsets is None:
        removed = [] if all_rows or edit is not None else _ids(ids, ids_file)
        epochs = _epochs(keep_epochs)
        console.quiet_transformers()
        opened = Run.open(run, device=device)
        made = train_again(
            opened,
            removed,
            out=out,
            recipe=how,
            checkpoints=epochs,
            stop_after=stop_after,
            edit=edit,
            overwrite=overwrite,
        )
        what = (
            f"without {len(removed)} rows" if edit is None else f"on the rows after the edit {edit}"
        )
        text = f"{made}: trained {what}"
        text += f"; also after epochs {', '.join(map(str, epochs))}" if epochs else ""
        console.emit({"out": str(made), "removed": removed, "checkpoints": epochs}, text, json)
        return
    if queries is None:
        raise InputError(
            "--subsets measures the losses of queries: name their file with --queries FILE"
        )
    asked = read_examples(queries)
    console.quiet_transformers()
    opened = Run.open(run, device=device)
    masks = random_halves(
        len(opened.train), subsets, subset_seed or 0, fraction=0.5 if fraction is None else fraction
    )
    done = retrain_subsets(opened, masks, asked, out=out, recipe=how, overwrite=overwrite)
    text = f"{done.path}: losses of {len(asked)} queries and {masks.shape[1]} rows under {subsets} retrained adapters"
    console.emit(
        {"out": str(done.path), "subsets": subsets, "queries": len(asked), "rows": masks.shape[1]},
        text,
        json,
    )


def _one_form(
    ids: str | None, ids_file: Path | None, all_rows: bool, edit: Path | None, subsets: int | None
) -> None:
    given = {
        "--ids": ids is not None,
        "--ids-file": ids_file is not None,
        "--all-rows": all_rows,
        "--edit": edit is not None,
    }
    given["--subsets"] = subsets is not None
    if sum(given.values()) != 1:
        named = " and ".join(name for name, there in given.items() if there) or "none of them"
        raise InputError(
            "give exactly one of --ids A,B,C, --ids-file FILE (one id per line), --all-rows, --edit DIR and --subsets N: "
            f"{named} was given"
        )


def _refuse_given(options: dict[str, object], subsets: bool) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        why = "cannot go with --subsets" if subsets else "goes with --subsets N only"
        raise InputError(f"{', '.join(given)} {why}: leave it out")


def _epochs(text: str | None) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")}) if text is not None else []
    except ValueError:
        raise InputError(
            f"--keep-epochs {text!r} was given; expected whole numbers, as in 1,3,6,10"
        ) from None


def _ids(ids: str | None, ids_file: Path | None) -> list[str]:
    from unlearn.record.change_files import read_ids

    if ids_file is not None:
        found = read_ids(ids_file)
    else:
        found = [part.strip() for part in (ids or "").split(",") if part.strip()]
    if not found:
        place = f"{ids_file} is empty: " if ids_file is not None else ""
        raise InputError(f"no ids were given: {place}name at least one row")
    return found


@app.command()
def verify(
    run: Annotated[
        Path | None, typer.Option("--run", help="Run directory whose edits are checked.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="One edit's directory, wherever it lies.")
    ] = None,
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Also add every recorded move to the old adapter and compare, bit for bit.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check the audit chain, every edit's record and adapter, and their digests; exit 1 names what is wrong."""
    from unlearn.record import verify

    if run is None and adapter is None:
        raise InputError(
            "give --run RUN (all its edits) or --adapter DIR (one edit, wherever it lies)"
        )
    found = verify.verify(run, adapter=adapter, apply=apply)
    result = {
        "passed": found.passed,
        "problems": found.problems,
        "checked": found.checked,
        "notes": found.notes,
    }
    console.emit(result, verify.render(found), json)
    if not found.passed:
        raise typer.Exit(1)


def _edit(
    kind: str,
    run: RunOption,
    ids: Annotated[
        str | None, typer.Option("--ids", help="Ids of the rows to remove, separated by commas.")
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", help="File with one id per line.")
    ] = None,
    changes: Annotated[
        Path | None,
        typer.Option(
            "--changes",
            help='JSON lines {"id", "completion"}, {"id", "prompt"} ... with the new content.',
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Adapter directory to make.")] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="1: the linear answer. Else the most steps. Default: 80."),
    ] = None,
    until: Annotated[
        str,
        typer.Option(
            "--until", help="expected, loss=X (nats per token), steps=N, norm=X, or converged."
        ),
    ] = "expected",
    max_damage: Annotated[
        float,
        typer.Option(
            "--max-damage",
            help="Allowed relative rise of the retained rows' loss; beyond it nothing is written.",
        ),
    ] = 0.1,
    rest: Annotated[
        int | None,
        typer.Option("--rest", help="Untouched rows in every step; 0: none. Default: 24."),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option(
            "--holdout", help="Rows the adapter never saw: measured, and a measure of unseen."
        ),
    ] = None,
    curvature: Annotated[
        str | None, typer.Option("--curvature", help="Another curvature that the run holds.")
    ] = None,
    damping: Annotated[
        str | None, typer.Option("--damping", help="Another damping rule than the fit's.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at", help="Point of the path whose curvature is used. Default: the middle one."
        ),
    ] = None,
    solver: Annotated[
        str, typer.Option("--solver", help="direct, cg, pcg, lissa, astra or sgd.")
    ] = "direct",
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="Adapter to edit: an earlier edit's directory, or original. Default: the last edit's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the retained rows.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Write the adapter whatever the damage.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast effect and cost; change and write nothing.")
    ] = False,
    device: DeviceOption = "auto",
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    from influence.rows import read_examples
    from influence.run import Run
    from unlearn.edits import Options, edit, forecast
    from unlearn.record.change_files import read_changes
    from unlearn.record.save import refuse_out
    from unlearn.retraining.retrain import refuse_taken

    asked: dict[str, Any] = {"remove": [], "relabel": {}, "correct": {}}
    if kind in ("remove", "edit") and (ids is not None or ids_file is not None):
        if ids is not None and ids_file is not None:
            raise InputError("--ids and --ids-file were both given: give one of them")
        asked["remove"] = _ids(ids, ids_file)
    elif kind == "remove":
        raise InputError(
            "name the rows to remove: --ids A,B,C or --ids-file FILE (one id per line)"
        )
    if changes is not None:
        found = read_changes(changes, None if kind == "edit" else kind)
        asked = {
            "remove": [*asked["remove"], *found["remove"]],
            "relabel": found["relabel"],
            "correct": found["correct"],
        }
    elif kind in ("relabel", "correct") or not asked["remove"]:
        raise InputError("name the changes: --changes FILE, one JSON object per line")
    if out is None and not dry_run:
        raise InputError(
            "name the adapter directory to make: --out DIR (or --dry-run, which makes none)"
        )
    unseen = None if holdout is None else read_examples(holdout)
    options: dict[str, Any] = {
        "until": until,
        "max_damage": max_damage,
        "curvature": curvature,
        "damping": damping,
    }
    options |= {"at": at, "solver": solver, "start": start, "seed": seed}
    options |= {
        key: value for key, value in (("steps", steps), ("rest", rest)) if value is not None
    }
    Options(**options)  # what can be refused before anything is loaded, is
    if out is not None and not dry_run:
        refuse_taken(out, overwrite)
    train = _rows_of(run)
    if train is not None:
        for id in [*asked["remove"], *asked["relabel"], *asked["correct"]]:
            train.index(id)
    console.quiet_transformers()
    opened = Run.open(
        run,
        train=train,
        device=device,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )
    if out is not None and not dry_run:
        refuse_out(opened, out, overwrite)
    if dry_run:
        ahead = forecast(opened, **asked, holdout=unseen, **options)
        console.emit(ahead, dry_run_text(ahead), json)
        return
    made = edit(opened, **asked, holdout=unseen, **options)
    assert out is not None
    report = {**made.report, "guard": {**made.report["guard"], "forced": force and not made.passed}}
    if not made.passed and not force:
        text = f"not written: the edit that was tried does too much damage\n\n{edit_text(report)}"
        console.emit({"written": False, "out": None, **report}, text, json)
    made.save(out, force=force, overwrite=overwrite)
    follow = (
        f"{out}: the edited adapter. Ship its configuration, weights and tokenizer; keep edit.json and delta.safetensors, which leads "
        f"back to the old adapter.\nNext: unlearn verify --run {opened.directory}; analysis report --edit {out} --out report.html"
    )
    console.emit(
        {"written": True, "out": str(out), **report},
        f"{edit_text(report)}\n\n{console.printable(follow)}",
        json,
    )


def _rows_of(run: Path) -> Any:
    """The run's training rows, read before the model is loaded; None where they came from no file."""
    from influence.manifest import read_manifest
    from influence.rows import read_examples

    path = read_manifest(run).data.path
    return None if path is None else read_examples(path)


def _register(kind: str, help: str, sources: tuple[str, ...]) -> None:
    """A command of `_edit` that takes the rows from these options only."""
    own = inspect.signature(_edit, eval_str=True)
    left_out = {"kind", *({"ids", "ids_file", "changes"} - set(sources))}
    parameters = [value for name, value in own.parameters.items() if name not in left_out]

    def command(**given: Any) -> None:
        _edit(kind, **given)

    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {value.name: value.annotation for value in parameters} | {
        "return": None
    }
    app.command(name=kind, help=help)(command)


_register(
    "remove", "Take training rows out of the adapter, without retraining.", ("ids", "ids_file")
)


_register("relabel", "Give training rows another completion, without retraining.", ("changes",))


_register(
    "correct",
    "Give training rows another prompt, completion or both, without retraining.",
    ("changes",),
)


_register(
    "edit",
    "Several kinds of change in one edit: removals, relabellings, corrections.",
    ("ids", "ids_file", "changes"),
)


@app.command()
def train(
    run: RunOption,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="A name from unlearn methods, or FILE.py:NAME with one of your own."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Adapter directory to make.")],
    ids: Annotated[
        str | None, typer.Option("--ids", help="Ids of the rows to unlearn, separated by commas.")
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", help="File with one id per line.")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option("--retain", help="Rows to keep. Default: the run's other rows.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            help="base (the rows' loss reaches the base model's; the usual default), expected, loss=X, or steps=N.",
        ),
    ] = None,
    lr: Annotated[
        str | None, typer.Option("--lr", help="Learning rate, or auto (GeN). Default: by --stride.")
    ] = None,
    stride: Annotated[
        float | None,
        typer.Option(
            "--stride",
            help="Length of the first step over the adapter's. Default: the method's own.",
        ),
    ] = None,
    numbers: Annotated[
        list[str] | None,
        typer.Option("--set", help="A number of the method, as in beta=0.05. May be repeated."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="The most steps. Default: the method's own.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Rows to unlearn in a step.")
    ] = 32,
    retain_batch_size: Annotated[
        int | None,
        typer.Option("--retain-batch-size", help="Retained rows in a step. Default: as many."),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help="A class of torch.optim. Default: the method's own."),
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="constant, linear or cosine.")
    ] = "constant",
    warmup: Annotated[int, typer.Option("--warmup", help="Steps of a linear rise.")] = 0,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="Clips the combined gradient.")
    ] = None,
    stop_damage: Annotated[
        float | None,
        typer.Option(
            "--stop-damage", help="Also stop when the retained rows' loss has risen by this share."
        ),
    ] = None,
    control: Annotated[
        float | None,
        typer.Option(
            "--control",
            help="Mix with the adapter before until this share of the retained rows' likelihood is left.",
        ),
    ] = None,
    max_damage: Annotated[
        float | None,
        typer.Option(
            "--max-damage",
            help="Allowed relative rise of the retained rows' loss; beyond it nothing is written.",
        ),
    ] = None,
    holdout: Annotated[
        Path | None,
        typer.Option("--holdout", help="Rows the adapter never saw: measured before and after."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            help="Adapter to begin with: an edit's directory, or original. Default: the last edit's.",
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            "--token-budget",
            help="Tokens that run at a time, padding included. Default: the fit's.",
        ),
    ] = None,
    save_every: Annotated[
        int,
        typer.Option("--save-every", help="Steps between two saves of the unfinished training."),
    ] = 25,
    seed: Annotated[
        int, typer.Option("--seed", help="Draws batches, random labels and refusals.")
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Write the adapter whatever the damage.")
    ] = False,
    device: DeviceOption = "auto",
    checkpointing: CheckpointingOption = False,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Unlearn training rows by gradient steps: ascent, NPO, NGDiff and others (unlearn methods lists them).

    Killed, the same command goes on; torchrun --nproc-per-node N -m -- unlearn train ... shares the rows out.
    """
    from influence import distributed
    from influence.rows import read_examples
    from influence.run import Run
    from unlearn.methods import loop, resume
    from unlearn.methods.methods import method_of
    from unlearn.methods.options import Options
    from unlearn.methods.preparation import refuse
    from unlearn.record import save
    from unlearn.retraining.retrain import refuse_taken

    if ids is not None and ids_file is not None:
        raise InputError("--ids and --ids-file were both given: give one of them")
    if ids is None and ids_file is None:
        raise InputError(
            "name the rows to unlearn: --ids A,B,C or --ids-file FILE (one id per line)"
        )
    asked = _ids(ids, ids_file)
    chosen = method_of(method, **_numbers(numbers or []))
    options: dict[str, Any] = {
        "until": until,
        "lr": _rate(lr),
        "stride": stride,
        "steps": steps,
        "batch_size": batch_size,
    }
    options |= {
        "retain_batch_size": retain_batch_size,
        "optimizer": optimizer,
        "schedule": schedule,
        "warmup": warmup,
    }
    options |= {
        "max_grad_norm": max_grad_norm,
        "stop_damage": stop_damage,
        "control": control,
        "max_damage": max_damage,
    }
    options |= {
        "start": start,
        "save_every": save_every,
        "seed": seed,
        "token_budget": token_budget,
    }
    refuse(
        chosen, Options(**options), retain is not None
    )  # what can be refused before anything is loaded, is
    refuse_taken(out, overwrite)
    kept = None if retain is None else read_examples(retain)
    unseen = None if holdout is None else read_examples(holdout)
    rows = _rows_of(run)
    if rows is not None:
        for id in asked:
            rows.index(id)
    console.quiet_transformers()
    device = distributed.join(device)
    opened = Run.open(
        run,
        train=rows,
        device=device,
        checkpointing=checkpointing,
        trust_remote_code=trust_remote_code,
    )
    save.refuse_out(opened, out, overwrite)
    checkpoint = out.with_name(out.name + ".training")
    made = loop.train(
        opened,
        chosen,
        asked,
        retain=kept,
        holdout=unseen,
        checkpoint=checkpoint,
        restart=overwrite,
        **options,
    )
    if distributed.rank() == 0:
        report = {
            **made.report,
            "guard": {**made.report["guard"], "forced": force and not made.passed},
        }
        text = edit_text(report)
        if not made.passed and not force:
            refused = f"not written: the training that was tried does too much damage\n\n{text}"
            console.emit({"written": False, "out": None, **report}, refused, json)
        made.save(out, force=force, overwrite=overwrite)
        resume.discard(checkpoint)
        follow = (
            f"{out}: the adapter. Ship its configuration, weights and tokenizer; keep edit.json, steps.jsonl and delta.safetensors, which "
            f"leads back to the old adapter.\nNext: unlearn verify --run {opened.directory}; analysis evaluate --adapter {out} ...\n"
            "The next edit or training of this run starts from it; --start original: from the run's own adapter."
        )
        text += f"\n\n{console.printable(follow)}"
        console.emit({"written": True, "out": str(out), **report}, text, json)
    distributed.leave()


def _rate(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--lr {text!r} was given; expected a number above 0, or auto") from None


def _numbers(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, equals, number = text.partition("=")
        try:
            found[name.strip().replace("-", "_")] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--set {text!r} was given; expected NAME=NUMBER, as in beta=0.05")
    return found


@app.command()
def methods(
    guide: Annotated[
        bool,
        typer.Option(
            "--guide", help="How to choose a method's learning rate, and what was measured."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """The methods of unlearn train: source, parts, what they need and cost."""
    from unlearn.methods.guide import guide_text, rates
    from unlearn.methods.methods import METHODS

    table = [make().describe() for make in METHODS.values()]
    if guide:
        console.emit({"rule": guide_text(), "measured": rates()}, guide_text(), json)
        return
    console.emit(table, methods_text(table), json)


@app.command()
def difficulty(
    run: RunOption,
    out: Annotated[Path, typer.Option("--out", help="Table to write: .csv or .parquet.")],
    ids: Annotated[
        str | None,
        typer.Option("--ids", help="Ids of the rows, separated by commas. Default: all."),
    ] = None,
    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", help="File with one id per line.")
    ] = None,
    by_group: Annotated[
        bool,
        typer.Option(
            "--by-group",
            help="All rows of a group (their field of that name) are unlearned together; --ids names any row of it.",
        ),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also unlearn every row alone and add what it took.")
    ] = False,
    calibrate: Annotated[
        int | None,
        typer.Option(
            "--calibrate",
            help="Unlearn this many rows (drawn by --seed) and correct the forecasts by them.",
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Loss to reach: base (the base model's) or unseen (expected by influence; costs hundreds of gradients a row).",
        ),
    ] = "base",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adam or sgd.")] = "adam",
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate. Default: 1e-4 (adam), 5e-3 (sgd).")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="The most steps.")] = 200,
    looks: Annotated[int, typer.Option("--looks", help="Gradients a row; 1 is a line scan.")] = 3,
    max_damage: Annotated[
        float,
        typer.Option(
            "--max-damage",
            help="Share of the retained loss that ascent may cost where it is recommended.",
        ),
    ] = 0.01,
    holdout: Annotated[
        Path | None,
        typer.Option(
            "--holdout",
            help="Rows the adapter never saw; measured too, and used by --target unseen.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Draws the retained sample, and the rows of --calibrate.")
    ] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Forecast how many steps of gradient ascent each training row takes, what that costs the others, and what to do instead.

    Nothing is unlearned and no adapter is written. With --measure or --calibrate rows are unlearned in memory, one by one; their
    measurements are kept beside the table (.difficulty.h5), so that a killed command goes on.
    """
    import numpy as np

    from influence.rows import read_examples
    from influence.run import Run
    from influence.tables import checked_table
    from unlearn import difficulty as known
    from unlearn.difficulty.calibration import FEWEST
    from unlearn.difficulty.units import find_units

    protocol = known.Protocol(optimizer=optimizer, lr=lr, target=target, steps=steps)
    out = checked_table(out, overwrite)
    if ids is not None and ids_file is not None:
        raise InputError("--ids and --ids-file were both given: give one of them")
    wanted = _ids(ids, ids_file) if ids is not None or ids_file is not None else None
    if calibrate is not None and measure:
        raise InputError(
            "--calibrate and --measure were given together: --measure unlearns all rows and corrects nothing"
        )
    for name, value, least in (
        ("--looks", looks, 1),
        ("--seed", seed, 0),
        ("--max-damage", max_damage, 0),
    ):
        if not value >= least:
            raise InputError(f"{name} {value:g} was given; expected at least {least}")
    if holdout is not None and not measure and calibrate is None and target == "base":
        raise InputError(
            "--holdout was given: it is for --target unseen, --measure or --calibrate; leave it out here"
        )
    unseen = None if holdout is None else read_examples(holdout)
    console.quiet_transformers()
    opened = Run.open(run, train=_rows_of(run), device=device, trust_remote_code=trust_remote_code)
    groups = _by_group(opened, wanted) if by_group else None
    count = len(opened.train if wanted is None else wanted) if groups is None else len(groups)
    if calibrate is not None and not FEWEST <= calibrate <= count:
        raise InputError(
            f"--calibrate {calibrate} was given with {count} rows (or groups) asked for; a calibration takes {FEWEST} of them or more: "
            "ask for more rows, or leave --calibrate out"
        )
    units = find_units(
        opened, None if groups is not None else wanted, groups, protocol, unseen, seed=seed
    )
    forecast = known.predict(
        opened, protocol=protocol, looks=looks, max_damage=max_damage, units=units
    )
    if measure or calibrate is not None:
        drawn = np.sort(np.random.default_rng(seed).permutation(count)[:calibrate])
        beside = out.with_name(out.stem + ".difficulty.h5")
        found = known.measure(
            opened,
            protocol=protocol,
            holdout=unseen,
            out=beside,
            overwrite=overwrite,
            units=units.select(drawn),
        )
        real = np.full((2, count), np.nan)
        real[:, drawn] = found.steps, found.damage
        if calibrate is not None:
            labels = (
                []
                if groups is not None
                else [opened.train[rows[0]].group for rows in units.members]
            )
            known_labels = [label for label in labels if label is not None]
            forecast = forecast.calibrated(
                real[0], real[1], known_labels if len(known_labels) == count else None, seed
            )
        forecast = forecast.with_measured(real[0], real[1])
    forecast.write(out, overwrite=overwrite)
    record = {"out": str(out), "rows": len(forecast), **forecast.record()}
    record["recommended"] = {
        key: int(number) for key, number in forecast.table["recommended"].value_counts().items()
    }
    console.emit(record, difficulty_text(forecast, out), json)


def _by_group(run: Any, asked: list[str] | None) -> dict[str, list[str]]:
    """All rows of every group that one of the asked rows is in; a row without a group is a unit of its own, by its id."""
    chosen = (
        {row.id for row in run.train}
        if asked is None
        else {run.train[run.train.index(id)].id for id in asked}
    )
    groups = {row.group for row in run.train if row.id in chosen and row.group is not None}
    found: dict[str, list[str]] = {}
    for row in run.train:
        if row.group in groups:
            found.setdefault(row.group, []).append(row.id)
        elif row.id in chosen:
            found.setdefault(row.id, []).append(row.id)
    return found


if __name__ == "__main__":
    main()
