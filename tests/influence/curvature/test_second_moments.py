"""Second moments against their definition, whole and sketched, and the tokens they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.curvature import EKFAC
from influence.curvature.second_moments import (
    BatchTokens,
    DenseMoment,
    SketchedMoment,
    eigenvectors,
)
from influence.fitted_point import PointFit, Storage
from influence.gradients import tape
from tests.conftest import build_model, examples, fit_end
from tests.influence.curvature.helpers import moments_of, random_rows
from tests.watching import HostReads

F64 = torch.float64


@pytest.mark.parametrize("width", [5, 40, 300, 900])
def test_second_moments_are_whole_below_the_diagonal(width):
    """Strips of all widths: 32, a quarter, and the widest, none of which divides 300 or 900."""
    moment = DenseMoment(width, F64, torch.device("cpu"))
    x = random_rows(0, 7, width)
    for part in x.split(4):
        moment.add(part)
    torch.testing.assert_close(moment.state.tril(), (x.T @ x).tril())


SPECTRA = {
    "outliers": torch.cat([10.0 ** torch.arange(7, 1, -1), torch.linspace(1, 0.2, 394)]),
    "many outliers": torch.cat([torch.linspace(3e4, 1e4, 60), torch.linspace(1, 0.2, 340)]),
    "power law": torch.arange(1, 401) ** -1.5,
    "flat": torch.linspace(1, 0.5, 400),
    "low rank": torch.cat([torch.linspace(1, 0.5, 40), torch.zeros(360)]),
    "nothing": torch.zeros(400),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_large_eigenvalues_do_not_drown_the_others_in_float32(name):
    """Eigenvalues are those of float64, and the eigenvectors make the matrix diagonal in units of
    its own directions: in float32 alone outliers leave neither.
    """
    spectrum = SPECTRA[name].double()
    turn = torch.linalg.qr(random_rows(5, 400, 400)).Q
    matrix = ((turn * spectrum) @ turn.T).float()
    exact = matrix.double().tril() + matrix.double().tril(-1).T
    values, vectors = eigenvectors(matrix.tril())  # what is above the diagonal does not count
    vectors, expected = vectors.double(), torch.linalg.eigvalsh(exact)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(400).double(), rtol=0, atol=1e-5)
    # what is told apart is what is not small beside the mean without the outliers
    floor = 1e-3 * spectrum[64:].mean() + 1e-7 * spectrum.max() * ("outliers" not in name)
    assert bool(((values.sort().values - expected).abs() <= 1e-4 * expected.abs() + floor).all())
    inside = vectors.T @ exact @ vectors
    sizes = (inside.diagonal().clamp(min=0) + floor).sqrt()
    off = inside - inside.diagonal().diag()
    assert float((off / (sizes[:, None] * sizes + 1e-300)).abs().max()) < 1e-2


def test_sketch_is_exact_up_to_its_rank_and_keeps_the_trace():
    x = random_rows(0, 200, 5) @ random_rows(1, 5, 40)
    full, sketch = (
        DenseMoment(40, F64, torch.device("cpu")),
        SketchedMoment(40, 8, 0, F64, torch.device("cpu")),
    )
    for part in x.split(60):
        full.add(part)
        sketch.add(part)
    vectors, values, rest = sketch.eigen()
    assert vectors.shape == (40, 8)
    q, e, _ = full.eigen()
    torch.testing.assert_close((q * e) @ q.T, x.T @ x, rtol=0, atol=1e-9 * float(e[-1]))
    torch.testing.assert_close(
        (vectors * values) @ vectors.T, x.T @ x, rtol=0, atol=1e-8 * float(e[-1])
    )
    assert rest < 1e-9
    noisy = SketchedMoment(40, 8, 0, F64, torch.device("cpu"))
    data = x + 0.1 * random_rows(2, 200, 40)
    noisy.add(data)
    vectors, values, rest = noisy.eigen()
    assert float(values.sum() + 32 * rest) == pytest.approx(float(data.square().sum()), rel=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(8, dtype=F64), rtol=0, atol=1e-8)


def test_a_sketch_never_takes_the_square_of_its_width():
    """Of which this width has none: 320 GB."""
    moment = SketchedMoment(200_000, 4, 0, F64, torch.device("cpu"))
    x = random_rows(0, 3, 200_000)
    moment.add(x)
    vectors, values, rest = moment.eigen()
    torch.testing.assert_close((vectors * values) @ (vectors.T @ x.T), x.T @ (x @ x.T))
    assert rest < 1e-9


@pytest.mark.parametrize("rank", [3, 8])
def test_a_sketch_is_the_nystrom_approximation(rank):
    """`Y (W^T Y)^+ Y^T` with `Y = X^T X W`, by a pseudo-inverse, where the spectrum has no end."""
    x = random_rows(3, 200, 40) * 0.8 ** torch.arange(40)
    sketch = SketchedMoment(40, rank, 0, F64, torch.device("cpu"))
    sketch.add(x)
    Y, test = (x.T @ x @ sketch.test).numpy(), sketch.test.numpy()
    expected = Y @ np.linalg.pinv(test.T @ Y) @ Y.T
    vectors, values, rest = sketch.eigen()
    np.testing.assert_allclose((vectors * values) @ vectors.T, expected, atol=1e-10 * Y.max())
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=F64))
    left = float(x.square().sum()) - np.trace(expected)
    assert rest == pytest.approx(left / (40 - rank), rel=1e-6)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 0.5], dtype=F64)], ids=str)
@pytest.mark.parametrize("lengths", [(4, 2, 3), (4, 4, 4)], ids=str)
def test_the_sums_are_those_of_the_valid_tokens_one_by_one(lengths, weights):
    """Inputs of padding are no part of any sum, whatever they are."""
    valid = torch.arange(4) < torch.tensor(lengths)[:, None]
    leaves = [("s.lora_A", (2, 6)), ("s.lora_B", (7, 2))]
    xs = [random_rows(1, 3, 4, 6), random_rows(2, 3, 4, 2)]
    gs = [random_rows(3, 3, 4, 2), random_rows(4, 3, 4, 7)]
    for x, g in zip(xs, gs, strict=True):
        x[~valid] = torch.nan
        g[~valid] = 0
    _, moments = moments_of(leaves, [], [])
    for leaf in (1, 0):
        moments.add(leaf, xs[leaf], gs[leaf], valid, weights, 0)
        moments.add(leaf, xs[leaf], gs[leaf], valid, weights, 1)  # another draw: no inputs
    expected = {"narrow/0": (gs[0], 2), "wide/0": (xs[0], 1), "narrow/1": (xs[1], 1)}
    for name, (values, times) in (expected | {"wide/1": (gs[1], 2)}).items():
        total = torch.zeros(values.shape[2], values.shape[2], dtype=F64)
        for row in range(3):
            for token in range(lengths[row]):
                weight = 1.0 if weights is None else float(weights[row])
                total += times * weight * torch.outer(values[row, token], values[row, token])
        torch.testing.assert_close(moments.sums()[name].tril(), total.tril())
    mass = sum(n * (1.0 if weights is None else float(weights[i])) for i, n in enumerate(lengths))
    torch.testing.assert_close(moments.sums()["mass"], torch.full((2,), mass, dtype=F64))


@pytest.mark.parametrize("leaf", [0, 1])
@pytest.mark.parametrize("failing", [1, 2])
def test_no_sum_changes_where_memory_is_too_small_for_one_of_them(monkeypatch, leaf, failing):
    """Of a leaf's two moments, output gradients and inputs, either may not fit: the batch is run
    again in parts, and must not be in one of the sums already.
    """
    leaves = [("s.lora_A", (2, 6)), ("s.lora_B", (7, 2))]
    x, g = random_rows(1, 3, 4, leaves[leaf][1][1]), random_rows(2, 3, 4, leaves[leaf][1][0])
    _, moments = moments_of(leaves, [], [])
    made, calls = DenseMoment.made, []

    def short(moment, values):
        calls.append(len(values))
        if len(calls) == failing:
            raise MemoryError
        return made(moment, values)

    monkeypatch.setattr(DenseMoment, "made", short)
    valid = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    with pytest.raises(MemoryError):
        moments.add(leaf, x, g, valid, None, 0)
    assert len(calls) == failing
    for name, total in moments.sums().items():
        assert not total.any(), name


def test_another_batch_of_the_same_shape_is_looked_at_again():
    valid = torch.tensor([[True, False]])
    weights = torch.ones(1, dtype=F64)
    tokens = BatchTokens.of(valid, weights)
    assert tokens.found_of(valid, weights)
    assert not tokens.found_of(valid.clone(), weights)
    assert not tokens.found_of(valid, weights.clone())


def reads_of_a_batch(directory, reduction: str, **model) -> int:
    """How often a batch of a fit waits for the device."""
    run = fit_end(
        build_model(**model), examples(8), directory=directory, store="never", reduction=reduction
    )
    fit = PointFit(run.points[0], EKFAC(), Storage(False, "never", 0), None)
    with tape(fit.model) as recorder:
        fit.run_batch(recorder, np.arange(4))
        with HostReads() as reads:
            fit.run_batch(recorder, np.arange(4, 8))
    return reads.count


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_a_batch_waits_for_the_device_no_oftener_with_more_leaves(reduction, tmp_path):
    """A number that is fetched from a GPU leaf by leaf stops it as often as there are leaves."""
    few = reads_of_a_batch(tmp_path / "few", reduction, layers=1, target_modules=["q_proj"])
    assert few > 0
    assert reads_of_a_batch(tmp_path / "many", reduction, layers=3) == few
    assert few <= 8


@pytest.mark.parametrize("rank", [None, 8])
def test_sums_come_back_from_their_eigenvectors(rank):
    """Half of the rows again, and other rows beside them: as if all had been summed up."""

    def empty():
        options = (F64, torch.device("cpu"))
        return DenseMoment(40, *options) if rank is None else SketchedMoment(40, rank, 0, *options)

    x = random_rows(3, 200, 40) * 0.8 ** torch.arange(40)
    first, grown, whole = empty(), empty(), empty()
    first.add(x[:150])
    grown.restore(*first.eigen(), 0.25)
    grown.add(x[150:])
    whole.add(x[:150] / 2)
    whole.add(x[150:])
    size = float(whole.state.abs().max())
    below = torch.tril if rank is None else torch.clone
    torch.testing.assert_close(below(grown.state), below(whole.state), rtol=0, atol=1e-13 * size)
