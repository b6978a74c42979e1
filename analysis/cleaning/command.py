"""What `analysis clean` does: make a list and show it, or train again as one was decided."""

from __future__ import annotations

from analysis.cleaning.applied import apply, read_summary
from analysis.cleaning.cleaning import clean, refuse_folder
from analysis.cleaning.options import Clean
from analysis.cleaning.tables import applied_lines, applied_table, lines, table
from influence import console
from influence.options import DeviceOption, keywords
from influence.row_files import read_examples
from influence.run import Run
from unlearn.retraining.recipe import Recipe


def make_list(options: Clean) -> None:
    """Make a list of rows to look at, write it, and show its beginning."""
    assert options.run is not None
    assert options.out is not None
    refuse_folder(options.out, options.overwrite)
    queries = None
    if options.queries is not None:
        queries = read_examples(options.queries, columns=options.columns)
    console.quiet_transformers()
    run = Run.open(
        options.run,
        trust_remote_code=options.trust_remote_code,
        **keywords(DeviceOption, options),
    )
    result = clean(run, queries, out=options.out, most=options.most, overwrite=options.overwrite)
    if options.json:
        console.emit({"out": str(options.out), **result.summary}, "", True)
        return
    console.show(table(result))
    console.show(console.printable("\n".join(lines(result, options.out))), wrap=False)


def train_again(options: Clean) -> None:
    """Train again on the rows as they were decided to be, and show what that changed."""
    assert options.apply is not None
    summary = read_summary(options.apply)
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    holdout = None
    if options.holdout is not None:
        holdout = read_examples(options.holdout, columns=options.columns)
    console.quiet_transformers()
    run = Run.open(
        summary["run"],
        trust_remote_code=options.trust_remote_code,
        **keywords(DeviceOption, options),
    )
    record = apply(
        options.apply,
        run,
        holdout=holdout,
        recipe=recipe,
        adapter_out=options.adapter_out,
        take_suggested=options.take_suggested,
        seeds=options.seeds,
        seed=options.seed,
        resamples=options.resamples,
        overwrite=options.overwrite,
    )
    if options.json:
        console.emit(record, "", True)
        return
    console.show(applied_table(record))
    console.show(console.printable("\n".join(applied_lines(record))), wrap=False)
