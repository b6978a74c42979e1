"""Tables and lines of a study."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from analysis.studies.ood_tables import lines, tables


def test_tables_and_lines_take_rows_that_never_arrived(studied):
    _, found = studied
    late = found.table.assign(steps=np.inf, damage=np.nan)
    made = replace(found, table=late)
    assert len(tables(made)) == 2
    assert len(lines(made)) >= 4
    json.dumps(made.record()["kinds"])
