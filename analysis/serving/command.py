"""The command `analysis serve`: the explorer of a run on this machine, with questions of one's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import typer

from analysis.explorer.options import ExploredOptions
from influence import console
from influence.options import JsonOption, LoadingOptions, RunOption, command, keywords, option

if TYPE_CHECKING:  # a command's help does not wait for torch
    from influence.run import Run


@dataclass(frozen=True, kw_only=True)
class Serve(RunOption, ExploredOptions, LoadingOptions, JsonOption):
    """The options of `analysis serve`."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"run": ""}

    port: int = option("Port of this machine; 0 chooses a free one.", default=0)


def serve(options: Serve) -> None:
    """Serve the page of a run on this machine, and answer questions that you type.

    It is for runs too large for one file, and for asking what the adapter says, and which rows are
    behind it. Nothing outside this machine reaches it.

    Open the printed address; it holds a token, without which nothing is answered. Ctrl-C ends it.
    """
    from analysis.explorer.data import gather
    from analysis.serving.server import prepared

    console.quiet_transformers()
    explored = gather(options.run, **keywords(ExploredOptions, options))

    def open_run() -> Run:
        from influence.run import Run

        train = explored.rows.examples  # which are in memory already
        return Run.open(options.run, train=train, **keywords(LoadingOptions, options))

    serving = prepared(explored, open_run, port=options.port)
    text = f"{serving.address}\nOpen this address in a browser on this machine; Ctrl-C ends it."
    console.emit({"address": serving.address}, text, options.json)
    sys.stdout.flush()
    serving.run()
    print("stopped", file=sys.stderr, flush=True)
    if serving.desk.busy:  # its thread cannot be stopped, and nobody waits for it
        os._exit(0)


def add(app: typer.Typer) -> None:
    """Register the command."""
    command(app, Serve)(serve)
