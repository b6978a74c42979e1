"""Which coordinates of a whitened gradient are kept, and in how many bits.

The whitened gradient `phi = W g` (`W^T W = (C + lambda I)^-1`) makes every product
`grad m^T (C + lambda I)^-1 g` a plain one, `(W grad m) . phi`. Of its coordinates are kept

* as they are: those whose squares are expected to be largest, over all leaves together;
* the others added up with random signs, leaf by leaf, in buckets of equally many (a count sketch:
  Charikar, Chen & Farach-Colton 2002). Every product stays right on average over the signs; its
  variance is `sum_l E_l^2 / K_l`, with E_l the expected squares of leaf l that are added up and K_l
  its buckets. So K_l goes with E_l, and as many coordinates are kept whole as makes the sum least.

Each number then has four bits where all coordinates fit so, else two, with a scale for each row and
leaf. Few bits cost less than few coordinates (QLESS: Ananda et al. 2025, arXiv 2502.01703;
benchmarks/README.md, "Rows in few bytes"); one bit would bend the products of two such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

#: Steps between the levels that are tried, by the bits of a number, over the root mean square of a
#: row's leaf: 0.335 and 0.996 are best for a normal distribution (Max 1960), others for other tails.
STEPS = {4: (0.335, 0.5, 0.75, 1.1), 2: (0.8, 0.996, 1.3)}
#: The largest level by the bits of a number, in steps. Four bits have a level 0: coordinates in which
#: no row has anything stay so, and their last digits, which hang on the order of sums, do not count.
LARGEST = {4: 7.0, 2: 1.5}


@dataclass(frozen=True, eq=False)
class KeptLeaf:
    """What is kept of one leaf's p' coordinates.

    `whole` [k] are the places of those kept as they are; `order` [m * buckets] the places of the
    others, bucket by bucket of every m-th (p' stands for none), and `signs` [m * buckets] theirs.
    """

    width: int
    whole: Tensor
    order: Tensor
    signs: Tensor
    buckets: int

    @property
    def size(self) -> int:
        """Numbers kept."""
        return len(self.whole) + self.buckets

    def of(self, values: Tensor) -> Tensor:
        """What is kept of `values` [K, p'], `[K, size]`."""
        if len(self.whole) == self.width:
            return values
        kept = values[:, self.whole]
        if not self.buckets:
            return kept
        padded = torch.nn.functional.pad(values, (0, 1))[:, self.order] * self.signs.to(values)
        sums = padded.unflatten(1, (-1, self.buckets)).sum(1)
        return torch.cat([kept, sums], 1)


@dataclass(frozen=True, eq=False)
class KeptCoordinates:
    """What is kept of every leaf.

    `is_whole` [all p'] marks the coordinates that are kept as they are, `buckets` [leaves] counts
    the sums of the others, and each number has so many `bits`; together with `seed` they are all
    there is to know.
    """

    widths: tuple[int, ...]
    is_whole: np.ndarray = field(repr=False)
    buckets: np.ndarray
    bits: int
    seed: int
    device: torch.device

    @classmethod
    def chosen(
        cls,
        expected: Sequence[Tensor],
        row_bytes: int,
        seed: int,
        device: torch.device,
    ) -> KeptCoordinates:
        """The choice for `expected` squares of each leaf, `[p']` each, and bytes of codes a row."""
        squares = [each.double().cpu().clamp(min=0) for each in expected]
        widths = tuple(len(each) for each in squares)
        every = torch.cat(squares)
        bits = 4 if 4 * len(every) <= 8 * row_bytes else 2
        if bits * len(every) <= 8 * row_bytes:
            none = np.zeros(len(widths), np.int64)
            return cls(widths, np.ones(len(every), bool), none, bits, seed, device)
        room = max(8 * row_bytes // bits - len(widths), 1)
        top = torch.topk(every, room)
        # left over after the first t are kept whole, for t = 0 ... room - 1
        left = (every.sum() - torch.cat([torch.zeros(1), top.values.cumsum(0)[:-1]])).clamp(min=0)
        noise = left.square() / torch.arange(room, 0, -1)
        count = int(noise.argmin())
        is_whole = np.zeros(len(every), bool)
        is_whole[top.indices[:count].numpy()] = True
        rest = torch.where(torch.from_numpy(is_whole), 0, every)
        sums = np.array([float(each.sum()) for each in rest.split(widths)])
        others = np.array(
            [int((~each).sum()) for each in np.split(is_whole, np.cumsum(widths)[:-1])]
        )
        shares = sums / sums.sum() if sums.sum() > 0 else others / others.sum()
        buckets = np.floor((room - count) * shares).astype(np.int64)
        buckets = np.minimum(np.maximum(buckets, 1), others)
        return cls(widths, is_whole, buckets, bits, seed, device)

    @property
    def size(self) -> int:
        """Numbers kept of a row, K."""
        return int(self.is_whole.sum() + self.buckets.sum())

    @cached_property
    def leaves(self) -> tuple[KeptLeaf, ...]:
        """What is kept leaf by leaf."""
        found, start = [], 0
        for number, width in enumerate(self.widths):
            mask = self.is_whole[start : start + width]
            start += width
            others, buckets = np.flatnonzero(~mask), int(self.buckets[number])
            hashes = _hashes(len(others), self.seed, number)
            rows = -(-len(others) // buckets) if buckets else 0
            order = np.full(rows * buckets, width, np.int64)
            order[: len(others)] = others[np.argsort(hashes, kind="stable")]
            # the bits that sorted the coordinates least tell their signs
            signs = np.where(hashes[: len(others)] & np.uint64(1), 1, -1).astype(np.int8)
            signs = np.pad(signs, (0, len(order) - len(signs)))
            arrays = (np.flatnonzero(mask), order, signs)
            whole, order, signs = (torch.from_numpy(each).to(self.device) for each in arrays)
            found.append(KeptLeaf(width, whole, order, signs, buckets))
        return tuple(found)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each leaf lies among a row's K numbers."""
        ends = np.cumsum([leaf.size for leaf in self.leaves]).tolist()
        return tuple(slice(a, b) for a, b in zip([0, *ends], ends, strict=False))

    # ---- few bits

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes, B."""
        return -(-self.size * self.bits // 8)

    def packed(self, values: Tensor, squares: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Codes uint8 `[b, B]` and scales float32 `[b, leaves]` of `values` [b, K].

        The decoded rows have the lengths whose `squares` [b] are given.
        """
        each = 8 // self.bits
        codes = torch.zeros(
            len(values), self.code_bytes * each, dtype=torch.uint8, device=values.device
        )
        scales = torch.zeros(
            len(values), len(self.slices), dtype=torch.float64, device=values.device
        )
        for number, columns in enumerate(self.slices):
            if columns.stop > columns.start:
                codes[:, columns], scales[:, number] = _quantised(values[:, columns], self.bits)
        length = values.square().sum(1, dtype=torch.float64)
        exact = (squares.to(length) / length.clamp(min=1e-300)).sqrt()
        scales *= torch.where(length > 0, exact, 0.0)[:, None]
        bytes_ = codes[:, 0::each].clone()
        for place in range(1, each):
            bytes_ |= codes[:, place::each] << (place * self.bits)
        return bytes_.cpu().numpy(), scales.float().cpu().numpy()

    def unpacked(self, codes: np.ndarray, scales: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The rows `[b, K]` of codes [b, B] and scales [b, leaves]."""
        bytes_, each = torch.from_numpy(codes).to(self.device), 8 // self.bits
        levels = torch.empty(*bytes_.shape, each, dtype=dtype, device=self.device)
        last = 2**self.bits - 1
        for place in range(each):
            levels[:, :, place] = (bytes_ >> (place * self.bits)) & last
        rows = levels.flatten(1)[:, : self.size].sub_(LARGEST[self.bits])
        sizes = torch.from_numpy(scales).to(self.device, dtype)
        for number, columns in enumerate(self.slices):
            rows[:, columns] *= sizes[:, number : number + 1]
        return rows


def _quantised(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels uint8 `[b, k]` and scales float64 `[b]` of one leaf's numbers `[b, k]`.

    Of the steps the one is taken whose levels are most parallel to the numbers; the scale keeps the
    length.
    """
    length = values.square().sum(1, dtype=torch.float64).sqrt()
    unit = (length / values.shape[1] ** 0.5).clamp(min=1e-300)
    best = torch.full_like(length, -torch.inf)
    chosen = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    scales = torch.zeros_like(length)
    largest = LARGEST[bits]
    for step in STEPS[bits]:
        levels = (values / (unit * step).to(values)[:, None]).add_(largest + 0.5).floor_()
        levels = levels.clamp_(0, 2 * largest)
        middles = levels - largest
        size = middles.square().sum(1, dtype=torch.float64).sqrt().clamp(min=1e-300)
        along = (middles * values).sum(1, dtype=torch.float64) / size
        better = along > best
        best = torch.where(better, along, best)
        scales = torch.where(better, length / size, scales)
        chosen = torch.where(better[:, None], levels.to(torch.uint8), chosen)
    return chosen, torch.where(length > 0, scales, 0.0)


def _hashes(count: int, seed: int, leaf: int) -> np.ndarray:
    """A hash of each of 0 ... count - 1, uint64: splitmix64 (Steele, Lea & Flood 2014), the same
    wherever it is computed.
    """
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        start = np.uint64(seed & 0xFFFFFFFF) << np.uint64(32) | np.uint64(leaf)
        found = (np.arange(1, count + 1, dtype=np.uint64) + start * golden) * golden
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
        return found ^ (found >> np.uint64(31))
