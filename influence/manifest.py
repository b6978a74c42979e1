"""The manifest of a run: what it was made from, and what later commands keep there.

`run/manifest.json` as a value. `identity` is what two runs must agree in to be the same run, and
`digest` its SHA-256; the fields beside it say the same for people, with places and sizes. A place
in the run's own directory is written relative to it, so that the directory can be moved.
`calibration`, `tuned`, `audit` and `now` are written by later commands; keys that this version does
not know are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from influence.errors import InputError, StoreError
from influence.store import only_writer, read_json, write_json
from influence.tokens import Rendering

FORMAT = 2
NAME = "manifest.json"
#: The record of the edits that were made from a run (`unlearn.record.chain`), under whose lock the
#: manifest is changed.
AUDIT = "audit.jsonl"
#: What `influence.kept` keeps in a run's directory: the rows, the adapter.
_KEPT = (ROWS := "rows.jsonl", ADAPTER := "adapter")
#: What an identity says that lacks these keys: they are in it only where they are something else,
#: so that digests of runs that were made before they were thought of stay.
AS_BEFORE = {"supervise": "last"}
#: Bytes of a row and point that is kept in few bytes, unless told otherwise.
ROW_BYTES = 131_072
#: How two of the ways to store rows were called before.
STORE_BEFORE = {"always": "full", "never": "none"}
#: And the other way round: identities say it as they always did, so that digests stay.
STORE_NOW_BEFORE = {now: before for before, now in STORE_BEFORE.items()}
#: Of a field that is written only where it is not its default: files from before it was thought of
#: mean that.
LATER: Mapping[str, Any] = {"written_at_default": False}
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Source:
    """Where something lies (None: nowhere on disk) and its SHA-256."""

    path: str | None
    digest: str


@dataclass(frozen=True)
class AdapterSource(Source):
    """The adapter, with its number of LoRA parameters, P."""

    parameters: int


@dataclass(frozen=True)
class DataSource(Source):
    """The training rows, with how many there are and their tokens.

    `path` may be the name of a data set of the hub, `columns` the column map that it was read by,
    `tokens_digest` the SHA-256 of the tokens and their masks.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    columns: Mapping[str, str] | None = field(default=None, metadata=LATER)
    tokens_digest: str | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer's SHA-256."""

    digest: str


@dataclass(frozen=True)
class LoadingRecord:
    """What changes the base's numbers while it is loaded, beside its type: quantisation by
    bitsandbytes, and the attention kernel (None: the one that transformers chooses).

    The fields are keywords of `influence.load`.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None


@dataclass(frozen=True)
class ObjectiveRecord:
    """The training objective: how rows are weighted, at how many tokens they are cut, all
    supervised tokens, and which tokens of a conversation these are.
    """

    reduction: str
    max_length: int | None
    N_tok: int
    supervise: str = field(default=AS_BEFORE["supervise"], metadata=LATER)

    @property
    def rendering(self) -> Rendering:
        """How rows become tokens."""
        return Rendering(self.max_length, self.supervise)


@dataclass(frozen=True)
class PointRecord:
    """One point of the path: its label, share of the average, and scale of B (None: a checkpoint
    with this digest).
    """

    label: str
    share: float
    scale: float | None
    digest: str | None


@dataclass(frozen=True)
class CalibrationRecord:
    """The factor that a setting's scores are multiplied by, and what it was measured by.

    `scales` are its points' mean self-influences (`AtPoint.scale`), kept because they cost a solve
    of every row; empty: at one point, or in runs made before they were kept.
    """

    factor: float
    source: str
    scales: tuple[float, ...] = field(default=(), metadata=LATER)


@dataclass(frozen=True)
class PathRecord:
    """What the path says of how far training went: the rows' mean loss (nats a token, weighted as
    in the objective) under the base and the adapter, and at each point the same loss and the ratio
    of curvature to squared slope (`influence.path_time`).
    """

    base: float
    adapter: float
    losses: tuple[float, ...]
    ratios: tuple[float, ...]

    def of(self, points: Sequence[int]) -> PathRecord:
        """The same of some of the points."""
        losses, ratios = (tuple(each[k] for k in points) for each in (self.losses, self.ratios))
        return PathRecord(self.base, self.adapter, losses, ratios)


@dataclass(frozen=True)
class TunedRecord:
    """The setting that `analysis tune` chose: the run below this one that holds it (None: this
    one), what to use, and why.
    """

    run: str | None
    curvature: str
    damping: str | None
    at: str
    found: str | None = None


@dataclass(frozen=True)
class AuditRecord:
    """How many lines the record of edits has, and the hash of the last."""

    entries: int
    head: str


@dataclass(frozen=True)
class NowRecord:
    """The adapter that the last edit made."""

    adapter: Source


@dataclass(frozen=True)
class GrownRecord:
    """What a run was grown from (`influence.growing`): the run, with its place and digest; how many
    rows were kept, came (`added`) and went (`removed`), with those that `changed` in both.

    `curvature_rows`: rows that are there now among those that the curvature's bases were formed of.
    `otherwise`: in what the run differs from a fit from scratch, sentences; empty: in rounding alone.
    """

    run: Source
    kept: int
    added: int
    removed: int
    changed: int
    curvature_rows: int
    otherwise: tuple[str, ...]


@dataclass(frozen=True)
class PrecisionRecord:
    """How far gradients in the type that a fit computed in are from float32's: the largest and the
    median relative error of a row, at the adapter itself.
    """

    computed: str
    reference: str
    rows: int
    worst: float
    median: float


@dataclass(frozen=True)
class Manifest:
    """The manifest of a run.

    See the module.

    `curvature` has the specification's `name` and its options; `damping` the rule as it is typed;
    `store`, `disk_budget` and `token_budget` (tokens of a batch) are `fit`'s options;
    `gradients_stored` whether the rows' gradients are on disk, `features_stored` whether the rows in
    few bytes are, `row_bytes` in how many; `calibration` the factors by the
    setting's name; `compute` is `float32` where the base computed in that, wider than its weights'
    `dtype`, else `own`; `precision` the error of 16-bit gradients; `path` the losses along the path;
    `growable` whether rows at sampled labels are kept beside the gradients, `grown` what the run was
    grown from.
    `rest` has the keys that this version does not know.
    """

    format: int
    digest: str
    complete: bool
    identity: Mapping[str, Any]
    base: Source
    adapter: AdapterSource
    data: DataSource
    tokenizer: TokenizerSource
    objective: ObjectiveRecord
    curvature: Mapping[str, Any]
    damping: str
    points: tuple[PointRecord, ...]
    geometry: str
    optimizer: str | None
    store: str
    disk_budget: float
    seed: int
    token_budget: int
    dtype: str
    versions: Mapping[str, str]
    created: str
    loading: LoadingRecord = field(default_factory=LoadingRecord, metadata=LATER)
    gradients_stored: bool = False
    features_stored: bool = field(default=False, metadata=LATER)
    row_bytes: int = field(default=ROW_BYTES, metadata=LATER)
    calibration: Mapping[str, CalibrationRecord] = field(default_factory=dict)
    tuned: TunedRecord | None = None
    audit: AuditRecord | None = None
    now: NowRecord | None = None
    compute: str = field(default="own", metadata=LATER)
    precision: PrecisionRecord | None = field(default=None, metadata=LATER)
    path: PathRecord | None = field(default=None, metadata=LATER)
    growable: bool = field(default=False, metadata=LATER)
    grown: GrownRecord | None = field(default=None, metadata=LATER)
    rest: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read a JSON object.

        `StoreError` names the key that is missing or of another type than it should be.
        """
        names = {part.name for part in fields(cls)} - {"rest"}
        values = _values(cls, {key: record[key] for key in record if key in names}, "")
        return cls(**values, rest={key: value for key, value in record.items() if key not in names})

    def as_json(self) -> dict[str, Any]:
        """The JSON object: what is not there (no edit yet, nothing tuned) has no key."""
        found = _plain(self)
        absent = ["rest", *(name for name in ("tuned", "audit", "now") if found[name] is None)]
        if not self.complete:  # `fit` writes these with the last point
            absent += ["gradients_stored", "calibration"]
        return {key: value for key, value in found.items() if key not in absent} | dict(self.rest)

    @property
    def curvature_name(self) -> str:
        """Name of the curvature that was fitted."""
        return str(self.curvature.get("name"))

    @property
    def curvature_options(self) -> dict[str, Any]:
        """The options of the curvature that was fitted."""
        return {key: value for key, value in self.curvature.items() if key != "name"}


def digest_of(identity: Mapping[str, Any]) -> str:
    """SHA-256 of what a run is made from."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished run.

    Anything else is an `InputError` that says what is there.
    """
    path = directory / NAME
    if not path.exists():
        raise InputError(
            f"{directory} is not a run directory (no {NAME}): make one with influence fit"
        )
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {record.get('format')!r} and this version reads format {FORMAT}: "
            "fit the run again"
        )
    if not record.get("complete"):
        raise InputError(
            f"the fit in {directory} is unfinished: run the same influence fit command again to "
            "resume it"
        )
    return _from_file(path, record)


def recorded_identity(directory: Path) -> Mapping[str, Any]:
    """What the run in a directory is made from, finished or not, of whatever format.

    Nothing where that is not said.
    """
    identity = read_json(directory / NAME).get("identity")
    return identity if isinstance(identity, dict) else {}


def begun_manifest(directory: Path) -> Manifest:
    """The manifest of a run that was begun, finished or not."""
    path = directory / NAME
    return _from_file(path, read_json(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the whole manifest, atomically."""
    write_json(directory / NAME, _unplaced(directory, manifest).as_json())


def change_manifest(directory: Path, **changes: Any) -> Manifest:
    """Set some fields, where the others stay what they are on disk by now.

    Returns the manifest as written.
    """
    with only_writer(directory / AUDIT):  # which edits hold while they write their own fields
        return change_under_lock(directory, **changes)


def change_under_lock(directory: Path, **changes: Any) -> Manifest:
    """`change_manifest` for a caller that holds the lock of the record of edits."""
    path = directory / NAME
    manifest = replace(_from_file(path, read_json(path)), **changes)
    write_manifest(directory, manifest)
    return manifest


def differences(
    there: Mapping[str, Any], expected: Mapping[str, Any], *, whole: bool = False
) -> list[str]:
    """What differs between two run identities, in words.

    Digests are shortened. A key that one of them lacks counts as `AS_BEFORE`. `whole`: `expected`
    is a whole identity, so what it lacks must be lacking there too.
    """

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text[:12] if len(text) == 64 else text

    def labels(points: Any) -> str:
        return ",".join(point["label"] for point in points) if points else "nothing"

    sentences = []
    for key in [*expected, *(key for key in there if whole and key not in expected)]:
        recorded, value = (each.get(key, AS_BEFORE.get(key)) for each in (there, expected))
        if key == "store":
            recorded, value = (STORE_BEFORE.get(each, each) for each in (recorded, value))
        if recorded == value:
            continue
        was, now = short(recorded), short(value)
        if key == "points" and labels(recorded) != labels(value):
            was, now = labels(recorded), labels(value)
        sentences.append(f"{key} is {was} there and {now} here")
    return sentences


def _from_file(path: Path, record: Mapping[str, Any]) -> Manifest:
    try:
        return _placed(path.parent, Manifest.from_json(record))
    except StoreError as error:
        raise StoreError(f"{path} is damaged: {error}; restore it, or fit the run again") from error


def _placed(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest with what lies in the run's directory named in full."""

    def full(source: Any) -> Any:
        if source.path in _KEPT:
            return replace(source, path=str(directory.resolve() / source.path))
        return source

    return replace(manifest, data=full(manifest.data), adapter=full(manifest.adapter))


def _unplaced(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest as it is written: what lies in the run's directory named from there."""
    names = {str(directory.resolve() / name): name for name in _KEPT}

    def short(source: Any) -> Any:
        return replace(source, path=names.get(source.path, source.path))

    return replace(manifest, data=short(manifest.data), adapter=short(manifest.adapter))


def _values(kind: type, record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of a dataclass from a JSON object, each checked.

    A missing field has its default or is an error.
    """
    hints, values = get_type_hints(kind), {}
    for part in fields(kind):
        if part.name in record:
            values[part.name] = _value(hints[part.name], record[part.name], f"{place}{part.name}")
        elif part.name != "rest" and not _optional(part):
            raise StoreError(f"{place}{part.name} is missing")
    return values


def _optional(part: Any) -> bool:
    return part.default is not MISSING or part.default_factory is not MISSING


def _value(hint: Any, value: Any, place: str) -> Any:
    """One value of a declared type."""
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is tuple:
        items = _checked(value, list, "a list", place)
        return tuple(
            _value(get_args(hint)[0], item, f"{place}[{i}]") for i, item in enumerate(items)
        )
    if get_origin(hint) is Mapping:
        items = _checked(value, dict, "an object", place)
        kind = get_args(hint)[1]
        if kind is Any:
            return items
        return {key: _value(kind, item, f"{place}.{key}") for key, item in items.items()}
    if hint in _KINDS:
        good = type(value) is hint or (hint is float and type(value) is int)
        return value if good else _checked(value, (), _KINDS[hint], place)
    return hint(**_values(hint, _checked(value, dict, "an object", place), f"{place}."))


def _checked(value: Any, kind: Any, name: str, place: str) -> Any:
    if not isinstance(value, kind):
        raise StoreError(f"{place} is {value!r:.100}, expected {name}")
    return value


def _plain(value: Any) -> Any:
    """A field as JSON holds it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if is_dataclass(value):
        held = {part.name: getattr(value, part.name) for part in fields(value)}
        unsaid = [part.name for part in fields(value) if held[part.name] == _unwritten(part)]
        return {name: _plain(item) for name, item in held.items() if name not in unsaid}
    return value


def _unwritten(part: Any) -> Any:
    """The value at which a field is not written; `MISSING` where it always is."""
    if part.metadata.get("written_at_default", True):
        return MISSING
    return part.default if part.default_factory is MISSING else part.default_factory()
