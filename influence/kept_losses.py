"""The rows' losses along a run's path, kept row by row in `losses.h5`.

The manifest has their mean (`influence.path_time`). Row by row they serve a run that is grown from
this one, whose mean is of other rows: those that stay need not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from influence.errors import StoreError
from influence.store import open_file, read, read_strings, write_file

NAME = "losses.h5"


def keep_losses(directory: Path, run_digest: str, ids: Sequence[str], losses: np.ndarray) -> None:
    """Write the mean losses `[places, m]` of the rows `ids` [m], nats a token.

    Places are the base, the adapter, and the points of the path.
    """
    about = "mean cross-entropy (nats a token) under the base, the adapter, and at each point"
    write_file(
        directory / NAME,
        {"losses": losses},
        attrs={"run_digest": run_digest, "about": about},
        strings={"ids": ids},
    )


def kept_losses(directory: Path, run_digest: str, places: int) -> dict[str, np.ndarray]:
    """The losses `[places]` of every row that is kept, by id; nothing where none are.

    A file of another run is a `MismatchError`.
    """
    path = directory / NAME
    if not path.exists():
        return {}
    with open_file(path, run_digest=run_digest) as file:
        ids, losses = read_strings(file, "ids"), read(file, "losses")
    if losses.shape != (places, len(ids)):
        raise StoreError(
            f"{path} holds losses of shape {list(losses.shape)}, expected {[places, len(ids)]}: "
            "delete it, it is made again"
        )
    return dict(zip(ids, losses.T, strict=True))
