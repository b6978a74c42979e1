"""The table of a removal: the best method first, names that cannot move a cursor, and notes."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from analysis.evaluation.removal_table import lines, tables


def part(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high}


def entry(method, share, rise, over_random, positive=2, rows=2):
    return {
        "method": method,
        "share": share,
        "rows": rows,
        "positive": positive,
        "rise": rise,
        "over_random": over_random,
    }


RECORD = {
    "rows": 40,
    "query_ids": ["a", "b"],
    "unit": "nats per token",
    "level": 0.95,
    "request": {"seeds": 1, "draws": 5},
    "reference": {"loss": 0.25},
    "left_out": {"BM25": "it has no word in common with any row"},
    "removals": [
        entry("influence", 0.05, part(0.5, 0.25, 0.75), part(0.4875, 0.2, 0.7)),
        entry("a/very/long/folder/of/trak.npy", 0.05, part(0.75), part(0.7375), positive=1),
        entry("random", 0.05, part(0.0125, -0.01, 0.03), None, positive=None),
        entry("\x1b[2Jx\n.npy", 0.1, part(-0.5), part(0.0), rows=4, positive=4),
        entry("random", 0.1, part(-0.5), None, rows=4, positive=None),
    ],
}


def printed(table) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(table)
    return console.file.getvalue().splitlines()


def test_a_table_for_every_share_best_method_first():
    first, second = map(printed, tables(RECORD))
    assert first[0].strip() == "without 2 of 40 rows (0.05), rise of the loss"
    assert second[0].strip() == "without 4 of 40 rows (0.1), rise of the loss"
    assert first[1].split() == [
        "named",
        "by",
        "rise",
        "95%",
        "interval",
        "over",
        "random",
        "95%",
        "interval",
    ]
    cells = [line.split() for line in first[3:]]
    assert cells[0] == ["...er/of/trak.npy", "+0.7500", "+0.7375"]
    assert cells[1] == (
        ["influence", "+0.5000", "+0.2500", "to", "+0.7500", "+0.4875", "+0.2000", "to", "+0.7000"]
    )
    assert cells[2] == ["random", "+0.0125", "-0.0100", "to", "+0.0300"]
    assert all(len(line) <= 80 for line in [*first, *second])
    assert not any("\x1b" in line for line in second)


def test_what_is_said_beside_the_tables():
    assert lines(RECORD) == [
        "mean loss of 2 queries, nats per token; with all rows 0.2500; 1 seed of the training, "
        "5 draws of random rows; intervals over queries",
        "BM25 is left out: it has no word in common with any row",
        "a/very/long/folder/of/trak.npy names 2 of 40 rows, of which 1 helped by its own scores",
    ]
    single = RECORD | {"query_ids": ["a"], "request": {"seeds": 2, "draws": 1}}
    assert lines(single)[0].startswith("mean loss of 1 query, ")
    assert "; 2 seeds of the training, 1 draw of random rows;" in lines(single)[0]
