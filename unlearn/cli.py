"""The `unlearn` command: retrain, without, verify, remove, relabel, correct, edit, train, difficulty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from influence import console
from influence.errors import InputError
from influence.options import (
    BudgetOptions,
    DeviceOption,
    JsonOption,
    LoadingOptions,
    MemoryOption,
    OutputOptions,
    RowsOptions,
    RunOption,
    command,
    keywords,
    option,
)
from influence.row_ids import named_ids
from unlearn import answers, words
from unlearn.difficulty.options import Difficulty
from unlearn.edits.options import Options as EditOptions
from unlearn.methods.options import Options as TrainOptions
from unlearn.options import ForceOption, HoldoutOption
from unlearn.retraining.options import SUBSET_FRACTION, SUBSET_SEED, Retrain

if TYPE_CHECKING:  # a command's help does not wait for torch
    from influence.rows import Examples
    from unlearn.record.edit_record import EditRecord
    from unlearn.record.save import Edit
    from unlearn.retraining.recipe import Recipe

app = console.app("Change an adapter as if training rows had been absent or different.")
main = console.main(app)


@app.callback()
def _group() -> None:
    """Change an adapter as if training rows had been absent or different."""


# ---- training again --------------------------------------------------------------------------


@command(app, Retrain, shared=True)
def retrain(options: Retrain) -> None:
    """Train the adapter again without some rows: the exact answer that scores and edits predict.

    Or, with --subsets, on many random subsets, for analysis lds --truth; killed, the same command
    goes on. Processes that torchrun started deal the subsets out.
    """
    from unlearn.retraining.recipe import Recipe

    if options.subsets is None and console.several():
        raise InputError(
            "one training is one process's work: leave torchrun out, or give --subsets N, which "
            "processes deal out"
        )
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    if options.subsets is None:
        _retrain_once(options, recipe)
    else:
        _retrain_on_subsets(options, options.subsets, recipe)


def _retrain_once(options: Retrain, recipe: Recipe | None) -> None:
    from influence.run import Run
    from unlearn.retraining.retrain import retrain as train_again

    rows = rows_of(options.run)
    removed = named_ids(options, rows) or []
    kept_epochs = list(options.keep_epochs or ())
    console.quiet_transformers()
    folder = train_again(
        Run.open(options.run, train=rows, **keywords(DeviceOption, options)),
        removed,
        out=options.out,
        recipe=recipe,
        checkpoints=kept_epochs,
        stop_after=options.stop_after,
        edit=options.edit,
        overwrite=options.overwrite,
    )
    rows = f"without {len(removed)} rows"
    if options.edit is not None:
        rows = f"on the rows after the edit {options.edit}"
    text = f"{folder}: trained {rows}"
    if kept_epochs:
        text += f"; also after epochs {', '.join(map(str, kept_epochs))}"
    result = {"out": str(folder), "removed": removed, "checkpoints": kept_epochs}
    console.emit(result, text, options.json)


def _retrain_on_subsets(options: Retrain, subsets: int, recipe: Recipe | None) -> None:
    from influence import distributed
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn.retraining.subsets import random_halves, retrain_subsets

    assert options.queries is not None
    queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    options = replace(options, device=distributed.join(options.device))
    run = Run.open(options.run, **keywords(DeviceOption, options))
    fraction = SUBSET_FRACTION if options.fraction is None else options.fraction
    seed = SUBSET_SEED if options.subset_seed is None else options.subset_seed
    masks = random_halves(len(run.train), subsets, seed, fraction=fraction)
    retrained = retrain_subsets(
        run, masks, queries, out=options.out, recipe=recipe, overwrite=options.overwrite
    )
    rows = masks.shape[1]
    text = (
        f"{retrained.path}: losses of {len(queries)} queries and {rows} rows "
        f"under {subsets} retrained adapters"
    )
    result = {"out": str(retrained.path), "subsets": subsets, "queries": len(queries), "rows": rows}
    console.emit(result, text, options.json)
    distributed.leave()


command(app, answers.Without)(answers.without)

# ---- the audit chain --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verify(JsonOption):
    """The options of `unlearn verify`."""

    run: Path | None = option(
        "Run directory whose edits are checked.", default=None, also=["--run-dir"]
    )
    adapter: Path | None = option("One edit's directory, wherever it lies.", default=None)
    apply: bool = option(
        "Also add every recorded move to the old adapter and compare, bit for bit.", default=False
    )


@command(app, Verify)
def verify(options: Verify) -> None:
    """Check the audit chain, every edit's record and adapter, and their digests; exit 1 names what
    is wrong.
    """
    from unlearn.record import verify

    if options.run is None and options.adapter is None:
        raise InputError(
            "give --run RUN (all its edits) or --adapter DIR (one edit, wherever it lies)"
        )
    verified = verify.verify(options.run, adapter=options.adapter, apply=options.apply)
    result = {
        "passed": verified.passed,
        "problems": verified.problems,
        "checked": verified.checked,
        "notes": verified.notes,
    }
    console.emit(result, verify.render(verified), options.json)
    if not verified.passed:
        raise SystemExit(1)


# ---- edits by influence ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Edited(
    RunOption, EditOptions, HoldoutOption, ForceOption, BudgetOptions, LoadingOptions, OutputOptions
):
    """The options of every edit by influence."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "holdout": "rest",
        "probes": "holdout",
        "generate": "probes",
        "columns": "generate",
        "dry_run": "force",
    }

    out: Path | None = option("Adapter directory to make.", default=None)
    dry_run: bool = option("Forecast effect and cost; change and write nothing.", default=False)


@dataclass(frozen=True, kw_only=True)
class ChangesOption:
    """The new contents of an edit."""

    changes: Path | None = option(
        'JSON lines {"id", "completion"}, {"id", "prompt"} ... with the new content.', default=None
    )


@dataclass(frozen=True, kw_only=True)
class Remove(RowsOptions, Edited):
    """The options of `unlearn remove`."""


@dataclass(frozen=True, kw_only=True)
class Relabel(ChangesOption, Edited):
    """The options of `unlearn relabel` and `unlearn correct`."""


@dataclass(frozen=True, kw_only=True)
class Several(RowsOptions, ChangesOption, Edited):
    """The options of `unlearn edit`."""


@command(app, Remove, shared=True)
def remove(options: Remove) -> None:
    """Take training rows out of the adapter, without retraining."""
    _refuse_nameless(options, "remove")
    rows = _rows_to_edit(options)
    _edit(options, {"remove": named_ids(options, rows), "relabel": {}, "correct": {}}, rows)


@command(app, Relabel, shared=True)
def relabel(options: Relabel) -> None:
    """Give training rows another completion, without retraining."""
    _edit(options, _changes(options, "relabel"), _rows_to_edit(options))


@command(app, Relabel, shared=True)
def correct(options: Relabel) -> None:
    """Give training rows another prompt, completion or both, without retraining."""
    _edit(options, _changes(options, "correct"), _rows_to_edit(options))


@command(app, Several, shared=True)
def edit(options: Several) -> None:
    """Several kinds of change in one edit: removals, relabellings, corrections."""
    changes: dict[str, Any] = {"remove": [], "relabel": {}, "correct": {}}
    if options.changes is not None or options.ids is options.ids_file is None:
        changes = _changes(options, None)
    rows = _rows_to_edit(options)
    ids = named_ids(options, rows) or []
    _edit(options, changes | {"remove": [*ids, *changes["remove"]]}, rows)


def _refuse_nameless(options: RowsOptions, action: str) -> None:
    """Refuse a call that names no rows."""
    if options.ids is options.ids_file is None:
        raise InputError(
            f"name the rows to {action}: --ids A,B,C or --ids-file FILE (one id per line)"
        )


def _changes(options: ChangesOption, kind: str | None) -> dict[str, Any]:
    """The changes of the file by kind, all of `kind` where it is given."""
    from unlearn.record.change_files import read_changes

    if options.changes is None:
        raise InputError("name the changes: --changes FILE, one JSON object per line")
    changes = read_changes(options.changes, kind)
    return {**changes, "remove": list(changes["remove"])}


def _rows_to_edit(options: Edited) -> Examples | None:
    """The run's training rows, once it is known that the edit has a place to go."""
    from unlearn.record.outputs import refuse_taken

    if options.out is None and not options.dry_run:
        raise InputError(
            "name the adapter directory to make: --out DIR (or --dry-run, which makes none)"
        )
    if options.out is not None and not options.dry_run:
        refuse_taken(options.out, options.overwrite)
    return rows_of(options.run)


def _edit(options: Edited, changes: Mapping[str, Any], rows: Examples | None) -> None:
    """Make an edit of `changes` (ids or new contents by kind) or forecast it, save and show it.

    Processes that torchrun started share the rows out; the first saves and shows.
    """
    from influence import distributed
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn import edits
    from unlearn.record.outputs import refuse_out

    out = None if options.dry_run else options.out
    holdout, probes = (
        None if path is None else read_examples(path, columns=options.columns)
        for path in (options.holdout, options.probes)
    )
    _refuse_unknown(rows, [id for requests in changes.values() for id in requests])
    console.quiet_transformers()
    options = replace(options, device=distributed.join(options.device))
    run = Run.open(
        options.run,
        train=rows,
        **keywords(LoadingOptions, options),
    )
    how = keywords(EditOptions, options)
    if out is None:
        ahead = edits.forecast(run, **changes, holdout=holdout, probes=probes, **how)
        console.emit(ahead, words.dry_run_text(ahead), options.json)
        distributed.leave()
        return
    refuse_out(run, out, options.overwrite)
    made = edits.edit(run, **changes, holdout=holdout, probes=probes, **how)
    record = distributed.at_first(lambda: _saved(made, options, out, "edit"))
    _emit(record, out, words.after_edit_text(out, run.directory), options)
    distributed.leave()


def rows_of(run: Path, ids: Iterable[str] = ()) -> Examples | None:
    """The run's training rows, None where they came from no file.

    They are read before the model is loaded. Raises `InputError` for an id that no row has.
    """
    from influence.manifest import read_manifest
    from influence.row_files import read_again
    from influence.run import refuse_moved

    manifest = read_manifest(run)
    if manifest.data.path is None:
        return None
    refuse_moved(run, manifest)
    rows = read_again(manifest.data.path, manifest.data.columns)
    _refuse_unknown(rows, ids)
    return rows


def _refuse_unknown(rows: Examples | None, ids: Iterable[str]) -> None:
    """Refuse ids that no row has, by the nearest ones."""
    for id in ids:
        if rows is not None:
            rows.index(id)


def _saved(made: Edit, options: Edited | Train, out: Path, what: str) -> EditRecord:
    """Save an edit and return its record, or show the edit before `save` refuses it."""
    record = made.record.saved(forced=options.force and not made.passed)
    if not made.passed and not options.force:
        refusal = f"not written: the {what} that was tried does too much damage"
        result = {"written": False, "out": None, **record.as_json()}
        console.emit(result, f"{refusal}\n\n{words.edit_text(record)}", options.json)
    made.save(out, force=options.force, overwrite=options.overwrite)
    return record


def _emit(record: EditRecord, out: Path, follow: str, options: JsonOption) -> None:
    """Show the record of an edit that was saved, and what to do next."""
    result = {"written": True, "out": str(out), **record.as_json()}
    text = f"{words.edit_text(record)}\n\n{console.printable(follow)}"
    console.emit(result, text, options.json)


# ---- training by gradient steps --------------------------------------------------------------


def numbers(texts: Iterable[str]) -> dict[str, float]:
    """Numbers of a method as they are typed, `NAME=NUMBER`, else `InputError`."""
    values = {}
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            values[name.strip().replace("-", "_")] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise InputError(f"--set {text!r} was given; expected NAME=NUMBER, as in beta=0.05")
    return values


@dataclass(frozen=True, kw_only=True)
class Train(
    RunOption,
    RowsOptions,
    TrainOptions,
    HoldoutOption,
    ForceOption,
    MemoryOption,
    LoadingOptions,
    OutputOptions,
):
    """The options of `unlearn train`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "retain": "ids_file",
        "numbers": "stride",
        "holdout": "max_damage",
        "probes": "holdout",
        "generate": "probes",
        "columns": "generate",
    }

    method: str = option("A name from unlearn methods, or FILE.py:NAME with one of your own.")
    out: Path = option("Adapter directory to make.")
    retain: Path | None = option("Rows to keep. Default: the run's other rows.", default=None)
    numbers: Mapping[str, float] | None = option(
        "A number of the method, as in beta=0.05. May be repeated.",
        default=None,
        flag="--set",
        typed=list[str] | None,
        read=numbers,
    )


@command(app, Train, shared=True)
def train(options: Train) -> None:
    """Unlearn training rows by gradient steps: ascent, NPO, NGDiff and others (unlearn methods
    lists them).

    Killed, the same command goes on; torchrun --nproc-per-node N -m -- unlearn train ... shares the
    rows out. The -- keeps torchrun from reading --run and --start as its own (--run-dir and
    --start-from are taken for them, and it never mistakes these).
    """
    from influence import distributed
    from influence.row_files import read_examples
    from influence.run import Run
    from unlearn.methods import loop, resume
    from unlearn.methods.methods import method_of
    from unlearn.methods.preparation import refuse
    from unlearn.record.outputs import refuse_out, refuse_taken

    _refuse_nameless(options, "unlearn")
    method = method_of(options.method, **(options.numbers or {}))
    refuse(method, options, options.retain is not None)
    refuse_taken(options.out, options.overwrite)
    retain, holdout, probes = (
        None if path is None else read_examples(path, columns=options.columns)
        for path in (options.retain, options.holdout, options.probes)
    )
    rows = rows_of(options.run)
    ids = named_ids(options, rows) or []
    _refuse_unknown(rows, ids)
    console.quiet_transformers()
    loading = keywords(LoadingOptions, options)
    loading["device"] = distributed.join(options.device)
    run = Run.open(
        options.run,
        train=rows,
        **loading,
    )
    refuse_out(run, options.out, options.overwrite)
    checkpoint = options.out.with_name(options.out.name + ".training")
    made = loop.train(
        run,
        method,
        ids,
        retain=retain,
        holdout=holdout,
        probes=probes,
        checkpoint=checkpoint,
        restart=options.overwrite,
        **keywords(TrainOptions, options),
    )
    if distributed.rank() == 0:
        record = _saved(made, options, options.out, "training")
        resume.discard(checkpoint)
        _emit(record, options.out, words.after_training_text(options.out, run.directory), options)
    distributed.leave()


@dataclass(frozen=True, kw_only=True)
class Methods(JsonOption):
    """The options of `unlearn methods`."""

    guide: bool = option(
        "How to choose a method's learning rate, and what was measured.", default=False
    )


@command(app, Methods)
def methods(options: Methods) -> None:
    """The methods of unlearn train: source, parts, what they need and cost."""
    from unlearn.methods.guide import guide_text, rates
    from unlearn.methods.methods import METHODS

    if options.guide:
        console.emit({"rule": guide_text(), "measured": rates()}, guide_text(), options.json)
        return
    table = [make().describe() for make in METHODS.values()]
    console.emit(table, words.methods_text(table), options.json)


# ---- difficulty ------------------------------------------------------------------------------


@command(app, Difficulty, shared=True)
def difficulty(options: Difficulty) -> None:
    """Forecast how many steps of gradient ascent each training row takes, what that costs the
    others, and what to do instead.

    Nothing is unlearned and no adapter is written. With --measure or --calibrate rows are unlearned
    in memory, one by one; their measurements are kept beside the table (.difficulty.h5), so that a
    killed command goes on. Processes that torchrun started deal the rows out.
    """
    from influence import distributed
    from influence.row_files import read_examples
    from influence.run import Run
    from influence.tables import checked_table
    from unlearn.difficulty import Protocol
    from unlearn.difficulty.command import by_group, forecast_of, refuse_calibration
    from unlearn.difficulty.screening import check_screen, say_cost
    from unlearn.difficulty.units import find_units
    from unlearn.retraining.recipe import recipe_at

    protocol = Protocol(
        optimizer=options.optimizer,
        lr=options.lr,
        stride=options.stride,
        target=options.target,
        steps=options.steps,
        recipe=None if options.recipe is None else recipe_at(options.recipe),
    )
    screen = options.close_looks
    check_screen(screen)
    out = checked_table(options.out, options.overwrite)
    rows = rows_of(options.run)
    ids = named_ids(options, rows)
    holdout = (
        None if options.holdout is None else read_examples(options.holdout, columns=options.columns)
    )
    console.quiet_transformers()
    options = replace(options, device=distributed.join(options.device))
    run = Run.open(options.run, train=rows, **keywords(LoadingOptions, options))
    groups = by_group(run, ids) if options.by_group else None
    if groups is not None:
        count, ids = len(groups), None
    else:
        count = len(run.train if ids is None else ids)
    refuse_calibration(options.calibrate, min(count, screen or count))
    say_cost(run, ids, groups, looks=options.looks, screen=screen)
    memory = None if options.memory is None else int(options.memory * 1e9)
    units = find_units(run, ids, groups, protocol, holdout, seed=options.seed, memory=memory)
    forecast = forecast_of(options, protocol, run, units, holdout)
    forecast.write(out, overwrite=options.overwrite)
    counts = forecast.table["recommended"].value_counts()
    record = {"out": str(out), "rows": len(forecast), **forecast.record()}
    record["recommended"] = {method: int(number) for method, number in counts.items()}
    console.emit(record, words.difficulty_text(forecast, out), options.json)
    distributed.leave()


if __name__ == "__main__":
    main()
