"""A base that several processes hold between them: the same answers, from parts of its weights."""

from __future__ import annotations

import gc
import json
import os
import signal
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import influence
import influence.fitted_point as fitting
from influence import EKFAC, GGN, KFAC, Identity, Run, distributed, sharding
from influence.credit import credited
from influence.errors import AdapterError, InputError, ProcessError, ShortOfMemory
from influence.gradients import stream_gradients
from influence.halving import halve
from influence.loss import mean_losses
from influence.measurements import MeanLoss
from influence.scores import raw_parts
from tests.conftest import build_model, examples, rows, teach, tokens_of
from tests.helpers import save, statuses, write_rows
from tests.influence.test_distributed_commands import call, fit_line, told
from tests.influence.toy_commands import wrong

N_ROWS = 13
KIND = {"layers": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
FIT = {"token_budget": 20, "path": (0.7,), "reduction": "example"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    at = tmp_path_factory.mktemp("shards")
    save(at, **KIND)
    taught = teach(loaded(at), examples(N_ROWS), steps=8)  # so that rows share credit
    taught.model.save_pretrained(at / "adapter")
    return at


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Processes meet often, and at checkpoints."""
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0.01)


def loaded(folder: Path, **options):
    return influence.load(
        folder / "base", folder / "adapter", dtype="float64", device="cpu", **options
    )


def fit(folder: Path, directory: Path, curvature=None, *, shard: bool = False, **options) -> Run:
    return influence.fit(
        loaded(folder, shard=shard),
        examples(N_ROWS),
        directory=directory,
        curvature=curvature or EKFAC(),
        **(FIT | options),
    )


def answers(run: Run) -> dict[str, np.ndarray]:
    """What the four commands give, as arrays."""
    queries = examples(3, seed=9)
    scores = run.score(queries, per_token=True)
    assert scores.tokens is not None
    found = {"scores": scores.values, "tokens": scores.tokens.values}
    found["additive"] = run.score(queries, credit="additive").values
    found["self"] = run.self_influence(credit="additive").values
    if not isinstance(run.specification, Identity):
        effect = run.without([run.train.ids[3], run.train.ids[4]], queries)
        losses = [each.predicted for each in (*effect.queries, *effect.removed)]
        found["without"] = np.array(losses)
        setting, credit = credited(run)
        assert credit is not None
        raw = raw_parts(setting, run.query_tokens(queries), MeanLoss())
        found |= {"raw": raw, "in float64": credit.singles(raw)}
    return found


CASES = {
    "stored": (EKFAC(), {"path": (0.5, 0.9)}),
    "passes": (EKFAC(samples=2), {"store": "none"}),
    "features": (KFAC(), {"store": "features", "row_bytes": 256}),
    "identity": (Identity(), {"path": (1.0,)}),
}


def answered(folder: Path, place: Path, rank: int, case: str, *, shard: bool) -> None:
    """Fit a case and keep all answers."""
    curvature, options = CASES[case]
    run = fit(folder, place / case, curvature, shard=shard, **options)
    np.savez(place / f"{case}-{rank}.npz", **answers(run))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The answers of one process by case, made when they are asked for."""
    place = tmp_path_factory.mktemp("one")

    def of(case: str) -> dict[str, np.ndarray]:
        if not (place / f"{case}-0.npz").exists():
            answered(folder, place, 0, case, shard=False)
        return dict(np.load(place / f"{case}-0.npz"))

    return of


def same(one: dict[str, np.ndarray], path: Path) -> None:
    """Equal to 1e-10, or to one bit where float32 is kept."""
    other = np.load(path)
    assert sorted(one) == sorted(other)
    for name, values in one.items():
        least = 1e-10 if values.dtype == np.float64 else 3e-7
        assert np.abs(values).max() > 0
        assert np.abs(values - other[name]).max() <= least * np.abs(values).max(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("passes", 2),
        *(pytest.param(case, 2, marks=pytest.mark.slow) for case in CASES if case != "passes"),
        *(pytest.param(case, 3, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_answers_are_those_of_a_whole_base(folder, tmp_path, whole, case, count):
    expected = whole(case)  # before the processes begin
    work = partial(answered, folder, tmp_path, case=case, shard=True)
    assert statuses(work, tmp_path, count) == [0] * count
    for rank in range(count):
        same(expected, tmp_path / f"{case}-{rank}.npz")
    # the run is the same: a whole base opens it, and its identity says nothing of shards
    run = Run.open(tmp_path / case, model=loaded(folder), train=examples(N_ROWS))
    scores = run.score(examples(3, seed=9), per_token=True).values  # of whole gradients, as above
    np.testing.assert_allclose(scores, expected["scores"], rtol=1e-4, atol=1e-7)


def held_bytes() -> int:
    """Bytes of all storages of tensors that this process holds."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # what is lazy is not asked
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_each_process_holds_its_part_of_the_layers(folder, tmp_path, monkeypatch, count):
    whole = loaded(folder)
    own = {id(parameter) for parameter in whole.parameters}
    layers = sharding.decoder_layers(whole)
    cut = [weight for layer in layers for weight in layer.parameters() if id(weight) not in own]
    parts = sum(-(-len(weight) // count) * weight[0].numel() * 8 for weight in cut)
    every = [*whole.model.parameters(), *whole.model.buffers()]
    among = {id(weight) for weight in cut}
    rest = sum(weight.nbytes for weight in every if id(weight) not in among)
    assert sum(weight.nbytes for weight in cut) > 3 * rest  # else nothing is shown

    def work(rank: int) -> None:
        most = []
        real = sharding.Shards.need

        def need(self, layer, **options):
            real(self, layer, **options)
            most.append(sum(map(sharding.is_whole, self.layers)))

        monkeypatch.setattr(sharding.Shards, "need", need)
        gc.collect()
        before = held_bytes()
        model = loaded(folder, shard=True)
        gc.collect()
        assert held_bytes() - before <= parts + rest + 64, (held_bytes() - before, parts, rest)
        tokens = tokens_of(model, examples(3 + rank))
        passed = [len(batch) for batch, _, _ in stream_gradients(model, tokens, token_budget=20)]
        assert sum(passed) == 3 + rank
        distributed.wait()
        gc.collect()
        # tokens aside, what a pass gathered is gone
        assert held_bytes() - before <= parts + rest + 4096
        assert 1 <= max(most) <= 2  # the lowest adapted layer stays until the backward ends

    assert statuses(work, tmp_path, count) == [0] * count


def test_processes_may_have_unequal_work(folder, tmp_path, monkeypatch):
    """More batches, work that one does alone, rows one by one, several backwards, layers that are
    recomputed: the others help to gather. Of equal work each layer is gathered once for both.
    """
    data = examples(6)
    whole = loaded(folder)
    tokens = tokens_of(whole, data)
    losses = mean_losses(whole, tokens)
    gradients = torch.zeros(6, whole.space.size, dtype=torch.float64)
    for places, part, _ in stream_gradients(whole, tokens):
        gradients[torch.from_numpy(places)] = part

    def near(model, batches, tape_is_apart: bool = False) -> None:
        if tape_is_apart:
            monkeypatch.setattr(influence.gradients.Tape, "look", lambda *_: None)
            real = influence.gradients.Tape.__init__

            def begin(self, model):
                real(self, model)
                self.apart = True

            monkeypatch.setattr(influence.gradients.Tape, "__init__", begin)
        for places, part, _ in stream_gradients(model, tokens, batches=map(np.array, batches)):
            torch.testing.assert_close(part, gradients[torch.from_numpy(places)])

    def work(rank: int) -> None:
        model = loaded(folder, shard=True)
        if rank == 0:  # the other waits
            near(model, [[0, 1], [2], [3, 4, 5]])
        distributed.wait()
        alone = distributed.at_first(lambda: mean_losses(model, tokens))
        np.testing.assert_allclose(alone, losses)
        with distributed.alone():
            if rank == 1:
                np.testing.assert_allclose(mean_losses(model, tokens, token_budget=1), losses)
                near(model, [[4]])
            else:
                near(model, [[1], [5, 2]])
        distributed.wait()
        gathered = []
        real = sharding._agreed
        monkeypatch.setattr(sharding, "_agreed", lambda wanted: gathered.append(1) or real(wanted))
        near(model, [[0, 1, 2]] if rank else [[3], [4]])
        distributed.wait()
        # one batch together, one of the first alone: layers up and down, and the end
        assert len(gathered) == 2 * 2 * 3 + 1
        near(model, [[0, 1, 2, 3][rank:], [5]], tape_is_apart=True)
        distributed.wait()
        recomputed = loaded(folder, shard=True, checkpointing=True)
        near(recomputed, [[0, 1, 2, 3][rank:], [5]][rank:])
        distributed.wait()

    assert statuses(work, tmp_path, 2) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_is_killed_and_the_run_goes_on(folder, tmp_path, monkeypatch, whole, after):
    """Whole in one process, or in parts in three."""
    expected = whole("passes")
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1)
    monkeypatch.setattr(distributed, "ROUND_SECONDS", 0)
    real, ran = fitting.PointFit.run_batch, []
    place, options = tmp_path / "passes", CASES["passes"][1]

    def killed(rank: int) -> None:
        def run_batch(self, *arguments):
            if rank == 1 and len(ran) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            ran.append(1)
            return real(self, *arguments)

        monkeypatch.setattr(fitting.PointFit, "run_batch", run_batch)
        with pytest.raises(ProcessError, match="with any number of processes"):
            fit(folder, place, CASES["passes"][0], shard=True, **options)

    assert statuses(killed, tmp_path, 2) == [0, -signal.SIGKILL]
    with h5py.File(place / fitting.CHECKPOINT) as file:
        assert np.asarray(file[fitting.DONE]).sum() == 6
    work = partial(answered, folder, tmp_path, case="passes", shard=after > 1)
    if after == 1:
        work(0)
    else:
        assert statuses(work, tmp_path, after) == [0] * after
    same(expected, tmp_path / "passes-0.npz")


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="torchrun --nproc-per-node N"):
        loaded(folder, shard=True)
    run = fit(folder, tmp_path / "ggn", GGN(), path=(1.0,))
    with pytest.raises(InputError, match="curvature 'ggn' were given: its products"):
        Run.open(run.directory, train=examples(N_ROWS), shard=True)

    def work(_: int) -> None:
        for options, words in {
            ("device_map", "auto"): "--device-map auto were given",
            ("load_in_4bit", True): "quantised weights were given",
        }.items():
            with pytest.raises(InputError, match=words):
                influence.load(folder / "base", folder / "adapter", shard=True, **dict([options]))
        model = loaded(folder, shard=True)
        with pytest.raises(InputError, match="'ggn' were given: its products"):
            influence.fit(model, examples(N_ROWS), directory=tmp_path / "new", curvature=GGN())
        run = influence.fit(
            model, examples(N_ROWS), directory=tmp_path / "shared", curvature=EKFAC(), **FIT
        )
        for ask in (run.self_influence, lambda **options: run.score(examples(2), **options)):
            with pytest.raises(InputError, match="'hessian' were given: its products"):
                ask(curvature="hessian")
        with pytest.raises(ShortOfMemory, match="lower --token-budget"):
            halve(model, run.tokens, np.array([0, 1]))

    assert statuses(work, tmp_path, 2) == [0, 0]
    assert not (tmp_path / "new").exists()


def test_bases_that_cannot_be_cut():
    model = build_model("llama", layers=2)
    assert len(sharding.decoder_layers(model)) == 2
    assert len(sharding.decoder_layers(build_model("gpt2", layers=3))) == 3
    body = model.model.get_base_model()
    body.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(AdapterError, match="quantised, in blocks that cannot be cut"):
        sharding.decoder_layers(model)
    del body.config.quantization_config
    body.model.layers = torch.nn.ModuleList()
    with pytest.raises(AdapterError, match="no decoder layers"):
        sharding.decoder_layers(model)


def test_what_a_base_computes_in_is_that_of_its_device():
    asked = [("auto", "auto"), ("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "own")]
    assert [sharding.compute_on("cpu", *each) for each in asked] == ["auto", "auto", "auto", "own"]
    real = sharding.resolve_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "resolve_device", lambda _: torch.device("cuda"))
        found = [sharding.compute_on("cuda", *each) for each in asked]
    assert real is sharding.resolve_device
    assert found == ["auto", "own", "auto", "own"]


@pytest.mark.slow
def test_commands_in_two_processes_that_share_the_base(folder, tmp_path):
    """A fit, scores and removed rows under torchrun, with a bound on memory."""
    data = rows(N_ROWS)
    write_rows(folder / "train.jsonl", data)
    write_rows(folder / "queries.jsonl", rows(3, seed=9))
    run = fit(folder, tmp_path / "one", reduction="token")
    queries = examples(3, seed=9)
    effect = run.without([data[3]["id"]], queries)
    options = ["--json", "--shard", "--memory", "4"]
    result = call(2, *fit_line(folder, "two"), "--dtype", "float64", "--path", "0.7", *options)
    assert result.returncode == 0, result.stderr
    asked = ["--run-dir", folder / "two", "--device", "cpu", *options]
    asked += ["--queries", folder / "queries.jsonl"]
    result = call(2, "score", *asked)
    assert result.returncode == 0, result.stderr
    with h5py.File(folder / "two" / "scores.h5") as file:
        scores = np.asarray(file["scores"])
    np.testing.assert_allclose(scores, run.score(queries).values, rtol=1e-5, atol=1e-8)
    result = call(2, "without", "--ids", data[3]["id"], *asked)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for name in ("queries", "removed"):
        expected = [each.predicted for each in getattr(effect, name)]
        np.testing.assert_allclose([each["predicted"] for each in found[name]], expected, 1e-10)
    result = call(2, *fit_line(folder, "new"), "--shard", "--curvature", "ggn")
    assert [line[:40] for line in told(result.stderr)] == [
        "error: a base that is sharded and the cu"
    ]
    assert not (folder / "new").exists()


def test_commands_that_refuse_it(command, at):
    """One process, and commands that have passes of single processes."""
    for line, words in {
        ("fit", "--adapter", at / "adapter", "--train", at / "train.jsonl", "--run", at / "new"): (
            "start the command with torchrun"
        ),
        ("score", "--run", at / "run", "--queries", at / "queries.jsonl"): (
            "start the command with torchrun"
        ),
        ("check", "--adapter", at / "adapter", "--train", at / "train.jsonl"): (
            "only influence fit, score, self and without"
        ),
    }.items():
        wrong(command, at, [*line, "--shard"], words)
