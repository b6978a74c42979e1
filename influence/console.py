"""What the three command lines share: exit statuses, error texts, output, quiet libraries."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from influence.errors import InputError, ToolkitError, memory_is_short
from influence.messages import printable as printable
from influence.progress import speaks

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from influence.row_table import RowTable

#: What is said of a call that was interrupted.
INTERRUPTED = (
    "interrupted; what fit, score, train and retrain --subsets had saved is kept: "
    "the same command goes on from there"
)


#: Seconds that the first of several processes has to tell of wrong options.
FIRST_SECONDS = 60.0


def app(help: str) -> typer.Typer:
    """A command group with plain help and no shell-completion options."""
    return typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def main(application: typer.Typer) -> Callable[[], None]:
    """The entry point of a command group.

    Its exit status is 0, 1 (the work failed) or 2 (the call was wrong).
    """

    def run() -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.showwarning = _one_line_warning
        for stream in (sys.stdout, sys.stderr):  # a terminal without some characters shows escapes
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
        # it speaks of kernels that nobody asked for
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            with _first_process_alone():
                application()
        except ToolkitError as error:
            _fail(f"error: {printable(str(error))}", error.exit_status)
        except KeyboardInterrupt:
            _fail(INTERRUPTED)
        except SystemExit as end:
            if end.code == 2 and _another():  # typer's own words, which the first process says
                time.sleep(FIRST_SECONDS)  # torchrun ends this one as soon as it has
            if end.code != 130:
                raise
            _fail(INTERRUPTED)  # typer makes this of a KeyboardInterrupt
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (MemoryError, OSError, RuntimeError) as error:
            if os.environ.get("LORA_INFLUENCE_DEBUG"):
                raise
            hint = (
                "lower --token-budget or --memory, or load the base with --dtype bfloat16; "
                if memory_is_short(error)
                else ""
            )
            message = f"{type(error).__name__}: {printable(str(error))}"
            where = f"({hint}LORA_INFLUENCE_DEBUG=1 shows where)"
            _fail(f"error: {message}\n{where}")

    return run


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether torchrun started this process and others."""
    return processes() > 1


def _another() -> bool:
    """Whether this process is another than the first."""
    return several() and os.environ.get("RANK", "0") != "0"


def _first_process_alone() -> AbstractContextManager[object]:
    """Of several processes the first tells of wrong options, which are wrong in all of them."""
    return redirect_stderr(io.StringIO()) if _another() else nullcontext()


def _fail(message: str, status: int = 1) -> NoReturn:
    """Tell why the call failed, and end.

    Of several processes one tells, and all end with its status, without waiting for each other.
    """
    told = True
    if several():
        from influence import distributed

        told, status = distributed.tells(status)
    if told:
        print(message, file=sys.stderr, flush=True)
    if several():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def emit(result: dict[str, Any] | list[dict[str, Any]], text: str, as_json: bool) -> None:
    """Print a result: JSON for a program, or text for a person. Of several processes the first
    prints it.
    """
    if not speaks():
        return
    if as_json:
        text = json.dumps(finite(result), ensure_ascii=False, default=str, allow_nan=False)
    print(text)


def show(part: Table | RowTable | Text | str, *, wrap: bool = True) -> None:
    """Print a table, or text as it is, for a person, with `wrap` at the terminal's width.

    Of several processes the first prints it.
    """
    from rich.console import Console

    if speaks():
        Console().print(part, markup=False, highlight=False, soft_wrap=not wrap)


def at_least(flag: str, value: float, least: int) -> None:
    """Raise `InputError` where the number given with `flag` is below `least`, or NaN."""
    if not value >= least:
        number = f"{value:g}" if isinstance(value, float) else value
        raise InputError(f"{flag} {number} was given; expected at least {least}")


def quiet_transformers() -> None:
    """Switch transformers' own progress bars off, since ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def finite(value: Any) -> Any:
    """A value for JSON, which has neither NaN nor infinity: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return finite(value.tolist()) if hasattr(value, "tolist") else value


def _one_line_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        return
    if speaks():
        print(f"warning: {printable(str(message))}", file=sys.stderr)
