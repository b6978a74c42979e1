"""The fit of one point of the path: one pass over the training rows, resumed where it was killed.

One pass does everything: each batch runs forward once and backward once per set of labels, the
model's own for the curvature and the data's for the gradients. Which sums are formed of it, the
curvature's accumulator knows (`influence.curvature.base`); no curvature is known here by name, and
nothing is scored.

Several processes (`influence.distributed`) each do some of the batches, and write their rows at the
rows' own places; their sums are added up where a checkpoint is written, and at the end.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.at_point import AtPoint, geometry_here, row_blocks
from influence.batches import collate, padded_tokens, plan_batches
from influence.curvature import Accumulator, Specification
from influence.curvature.base import ONCE, refuse_without_draws
from influence.geometry import Adam, Geometry
from influence.gradients import Tape, batch_uniforms, max_rows, tape
from influence.halving import Steps, in_parts
from influence.leaf_gradients import LeafGradients
from influence.loss import Supervised, loss_gradient, row_losses, sampled_loss_gradient
from influence.memory import room
from influence.optimizer_state import OptimizerState
from influence.progress import say, track
from influence.row_storage import Storage, keeps_for_good, keeps_sampled
from influence.sampled_gradients import sampled_gradients
from influence.store import RowFile, RowFiles, open_file, read, write_file
from influence.tokens import TokenizedExamples

#: Seconds between checkpoints of a pass: a killed fit loses no more than that, or than 30 times
#: what writing one takes, where sums are so large (1.1 GB for a model of 135 M) that this takes
#: longer than `QUICK` seconds.
CHECKPOINT_SECONDS = 60.0
QUICK = 2.0
CHECKPOINT = "checkpoint.h5"
#: Which batches are in the sums of a checkpoint, beside these.
DONE = "batches_done"
#: The rows' losses at the data's labels.
LOSSES = "pass/losses"


class PointFit:
    """The fit of one point: the pass over the training rows, its checkpoints, and what is made
    of it.
    """

    def __init__(
        self,
        point: AtPoint,
        curvature: Specification,
        storage: Storage,
        state: OptimizerState | None,
        *,
        to_come: float = 0.0,
    ) -> None:
        #: passes over the rows that follow this point's first, for the time that is left
        self.to_come = to_come
        self.point, self.run, self.model = point, point.run, point.model
        self.digest, self.curvature, self.draws = point.digest, curvature, curvature.draws
        self.store_gradients = storage.gradients
        self.keep_rows = keeps_for_good(curvature, storage)
        self.tokens, self.weights = self.rows()
        n = len(self.tokens)
        self.sample = curvature.sample(n, self.run.manifest.seed)
        #: what rows of the sample weigh, so that they stand for all
        self.sample_weights = self.weights * (n / len(self.sample))
        self.apart = len(self.sample) < n  # then the sample has batches of its own, before others
        self.store_rows = self.stores_rows(storage)
        point.geometry = self.coordinates(state)
        self.accumulator = self.begin()
        refuse_without_draws(curvature, self.accumulator)
        per_row = self.store_gradients or self.store_rows or self.accumulator.per_row
        self.batches, self.sampled_batches = self.planned(per_row)
        # one buffer for every batch's gradients: each set is written to its file before the next
        most = max((len(rows) for rows in self.batches), default=0) if per_row else 0
        shape = (most, self.model.space.size)
        self.buffer = room(shape, self.model.dtype, self.model.device) if most else None
        self.losses = torch.zeros(n, dtype=torch.float64)
        self.created = False  # whether a row file had to be made

    def rows(self) -> tuple[TokenizedExamples, np.ndarray]:
        """The rows of the pass and their weights `[n]`: all training rows."""
        return self.run.tokens, self.run.weights

    def stores_rows(self, storage: Storage) -> bool:
        """Whether rows at sampled labels are on disk, for a second look or for good."""
        row_bytes = len(self.tokens) * self.model.space.size * self.model.dtype.itemsize
        return keeps_sampled(self.curvature, storage, row_bytes) and not self.apart

    def begin(self) -> Accumulator:
        """Empty sums for this point's pass."""
        return self.curvature.begin(self.point)

    def planned(self, limited: bool) -> tuple[list[np.ndarray], int]:
        """The batches of the pass, and in how many of the first labels are drawn.

        `limited` in rows too, where every row's gradient is held at once.
        """
        every = np.arange(len(self.tokens))
        batches = self.plan(self.sample if self.draws else every, limited)
        sampled = len(batches) if self.draws else 0
        if self.apart and self.draws and self.store_gradients:
            batches += self.plan(every, limited=True)
        return batches, sampled

    def summed(self) -> Accumulator:
        """The accumulator with the complete sums of all processes."""
        distributed.add_up(self.sums())
        return self.accumulator

    def known_losses(self) -> Tensor | None:
        """The losses `l_i` [n] of all rows, once summed; None where the pass did not run them all."""
        every = self.store_gradients or (self.draws > 0 and not self.apart)
        return self.losses if every else None

    def coordinates(self, state: OptimizerState | None) -> Geometry:
        """The geometry at this point.

        Adam's from the optimiser's state, or from gradients of some training rows.
        """
        name = self.run.manifest.geometry
        if name == "adam" and state is not None:
            return Adam.of(self.model.space, state.v.to(self.model.device))
        return geometry_here(self.run, name)

    def plan(self, rows: np.ndarray, limited: bool) -> list[np.ndarray]:
        """The batches of some rows.

        `limited` in rows too, where every row's gradient is held at once.
        """
        budget = self.run.token_budget
        most = max_rows(self.model.space) if limited else None
        parts = plan_batches(self.tokens.select(rows), budget, max_rows=most)
        return [rows[part] for part in parts]

    def work(self) -> None:
        """Everything between nothing (or an interrupted pass) and this point's factors."""
        self.created = distributed.at_first(self.lay_out)
        if self.store_gradients or self.draws:
            self.main_pass(self.resume())
        self.finish()
        if not self.keep_rows and distributed.rank() == 0:
            self.point.file("rows").unlink(missing_ok=True)

    # ---- the pass

    def lay_out(self) -> bool:
        """Create the row files at full size, unless a killed fit already did.

        Returns whether one was created, so that nothing in it counts.
        """
        n, P = len(self.run.tokens), self.model.space.size
        dtype = np.dtype("float64" if self.model.dtype == torch.float64 else "float32")
        attrs = {"run_digest": self.digest, "param_space": self.model.space.digest}
        for name in ("gradients", "rows"):
            if self.point.file(name).exists():
                with open_file(self.point.file(name), run_digest=self.digest):
                    pass
        created = False
        for name, wanted in (("gradients", self.store_gradients), ("rows", self.store_rows)):
            created |= wanted and not self.point.file(name).exists()
            if not wanted:
                self.point.file(name).unlink(missing_ok=True)
        if self.store_gradients and not self.point.file("gradients").exists():
            about = (
                "gradient of l_i, the summed cross-entropy (nats) of row i, at the data's labels"
            )
            write_file(
                self.point.file("gradients"),
                attrs={**attrs, "about": about},
                rows={"gradients": ((n, P), dtype), "done": ((n,), np.uint8)},
                strings={"train_ids": self.run.train.ids},
            )
        if self.store_rows and not self.point.file("rows").exists():
            about = "gradient of row i's summed cross-entropy at labels sampled from the model"
            write_file(
                self.point.file("rows"),
                attrs={**attrs, "about": about},
                rows={"rows": ((n * self.draws, P), dtype)},
            )
        return created

    def main_pass(self, done: np.ndarray) -> None:
        """The batches that are not `done` [batches], with their row files open.

        Checkpoints now and then.
        """
        with ExitStack() as stack:

            def opened(file: str, name: str) -> RowFile:
                return stack.enter_context(RowFile(self.point.file(file), name, write=True))

            files = RowFiles()
            if self.store_gradients:
                files.gradients = opened("gradients", "gradients")
                files.done = opened("gradients", "done")
            if self.store_rows:
                files.sampled = opened("rows", "rows")
            self.run_batches(done, files)
        distributed.wait()  # the rows of all processes are in their files

    def run_batches(self, done: np.ndarray, files: RowFiles) -> None:
        """Run the batches that are not `done` [batches], into the open row files.

        Each process runs its share.
        """
        last, pause = time.monotonic(), CHECKPOINT_SECONDS
        left = np.flatnonzero(~done).tolist()
        mine = distributed.share(
            left, padded_tokens(self.tokens, [self.batches[number] for number in left])
        )
        with tape(self.model) as recorder:
            for numbers in distributed.rounds(self.each_run(recorder, mine, done.copy(), files)):
                done[numbers] = True
                begun = time.monotonic()
                if distributed.first_says(begun - last > pause):
                    files.flush()  # first: the checkpoint says that these rows are written
                    self.checkpoint(done)
                    last = time.monotonic()
                    pause = CHECKPOINT_SECONDS * max(1.0, (last - begun) / QUICK)
        second_pass = self.curvature.reads_rows == ONCE and not self.store_rows
        if second_pass and left:
            self.checkpoint(done)  # the first pass is not lost where the second is killed

    def each_run(
        self, recorder: Tape, mine: list[int], done: np.ndarray, files: RowFiles
    ) -> Iterator[int]:
        """Run batches by number; each number is given once its batch is in the files and sums.

        Progress counts what was `done` [batches] before by all processes as if shared alike.
        """
        before = np.flatnonzero(done).tolist()
        before = before[: len(before) // distributed.world()]
        order = [self.batches[number] for number in before + mine]
        for number in track(
            mine,
            "training rows",
            done=len(before),
            counts=[len(rows) for rows in order],
            sizes=padded_tokens(self.tokens, order),
            passes=self.to_come,
        ):
            sampled = number < self.sampled_batches
            kept = files if not (self.apart and sampled) else None
            self.run_batch(recorder, self.batches[number], kept, self.draws if sampled else 0)
            yield number

    def run_batch(
        self,
        recorder: Tape,
        rows: np.ndarray,
        files: RowFiles | None = None,
        draws: int | None = None,
    ) -> None:
        """One batch into the accumulator, at so many `draws` of labels (None: all), and the files.

        In parts where memory is too small for it.
        """

        def run(rows: np.ndarray, steps: Steps) -> None:
            many = self.draws if draws is None else draws
            self.run_rows(recorder, rows, files or RowFiles(), many, steps)

        for _ in in_parts(self.model, self.tokens, rows, run):
            pass

    def run_rows(
        self, recorder: Tape, rows: np.ndarray, files: RowFiles, draws: int, steps: Steps
    ) -> None:
        """Rows at once, after which their graph is gone; what is added up is added by `steps`."""
        batch = collate(self.tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        part = recorder.forward(batch)
        if files.gradients is not None or not self.store_gradients:
            self.losses[rows] = row_losses(part).cpu()
        for draw in range(draws):
            final = files.gradients is None and draw == draws - 1

            def look(draw: int = draw, final: bool = final) -> None:
                sampled = self.sampled_backward(recorder, part, rows, draw, final, steps)
                if files.sampled is not None and sampled is not None:
                    files.sampled.write(rows * self.draws + draw, sampled.cpu().numpy())

            steps.once(draw, look)
        if files.gradients is not None and files.done is not None:
            gradient = loss_gradient(part.logits, part.targets)
            gradients = recorder.gradients(part, gradient, buffer=self.buffer)
            files.gradients.write(rows, gradients.cpu().numpy())
            files.done.write(rows, np.ones(len(rows), np.uint8))

    def sampled_backward(
        self,
        recorder: Tape,
        part: Supervised,
        rows: np.ndarray,
        draw: int,
        final: bool,
        steps: Steps,
    ) -> Tensor | None:
        """One backward at sampled labels, shown to the accumulator.

        The rows' gradients `[b, P]` where they are wanted.
        """
        uniforms = batch_uniforms(self.tokens, rows, self.run.manifest.seed, draw)
        gradient = sampled_loss_gradient(part.logits, uniforms)
        relative, accumulator = self.relative_weights(rows), self.accumulator
        wanted = self.store_rows or accumulator.per_row
        sink = recorder.new_sink(self.buffer) if wanted else None

        def show(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
            if sink is not None:
                sink(leaf, x, g, valid)
            if accumulator.per_leaf:
                inputs, outputs = self.point.geometry.factor(leaf, x, g)
                steps.once(
                    (draw, leaf),
                    lambda: accumulator.add(leaf, inputs, outputs, valid, relative, draw),
                )

        recorder.backward(part.logits, gradient, show, last=final)
        if sink is None:
            return None
        if accumulator.per_row:
            weights = torch.from_numpy(self.sample_weights[rows] / self.draws).to(self.model.device)
            features = self.point.geometry.features(sink.rows)
            steps.once((draw, "rows"), lambda: accumulator.add_rows(features, weights))
        return sink.rows

    def relative_weights(self, rows: np.ndarray) -> Tensor | None:
        """`w_i` relative to the largest, `[b]`, or None where all are equal."""
        if self.weights.min() == self.weights.max():
            return None
        return torch.from_numpy(self.weights[rows] / self.weights.max()).to(self.model.device)

    # ---- checkpoints

    def sums(self) -> dict[str, Tensor]:
        """All that the pass sums up: the accumulator's, and the rows' losses."""
        return self.accumulator.sums() | {LOSSES: self.losses}

    def checkpoint(self, done: np.ndarray) -> None:
        """Save the running sums of all processes, and which batches are in them.

        `done` [batches] are those that this process knows of. The first process goes on with the
        total, the others with nothing, so that nothing counts twice.
        """
        sums = distributed.add_up(self.sums())
        every = distributed.add_up(torch.from_numpy(done.astype(np.uint8))) > 0
        if distributed.rank() != 0:
            for tensor in sums.values():
                tensor.zero_()
            return
        arrays = {name: tensor.cpu().numpy() for name, tensor in sums.items()}
        write_file(
            self.run.directory / CHECKPOINT,
            {**arrays, DONE: every.numpy().astype(np.uint8)},
            attrs={"run_digest": self.digest, "plan": self.plan_digest, "stored": self.stored},
        )

    def resume(self) -> np.ndarray:
        """Which batches `[batches]` are done: those of the last checkpoint of the same plan, else
        none.

        The first process has their sums.
        """
        return distributed.at_first(self.read_checkpoint)

    def read_checkpoint(self) -> np.ndarray:
        """The batches `[batches]` of the checkpoint, and into the accumulator their sums."""
        path, done = self.run.directory / CHECKPOINT, np.zeros(len(self.batches), dtype=bool)
        if not path.exists():
            return done
        with open_file(path) as file:
            if file.attrs.get("run_digest") != self.digest:
                return done  # of the point before
            same = file.attrs["plan"] == self.plan_digest and file.attrs["stored"] == self.stored
            if not same or self.created:
                return done
            sums = self.sums()
            if LOSSES not in file:  # written before: those of the rows so far are not known
                sums.pop(LOSSES).fill_(torch.nan)
            shapes = {name: getattr(file.get(name), "shape", None) for name in sums}
            if any(shapes[name] != tensor.shape for name, tensor in sums.items()):
                return done  # of sums that are not kept, or not at this size, any more
            for name, tensor in sums.items():
                tensor.copy_(torch.from_numpy(np.asarray(read(file, name))))
            if "next" in file.attrs:  # as one process wrote it before
                done[: int(np.asarray(file.attrs["next"]))] = True
            else:
                done[:] = read(file, DONE)
        say(f"resuming at batch {int(done.sum()) + 1} of {len(self.batches)}")
        return done

    @property
    def stored(self) -> str:
        """Which rows the pass writes: a checkpoint of other ones is not continued."""
        return f"gradients={self.store_gradients} rows={self.store_rows}"

    @property
    def plan_digest(self) -> str:
        """SHA-256 over the batches, so that a checkpoint is never continued with another plan."""
        plan = b"|".join(rows.astype(np.int64).tobytes() for rows in self.batches)
        return hashlib.sha256(plan).hexdigest()

    # ---- what is made of it

    def finish(self) -> None:
        """Turn what the pass left into `factors.h5`."""
        place, geometry = self.point.place, self.point.geometry
        arrays = {f"geometry/{key}": tensor for key, tensor in geometry.state().items()}
        if place.scale is None:
            arrays["theta"] = place.theta
        accumulator = self.summed()
        if (losses := self.known_losses()) is not None:
            arrays[LOSSES] = losses
        if (second := accumulator.second_look()) is not None:
            self.look_again(second)
            distributed.add_up(second.sums())
            accumulator = second
        arrays |= accumulator.finish(self.sampled_rows())
        distributed.at_first(lambda: self.write_factors(arrays))

    def look_again(self, second: Accumulator) -> None:
        """Show this process's share of the sampled rows to the accumulator of a second look."""
        rows = self.sampled_rows(shared=True)
        small = isinstance(rows, ComputedRows) or self.point.by_leaf(rows.count)
        if second.by_leaf and small:
            return rows.show_leaves(second)
        start, weights = 0, rows.weights
        for block in rows:
            second.add_rows(block, weights[start : start + len(block)])
            start += len(block)

    def write_factors(self, arrays: dict[str, Tensor]) -> None:
        """Write `factors.h5`."""
        write_file(
            self.point.file("factors"),
            {name: tensor.cpu().numpy() for name, tensor in arrays.items()},
            attrs={
                "run_digest": self.digest,
                "curvature": self.curvature.name,
                "point": self.point.place.label,
            },
        )

    def sampled_rows(self, *, shared: bool = False) -> StoredRows | ComputedRows:
        """Per-row features at the sampled labels (or at the data's), read back or computed again
        with the same labels.

        `shared`: this process's share of them.
        """
        if self.store_rows or (self.draws == 0 and self.store_gradients):
            return StoredRows(self, shared)
        return ComputedRows(self, shared)

    def sampled_again(self, recorder: Tape, rows: np.ndarray) -> Iterator[Tensor]:
        """The gradients `[b, P]` of one batch at each draw of sampled labels."""
        seed = self.run.manifest.seed
        found = sampled_gradients(recorder, self.tokens, rows, seed, self.draws)
        return (gradients for _, gradients in found)


@dataclass(frozen=True)
class StoredRows:
    """The rows that the pass stored, in their order: all, or this process's share."""

    fit: PointFit
    shared: bool = False

    @property
    def count(self) -> int:
        """All rows and draws."""
        return len(self.fit.run.tokens) * max(1, self.fit.draws)

    @property
    def _span(self) -> tuple[int, int]:
        """Where the rows begin and end, of all rows and draws."""
        return distributed.span(self.count) if self.shared else (0, self.count)

    def show_leaves(self, second: Accumulator) -> None:
        """Show all rows leaf by leaf: of several processes each shows some leaves, not some rows."""
        fit, weights = self.fit, StoredRows(self.fit).weights
        name = "rows" if fit.draws else "gradients"
        for number, leaf in fit.point.leaf_blocks(
            range(*distributed.span(len(fit.model.space.leaves))), name
        ):
            second.add_leaf(number, leaf, weights)

    @property
    def weights(self) -> Tensor:
        """`w_i / k` of every row and draw, `[m]` float64."""
        draws = max(1, self.fit.draws)
        weights = np.repeat(self.fit.run.weights, draws)[slice(*self._span)] / draws
        return torch.from_numpy(weights).to(self.fit.model.device)

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks of features."""
        fit, name = self.fit, "rows" if self.fit.draws else "gradients"
        blocks = row_blocks(
            fit.point.file(name), name, fit.digest, fit.model.device, span=self._span
        )
        return map(fit.point.geometry.features, blocks)


@dataclass(frozen=True)
class ComputedRows:
    """The rows of the sample computed again, batch by batch and draw by draw: a second pass over
    all of them, or over this process's share.
    """

    fit: PointFit
    shared: bool = False

    def plan(self, *, limited: bool = True) -> list[np.ndarray]:
        """The batches, `limited` in rows too where whole gradients are formed."""
        plan = self.fit.plan(self.fit.sample, limited)
        return (
            distributed.share(plan, padded_tokens(self.fit.tokens, plan)) if self.shared else plan
        )

    @property
    def weights(self) -> Tensor:
        """`w_i / k` of every row and draw, `[m]` float64."""
        draws, parts = self.fit.draws, self.plan()
        order = [rows for rows in parts for _ in range(draws)]
        weights = self.fit.sample_weights[np.concatenate(order)] if order else np.zeros(0)
        return torch.from_numpy(weights / max(1, draws)).to(self.fit.model.device)

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks of features."""
        self.fit.buffer = None  # the pass is over: its memory is the second one's
        with tape(self.fit.model) as recorder:
            plan = self.plan()
            counts, sizes = [len(rows) for rows in plan], padded_tokens(self.fit.tokens, plan)
            for rows in track(plan, "training rows, second pass", counts=counts, sizes=sizes):
                for gradients in self.fit.sampled_again(recorder, rows):
                    yield self.fit.point.geometry.features(gradients)

    def show_leaves(self, second: Accumulator) -> None:
        """Show the rows leaf by leaf, as the backward reaches them: batches are limited by their
        tokens alone.
        """
        fit = self.fit
        fit.buffer = None
        with tape(fit.model) as recorder:
            plan = self.plan(limited=False)
            counts, sizes = [len(rows) for rows in plan], padded_tokens(fit.tokens, plan)
            for rows in track(plan, "training rows, second pass", counts=counts, sizes=sizes):
                work = partial(self._show_batch, second, recorder)
                for _ in in_parts(fit.model, fit.tokens, rows, work):
                    pass

    def _show_batch(
        self, second: Accumulator, recorder: Tape, rows: np.ndarray, steps: Steps
    ) -> None:
        """One batch. A function, so that its graph is gone when it returns."""
        fit, model, geometry = self.fit, self.fit.model, self.fit.point.geometry
        weights = torch.from_numpy(fit.sample_weights[rows] / fit.draws).to(model.device)
        batch = collate(fit.tokens, rows, pad_id=model.pad_id, device=model.device)
        part = recorder.forward(batch)
        for draw in range(fit.draws):
            uniforms = batch_uniforms(fit.tokens, rows, fit.run.manifest.seed, draw)
            gradient = sampled_loss_gradient(part.logits, uniforms)

            def take(leaf: int, rows: Tensor, draw: int = draw) -> None:
                features = geometry.of_leaf(leaf, rows)
                steps.once((draw, leaf), lambda: second.add_leaf(leaf, features, weights))

            sink = LeafGradients(recorder, take)
            recorder.backward(part.logits, gradient, sink, last=draw == fit.draws - 1)
            sink.finish()


def accumulate(fit: PointFit, batches: Iterable[np.ndarray]) -> dict[str, Tensor]:
    """The sums of some of the rows' batches: one process's share of a pass, to be added up with
    the others'.
    """
    with tape(fit.model) as recorder:
        for rows in batches:
            fit.run_batch(recorder, rows)
    return fit.accumulator.sums()
