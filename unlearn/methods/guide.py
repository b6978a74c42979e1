"""How to choose a method's learning rate on a LoRA adapter, and the measurements that the rule is from.

Yao et al. (2024, arXiv 2402.15159) raise the rate until the forget rows' loss goes up and lower it where the retained rows are lost. On
LoRA adapters the number of steps until the goal is reached tells which of the two is near, before anything is lost: `MEASURED` has it
for every method at three strides (`benchmarks/unlearning.py`: 20 of 200 rows of the testbed, seed 0, at most 60 steps). One adapter: the
order of the figures is what carries over, not their size.
"""

from __future__ import annotations

from typing import Any

from unlearn.methods.methods import METHODS

#: Of 1/3, 1 and 3 times a method's own stride: steps taken, whether the goal was reached, losses of forget and retained rows after.
MEASURED: dict[str, tuple[tuple[int, bool, float, float], ...]] = {
    "ga": ((16, True, 4.75, 1.79), (7, True, 4.75, 1.76), (3, True, 4.77, 1.71)),
    "random-labels": ((17, True, 4.75, 1.9), (5, True, 4.74, 1.85), (2, True, 4.76, 2.02)),
    "adversarial-labels": ((60, False, 3.6, 1.39), (38, True, 4.74, 1.88), (15, True, 4.75, 2.28)),
    "ga-gd-general": ((24, True, 4.75, 2.29), (10, True, 4.75, 2.56), (4, True, 4.76, 2.82)),
    "ga-gd": ((19, True, 4.75, 1.26), (8, True, 4.75, 1.31), (4, True, 4.76, 1.39)),
    "ga-kl-general": ((17, True, 4.75, 1.46), (7, True, 4.75, 1.47), (3, True, 4.75, 1.45)),
    "ga-kl": ((17, True, 4.74, 1.4), (7, True, 4.75, 1.43), (3, True, 4.76, 1.43)),
    "ngdiff": ((20, True, 4.75, 0.9), (10, True, 4.75, 0.91), (6, True, 4.76, 0.96)),
    "npo": ((60, False, 3.1, 0.93), (60, False, 3.94, 0.91), (5, True, 4.75, 1.5)),
    "simnpo": ((60, False, 2.76, 0.79), (60, False, 3.29, 0.68), (60, False, 3.54, 0.6)),
    "idk-dpo": ((60, False, 2.19, 0.93), (60, False, 2.68, 0.93), (60, False, 3.34, 1.03)),
    "l1-sparse": ((60, False, 0.92, 0.81), (60, False, 1.26, 0.74), (60, False, 1.86, 0.71)),
    "datamodel-matching": (
        (60, False, 3.18, 1.0),
        (60, False, 3.69, 1.03),
        (60, False, 4.04, 1.04),
    ),
    "control": ((16, False, 1.93, 0.98), (7, False, 2.0, 0.98), (3, False, 1.98, 0.98)),
    "task-arithmetic": ((30, True, 4.76, 3.1), (30, True, 4.75, 2.9), (30, True, 4.77, 2.57)),
}
FACTORS = (1 / 3, 1.0, 3.0)
#: Goal, and the rows' losses before, of an adapter retrained without them (mean of 3 seeds).
GOAL, BEFORE, RETRAINED = 4.74, (0.71, 0.87), (4.82, 0.91)

RULE = """How to choose a learning rate

A rate is given by its stride, the length of the first step's move over the adapter's length (--stride): the same on adapters of
any size and with any optimizer. --lr gives the rate itself.

1. Run the method with its own stride. The last line says in how many steps the goal was reached; steps.jsonl has every step.
2. 5 to 20 steps: keep it. Fewer: a third of the stride costs three times the steps, and for methods with retained rows leaves
   their loss a little lower. Methods without retained rows (ga, random-labels, adversarial-labels) lose them at any rate.
3. Not reached: three times the steps first (--steps), then three times the stride. npo, simnpo and idk-dpo slow down before the
   goal by design; a stride that takes them there in a few steps loses what they are for.
4. The retained rows' loss rises from the first steps on: a smaller stride will not help much. Take ngdiff, whose rate is found
   automatically, or give more retained rows a step (--retain-batch-size)."""


def rates() -> list[dict[str, Any]]:
    """The measurements, one entry per method and stride; losses in nats per token."""
    found = []
    for name, measured in MEASURED.items():
        for factor, (steps, reached, forget, retained) in zip(FACTORS, measured, strict=True):
            entry = {
                "method": name,
                "stride": METHODS[name]().stride * factor,
                "steps": steps,
                "reached": reached,
            }
            found.append(entry | {"forget": forget, "retained": retained})
    return found


def guide_text() -> str:
    """The rule and the measurements, for a person."""
    lines = [
        RULE,
        "",
        f"Measured: 20 of 200 rows of a small adapter, goal {GOAL:.2f}; forget / retained loss before {BEFORE[0]:.2f} / {BEFORE[1]:.2f}, "
        f"retrained {RETRAINED[0]:.2f} / {RETRAINED[1]:.2f}.",
        "Steps (- : goal not reached in so many), loss of forget / retained rows after:",
        "",
        f"{'method':<20}{'stride':>8}"
        + "".join(f"{title:>22}" for title in ("stride / 3", "stride", "stride x 3")),
    ]
    for name, measured in MEASURED.items():
        cells = [
            f"{steps}{'' if reached else ' -'}, {forget:.2f} / {retained:.2f}"
            for steps, reached, forget, retained in measured
        ]
        lines.append(
            f"{name:<20}{METHODS[name]().stride:>8.1%}" + "".join(f"{cell:>22}" for cell in cells)
        )
    return "\n".join(lines)
