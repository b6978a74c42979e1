"""A cleaning for a person: what each reason found, the first rows, and what applying them did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis.cleaning.applied import ADAPTER
from analysis.cleaning.cleaning import Cleaning
from analysis.cleaning.files import RELABELLED, REMOVED, ROWS
from influence.messages import one_line

#: What stands beside every prediction; why is in docs/cleaning.md, "Measured".
FORECAST = "not to be relied on: measured gains were several times as large, or of the other sign"
#: Sets of rows that a gain is measured on, for people.
NAMES = {"good": "good rows", "heldout": "held-out rows"}
#: Rows of a reason that are shown on a terminal, and characters of a row's id.
SHOWN, ID = 3, 28


def table(result: Cleaning) -> Table:
    """The first rows of every reason, with what was seen."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    made.add_column("reason", no_wrap=True)
    made.add_column("row", overflow="fold", max_width=ID)
    made.add_column("score", justify="right", no_wrap=True)
    made.add_column("gain, nats", justify="right", no_wrap=True)
    made.add_column("suggested", no_wrap=True)
    made.add_column("what was seen", overflow="fold")
    ids = result.run.train.ids
    for found in result.found.values():
        for each in found.findings[:SHOWN]:
            made.add_row(
                Text(found.reason),
                Text(one_line(ids[each.row], ID)),
                f"{each.score:.3g}",
                "" if each.gain is None else f"{each.gain:.2g}",
                each.suggested,
                Text(one_line(each.evidence, 200)),
            )
    return made


def lines(result: Cleaning, out: Path) -> list[str]:
    """How many rows each reason lists and why, what is predicted, and what to do next."""
    summary = result.summary
    said = []
    for reason, part in summary["reasons"].items():
        of = f" of {part['found']}" if part["found"] > part["listed"] else ""
        shown = f", the first {SHOWN} above" if part["listed"] > SHOWN else ""
        said.append(f"{reason}: {part['listed']}{of} rows{shown} ({part['rule']})")
    said += [f"{reason} is left out: {why}" for reason, why in result.left_out.items()]
    for name, part in summary["predicted"].items():
        if part["gain"] is not None:
            what = "all suggested rows" if name == "suggested" else "the rows that harm"
            said.append(predicted(what, part))
    if any(part["gain"] is not None for part in summary["predicted"].values()):
        said.append(f"a prediction is {FORECAST}; --apply measures")
    said.append(
        f"{out / ROWS}: write remove, keep or relabel into the column decision, then "
        f"analysis clean --apply {out} --holdout FILE (--take-suggested: what is suggested, where "
        "nothing is written)"
    )
    said.append(
        f"{out / REMOVED}: {summary['remove']} ids suggested for removal; {out / RELABELLED}: "
        f"{summary['relabel']} better answers"
    )
    return said


def predicted(what: str, part: Mapping[str, Any]) -> str:
    """What removing `what` is predicted to do to the good rows' mean loss: a fall, or a rise."""
    gain, low, high = part["gain"], part["low"], part["high"]
    rises = gain < 0
    if rises:
        gain, low, high = -gain, -high, -low
    said = (
        f"without {what} ({part['rows']}) the good rows' mean loss is predicted to "
        f"{'rise' if rises else 'fall'} by {gain:.4f} [{low:.4f}, {high:.4f}] from "
        f"{part['before']:.4f} nats per token"
    )
    return said + (": look at each row before it goes" if rises else "")


def applied_table(record: Mapping[str, Any]) -> Table:
    """The measured gain on every set beside the predicted one."""
    made = Table(
        title=Text("mean loss, nats per token; gain = its fall"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    made.add_column("rows", no_wrap=True)
    for head in ("all rows", "cleaned", "gain", f"{record['level']:.0%} interval", "predicted"):
        made.add_column(head, justify="right", no_wrap=True)
    for name, part in record["sets"].items():
        interval = "" if part["low"] is None else f"{part['low']:+.4f} to {part['high']:+.4f}"
        forecast = "" if part["predicted"] is None else f"{part['predicted']['gain']:+.4f}"
        made.add_row(
            f"{NAMES[name]} ({part['rows']})",
            f"{part['before']:.4f}",
            f"{part['after']:.4f}",
            f"{part['gain']:+.4f}",
            interval,
            forecast,
        )
    return made


def applied_lines(record: Mapping[str, Any]) -> list[str]:
    """What was trained, and where it is."""
    removed, relabelled = len(record["removed"]), len(record["relabelled"])
    seeds = record["seeds"]
    said = [
        f"{removed} rows removed, {relabelled} relabelled, {record['rows']} trained on; "
        f"{seeds} seed{'s' * (seeds > 1)}, each a training on all rows and one on these"
    ]
    for name, part in record["sets"].items():
        if part["low"] is not None and part["low"] <= 0 <= part["high"]:
            said.append(f"{NAMES[name]}: the interval holds 0, so that no difference is shown")
    if "good" in record["sets"]:
        said.append("the good rows made the list: what they gain says less than held-out rows do")
    if any(part["predicted"] is not None for part in record["sets"].values()):
        said.append(f"predicted is {FORECAST}; gain is what was measured")
    if relabelled:
        said.append("predicted is what influence says if the relabelled rows went too")
    said.append(f"{record['adapter']}: the cleaned {ADAPTER}")
    return said
