"""One page on one edit, for people: is it forgotten, what else changed, how exact, how to check it.

Everything on the page comes from DIR/edit.json, the record that an edit leaves beside its adapter.
No model is loaded and nothing is measured here; what the record does not know is said as "not
measured". The page is one HTML file with inline styles and drawings, without scripts and without
anything fetched from elsewhere; ids and paths in it are hostile input and are escaped. The same
record gives the same bytes. The verdicts follow from the numbers by the rules of
`analysis.report.verdicts`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from analysis.page_file import checked_page, write_page
from analysis.report import drawings, evidence, words
from analysis.report.groups import Group, groups, measurements
from analysis.report.reading import read_edit_record
from analysis.report.verdicts import agreement, damage, tone
from unlearn.record.edit_record import RECORD, AgreementRecord, EditRecord

#: Rows with a line of their own, at most (a choice: about what fits on a printed page).
SHOWN = 30


@dataclass(frozen=True)
class Report:
    """A written page: where it is, the answers on it, and the verdicts by what they are about."""

    path: Path
    kind: str
    title: str
    rows: int
    headlines: tuple[str, ...]
    verdicts: dict[str, str]


def report(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    compared: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the page of the edit in `folder` to the HTML file `out`.

    Parameters
    ----------
    folder : path
        Made by `unlearn remove`, `relabel`, `correct`, `edit` or `train`; only its edit.json is
        read.
    out : path
        Ends in `.html`; its folder is made where it is missing.
    compared : mapping, optional
        From `analysis.report.agreement`, in place of the record's own `agreement`.
    overwrite : bool
        Replace a file that is already there.

    Returns
    -------
    Report
        The file written and what it says.

    Raises
    ------
    InputError
        If the folder is no edit's, the name has another ending, or the file exists.
    StoreError
        If the record is damaged, or the file cannot be written.
    """
    out = checked_page(out, overwrite)
    record = read_edit_record(folder)
    if compared is not None:
        record = replace(record, agreement=AgreementRecord.of(compared))
    html = page(record, folder, hashlib.sha256((Path(folder) / RECORD).read_bytes()).hexdigest())
    write_page(out, html)
    about = {"remove": "removed", "change": "changed"}
    verdicts = {about[group.kind]: group.verdict for group in groups(record)}
    verdicts |= {"others": _verdict_on_others(record), "retraining": _verdict_on_retraining(record)}
    verdicts |= {each.name: each.verdict or words.NOT_MEASURED for each in measurements(record)}
    headlines = tuple(words.headline(group, record) for group in groups(record))
    return Report(out, record.kind, words.title(record), len(record.requests), headlines, verdicts)


def page(record: EditRecord, folder: str | os.PathLike[str], digest: str | None = None) -> str:
    """The HTML of one edit's page.

    Parameters
    ----------
    record : EditRecord
        From `analysis.report.reading.read_edit_record`.
    folder : path
        The edit's folder, to be named on the page.
    digest : str, optional
        SHA-256 of the record's bytes, which the run's audit.jsonl repeats.

    Returns
    -------
    str
        One self-contained page; a function of the arguments alone.
    """
    guarded, compared = _verdict_on_others(record), _verdict_on_retraining(record)
    argument = words.folder_argument(folder)
    settings = list(record.method.settings.items())[:40]
    versions = list((record.versions or {}).items())[:8]
    return _template().render(
        record=record,
        folder=os.path.abspath(folder),
        title=words.title(record),
        sections=_sections(record),
        evidence=evidence.section(record),
        others=(guarded, tone(guarded), words.others(record)),
        compared=(compared, tone(compared), words.compared(record)),
        losses=words.losses(record),
        retained=words.below_losses(record),
        exact=words.exactness(record),
        cost=words.cost(record),
        command=words.retrain_command(record, argument),
        run=words.run_argument(record),
        quoted=argument,
        digests=words.digests(record, digest),
        settings=[(words.text(name, 40), words.setting(value)) for name, value in settings],
        steps=(record.steps or ())[:60],
        requests=record.requests[:SHOWN],
        versions=[f"{words.text(name, 40)} {words.text(value, 40)}" for name, value in versions],
        reversible="delta.safetensors" in (record.files or {}),
    )


def _verdict_on_others(record: EditRecord) -> str:
    """The word for the rows that nobody asked to change."""
    return damage(record.guard.damage, record.guard.max_damage)


def _verdict_on_retraining(record: EditRecord) -> str:
    """The word for the comparison with a retrained adapter."""
    return agreement(words.compared_losses(record))[0]


def _sections(record: EditRecord) -> list[dict[str, Any]]:
    """What the template shows of each group, whose lines share the `SHOWN` ones of the page."""
    parts = groups(record)
    total = sum(len(group.rows) for group in parts)
    limits = [max(SHOWN // len(parts), SHOWN - (total - len(group.rows))) for group in parts]
    return [_section(group, record, limit) for group, limit in zip(parts, limits, strict=True)]


def _section(group: Group, record: EditRecord, limit: int) -> dict[str, Any]:
    """What the template shows of a group, at most `limit` rows of it line by line."""
    verdict, size, removed = group.verdict, len(group.rows), group.kind == "remove"
    colour = tone(verdict)
    doubtful = group.recited or any(each.verdict == "less than unseen" for each in group.measured)
    done = "forgotten" if removed else "taken up"
    counted = [
        (word, group.count(word)) for word in (done, f"partly {done}", f"not {done}", "not judged")
    ]
    counts = ", ".join(f"{number:,} {word}" for word, number in counted if number)
    return {
        "title": ("Removed row" if removed else "New content of the row") + "s" * (size > 1),
        "kind": group.kind,
        "size": size,
        "verdict": verdict,
        "tone": "warn" if doubtful and colour != "bad" else colour,
        "headline": words.headline(group, record),
        "counts": "" if size == 1 else f"Rows: {counts}",
        "remarks": words.remarks(group),
        "many": drawings.distribution(group) if size > limit else None,
        "table": drawings.table(group, limit),
        "tile": words.tile(group),
        "goal": words.goal_word(group, record),
    }


@cache
def _template() -> Any:
    """The page's template. Whatever is put into it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"small": words.small, "foreign": words.text}
    return environment.get_template("edit.html")
