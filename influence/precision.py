"""Number types: what a model computes in, and computing in a wider type than its weights have.

Weights in 16 bits and products in 16 bits are two things. Held weights say how much memory a base
takes; products say how right its gradients are. Where an adapter has learnt its rows, the gradient
that is left is a small difference of large numbers, and products in bfloat16 lose it (measured in
`benchmarks/README.md`). A module that computes in a wider type casts its own weights up for the
time of its product, and again in the backward: no wide copy of them is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from influence.adapter import AdaptedModel
from influence.experts import is_wrapper, merged_weights, outermost, plain_products

#: Number types in which the gradients of a well-fitted adapter are not to be trusted unmeasured.
HALF = (torch.float16, torch.bfloat16)
#: Widest to narrowest.
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Weights of bitsandbytes, which are dequantised where a product is wide.
_QUANTISED = ("Params4bit", "Int8Params")
_TYPE = "_computes_in"
#: Where accelerate keeps a module's own forward, which its hook in `forward` calls.
_HOOKED = "_old_forward"


def type_name(dtype: torch.dtype) -> str:
    """A number type as it is typed: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def compute_type(model: AdaptedModel) -> torch.dtype:
    """The narrowest type that a product of the base is computed in."""
    types = [_module_type(module) for module in _own_weights(model.model)]
    return max((t for t in types if t is not None), key=_TYPES.index, default=model.dtype)


def compute_record(model: AdaptedModel) -> str:
    """`float32` where the base computes in that, wider than its weights are; else `own`."""
    wide = any(_TYPE in vars(module) for module in model.model.modules())
    return type_name(compute_type(model)) if wide else "own"


def compute_in(base: nn.Module, dtype: torch.dtype) -> None:
    """Let every module of a base with weights of its own compute in `dtype`, from now on.

    The weights stay what they are. A copy of the module computes so too.
    """
    for module in [*_own_weights(base), *outermost(base)]:
        _set_type(module, dtype)


@contextmanager
def computing_in(model: AdaptedModel, dtype: torch.dtype) -> Iterator[AdaptedModel]:
    """Compute in `dtype` within the block, the LoRA branches too, with the weights as they are.

    Quantised weights are dequantised, product by product, and inputs of 8-bit layers are not
    rounded. Afterwards everything is as it was, bit for bit.
    """
    modules = [*_own_weights(model.model), *outermost(model.model)]
    names = ("forward", _HOOKED, _TYPE)
    before = [{name: vars(module).get(name) for name in names} for module in modules]
    weights = [parameter.data for parameter in model.parameters]
    try:
        for module in modules:
            _set_type(module, dtype)
        for parameter in model.parameters:
            parameter.data = parameter.data.to(dtype)
        with plain_products(model.model) if dtype == torch.float64 else nullcontext():
            yield model
    finally:
        for parameter, weight in zip(model.parameters, weights, strict=True):
            parameter.data = weight
        for module, state in zip(modules, before, strict=True):
            for name, value in state.items():
                vars(module).pop(name, None)
                if value is not None:
                    vars(module)[name] = value


def computes_in(module: nn.Module) -> torch.dtype | None:
    """The type that a module was told to compute in. None: in that of its weights."""
    return vars(module).get(_TYPE)


def _own_weights(base: nn.Module) -> list[nn.Module]:
    """The modules with weights of their own that are no LoRA matrices."""
    return [
        module
        for name, module in base.named_modules()
        if ".lora_" not in name
        and any(
            p is not None and (p.is_floating_point() or type(p).__name__ in _QUANTISED)
            for p in module._parameters.values()
        )
    ]


def _module_type(module: nn.Module) -> torch.dtype | None:
    """What a module computes in. None where it has vectors only, as normalisations do."""
    if _TYPE in vars(module):
        return vars(module)[_TYPE]  # type: ignore[no-any-return]
    weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    if any(type(p).__name__ == "Int8Params" for p in weights):
        return torch.float16  # bitsandbytes casts the inputs of 8-bit layers to it
    if any(type(p).__name__ == "Params4bit" for p in weights):
        return getattr(module, "compute_dtype", None)
    types = [p.dtype for p in weights if p.dtype in _TYPES]
    return max(types, key=_TYPES.index, default=None)


def _set_type(module: nn.Module, dtype: torch.dtype) -> None:
    vars(module)[_TYPE] = dtype
    # a device map's hook brings inputs to the module's device, and must stay around it
    place = _HOOKED if {"_hf_hook", _HOOKED} <= vars(module).keys() else "forward"
    # a bound method, so that a copy of the module is bound to its own weights
    vars(module)[place] = MethodType(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward with its inputs and weights cast to the type it computes in."""
    dtype, adapted = vars(module)[_TYPE], {}
    if is_wrapper(module):  # PEFT would round the sum of W and s B A to the type of W
        module, adapted = merged_weights(module, dtype)
    held = module._parameters
    if type(module) is nn.Embedding:  # a lookup rounds nothing, and the table may be large
        return nn.Embedding.forward(module, *args, **kwargs).to(dtype)
    quantised = any(type(weight).__name__ in _QUANTISED for weight in held.values())
    kind: Any = nn.Linear if quantised else type(module)  # bitsandbytes' forward would round
    cast = {
        name: _cast_weight(module, weight, dtype)
        for name, weight in held.items()
        if name not in adapted
    }
    cast |= adapted
    # a sum of W and s B A cannot be had again from W alone
    again = {name: weight for name, weight in cast.items() if name not in adapted}
    with _cast_again_in_backward(module, held, again, dtype), _in_place(module, cast):
        return kind.forward(
            module,
            *(_cast(value, dtype) for value in args),
            **{name: _cast(value, dtype) for name, value in kwargs.items()},
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _cast_weight(module: Any, weight: Any, dtype: torch.dtype) -> Any:
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if type(weight).__name__ == "Int8Params":
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.to(dtype) * (scale.to(weight.device, dtype) / 127)[:, None]
    return _cast(weight, dtype)


@contextmanager
def _in_place(module: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Other tensors in the place of a module's parameters within the block."""
    held = module._parameters
    try:
        module._parameters = dict(weights)
        yield
    finally:
        module._parameters = held


def _cast_again_in_backward(
    module: nn.Module, held: Mapping[str, Any], cast: Mapping[str, Any], dtype: torch.dtype
) -> Any:
    """Keep for the backward which weight was cast, not the wide copy of it.

    Without this the graph of a forward would hold a wide copy of every weight of the base.
    """
    frozen = {
        weight.untyped_storage().data_ptr(): name
        for name, weight in cast.items()
        if weight is not None and weight is not held[name] and not weight.requires_grad
    }

    def pack(saved: Tensor) -> Any:
        name = frozen.get(saved.untyped_storage().data_ptr())
        place = (saved.size(), saved.stride(), saved.storage_offset())
        return saved if name is None else (held[name], place)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight, place = kept
        return _cast_weight(module, weight, dtype).as_strided(*place)  # type: ignore[no-any-return]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
