"""What the three command lines share: exit statuses, error texts, output, quiet libraries."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from influence.errors import InputError, ToolkitError, memory_is_short
from influence.messages import printable as printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


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
            application()
        except ToolkitError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            sys.exit(error.exit_status)
        except KeyboardInterrupt:
            _interrupted()
        except SystemExit as end:
            if end.code != 130:
                raise
            _interrupted()  # typer makes this of a KeyboardInterrupt
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (MemoryError, OSError, RuntimeError) as error:
            if os.environ.get("LORA_INFLUENCE_DEBUG"):
                raise
            hint = (
                "lower --token-budget, or load the base with --dtype bfloat16; "
                if memory_is_short(error)
                else ""
            )
            message = f"{type(error).__name__}: {printable(str(error))}"
            where = f"({hint}LORA_INFLUENCE_DEBUG=1 shows where)"
            print(f"error: {message}\n{where}", file=sys.stderr)
            sys.exit(1)

    return run


def _interrupted() -> None:
    print(
        "interrupted; what fit, score, train and retrain --subsets had saved is kept: "
        "the same command goes on from there",
        file=sys.stderr,
    )
    sys.exit(1)


def emit(result: dict[str, Any] | list[dict[str, Any]], text: str, as_json: bool) -> None:
    """Print a result: JSON for a program, or text for a person."""
    if as_json:
        text = json.dumps(finite(result), ensure_ascii=False, default=str, allow_nan=False)
    print(text)


def show(part: Table | Text | str, *, wrap: bool = True) -> None:
    """Print a table, or text as it is, for a person, with `wrap` at the terminal's width."""
    from rich.console import Console

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
    print(f"warning: {printable(str(message))}", file=sys.stderr)
