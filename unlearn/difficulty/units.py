"""What difficulty is told of: single training rows, or groups of them, with the losses they start from and must reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence.cost import Cost
from influence.errors import InputError
from influence.gradients import stream_gradients
from influence.loss import mean_losses
from influence.path import scaled
from influence.rows import Examples
from influence.run import Run, parts, spaced
from influence.tokens import TokenizedExamples
from unlearn.difficulty.copies import copy_gradients, copy_losses
from unlearn.difficulty.protocol import Protocol
from unlearn.record.change import plan
from unlearn.record.sample import drawn, unseen_rows
from unlearn.record.version import ORIGINAL, version
from unlearn.unseen import ENOUGH, expected_losses

#: Retained rows whose loss is measured after an ascent, and held-out rows, at most.
SAMPLE_ROWS, HELDOUT_ROWS = 16, 16


@dataclass(frozen=True, eq=False)
class Units:
    """n units to be unlearned one at a time, each from the run's own adapter.

    Attributes
    ----------
    names : n strings
        A row's id, or a group's name.
    members : n int arrays
        Positions of each unit's rows in `run.tokens`.
    now, base, target : arrays [n]
        Mean over a unit's rows of their mean loss, nats per token: under the adapter, under the base alone, and where the
        ascent stops.
    sample : int array [m]
        Positions of the fixed sample of training rows whose loss tells the damage.
    sampled_now : array [m]
        Their mean loss under the adapter.
    own : bool array [n, m]
        Whether a sampled row belongs to the unit, or has the content of one that does: it does not count.
    heldout : TokenizedExamples or None
        Rows that the adapter never saw.
    """

    run: Run
    names: tuple[str, ...]
    members: tuple[np.ndarray, ...] = field(repr=False)
    now: np.ndarray = field(repr=False)
    base: np.ndarray = field(repr=False)
    target: np.ndarray = field(repr=False)
    sample: np.ndarray = field(repr=False)
    sampled_now: np.ndarray = field(repr=False)
    own: np.ndarray = field(repr=False)
    heldout: TokenizedExamples | None = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: np.ndarray) -> Units:
        """The units at `rows` alone."""
        names, members = (tuple(kept[i] for i in rows) for kept in (self.names, self.members))
        few = {key: getattr(self, key)[rows] for key in ("now", "base", "target", "own")}
        return replace(self, names=names, members=members, **few)

    @property
    def start(self) -> Tensor:
        """The adapter's parameters [P], in float32 at least: steps of 1e-4 are lost in fewer bits."""
        theta = self.run.model.snapshot()
        return theta if theta.dtype.itemsize >= 4 else theta.float()

    def losses(self, thetas: Tensor, rows: np.ndarray) -> np.ndarray:
        """Loss of unit `rows[i]` with the parameters `thetas[i]`, [c]."""
        return copy_losses(
            self.run.model, thetas, self.run.tokens, self._members(rows), **self._bounds(thetas)
        )

    def gradients(self, thetas: Tensor, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Loss [c] of unit `rows[i]` with the parameters `thetas[i]`, and its gradients [c, P]."""
        return copy_gradients(
            self.run.model, thetas, self.run.tokens, self._members(rows), **self._bounds(thetas)
        )

    def sampled_losses(self, thetas: Tensor) -> np.ndarray:
        """Mean losses [c, m] of the sampled training rows under every copy."""
        return self._each(thetas, self.run.tokens.select(self.sample))

    def heldout_losses(self, thetas: Tensor) -> np.ndarray:
        """Mean losses [c, h] of the held-out rows under every copy; h is 0 where there are none."""
        return (
            np.zeros((len(thetas), 0)) if self.heldout is None else self._each(thetas, self.heldout)
        )

    def sampled_loss(self, thetas: Tensor, places: np.ndarray) -> np.ndarray:
        """Mean loss [c] of the training row at place `places[i]` of the sample with the parameters `thetas[i]`."""
        members = [self.sample[place : place + 1] for place in places]
        return copy_losses(self.run.model, thetas, self.run.tokens, members, **self._bounds(thetas))

    @cached_property
    def sample_gradients(self) -> Tensor:
        """Gradients [m, P] of the sampled training rows' mean losses at the adapter."""
        tokens, budget = self.run.tokens.select(self.sample), self.run.manifest["token_budget"]
        out = torch.zeros(
            len(tokens), self.run.model.space.size, dtype=self.start.dtype, device=self.start.device
        )
        for rows, gradients, _ in stream_gradients(self.run.model, tokens, token_budget=budget):
            counts = torch.from_numpy(tokens.counts[rows]).to(gradients)[:, None]
            out[torch.from_numpy(rows).to(out.device)] = (gradients / counts).to(out)
        return out

    def _members(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self.members[i] for i in rows]

    def _each(self, thetas: Tensor, tokens: TokenizedExamples) -> np.ndarray:
        one = [
            copy_losses(
                self.run.model,
                thetas,
                tokens,
                [np.array([j])] * len(thetas),
                **self._bounds(thetas),
            )
            for j in range(len(tokens))
        ]
        return np.stack(one, axis=1) if one else np.zeros((len(thetas), 0))

    def _bounds(self, thetas: Tensor) -> dict[str, int]:
        return {"token_budget": self.run.manifest["token_budget"], "max_rows": len(thetas)}

    @property
    def chunk(self) -> int:
        """How many copies of the parameters take a bounded amount of memory."""
        wider = self.start.dtype.itemsize // self.run.model.dtype.itemsize
        return max(1, len(parts(self.run, 4096)[0]) // wider)

    def chunks(self, copies: int) -> list[np.ndarray]:
        """Units in parts of which `copies` copies of the parameters each take a bounded amount of memory."""
        size = max(1, self.chunk // copies)
        return np.array_split(np.arange(len(self)), -(-len(self) // min(size, 32)))


def units(
    run: Run,
    ids: Sequence[str] | None,
    groups: Mapping[str, Sequence[str]] | None,
    protocol: Protocol,
    heldout: Examples | None,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
) -> Units:
    """Find the rows (`ids`, default all) or `groups` (name: ids), their losses and targets, and the samples.

    With the target `unseen`, `unlearn.unseen` is asked once a unit: gradients of up to `CANDIDATES` rows each where
    the run has not stored them.

    Raises `InputError` for rows and groups given together, none, ids given twice or as one string, an empty sample;
    `DataError` for an unknown id.
    """
    if ids is not None and groups is not None:
        raise InputError("ids and groups were given together: give one of them")
    if isinstance(ids, str):
        raise InputError(f"ids {ids!r} were given as one string; expected a list, as in [{ids!r}]")
    asked = (
        groups
        if groups is not None
        else {id: [id] for id in (run.train.ids if ids is None else ids)}
    )
    if groups is None and ids is not None and len(asked) != len(ids):
        twice = sorted({id for id in ids if list(ids).count(id) > 1})
        raise InputError(
            f"ids are given more than once: {', '.join(map(repr, twice[:10]))}; name each row once"
        )
    if not asked:
        raise InputError("no row was given: name at least one")
    for name, group in asked.items():
        if isinstance(group, str) or not group or len(set(group)) != len(group):
            raise InputError(
                f"group {name!r} is {group!r}; expected a list of different ids, at least one"
            )
    members = tuple(np.array([run.train.index(id) for id in group]) for group in asked.values())
    if sample_rows < 1:
        raise InputError(f"sample_rows {sample_rows} was given; expected at least 1")
    tokens = unseen_rows(version(run, ORIGINAL), run.train, heldout)
    if protocol.target == "unseen":
        whole = [name for name, group in asked.items() if len(group) == len(run.train)]
        if whole:
            raise InputError(
                f"{whole[0]!r} holds every training row: what a model that saw the others would lose on it is not defined; take "
                "the target base, or fewer rows"
            )
    sample = drawn(run.train, range(len(run.train)), sample_rows, seed)
    budget, needed = run.manifest["token_budget"], np.unique(np.concatenate([*members, sample]))
    now, base = np.zeros(len(run.train)), np.zeros(len(run.train))
    now[needed] = mean_losses(run.model, run.tokens.select(needed), token_budget=budget)
    with run.model.at(scaled(run.model, 0.0)):
        base[needed] = mean_losses(run.model, run.tokens.select(needed), token_budget=budget)
    hashes = [row.content_hash for row in run.train]
    contents = [{hashes[k] for k in rows} for rows in members]
    own = np.array([[hashes[j] in content for j in sample] for content in contents])
    mean = lambda values: np.array([values[rows].mean() for rows in members])  # noqa: E731
    targets = mean(base) if protocol.target == "base" else _unseen(run, asked, now, members, tokens)
    if tokens is not None:
        tokens = tokens.select(spaced(len(tokens), HELDOUT_ROWS))
    return Units(
        run, tuple(asked), members, mean(now), mean(base), targets, sample, now[sample], own, tokens
    )


def _unseen(
    run: Run,
    asked: Mapping[str, Sequence[str]],
    now: np.ndarray,
    members: Sequence[np.ndarray],
    heldout: TokenizedExamples | None,
) -> np.ndarray:
    """Mean expected loss of each unit's rows under a model that never saw them, [n]; see `unlearn.unseen`."""
    start, cost = version(run, ORIGINAL), Cost()
    known = None
    if heldout is not None and len(heldout) >= ENOUGH:
        known = mean_losses(run.model, heldout, token_budget=run.manifest["token_budget"])
    found = [
        expected_losses(plan(start, list(ids)), now[rows], heldout, known, cost).expected.mean()
        for ids, rows in zip(asked.values(), members, strict=True)
    ]
    return np.array(found)
