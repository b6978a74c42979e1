"""A run: what `influence fit` computes about one adapter and one training set, kept in a directory.

    run/manifest.json   base, adapter, data and tokenizer, each with its digest; objective; curvature; versions
    run/factors.h5      the curvature
    run/gradients.h5    /gradients [n, P] of l_i at the data's labels, /done [n]     (when stored)
    run/rows.h5         /rows [n * samples, P] of the sample-space Fisher            (curvature `fisher`)
    run/scores.h5       scores and self-influences computed later

One pass over the training rows does everything: each batch runs forward once and backward once per set of
labels (the data's for the gradients, the model's own for the curvature).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel, load
from influence.curvature.base import Curvature, Damped, Invertible
from influence.curvature.ekfac import EKFAC, refit_eigenvalues
from influence.curvature.fisher import Fisher, Rows, SampleSpaceFisher
from influence.curvature.ggn import GGN, GGNOperator
from influence.curvature.hessian import Hessian, HessianOperator
from influence.curvature.identity import Identity, IdentityCurvature
from influence.curvature.kfac import KFAC, Kronecker, KroneckerBlock, Moments
from influence.curvature.objective import Objective
from influence.damping import Damping
from influence.data import Examples, TokenizedExamples, collate, plan_batches, read_examples, tokenize, tokenizer_digest
from influence.errors import InputError, MismatchError, StoreError
from influence.gradients import (
    Tape,
    label_uniforms,
    max_rows,
    sampled_gradient,
    stream_gradients,
    tape,
)
from influence.loss import Supervised, check_rows, loss_gradient, probabilities, supervised_logits, weights
from influence.progress import say, track
from influence.store import RowFile, only_writer, open_file, open_rows, read, read_json, write_file, write_json

CurvatureSpec = EKFAC | KFAC | Fisher | GGN | Hessian | Identity
STORE = ("auto", "always", "never")
FORMAT = 1
FILES = ("manifest.json", "factors.h5", "gradients.h5", "rows.h5", "scores.h5", "checkpoint.h5")

#: Seconds between checkpoints of a pass.
CHECKPOINT_SECONDS = 60.0
#: Bytes of gradients read and multiplied at a time, and the fewest rows.
BLOCK_BYTES = 32 << 20
BLOCK_ROWS = 8


def fit(
    model: AdaptedModel,
    train: Examples,
    *,
    directory: str | Path,
    curvature: CurvatureSpec | None = None,
    damping: str | Damping = "mean:0.1",
    reduction: str = "token",
    path: Sequence[float] = (1.0,),
    max_length: int | None = None,
    token_budget: int | None = None,
    store: str = "auto",
    disk_budget: float = 50e9,
    seed: int = 0,
    overwrite: bool = False,
) -> Run:
    """Fit a curvature to an adapter on its training rows, and store the rows' gradients.

    Parameters
    ----------
    model, train
        The adapter (`influence.load`) and the rows it was trained on (`influence.read_examples`).
    directory
        The run directory. A finished identical fit returns at once, an unfinished one resumes; anything else
        there is an error unless `overwrite`.
    curvature
        `EKFAC()` (default), `KFAC()`, `Fisher()`, `GGN()`, `Hessian()` or `Identity()`.
    damping
        `mean:X`, `top:X` or `abs:X`; scores may use another.
    reduction
        `token`: `w_i = 1/N_tok`, as Hugging Face trainers weight rows; `example`: `w_i = 1/(n T_i)`.
    path
        Where along the way from the base to the adapter to look; this version looks at its end, `(1.0,)`.
    max_length
        Truncate rows to so many tokens, as in training.
    token_budget
        Tokens per batch, padding included: the memory knob (default 1,024 on a CPU, 4,096 elsewhere). Results do not
        depend on it.
    store, disk_budget
        Store the gradients (n x P floats): `always`, `never`, or `auto`: where they take at most `disk_budget`
        bytes. Without them every later scoring is a pass over the training rows.
    seed
        Keys the sampled labels.

    Raises `InputError` before any work for a wrong argument, `MismatchError` where the directory was made from
    something else (naming what differs), `StoreError` where the disk is too small.
    """
    curvature = EKFAC() if curvature is None else curvature
    if token_budget is None:
        token_budget = 1024 if model.device.type == "cpu" else 4096
    _check_options(path, store, token_budget, disk_budget)
    if len(train) == 0:
        raise InputError("no training rows were given; give the rows the adapter was trained on")
    if isinstance(curvature, Hessian | GGN) and model.dtype != next(model.model.parameters()).dtype:
        say("note: Hessian and GGN products under a bfloat16 base carry its rounding; prefer --dtype float32")
    directory = Path(directory)
    tokens = tokenize(train, model.tokenizer, max_length=max_length)
    identity = {
        "base": model.base_digest,
        "adapter": model.adapter_digest,
        "data": train.digest,
        "tokenizer": tokenizer_digest(model.tokenizer),
        "reduction": reduction,
        "max_length": max_length,
        "curvature": {"name": curvature.name, **asdict(curvature)},
        "seed": seed,
        "path": [float(c) for c in path],
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "store": store,
    }
    manifest = {
        "format": FORMAT,
        "digest": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "complete": False,
        "identity": identity,
        "base": {"path": model.base, "digest": model.base_digest},
        "adapter": {"path": model.adapter, "digest": identity["adapter"], "parameters": model.space.size},
        "data": {
            "path": train.source,
            "digest": train.digest,
            "rows": len(train),
            "tokens": int(tokens.lengths.sum()),
            "supervised_tokens": int(tokens.counts.sum()),
        },
        "tokenizer": {"digest": identity["tokenizer"]},
        "objective": {"reduction": reduction, "max_length": max_length, "N_tok": int(tokens.counts.sum())},
        "curvature": identity["curvature"],
        "damping": str(Damping.parse(damping)),
        "path": identity["path"],
        "store": store,
        "seed": seed,
        "token_budget": token_budget,
        "dtype": identity["dtype"],
        "versions": _versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    weights(tokens.counts, reduction)  # refuses an unknown reduction before anything is written
    check_rows(model, tokens)
    with only_writer(directory):
        existing = _claim(directory, manifest, overwrite)
        run = Run(directory, existing or manifest, model, train, tokens)
        if existing is None:
            _Fit(run, curvature, disk_budget).work()
    return run


def _check_options(path: Sequence[float], store: str, token_budget: int, disk_budget: float) -> None:
    if tuple(float(c) for c in path) != (1.0,):
        raise InputError(
            f"path {','.join(str(c) for c in path)} was given; this version looks at the adapter itself only: leave "
            "--path out, or give 1.0"
        )
    if store not in STORE:
        raise InputError(f"store {store!r} was given; expected auto, always or never")
    if token_budget < 1:
        raise InputError(f"token budget {token_budget} was given; expected at least 1")
    if not disk_budget >= 0:
        raise InputError(f"disk budget {disk_budget} was given; expected 0 or more")


def _claim(directory: Path, manifest: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Make the directory this fit's own: return the manifest of a finished identical fit, or None to go on."""
    path = directory / "manifest.json"
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; give a directory for the run")
    if path.exists():
        found = read_json(path)
        differences = differing(found.get("identity", {}), manifest["identity"])
        if not differences and not overwrite:
            if not found.get("complete"):
                return None
            _tidy(directory, found)
            # what is no part of the factors follows the latest call: damping, and where the same things lie now
            current = {**found, "damping": manifest["damping"]}
            for key in ("base", "adapter", "data"):
                current[key] = {**found[key], "path": manifest[key]["path"] or found[key]["path"]}
            if current["damping"] != found["damping"]:
                say(
                    f"note: the damping of {directory} was {found['damping']} and is now {current['damping']}; scores made "
                    "before keep theirs"
                )
            if current != found:
                write_json(path, current)
            return current
        if differences and not overwrite:
            raise MismatchError(
                f"{directory} holds a run made from something else: {'; '.join(differences)}. Give another --run "
                "directory, or --overwrite to replace it"
            )
    elif directory.exists() and any(directory.iterdir()):
        foreign = [name for name in FILES if (directory / name).exists()]
        if foreign or not overwrite:
            raise InputError(
                f"{directory} is not empty and holds no run (no manifest.json{', but ' + ', '.join(foreign) if foreign else ''}"
                "): give a new directory"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    write_json(path, manifest)
    return None


def _tidy(directory: Path, manifest: dict[str, Any]) -> None:
    """Remove what only an unfinished fit needs (also where it was killed before it could)."""
    (directory / "checkpoint.h5").unlink(missing_ok=True)
    if manifest["curvature"]["name"] != "fisher":
        (directory / "rows.h5").unlink(missing_ok=True)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs between two run identities, in words; digests are shortened."""

    def short(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text[:12] if len(text) == 64 else text

    return [
        f"{key} is {short(found.get(key))} there and {short(expected[key])} here"
        for key in expected
        if found.get(key) != expected[key]
    ]


def _versions() -> dict[str, str]:
    out = {}
    for package in ("lora-influence", "torch", "transformers", "peft", "numpy", "h5py"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "unknown"
    return out


# ---- the pass over the training rows -------------------------------------------------------------------------


class _Fit:
    """One fit in progress: the pass over the training rows, its checkpoints, and what is made of it."""

    def __init__(self, run: Run, curvature: CurvatureSpec, disk_budget: float) -> None:
        self.run, self.model, self.tokens, self.curvature = run, run.model, run.tokens, curvature
        self.directory, self.digest = run.directory, run.manifest["digest"]
        self.weights = run.weights
        n, P = len(self.tokens), self.model.space.size
        self.samples = getattr(curvature, "samples", 1 if isinstance(curvature, GGN | Hessian) else 0)
        row_bytes = n * P * self.model.dtype.itemsize
        empirical = isinstance(curvature, Fisher) and self.samples == 0
        self.store_gradients = _fits(run.manifest["store"], row_bytes, disk_budget) or empirical
        self.store_rows = isinstance(curvature, Fisher) and self.samples > 0
        if isinstance(curvature, EKFAC):  # kept only until the eigenvalues are refitted
            self.store_rows = _fits(run.manifest["store"], row_bytes * (1 + self.samples), disk_budget)
        per_example = self.store_gradients or self.store_rows or isinstance(curvature, GGN | Hessian)
        self.batches = self.plan(limited=per_example)
        # one buffer for every batch's gradients: each set is written to its file before the next is made
        most = max(len(rows) for rows in self.batches) if per_example else 0
        self.buffer = torch.empty(most, P, dtype=self.model.dtype, device=self.model.device) if most else None
        self.moments: Moments | None = None
        self.created = False  # whether a row file had to be made, so that nothing in it counts
        self.squares = torch.zeros(len(self.model.space.leaves), dtype=torch.float64)

    def plan(self, limited: bool) -> list[np.ndarray]:
        """The batches; `limited` in rows too, where every row's gradient is held at once."""
        budget = self.run.manifest["token_budget"]
        return plan_batches(self.tokens, budget, max_rows=max_rows(self.model.space) if limited else None)

    def work(self) -> None:
        """Everything between an empty directory (or an interrupted one) and a complete manifest."""
        if isinstance(self.curvature, KFAC):
            self.moments = Moments(
                self.model.space,
                shared_inputs(self.model, self.tokens),
                self.curvature,
                self.run.manifest["seed"],
                self.model.dtype,
                self.model.device,
            )
        if isinstance(self.curvature, Fisher):
            _refuse_large_gram(len(self.tokens) * max(1, self.samples))
        self.lay_out()
        if self.store_gradients or self.samples:
            self.main_pass(self.resume())
        self.finish()
        manifest = {**self.run.manifest, "complete": True, "gradients_stored": self.store_gradients}
        self.run.manifest.update(manifest)
        write_json(self.directory / "manifest.json", manifest)
        _tidy(self.directory, manifest)

    def lay_out(self) -> None:
        """Create the row files at full size, unless a killed fit already did."""
        n, P = len(self.tokens), self.model.space.size
        dtype = np.dtype("float64" if self.model.dtype == torch.float64 else "float32")
        attrs = {"run_digest": self.digest, "param_space": self.model.space.digest}
        ids = {"train_ids": self.run.train.ids}
        for name in ("gradients.h5", "rows.h5"):
            if (self.directory / name).exists():
                with open_file(self.directory / name, run_digest=self.digest):
                    pass
        for name, wanted in (("gradients.h5", self.store_gradients), ("rows.h5", self.store_rows)):
            self.created |= wanted and not (self.directory / name).exists()
            if not wanted:
                (self.directory / name).unlink(missing_ok=True)
        if self.store_gradients and not (self.directory / "gradients.h5").exists():
            write_file(
                self.directory / "gradients.h5",
                attrs={
                    **attrs,
                    "about": "gradient of l_i, the summed cross-entropy (nats) of row i, at the data's labels",
                },
                rows={"gradients": ((n, P), dtype), "done": ((n,), np.uint8)},
                strings=ids,
            )
        if self.store_rows and not (self.directory / "rows.h5").exists():
            write_file(
                self.directory / "rows.h5",
                attrs={**attrs, "about": "gradient of row i's summed cross-entropy at labels sampled from the model"},
                rows={"rows": ((n * self.samples, P), dtype)},
            )

    def main_pass(self, first: int) -> None:
        """Forward once per batch, backward once per set of labels; checkpoint now and then."""
        with ExitStack() as files:
            gradients = done = sampled = None
            if self.store_gradients:
                gradients = files.enter_context(RowFile(self.directory / "gradients.h5", "gradients", write=True))
                done = files.enter_context(RowFile(self.directory / "gradients.h5", "done", write=True))
            if self.store_rows:
                sampled = files.enter_context(RowFile(self.directory / "rows.h5", "rows", write=True))
            self.run_batches(first, gradients, done, sampled)

    def run_batches(self, first: int, gradients: RowFile | None, done: RowFile | None, sampled: RowFile | None) -> None:
        """The batches from number `first` on, into the open row files."""
        last = time.monotonic()
        with tape(self.model) as recorder:
            for number in track(range(first, len(self.batches)), "training rows", total=len(self.batches), done=first):
                self.run_batch(recorder, self.batches[number], gradients, done, sampled)
                if time.monotonic() - last > CHECKPOINT_SECONDS:
                    for file in (gradients, sampled, done):
                        if file is not None:
                            file.flush()
                    self.checkpoint(number + 1)
                    last = time.monotonic()
            if isinstance(self.curvature, EKFAC) and not self.store_rows and first < len(self.batches):
                self.checkpoint(len(self.batches))  # a second pass follows: do not lose the first

    def run_batch(
        self, recorder: Tape, rows: np.ndarray, gradients: RowFile | None, done: RowFile | None, sampled: RowFile | None
    ) -> None:
        """One batch; its graph is gone when this returns, before the next one is built."""
        batch = collate(self.tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        part = recorder.forward(batch)
        probs = probabilities(part.logits)
        for draw in range(self.samples):
            final = gradients is None and draw == self.samples - 1
            found = self.sampled_backward(recorder, part, probs, rows, draw, final)
            if sampled is not None and found is not None:
                sampled.write(rows * self.samples + draw, found.cpu().numpy())
            del found
        if gradients is not None and done is not None:
            found = recorder.gradients(part, loss_gradient(probs, part.targets), buffer=self.buffer)
            gradients.write(rows, found.cpu().numpy())
            done.write(rows, np.ones(len(rows), np.uint8))

    def sampled_backward(
        self, recorder: Tape, part: Supervised, probs: Tensor, rows: np.ndarray, draw: int, final: bool
    ) -> Tensor | None:
        """One backward at sampled labels: feeds the moments, the squares or the rows, whichever are wanted."""
        ids, counts = self.tokens.ids, self.tokens.counts
        uniforms = [label_uniforms(self.run.manifest["seed"], draw, ids[i], int(counts[i])) for i in rows]
        gradient = sampled_gradient(part, probs, torch.from_numpy(np.concatenate(uniforms)))
        relative = self.relative_weights(rows)
        sink = None
        if self.store_rows or isinstance(self.curvature, GGN | Hessian):
            sink = recorder.new_sink(self.buffer)

        def show(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
            if sink is not None:
                sink(leaf, x, g, valid)
            if self.moments is not None:
                self.moments.add(leaf, x, g, valid, relative, inputs=draw == 0)

        recorder.backward(part.logits, gradient, show, last=final)
        if sink is not None and isinstance(self.curvature, GGN | Hessian):
            w = torch.from_numpy(self.weights[rows])
            for number, leaf in enumerate(self.model.space.leaves):
                self.squares[number] += (sink.rows[:, leaf.slice].double().square().sum(1).cpu() * w).sum()
        return None if sink is None else sink.rows

    def sampled_again(self, recorder: Tape, rows: np.ndarray) -> Iterator[Tensor]:
        """The gradients `[b, P]` of one batch at each draw of sampled labels."""
        batch = collate(self.tokens, rows, pad_id=self.model.pad_id, device=self.model.device)
        part = recorder.forward(batch)
        probs = probabilities(part.logits)
        for draw in range(self.samples):
            found = self.sampled_backward(recorder, part, probs, rows, draw, draw == self.samples - 1)
            assert found is not None
            yield found

    def relative_weights(self, rows: np.ndarray) -> Tensor | None:
        """`w_i` relative to the largest, `[b]`, or None where all are equal."""
        if self.weights.min() == self.weights.max():
            return None
        return torch.from_numpy(self.weights[rows] / self.weights.max()).to(self.model.device)

    def checkpoint(self, following: int) -> None:
        """Save the running sums and the number of the next batch."""
        state = {"squares": self.squares, **(self.moments.state() if self.moments else {})}
        write_file(
            self.directory / "checkpoint.h5",
            {name: tensor.cpu().numpy() for name, tensor in state.items()},
            attrs={"run_digest": self.digest, "next": following, "plan": self.plan_digest, "stored": self.stored},
        )

    def resume(self) -> int:
        """The batch to go on with: after the last checkpoint of the same plan, else the first."""
        path = self.directory / "checkpoint.h5"
        if not path.exists():
            return 0
        with open_file(path, run_digest=self.digest) as file:
            if file.attrs["plan"] != self.plan_digest or file.attrs["stored"] != self.stored or self.created:
                return 0
            state = {"squares": self.squares, **(self.moments.state() if self.moments else {})}
            for name, tensor in state.items():
                tensor.copy_(torch.from_numpy(read(file, name)))
            following = int(np.asarray(file.attrs["next"]))
        say(f"resuming at batch {following + 1} of {len(self.batches)}")
        return following

    @property
    def stored(self) -> str:
        """Which rows the pass writes: a checkpoint of other ones is not continued."""
        return f"gradients={self.store_gradients} rows={self.store_rows}"

    @property
    def plan_digest(self) -> str:
        """SHA-256 over the batches, so that a checkpoint is never continued with another plan."""
        return hashlib.sha256(b"|".join(rows.astype(np.int64).tobytes() for rows in self.batches)).hexdigest()

    def finish(self) -> None:
        """Turn what the pass left into `factors.h5`."""
        path = self.directory / "factors.h5"
        attrs = {"run_digest": self.digest, "curvature": self.curvature.name}
        if self.moments is not None:
            unit = float(self.weights.max())
            kfac = self.moments.kronecker(unit, self.samples)
            fitted = refit_eigenvalues(kfac, self.sampled_rows()) if isinstance(self.curvature, EKFAC) else kfac
            write_file(path, _kronecker_arrays(kfac, fitted, self.moments.wide_of), attrs=attrs)
        elif isinstance(self.curvature, Fisher):
            draws = max(1, self.samples)
            scales = np.sqrt(np.repeat(self.weights, draws) / draws)
            fisher = SampleSpaceFisher.fit(
                self.model.space.size, self.run.fisher_rows(), torch.from_numpy(scales).to(self.model.device)
            )
            arrays = {"vectors": fisher.vectors, "values": fisher.values, "scales": fisher.scales}
            write_file(path, {name: tensor.cpu().numpy() for name, tensor in arrays.items()}, attrs=attrs)
        else:
            write_file(path, {"trace": self.squares.numpy()}, attrs=attrs)

    def sampled_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per-example gradients at the sampled labels with their weights `w_i / samples`, in blocks.

        Read back from the pass where they were stored; else computed again with the same labels.
        """
        share = np.repeat(self.weights, self.samples) / self.samples
        if self.store_rows:
            start = 0
            for block in row_blocks(self.directory / "rows.h5", "rows", self.digest, self.model.device):
                yield block, torch.from_numpy(share[start : start + len(block)]).to(block)
                start += len(block)
            return
        moments, self.moments, self.store_rows, self.buffer = self.moments, None, True, None
        with tape(self.model) as recorder:
            for rows in track(self.plan(limited=True), "training rows, second pass"):
                share = torch.from_numpy(self.weights[rows] / self.samples)
                for found in self.sampled_again(recorder, rows):
                    yield found, share.to(found)
        self.moments, self.store_rows = moments, False


def _refuse_large_gram(m: int) -> None:
    """The Gram matrix and its eigendecomposition take about 3 m^2 doubles; refuse before the pass, not after."""
    needed, there = 24 * m * m, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.7 * there:
        raise InputError(
            f"curvature fisher with {m} rows needs {needed / 1e9:.0f} GB of memory for its {m} x {m} Gram matrix, and this "
            f"machine has {there / 1e9:.0f} GB: use --curvature ekfac, or fewer --samples"
        )


def _fits(store: str, needed: int, budget: float) -> bool:
    return store == "always" or (store == "auto" and needed <= budget)


def shared_inputs(model: AdaptedModel, tokens: TokenizedExamples) -> list[int]:
    """For each leaf, the first leaf whose wide side sees the very same tensor (q, k and v; gate and up).

    Found by running the shortest row once and comparing the layers' inputs; only A leaves can share.
    """
    seen: list[tuple[int, Tensor]] = []
    wide_of = list(range(len(model.space.leaves)))

    def note(number: int):
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            for first, tensor in seen:
                same = tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape and tensor.stride() == x.stride()
                if tensor is x or same:
                    wide_of[number] = first
                    return
            seen.append((number, x))  # kept alive, so that no address is used twice

        return hook

    handles = [
        site.layer.register_forward_pre_hook(note(2 * i), with_kwargs=True) for i, site in enumerate(model.sites)
    ]
    try:
        with model.evaluating(), torch.no_grad():
            shortest = np.array([int(np.argmin(tokens.lengths))])
            supervised_logits(model, collate(tokens, shortest, pad_id=model.pad_id, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return wide_of


def row_blocks(
    path: Path, name: str, run_digest: str, device: torch.device, label: str | None = None
) -> Iterator[Tensor]:
    """Blocks `[b, P]` of a stored row dataset, in order, each about `BLOCK_BYTES`; with progress if labelled."""
    with open_file(path, run_digest=run_digest):
        pass
    with RowFile(path, name) as rows:
        step = max(BLOCK_ROWS, BLOCK_BYTES // (rows.shape[1] * rows.dtype.itemsize))
        starts = range(0, len(rows), step)
        for start in starts if label is None else track(starts, label):
            yield torch.from_numpy(rows.read(start, min(start + step, len(rows)))).to(device)


def _kronecker_arrays(kfac: Kronecker, fitted: Kronecker, wide_of: list[int]) -> dict[str, np.ndarray]:
    arrays = {"wide_of": np.array(wide_of)}
    for number, (plain, block) in enumerate(zip(kfac.leaf_blocks, fitted.leaf_blocks, strict=True)):
        tensors = {
            "narrow": block.narrow,
            "kfac_eigenvalues": plain.eigenvalues,
            "kfac_rest": plain.rest,
            "eigenvalues": block.eigenvalues,
            "rest": block.rest,
        }
        if wide_of[number] == number:
            tensors["wide"] = block.wide
        arrays |= {f"leaf/{number}/{name}": tensor.cpu().numpy() for name, tensor in tensors.items()}
    return arrays


# ---- a finished run ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A fitted run: the manifest, and on demand the curvature and the training gradients.

    Made by `influence.fit`, or opened again with `Run.open`.
    """

    directory: Path
    manifest: dict[str, Any] = field(repr=False)
    model: AdaptedModel = field(repr=False)
    train: Examples
    tokens: TokenizedExamples = field(repr=False)
    _cache: dict[str, Curvature] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        model: AdaptedModel | None = None,
        train: Examples | None = None,
        device: str = "auto",
        checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> Run:
        """Open a run directory with the base, adapter and data it records (or those given).

        Raises `MismatchError`, naming what differs, if base, adapter, data or tokenizer are not those it was made
        from; `InputError` if it is no run or an unfinished one.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if model is None:
            model = load(
                manifest["base"]["path"],
                manifest["adapter"]["path"],
                dtype=manifest["dtype"],
                device=device,
                checkpointing=checkpointing,
                trust_remote_code=trust_remote_code,
            )
        if train is None:
            if manifest["data"]["path"] is None:
                raise InputError(f"{directory} was fitted on rows that came from no file: pass them as train=")
            train = read_examples(manifest["data"]["path"])
        found = {
            "base": model.base_digest,
            "adapter": model.adapter_digest,
            "data": train.digest,
            "tokenizer": tokenizer_digest(model.tokenizer),
            "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        }
        differences = differing(manifest["identity"], found)
        if differences:
            raise MismatchError(
                f"{directory} was made from something else: {'; '.join(differences)}. Restore what it was made from "
                "(paths in manifest.json), or fit a new run"
            )
        tokens = tokenize(train, model.tokenizer, max_length=manifest["objective"]["max_length"])
        return cls(directory, manifest, model, train, tokens)

    @property
    def digest(self) -> str:
        """SHA-256 of what the run was made from; every file of the run carries it."""
        return self.manifest["digest"]

    @cached_property
    def weights(self) -> np.ndarray:
        """The objective's weights `w_i`, `[n]` float64."""
        return weights(self.tokens.counts, self.manifest["objective"]["reduction"])

    @property
    def fitted_name(self) -> str:
        """Name of the curvature that was fitted."""
        return self.manifest["curvature"]["name"]

    def curvature(self, name: str | None = None) -> Curvature:
        """The fitted curvature, or another one that its factors hold.

        Every run has `identity`; an `ekfac` run also has `kfac`; runs of `ekfac`, `kfac`, `ggn` and `hessian` also
        have `ggn` and `hessian` (matrix-free). Anything else is an `InputError`.
        """
        name = name or self.fitted_name
        if name not in self._cache:
            self._cache[name] = self._load_curvature(name)
        return self._cache[name]

    def _load_curvature(self, name: str) -> Curvature:
        fitted, path = self.fitted_name, self.directory / "factors.h5"
        if name == "identity":
            return IdentityCurvature(self.model.space.size)
        if name == fitted == "fisher":
            with open_file(path, run_digest=self.digest) as file:
                tensors = [
                    torch.from_numpy(read(file, k)).to(self.model.device) for k in ("scales", "vectors", "values")
                ]
            scales, vectors, values = tensors
            return SampleSpaceFisher(self.model.space.size, self.fisher_rows(), scales, vectors, values)
        if name in ("ekfac", "kfac") and fitted in (name, "ekfac"):
            return self._load_kronecker(path, name)
        if name in ("ggn", "hessian") and fitted in ("ekfac", "kfac", "ggn", "hessian"):
            if fitted in ("ggn", "hessian"):
                with open_file(path, run_digest=self.digest) as file:
                    trace = torch.from_numpy(read(file, "trace"))
            else:
                sizes = torch.tensor([leaf.stop - leaf.start for leaf in self.model.space.leaves])
                trace = self.curvature(fitted).mean_eigenvalues() * sizes
            objective = Objective(self.model, self.tokens, self.weights, trace, self.manifest["token_budget"])
            return GGNOperator(objective) if name == "ggn" else HessianOperator(objective)
        raise InputError(
            f"curvature {name!r} was asked of a run fitted with {fitted!r}, which does not hold it: fit another run with "
            f"--curvature {name}"
        )

    def _load_kronecker(self, path: Path, name: str) -> Kronecker:
        prefix = "kfac_" if name == "kfac" else ""
        blocks = []
        with open_file(path, run_digest=self.digest) as file:
            wide_of = read(file, "wide_of")
            get = lambda key: torch.from_numpy(read(file, key)).to(self.model.device)  # noqa: E731
            wide = {number: get(f"leaf/{number}/wide") for number in sorted(set(wide_of.tolist()))}
            for number, leaf in enumerate(self.model.space.leaves):
                at = f"leaf/{number}"
                blocks.append(
                    KroneckerBlock(
                        leaf,
                        get(f"{at}/narrow"),
                        wide[int(wide_of[number])],
                        get(f"{at}/{prefix}eigenvalues"),
                        get(f"{at}/{prefix}rest"),
                    )
                )
        return Kronecker(self.model.space, tuple(blocks), name)

    def operator(self, curvature: str | None = None, damping: str | Damping | None = None) -> Damped:
        """`C + lambda I` for a curvature of this run and a damping rule (the fit's by default)."""
        fitted = self.curvature(curvature)
        if fitted.name == "identity":
            return Damped(fitted, torch.ones(1, dtype=torch.float64))
        return Damped(fitted, Damping.parse(damping or self.manifest["damping"]).resolve(fitted))

    def preconditioner(self, operator: Damped) -> Damped:
        """The run's EK-FAC (or K-FAC) with the operator's own lambda, for preconditioned CG."""
        if self.fitted_name not in ("ekfac", "kfac"):
            raise InputError(
                f"preconditioned CG needs EK-FAC factors and this run was fitted with {self.fitted_name!r}: fit with "
                "--curvature ekfac, or use --solver cg"
            )
        kronecker = self.curvature(self.fitted_name)
        assert isinstance(kronecker, Invertible)
        diagonal = operator.diagonal(torch.empty(0, dtype=torch.float64))
        return Damped(kronecker, torch.stack([diagonal[block.start] for block in kronecker.blocks]))

    @property
    def gradients_stored(self) -> bool:
        """Whether the training gradients are on disk, so that scoring needs no training pass."""
        return bool(self.manifest.get("gradients_stored"))

    def gradient_blocks(self, skip: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """`(indices [b], gradients of l_i [b, P])` of all training rows, read or computed, in a fixed order.

        `skip` [n] marks rows that are not needed; a block of which all rows are marked is passed over.
        """
        skip = np.zeros(len(self.tokens), dtype=bool) if skip is None else skip
        if self.gradients_stored:
            path = self.directory / "gradients.h5"
            with open_file(path, run_digest=self.digest):
                if not open_rows(path, "done").all():
                    raise StoreError(f"{path} lacks the gradients of some rows: fit the run again with --overwrite")
            start = 0
            for block in row_blocks(path, "gradients", self.digest, self.model.device, "stored gradients"):
                indices = np.arange(start, start + len(block))
                start += len(block)
                if not skip[indices].all():
                    yield indices, block
            return
        plan = plan_batches(self.tokens, self.manifest["token_budget"], max_rows=max_rows(self.model.space))
        left = [rows for rows in plan if not skip[rows].all()]
        stream = stream_gradients(self.model, self.tokens, batches=left)
        for indices, gradients, _ in track(stream, "training rows", total=len(plan), done=len(plan) - len(left)):
            yield indices, gradients

    def fisher_rows(self) -> Rows:
        """A stream of the sample-space Fisher's rows."""
        empirical = self.manifest["curvature"]["samples"] == 0
        name = "gradients" if empirical else "rows"
        return lambda: row_blocks(self.directory / f"{name}.h5", name, self.digest, self.model.device)

    def score(self, queries: Examples, **options: Any):
        """Influence of every training row on every query; see `influence.scores.score`."""
        from influence.scores import score

        return score(self, queries, **options)

    def self_influence(self, **options: Any):
        """Predicted rise of every training row's own mean loss if it is removed; see `influence.scores`."""
        from influence.scores import self_influence

        return self_influence(self, **options)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished run; anything else is an `InputError` that says what is there."""
    path = directory / "manifest.json"
    if not path.exists():
        raise InputError(f"{directory} is not a run directory (no manifest.json): make one with influence fit")
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {manifest.get('format')!r} and this version reads format {FORMAT}: fit the run again"
        )
    if not manifest.get("complete"):
        raise InputError(f"the fit in {directory} is unfinished: run the same influence fit command again to resume it")
    return manifest
