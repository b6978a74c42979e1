"""The record of an edit, `edit.json`, as a value: what was asked, how made, and what was measured.

Every key of the file is a field below, in the file's order, with its meaning, its unit and when it
is null. Losses are mean cross-entropies per completion token, in nats, averaged over rows. A new
key is a new field here and a value where the record is made (`unlearn.record.before_after`);
writing, reading and checking follow from the declaration.

Records outlive the version that wrote them, and files may be damaged. So a record that is read may
hold null wherever the declared type allows it, also where nothing writes null today, and an object
that is null reads as one of which nothing is known (`nothing`), so that
`record.losses.retained.before` is a number or None for every record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from influence.errors import StoreError
from unlearn.record.declared import LATER, NEEDED, WHOLE, read, written
from unlearn.record.plain import shortened, typed_value_at

#: The file's name, and the format that this version writes and reads.
RECORD, FORMAT = "edit.json", 1

# Rules of single fields (`unlearn.record.declared` has the others).
#: A key that rows with new content have, and removed rows have not.
OF_NEW_CONTENT = {"may_lack": True, "only": lambda row: row.action != "remove"}
#: A key that the folder's seal adds.
OF_SEALED = {"only": lambda record: record.files is not None}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Something on disk, and what it was then."""

    #: Its folder, or its name on the hub; null: nowhere on disk.
    path: str | None
    #: SHA-256 of what it holds.
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What something was, wherever it lies."""

    #: SHA-256 of what it holds.
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapter before and after."""

    #: The adapter that the edit starts from.
    before: Place
    #: The adapter that it made; its place is the folder of the record.
    after: Digest


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The training rows that the adapter stands for."""

    #: Digest of the rows before, contents and order.
    before: str | None
    #: Digest of the rows after.
    after: str | None
    #: How many rows there were.
    rows_before: int | None
    #: How many rows there are.
    rows_after: int | None


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One change that was asked for, without the text."""

    #: The row's id.
    id: str
    #: `remove`, `relabel` or `correct`.
    action: str
    #: Hash of the row's content before.
    content_before: str | None
    #: Hash of its new content; null: the row is removed.
    content_after: str | None


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where the adapter stands after this edit and those before it."""

    #: How many edits led here from the run's own adapter, this one included.
    edits: int | None
    #: Ids of the rows of the fit that are gone, sorted.
    removed: tuple[str, ...] | None
    #: Ids of the rows of the fit that have other content, sorted.
    changed: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """How the new weights were found."""

    #: `one-shot`, `re-linearised`, `converged`, or the name of a method of gradient steps.
    name: str | None
    #: All keys of the object, `name` among them, as they were given. Of every method: `curvature`,
    #: `geometry`, `damping`, `points` (labels), `lambda` (least and largest), `solver`, `steps`
    #: (the most), `until`, `max_damage` and `seed`; of older versions also `rho` (loss of unseen
    #: rows over the base model's). Of edits by influence also `rest` (retained rows in a step). Of
    #: gradient steps the first six are null, and also there are `title`, `source`, the method's
    #: parts, `lr`, `stride`, `optimizer`, `schedule`, `warmup`, `batch_size`, `retain_batch_size`,
    #: `retain`, `steps_taken`, `lr_first`, `lr_last`, `kept` (share of the whole move that a finish
    #: kept), `token_budget`, `stop_damage` and `max_grad_norm`.
    settings: Mapping[str, Any] = field(metadata=WHOLE)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings, which hold its name."""
        return cls(name=settings["name"], settings=settings)


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """Norm of the retained rows' mean gradient, 0 only at their optimum (Guo et al. 2020)."""

    #: Norm before.
    before: float | None
    #: Norm after; null in a forecast.
    after: float | None
    #: Retained rows that it is of.
    rows: int | None = field(metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Residual:
    """How exactly the edit's equations were solved."""

    #: Largest relative residual of the linear solves; null: there was none to solve.
    solver: float | None
    #: Relative residual that was asked for; null: of a direct solver, or none.
    tolerance: float | None
    #: Gradient of the retained objective; null: no retained rows.
    objective: GradientNorms | None


@dataclass(frozen=True, kw_only=True)
class WalkStep:
    """One step of the walk of an edit (`unlearn.stopping.StepRecord`)."""

    #: Its number, from 1.
    step: int | None = field(metadata=LATER)
    #: Length of its move in the run's coordinates.
    length: float | None
    #: Length that it had to stay within; null: none.
    radius: float | None = field(metadata=LATER)
    #: Fall of the walk's objective that was forecast, nats.
    predicted: float | None
    #: Fall that was measured, nats.
    measured: float | None
    #: Whether the step was kept.
    accepted: bool | None
    #: Mean loss of the rows that rise, after it; null: there are none.
    forget: float | None = field(metadata=LATER)
    #: Mean loss of the rows that fall, after it; null: there are none.
    learn: float | None = field(metadata=LATER)
    #: Mean loss of the retained rows of the step, before it; null: it ran none.
    retained: float | None = field(metadata=LATER)
    #: Relative rise of that loss so far; null: it ran none.
    damage: float | None = field(metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Move:
    """How far the adapter's parameters moved."""

    #: Euclidean length of the move.
    norm: float | None
    #: That length over the length of the adapter before.
    relative: float | None


@dataclass(frozen=True, kw_only=True)
class EditedLosses:
    """Mean loss of the edited rows: of its new content where a row has one."""

    #: How many rows they are.
    rows: int | None
    #: Loss before.
    before: float | None
    #: Loss after.
    after: float | None
    #: Loss to reach; null: none was asked for.
    target: float | None
    #: Loss after, by the gradients at the adapter before.
    predicted: float | None


@dataclass(frozen=True, kw_only=True)
class RetainedLosses:
    """Mean loss of a fixed sample of the untouched rows, null where there is none."""

    #: How many rows they are.
    rows: int | None
    #: Loss before.
    before: float | None
    #: Loss after.
    after: float | None
    #: Relative rise: after / before - 1.
    change: float | None
    #: Standard error of the mean rise, nats; null: fewer than two rows.
    standard_error: float | None
    #: Loss after, by the gradients at the adapter before.
    predicted: float | None = field(metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class HeldOutLosses:
    """Mean loss of the held-out rows."""

    #: How many rows they are.
    rows: int | None
    #: Loss before.
    before: float | None
    #: Loss after.
    after: float | None
    #: Loss after, by the gradients at the adapter before.
    predicted: float | None = field(metadata=LATER)
    #: The file that they were read from; null: no file.
    source: str | None


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean losses before and after."""

    #: Of the rows that were asked for.
    edited: EditedLosses
    #: Of a fixed sample of the other training rows.
    retained: RetainedLosses
    #: Of rows that the adapter never saw; null: none were given.
    heldout: HeldOutLosses | None


@dataclass(frozen=True, kw_only=True)
class RowRecord:
    """What was measured of one edited row: of its new content, where it has one."""

    #: The row's id.
    id: str
    #: `remove`, `relabel` or `correct`.
    action: str
    #: Loss before.
    before: float | None
    #: Loss after; null in a forecast.
    after: float | None
    #: Loss to reach; null: none was asked for.
    target: float | None
    #: Loss under the base model, without any adapter.
    base: float | None
    #: Of older versions: share of what was taught about the row that the removed rows taught.
    share: float | None = field(metadata=LATER)
    #: Interval of the loss of one model trained on the rows after the edit; null: not needed.
    low: float | None = field(default=None, metadata=LATER)
    #: Its upper end.
    high: float | None = field(default=None, metadata=LATER)
    #: Share of the text that greedy decoding gives by itself once the rest is given, before
    #: (`unlearn.record.losses`).
    extraction_before: float | None
    #: The same after; null in a forecast.
    extraction_after: float | None
    #: Share of the comparable rows whose loss is below this row's after; null: nothing comparable.
    rank: float | None
    #: Loss of the content that was replaced, before.
    old_before: float | None = field(default=None, metadata=OF_NEW_CONTENT)
    #: The same after; null in a forecast.
    old_after: float | None = field(default=None, metadata=OF_NEW_CONTENT)
    #: Loss that the replaced content should reach; null: none was asked for.
    old_target: float | None = field(default=None, metadata=OF_NEW_CONTENT | LATER)

    def as_json(self) -> dict[str, Any]:
        """The entry as the file holds it."""
        return written(self)


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """The rows among which `rank` places an edited row."""

    #: What they are: held-out rows, or retained rows under the base model.
    source: str | None
    #: How many they are.
    rows: int | None


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a model that never saw the changed rows would lose on them, by a local retraining."""

    #: Mean expected loss of the rows that go or change.
    loss: float | None
    #: Interval of that mean under one retrained model, nine times of ten.
    low: float | None
    #: Its upper end.
    high: float | None
    #: What the local training with the rows learnt about them, over what the adapter did.
    faithfulness: float | None
    #: Share that the trainings took of the steps that the recipe has for so few rows.
    share: float | None = field(metadata=LATER)
    #: How many adapters there are of them.
    trainings: int | None
    #: Retained rows nearest to the changed ones that each was trained on.
    near: int | None
    #: Other rows that each was trained on.
    others: int | None
    #: The recipe that they followed.
    recipe: Mapping[str, Any] | None
    #: What it cost, in row gradients.
    row_gradients: int | None


@dataclass(frozen=True, kw_only=True)
class RowMeasured:
    """One row under the adapters of a measurement."""

    #: The row's id.
    id: str
    #: Its value under the adapter before.
    before: float | None
    #: The same after.
    after: float | None
    #: Mean of its values under the models that never saw the rows; null: there are none.
    unseen: float | None


@dataclass(frozen=True, kw_only=True)
class MeasurementRecord:
    """Something that the edit did not aim at, and whether it is as in models without the rows."""

    #: `generations`, `membership`, `probe-losses` or `probe-generations`.
    name: str
    #: Of what it is a mean; null: nothing was measured.
    unit: str | None
    #: Rows that it is of: old contents of the changed rows, or probe rows.
    rows: int | None
    #: Held-out rows that they are told from; null: the measurement has none.
    heldout: int | None
    #: Value under the adapter before.
    before: float | None
    #: Value after.
    after: float | None
    #: Mean of the values under the models that never saw the rows; null: there are none.
    unseen: float | None
    #: `after - unseen`.
    difference: float | None
    #: Interval of the difference to one model that never saw the rows, nine times of ten.
    low: float | None
    #: Its upper end.
    high: float | None
    #: Difference that counts as none.
    margin: float | None
    #: By the rule of `unlearn.evidence`, or `not measured`.
    verdict: str | None
    #: Why it was not measured, or not compared; null: it was.
    reason: str | None
    #: The rows one by one; empty for `membership`.
    by_row: tuple[RowMeasured, ...] | None


@dataclass(frozen=True, kw_only=True)
class EvidenceRecord:
    """Measurements that the edit did not aim at (`unlearn.evidence`)."""

    #: Models that never saw the rows: adapters of the local retraining; 0: there are none.
    models: int | None
    #: Share of the bootstrap's resamples that lie within an interval.
    level: float | None
    #: How many resamples were drawn.
    resamples: int | None
    #: The seed that drew them.
    seed: int | None
    #: File of the probe rows; null: none were given, or in no file.
    probes: str | None
    #: What was measured.
    measurements: tuple[MeasurementRecord, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShippedRecord:
    """The edit on weights that are merged into the base and rounded, as models ship."""

    #: What they are rounded to.
    dtype: str | None
    #: Mean loss of the edited rows before, on such weights.
    edited_before: float | None
    #: The same after.
    edited_after: float | None
    #: Mean loss of the retained sample before; null: there is none.
    retained_before: float | None
    #: The same after.
    retained_after: float | None
    #: Share of the change of the weights that rounding left.
    kept: float | None


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The limit for what the other rows may lose, and whether it was kept."""

    #: Largest relative rise of the retained rows' mean loss that is allowed; null in the file: no
    #: limit.
    max_damage: float | None
    #: Relative rise that was measured; null: no retained rows.
    damage: float | None
    #: Relative rise since the run's own adapter; null: there was no edit before, or no retained
    #: rows.
    since_the_fit: float | None = field(metadata=LATER)
    #: Whether the limit was kept; null: there was none.
    passed: bool | None
    #: Whether the edit was saved although it was not.
    forced: bool | None


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """What the edit took.

    One row gradient is a forward and a backward of one row, or three forwards.
    """

    #: Row gradients.
    row_gradients: float | None
    #: Forwards of a row.
    row_forwards: float | None
    #: Both, in row gradients.
    total: float | None
    #: Time, in seconds.
    seconds: float | None
    #: Row gradients of training again on the rows after; null: the recipe is not recorded.
    retraining: float | None
    #: `total / retraining`; null with it.
    ratio: float | None


@dataclass(frozen=True, kw_only=True)
class AgreementRecord:
    """Comparison with an adapter trained again on the rows after (`analysis.report.agreement`)."""

    #: Folder of that adapter.
    adapter: str | None
    #: Its mean loss on the edited rows.
    edited: float | None
    #: Its mean loss on the retained rows; null: there are none.
    retained: float | None
    #: Its mean loss on the held-out rows; null: none were given.
    heldout: float | None
    #: `KL(retrained || edited)` of each of the three sets, nats per token.
    kl: Mapping[str, Any] | None

    @classmethod
    def of(cls, comparison: Mapping[str, Any]) -> Self:
        """The comparison with these entries, None for those that are missing."""
        return read(cls, dict(comparison), "agreement", salvage=True)


@dataclass(frozen=True, kw_only=True)
class EditRecord:
    """All that `edit.json` holds, but `format`, which is `FORMAT`."""

    #: `remove`, `relabel`, `correct`, or `mixed`.
    kind: str
    #: When it was made, UTC, as in 2026-11-21T12:00:00Z.
    created: str | None
    #: Versions of the toolkit and of what it stands on, by name.
    versions: Mapping[str, Any] | None
    #: The run that the edit is of.
    run: Place
    #: The base model.
    base: Place
    #: The adapter before and after.
    adapter: Adapters = field(metadata=NEEDED)
    #: The training rows before and after.
    data: TrainingRows
    #: The tokenizer.
    tokenizer: Digest
    #: What was asked, in order.
    requests: tuple[RequestRecord, ...]
    #: Where the adapter stands after this edit and those before it.
    lineage: Lineage = field(metadata=LATER)
    #: How the new weights were found.
    method: MethodRecord = field(metadata=NEEDED)
    #: How exactly the equations were solved.
    residual: Residual
    #: Why the steps ended, a sentence.
    stopped: str | None
    #: Whether the loss to reach was reached; null: none was asked for.
    reached: bool | None = field(metadata=LATER)
    #: The steps of an edit's walk; empty where there was none (those of a training are in
    #: steps.jsonl).
    steps: tuple[WalkStep, ...] | None
    #: How far the parameters moved.
    delta: Move
    #: Mean losses before and after.
    losses: Losses = field(metadata=NEEDED)
    #: What was measured row by row, in the order of `requests`.
    rows: tuple[RowRecord, ...]
    #: The rows among which `rank` places a row; null: there were none.
    comparable: Comparable | None
    #: What the other rows lost, against the limit.
    guard: Guard
    #: What a model that never saw the changed rows would lose on them; null: not needed.
    expected: Expectation | None = field(default=None, metadata=LATER)
    #: Measurements that the edit did not aim at; null: none was made.
    evidence: EvidenceRecord | None = field(default=None, metadata=LATER)
    #: The edit on merged and rounded weights; null: the base's cannot be replaced.
    shipped: ShippedRecord | None = field(default=None, metadata=LATER)
    #: What the edit took.
    cost: CostRecord
    #: Comparison with training again; null in the file, which is written before there is one.
    agreement: AgreementRecord | None
    #: SHA-256 of every other file of the folder, by name; no key before the folder is sealed.
    files: Mapping[str, Any] | None = field(default=None, metadata=OF_SEALED)

    def as_json(self) -> dict[str, Any]:
        """The JSON object, with the keys in the order of the fields."""
        return {"format": FORMAT, **written(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Read the JSON object of a file. Keys that are not declared are left out.

        Raises `StoreError` that names the key which is missing, or is not what was expected. Null
        is taken for all but ids, actions, `kind`, the lists of requests and rows, and the objects
        that hold them.
        """
        refuse_other_format(record)
        return read(cls, record, "", salvage=False)

    @classmethod
    def salvaged(cls, record: Any) -> Self:
        """What can be read of a record that may be damaged, without errors.

        A value that is missing or of a wrong type is None.
        """
        return read(cls, record if isinstance(record, dict) else {}, "", salvage=True)

    def saved(self, *, forced: bool) -> Self:
        """The record as it is saved, by force or not."""
        return replace(self, guard=replace(self.guard, forced=forced))


def refuse_other_format(record: Mapping[str, Any]) -> None:
    """Refuse a record of another format than this version reads."""
    if record.get("format") != FORMAT:
        raise StoreError(
            f"format is {shortened(record.get('format'))}, this version reads {FORMAT}"
        )


def facts_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a line of the chain repeats from a record.

    `StoreError` names the key that is wrong. Nothing else of the record is looked at.
    """
    refuse_other_format(record)
    requests = typed_value_at(record, "requests", list)
    return {
        "kind": typed_value_at(record, "kind", str),
        "ids": [typed_value_at(request, "id", str) for request in requests],
        "adapter_before": typed_value_at(record, "adapter.before.digest", str),
        "adapter_after": typed_value_at(record, "adapter.after.digest", str),
        "run": typed_value_at(record, "run.digest", str),
    }
