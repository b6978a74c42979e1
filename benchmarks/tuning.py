"""How `unlearning.py` tunes: every method's rate on a grid that is widened until the best is inside.

The grid is a method's own rate times powers of `FACTOR`. It begins with 0 and 1, and one rule keeps
one: among those that reach the goal the one with the lowest loss on retained rows, where none does
the one that comes nearest to it. As long as the kept one has a neighbour that was not run, that is
run, up to `FARTHEST` to each side. So the kept rate is better than both its neighbours, or the
table says that it lies at the edge. The rule looks at nothing but what a user has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: The factor between two rates, and the farthest powers of it: 1/81 and 81. A choice.
FACTOR, FARTHEST = 3.0, 4


class Lines:
    """The finished runs of one removal, kept as lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def of(self, **keys: Any) -> list[dict[str, Any]]:
        """Those with these values."""
        return [
            line
            for line in self.lines
            if all(line.get(key) == value for key, value in keys.items())
        ]

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Keep one."""
        self.lines.append(line)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        return line


def kept_power(lines: Sequence[dict[str, Any]]) -> int:
    """The power of the rate that is kept, of the runs of one method with one seed.

    Of equally good ones the nearest to 0; where every run failed, the smallest.
    """
    sound = [line for line in lines if "failed" not in line]
    if not sound:
        return min(line["power"] for line in lines)
    reached = [line for line in sound if line["reached"]]
    if reached:
        best = min(reached, key=lambda line: (line["retained"], abs(line["power"])))
    else:
        best = min(sound, key=lambda line: (-line["forget"], abs(line["power"])))
    return best["power"]


def next_power(lines: Sequence[dict[str, Any]]) -> int | None:
    """The power that is still to be run, or None where the grid is wide enough."""
    done = {line["power"] for line in lines}
    wanted = [0, 1]
    if done.issuperset(wanted):
        kept = kept_power(lines)
        wanted = [power for power in (kept - 1, kept + 1) if abs(power) <= FARTHEST]
    return next((power for power in wanted if power not in done), None)


def at_edge(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether the kept rate has a neighbour that was not run."""
    done, kept = {line["power"] for line in lines}, kept_power(lines)
    return not done.issuperset({kept - 1, kept + 1})


def tune(lines: Lines, method: str, seed: int, run: Callable[[int], None]) -> int:
    """Run a method's powers that are missing, and give the one that is kept.

    `run` adds the line of one power.
    """
    while (power := next_power(lines.of(method=method, seed=seed))) is not None:
        run(power)
    return kept_power(lines.of(method=method, seed=seed))
