"""A base model with one LoRA adapter, seen as a point in a flat parameter space.

A *site* is one adapted layer, `y = W x + s B A x`. A *leaf* is one of its two trainable matrices;
the flat order is site after site in module order, A before B, each matrix row-major:

    theta = [A_1.ravel(), B_1.ravel(), A_2.ravel(), B_2.ravel(), ...]        shape [P]

Everything else in the toolkit speaks of flat vectors `[P]` (or stacks `[K, P]`) in this order.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from influence.errors import InputError
from influence.known_digests import BaseFiles, LoadedTensors
from influence.manifest import LoadingRecord

if TYPE_CHECKING:
    from influence.sharding import Shards
    from influence.trainer_output import Training

#: What PEFT puts before a layer's own path in parameter names and safetensors keys.
PREFIX = "base_model.model."
#: In the names of layers of one expert among several that are modules of their own.
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Leaf:
    """One trainable matrix: its name, shape, and place `[start:stop]` in the flat vector."""

    name: str
    shape: tuple[int, int]
    start: int
    stop: int

    @property
    def is_A(self) -> bool:
        """Whether this is the A of its site, `[r, d_in]`, and not the B, `[d_out, r]`."""
        return self.name.endswith(".lora_A")

    @property
    def slice(self) -> slice:
        """The leaf's coordinates in the flat vector."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ParamSpace:
    """The one flat order of the LoRA parameters, of which there are `size` (P)."""

    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[str, tuple[int, int]]]) -> ParamSpace:
        """Lay out `(name, shape)` pairs one after the other."""
        leaves, start = [], 0
        for name, shape in shapes:
            stop = start + shape[0] * shape[1]
            leaves.append(Leaf(name, (shape[0], shape[1]), start, stop))
            start = stop
        return cls(tuple(leaves))

    @property
    def size(self) -> int:
        """The number of LoRA parameters, P."""
        return self.leaves[-1].stop

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and shapes in order. Equal digests mean equal coordinates."""
        text = json.dumps([(leaf.name, leaf.shape) for leaf in self.leaves])
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views `[..., rows, cols]` of each leaf in a stack of flat vectors `[..., P]`."""
        sizes = [leaf.slice.stop - leaf.slice.start for leaf in self.leaves]
        return [
            part.unflatten(-1, leaf.shape)
            for part, leaf in zip(flat.split(sizes, -1), self.leaves, strict=True)
        ]

    def flatten(self, leaves: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`: matrices `[..., rows, cols]` to flat vectors `[..., P]`.

        They lie where the first matrix lies, also where a device map spread the others.
        """
        place = leaves[0].device
        return torch.cat([matrix.flatten(-2).to(place) for matrix in leaves], dim=-1)


@dataclass(frozen=True)
class Site:
    """One adapted layer: PEFT's layer, its `lora_A` and `lora_B` modules and its scaling s.

    `parameter`: the fused experts' parameter that is adapted (`influence.experts`), else empty.
    """

    name: str
    layer: Any
    A: nn.Linear
    B: nn.Linear
    scaling: float
    parameter: str = ""


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with exactly one active LoRA adapter, ready to be differentiated.

    Made by `load` (from folders or hub ids) or `from_peft` (from a live `PeftModel`). `base` and
    `adapter` are the references it was loaded from, and `loading` how, for the record only;
    identity is told by the digests. `training` is what is known of how the adapter was trained
    (`from_trainer`).
    """

    model: Any
    tokenizer: Any
    sites: tuple[Site, ...]
    space: ParamSpace
    base: str
    adapter: str
    loading: LoadingRecord = LoadingRecord()  # noqa: RUF009 (frozen)
    training: Training | None = field(default=None, compare=False, repr=False)
    #: leaves that see a batch's tokens flat, and whether in its order (`experts.tokens_in_order`)
    in_order: dict[int, bool] = field(default_factory=dict, compare=False, repr=False)
    #: where the base came from, and its tensors then
    files: BaseFiles | None = field(default=None, compare=False, repr=False)
    loaded: LoadedTensors | None = field(default=None, compare=False, repr=False)
    #: the base's layers, where this process holds a part of each (`influence.sharding`)
    shards: Shards | None = field(default=None, compare=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the base's first weight lies, and so where batches go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the LoRA parameters, float32 or float64.

        Gradients and curvature are held in it.
        """
        return self.sites[0].A.weight.dtype

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable matrices in flat order."""
        return [leaf.weight for site in self.sites for leaf in (site.A, site.B)]

    @property
    def routed(self) -> tuple[Site, ...]:
        """The sites of experts: each sees the tokens that are sent to it, of all examples."""
        return tuple(
            site for site in self.sites if site.parameter or _EXPERT.search(f".{site.name}.")
        )

    @property
    def pad_id(self) -> int:
        """A token id for padding.

        Its value never matters, because padded positions reach no loss. A padding token that was
        added to the tokenizer and that the base has no embedding for is not taken.
        """
        pad = getattr(self.tokenizer, "pad_token_id", None)
        known = self.model.get_input_embeddings().num_embeddings
        return int(pad) if pad is not None and 0 <= int(pad) < known else 0

    def snapshot(self) -> Tensor:
        """A copy of the LoRA parameters, `[P]`."""
        flat = self.space.flatten([parameter.detach() for parameter in self.parameters])
        return flat.to(self.device).clone()

    @torch.no_grad()
    def restore(self, theta: Tensor) -> None:
        """Set the LoRA parameters to `theta`, `[P]`."""
        if theta.shape != (self.space.size,):
            raise InputError(
                f"a parameter vector of shape {tuple(theta.shape)} was given, but this adapter "
                f"has {self.space.size} LoRA parameters: pass a flat vector [{self.space.size}] "
                "in ParamSpace order"
            )
        for parameter, value in zip(self.parameters, self.space.split(theta), strict=True):
            parameter.copy_(value)

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[AdaptedModel]:
        """Set the LoRA parameters to `theta` [P] within the block.

        Afterwards they are what they were, bit for bit.
        """
        before = self.snapshot()
        try:
            self.restore(theta)
            yield self
        finally:
            self.restore(before)

    @contextmanager
    def moved(self, delta: Tensor) -> Iterator[AdaptedModel]:
        """Move the adapter to `theta + delta` within the block.

        Afterwards it is back at theta, bit for bit.
        """
        with self.at(self.snapshot() + delta.to(self.device, self.dtype)):
            yield self

    @property
    def adapter_digest(self) -> str:
        """SHA-256 over the LoRA matrices and their scalings.

        It is of what the adapter does, not of where it lies.
        """
        header = json.dumps([self.space.digest, [site.scaling for site in self.sites]])
        names = (leaf.name for leaf in self.space.leaves)
        return _digest_tensors(header, dict(zip(names, self.parameters, strict=True)))

    @contextmanager
    def evaluating(self, trainable: Sequence[Tensor] = ()) -> Iterator[AdaptedModel]:
        """Switch dropout off within the block and let only `trainable` require gradients.

        Afterwards every module and flag is as it was.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        own = (each for module, _ in modes for each in module._parameters.values())
        flags = [(parameter, parameter.requires_grad) for parameter in own if parameter is not None]
        wanted = {id(parameter) for parameter in trainable}
        if any(mode for _, mode in modes):
            self.model.eval()
        for parameter, flag in flags:
            if flag != (id(parameter) in wanted):
                parameter.requires_grad_(id(parameter) in wanted)
        try:
            yield self
        finally:
            for module, mode in modes:
                if module.training != mode:
                    module.training = mode
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)

    @cached_property
    def base_digest(self) -> str:
        """SHA-256 over the base's weights and buffers in their loaded type.

        Remembered for files that have not changed since (`influence.known_digests`).
        """
        if self.shards is not None:  # found while the base was whole
            return self.shards.digest
        if self.files is None or self.loaded is None:
            return self.hashed_base()
        return self.files.digest(self.loaded.are(self.base_tensors()), self.hashed_base)

    def hashed_base(self) -> str:
        """`base_digest` of what is in memory now, whatever is remembered."""
        return _digest_tensors(type(self.model.get_base_model()).__name__, self._base_tensors())

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's parameters and buffers by name, without what a quantiser packs anew each time
        that it is asked.
        """
        own = {id(each) for each in (*self.model.parameters(), *self.model.buffers())}
        return {name: each for name, each in self._base_tensors().items() if id(each) in own}

    def _base_tensors(self) -> dict[str, Tensor]:
        adapted = {id(parameter) for parameter in self.parameters}
        return {
            name.removeprefix(PREFIX): tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor) and id(tensor) not in adapted and ".lora_" not in name
        }


def weight_key(leaf: Leaf) -> str:
    """The name of a leaf's weights in PEFT's safetensors file."""
    return f"{PREFIX}{leaf.name}.weight"


def accepts(model: Any, argument: str) -> bool:
    """Whether the base model's forward takes a keyword argument of this name."""
    return argument in inspect.signature(model.get_base_model().forward).parameters


def _digest_tensors(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header and every tensor's name, type, shape and bytes, in name order."""

    def digest_of(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        data = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        return digest.hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(digest_of, sorted(tensors.items())))
    return hashlib.sha256("\n".join([header, *digests]).encode()).hexdigest()


def module_names(space: ParamSpace) -> list[str]:
    """The adapted modules, A and B together."""
    return [A.name.removesuffix(".lora_A") for A in space.leaves[::2]]


def module_columns(leaves: Sequence[slice]) -> list[slice]:
    """Where each adapted module lies, by where its leaves lie: A and B of one after the other."""
    return [slice(A.start, B.stop) for A, B in zip(leaves[::2], leaves[1::2], strict=True)]
