"""Laws of what is kept: unbiased products, lengths, little error in bits, and the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from influence.kept_coordinates import KeptCoordinates
from tests.watching import HeldBytes

CPU = torch.device("cpu")
SIZES = (40, 7, 300)


def expected(decay: float = 0.97) -> list[torch.Tensor]:
    """Expected squares that fall off, leaf by leaf."""
    return [decay ** torch.arange(size, dtype=torch.float64) for size in SIZES]


def of_all(kept: KeptCoordinates, values: torch.Tensor) -> torch.Tensor:
    parts = values.split(SIZES, 1)
    return torch.cat([leaf.of(part) for leaf, part in zip(kept.leaves, parts, strict=True)], 1)


def test_everything_is_kept_where_it_fits():
    total = sum(SIZES)
    for row_bytes, bits in ((total // 2 + 1, 4), (total // 4 + 1, 2)):
        kept = KeptCoordinates.chosen(expected(), row_bytes, 0, CPU)
        assert (kept.bits, kept.size) == (bits, total)
        values = torch.randn(3, total, generator=torch.Generator().manual_seed(0))
        assert torch.equal(of_all(kept, values), values)


def test_products_are_right_on_average_over_the_signs():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 1, sum(SIZES), generator=generator, dtype=torch.float64)
    found = []
    for seed in range(400):
        kept = KeptCoordinates.chosen(expected(), 20, seed, CPU)
        assert kept.size <= 80
        found.append(float(of_all(kept, a) @ of_all(kept, b).T))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - float(a @ b.T)) < 3.5 * error


def test_each_coordinate_is_kept_once_with_one_sign():
    kept = KeptCoordinates.chosen(expected(), 20, 3, CPU)
    for leaf, size in zip(kept.leaves, SIZES, strict=True):
        image = leaf.of(torch.eye(size))  # [size, kept]: one entry of 1 or -1 for each coordinate
        assert torch.equal(image.abs().sum(1), torch.ones(size))
        per_bucket = image.abs().sum(0)[len(leaf.whole) :]
        assert per_bucket.numel() == 0 or per_bucket.max() - per_bucket.min() <= 1
    whole = np.split(kept.is_whole, np.cumsum(SIZES)[:-1])
    # the largest squares are the ones kept whole: no one left out is expected larger
    squares = [each.numpy() for each in expected()]
    least = min(s[w].min() for s, w in zip(squares, whole, strict=True) if w.any())
    most = max(s[~w].max() for s, w in zip(squares, whole, strict=True) if (~w).any())
    assert least >= most


def test_variance_is_less_than_of_buckets_alone_where_squares_fall_off():
    generator = torch.Generator().manual_seed(2)
    steep = expected(0.9)
    scale = torch.cat(steep).sqrt()
    a, b = (torch.randn(50, sum(SIZES), generator=generator).double() * scale for _ in range(2))
    exact = (a * b).sum(1)

    def error(squares) -> float:
        errors = []
        for seed in range(20):
            kept = KeptCoordinates.chosen(squares, 20, seed, CPU)
            errors.append(((of_all(kept, a) * of_all(kept, b)).sum(1) - exact).square().mean())
        return float(torch.stack(errors).mean().sqrt())

    assert error(steep) < 0.5 * error([torch.ones(size) for size in SIZES])


@pytest.mark.parametrize(("row_bytes", "mean"), [(200, 0.992), (90, 0.935)])
def test_codes_keep_lengths_exactly_and_directions_nearly(row_bytes, mean):
    """Of a normal number four bits hold 0.994 of the direction, two 0.940 (Max 1960)."""
    kept = KeptCoordinates.chosen(expected(), row_bytes, 0, CPU)
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(20, kept.size, generator=generator)
    values[3] = 0
    values[4, kept.slices[0]] = 0  # a leaf that no loss reached
    squares = values.double().square().sum(1) * 1.1
    codes, scales = kept.packed(values, squares)
    assert codes.shape == (20, kept.code_bytes)
    assert codes.dtype == np.uint8
    found = kept.unpacked(codes, scales, torch.float64)
    torch.testing.assert_close(found.square().sum(1), squares, rtol=1e-6, atol=0)
    assert not found[3].any()
    assert not found[4, kept.slices[0]].any()
    cosines = torch.nn.functional.cosine_similarity(found, values.double())
    kept_rows = cosines[[k for k in range(20) if k != 3]]
    assert kept_rows.mean() > mean
    assert kept_rows.min() > mean - 0.02


def test_the_choice_is_made_again_from_what_is_stored():
    first = KeptCoordinates.chosen(expected(), 20, 7, CPU)
    again = KeptCoordinates(first.widths, first.is_whole, first.buckets, first.bits, 7, CPU)
    values = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(0))
    assert torch.equal(of_all(first, values), of_all(again, values))
    # these were computed once: other numbers would misread files that lie on disks
    assert first.leaves[0].order[:5].tolist() == ORDER
    assert first.leaves[0].signs[:5].tolist() == SIGNS


ORDER, SIGNS = [32, 38, 39, 26, 28], [1, 1, 1, 1, -1]


def shapes_of_8b(r: int = 16) -> list[tuple[int, int]]:
    """The LoRA leaves of an 8B Llama on all linear layers: A `[r, d_in]` and B `[d_out, r]`."""
    sides = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096))
    sides += ((4096, 14_336), (4096, 14_336), (14_336, 4096))
    layer = [shape for d_in, d_out in sides for shape in ((r, d_in), (d_out, r))]
    return 32 * layer


@pytest.mark.slow
def test_an_8b_adapter_is_kept_in_few_bytes_without_anything_large():
    """448 leaves, 42 M parameters, the default bytes: rows of one batch pass leaf by leaf.

    What is held is counted beside what lies there for good: which coordinate goes where.
    """
    widths = [rows * columns for rows, columns in shapes_of_8b()]
    assert (len(widths), sum(widths)) == (448, 41_943_040)
    generator = torch.Generator().manual_seed(0)
    expected = [torch.rand(width, generator=generator) for width in widths]
    kept = KeptCoordinates.chosen(expected, 131_072, 0, CPU)
    assert kept.size <= 4 * 131_072
    assert len(kept.leaves) == 448
    batch = 8
    values = torch.zeros(batch, kept.size)
    squares = torch.zeros(batch, dtype=torch.float64)
    with HeldBytes(1 << 16) as held:
        for number, width in enumerate(widths):
            gradients = torch.randn(batch, width, generator=generator)
            squares += gradients.double().square().sum(1)
            values[:, kept.slices[number]] = kept.leaves[number].of(gradients)
        codes, scales = kept.packed(values, squares)
    # four copies of a leaf's gradients, or of the rows' numbers; all of P would be 1.3 GB
    largest = batch * max(*widths, kept.size) * 8
    assert held.most < 5 * largest < 0.2 * batch * sum(widths) * 4
    assert codes.nbytes + scales.nbytes <= batch * (131_072 + 448 * 4)
    found = kept.unpacked(codes, scales, torch.float32)
    np.testing.assert_allclose(found.square().sum(1), squares, rtol=1e-4)
