"""The `unlearn` command: retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence import console
from influence.cli import DeviceOption, JsonOption, OverwriteOption, RunOption
from influence.errors import InputError

app = console.app("Change an adapter as if training rows had been absent or different.")
main = console.main(app)


@app.callback()
def _group() -> None:
    """Change an adapter as if training rows had been absent or different."""


@app.command()
def retrain(
    run: RunOption,
    out: Annotated[Path, typer.Option("--out", help="Adapter directory to make; with --subsets the npz of losses.")],
    ids: Annotated[str | None, typer.Option("--ids", help="Ids of the rows to leave out, separated by commas.")] = None,
    ids_file: Annotated[Path | None, typer.Option("--ids-file", help="File with one id per line.")] = None,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Leave no row out: replay the training.")] = False,
    keep_epochs: Annotated[
        str | None, typer.Option("--keep-epochs", help="Also save the adapter after these epochs: 1,3,6,10.")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option("--stop-after", help="Stop after this epoch, at the rates of the whole recipe.")
    ] = None,
    subsets: Annotated[
        int | None, typer.Option("--subsets", help="Retrain on this many random subsets and measure their losses.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option("--fraction", help="Share of the rows in a subset. Default: 0.5.")
    ] = None,
    subset_seed: Annotated[
        int | None, typer.Option("--subset-seed", help="Seed that draws the subsets. Default: 0.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option("--queries", help="Rows whose losses are measured under every subset's adapter.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="JSON: lr, epochs, batch_size, schedule, seed ...")
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Train the adapter again without some rows: the exact answer that scores and edits predict.

    Or, with --subsets, on many random subsets, for analysis lds --truth; killed, the same command goes on.
    """
    from influence.data import read_examples
    from influence.run import Run
    from unlearn.retrain import Recipe, random_halves, retrain_subsets
    from unlearn.retrain import retrain as train_again

    _one_form(ids, ids_file, all_rows, subsets)
    for_one = {"--keep-epochs": keep_epochs, "--stop-after": stop_after}
    for_many = {"--fraction": fraction, "--subset-seed": subset_seed, "--queries": queries}
    _refuse_given(for_many if subsets is None else for_one, subsets is not None)
    how = None if recipe is None else Recipe.read(recipe)
    if subsets is None:
        removed = [] if all_rows else _ids(ids, ids_file)
        epochs = _epochs(keep_epochs)
        console.quiet_transformers()
        opened = Run.open(run, device=device)
        made = train_again(
            opened, removed, out=out, recipe=how, checkpoints=epochs, stop_after=stop_after, overwrite=overwrite
        )
        text = f"{made}: trained without {len(removed)} rows"
        text += f"; also after epochs {', '.join(map(str, epochs))}" if epochs else ""
        console.emit({"out": str(made), "removed": removed, "checkpoints": epochs}, text, json)
        return
    if queries is None:
        raise InputError("--subsets measures the losses of queries: name their file with --queries FILE")
    asked = read_examples(queries)
    console.quiet_transformers()
    opened = Run.open(run, device=device)
    masks = random_halves(len(opened.train), subsets, subset_seed or 0, fraction=0.5 if fraction is None else fraction)
    done = retrain_subsets(opened, masks, asked, out=out, recipe=how, overwrite=overwrite)
    text = f"{done.path}: losses of {len(asked)} queries and {masks.shape[1]} rows under {subsets} retrained adapters"
    console.emit({"out": str(done.path), "subsets": subsets, "queries": len(asked), "rows": masks.shape[1]}, text, json)


def _one_form(ids: str | None, ids_file: Path | None, all_rows: bool, subsets: int | None) -> None:
    given = {"--ids": ids is not None, "--ids-file": ids_file is not None, "--all-rows": all_rows}
    given["--subsets"] = subsets is not None
    if sum(given.values()) != 1:
        named = " and ".join(name for name, there in given.items() if there) or "none of them"
        raise InputError(
            "give exactly one of --ids A,B,C, --ids-file FILE (one id per line), --all-rows and --subsets N: "
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
        raise InputError(f"--keep-epochs {text!r} was given; expected whole numbers, as in 1,3,6,10") from None


def _ids(ids: str | None, ids_file: Path | None) -> list[str]:
    if ids_file is not None:
        try:
            text = ids_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--ids-file {ids_file} cannot be read: {error}") from error
        found = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        found = [part.strip() for part in (ids or "").split(",") if part.strip()]
    if not found:
        raise InputError("no ids were given; name at least one row")
    return found


if __name__ == "__main__":
    main()
