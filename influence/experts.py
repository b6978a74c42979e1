"""LoRA on experts, mostly fused ones: all experts' matrices in one parameter, one for each token.

transformers keeps the experts of a layer as parameters `[E, ...]`, and PEFT adapts such a parameter
(`target_parameters`) by `W_e + s B_e A_e`, with the experts' A_e below one another in one A `[E r,
d_in]` and the columns of their B_e interleaved in one B `[d_out, r E]`: column j E + e is column j
of B_e. PEFT forms all E sums before every forward, which leaves no input and output gradient of A
and B to read.

Here the same layer runs slot by slot: a *slot* is a token with one of the k experts that it is sent
to. On the slots both leaves are linear layers again,

    y = x W_e^T + s B (m_e * A x)

where `m_e` is 1 at the r coordinates of the slot's expert and 0 at all others. So whatever reads
(input, output gradient) pairs of a leaf reads them here, with k slots for every token, in the
tokens' order, and they belong to the token's example.

Experts that are modules of their own tell by their names that they are experts, or not at all; then
`tokens_in_order` finds out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from influence.adapter import AdaptedModel

#: The parameters of an experts module that a slot goes through, in order; one of the first two.
_FIRST, _SECOND = ("gate_up_proj", "up_proj"), "down_proj"
#: Tokens of a row that shows in which order a leaf sees them.
_PROBE = 16


def is_wrapper(layer: Any) -> bool:
    """Whether a layer is PEFT's, around a module with one bare parameter adapted."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def wrappers(layer: Any) -> tuple[Any, dict[str, Any]]:
    """The experts module in the middle of nested wrappers, and each wrapper by its parameter."""
    found = {}
    while is_wrapper(layer):
        found[layer.parameter_name] = layer
        layer = layer.base_layer
    return layer, found


def outermost(model: nn.Module) -> list[Any]:
    """The wrappers of a model that lie in no other wrapper."""
    found = [module for module in model.modules() if is_wrapper(module)]
    inner = {id(module.base_layer) for module in found}
    return [module for module in found if id(module) not in inner]


def stacks(module: Any) -> list[Tensor]:
    """The parameters of a module that hold a matrix for each expert."""
    return [p for p in module._parameters.values() if p is not None and p.dim() == 3]


def refusal(layer: Any) -> str | None:
    """Why a wrapped parameter is not supported. None where it is."""
    base, _ = wrappers(layer)
    name, kind = layer.parameter_name, type(base).__name__
    routed = hasattr(base, "_apply_gate") and hasattr(base, "is_transposed")
    if not routed or name not in (*_FIRST, _SECOND) or layer.get_param().dim() != 3:
        return (
            f"LoRA on the bare parameter {name} of {kind} is not supported; on the fused experts "
            "of transformers (gate_up_proj, up_proj, down_proj) it is"
        )
    if getattr(base, "_is_expert_parallel", False):
        return f"the experts of {kind} are spread over processes; load the whole model in each"
    return None


def take_plain_products(model: nn.Module) -> list[tuple[Any, Any]]:
    """Let experts run one matrix product after the other from now on.

    The grouped product that transformers prefers knows neither float64 nor second derivatives.
    Returns the configurations that say so, each with what it said before.
    """
    configs: dict[int, Any] = {
        id(module.config): module.config
        for module in model.modules()
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = "eager"
    return before


@contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """Within the block experts run one matrix product after the other."""
    before = take_plain_products(model)
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


@torch.no_grad()
def tokens_in_order(model: AdaptedModel, leaves: Collection[int]) -> dict[int, bool]:
    """Whether leaves that see tokens flat, `[b T, width]`, see them in the order of the batch.

    Shapes do not tell: with two experts of two, each sees every token, its first choices before its
    second ones. Here two rows of random tokens run together and each alone, and each input of the
    two rows must be nearer to that of its own token alone than to that of any other.
    """
    modules = [leaf for site in model.sites for leaf in (site.A, site.B)]
    seen: dict[int, list[Tensor]] = {}

    def watch(number: int) -> Any:
        return modules[number].register_forward_pre_hook(
            lambda _, inputs: seen.setdefault(number, []).append(inputs[0].flatten(0, -2))
        )

    generator = torch.Generator().manual_seed(0)
    known = min(model.model.get_input_embeddings().num_embeddings, len(model.tokenizer))
    order = torch.randperm(max(known, 2 * _PROBE), generator=generator) % known
    ids = order[: 2 * _PROBE].view(2, _PROBE).to(model.device)
    hooks = [watch(number) for number in leaves]
    try:
        for rows in (ids, ids[:1], ids[1:]):
            model.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {number: _same_order(seen.get(number, [])) for number in leaves}


def _same_order(inputs: list[Tensor]) -> bool:
    """Whether the first of three inputs is the other two, one after the other, but for rounding."""
    if [len(x) for x in inputs] != [2 * _PROBE, _PROBE, _PROBE]:
        return False
    both, alone = inputs[0].double(), torch.cat(inputs[1:]).double()
    apart = torch.cdist(both, alone, compute_mode="donot_use_mm_for_euclid_dist")
    return bool((apart.diagonal() <= apart.min(1).values).all())


def delta_weight(wrapper: Any, adapter: str, dtype: torch.dtype) -> Tensor:
    """`s B_e A_e` of all experts, in the shape of the adapted parameter, computed in `dtype`."""
    A, B = (matrices[adapter].weight.to(dtype) for matrices in (wrapper.lora_A, wrapper.lora_B))
    E = wrapper.get_param().shape[0]
    A, B = A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E))  # [E, r, d_in], [d_out, r, E]
    shape = "eio" if getattr(wrapper.get_base_layer(), "is_transposed", False) else "eoi"
    return torch.einsum(f"ore,eri->{shape}", B, A) * wrapper.scaling[adapter]


@dataclass(frozen=True, eq=False)
class Routing:
    """Which slots go to which expert.

    `chosen` [S] is each slot's expert; `order` [S] are the slots, expert after expert and in their
    order; `counts` [E] says how many each expert has.
    """

    chosen: Tensor
    order: Tensor
    counts: list[int]

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """Sort the slots: once for a layer, whose products then wait for nothing.

        The counts are fetched from the device; every product that did so would stop it.
        """
        order = chosen.argsort(stable=True)
        ends = torch.arange(experts, device=chosen.device)
        counts = torch.searchsorted(chosen[order].contiguous(), ends, right=True)
        return cls(chosen, order, counts.diff(prepend=counts.new_zeros(1)).tolist())


class SlotForward:
    """The forward of an adapted experts module, slot by slot.

    `batch.examples` is the number b of the examples that run: A and B see `[b, T k, width]`. They
    are called as modules, so that taps in them are seen. `dtype`: what to compute in (None: in the
    weights' type).
    """

    def __init__(self, outer: Any, batch: Any, dtype: torch.dtype | None) -> None:
        self.base, found = wrappers(outer)
        self.batch, self.dtype = batch, dtype
        self.branches = {
            name: (layer, next(a for a in layer.active_adapters if a in layer.lora_A))
            for name, layer in found.items()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs `[N, d]` for hidden states `[N, d]`, chosen experts and weights `[N, k]`."""
        hidden, experts, weights = (*args, *kwargs.values())
        base, k = self.base, experts.shape[-1]
        slots, chosen = hidden.repeat_interleave(k, 0), experts.reshape(-1)
        routing = Routing.of(chosen, len(stacks(base)[0]))
        first = next(name for name in _FIRST if name in base._parameters)
        inner = self._projection(first, slots, routing)
        inner = base._apply_gate(inner) if first == _FIRST[0] else base.act_fn(inner)
        out = self._projection(_SECOND, inner, routing)
        if getattr(base, "has_post_expert_norm", False):
            out = base.post_expert_norm(out)
        out = out * weights.reshape(-1, 1).to(out.dtype)
        return out.unflatten(0, (-1, k)).sum(1).to(hidden.dtype)

    def _projection(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        """Outputs `[S, d_out]` of the slots `x` [S, d_in], each with its expert's matrix."""
        chosen = routing.chosen
        weight, bias = self.base._parameters[name], self.base._parameters.get(f"{name}_bias")
        dtype = weight.dtype if self.dtype is None else self.dtype
        out = _Routed.apply(x.to(dtype), weight, routing, bool(self.base.is_transposed))
        if bias is not None:
            out = out + bias[chosen].to(dtype)
        if name not in self.branches:
            return out
        layer, adapter = self.branches[name]
        A, B, E = layer.lora_A[adapter], layer.lora_B[adapter], len(weight)
        by_example = (self.batch.examples, -1)
        low = A(x.to(A.weight.dtype).unflatten(0, by_example)).flatten(0, 1)
        mine = nn.functional.one_hot(chosen, E).to(low)  # [S, E]
        low = low.unflatten(1, (E, -1)) * mine[:, :, None]
        branch = B(low.transpose(1, 2).flatten(1).unflatten(0, by_example)).flatten(0, 1)
        return out + (branch * layer.scaling[adapter]).to(dtype)


class _Routed(torch.autograd.Function):
    """`x_s W_e^T` of every slot s with its expert e. The weights get no gradient, and no copy of
    them is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, routing: Routing, transposed: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.routing, ctx.transposed = routing, transposed
        width = weight.shape[2 if transposed else 1]
        return _by_expert(x, weight, routing, width, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        width = weight.shape[1 if ctx.transposed else 2]
        return (
            _by_expert(grads[0], weight, ctx.routing, width, not ctx.transposed),
            None,
            None,
            None,
        )


def _by_expert(x: Tensor, weight: Tensor, routing: Routing, width: int, plain: bool) -> Tensor:
    """`x_s W_e` (plain) or `x_s W_e^T` of every slot, `[S, width]`, expert after expert."""
    out = x.new_empty(len(x), width)
    for expert, places in enumerate(routing.order.split(routing.counts)):
        if len(places):
            matrix = weight[expert].to(x.dtype)
            out[places] = x[places] @ (matrix if plain else matrix.T)
    return out


def merged_weights(outer: Any, dtype: torch.dtype) -> tuple[Any, Mapping[str, Tensor]]:
    """The experts module in nested wrappers, and its adapted parameters with the active adapters
    added, in `dtype`.
    """
    base, found = wrappers(outer)
    weights = {}
    for name, layer in found.items():
        weight = base._parameters[name].to(dtype)
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + delta_weight(layer, adapter, dtype)
        weights[name] = weight
    return base, weights
