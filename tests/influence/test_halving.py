"""A model that runs out of memory on large batches gives the answers of one that does not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from influence import halving
from influence.curvature import second_moments
from influence.errors import InputError, ShortOfMemory, memory_is_short
from influence.generation import continued
from influence.gradients import Tape, loss_sum_gradient, stream_gradients
from influence.halving import Steps, in_parts
from influence.loss import mean_losses
from tests.conftest import build_model, examples, teach, tokens_of
from tests.helpers import in_two_processes
from tests.influence.toy_runs import KINDS, N_ROWS, fit, solver_of

#: Tokens that fit; batches of the toy runs have up to 30.
MOST = 14
PLACES = ("forward", "backward", "sums")


@cache
def model():
    """A model in float64 that knows its rows a little, so that they share credit."""
    options = {"layers": 1, "target_modules": ["q_proj", "v_proj"], "dtype": torch.float64}
    return teach(build_model("llama", **options), examples(N_ROWS), steps=5)


@pytest.fixture
def scarce(monkeypatch):
    """Memory for few tokens: more than that ends in the forward, near the end of the backward, or
    where a sum is made.
    """
    hooks: list = []

    def begin(place: str) -> None:
        if place == "forward":

            def before(module, arguments, options):
                rows, length = options["input_ids"].shape
                if rows > 1 and rows * (length + 1) > MOST:
                    raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")

            base = model().model.get_base_model()
            hooks.append(base.register_forward_pre_hook(before, with_kwargs=True))
        if place == "backward":
            show = Tape.show

            def shown(tape, leaf, *rest):
                rows, length = tape.valid.shape
                if leaf == 0 and rows > 1 and rows * (length + 1) > MOST:  # the last of them
                    raise torch.OutOfMemoryError("CUDA out of memory")
                show(tape, leaf, *rest)

            monkeypatch.setattr(Tape, "show", shown)
        if place == "sums":
            made = second_moments.DenseMoment.made

            def make(moment, x):
                if len(x) > MOST:
                    raise MemoryError
                return made(moment, x)

            monkeypatch.setattr(second_moments.DenseMoment, "made", make)

    halving.forget(model())
    yield begin
    halving.forget(model())
    for hook in hooks:
        hook.remove()


def close(one, other) -> None:
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape
    np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10 * np.abs(other).max())


#: Fits and where they run out of memory, of the quick suite; all others are slow tests.
QUICK = [
    ("ekfac, two draws", "backward"),
    ("ekfac, nothing stored", "backward"),
    ("kfac, nothing stored", "sums"),
    ("fisher", "forward"),
    ("ggn, nothing stored", "backward"),
    ("ekfac, features", "backward"),
]
SLOW = [
    pytest.param(kind, place, marks=pytest.mark.slow)
    for kind in KINDS
    for place in PLACES
    if "two points" not in kind
    and (kind, place) not in QUICK
    and (place != "sums" or "kfac" in kind)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "place"), [*QUICK, *SLOW])
def test_a_fit_and_its_answers_do_not_depend_on_memory(tmp_path, scarce, capfd, kind, place):
    options = {"model": model(), "token_budget": 30}
    expected = fit(tmp_path / "plain", kind, **options)
    scarce(place)
    capfd.readouterr()
    found = fit(tmp_path / "scarce", kind, **options)
    told = capfd.readouterr().err
    if place == "forward" or KINDS[kind][0].draws or KINDS[kind][1] == "always":
        assert told.count("note: out of memory at a batch of") >= 1
        assert told.count("out of memory") <= 3  # later batches begin with what fits
    queries = examples(2, seed=9)
    solver = solver_of(kind)
    one, other = (run.score(queries, solver=solver).values for run in (found, expected))
    close(one, other)
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((2, model().space.size)))
    one, other = (run.operator().matvec(vectors).numpy() for run in (found, expected))
    close(one, other)


@pytest.mark.parametrize("place", PLACES[:2])
def test_what_is_asked_of_a_run_does_not_depend_on_memory(tmp_path, scarce, place):
    run = fit(tmp_path, "ekfac, nothing stored", model=model(), token_budget=30)
    queries, ids = examples(5, seed=9), run.train.ids[:4]

    def answers() -> list[np.ndarray]:
        run.kept.clear()
        per_token = run.score(queries, per_token=True, credit="additive").tokens
        effect = run.without(ids, queries)
        return [
            per_token.values,
            run.self_influence().values,
            np.array([row.predicted for row in (*effect.queries, *effect.removed)]),
            run.curvature("ggn").matvec(torch.ones(1, run.model.space.size).double()).numpy(),
        ]

    expected = answers()
    scarce(place)
    for one, other in zip(answers(), expected, strict=True):
        close(one, other)


@pytest.mark.slow
def test_of_two_processes_one_may_be_short_of_memory(tmp_path, scarce):
    """It halves its own batches; the other waits for it, and both have what one process has."""
    options = {"model": model(), "token_budget": 30}
    kind, queries = "ekfac, nothing stored", examples(2, seed=9)
    expected = fit(tmp_path / "alone", kind, **options).score(queries, credit="additive").values

    def work(rank: int) -> None:
        if rank == 1:
            scarce("backward")
        run = fit(tmp_path / "shared", kind, **options)
        found = run.score(queries, credit="additive").values
        assert (model().model in halving._MOST) == (rank == 1)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)

    in_two_processes(work, tmp_path)


@pytest.mark.parametrize("place", PLACES[:2])
def test_streams_sums_and_losses_come_in_order_and_once(scarce, place):
    tokens = tokens_of(model(), examples(9))
    weights = np.arange(1.0, 10.0)

    def found():
        parts = list(stream_gradients(model(), tokens, token_budget=40))
        order = np.concatenate([rows for rows, _, _ in parts])
        total, losses = loss_sum_gradient(model(), tokens, weights, token_budget=40)
        return [
            order,
            torch.cat([gradients for _, gradients, _ in parts]).numpy(),
            total.numpy(),
            losses,
            mean_losses(model(), tokens, token_budget=40),
        ]

    expected = found()
    scarce(place)
    for one, other in zip(found(), expected, strict=True):
        close(one, other)


def test_greedy_continuations_do_not_depend_on_memory(scarce):
    tokens = tokens_of(model(), examples(6))
    limits = np.full(6, 3)
    expected = continued(model(), tokens, limits, token_budget=60)
    scarce("forward")
    assert continued(model(), tokens, limits, token_budget=60) == expected


def test_a_row_that_does_not_fit_alone_is_named(monkeypatch):
    tokens = tokens_of(model(), examples(5))
    longest = int(tokens.lengths.argmax())

    def run(rows, _):
        if longest in rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(ShortOfMemory, match=f"single row: row {longest + 1} ") as caught:
        list(in_parts(model(), tokens, np.arange(5), run))
    halving.forget(model())
    message = str(caught.value)
    for part in (repr(tokens.ids[longest]), f"{tokens.lengths[longest]} tokens", "--max-length"):
        assert part in message


def test_other_errors_pass_and_nothing_is_tried_again():
    tried = []

    def run(rows, _):
        tried.append(len(rows))
        raise RuntimeError("a size does not match")

    with pytest.raises(RuntimeError, match="a size"):
        list(in_parts(model(), tokens_of(model(), examples(4)), np.arange(4), run))
    assert tried == [4]


def test_a_step_is_done_once_for_each_row():
    """A leaf that runs twice fails at its second time: its first must not be added again."""
    tokens, sums = tokens_of(model(), examples(4)), {"a": 0, "b": 0}

    def run(rows, steps: Steps):
        for step in ("a", "b", "b"):

            def add(step=step):
                if step == "b" and len(rows) > 1 and sums["b"] >= len(rows):
                    raise MemoryError
                sums[step] += len(rows)

            steps.once(step, add)

    list(in_parts(model(), tokens, np.arange(4), run))
    halving.forget(model())
    assert sums == {"a": 4, "b": 8}


def test_what_torch_says_of_memory_is_known():
    assert memory_is_short(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert memory_is_short(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not memory_is_short(RuntimeError("shapes cannot be multiplied"))
    assert not memory_is_short(InputError("out of memory"))
