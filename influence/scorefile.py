"""The score file: what it holds, and going on with one that a killed call left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h5py
import numpy as np

from influence import cards
from influence.errors import InputError, MismatchError, StoreError
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.setting import ADDITIVE, Setting
from influence.solvers import Solution
from influence.store import open_file, open_rows, read, read_strings, write_file
from influence.tokenwise import Tokenwise

if TYPE_CHECKING:
    import pandas as pd
    import xarray

#: Attributes that a score file has only where they are not the default.
OFF_DEFAULT = ("explain", "aggregate", "store", "rerank")
#: Queries whose scores are combined at a time.
COMBINED = 64
#: How per-token scores are named in a score file: values, offsets, token ids.
TOKEN_NAMES = ("per_token", "token_offsets", "token_ids")


@dataclass(frozen=True)
class Entry:
    """One training row in a ranking: its id, its position in the training set, and its score."""

    id: str
    index: int
    score: float


@dataclass(frozen=True)
class Scores:
    """Influence of every training row on every query: `values` float32 [query, train].

    See the module's convention.

    Where they were asked for: `modules` float32 [query, module, train] and `tokens`, which sum to
    `values`. `train_rows` and `query_rows` are the rows where they are held, `path` the file that
    was read.
    """

    values: np.ndarray = field(repr=False)
    query_ids: list[str] = field(repr=False)
    train_ids: list[str] = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    converged: np.ndarray = field(repr=False)
    attributes: dict[str, Any] = field(default_factory=dict)
    modules: np.ndarray | None = field(default=None, repr=False)
    module_names: list[str] = field(default_factory=list, repr=False)
    tokens: Tokenwise | None = field(default=None, repr=False)
    train_rows: Examples | None = field(default=None, repr=False, compare=False)
    query_rows: Examples | None = field(default=None, repr=False, compare=False)
    path: Path | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return cards.scores_line(self)

    def _repr_html_(self) -> str:
        return cards.scores_card(self)

    def to_frame(
        self,
        *,
        texts: bool = False,
        train: Examples | None = None,
        queries: Examples | None = None,
    ) -> pd.DataFrame:
        """Scores as a long pandas frame: `influence.frames.to_frame`."""
        from influence.frames import to_frame

        return to_frame(self, texts=texts, train=train, queries=queries)

    def to_xarray(self) -> xarray.Dataset:
        """Scores as an xarray data set: `influence.frames.to_xarray`."""
        from influence.frames import to_xarray

        return to_xarray(self)

    def query_index(self, query: int | str) -> int:
        """Position of a query given by position or id.

        An unknown one is an `InputError`.
        """
        return position_of(query, self.query_ids)

    def top(self, query: int | str, k: int = 10) -> tuple[list[Entry], list[Entry]]:
        """The k strongest proponents and the k strongest opponents, strongest first.

        Proponents have positive scores, but for a measurement that falls when the model gets worse
        (margin): negative.
        """
        row = self.values[self.query_index(query)]
        harm = row if self.attributes.get("rises", True) else -row
        order = np.argsort(-harm, kind="stable")
        entry = lambda i: Entry(self.train_ids[i], int(i), float(row[i]))  # noqa: E731
        proponents = [entry(i) for i in order[:k] if harm[i] > 0]
        opponents = [entry(i) for i in order[::-1][:k] if harm[i] < 0]
        return proponents, opponents

    def ranked(self, query: int | str, values: np.ndarray, k: int = 10) -> list[Entry]:
        """The k rows that `values` [train] puts highest, first in order where they are equal, each
        with its score for a query.
        """
        row = self.values[self.query_index(query)]
        order = np.argsort(-values, kind="stable")[:k]
        return [Entry(self.train_ids[i], int(i), float(row[i])) for i in order]

    @classmethod
    def load(cls, path: str | Path, *, detail: bool = True) -> Scores:
        """Read a score file, with the scores by token and module if it has them and `detail`.

        Plain h5py reads it too.
        """
        path = Path(path)
        with open_file(path) as file:
            missing = [key for key in ("scores", "query_ids", "train_ids") if key not in file]
            if missing:
                raise StoreError(f"{path} is no score file: it lacks {', '.join(missing)}")
            if not file.attrs.get("complete", True):
                raise StoreError(
                    f"{path} is unfinished: run the same influence score command again to complete "
                    "it"
                )
            return cls(
                read(file, "scores"),
                read_strings(file, "query_ids"),
                read_strings(file, "train_ids"),
                read(file, "residuals") if "residuals" in file else np.array([]),
                read(file, "converged").astype(bool) if "converged" in file else np.array([]),
                dict(file.attrs),
                read(file, "per_module") if detail and "per_module" in file else None,
                read_strings(file, "modules") if "modules" in file else [],
                Tokenwise(*(read(file, name) for name in TOKEN_NAMES))
                if detail and TOKEN_NAMES[0] in file
                else None,
                path=path,
            )


@dataclass(frozen=True)
class SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed: `values` float32
    [train], nats per token.
    """

    values: np.ndarray
    train_ids: list[str]
    worst_residual: float
    attributes: dict[str, Any] = field(default_factory=dict)


def position_of(query: int | str, ids: Sequence[str]) -> int:
    """Position of a query given by position or id among the scored `ids`.

    An unknown one is an `InputError`.
    """
    if isinstance(query, str) and query in ids:
        return ids.index(query)
    try:
        index = int(query)
    except ValueError:
        index = -1
    if not 0 <= index < len(ids):
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        raise InputError(
            f"query {query!r} was given; there are {len(ids)} scored queries: give "
            "a position "
            f"0..{len(ids) - 1} or one of the ids {shown}"
        )
    return index


def tokens_of_query(path: Path, query: int) -> Tokenwise | None:
    """One query's scores by token, `values` [1, all positions]; None where the file has none."""
    with open_file(path) as file:
        values = file.get(TOKEN_NAMES[0])
        if not isinstance(values, h5py.Dataset):
            return None
        return Tokenwise(values[query : query + 1], *(read(file, name) for name in TOKEN_NAMES[1:]))


def different_attributes(stored: Mapping[str, Any], attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes in which what is stored differs from what is asked now."""

    def same(there: Any, now: Any) -> bool:
        there, now = np.asarray(there), np.asarray(now)
        if there.dtype.kind == "f" and there.shape == now.shape:
            # a device's sums may differ in their last bits
            return np.allclose(there, now, rtol=1e-6, atol=0)
        return np.array_equal(there, now)

    stored = {"credit": ADDITIVE, **stored}  # of files that were written before it was shared
    # these say where the queries lie and how the scoring went, and nothing of what was asked
    others = ("residuals", "complete", "version", "queries", "query_columns")
    keys = [key for key in attributes if key not in others]
    different = [key for key in keys if key not in stored or not same(stored[key], attributes[key])]
    # these are written only where they are not the default
    different += [key for key in OFF_DEFAULT if key in stored and key not in attributes]

    def sentence(key: str) -> str:
        if key == "query_digest":
            return "of other queries"
        value = attributes.get(key, "the default")
        if isinstance(value, str) and len(value) < 40 and key in stored:
            return f"{key} {stored[key]!s} there, {value} now"
        return f"another {key}"

    return [sentence(key) for key in different]


def existing_scores(target: Path, attributes: dict[str, Any]) -> Scores | None:
    """The scores of the very same request.

    None where the file holds a self-influence of this run only.
    """
    with open_file(target) as file:
        only_self = set(file) == {"self_influence", "train_ids"}
        if only_self and file.attrs.get("run_digest") == attributes["run_digest"]:
            return None
        different = (
            different_attributes(file.attrs, attributes)
            if "scores" in file
            else ["it is no score file"]
        )
    if different:
        raise MismatchError(
            f"{target} holds other scores ({'; '.join(different)}): give another --out, or "
            "--overwrite to replace them"
        )
    return Scores.load(target)


@dataclass
class ScoresInTheMaking:
    """Scores in the making, in memory or in files that a killed call leaves to go on with.

    `parts` [points, query, train] are the points' own scores before they are added, `module_parts`
    [points, query, module, train] the same by module; with one point of factor 1 they are the final
    arrays themselves. `done` [chunks * points, train]. On disk: `F.partial`, which becomes the
    score file, and beside it where they are apart `F.parts`.
    """

    chunks: int
    done: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    parts: np.ndarray
    module_parts: np.ndarray
    values: np.ndarray
    modules: np.ndarray
    module_names: list[str]
    query_ids: Sequence[str]
    target: Path | None
    apart: bool

    @classmethod
    def begin(
        cls,
        target: Path | None,
        setting: Setting,
        query_ids: Sequence[str],
        chunks: int,
        modules: list[str],
        attributes: dict[str, Any],
        *,
        apart: bool,
    ) -> ScoresInTheMaking:
        """Zeros, or what a killed call with the very same request left.

        `apart`: the points' scores are more than the answer, and combined at the end.
        """
        run, points = setting.run, len(setting.points)
        Q, n, M = len(query_ids), len(run.train), len(modules)
        if target is None:
            values, split = np.zeros((Q, n), np.float32), np.zeros((Q, M, n), np.float32)
            parts = np.zeros((points, Q, n), np.float32) if apart else values[None]
            module_parts = np.zeros((points, Q, M, n), np.float32) if apart else split[None]
            done = np.zeros((chunks * points, n), np.uint8)
            return cls(
                chunks,
                done,
                np.zeros(Q),
                np.ones(Q, np.uint8),
                parts,
                module_parts,
                values,
                split,
                modules,
                query_ids,
                None,
                apart,
            )
        partial, beside = partial_file(target), parts_file(target)
        begun = _begun(partial, attributes)
        if begun and (not apart or beside.exists()):
            say(f"resuming {partial}")
            chunks = begun // points
        else:
            partial.unlink(missing_ok=True)  # first: parts are trusted by the file beside them
            if apart:
                rows = {
                    "parts": ((points, Q, n), np.float32),
                    "module_parts": ((points, Q, M, n), np.float32),
                }
                write_file(beside, rows=rows)
            _lay_out(partial, run, query_ids, chunks * points, modules, attributes)
        names = ("scores", "done", "residuals", "converged", "per_module")
        values, done, residuals, converged, split = (
            open_rows(partial, name, write=True)
            if M or name != "per_module"
            else np.zeros((Q, 0, n), np.float32)
            for name in names
        )
        parts, module_parts = values[None], split[None]
        if apart:
            parts, module_parts = (
                open_rows(beside, name, write=True) for name in ("parts", "module_parts")
            )
        return cls(
            chunks,
            done,
            residuals,
            converged,
            parts,
            module_parts,
            values,
            split,
            modules,
            query_ids,
            target,
            apart,
        )

    def put(
        self,
        chunk: int,
        point: int,
        queries: np.ndarray,
        rows: np.ndarray,
        scores: np.ndarray,
        by_module: Sequence[np.ndarray],
    ) -> None:
        """Keep the scores `[K, b]` of some rows [b] for a chunk's queries [K] at a point, and note
        that they are done. `by_module` has the same of each module.
        """
        place = np.ix_(queries, rows)
        self.parts[point][place] = scores
        for module, own in enumerate(by_module):
            self.module_parts[point][:, module][place] = own
        self.done[chunk * (len(self.done) // self.chunks) + point, rows] = 1

    def note(self, rows: np.ndarray, solution: Solution) -> None:
        """A query's residual is the worst of its points'.

        It has converged where it has at all of them.
        """
        self.residuals[rows] = np.maximum(self.residuals[rows], solution.residuals.numpy())
        self.converged[rows] = self.converged[rows] & solution.converged.cpu().numpy()

    def finish(
        self,
        setting: Setting,
        combine: Callable[[np.ndarray], np.ndarray],
        tokenwise: Tokenwise | None,
        attributes: dict[str, Any],
    ) -> Scores:
        """Make scores `[K, n]` of the points' own `[points, K, n]` by `combine`."""
        if self.apart:  # else `parts` are `values` themselves
            for start in range(0, len(self.values), COMBINED):
                some = slice(start, start + COMBINED)
                self.values[some] = combine(self.parts[:, some].astype(np.float64))
            for query in range(len(self.modules) if self.module_names else 0):
                own = self.module_parts[:, query].astype(np.float64)
                self.modules[query] = combine(own)
        attributes["residuals"], attributes["complete"] = float(self.residuals.max()), True
        return Scores(
            np.array(self.values),
            list(self.query_ids),
            setting.run.train.ids,
            np.array(self.residuals),
            self.converged.astype(bool),
            attributes,
            np.array(self.modules) if self.module_names else None,
            self.module_names,
            tokenwise,
        )

    def seal(self, result: Scores, run: Run) -> Scores:
        """Complete the file, keep a self-influence that it held, and move it into place."""
        if self.target is None:
            return result
        partial, none = partial_file(self.target), np.zeros(0)
        self.done = self.residuals = self.converged = self.parts = self.module_parts = (
            none  # unmap the files
        )
        self.values = self.modules = none
        with h5py.File(partial, "r+") as file:
            if result.tokens is not None:
                for name, array in zip(TOKEN_NAMES, vars(result.tokens).values(), strict=True):
                    if name in file:
                        del file[name]
                    file.create_dataset(name, data=array)
            file.attrs.update(result.attributes)
            with (
                suppress(StoreError),
                open_file(self.target) as old,
            ):  # a missing or damaged target has nothing to keep
                kept = cast("h5py.Dataset | None", old.get("self_influence"))
                if (
                    kept is not None
                    and kept.attrs.get("run_digest") == run.digest
                    and "self_influence" not in file
                ):
                    old.copy("self_influence", file)
        os.replace(partial, self.target)
        parts_file(self.target).unlink(missing_ok=True)
        return result


def partial_file(target: Path) -> Path:
    """The unfinished score file, which becomes `target`."""
    return target.with_name(target.name + ".partial")


def parts_file(target: Path) -> Path:
    """The points' own scores, beside the unfinished file until they are added up."""
    return target.with_name(target.name + ".parts")


def _begun(partial: Path, attributes: dict[str, Any]) -> int:
    """Rows of `/done` of an unfinished file of the very same request.

    0 where there is none to go on with.
    """
    if not partial.exists():
        return 0
    try:
        with open_file(partial) as file:
            ours, same = (
                "convention" in file.attrs,
                not different_attributes(file.attrs, attributes),
            )
            begun = read(file, "done").shape[0]
    except (StoreError, MismatchError):
        ours, same, begun = False, False, 0
    if not ours:
        raise MismatchError(
            f"{partial} is in the way and is no unfinished score file: move it away"
        )
    return begun if same else 0


def _lay_out(
    partial: Path,
    run: Run,
    query_ids: Sequence[str],
    passes: int,
    modules: list[str],
    attributes: dict[str, Any],
) -> None:
    """Create the partial file at full size."""
    Q, n = len(query_ids), len(run.train)
    rows: dict[str, tuple[tuple[int, ...], Any]] = {
        "scores": ((Q, n), np.float32),
        "residuals": ((Q,), np.float64),
        "converged": ((Q,), np.uint8),
        "done": ((passes, n), np.uint8),
    }
    strings = {"query_ids": list(query_ids), "train_ids": run.train.ids}
    if modules:
        rows["per_module"], strings["modules"] = ((Q, len(modules), n), np.float32), modules
    write_file(partial, attrs=attributes, strings=strings, rows=rows)
    open_rows(partial, "converged", write=True)[:] = 1


def existing_self_influence(
    target: Path, run: Run, attributes: dict[str, Any], overwrite: bool
) -> SelfInfluence | None:
    """The stored self-influence of the very same request.

    None where there is none; anything else is refused.
    """
    if not target.exists():
        return None
    with open_file(target, run_digest=run.digest) as file:
        if not set(file) & {"scores", "self_influence"}:
            raise MismatchError(f"{target} is no score file: give another --out")
        dataset = cast("h5py.Dataset | None", file.get("self_influence"))
        if dataset is None or overwrite:
            return None
        different = different_attributes(dataset.attrs, attributes)
        values, found = dataset[()], dict(dataset.attrs)
    if different:
        raise MismatchError(
            f"{target} holds another self-influence ({'; '.join(different)}): give another --out, "
            "or --overwrite"
        )
    return SelfInfluence(values, run.train.ids, float(np.asarray(found["residuals"])), found)


def write_self_influence(target: Path, run: Run, result: SelfInfluence) -> None:
    """Add self-influences to a score file of the run, or begin one, in one move."""
    partial = target.with_name(target.name + ".self.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.copyfile(target, partial)
    else:
        write_file(partial, attrs={"run_digest": run.digest}, strings={"train_ids": run.train.ids})
    with h5py.File(partial, "r+") as file:
        if "self_influence" in file:
            del file["self_influence"]
        file.create_dataset("self_influence", data=result.values).attrs.update(result.attributes)
    os.replace(partial, target)
