"""Verdicts on an edit: the words that follow from its numbers, by these rules and by nothing else.

Losses are means per completion token, in nats.

* removed row: `forgotten` where after >= 0.9 target; else `partly forgotten` where
  after - before >= 0.1 (target - before); else `not forgotten`, also where `before` is unknown.
* relabelled or corrected row, by the loss of its new content. The goal is the target or, without
  one, the loss that the old content had before the edit: so well did the adapter know what it was
  taught. `taken up` where after <= goal or share >= 0.9, with
  share = (before - after) / (before - goal); else `partly taken up` where share >= 0.1; else
  `not taken up`.
* several rows (`analysis.report.groups`): the same rules on the means over the rows where both
  losses are known; ` on average` is added where the means pass and a single row does not, or
  cannot be judged.
* what the edit did not aim at, each measurement by the rule of `unlearn.evidence`: where the rows
  pass by their loss and a measurement says `more than unseen`, the verdict is `forgotten by loss,
  still repeated` (generations), `still recognised` (membership) or `still known` (probe rows); of
  new content `taken up, the old still repeated` and so on. `less than unseen` leaves the word, and
  the answer says that it is conspicuous. Without models that never saw the rows the loss alone
  decides.
* `not judged`: what the rule needs is null or not finite.
* still recited: of a removed row, more than half of the text can be extracted; the answer then says
  so, whatever the loss.
* too far: mean after > 1.25 mean target; the page then warns that a conspicuously high loss is a
  trace too.
* all other rows: `within the limit` where damage <= max_damage, else `beyond the limit`; without a
  limit `no limit set`, above a rise of 10 % `much lost, no limit set`; `not measured`.
* training again: `agrees` where each measured loss is within 10 % of the retrained adapter's; else
  `differs`; `not compared`.

The shares in these rules are choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

NOT_MEASURED = "not measured"
#: Rise of the other rows' loss that is said to be much where no limit was set.
MUCH = 0.1

#: How bad a verdict is: worst first in tables.
LEVEL = {
    "not forgotten": 0,
    "not taken up": 0,
    "partly forgotten": 1,
    "partly taken up": 1,
    "not judged": 2,
}
#: What is left of rows by a measurement that says `more than unseen`, in a word.
LEFT = {
    "generations": "repeated",
    "membership": "recognised",
    "probe-losses": "known",
    "probe-generations": "known",
}
#: The colour beside a verdict; any other has none (`tone`).
TONE = {
    "not forgotten": "bad",
    "not taken up": "bad",
    "beyond the limit": "bad",
    "much lost, no limit set": "bad",
    "partly forgotten": "warn",
    "partly taken up": "warn",
    "forgotten on average": "warn",
    "taken up on average": "warn",
    "differs": "warn",
    "more than unseen": "bad",
    "less than unseen": "warn",
    "as unseen": "good",
    "forgotten": "good",
    "taken up": "good",
    "within the limit": "good",
    "agrees": "good",
}


def tone(verdict: str) -> str:
    """The colour beside a verdict."""
    return "warn" if " still " in verdict else TONE.get(verdict, "unknown")


def finite(value: float | None) -> float | None:
    """The number, or None where it is null, NaN or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def forgetting(before: float | None, after: float | None, target: float | None) -> str:
    """Verdict on removed rows, from losses in nats."""
    before, after, target = finite(before), finite(after), finite(target)
    if after is None or target is None:
        return "not judged"
    if after >= 0.9 * target:
        return "forgotten"
    if before is not None and after - before >= 0.1 * (target - before):
        return "partly forgotten"
    return "not forgotten"


def learning(before: float | None, after: float | None, goal: float | None) -> str:
    """Verdict on relabelled or corrected rows, from the losses of their new content in nats."""
    before, after, goal = finite(before), finite(after), finite(goal)
    if after is None or goal is None:
        return "not judged"
    if after <= goal:
        return "taken up"
    share = 0.0 if before is None or before <= goal else (before - after) / (before - goal)
    return "taken up" if share >= 0.9 else "partly taken up" if share >= 0.1 else "not taken up"


def with_evidence(word: str, measured: Iterable[tuple[str, str | None]]) -> str:
    """The verdict by the loss, `word`, and by what the edit did not aim at.

    `measured` has the name and the verdict of each measurement.
    """
    passed = word.removesuffix(" on average")
    names = [name for name, verdict in measured if verdict == "more than unseen"]
    left = list(dict.fromkeys(LEFT[name] for name in names if name in LEFT))
    if not left or passed not in ("forgotten", "taken up"):
        return word
    still = f"still {' and '.join(left)}"
    return f"{word} by loss, {still}" if passed == "forgotten" else f"{word}, the old {still}"


def damage(rise: float | None, limit: float | None) -> str:
    """Verdict on all other rows: the relative rise of their loss against the limit that was set."""
    rise, limit = finite(rise), finite(limit)
    if rise is None:
        return NOT_MEASURED
    if limit is None:
        return "no limit set" if rise <= MUCH else "much lost, no limit set"
    return "within the limit" if rise <= limit else "beyond the limit"


def agreement(
    losses: Mapping[str, tuple[float | None, float | None]],
) -> tuple[str, tuple[str, ...]]:
    """Verdict on the comparison with a retrained adapter, and the sets that are over 10 % apart.

    `losses` are the edited and the retrained adapter's loss of each set of rows, in nats.
    """
    compared, apart = False, []
    for name, (edited, retrained) in losses.items():
        edited, retrained = finite(edited), finite(retrained)
        if edited is not None and retrained is not None:
            compared = True
            if abs(edited - retrained) > 0.1 * abs(retrained):
                apart.append(name)
    return ("differs" if apart else "agrees") if compared else "not compared", tuple(apart)
