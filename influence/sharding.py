"""A base that is too large for one device, spread over several processes (`--shard`).

Each process holds a part of every decoder layer's weights (FSDP2, `fully_shard`): a layer is
gathered where it runs, forward or backward, and given back after it. The embeddings, the LM head,
the last normalisation and the LoRA matrices are whole in every process.

To gather a layer is everybody's work, and what the processes have to do is not equal: shares of
batches, rows, queries, and things that one of them does alone. So a process that needs a layer says
so, and so does one that waits for the others (`influence.distributed`) and needs none. Of the
layers that are asked for all gather the one that is furthest behind in its pass, and only who
needs it keeps it. Nothing runs for show, no loop has to count its rounds, and processes that
are at the same layer gather it once for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from influence import distributed
from influence.adapter import AdaptedModel
from influence.base_files import resolve_device
from influence.errors import AdapterError, InputError, ProcessError

#: Curvatures that are solved in closed form, for which no product runs through the base.
CLOSED = ("ekfac", "kfac", "identity")
#: What a process asks for that waits for the others and needs no layer.
_NOTHING = 1 << 62
#: Room for the places of one base's layers, forward and backward, among all that can be asked for.
_PLACES = 1 << 32


class Shards:
    """The decoder layers of one base, of which this process holds a part.

    `digest` is that of the whole base, `layers` are its L units in the order in which they run.
    """

    def __init__(self, number: int, layers: list[Any], digest: str) -> None:
        self.number, self.layers, self.digest = number, layers, digest

    def need(self, layer: int, *, backward: bool = False) -> None:
        """Gather a layer that this process is about to run; nothing where it is gathered."""
        if is_whole(self.layers[layer]):
            return
        place = 2 * len(self.layers) - 1 - layer if backward else layer
        wanted = self.number * _PLACES + place
        with distributed.ends_noticed():
            while (agreed := _agreed(wanted)) != wanted:
                _gather_for_others(agreed)
            self.layers[layer].unshard()

    def gather_for_others(self, place: int) -> None:
        """Take part in gathering a layer that other processes need."""
        count = len(self.layers)
        layer = self.layers[place if place < count else 2 * count - 1 - place]
        kept = is_whole(layer)
        layer.reshard()  # to gather is a step of all: this one needs it again
        layer.unshard()
        if not kept:
            layer.reshard()


#: The bases that were sharded, by their numbers, which are the same in all processes.
_BASES: list[weakref.ref[Shards]] = []
#: Where processes agree: a group of its own, of CPUs, so that no GPU is waited for.
_GROUP: Any = None


def _agreed(wanted: int) -> int:
    """What all do next, of what each wants: the layer furthest behind, or nothing any more."""
    asked = torch.tensor([wanted])
    dist.all_reduce(asked, dist.ReduceOp.MIN, group=_GROUP)
    return int(asked)


def _gather_for_others(agreed: int) -> None:
    number, place = divmod(agreed, _PLACES)
    shards = _BASES[number]()
    if shards is None:
        raise ProcessError(
            "another process runs a base that is sharded, and this one has let go of its part: "
            "keep the model until all processes are done with it"
        )
    shards.gather_for_others(place)


def _stand_by() -> None:
    """Gather what the others need until all wait."""
    while (agreed := _agreed(_NOTHING)) != _NOTHING:
        _gather_for_others(agreed)


def is_whole(layer: nn.Module) -> bool:
    """Whether a layer's weights are gathered in this process."""
    from torch.distributed.tensor import DTensor

    return not any(isinstance(weight, DTensor) for weight in layer.parameters())


# ---- what can be sharded -------------------------------------------------------------------------


def refuse_curvature(name: str | None) -> None:
    """Refuse a curvature whose products run through the base; None is the run's own.

    Errors: InputError.
    """
    if name is not None and name not in CLOSED:
        raise InputError(
            f"a base that is sharded and the curvature {name!r} were given: its products need "
            "second passes through layers whose weights have been given back; expected "
            f"{', '.join(CLOSED)}, or no --shard"
        )


def refuse_loading(device_map: str | None, bits: bool) -> None:
    """Refuse what no base can be sharded with: one process, a device map, quantised weights.

    Errors: InputError.
    """
    if distributed.world() == 1:
        raise InputError(
            "--shard spreads the base over processes, and there is one: start the command with "
            "torchrun --nproc-per-node N, N at least 2, or leave --shard out"
        )
    if device_map is not None:
        raise InputError(
            f"--shard and --device-map {device_map} were given: a map spreads the layers of one "
            "process over devices; leave one of them out"
        )
    if bits:
        raise InputError(
            "--shard and quantised weights were given, which come in blocks that cannot be cut; "
            "leave --load-in-4bit and --load-in-8bit out, or --shard"
        )


def decoder_layers(model: AdaptedModel) -> list[nn.Module]:
    """The L decoder layers of a base, which run one after the other.

    Errors: AdapterError where there are none that transformers marks so, for quantised weights and
    adapted experts.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    reason = ""
    body = model.model.get_base_model()
    layers: list[nn.Module] = [
        m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    layers = [layer for layer in layers if id(layer) not in inner]
    if getattr(body.config, "quantization_config", None) is not None:
        reason = "its weights are quantised, in blocks that cannot be cut"
    elif model.routed:
        reason = f"{model.routed[0].name} is an expert's, whose weights are merged for each product"
    elif not layers:
        reason = f"{type(body).__name__} has no decoder layers that transformers marks as such"
    if reason:
        raise AdapterError(f"this base cannot be sharded: {reason}. Leave --shard out")
    return layers


# ---- loading -------------------------------------------------------------------------------------


def compute_on(device: str, dtype: str, compute: str) -> str:
    """What a base that is read on the CPU is to compute in, so that it is what its device would
    have: `influence.load`'s `compute`.
    """
    asked = compute == "auto" and dtype not in ("auto", "float32", "float64")
    return "own" if asked and resolve_device(device).type != "cpu" else compute


def load_in_turn(load: Callable[[], AdaptedModel], device: str) -> AdaptedModel:
    """Have one process after the other read the whole base on the CPU and keep its part.

    Each layer's part goes to `device`; of the base no more than one layer is whole there at any
    time. All processes call this.
    """
    place = resolve_device(device)
    model: Any = None
    for process in range(dist.get_world_size()):
        if process == dist.get_rank():
            model = load()
            model = _sharded(model, decoder_layers(model), model.base_digest, place)
        distributed.wait()
    _begin(model.shards)
    return model


def _begin(shards: Shards) -> None:
    """From here on whoever waits helps the others to gather."""
    global _GROUP
    if _stand_by not in distributed.duties:
        _GROUP = dist.new_group(backend="gloo", timeout=distributed.PATIENCE)
        distributed.duties.append(_stand_by)
    shards.number = len(_BASES)
    _BASES.append(weakref.ref(shards))


def _sharded(
    model: AdaptedModel, layers: list[nn.Module], digest: str, place: torch.device
) -> AdaptedModel:
    """Cut the layers of a whole model, and bring the rest of it to its device."""
    from dataclasses import replace

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.type, (dist.get_world_size(),))
    shards = Shards(0, layers, digest)
    lora = {id(parameter) for parameter in model.parameters}
    for number, layer in enumerate(layers):
        # before FSDP's own, which then find the layer gathered: a forward hook in the order of
        # registration, a pre-hook in front
        layer.register_forward_hook(partial(_after_forward, shards, number))
        whole = {weight for weight in layer.parameters() if id(weight) in lora}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        layer.register_forward_pre_hook(partial(_before_forward, shards, number), prepend=True)
    cut = {id(weight) for layer in layers for weight in layer.parameters()} - lora
    for tensor in [*model.model.parameters(), *model.model.buffers()]:
        if id(tensor) not in cut:
            tensor.data = tensor.data.to(place)
    return replace(model, shards=shards)


def _before_forward(shards: Shards, number: int, *_: Any) -> None:
    shards.need(number)


def _after_forward(shards: Shards, number: int, _: nn.Module, __: Any, output: Any) -> None:
    """Have the layer gathered again where a gradient of its output comes back."""
    if torch.is_grad_enabled():
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_before_backward, shards, number))


def _before_backward(shards: Shards, number: int, _: Tensor) -> None:
    shards.need(number, backward=True)
