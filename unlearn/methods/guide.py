"""What `unlearn methods --guide` says: how to choose a learning rate, and what was measured.

The numbers are in `measured_rates.json` beside this file, with the program and the date that
measured them; docs/choosing-a-rate.md has them as a table, and says where the rule is from.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from unlearn.methods.methods import METHODS

RULE = (
    "How to choose a learning rate\n"
    "\n"
    "A rate is given by its stride, the length of the first step's move over the adapter's "
    "length (--stride): the same on adapters of\n"
    "any size and with any optimizer. --lr gives the rate itself.\n"
    "\n"
    "1. Run the method with its own stride. The last line says in how many steps the goal "
    "was reached; steps.jsonl has every step.\n"
    "2. 5 to 20 steps: keep it. Fewer: a third of the stride costs three times the steps, "
    "and for methods with retained rows leaves\n"
    "   their loss a little lower. Methods without retained rows (ga, random-labels, "
    "adversarial-labels) lose them at any rate.\n"
    "3. Not reached: three times the steps first (--steps), then three times the stride. "
    "npo, simnpo and idk-dpo slow down before the\n"
    "   goal by design; a stride that takes them there in a few steps loses what they are "
    "for.\n"
    "4. The retained rows' loss rises from the first steps on: a smaller stride will not "
    "help much. Take ngdiff, whose rate is found\n"
    "   automatically, or give more retained rows a step (--retain-batch-size)."
)


@cache
def measured_rates() -> dict[str, Any]:
    """The content of `measured_rates.json`.

    `methods` has for each method, at each of `factors` times its own stride, the steps that were
    taken, whether the goal was reached, and the losses of forget and retained rows after.
    """
    text = (files("unlearn.methods") / "measured_rates.json").read_text(encoding="utf-8")
    return json.loads(text)


def rates() -> list[dict[str, Any]]:
    """The measurements, one entry per method and stride, losses in nats per token."""
    measured = measured_rates()
    return [
        {"method": name, "stride": METHODS[name]().stride * factor, **measurement}
        for name, measurements in measured["methods"].items()
        for factor, measurement in zip(measured["factors"], measurements, strict=True)
    ]


def guide_text() -> str:
    """The rule and the measurements, for a person."""
    measured = measured_rates()
    before, retrained = measured["before"], measured["retrained"]
    titles = "".join(f"{title:>22}" for title in ("stride / 3", "stride", "stride x 3"))
    lines = [
        RULE,
        "",
        f"Measured: 20 of 200 rows of a small adapter, goal {measured['goal']:.2f}; "
        f"forget / retained loss before {before['forget']:.2f} / {before['retained']:.2f}, "
        f"retrained {retrained['forget']:.2f} / {retrained['retained']:.2f}.",
        "Steps (- : goal not reached in so many), loss of forget / retained rows after:",
        "",
        f"{'method':<20}{'stride':>8}{titles}",
    ]
    for name, measurements in measured["methods"].items():
        cells = "".join(f"{_cell(measurement):>22}" for measurement in measurements)
        lines.append(f"{name:<20}{METHODS[name]().stride:>8.1%}{cells}")
    return "\n".join(lines)


def _cell(measurement: dict[str, Any]) -> str:
    """One measurement as the table shows it."""
    reached = "" if measurement["reached"] else " -"
    losses = f"{measurement['forget']:.2f} / {measurement['retained']:.2f}"
    return f"{measurement['steps']}{reached}, {losses}"
