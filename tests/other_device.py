"""A device that is not the CPU, on a machine that has no other.

Its tensors are wrapped CPU tensors that say they lie on `PLACE`. Whatever mixes them with tensors of
the CPU, or reads them without fetching them, fails as it does on a GPU; what is allowed there is
allowed here (single numbers of the CPU, copies, indices that lie on the CPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

#: A device of torch of whose backward the CPU's own thread takes care, and that nothing else uses.
PLACE = torch.device("lazy:0")
#: Operations that take tensors of both devices: copies, and what is done by positions.
COPIES = {"copy_", "_to_copy", "_copy_from"}
INDEXED = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}


class Elsewhere(torch.Tensor):
    """A tensor on `PLACE`; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=PLACE,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.held.tolist()

    def numpy(self, *, force=False):
        raise TypeError(f"can't convert {PLACE} tensor to numpy: use Tensor.cpu() before")

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class OnPlace(TorchDispatchMode):
    """Sees also the operations that make tensors on `PLACE` out of nothing, or of the CPU's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """Lets `torch.tensor` make tensors on `PLACE`, which it does beside every operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == PLACE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(PLACE)
        return func(*args, **kwargs)


def called(func, args, kwargs):
    """An operation on tensors of either device, refused where a GPU refuses it."""
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    away = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    first_here = bool(tensors) and not isinstance(tensors[0], Elsewhere)
    if away and here and name not in COPIES and not (name in INDEXED and not first_here):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {PLACE} and cpu"
        )
    asked = kwargs.get("device")
    if asked is None and name in COPIES | INDEXED:
        goes = not first_here
    else:
        goes = bool(away) if asked is None else torch.device(asked).type == PLACE.type
    plain = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    arguments, options = tree_map(bare, (args, plain))
    results = func(*arguments, **options)
    if not goes:
        mine = {id(bare(t)): t for t in tensors}
        return tree_map(lambda t: mine.get(id(t), t), results)
    results = tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, results)
    return return_and_correct_aliasing(func, args, kwargs, results)


def bare(value):
    return value.held if isinstance(value, Elsewhere) else value


def move(module: nn.Module) -> None:
    """Put a module's parameters and buffers on `PLACE`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                away = Elsewhere(parameter.detach())
                part._parameters[name] = nn.Parameter(away, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)


@contextmanager
def elsewhere(module: nn.Module) -> Iterator[None]:
    """A module on `PLACE` within the block, in which tensors can be made there."""
    real = torch.autocast

    def autocast(device_type: str, **options):  # torch has none of this device's
        return real("cpu" if device_type == PLACE.type else device_type, **options)

    move(module)
    with mock.patch("torch.autocast", autocast), FromNumbers(), OnPlace():
        yield
