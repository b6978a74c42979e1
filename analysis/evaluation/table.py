"""The table of an evaluation, for a person: sets and adapters side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import wrap
from typing import Any

#: What the record says where something was not asked for, which the table passes over.
UNASKED = "not asked for"
_TITLES = {"forget": "forget", "retain": "retained", "holdout": "held-out"}
_LINES = (
    ("loss, nats per token", "loss", ".3f"),
    ("perplexity", "perplexity", ".4g"),
    ("accuracy, of tokens", "accuracy", ".3f"),
    ("exact memorization", "exact_memorization", ".3f"),
    ("extraction strength", "extraction_strength", ".3f"),
    ("rows drawn out whole", "extracted", "d"),
    ("ROUGE-1 of generations", "rouge1", ".3f"),
    ("ROUGE-L of generations", "rougeL", ".3f"),
)
_ATTACKS = {
    "loss": "loss",
    "zlib": "loss / zlib",
    "min_k": "min-k, 20 %",
    "min_40": "min-k, 40 % (MUSE)",
    "min_k_plus_plus": "min-k++",
    "base": "loss below base's",
    "gradient_norm": "gradient norm",
}
_WIDTH = 11


def table(result: Mapping[str, Any]) -> str:
    """An evaluation for a person, at most 100 columns wide.

    Sets and adapters side by side, then what compares them.
    """
    sets = {name: entry for name, entry in result["sets"].items() if entry is not None}
    who = ["adapter"] + (["reference"] if result["reference"] else [])
    span = _WIDTH * len(who)
    lines = [f"{'':<26}" + "".join(f"{_TITLES[name]:>{span}}" for name in sets)]
    if len(who) > 1:
        lines.append(f"{'':<26}" + "".join(f"{where:>{_WIDTH}}" for _ in sets for where in who))

    def line(title: str, value: Callable[[str, str], Any], form: str) -> None:
        cells = [value(name, where) for name in sets for where in who]
        if any(cell is not None for cell in cells):
            lines.append(
                f"{title:<26}" + "".join(f"{_shown(cell, form):>{_WIDTH}}" for cell in cells)
            )

    line("rows", lambda name, where: sets[name]["rows"] if where == "adapter" else None, "d")
    line(
        "loss of the base",
        lambda name, where: sets[name]["base"]["loss"] if where == "adapter" else None,
        ".3f",
    )
    for title, key, form in _LINES:
        line(title, lambda name, where, key=key: sets[name][where][key], form)
    line(
        "truth ratio, median",
        lambda name, where: (sets[name][where]["truth_ratio"] or {}).get("median"),
        ".3g",
    )
    kl = result["kl"] or {}
    line(
        "KL(reference || adapter)",
        lambda name, where: kl.get(name) if where == "adapter" else None,
        ".3f",
    )
    for bits, losses in (result["probes"]["quantise"] or {}).items():
        line(
            f"loss, rounded to {bits} bits",
            lambda name, where, losses=losses: losses[name][where],
            ".3f",
        )
    lines += (
        _membership_lines(result)
        + _relearn_lines(result)
        + _single_lines(result)
        + _note_lines(result)
    )
    return "\n".join(lines)


def _membership_lines(result: Mapping[str, Any]) -> list[str]:
    membership, beside = result["membership"], result["reference"] is not None
    if membership is None:
        return []
    leaks = any(attack["privleak"] is not None for attack in membership["attacks"].values())
    heads = ["AUC", "95 % interval", "TPR at 1 %", "at 10 %"]
    heads += (["AUC ref."] if beside else []) + (["PrivLeak"] if leaks else [])
    widths = [8, 17, 12, 10, 11, 11]
    lines = [
        "",
        f"{'member or held-out?':<26}"
        + "".join(f"{head:>{w}}" for head, w in zip(heads, widths, strict=False)),
    ]
    for key, title in _ATTACKS.items():
        attack = membership["attacks"][key]
        adapter, reference = attack["adapter"], attack["reference"]
        cells = [_shown(adapter["auc"], ".3f"), f"{adapter['low']:.3f} to {adapter['high']:.3f}"]
        cells += [_shown(adapter["tpr"][fpr], ".3f") for fpr in ("0.01", "0.1")]
        cells += [_shown(reference["auc"], ".3f")] if beside else []
        cells += (
            [_shown(attack["privleak"], "+.1f") + " %"] if attack["privleak"] is not None else []
        )
        lines.append(
            f"{title:<26}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=False))
        )
    held = result["sets"]["holdout"]["rows"]
    if held < 100:
        lines.append(f'With {held} held-out rows "1 %" allows no false positive at all.')
    if not beside:
        lines.append(
            "An AUC off 0.5 may also say that forget and held-out rows differ in kind: "
            "--reference, an adapter\n"
            "trained without the forget rows, tells the two apart."
        )
    return lines


def _relearn_lines(result: Mapping[str, Any]) -> list[str]:
    curves = result["probes"]["relearn"]
    if curves is None:
        return []
    steps = curves["steps"]
    shown = [place for place in range(len(steps)) if len(steps) <= 6 or place % 2 == 0]
    head = (
        f"trained again on {len(curves['trained_ids'])} forget rows: loss of the others after step"
    )
    lines = ["", head, f"{'':<26}" + "".join(f"{steps[place]:>{_WIDTH}}" for place in shown)]
    for where in ("adapter", "reference"):
        if curves[where] is not None:
            curve = curves[where]["held_back"]
            lines.append(
                f"{where:<26}" + "".join(f"{curve[place]:>{_WIDTH}.3f}" for place in shown)
            )
    if curves["level"] is not None:
        after = curves["adapter"]["back_after"]
        when = "not reached" if after is None else f"reached after {after:.1f} steps"
        lines.append(f"{curves['level']:.3f}, {curves['level_source']}: {when}")
    return lines


def _single_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if (quality := result["forget_quality"]) is not None:
        lines.append(
            f"forget quality, p-value    {quality['value']:.3g} (smallest possible "
            f"{quality['floor']:.2g})"
        )
    if result["generalized_exposure"] is not None:
        lines.append(
            f"generalized exposure       {result['generalized_exposure']:+.3f} bits per token "
            "against the reference"
        )
    if (relative := result["relative_exposure"]) is not None:
        beside = (
            f"; the reference's {relative['reference']:+.3f}" if "reference" in relative else ""
        )
        lines.append(
            f"relative exposure          {relative['adapter']:+.3f} bits per token against "
            f"held-out rows{beside}"
        )
    if (utility := result["utility"]) is not None:
        beside = (
            f"; the reference's {utility['reference']['value']:.3f}" if utility["reference"] else ""
        )
        parts = ", ".join(part.removeprefix("retain ") for part in utility["adapter"]["parts"])
        lines.append(
            f"utility, retained rows     {utility['adapter']['value']:.3f} (of {parts}){beside}"
        )
    return ["", *lines] if lines else []


def _note_lines(result: Mapping[str, Any]) -> list[str]:
    """What else to know, and what was left out and why, one line per reason."""
    why: dict[str, list[str]] = {}
    remarks = [reason for name, reason in result["notes"].items() if name.startswith("remark.")]
    for name, reason in result["notes"].items():
        if not reason.startswith(UNASKED) and reason not in remarks:
            why.setdefault(reason, []).append(name)
    lines = [f"note: {reason}" for reason in remarks]
    lines += [f"not measured: {', '.join(names)}: {reason}" for reason, names in why.items()]
    return (
        ["", *(part for line in lines for part in wrap(line, 98, subsequent_indent="  "))]
        if lines
        else []
    )


def _shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
