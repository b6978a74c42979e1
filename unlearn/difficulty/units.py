"""Units of difficulty: training rows, or groups of them, with their losses and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.at_point import evenly_spaced
from influence.cost import Cost
from influence.errors import InputError
from influence.memory import free_memory
from influence.path import scaled
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.shared_rows import dealt, shared_losses
from influence.tokens import TokenizedExamples
from unlearn.difficulty.copies import copy_gradients, copy_losses
from unlearn.difficulty.optimizers import Optimizer
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.sample_gradients import SampleGradients
from unlearn.record.change import plan
from unlearn.record.sample import drawn, unseen_rows
from unlearn.record.version import ORIGINAL, version
from unlearn.retraining.estimate import known_or_estimated
from unlearn.retraining.local import TokenIndex, planned
from unlearn.unseen import expectation, warn_of_unfaithful

#: Retained rows whose loss is measured after an ascent, and held-out rows, at most.
SAMPLE_ROWS, HOLDOUT_ROWS = 16, 16
#: Units that run at a time, at most. A choice.
CHUNK = 32
#: Vectors of P numbers that a unit on its way takes, at most: where one runs at a time, and where
#: several do, of which some are chosen and put back. Counted (tests/unlearn/difficulty/
#: test_memory.py).
ALONE, COPIES = 14, 21
#: Share of the free memory that copies may take where no budget is given, and of the budget that
#: the sampled rows' gradients may take. Choices.
FREE_SHARE, SAMPLE_SHARE = 0.5, 0.5
#: Units that one local retraining leaves out, at most, and the least nearest rows of each. Ten
#: single rows of ten authors on two near rows each: 3.02 expected, 2.99 retrained (LOG.md,
#: 2026-11-28, "What a model that never saw the rows would say").
TOGETHER, NEAR_EACH = 10, 4


@dataclass(frozen=True, eq=False)
class Units:
    """n units to be unlearned one at a time, each from the run's own adapter.

    Losses are means over a unit's rows of their mean losses, nats per token. Several processes have
    the same units, and deal out what is done with each (`dealt`).

    Attributes
    ----------
    names : n strings
        A row's id, or a group's name.
    members : n int arrays
        Positions of each unit's rows in `run.tokens`.
    loss, base_loss, target : arrays [n]
        Loss under the adapter, under the base alone, and where the ascent stops.
    sample : int array [m]
        Positions of the fixed sample of training rows whose loss tells the damage.
    sample_loss : array [m]
        Their mean losses under the adapter.
    excluded : bool array [n, m]
        Sampled rows that do not count for a unit: its own, and those with the content of one of
        them.
    holdout : TokenizedExamples or None
        Rows that the adapter never saw.
    memory : int or None
        Bytes that copies of the adapter's parameters may take; None: half of what is free.
    """

    run: Run
    names: tuple[str, ...]
    members: tuple[np.ndarray, ...] = field(repr=False)
    loss: np.ndarray = field(repr=False)
    base_loss: np.ndarray = field(repr=False)
    target: np.ndarray = field(repr=False)
    sample: np.ndarray = field(repr=False)
    sample_loss: np.ndarray = field(repr=False)
    excluded: np.ndarray = field(repr=False)
    holdout: TokenizedExamples | None = field(repr=False)
    memory: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: np.ndarray) -> Units:
        """The units at `rows` alone."""
        selected = replace(
            self,
            names=tuple(self.names[i] for i in rows),
            members=tuple(self.members[i] for i in rows),
            loss=self.loss[rows],
            base_loss=self.base_loss[rows],
            target=self.target[rows],
            excluded=self.excluded[rows],
        )
        if (known := vars(self).get("sample_gradients")) is not None:
            vars(selected)["sample_gradients"] = known
        return selected

    @property
    def start(self) -> Tensor:
        """The adapter's parameters [P], in float32 at least: fewer bits lose steps of 1e-4."""
        theta = self.run.model.snapshot()
        return theta if theta.dtype.itemsize >= 4 else theta.float()

    def paced(self, protocol: Protocol) -> Protocol:
        """The protocol with its learning rate, where that follows from its stride.

        A first step along the gradient of one sampled row, at the median over the sample, has the
        stride's share of the adapter's length. The rate is rounded to three digits: so what another
        machine measures has the same one.
        """
        if protocol.lr is not None:
            return protocol
        rule = protocol.rule
        moves = [_first_move(rule, gradient).norm() for gradient in self.sample_gradients]
        length, theta = float(torch.stack(moves).median()), float(self.start.norm())
        length = float(distributed.first(np.array(length)))  # the same rate everywhere
        wanted = (protocol.stride or rule.stride) * theta
        if not 0 < length < float("inf") or wanted == 0:
            raise InputError(
                f"a first step of {rule} has length {length:g} and the adapter {theta:g}: no rate "
                "follows from them; give one (lr, --lr)"
            )
        return replace(protocol, lr=float(f"{wanted / length:.3g}"), stride=None)

    def losses(self, thetas: Tensor, rows: np.ndarray) -> np.ndarray:
        """Loss of unit `rows[i]` with the parameters `thetas[i]`, [c]."""
        members = [self.members[i] for i in rows]
        return copy_losses(self.run.model, thetas, self.run.tokens, members, **self._bounds(thetas))

    def gradients(self, thetas: Tensor, rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Loss [c] of unit `rows[i]` with the parameters `thetas[i]`, and its gradients [c, P]."""
        members = [self.members[i] for i in rows]
        return copy_gradients(
            self.run.model, thetas, self.run.tokens, members, **self._bounds(thetas)
        )

    def sample_losses(self, thetas: Tensor) -> np.ndarray:
        """Mean losses [c, m] of the sampled training rows under every copy."""
        return self._losses_of_each(thetas, self.run.tokens.select(self.sample))

    def holdout_losses(self, thetas: Tensor) -> np.ndarray:
        """Mean losses [c, h] of the h held-out rows, or none, under every copy."""
        if self.holdout is None:
            return np.zeros((len(thetas), 0))
        return self._losses_of_each(thetas, self.holdout)

    def sampled_row_losses(self, thetas: Tensor, places: np.ndarray) -> np.ndarray:
        """Mean loss [c] of the sample's row `places[i]` with the parameters `thetas[i]`."""
        members = [self.sample[place : place + 1] for place in places]
        return copy_losses(self.run.model, thetas, self.run.tokens, members, **self._bounds(thetas))

    @cached_property
    def sample_gradients(self) -> SampleGradients:
        """Gradients of the sampled training rows' mean losses at the adapter."""
        return SampleGradients(
            self.run.model,
            self.run.tokens.select(self.sample),
            token_budget=self.run.token_budget,
            dtype=self.start.dtype,
            memory=int(SAMPLE_SHARE * self._budget),
        )

    def _losses_of_each(self, thetas: Tensor, tokens: TokenizedExamples) -> np.ndarray:
        columns = [
            copy_losses(
                self.run.model,
                thetas,
                tokens,
                [np.array([row])] * len(thetas),
                **self._bounds(thetas),
            )
            for row in range(len(tokens))
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(thetas), 0))

    def _bounds(self, thetas: Tensor) -> dict[str, int]:
        return {"token_budget": self.run.token_budget, "max_rows": len(thetas)}

    @property
    def _budget(self) -> int:
        if self.memory is not None:
            return self.memory
        return int(FREE_SHARE * free_memory(self.start.device))

    @cached_property
    def at_once(self) -> int:
        """How many units run at a time: as many as the memory holds the copies of, one at least.

        One where experts are adapted, whose copies cannot run side by side. The same number in all
        processes, which ask for it together.
        """
        return int(distributed.first(np.array(float(self._at_once))))

    @property
    def _at_once(self) -> int:
        """The same, by this process's memory."""
        room, held = self._budget, len(self.sample) * _vector_bytes(self.run)
        if held <= SAMPLE_SHARE * room:
            room -= held
        if self.run.model.routed:
            return 1
        return min(max(1, room // (COPIES * _vector_bytes(self.run))), CHUNK)

    def chunks(self, among: np.ndarray | None = None) -> list[np.ndarray]:
        """Units (of those `among`) in parts of at most `at_once`, one for each process at least."""
        among = np.arange(len(self)) if among is None else among
        parts = max(-(-len(among) // self.at_once), min(len(among), distributed.world()))
        return np.array_split(among, parts) if len(among) else []

    def own_chunks(self, among: np.ndarray | None = None) -> dict[int, np.ndarray]:
        """The chunks that this process does, by their number: dealt out by their tokens."""
        counts, chunks = self.run.tokens.counts, self.chunks(among)
        costs = [sum(float(counts[self.members[i]].sum()) for i in rows) for rows in chunks]
        order = np.argsort(np.negative(costs), kind="stable").tolist()  # the dearest first
        mine = distributed.share(order, [costs[number] for number in order])
        return {number: chunks[number] for number in sorted(mine)}


def _first_move(rule: Optimizer, gradient: Tensor) -> Tensor:
    """First move [1, P] along a gradient [P], at a rate of 1."""
    gradient = gradient[None]
    return rule.step(gradient, rule.begin(gradient), torch.ones(1, 1).to(gradient), 1.0)[0]


def _vector_bytes(run: Run) -> int:
    """Bytes of P numbers as ascents hold them: in float32 at least."""
    return run.model.space.size * max(4, run.model.dtype.itemsize)


def check_memory(run: Run, memory: int | None) -> None:
    """Refuse a budget that one copy does not fit into, as an `InputError`."""
    least = ALONE * _vector_bytes(run)
    if memory is not None and memory < least:
        raise InputError(
            f"memory of {memory / 1e9:.3g} GB was given (--memory); the ascent of one row of this "
            f"adapter of {run.model.space.size} parameters takes {least / 1e9:.3g} GB: give as "
            "much, or leave it out for half of what is free"
        )


def find_units(
    run: Run,
    ids: Sequence[str] | None,
    groups: Mapping[str, Sequence[str]] | None,
    protocol: Protocol,
    holdout: Examples | None,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
    memory: int | None = None,
) -> Units:
    """Find the rows (`ids`, by default all) or `groups` (name: ids) with their losses and samples.

    With the target `base` nothing of the run's directory is read. With `unseen`, adapters are
    trained (`unlearn.unseen`).

    Raises `InputError` for rows and groups given together, none, ids given twice or as one string,
    an empty sample, held-out rows that are training rows, `memory` (bytes) for less than one copy;
    `DataError` for an unknown id.
    """
    check_memory(run, memory)
    ids_of = _requested(run, ids, groups)
    members = tuple(np.array([run.train.index(id) for id in unit]) for unit in ids_of.values())
    if sample_rows < 1:
        raise InputError(f"sample_rows {sample_rows} was given; expected at least 1")
    holdout_tokens = unseen_rows(run, holdout)
    if protocol.target == "unseen":
        _check_others_are_left(run, ids_of)
    sample = drawn(run.train, range(len(run.train)), sample_rows, seed)
    losses, base_losses = _losses_where_needed(run, np.unique(np.concatenate([*members, sample])))
    unit_means = lambda values: np.array([values[rows].mean() for rows in members])  # noqa: E731
    target = unit_means(base_losses)
    if protocol.target == "unseen":
        target = _unseen_targets(run, ids_of, [losses[rows] for rows in members], protocol)
    if holdout_tokens is not None:
        holdout_tokens = holdout_tokens.select(evenly_spaced(len(holdout_tokens), HOLDOUT_ROWS))
    return Units(
        run=run,
        names=tuple(ids_of),
        members=members,
        loss=unit_means(losses),
        base_loss=unit_means(base_losses),
        target=target,
        sample=sample,
        sample_loss=losses[sample],
        excluded=_excluded(run, members, sample),
        holdout=holdout_tokens,
        memory=memory,
    )


def _requested(
    run: Run, ids: Sequence[str] | None, groups: Mapping[str, Sequence[str]] | None
) -> Mapping[str, Sequence[str]]:
    """The ids of every unit by its name, checked."""
    if ids is not None and groups is not None:
        raise InputError("ids and groups were given together: give one of them")
    if isinstance(ids, str):
        raise InputError(f"ids {ids!r} were given as one string; expected a list, as in [{ids!r}]")
    ids_of: Mapping[str, Sequence[str]]
    if groups is not None:
        ids_of = groups
    else:
        ids_of = {id: [id] for id in (run.train.ids if ids is None else ids)}
    if groups is None and ids is not None and len(ids_of) != len(ids):
        twice = sorted({id for id in ids if list(ids).count(id) > 1})
        names = ", ".join(map(repr, twice[:10]))
        raise InputError(f"ids are given more than once: {names}; name each row once")
    if not ids_of:
        raise InputError("no row was given: name at least one")
    for name, unit in ids_of.items():
        if isinstance(unit, str) or not unit or len(set(unit)) != len(unit):
            raise InputError(
                f"group {name!r} is {unit!r}; expected a list of different ids, at least one"
            )
    return ids_of


def _check_others_are_left(run: Run, ids_of: Mapping[str, Sequence[str]]) -> None:
    whole = [name for name, unit in ids_of.items() if len(unit) == len(run.train)]
    if whole:
        raise InputError(
            f"{whole[0]!r} holds every training row: what a model that saw the others would lose "
            "on it is not defined; take the target base, or fewer rows"
        )


def _losses_where_needed(run: Run, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses [N] of the training rows `needed` under adapter and base, 0 elsewhere."""
    budget, tokens = run.token_budget, run.tokens.select(needed)
    losses, base_losses = np.zeros(len(run.train)), np.zeros(len(run.train))
    losses[needed] = shared_losses(run.model, tokens, token_budget=budget)
    with run.model.at(scaled(run.model, 0.0)):
        base_losses[needed] = shared_losses(run.model, tokens, token_budget=budget)
    return losses, base_losses


def _excluded(run: Run, members: Sequence[np.ndarray], sample: np.ndarray) -> np.ndarray:
    """Whether a sampled row has the content of one of the unit's rows, [n, m]."""
    hashes = [row.content_hash for row in run.train]
    contents = [{hashes[row] for row in rows} for rows in members]
    return np.array([[hashes[row] in content for row in sample] for content in contents])


def _unseen_targets(
    run: Run, ids_of: Mapping[str, Sequence[str]], losses: Sequence[np.ndarray], protocol: Protocol
) -> np.ndarray:
    """Mean expected loss of each unit's rows under a model that never saw them, [n].

    `losses`: of each unit's rows now. One local retraining (`unlearn.unseen`) serves up to
    `TOGETHER` units that have nothing to do with one another; processes deal them out. It is the
    only question here that reads the run's audit chain, for a change is planned from a version of
    the adapter.
    """
    original, cost = version(run, ORIGINAL), Cost()
    recipe = known_or_estimated(original, protocol.recipe, cost)
    index = TokenIndex(original.tokens)
    units = [np.array([run.train.index(id) for id in ids]) for ids in ids_of.values()]
    batches = _strangers(units, index, len(original.rows))

    def retrained(number: int) -> tuple[np.ndarray, float]:
        """Expected losses of a batch's rows, and how faithful they are."""
        batch = batches[number]
        rows = np.concatenate([units[unit] for unit, _ in batch])
        change = plan(original, [run.train.ids[row] for row in rows])
        near = np.unique(np.concatenate([near for _, near in batch]))
        now = np.concatenate([losses[unit] for unit, _ in batch])
        local = planned(change, recipe, index=index, near=near)
        if number == 0:
            say(
                f"targets by {len(batches)} local retrainings, about "
                f"{local.row_gradients * len(batches)} row-gradients"
            )
        found = expectation(change, local.made(cost), now, np.zeros(0), cost)
        return found.expected, found.faithfulness

    found = dealt(len(batches), lambda numbers: [retrained(number) for number in numbers])
    targets, faithfulness = np.zeros(len(units)), [share for _, share in found]
    for batch, (expected, _) in zip(batches, found, strict=True):
        means = np.split(expected, np.cumsum([len(units[unit]) for unit, _ in batch])[:-1])
        for (unit, _), values in zip(batch, means, strict=True):
            targets[unit] = values.mean()
    warn_of_unfaithful(faithfulness)
    return targets


def _strangers(
    units: Sequence[np.ndarray], index: TokenIndex, n: int
) -> list[list[tuple[int, np.ndarray]]]:
    """Batches of units with their nearest rows, no unit near another one of its batch.

    So each is left out as if alone: its relatives stay.
    """
    batches: list[list[tuple[int, np.ndarray]]] = []
    for unit, rows in enumerate(units):
        others = np.setdiff1d(np.arange(n), rows)
        count = max(len(rows), NEAR_EACH)
        near = index.nearest(index.tokens.select(rows), others, count)
        for batch in batches:
            if len(batch) == TOGETHER:
                continue
            taken = np.concatenate([np.concatenate([units[u], near_u]) for u, near_u in batch])
            members = np.concatenate([units[u] for u, _ in batch])
            alone = not (np.isin(rows, taken).any() or np.isin(near, members).any())
            if alone and len(members) + len(rows) <= n // 2:
                batch.append((unit, near))
                break
        else:
            batches.append([(unit, near)])
    return batches
