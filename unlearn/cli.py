"""The `unlearn` command: retrain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence import console
from influence.cli import DeviceOption, JsonOption, OverwriteOption, RunOption

app = console.app("Change an adapter as if training rows had been absent or different.")
main = console.main(app)


@app.callback()
def _group() -> None:
    """Change an adapter as if training rows had been absent or different."""


@app.command()
def retrain(
    run: RunOption,
    out: Annotated[Path, typer.Option("--out", help="Adapter directory to make.")],
    ids: Annotated[str | None, typer.Option("--ids", help="Ids of the rows to leave out, separated by commas.")] = None,
    ids_file: Annotated[Path | None, typer.Option("--ids-file", help="File with one id per line.")] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="JSON: lr, epochs, batch_size, schedule, seed ...")
    ] = None,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Train the adapter again without some rows: the exact answer that scores and edits predict."""
    from influence.run import Run
    from unlearn.retrain import Recipe
    from unlearn.retrain import retrain as train_again

    removed = _ids(ids, ids_file)
    how = None if recipe is None else Recipe.read(recipe)
    console.quiet_transformers()
    made = train_again(Run.open(run, device=device), removed, out=out, recipe=how, overwrite=overwrite)
    console.emit({"out": str(made), "removed": removed}, f"{made}: trained without {len(removed)} rows", json)


def _ids(ids: str | None, ids_file: Path | None) -> list[str]:
    from influence.errors import InputError

    if (ids is None) == (ids_file is None):
        raise InputError("give the rows with either --ids A,B,C or --ids-file FILE (one id per line)")
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
