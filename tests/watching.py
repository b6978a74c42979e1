"""What runs of torch hold and wait for, told from the operations that they call."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that fetch a number from a device, or the size of their result. On a GPU each waits
#: until everything before it is done.
READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select"}


class HostReads(TorchDispatchMode):
    """Counts the operations that wait for the device: `.count`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(place, torch.Tensor) and place.dtype == torch.bool
            for place in tree_leaves(args[1:])
        )
        self.count += name in READS or masks
        return func(*args, **(kwargs or {}))


class HeldBytes(TorchDispatchMode):
    """The most bytes at once in tensors of at least `least` numbers that are made within: `.most`.

    Copies that an operation makes inside itself are not seen.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(results)):
            storage = tensor.untyped_storage()
            new = storage._cdata not in before  # else a view, or written in place
            if new and storage.nbytes() >= self.least * tensor.element_size():
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {
            key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()
        }
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return results


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)
