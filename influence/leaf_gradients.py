"""Per-example gradients leaf by leaf, as the backward reaches them.

All leaves of a row take P numbers; one leaf takes few. What can be made of a leaf alone is made
here while the backward goes on, so that a batch is limited by its tokens and not by P.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from influence.gradients import Tape, per_example_gradient

#: Takes a leaf's number and its gradients `[b, d_out, d_in]`, once a batch.
Taker = Callable[[int, Tensor], None]


class LeafGradients:
    """A sink that hands each leaf's per-example gradients over once they are whole.

    A leaf that runs several times in a forward is handed over after the last of them.
    """

    def __init__(self, recorder: Tape, take: Taker) -> None:
        # where rows run one by one, all uses of a leaf are shown together
        self.left = {} if recorder.apart else dict(recorder.uses)
        self.take, self._sums = take, dict[int, Tensor]()

    def __call__(self, leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        """Take one use of a leaf."""
        gradients = per_example_gradient(x, g)
        if leaf in self._sums:
            gradients = self._sums.pop(leaf).add_(gradients)
        self.left[leaf] = self.left.get(leaf, 1) - 1
        if self.left[leaf] > 0:
            self._sums[leaf] = gradients
        else:
            self.take(leaf, gradients)

    @property
    def waiting(self) -> list[int]:
        """Leaves of which a use is still to come."""
        return sorted(self._sums)

    def finish(self) -> None:
        """Hand over leaves of which the backward did not reach every use."""
        for leaf in self.waiting:
            self.take(leaf, self._sums.pop(leaf))
