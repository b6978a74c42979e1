"""A whole adapted layer as one step of the graph, where it is the usual one.

PEFT computes `y = W x + b + s B (A x)` in six steps, of which four read and write something as wide
as y; on a CPU they take as long as the LoRA matrices themselves. Here the two products of the branch
are added where the base's already lie, in the forward and in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from influence.adapter import Site


class Recorder(Protocol):
    """What a tap tells of a leaf (`influence.gradients.Tape`)."""

    anchor: Tensor
    row: int | None

    def look(self, leaf: int, x: Tensor) -> None:
        """A leaf runs on an input."""
        ...

    def show(self, leaf: int, x: Tensor, g: Tensor, row: int | None = None) -> None:
        """The backward reached a leaf."""
        ...


class _SiteTap(torch.autograd.Function):
    """`y = x W^T + b + s (x A^T) B^T` of a whole site, with the taps of its A and B.

    The same products as PEFT's layer and two taps make, but what is as wide as x or y is read and
    written fewer times.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, site: Site, anchor: Tensor, tape: Recorder, leaf: int
    ) -> Tensor:
        base, A, B = site.layer.base_layer, site.A.weight, site.B.weight
        hidden = nn.functional.linear(x, A)
        tape.look(leaf + 1, hidden)
        out = nn.functional.linear(x, base.weight, base.bias)
        out.view(-1, out.shape[-1]).addmm_(hidden.flatten(0, -2), B.T, alpha=site.scaling)
        ctx.save_for_backward(x, hidden, base.weight, A, B)
        ctx.tape, ctx.leaf, ctx.row, ctx.scaling = tape, leaf, tape.row, site.scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, hidden, W, A, B = ctx.saved_tensors
        g = grads[0] if ctx.scaling == 1 else grads[0] * ctx.scaling
        ctx.tape.show(ctx.leaf + 1, hidden, g, ctx.row)
        narrow = g @ B
        ctx.tape.show(ctx.leaf, x, narrow, ctx.row)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        out = grads[0] @ W
        out.view(-1, out.shape[-1]).addmm_(narrow.flatten(0, -2), A)
        return out, None, None, None, None


def is_plain(site: Site) -> bool:
    """Whether a site computes `x W^T + b + s (x A^T) B^T` in one type by PEFT's own code and
    nothing else: no quantised weights, no other type to compute in, no hooks, nothing nested.
    """
    from peft.tuners.lora.layer import Linear

    layer, base = site.layer, getattr(site.layer, "base_layer", None)
    if site.parameter or type(layer) is not Linear or type(base) is not nn.Linear:
        return False
    weights = (base.weight, site.A.weight, site.B.weight)
    alike = len({(weight.dtype, weight.device) for weight in weights}) == 1
    own = any("forward" in vars(part) for part in (layer, base, site.A, site.B))
    usual = not (
        layer.merged or layer.disable_adapters or layer.lora_variant or layer.fan_in_fan_out
    )
    one = len(layer.active_adapters) == 1 and site.A.bias is None and site.B.bias is None
    return usual and one and alike and not own and not _hooked(site)


def _hooked(site: Site) -> bool:
    """Whether something watches the modules that are passed over."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        for part in (site.layer.base_layer, site.A, site.B)
    )


def _autocast(device: str) -> bool:
    """Whether torch changes types by itself there; it has devices on which it never does."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def site_forward(site: Site, recorder: Recorder, leaf: int) -> Callable[..., Tensor]:
    """The forward of a plain site, tapped; PEFT's own where the call is another than usual."""
    usual = site.layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = x.dtype != site.A.weight.dtype or _autocast(x.device.type)
        if args or kwargs or other or _hooked(site):
            return usual(x, *args, **kwargs)
        recorder.look(leaf, x)
        return _SiteTap.apply(x, site, recorder.anchor, recorder, leaf)  # type: ignore[no-any-return]

    return forward
