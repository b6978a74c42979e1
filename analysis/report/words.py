"""Sentences of the page: what the record's numbers say, for people who do not read code.

Losses, shares and counts are rounded here and nowhere else. Whatever comes from the record as text
is foreign: `text` makes it harmless, and the template escapes it.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.report.groups import Group
from analysis.report.reading import DONE
from analysis.report.verdicts import NOT_MEASURED, agreement, damage, finite, forgetting
from influence.messages import printable
from unlearn.record.declared import nothing
from unlearn.record.edit_record import EditRecord
from unlearn.words import MEASURED

NOT_FINITE = "not a finite number"

# ---- numbers and foreign text --------------------------------------------------------------------


def loss(value: float | None) -> str:
    """A loss, in nats."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.2f}" if 0.0995 <= abs(value) < 1e6 or value == 0 else f"{value:.2g}"


def measured(value: float | None) -> str:
    """A loss, or a share that is not in per cent, in two places."""
    number = finite(value)
    return loss(value) if number is None or abs(number) >= 1e6 else f"{number:.2f}"


def share(value: float | None) -> str:
    """A share, in per cent."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return NOT_FINITE
    percent = 100 * value
    if abs(percent) >= 1e6:
        return f"{percent:.2g}\N{NO-BREAK SPACE}%"
    places = 0 if abs(percent) >= 10 or percent == round(percent) else 1
    return f"{percent:,.{places}f}\N{NO-BREAK SPACE}%"


def small(value: float | None) -> str:
    """A number of any size, in two digits."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.2g}" if math.isfinite(value) else NOT_FINITE


def arrow(before: str, after: str) -> str:
    """What something was and what it is."""
    space = " " if NOT_MEASURED in (before, after) else "\N{NO-BREAK SPACE}"
    return f"{before}{space}→{space}{after}"


def count(number: float | None, noun: str = "row") -> str:
    """How many of something."""
    if finite(number) is None:
        return f"{noun}s ({NOT_MEASURED} how many)"
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def text(value: Any, limit: int = 240) -> str:
    """Foreign text: control and direction characters become spaces, and it ends somewhere."""
    harmless = " ".join(printable(str(value)).split("\n"))
    if len(harmless) <= limit:
        return harmless
    return f"{harmless[:limit]}… ({len(harmless):,} characters)"


def setting(value: Any) -> str:
    """A setting of the method, of whatever type."""
    plain = (int, float, str)
    if isinstance(value, list) and value and all(isinstance(part, plain) for part in value):
        return text(", ".join(setting(part) for part in value))
    if isinstance(value, float):
        return small(value)
    if value is None:
        return "none"
    return text(value if isinstance(value, str) else json.dumps(value))


# ---- the edited rows -----------------------------------------------------------------------------


def title(record: EditRecord) -> str:
    """What was done to how many rows."""
    actions = [request.action for request in record.requests]
    parts = [(word, actions.count(action)) for action, word in DONE.items() if action in actions]
    (first_word, first_number), *others = parts
    first = f"{count(first_number, 'training row')} {first_word}"
    return ", ".join([first, *(f"{number:,} {word}" for word, number in others)])


def loss_was_asked_for(record: EditRecord) -> bool:
    """Whether the target is a loss that was asked for, rather than that of rows never seen."""
    return str(record.method.settings.get("until")).startswith("loss=")


def target_is_of_base(record: EditRecord) -> bool:
    """Whether the target was the base model's loss."""
    return record.method.settings.get("until") == "base"


def goal_word(group: Group, record: EditRecord) -> str:
    """What the loss now is held against, in a word."""
    if group.kind == "change" and not group.finite_values("target").size:
        return "goal"
    return "asked for" if loss_was_asked_for(record) else "expected"


def tile(group: Group) -> str:
    """The means behind the verdict, and what they are as probabilities."""
    before, after = group.mean("before"), group.mean("after")
    means = f"Loss {loss(before)} before, {loss(after)} now."
    if before is None or after is None or min(before, after) < 0:
        return means
    chances = [share(math.exp(-value)) for value in (before, after)]
    return f"{means} Typical probability of the right next token: {arrow(*chances)}."


def headline(group: Group, record: EditRecord) -> str:
    """The answer, in a sentence or two."""
    n = len(group.rows)
    rows = rows_in_question(group)
    word = group.by_loss
    passed = word.removesuffix(" on average")
    if word == "not judged":
        sentence = _not_judged(group, rows)
    elif group.kind == "remove":
        sentence = _forgotten(group, record, rows)
    else:
        sentence = _taken_up(group, rows)
    if word != passed:
        unknown = group.count("not judged")
        short = n - group.count(passed) - unknown
        sentence = f"on average {sentence}"
        if short:
            sentence += f"; {short:,} of them {'falls' if short == 1 else 'fall'} short"
        if unknown:
            sentence += f"; {unknown:,} of them cannot be judged"
    if group.recited:
        which = "it" if n == 1 else f"{group.recited:,} of them"
        sentence += f". Of {which} the adapter can still be made to recite more than half"
    return " ".join([f"{sentence[0].upper()}{sentence[1:]}.", *_beside_unseen(group)])


def _beside_unseen(group: Group) -> list[str]:
    """What is left of the rows beside models that never saw them, where it is more or less."""
    sentences = []
    for verdict, begin in (
        ("more than unseen", "Yet more of the old text is left than in models that never saw it"),
        (
            "less than unseen",
            "Less of the old text is left than in models that never saw it, which is conspicuous",
        ),
    ):
        parts = [
            f"{MEASURED.get(each.name, text(each.name, 40))} {measured(each.after)} against "
            f"{measured(each.unseen)}"
            for each in group.measured
            if each.verdict == verdict
        ]
        if parts:
            sentences.append(f"{begin}: {'; '.join(parts)}.")
    return sentences


def rows_in_question(group: Group) -> str:
    """The rows of a group, as a sentence names them."""
    n = len(group.rows)
    what = ("removed " if group.kind == "remove" else "changed ") + ("row" if n == 1 else "rows")
    return f"the {what}" if n == 1 else f"the {n:,} {what}"


def _not_judged(group: Group, rows: str) -> str:
    """The answer where there is none."""
    before, after = group.mean("before"), group.mean("after")
    verb = "is" if len(group.rows) == 1 else "are"
    why = "the record has no loss to expect"
    if after is None:
        why = "their losses were not measured row by row"
    aim = "forgotten" if group.kind == "remove" else "taken up"
    sentence = f"whether {rows} {verb} {aim} cannot be said: {why}"
    return (
        sentence if after is None else f"{sentence}. Loss before {loss(before)}, now {loss(after)}"
    )


def _forgotten(group: Group, record: EditRecord, rows: str) -> str:
    """The answer for removed rows."""
    after, goal = group.mean("after", "goal"), group.mean("goal", "after")
    before = group.mean("before", "after", "goal")
    single = len(group.rows) == 1
    verb, unseen = ("is", "a row") if single else ("are", "rows")
    asked_for, of_base = loss_was_asked_for(record), target_is_of_base(record)
    if not group.by_loss.startswith("forgotten"):
        aim = "of the base model" if of_base else f"expected of {unseen} the adapter never saw"
        return (
            f"{rows} {verb} {group.by_loss}: loss {loss(after)}, {loss(before)} before, against "
            f"{loss(goal)} {'asked for' if asked_for else aim}"
        )
    if asked_for:
        return (
            f"{rows} {'has' if single else 'have'} reached the loss asked for: {loss(after)} "
            "against "
            f"{loss(goal)}"
        )
    as_unfamiliar = "to the base model" if of_base else f"{unseen} it never saw"
    return (
        f"{rows} {verb} now about as unfamiliar to the adapter as {as_unfamiliar}: loss "
        f"{loss(after)} "
        f"against {loss(goal)}{'' if of_base else ' expected'}"
    )


def _taken_up(group: Group, rows: str) -> str:
    """The answer for rows with new content."""
    after, goal = group.mean("after", "goal"), group.mean("goal", "after")
    before = group.mean("before", "after", "goal")
    aim = "that the old content had before"
    if group.finite_values("target").size:
        aim = "expected"
    return (
        f"the new content of {rows} is {group.by_loss.removesuffix(' on average')}: loss "
        f"{loss(after)}, "
        f"{loss(before)} before, against {loss(goal)} {aim}"
    )


def remarks(group: Group) -> list[str]:
    """What else the rows' numbers say: too far, rank, recital, old content."""
    of_kind = _remarks_on_removed(group) if group.kind == "remove" else []
    sentences = [*of_kind, *_recital(group)]
    if group.kind == "change":
        sentences.append(_old_content(group))
    base = group.mean("base")
    if base is not None:
        them = "it" if len(group.rows) == 1 else "them"
        sentences.append(
            f"Without any adapter, the base model has the loss {loss(base)} on {them}."
        )
    names = {"extraction_after": "recital"}
    if group.kind == "remove":
        names = {"rank": "rank among unseen rows", **names, "target": "expected loss"}
    missing = [word for name, word in names.items() if not group.finite_values(name).size]
    has_goal = group.mean("goal", "after") is not None
    if group.kind == "change" and has_goal and not group.finite_values("target").size:
        sentences.append(
            "The goal is the loss that the old content had before the edit: so well did the "
            "adapter "
            "know it."
        )
    if missing:
        sentences.append(f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}.")
    return sentences


def _remarks_on_removed(group: Group) -> list[str]:
    """That removed rows went too far, or were forgotten before, and how they rank."""
    sentences, several = [], len(group.rows) > 1
    after, goal = group.mean("after", "goal"), group.mean("goal", "after")
    if after is not None and goal is not None and after > 1.25 * goal:
        sentences.append(
            "Their loss is well above what is expected of rows never seen: a conspicuously high "
            "loss "
            "can itself give away that something was removed."
        )
    already = sum(forgetting(None, row.before, row.target) == "forgotten" for row in group.rows)
    if already:
        sentences.append(f"{count(already)} had such a loss before the edit already.")
    ranks = group.finite_values("rank")
    if ranks.size:
        low = int(np.sum(ranks < 0.05))
        end = "."
        if several:
            by_chance = f"chance: {0.05 * ranks.size:,.3g}."
            end = f"; {low:,} of {ranks.size:,} below 5 %, {by_chance}"
        sentences.append(
            f"Rank among comparable unseen rows: {share(float(np.median(ranks)))}"
            f"{' in the median' if several else ''} (50 % is typical of a row never seen){end}"
        )
    return sentences


def _recital(group: Group) -> list[str]:
    """How much of the text the adapter can be made to say."""
    values = group.finite_values("extraction_after")
    if not values.size:
        return []
    spread = ""
    if len(group.rows) > 1:
        spread = f"; mean of {count(values.size)}, highest now {share(float(values.max()))}"
    what = "text" if group.kind == "remove" else "new content"
    return [
        f"Recital: given the prompt and the start of the {what}, the adapter can be made to say "
        "the "
        f"last {share(group.mean('extraction_after'))} of it word for word (before: "
        f"{share(group.mean('extraction_before'))}{spread})."
    ]


def _old_content(group: Group) -> str:
    """What became of the content that was replaced."""
    pairs = [(finite(row.after), finite(row.old_after)) for row in group.rows]
    both = [(new, old) for new, old in pairs if new is not None and old is not None]
    favour = ""
    if both:
        prefers = sum(new < old for new, old in both)
        favour = f"; the adapter now prefers the new to the old in {prefers:,} of {len(both):,}"
    return (
        f"Old content: loss {loss(group.mean('old_before'))} before, "
        f"{loss(group.mean('old_after'))} now{favour}."
    )


# ---- the other rows, exactness, cost -------------------------------------------------------------


def others(record: EditRecord) -> str:
    """What happened to the rows that nobody asked to change."""
    guard = record.guard
    rise, limit = finite(guard.damage), finite(guard.max_damage)
    verdict = damage(rise, limit)
    if rise is None:
        return "What the edit did to the loss of the other training rows was not measured."
    moved = "rose" if rise >= 0 else "fell"
    sentence = f"The loss of the other training rows {moved} by {share(abs(rise))}"
    sentence += f" (limit: {share(limit)})." if limit is not None else "; no limit was set."
    if guard.forced and verdict == "beyond the limit":
        sentence += " It was saved all the same, by force."
    elif guard.forced:
        sentence += " Force was given and not needed."
    passed, within = guard.passed, verdict == "within the limit"
    if passed is not None and limit is not None and passed != within:
        sentence += (
            f" The record says that the limit was {'kept' if passed else 'broken'}, which its own "
            "numbers deny."
        )
    return sentence


def compared_losses(record: EditRecord) -> dict[str, tuple[float | None, float | None]]:
    """The losses after, here and of the retrained adapter, for `verdicts.agreement`."""
    losses, retrained = record.losses, record.agreement
    heldout = None if losses.heldout is None else losses.heldout.after
    if retrained is None:
        return {}
    return {
        "edited": (losses.edited.after, retrained.edited),
        "retained": (losses.retained.after, retrained.retained),
        "heldout": (heldout, retrained.heldout),
    }


def compared(record: EditRecord) -> str:
    """What the comparison with training again says."""
    verdict, apart = agreement(compared_losses(record))
    if verdict == "not compared":
        return "This edit was not compared with an adapter that was trained again."
    if verdict == "agrees":
        return "Every mean loss is within 10 % of that of an adapter trained again; single rows may not be."
    names = {"edited": "edited rows", "retained": "retained rows", "heldout": "held-out rows"}
    listed = ", ".join(names[name] for name in apart)
    return (
        f"More than 10 % from an adapter trained again on: {listed}. Two trainings with other "
        "seeds "
        "differ too."
    )


def losses(record: EditRecord) -> list[tuple[str, ...]]:
    """The table of what changed: rows, before, now, change, after training again."""
    parts = {
        "edited": ("edited rows", record.losses.edited),
        "retained": ("other training rows", record.losses.retained),
        "heldout": ("held-out rows", record.losses.heldout),
    }
    lines: list[tuple[str, ...]] = []
    for name, (what, part) in parts.items():
        if part is None or part is nothing(type(part)):
            lines.append((what,))
            continue
        before, after = finite(part.before), finite(part.after)
        change = NOT_MEASURED
        if before and after is not None:
            change = ("+" if after >= before else "") + share(after / before - 1)
        size = NOT_MEASURED if finite(part.rows) is None else f"{part.rows:,.0f}"
        cells = (what, size, loss(part.before), loss(part.after), change)
        if record.agreement is not None:
            cells = (*cells, loss(getattr(record.agreement, name)))
        lines.append(cells)
    return lines


def below_losses(record: EditRecord) -> str:
    """What stands below the table of losses."""
    sentences = []
    if len({request.action == "remove" for request in record.requests}) == 2:
        sentences.append(
            "Edited rows: removed ones and the new content of changed ones in one mean."
        )
    error = finite(record.losses.retained.standard_error)
    if error is not None:
        sentences.append(f"Standard error of the other rows' mean change: {small(error)}.")
    heldout, comparable = record.losses.heldout, record.comparable
    if heldout is None:
        sentences.append(
            "No held-out rows were given, so nothing was measured on text outside the training "
            "rows."
        )
    elif heldout.source:
        sentences.append(f"Held-out rows from {text(heldout.source)}.")
    if comparable is not None and comparable.source:
        sentences.append(
            f"Comparable unseen rows: {text(comparable.source)}, {count(comparable.rows)}."
        )
    else:
        sentences.append("Comparable unseen rows: not recorded.")
    return " ".join(sentences)


def method(record: EditRecord) -> str:
    """How the new weights were found, in words."""
    name, settings, steps = record.method.name, record.method.settings, record.steps
    accepted = sum(bool(step.accepted) for step in steps or ())
    taken = "steps not recorded"
    if steps is not None:
        taken = f"{accepted:,} of {len(steps):,} tried steps kept"
    if name == "one-shot":
        return (
            "One closed-form step: the weights moved once, by the inverse curvature of "
            "the "
            "training loss times the gradients of the rows in question."
        )
    if name == "re-linearised":
        return (
            f"Several steps by the inverse curvature, with gradients taken anew at each ({taken})."
        )
    if "steps_taken" in settings:
        long_name = text(settings.get("title") or name or "gradient steps")
        number = count(settings["steps_taken"], "gradient step")
        return f"{text(name or '')}: {long_name}, {number} (steps.jsonl has each)."
    return f"{text(name or 'Method not recorded')} ({taken})."


def exactness(record: EditRecord) -> list[tuple[str, str]]:
    """How near the edit is to the exact answer: name and text of each fact."""
    residual, objective, edited = record.residual, record.residual.objective, record.losses.edited
    solver, tolerance = finite(residual.solver), finite(residual.tolerance)
    solved = small(residual.solver)
    if solver is not None and tolerance is not None:
        within = "within" if solver <= tolerance else "NOT within"
        solved += f", {within} the tolerance {small(tolerance)}"
    if solver is not None:
        solved += " (worst relative residual)"
    gradient = NOT_MEASURED
    if objective is not None and (objective.before, objective.after) != (None, None):
        gradient = (
            f"{small(objective.before)} before, {small(objective.after)} now: norm for the "
            "retained "
            "rows, 0 only at their optimum (Guo et al. 2020)"
        )
    forecast = ("First-order forecast", NOT_MEASURED)
    if edited.predicted is not None:
        both = f"loss {loss(edited.predicted)}, measured {loss(edited.after)}"
        forecast = ("This move, linearly", both)
    size = NOT_MEASURED
    if record.delta.relative is not None:
        size = f"{share(record.delta.relative)} of the adapter's length"
    facts = [
        ("Method", method(record)),
        ("Why it ended", text(record.stopped) if record.stopped else NOT_MEASURED),
        ("Equations solved to", solved),
        ("Objective's gradient", gradient),
        forecast,
        ("Size of the move", size),
    ]
    divergence = None if record.agreement is None else record.agreement.kl
    if divergence:
        parts = list(divergence.items())[:6]
        sets = ", ".join(f"{text(name, 40)} {setting(value)}" for name, value in parts)
        facts.append(("KL to training again", f"{sets} (nats per token)"))
    return facts


def cost(record: EditRecord) -> str:
    """What the edit took, in passes and time, against training again."""
    total, seconds = finite(record.cost.total), finite(record.cost.seconds)
    work, time = NOT_MEASURED, NOT_MEASURED
    if total is not None:
        work = f"{total:,.0f} row gradients (forward and backward of one row)"
    if seconds is not None:
        time = f"{seconds:,.1f} s"
    ratio = share(finite(record.cost.ratio))
    return f"work {work}; time {time}; against training again {ratio}."


# ---- commands and digests ------------------------------------------------------------------------


def can_be_typed(value: str) -> bool:
    """Whether a text can be typed into a command as it is shown."""
    return printable(value) == value and "\n" not in value and len(value) <= 240


def folder_argument(folder: str | os.PathLike[str]) -> str:
    """The edit's folder as an argument of a command."""
    path = os.path.abspath(folder)
    return shlex.quote(path) if can_be_typed(path) else "DIR"


def run_argument(record: EditRecord) -> str:
    """The run as an argument of a command."""
    run = record.run.path
    safe = run and can_be_typed(run) and not run.startswith("-")
    return shlex.quote(run) if run and safe else "RUN"


def retrain_command(record: EditRecord, folder: str) -> str:
    """The commands for the exact answer and its comparison, ready to paste.

    What retraining costs is null where no recipe is recorded: then one must be given.
    """
    recipe = " --recipe RECIPE.json" if finite(record.cost.retraining) is None else ""
    return (
        f"unlearn retrain --run {run_argument(record)} \\\n    --edit {folder}{recipe} "
        "--out RETRAINED\n"
        f"analysis report --edit {folder} \\\n    --retrained RETRAINED --out PAGE.html"
    )


def digests(record: EditRecord, digest: str | None) -> list[tuple[str, str, str | None]]:
    """Name, place and digest of everything that the edit was made from and made.

    `digest` is that of the record itself.
    """
    data, adapter = record.data, record.adapter
    before, after = finite(data.rows_before), finite(data.rows_after)
    files: Mapping[str, Any] = record.files or {}
    named: list[tuple[str, str | None, str | None]] = [
        ("run", record.run.path, record.run.digest),
        ("base model", record.base.path, record.base.digest),
        ("adapter before", adapter.before.path, adapter.before.digest),
        ("adapter now", None, adapter.after.digest),
        ("training rows before", None if before is None else count(before), data.before),
        ("training rows now", None if after is None else count(after), data.after),
        ("this record", None, digest),
        ("tokenizer", None, record.tokenizer.digest),
        *((text(name, 80), None, str(value)) for name, value in list(files.items())[:20]),
    ]
    return [
        (name, "" if place is None else text(place), None if full is None else text(full))
        for name, place, full in named
    ]
