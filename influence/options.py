"""Command-line options, each declared once as a field of a frozen dataclass, with its help.

A command is a function of one dataclass of options, which `command(app, Options)` registers.
Options that several commands share are base classes. `--help` lists a command's own options first,
then those of its bases from left to right, except where `LISTED_AFTER` names another place.

The same dataclass serves the Python API where its fields are the keywords of a function: `typed`
and `read` translate for a field that takes more there than can be typed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_type_hints

import typer
from typer.core import TyperCommand

from influence import console
from influence.errors import InputError

if TYPE_CHECKING:  # a command's help does not wait for torch
    from influence.damping import Damping

T = TypeVar("T")


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field.

    Attributes
    ----------
    help : str
        What `--help` says of it.
    default
        Its value where it is not typed; `MISSING`: it must be.
    flag : str
        How it is typed; empty: the field's name, as in `--max-length`.
    also : sequence of str
        Other spellings that are taken, and that `--help` does not list.
    typed : type or None
        What the command line reads; None: the field's own type.
    read : callable
        Makes the field's value of what was read.
    several : bool
        Whether several values may follow the flag, as in `--checkpoints A B C`.
    """

    help: str
    default: Any = MISSING
    flag: str = ""
    also: Sequence[str] = ()
    typed: Any = None
    read: Callable[[Any], Any] = _same
    several: bool = False


def option(help: str, *, default: Any = MISSING, **rest: Any) -> Any:
    """Declare a dataclass field as an option, with other fields of `Option` in `rest`."""
    return field(default=default, metadata={"option": Option(help, default, **rest)})


def options_of(options: type) -> dict[str, Option]:
    """The options of a dataclass by field, in the order of `--help`, flags and types filled in."""
    declared = {f.name: f.metadata["option"] for f in fields(options) if "option" in f.metadata}
    order: list[str] = []
    places: dict[str, str] = {}
    for owner in options.__mro__:
        annotations = vars(owner).get("__annotations__", {})
        order += [name for name in annotations if name in declared and name not in order]
        places = vars(owner).get("LISTED_AFTER", {}) | places
    for name, place in places.items():
        order.remove(name)
        order.insert(order.index(place) + 1 if place else 0, name)
    return {name: _filled(options, name, declared[name]) for name in order}


def _filled(options: type, name: str, declared: Option) -> Option:
    flag = declared.flag or f"--{name.replace('_', '-')}"
    if declared.typed is not None:  # the annotation may name what is not imported yet
        return replace(declared, flag=flag)
    owner = next(c for c in options.__mro__ if name in vars(c).get("__annotations__", {}))
    alone = {"__annotations__": {name: owner.__annotations__[name]}, "__module__": owner.__module__}
    return replace(declared, flag=flag, typed=get_type_hints(type("Alone", (), alone))[name])


def keywords(options: type, given: Any) -> dict[str, Any]:
    """The fields of `options` with their values in `given`, an instance of a derived class."""
    return {f.name: getattr(given, f.name) for f in fields(options)}


class Command(TyperCommand):
    """A command that takes other spellings of its options, and several values after some."""

    options: ClassVar[type]
    spellings: ClassVar[Mapping[str, str]] = {}
    several: ClassVar[frozenset[str]] = frozenset()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the usual spelling for another, and repeat an option before each of its values."""
        spread, repeated = [], None
        for argument in args:
            flag, equals, value = argument.partition("=")
            argument = self.spellings.get(flag, flag) + equals + value
            if argument.startswith("-"):
                repeated = argument if argument in self.several else None
            elif repeated is not None and spread[-1] != repeated:
                spread.append(repeated)
            spread.append(argument)
        return super().parse_args(ctx, spread)


def command(
    app: typer.Typer,
    options: type[T],
    *,
    name: str | None = None,
    shared: bool = False,
    sharded: bool = False,
) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Register a function of `options` as a command of `app`, its docstring the help.

    `shared`: processes that torchrun started do its work together; any other one runs alone.
    `sharded`: they may also hold one base between them (`--shard`).
    """
    declared = options_of(options)
    special = {
        "options": options,
        "spellings": {other: each.flag for each in declared.values() for other in each.also},
        "several": frozenset(each.flag for each in declared.values() if each.several),
    }
    parameters = [_parameter(field_name, each) for field_name, each in declared.items()]

    def register(function: Callable[[T], None]) -> Callable[[T], None]:
        def call(**typed: Any) -> None:
            if not shared and console.several():
                raise InputError(
                    f"torchrun started {console.processes()} processes, and this command is one process's work: "
                    "call it without torchrun"
                )
            given = {key: value for key, value in typed.items() if value is not None}
            if given.get("shard") and not sharded:
                raise InputError(
                    "--shard was given: only influence fit, score, self and without run on a base "
                    "that is spread over processes; this command has passes of single processes, "
                    "second derivatives or copies of the model. Leave --shard out"
                )
            chosen = options(**{key: declared[key].read(value) for key, value in given.items()})
            bounded_by = fields(MemoryOption) if issubclass(options, MemoryOption) else ()
            names = [*(each.name for each in bounded_by), "token_budget"]
            bounds = {name: given[name] for name in names if name in given}
            if not bounds:
                return function(chosen)
            from influence.memory import bounded

            with bounded(**bounds):
                return function(chosen)

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name=name, cls=type("Command", (Command,), special))(call)
        return function

    return register


def _parameter(name: str, declared: Option) -> inspect.Parameter:
    """The keyword of the function that typer is given."""
    default = inspect.Parameter.empty if declared.default is MISSING else declared.default
    if isinstance(default, tuple):
        default = list(default) or None
    annotation = Annotated[declared.typed, typer.Option(declared.flag, help=declared.help)]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


# ---- options that several commands share -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunOption:
    """The run that a command works on.

    torchrun takes `--run`, before a `--` on its line, for an abbreviation of its own `--run-path`,
    but not `--run-dir`.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"run": ""}

    run: Path = option("Run directory made by influence fit.", also=["--run-dir"])


@dataclass(frozen=True, kw_only=True)
class ModelOption:
    """The base, where no run names it."""

    model: str | None = option(
        "Base model: folder or hub id. Default: the one the adapter records.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(ModelOption):
    """An adapter and its base, where no run names them."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"adapter": ""}

    adapter: str = option("PEFT LoRA adapter: folder or hub id.")


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(ModelOption):
    """An adapter and its base, or the output of the trainer that made it."""

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {"adapter": "", "trainer_output": "adapter"}

    adapter: str | None = option(
        "PEFT LoRA adapter: folder or hub id. Default: the last one of --trainer-output.",
        default=None,
    )
    trainer_output: Path | None = option(
        "Output directory of the trainer that made the adapter: its checkpoints, optimiser state, "
        "recipe and logged losses are used.",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class LengthOption:
    """How long rows may be."""

    max_length: int | None = option(
        "Truncate rows to so many tokens, as in training.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class RenderingOptions(LengthOption):
    """How training rows become tokens."""

    supervise: str | None = option(
        "What the trainer supervised of a conversation: last (the last answer, the default), "
        "assistant (every answer) or all (every token, TRL's default).",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class BudgetOption:
    """How much runs at a time."""

    token_budget: int | None = option(
        "Tokens per batch, padding included: the memory knob. Default: the fit's, at most what "
        "--memory holds; a fit's 1024 on a CPU, else 4096.",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryOption:
    """How much memory a command plans with."""

    memory: float | None = option(
        "Most gigabytes that a process is to take, the base included: bounds batches, blocks of "
        "queries and factors. Default: what is free.",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(BudgetOption, MemoryOption):
    """How much runs and is held at a time."""


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    """Which training rows a command is about."""

    ids: str | None = option(
        'Ids of the rows, separated by commas; or a JSON list, as in \'["a,b", "c"]\'.',
        default=None,
    )
    ids_file: Path | None = option(
        "File with one id per line, as it is or as JSON text in quotes.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions:
    """A curvature and damping other than those of the fit."""

    curvature: str | None = option(
        "Another curvature that the run holds: identity, kfac, ggn, hessian ...", default=None
    )
    damping: str | Damping | None = option(
        "Another damping rule than the fit's: mean:0.1, top:0.01, abs:1e-3 or time:0.5.",
        default=None,
        typed=str | None,
    )


@dataclass(frozen=True, kw_only=True)
class PointOption:
    """Which of a run's points are looked at."""

    at: str | None = option(
        "Which of the run's points to look at: all, end, or one's label, as in 0.6.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class ExplainOption:
    """Which tokens of a query are explained."""

    explain: str = option(
        "Which tokens of a conversation are explained: last (its last answer), assistant (every "
        "answer) or all.",
        default="last",
    )


@dataclass(frozen=True, kw_only=True)
class CreditOption:
    """How a row's score counts the other rows that teach the same."""

    credit: str | None = option(
        "shared (rows that teach the same share it) or additive (each gets it whole). Default: "
        "shared where that can be.",
        default=None,
    )


def points(text: str) -> tuple[float, ...]:
    """Points of a path as they are typed: numbers separated by commas, else `InputError`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"--path {text!r} was given; expected numbers separated by commas, as in 0.4,0.6,0.8"
        ) from None


def column_map(text: str) -> dict[str, str]:
    """A column map as it is typed, `KEY=COLUMN,KEY=COLUMN`, else `InputError`."""
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {key.strip(): column.strip() for key, _, column in pairs}
    if not all(columns.values()) or len(columns) < len(pairs):
        raise InputError(
            f"--columns {text!r} was given; expected each key once, as in "
            "prompt=question,completion=answer"
        )
    return columns


@dataclass(frozen=True, kw_only=True)
class ColumnsOption:
    """What the columns of rows mean."""

    columns: Mapping[str, str] | None = option(
        "Columns of other names: prompt=question,completion=answer (also id, group, messages ...).",
        default=None,
        typed=str | None,
        read=column_map,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Where the model runs."""

    device: str = option("auto, cpu, cuda, cuda:1 ...", default="auto")
    device_map: str | None = option(
        "In place of --device: auto spreads the layers over all accelerators.", default=None
    )


@dataclass(frozen=True, kw_only=True)
class ShardOption:
    """Whether the base is spread over processes."""

    shard: bool = option(
        "Spread the base's layers over the processes of torchrun, each of which holds a part.",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class TypeOption:
    """The numbers of the base: their type, and what else changes them while it is loaded."""

    dtype: str = option(
        "The base's type: float32, bfloat16, float16, float64, or auto: as it is saved.",
        default="auto",
    )
    load_in_4bit: bool = option(
        "Quantise the base to 4 bits while it is loaded, as QLoRA does.", default=False
    )
    load_in_8bit: bool = option("Quantise the base to 8 bits (bitsandbytes).", default=False)
    attn_implementation: str | None = option(
        "Attention of transformers: eager, sdpa, flash_attention_2 ... Default: its own choice.",
        default=None,
    )
    compute: str = option(
        "What a 16-bit base computes in: float32 (memory of 16 bits, gradients of float32), own, "
        "or auto (float32 with --dtype auto, and on a CPU).",
        default="auto",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointingOption:
    """Memory for time."""

    checkpointing: bool = option(
        "Recompute activations in the backward: slower, far less memory.", default=False
    )


@dataclass(frozen=True, kw_only=True)
class TrustOption:
    """Whether code that a model ships may run."""

    trust_remote_code: bool = option("Run code that the base model ships.", default=False)


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(DeviceOption, ShardOption, CheckpointingOption, TrustOption):
    """How a run's model is loaded."""


@dataclass(frozen=True, kw_only=True)
class TypedLoadingOptions(DeviceOption, ShardOption, TypeOption, CheckpointingOption, TrustOption):
    """How a model is loaded that no run records."""


@dataclass(frozen=True, kw_only=True)
class CountOption:
    """How long a table is."""

    k: int = option("How many rows to show.", default=10, flag="-k")


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """How a result is printed."""

    json: bool = option("Print the result as JSON, for a program.", default=False)


@dataclass(frozen=True, kw_only=True)
class OverwriteOption:
    """Whether files may be replaced."""

    overwrite: bool = option("Replace what is already there.", default=False)


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OverwriteOption, JsonOption):
    """How a result is written and printed."""
