"""Runs that are killed and resumed, files that are damaged or foreign, and the layout others read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import influence
import influence.fitting as fitting
import influence.run as run_module
from influence import CG, EKFAC, GGN, KFAC, Fisher, Hessian, Identity, Run
from influence.errors import InputError, MismatchError, StoreError
from influence.run import AtPoint
from influence.scorefile import Scores
from influence.scores import CONVENTION, SELF_CONVENTION
from influence.store import open_file, open_rows, read_json, write_file, write_json
from tests.conftest import build_model, examples, rows
from tests.influence.test_adapter import edit_weights, save

N, BUDGET = 24, 30
KINDS = {
    "ekfac": (EKFAC(), "always"),
    "ekfac, two draws": (EKFAC(samples=2), "auto"),
    "ekfac, nothing stored": (EKFAC(), "never"),
    "kfac": (KFAC(), "always"),
    "kfac, nothing stored": (KFAC(samples=2), "never"),
    "fisher": (Fisher(), "always"),
    "fisher of the data's labels": (Fisher(samples=0), "never"),
    "ggn": (GGN(), "always"),
    "ggn, nothing stored": (GGN(), "never"),
    "identity": (Identity(), "always"),
    "ekfac, two points": (EKFAC(), "always"),
    "fisher, two points": (Fisher(), "always"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared here, and these models are too small for threads to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interruption(Exception):
    """Stands for a kill between two batches."""


@cache
def model():
    """One model for all tests of this file; none of them changes it."""
    return build_model("llama", layers=1, target_modules=["q_proj", "v_proj"], dtype=torch.float32)


def fit(directory: Path, kind: str = "ekfac", **options) -> Run:
    curvature, store = KINDS[kind]
    path = (0.5, 0.9) if kind.endswith("two points") else (1.0,)
    options = {
        "curvature": curvature,
        "store": store,
        "token_budget": BUDGET,
        "path": path,
    } | options
    return influence.fit(
        options.pop("model", model()),
        options.pop("train", examples(N)),
        directory=directory,
        **options,
    )


def interrupt_after(monkeypatch, batches: int) -> None:
    """Make the given number of further batches succeed and the next one fail."""
    real, left = fitting.collate, batches

    def collate(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise Interruption
        return real(*arguments, **options)

    monkeypatch.setattr(fitting, "collate", collate)


def interrupted_fit(monkeypatch, directory: Path, batches: int, **options) -> None:
    """A fit that ends after so many batches."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, batches)
        with pytest.raises(Interruption):
            fit(directory, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def times(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*"))}


def arrays(path: Path) -> dict[str, bytes]:
    """Every dataset and attribute of a file, bit for bit (HDF5 may note the time of day beside them)."""

    def bits(value) -> bytes:
        value = np.asarray(value)
        return b"|".join(value.ravel()) if value.dtype == object else value.tobytes()

    found = {}
    with h5py.File(path) as file:
        found |= {f"@{name}": bits(value) for name, value in file.attrs.items()}
        file.visititems(
            lambda name, item: found.update({name: bits(item)} if hasattr(item, "dtype") else {})
        )
    return found


def same_files(one: Path, other: Path, *names: str) -> None:
    """These files are in both directories with the same arrays, or in neither."""
    for name in names:
        assert (one / name).exists() == (other / name).exists(), name
        if (one / name).exists():
            first, second = arrays(one / name), arrays(other / name)
            assert list(first) == list(second), name
            assert [key for key in first if first[key] != second[key]] == [], name


@contextlib.contextmanager
def untouched(*directories: Path):
    """No file in these directories changes within the block; a new `.partial` to go on with may appear."""
    before = [contents(directory) for directory in directories]
    yield
    for directory, files in zip(directories, before, strict=True):
        after = {
            name: data
            for name, data in contents(directory).items()
            if name in files or ".partial" not in name
        }
        assert sorted(after) == sorted(files)
        assert [name for name in files if after[name] != files[name]] == []


def solver_of(kind: str):
    """Direct where there is a closed form; else a few steps of CG, which is enough to compare bits."""
    return CG(max_iterations=2) if kind.startswith(("ggn", "hessian")) else "direct"


# ---- interrupted between batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_interrupted_between_batches_and_resumed_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, kind
):
    queries = examples(3, seed=9)
    expected = fit(tmp_path / "whole", kind).score(queries, solver=solver_of(kind)).values
    for checkpointed in (True, False):
        directory = tmp_path / f"resumed {checkpointed}"
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "CHECKPOINT_SECONDS", 0 if checkpointed else 1e9)
            interruptions = 0
            for batches in (1, 3, 2, 5):
                with patch.context() as inner:
                    interrupt_after(inner, batches)
                    try:
                        fit(directory, kind)
                    except Interruption:
                        interruptions += 1
                        with pytest.raises(
                            InputError, match=r"the fit in .* is unfinished: run the same"
                        ):
                            Run.open(directory, model=model(), train=examples(N))
        run = fit(directory, kind)
        works = kind != "identity" or KINDS[kind][1] == "always"
        assert interruptions >= (2 if works else 0)
        same_files(tmp_path / "whole", directory, "factors.h5", "gradients.h5", "rows.h5")
        found = run.score(queries, solver=solver_of(kind)).values
        assert np.array_equal(found, expected)
        assert sorted(contents(directory)) == sorted(
            contents(tmp_path / "whole")
        )  # nothing is left behind


def test_another_batch_plan_does_not_continue_a_checkpoint_but_gives_the_same_scores(
    tmp_path, monkeypatch
):
    expected = fit(tmp_path / "whole").score(examples(3, seed=9)).values
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0)
    interrupted_fit(monkeypatch, tmp_path / "run", 4)
    run = fit(tmp_path / "run", token_budget=100)
    found = run.score(examples(3, seed=9)).values
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["ekfac", "ekfac, nothing stored", "ekfac, two points"])
def test_a_scoring_interrupted_between_blocks_and_resumed_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, kind, capfd
):
    run = fit(tmp_path / "run", kind)
    queries = examples(5, seed=9)
    monkeypatch.setattr(
        run_module, "BLOCK_BYTES", 5 * run.model.space.size * 4
    )  # five rows at a time
    monkeypatch.setattr(run_module, "BLOCK_ROWS", 1)
    monkeypatch.setattr("influence.scores.queries_at_once", lambda *_: 2)
    expected = run.score(queries, out=tmp_path / "whole.h5", per_module=True)
    expected, by_module = expected.values, expected.modules
    out = tmp_path / "resumed.h5"
    real, interruptions = AtPoint.gradient_blocks, 0
    for blocks in (2, 1, 3, 5, 1, 2):
        left = blocks

        def few(self, skip=None):
            nonlocal left
            for item in real(self, skip):
                if left == 0:
                    raise Interruption
                left -= 1
                yield item

        with monkeypatch.context() as patch:
            patch.setattr(AtPoint, "gradient_blocks", few)
            try:
                run.score(queries, out=out, per_module=True)
            except Interruption:
                interruptions += 1
                assert not out.exists()
    capfd.readouterr()
    found = run.score(queries, out=out, per_module=True)
    assert interruptions == 6
    assert "resuming" in capfd.readouterr().err
    assert np.array_equal(found.values, expected)
    assert np.array_equal(found.modules, by_module)
    assert np.array_equal(Scores.load(out).values, expected)
    assert not list(tmp_path.glob("*.part*"))


def test_a_partial_score_file_of_another_request_is_not_continued(tmp_path, monkeypatch):
    run = fit(tmp_path / "run")
    out = tmp_path / "scores.h5"
    with monkeypatch.context() as patch:
        patch.setattr(
            AtPoint, "gradient_blocks", lambda self, skip=None: (_ for _ in ()).throw(Interruption)
        )
        with pytest.raises(Interruption):
            run.score(examples(3, seed=9), out=out)
    assert out.with_name("scores.h5.partial").exists()
    queries = examples(3, seed=8)
    assert np.array_equal(run.score(queries, out=out).values, run.score(queries).values)


# ---- killed at any moment ----------------------------------------------------------------------------------


def in_child(work, kill_after: float | None) -> bool:
    """Run `work` in a forked process, killed after so many seconds; whether it came to its end."""
    pid = os.fork()
    if pid == 0:  # the child never returns into pytest
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            status = 0
        finally:
            os._exit(status)
    end = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (
                "the child failed by itself"
            )
            return os.WIFEXITED(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", ["ekfac", "ekfac, nothing stored", "ekfac, two points"])
def test_sigkill_at_ten_random_moments_changes_nothing(tmp_path, monkeypatch, kind):
    train, queries = examples(150), examples(20, seed=9)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.02)
    monkeypatch.setattr(run_module, "BLOCK_BYTES", 10 * model().space.size * 4)

    def work(directory: Path) -> None:
        fit(directory, kind, train=train, token_budget=BUDGET).score(
            queries, out=directory / "scores.h5"
        )

    start = time.monotonic()
    assert in_child(lambda: work(tmp_path / "whole"), None)
    whole = time.monotonic() - start
    generator = random.Random(0)
    kills, directory, copies = 0, tmp_path / "run", 0
    while kills < 10 and copies < 30:
        if in_child(lambda path=directory: work(path), generator.uniform(0, 0.7 * whole)):
            directory, copies = (
                tmp_path / f"run {copies}",
                copies + 1,
            )  # it came to its end: start over
        else:
            kills += 1
    assert kills == 10
    for path in sorted(tmp_path.glob("run*")):
        assert in_child(lambda path=path: work(path), None)
        same_files(tmp_path / "whole", path, "factors.h5", "gradients.h5")
        assert np.array_equal(
            Scores.load(path / "scores.h5").values,
            Scores.load(tmp_path / "whole" / "scores.h5").values,
        )
        assert sorted(contents(path)) == sorted(contents(tmp_path / "whole"))


@pytest.mark.slow
def test_commands_killed_at_ten_random_moments_change_nothing(tmp_path):
    base, adapter = save(tmp_path, "llama")
    for name, count, seed in (("train", 600, 0), ("queries", 30, 9)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows(count, seed))
        )

    def commands(run: Path) -> list[list[str]]:
        fit = [
            "fit",
            "--model",
            base,
            "--adapter",
            adapter,
            "--train",
            tmp_path / "train.jsonl",
            "--token-budget",
            "40",
        ]
        score = ["score", "--run", run, "--queries", tmp_path / "queries.jsonl"]
        start = "import influence.fitting as r; r.CHECKPOINT_SECONDS = 0.05; from influence.cli import main; main()"
        return [[sys.executable, "-c", start, *map(str, c)] for c in ([*fit, "--run", run], score)]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    lasted = []
    for command in commands(tmp_path / "whole"):
        start = time.monotonic()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lasted.append(time.monotonic() - start)
    expected = Scores.load(tmp_path / "whole" / "scores.h5").values
    generator = random.Random(0)
    for number, (command, made) in enumerate(
        zip(commands(tmp_path / "run"), ["run", "run/scores.h5"], strict=True)
    ):
        kills = 0
        while kills < 5:
            process = subprocess.Popen(
                command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            try:
                assert process.wait(generator.uniform(0.4, 1) * lasted[number]) == 0
                made_it = tmp_path / made  # it came to its end: start over
                shutil.rmtree(made_it) if made_it.is_dir() else made_it.unlink()
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert np.array_equal(Scores.load(tmp_path / "run" / "scores.h5").values, expected)
    same_files(tmp_path / "whole", tmp_path / "run", "factors.h5", "gradients.h5")


# ---- finished, unfinished, replaced ------------------------------------------------------------------------


def test_a_finished_identical_fit_returns_at_once_and_touches_nothing(tmp_path, monkeypatch):
    expected = fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5").values
    before = contents(tmp_path), times(tmp_path)
    monkeypatch.setattr(fitting, "collate", None)  # any pass over rows would fail
    run = fit(tmp_path)
    assert run.gradients_stored
    found = run.score(
        examples(2, seed=9), out=tmp_path / "scores.h5"
    )  # the very same scores are returned, too
    assert np.array_equal(found.values, expected)
    assert (contents(tmp_path), times(tmp_path)) == before


def test_a_finished_fit_does_not_depend_on_batch_size_or_damping(tmp_path):
    fit(tmp_path)
    with untouched(tmp_path):
        fit(tmp_path, token_budget=7)
    factors = (tmp_path / "factors.h5").stat()
    assert fit(tmp_path, damping="abs:1").operator().lam.tolist() == [1.0] * 4
    assert (tmp_path / "factors.h5").stat() == factors  # no work was done again
    again = Run.open(tmp_path, model=model(), train=examples(N))
    assert again.operator().lam.tolist() == [1.0] * 4  # and later scores use it


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("seed is 0 there and 1 here", {"seed": 1}),
        ("reduction is token there and example here", {"reduction": "example"}),
        ("max_length is null there and 50 here", {"max_length": 50}),
        ("curvature is .*ekfac.* there and .*kfac.* here", {"curvature": KFAC()}),
        ("store is always there and never here", {"store": "never"}),
        ("data is [0-9a-f]{12} there and [0-9a-f]{12} here", {"train": examples(N, seed=1)}),
        ("data is", {"train": examples(N + 1)}),
    ],
)
def test_a_fit_into_another_run_names_the_difference_and_overwrites_nothing(
    tmp_path, named, options
):
    fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5")
    message = f"holds a run made from something else: {named}.*Give another --run directory, or --overwrite"
    with untouched(tmp_path), pytest.raises(MismatchError, match=message):
        fit(tmp_path, **options)


def test_overwrite_replaces_the_run_and_its_scores(tmp_path):
    fit(tmp_path).score(examples(2, seed=9), out=tmp_path / "scores.h5")
    run = fit(tmp_path, "fisher", seed=1, overwrite=True)
    fit(tmp_path / "new", "fisher", seed=1)
    same_files(tmp_path, tmp_path / "new", "factors.h5", "gradients.h5", "rows.h5")
    assert run.fitted_name == "fisher"
    assert not (tmp_path / "scores.h5").exists()


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match=r"is not empty and holds no run .*give a new directory"),
    ):
        fit(tmp_path)
    with (
        untouched(tmp_path),
        pytest.raises(InputError, match="is a file; give a directory for the run"),
    ):
        fit(tmp_path / "thesis.txt")
    fit(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scores.h5").write_text("of somebody else")
    with untouched(tmp_path), pytest.raises(InputError, match=r"but scores\.h5"):
        fit(tmp_path / "other", overwrite=True)


def test_wrong_arguments_leave_no_directory(tmp_path):
    directory = tmp_path / "run"
    for options, message in [
        ({"path": (0.5, 1.5)}, "path 0.5,1.5 was given; expected different numbers above 0"),
        ({"path": (0.5, 0.5)}, "path 0.5,0.5 was given"),
        ({"geometry": "flat"}, "geometry 'flat' was given; expected one of raw, function, adam"),
        ({"store": "maybe"}, "store 'maybe' was given; expected auto, always or never"),
        ({"token_budget": 0}, "token budget 0 was given; expected at least 1"),
        ({"damping": "mean:0"}, "lambda must be positive"),
        ({"reduction": "row"}, "reduction 'row' was given"),
    ]:
        with pytest.raises(InputError, match=message):
            fit(directory, **options)
    assert not directory.exists()


def test_an_unfinished_run_is_not_opened(tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match=r"is not a run directory \(no manifest.json\): make one with influence fit",
    ):
        Run.open(tmp_path, model=model(), train=examples(N))
    interrupted_fit(monkeypatch, tmp_path, 2)
    message = r"the fit in .* is unfinished: run the same influence fit command again to resume it"
    with untouched(tmp_path), pytest.raises(InputError, match=message):
        Run.open(tmp_path, model=model(), train=examples(N))


def test_a_run_of_another_format_is_not_opened(tmp_path):
    fit(tmp_path)
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"format": 99})
    with pytest.raises(
        InputError, match="has format 99 and this version reads format 2: fit the run again"
    ):
        Run.open(tmp_path, model=model(), train=examples(N))
    for damage in ("{", "[]", ""):
        (tmp_path / "manifest.json").write_text(damage)
        for call in (
            lambda: Run.open(tmp_path, model=model(), train=examples(N)),
            lambda: fit(tmp_path),
        ):
            with (
                untouched(tmp_path),
                pytest.raises(
                    StoreError, match=r"manifest.json (cannot be read|holds no JSON object)"
                ),
            ):
                call()


# ---- changed inputs ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """A base, an adapter and rows on disk, and a run made from them."""
    base, adapter = save(tmp_path, layers=1, target_modules=["q_proj", "v_proj"])
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(N)))
    loaded = influence.load(base, adapter, device="cpu")
    influence.fit(loaded, influence.read_examples(data), directory=tmp_path / "run").score(
        examples(2, seed=9), out=tmp_path / "run" / "scores.h5"
    )
    return tmp_path


def add_a_token(base: Path) -> None:
    path = base / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["fox"], vocabulary["dog"] = vocabulary["dog"], vocabulary["fox"]
    path.write_text(json.dumps(rules))


CHANGES = {
    "adapter": lambda at: edit_weights(
        at / "adapter" / "adapter_model.safetensors", lambda t: next(iter(t.values())).mul_(1.001)
    ),
    "base": lambda at: edit_weights(
        at / "base" / "model.safetensors", lambda t: t["model.norm.weight"].mul_(1.01)
    ),
    "data": lambda at: (at / "train.jsonl").write_text(
        (at / "train.jsonl").read_text().replace("fox", "dog", 1)
    ),
    "tokenizer": lambda at: add_a_token(at / "base"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_input_is_named_and_nothing_is_overwritten(folders, what):
    Run.open(folders / "run", device="cpu")
    CHANGES[what](folders)
    message = f"{what} is [0-9a-f]{{12}} there and [0-9a-f]{{12}} here"
    with untouched(folders / "run"):
        with pytest.raises(
            MismatchError, match=f"was made from something else: {message}. Restore"
        ) as caught:
            Run.open(folders / "run", device="cpu")
        assert str(caught.value).count(" there and ") == 1
        loaded = influence.load(folders / "base", folders / "adapter", device="cpu")
        with pytest.raises(
            MismatchError, match=f"holds a run made from something else: {message}. Give another"
        ):
            influence.fit(
                loaded, influence.read_examples(folders / "train.jsonl"), directory=folders / "run"
            )


def test_a_moved_base_adapter_or_data_set_is_the_same(folders):
    Run.open(folders / "run", device="cpu")
    for name in ("base", "adapter", "train.jsonl"):
        (folders / name).rename(folders / f"moved {name}")
    loaded = influence.load(folders / "moved base", folders / "moved adapter", device="cpu")
    data = influence.read_examples(folders / "moved train.jsonl")
    factors = (folders / "run" / "factors.h5").stat()
    assert Run.open(folders / "run", model=loaded, train=data).gradients_stored
    influence.fit(
        loaded, data, directory=folders / "run"
    )  # finished: only learns where things lie now
    assert (folders / "run" / "factors.h5").stat() == factors
    assert Run.open(folders / "run", device="cpu").gradients_stored


# ---- damaged and foreign files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "fisher", "ggn"])
@pytest.mark.parametrize("name", ["factors.h5", "gradients.h5", "rows.h5"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_truncated_file_is_named_and_nothing_is_overwritten(tmp_path, kind, name, share):
    fit(tmp_path, kind)
    path = tmp_path / name
    if not path.exists():
        pytest.skip(f"{kind} runs keep no {name}")
    size = path.stat().st_size
    os.truncate(path, int(share * size))
    run = fit(tmp_path, kind)  # finished: opened as it is
    with (
        untouched(tmp_path),
        pytest.raises(StoreError, match=f"{name} is damaged, truncated, or not an HDF5 file"),
    ):
        run.score(examples(2, seed=9), out=tmp_path / "scores.h5", solver=solver_of(kind))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.98])
def test_a_truncated_score_file_is_named_and_nothing_is_overwritten(tmp_path, share):
    run, out = fit(tmp_path), tmp_path / "scores.h5"
    run.score(examples(2, seed=9), out=out)
    os.truncate(out, int(share * out.stat().st_size))
    for call in (
        lambda: Scores.load(out),
        lambda: run.score(examples(2, seed=9), out=out),
        lambda: run.self_influence(out=out),
    ):
        with (
            untouched(tmp_path),
            pytest.raises(
                StoreError, match=r"scores.h5 is damaged, truncated, or not an HDF5 file"
            ),
        ):
            call()
    run.score(examples(2, seed=9), out=out, overwrite=True)
    assert Scores.load(out).values.shape == (2, N)


def test_a_file_in_the_way_of_an_unfinished_score_file_is_left_alone(tmp_path):
    run, out = fit(tmp_path), tmp_path / "scores.h5"
    (tmp_path / "scores.h5.partial").write_bytes(b"somebody else's")
    with (
        untouched(tmp_path),
        pytest.raises(MismatchError, match="is in the way and is no unfinished score file"),
    ):
        run.score(examples(2, seed=9), out=out)


def test_a_run_s_own_files_are_no_place_for_scores(tmp_path):
    run = fit(tmp_path)
    for name in ("gradients.h5", "factors.h5"):
        with untouched(tmp_path), pytest.raises(MismatchError, match="no score file"):
            run.score(examples(2, seed=9), out=tmp_path / name)
        with untouched(tmp_path), pytest.raises(MismatchError, match="no score file"):
            run.self_influence(out=tmp_path / name)


def test_an_unfinished_score_file_is_not_read_as_scores(tmp_path, monkeypatch):
    run = fit(tmp_path)
    monkeypatch.setattr("influence.scorefile.ScoresInTheMaking.seal", lambda *_: None)
    run.score(examples(2, seed=9), out=tmp_path / "s.h5")
    with pytest.raises(
        StoreError, match="is unfinished: run the same influence score command again"
    ):
        Scores.load(tmp_path / "s.h5.partial")


def test_two_processes_do_not_write_the_same_file(tmp_path):
    from influence.store import only_writer

    run = fit(tmp_path)
    with (
        only_writer(tmp_path / "s.h5"),
        pytest.raises(StoreError, match="another process is writing to"),
    ):
        run.score(examples(2, seed=9), out=tmp_path / "s.h5")
    with (
        only_writer(tmp_path / "new"),
        pytest.raises(StoreError, match="another process is writing to"),
    ):
        fit(tmp_path / "new")


@pytest.mark.parametrize("lost", ["rows.h5", "gradients.h5"])
def test_a_resume_that_must_store_other_rows_starts_again(tmp_path, monkeypatch, lost):
    """A checkpoint says which row files it goes with: a larger disk budget, or a lost file, voids it."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)  # after every batch
    expected = fit(tmp_path / "whole", store="auto").score(examples(2, seed=9)).values
    row = model().space.size * 8 * N
    interrupted_fit(
        monkeypatch, tmp_path / "budget", 4, store="auto", disk_budget=row
    )  # gradients, no rows
    found = fit(tmp_path / "budget", store="auto").score(examples(2, seed=9)).values
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    interrupted_fit(monkeypatch, tmp_path / "lost", 4, store="auto")
    (tmp_path / "lost" / lost).unlink()
    assert np.array_equal(
        fit(tmp_path / "lost", store="auto").score(examples(2, seed=9)).values, expected
    )


def test_solver_options_are_part_of_the_request(tmp_path):
    from influence.solvers import CG

    run = fit(tmp_path)
    run.score(examples(2, seed=9), out=tmp_path / "s.h5", solver=CG(tolerance=0.5))
    with pytest.raises(MismatchError, match="another options"):
        run.score(examples(2, seed=9), out=tmp_path / "s.h5", solver=CG(tolerance=1e-8))


@pytest.mark.parametrize("kind", ["ekfac", "fisher", "ggn"])
@pytest.mark.parametrize("name", ["factors.h5", "gradients.h5", "rows.h5"])
def test_a_file_of_another_run_is_refused_and_nothing_is_overwritten(tmp_path, kind, name):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    fit(ours, kind)
    fit(theirs, kind, seed=1)
    if not (ours / name).exists():
        pytest.skip(f"{kind} runs keep no {name}")
    shutil.copy(theirs / name, ours / name)
    message = (
        rf"{name} belongs to another run \(digest [0-9a-f]{{12}}, this run has [0-9a-f]{{12}}\)"
    )
    with untouched(ours), pytest.raises(MismatchError, match=message):
        fit(ours, kind).score(examples(2, seed=9), out=ours / "scores.h5", solver=solver_of(kind))


def test_a_foreign_row_file_in_an_unfinished_fit_is_not_continued(tmp_path, monkeypatch):
    """Row files that a killed fit left are trusted only if they are this run's own."""
    fit(tmp_path / "theirs", seed=1)
    directory = tmp_path / "ours"
    interrupted_fit(monkeypatch, directory, 2)
    shutil.copy(tmp_path / "theirs" / "gradients.h5", directory / "gradients.h5")
    with (
        untouched(directory),
        pytest.raises(MismatchError, match=r"gradients.h5 belongs to another run"),
    ):
        fit(directory)


def test_a_truncated_row_file_in_an_unfinished_fit_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0)
    interrupted_fit(monkeypatch, tmp_path, 2)
    for name in ("gradients.h5", "rows.h5", "checkpoint.h5"):
        shutil.copytree(tmp_path, tmp_path.parent / name)
        os.truncate(tmp_path.parent / name / name, 1000)
        with (
            untouched(tmp_path.parent / name),
            pytest.raises(StoreError, match=f"{name} is damaged, truncated"),
        ):
            fit(tmp_path.parent / name)


def test_scores_of_another_run_or_request_are_not_replaced(tmp_path):
    ours, theirs = fit(tmp_path / "ours"), fit(tmp_path / "theirs", seed=1)
    out, queries = tmp_path / "scores.h5", examples(2, seed=9)
    theirs.score(queries, out=out)
    theirs.self_influence(out=out)
    with untouched(tmp_path):
        with pytest.raises(
            MismatchError,
            match=r"holds other scores \(.*run_digest.*\): give another --out, or --overw",
        ):
            ours.score(queries, out=out)
        with pytest.raises(MismatchError, match="belongs to another run"):
            ours.self_influence(out=out)
        for options, named in [
            (
                {"measurement": "margin"},
                "measurement loss there, margin now; unit nats per token there, log-odds per token now; .*",
            ),
            ({"curvature": "identity"}, "curvature ekfac there, identity now; .*damping.*"),
            ({"damping": "mean:0.2"}, "damping mean:0.1 there, mean:0.2 now; another lambda"),
            ({"solver": "cg"}, "solver direct there, cg now; another options"),
        ]:
            with pytest.raises(MismatchError, match=rf"holds other scores \({named}\)"):
                theirs.score(queries, out=out, **options)
        with pytest.raises(MismatchError, match=r"holds other scores \(another query_digest\)"):
            theirs.score(examples(2, seed=8), out=out)
        with pytest.raises(
            MismatchError,
            match=r"holds another self-influence \(damping mean:0.1 there, mean:0.2 now; another lambda\)",
        ):
            theirs.self_influence(out=out, damping="mean:0.2")
    ours.score(queries, out=out, overwrite=True)
    with h5py.File(out) as file:
        assert file.attrs["run_digest"] == ours.digest
        assert "self_influence" not in file  # it was of another run


def test_a_plain_hdf5_file_is_no_score_file(tmp_path):
    run, out = fit(tmp_path / "run"), tmp_path / "mine.h5"
    with h5py.File(out, "w") as file:
        file["precious"] = np.arange(3)
    with untouched(tmp_path):
        with pytest.raises(
            StoreError, match="is no score file: it lacks scores, query_ids, train_ids"
        ):
            Scores.load(out)
        with pytest.raises(MismatchError, match=r"mine.h5 holds other scores"):
            run.score(examples(2, seed=9), out=out)
        with pytest.raises(MismatchError, match=r"mine.h5 belongs to another run"):
            run.self_influence(out=out)


def test_a_run_without_a_file_it_needs_says_which(tmp_path):
    run = fit(tmp_path)
    (tmp_path / "gradients.h5").unlink()
    with pytest.raises(StoreError, match=r"gradients.h5 does not exist"):
        run.score(examples(2, seed=9))
    (tmp_path / "factors.h5").unlink()
    with pytest.raises(StoreError, match=r"factors.h5 does not exist"):
        fit(tmp_path).score(examples(2, seed=9))


# ---- the disk ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before_the_pass(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run = fit(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 100, 100))
        message = r"gradients of all points need \d+\.\d+ GB and 0.00 GB are free on the disk of .*free some space, .*--store never"
        with pytest.raises(StoreError, match=message):
            fit(tmp_path / "full")
        assert not (tmp_path / "full" / "gradients.h5").exists()
        with (
            untouched(tmp_path / "run"),
            pytest.raises(StoreError, match=r"scores.h5.* GB are free on its disk"),
        ):
            run.score(examples(2, seed=9), out=tmp_path / "run" / "scores.h5")
    fit(tmp_path / "full")  # goes on once there is room


def test_the_disk_budget_decides_what_auto_stores(tmp_path):
    stored, streamed = (fit(tmp_path / str(b), store="auto", disk_budget=b) for b in (1e9, 10.0))
    assert (stored.gradients_stored, streamed.gradients_stored) == (True, False)
    assert not (tmp_path / "10.0" / "gradients.h5").exists()
    one, other = (run.score(examples(3, seed=9)).values for run in (stored, streamed))
    assert np.abs(one - other).max() < 1e-4 * np.abs(one).max()


# ---- the layout --------------------------------------------------------------------------------------------


def test_plain_h5py_reads_the_scores(tmp_path):
    run = fit(tmp_path / "run")
    queries = influence.examples_from_rows(
        [{"id": f"q {i} äé東", "text": "the red fox"} for i in range(3)]
    )
    out = tmp_path / "scores.h5"
    scores = run.score(queries, out=out, measurement="margin", solver="cg", damping="top:0.01")
    with h5py.File(out) as file:
        assert file["scores"].dtype == np.float32
        assert file["scores"].shape == (3, N)
        assert np.array_equal(file["scores"], scores.values)
        assert [id.decode() for id in file["query_ids"]] == queries.ids
        assert [id.decode() for id in file["train_ids"]] == examples(N).ids
        assert h5py.check_string_dtype(file["query_ids"].dtype).encoding == "utf-8"
        assert file["done"][()].all()
        assert file["residuals"].shape == file["converged"].shape == (3,)
        attributes = dict(file.attrs)
    assert attributes["convention"] == CONVENTION
    assert (attributes["measurement"], attributes["curvature"], attributes["solver"]) == (
        "margin",
        "ekfac",
        "cg",
    )
    assert attributes["damping"] == "top:0.01"
    assert attributes["unit"]
    assert attributes["lambda"].shape == (4,)
    assert attributes["residuals"] == scores.residuals.max()
    assert attributes["complete"]
    digests = {"run": run.digest, "base": model().base_digest, "adapter": model().adapter_digest}
    digests |= {"data": examples(N).digest}
    assert {name: attributes[f"{name}_digest"] for name in digests} == digests
    assert attributes["query_digest"] == queries.digest
    assert attributes["version"] == run.manifest.versions["lora-influence"]


def test_self_influence_and_scores_share_a_file_without_harm(tmp_path):
    run, queries, out = fit(tmp_path / "run"), examples(2, seed=9), tmp_path / "both.h5"
    scores = run.score(queries, out=out)
    own = run.self_influence(out=out)
    for _ in range(2):
        with h5py.File(out) as file:
            assert np.array_equal(file["scores"], scores.values)
            assert np.array_equal(file["self_influence"], own.values)
            assert file["self_influence"].shape == (N,)
            assert file["self_influence"].dtype == np.float32
            assert file["self_influence"].attrs["convention"] == SELF_CONVENTION
            assert file.attrs["convention"] == CONVENTION
        scores = run.score(examples(4, seed=8), out=out, overwrite=True)  # keeps the self-influence
    assert sorted(path.name for path in tmp_path.glob("*.h5*")) == ["both.h5"]


def test_self_influence_first_and_scores_after(tmp_path):
    run, out = fit(tmp_path / "run"), tmp_path / "both.h5"
    own = run.self_influence(out=out)
    with pytest.raises(StoreError, match="is no score file: it lacks scores, query_ids"):
        Scores.load(out)
    run.score(examples(2, seed=9), out=out)
    with h5py.File(out) as file:
        assert np.array_equal(file["self_influence"], own.values)
        assert file["scores"].shape == (2, N)


def test_the_manifest_tells_where_the_run_came_from(folders):
    manifest = json.loads((folders / "run" / "manifest.json").read_text())
    assert manifest["complete"]
    for name, path in (("base", "base"), ("adapter", "adapter"), ("data", "train.jsonl")):
        assert Path(manifest[name]["path"]) == folders / path
        assert len(manifest[name]["digest"]) == 64
    assert manifest["data"]["rows"] == N
    assert manifest["objective"]["N_tok"] == manifest["data"]["supervised_tokens"]
    assert manifest["curvature"]["name"] == "ekfac"
    assert manifest["damping"] == "mean:0.1"
    assert {"torch", "transformers", "peft", "lora-influence"} <= set(manifest["versions"])


def test_a_run_opens_from_another_working_directory(folders, monkeypatch, tmp_path_factory):
    """Paths given relative to where fit ran are found from elsewhere."""
    monkeypatch.chdir(folders)
    loaded = influence.load("base", "adapter", device="cpu")
    influence.fit(loaded, influence.read_examples("train.jsonl"), directory="relative")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert Run.open(folders / "relative", device="cpu").gradients_stored


# ---- the small tools ---------------------------------------------------------------------------------------


def test_row_files_are_valid_hdf5_at_every_moment(tmp_path):
    path = tmp_path / "rows.h5"
    write_file(
        path,
        attrs={"run_digest": "x"},
        rows={"rows": ((5, 3), np.float64), "done": ((5,), np.uint8)},
    )
    mapped, done = open_rows(path, "rows", write=True), open_rows(path, "done", write=True)
    assert mapped.shape == (5, 3)
    assert not mapped.any()
    mapped[2], done[2] = [1, 2, 3], 1
    with h5py.File(path) as file:  # while the maps are still open
        assert file["rows"][2].tolist() == [1, 2, 3]
        assert file["done"][()].tolist() == [0, 0, 1, 0, 0]
    with (
        pytest.raises(MismatchError, match=r"belongs to another run \(digest x, this run has y\)"),
        open_file(path, run_digest="y"),
    ):
        pass


def test_a_chunked_dataset_is_not_mapped(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("rows", data=np.zeros((4, 4)), chunks=(2, 2))
    with pytest.raises(
        StoreError, match="rows is not stored contiguously, so it was not written by this toolkit"
    ):
        open_rows(tmp_path / "x.h5", "rows")


def test_a_failed_write_leaves_no_partial_file_and_the_old_one(tmp_path, monkeypatch):
    write_file(tmp_path / "x.h5", {"a": np.arange(3)})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(tmp_path)
    with pytest.raises(StoreError, match=r"x.h5 could not be written: .*No space left on device"):
        write_file(tmp_path / "x.h5", {"a": np.arange(4)})
    assert contents(tmp_path) == before


def test_every_curvature_opens_again_with_the_same_scores(tmp_path):
    queries = examples(2, seed=9)
    for curvature in (EKFAC(), KFAC(), Fisher(), Fisher(samples=0), GGN(), Hessian(), Identity()):
        directory = tmp_path / repr(curvature)
        run = influence.fit(
            model(), examples(N), directory=directory, curvature=curvature, damping="mean:1"
        )
        solver = solver_of(curvature.name)
        again = Run.open(directory, model=model(), train=examples(N))
        assert np.array_equal(
            again.score(queries, solver=solver).values, run.score(queries, solver=solver).values
        )
