"""Adam's second moments and the learning rates in a Hugging Face Trainer checkpoint.

A checkpoint of `influence.TrainingRecord` has them as safetensors, by the leaves' names. Else a
checkpoint folder holds `optimizer.pt` (the optimiser's state, keyed by integers),
`adapter_model.safetensors` (the adapter at that step, by name) and `trainer_state.json` (the log).
The integers count the trainable parameters in the optimiser's order: the Trainer makes one group
with weight decay and one without, each in `named_parameters()` order. The order is taken from
`param_names` where the optimiser recorded them, else rebuilt in that way, and every shape is
checked. `optimizer.pt` is a pickle, and is read by torch's restricted reader alone
(`weights_only=True`), which knows tensors and plain containers and calls nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.errors import AdapterError, InputError, NumericalError, refuse
from influence.progress import say

#: Parameters whose name matches go into the Trainer's group without weight decay
#: (`Trainer.get_decay_parameter_names`).
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
#: A LoRA matrix's name in a model or a file: PEFT's prefix, the leaf's name, the adapter's name,
#: `weight`.
_LEAF_NAME = re.compile(r"(?:.*\bbase_model\.model\.)?(?P<leaf>.+\.lora_[AB])(?:\.[^.]+)?\.weight")
_BNB_STATE = "__bnb_optimizer_quant_state__"
#: Second moments that `influence.TrainingRecord` keeps: leaf name to v [rows, cols],
#: bias-corrected.
MOMENTS = "second_moments.safetensors"
#: Block sizes of bitsandbytes' 8-bit states, today's and the one before.
_BLOCKS = (256, 2048)
#: More steps than any training has.
MAX_STEPS = 10**8


@dataclass(frozen=True)
class OptimizerState:
    """What Adam knew at a checkpoint.

    `v` [P] are the bias-corrected second moments in ParamSpace order, `v_t / (1 - beta2^t)`, of the
    gradients of the trainer's objective (of whatever its gradient clipping left of them); `steps`
    is t, the optimiser steps so far; `sum_lr` the sum of the learning rate over them, None where
    the log has none.
    """

    v: Tensor
    steps: int
    sum_lr: float | None


def second_moments(checkpoint_dir: str | Path, model: AdaptedModel) -> OptimizerState:
    """Read Adam's second moments of every LoRA parameter from a Trainer checkpoint folder.

    AdamW of torch and AdamW of bitsandbytes are understood, its 8-bit and paged states too
    (dequantised block by block).

    `sum_lr` interpolates the logged learning rates linearly over the steps, the first and last
    logged ones held before and after: exact with a log at every step; a warm-up within the first
    logging interval is not seen. (Trainers versions of transformers log the rate of the step that
    follows.)

    Raises
    ------
    AdapterError
        If the folder is no such checkpoint, belongs to another adapter, or its optimiser is no
        Adam; says which.
    """
    folder = Path(checkpoint_dir)
    shapes = _adapter_shapes(folder)
    leaves = {leaf.name: leaf.shape for leaf in model.space.leaves}
    differing = [
        name for name in leaves.keys() | shapes.keys() if leaves.get(name) != shapes.get(name)
    ]
    refuse(
        f"checkpoint {str(folder)!r} is of another adapter than the model's; pass a checkpoint of "
        "the run that made it",
        [
            f"{name}: {_shape(shapes, name)} there, {_shape(leaves, name)} in the model"
            for name in sorted(differing)
        ],
    )
    if (folder / MOMENTS).is_file():
        return _kept_moments(folder, model)
    groups, states = _read_optimizer(folder / "optimizer.pt")
    order = _leaf_order(folder, model, groups)

    parts: dict[str, Tensor] = {}
    reasons, steps = [], 0
    for name, (number, beta2) in order.items():
        state = states.get(number)
        if state is None:
            reasons.append(
                f"{name}: the optimiser has no state for it (no gradient ever reached it)"
            )
            continue
        moment = _second_moment(state)
        if isinstance(moment, str):
            reasons.append(f"{name}: {moment}")
        elif tuple(moment.shape) != leaves[name]:
            reasons.append(
                f"{name}: shape {list(moment.shape)} there, {list(leaves[name])} in the model"
            )
        else:
            step = _whole(state.get("step", 0))
            if step is None or step < 1:
                reasons.append(
                    f"{name}: its step is {state.get('step')!r}; a state without a step cannot be "
                    "bias-corrected"
                )
                continue
            steps = max(steps, step)
            parts[name] = moment / (1 - beta2**step)
    refuse(f"the optimiser state in {str(folder)!r} cannot be used", reasons)
    v = model.space.flatten([parts[leaf.name] for leaf in model.space.leaves])
    return OptimizerState(
        _checked_moments(v, folder), steps, _sum_lr(folder / "trainer_state.json")
    )


def live_second_moments(optimizer: Any, model: Any) -> dict[str, tuple[Tensor, int]]:
    """Bias-corrected second moments and steps of a live optimiser, by the LoRA matrix's name.

    Empty where it is no Adam, or lacks the state of a matrix.
    """
    states = getattr(optimizer, "state", {})
    found: dict[str, tuple[Tensor, int]] = {}
    betas = {
        id(parameter): group.get("betas", ())
        for group in getattr(optimizer, "param_groups", ())
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "lora_" not in name:
            continue
        state = states.get(parameter, {})
        moment, step = _second_moment(state), _whole(state.get("step", 0))
        if isinstance(moment, str) or not step or len(betas.get(id(parameter), ())) < 2:
            return {}
        correction = 1 - float(betas[id(parameter)][1]) ** step
        found[_leaf_name(name)] = (moment.detach().cpu() / correction, step)
    return found


def write_second_moments(path: Path, moments: Mapping[str, tuple[Tensor, int]]) -> None:
    """Write what `live_second_moments` returns, as `second_moments` reads it."""
    from safetensors.torch import save_file

    tensors = {name: moment.contiguous() for name, (moment, _) in moments.items()}
    steps = max(step for _, step in moments.values())
    save_file(tensors, path, metadata={"format": "pt", "steps": str(steps)})
    path.chmod(0o644)


def _kept_moments(folder: Path, model: AdaptedModel) -> OptimizerState:
    """The state that `influence.TrainingRecord` kept beside its adapter."""
    from safetensors import SafetensorError, safe_open

    path = folder / MOMENTS
    try:
        with safe_open(path, framework="pt") as file:
            steps = _whole((file.metadata() or {}).get("steps"))
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}): copy it again"
        ) from error
    wanted = {leaf.name: leaf.shape for leaf in model.space.leaves}
    if steps is None or wanted != {name: tuple(part.shape) for name, part in parts.items()}:
        raise AdapterError(
            f"{path} holds no second moments of exactly this adapter's matrices: pass a checkpoint "
            "of the run that made it"
        )
    v = model.space.flatten([parts[leaf.name].to(model.dtype) for leaf in model.space.leaves])
    return OptimizerState(
        _checked_moments(v, folder), steps, _sum_lr(folder / "trainer_state.json")
    )


def _checked_moments(v: Tensor, folder: Path) -> Tensor:
    """The second moments, which are finite and not negative, else `NumericalError`."""
    if not bool((torch.isfinite(v) & (v >= 0)).all()):
        raise NumericalError(
            f"the second moments in {str(folder)!r} hold NaN, infinity or negative values"
        )
    return v


def _whole(value: Any) -> int | None:
    """A step as a whole number, or None where it is none."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """A parameter's shape for a message, or `missing`."""
    return str(list(shapes[name])) if name in shapes else "missing"


# ---- reading -------------------------------------------------------------------------------------


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Leaf names and shapes of the checkpoint's adapter."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise AdapterError(
            f"{str(folder)!r} is not a folder: pass a Trainer's checkpoint, as in "
            "out/checkpoint-500"
        )
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise AdapterError(
            f"{str(folder)!r} has no adapter_model.safetensors: pass a checkpoint that a Trainer "
            "saved of a PEFT model"
        )
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}): copy the checkpoint again"
        ) from error
    # beside its matrices an adapter's file may hold weights of the base, which are not trained
    return {_leaf_name(key): shape for key, shape in shapes.items() if ".lora_" in key}


def _leaf_name(parameter: str) -> str:
    """The leaf's name in a parameter's name.

    `base_model.model.X.lora_A.default.weight` gives `X.lora_A`; other names stay as they are.
    """
    match = _LEAF_NAME.fullmatch(parameter)
    return match["leaf"] if match else parameter


def _read_optimizer(path: Path) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """The groups that hold parameters, and the state of each parameter."""
    if not path.exists():
        raise AdapterError(
            f"{str(path.parent)!r} has no optimizer.pt: a Trainer writes one unless "
            "save_only_model is set; states that DeepSpeed or FSDP split over several files are "
            "not supported"
        )
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{path} is damaged or holds more than tensors and plain values; nothing in it was "
            f"run: {reason}"
        ) from error
    try:
        groups = [dict(group) for group in content["param_groups"] if len(group["params"])]
        states = {
            number: {**state, **state.get(_BNB_STATE, {})}
            for number, state in content["state"].items()
        }
        betas = [tuple(map(float, group.get("betas", ()))) for group in groups]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AdapterError(
            f"{path} is not a torch optimiser's state_dict (`state` and `param_groups`): pass a "
            "Trainer's checkpoint"
        ) from error
    if not groups:
        raise AdapterError(
            f"{path} holds no parameters: pass a checkpoint of the run that trained the adapter"
        )
    for group, pair in zip(groups, betas, strict=True):
        if len(pair) < 2 or not all(0 <= beta < 1 for beta in pair[:2]):
            raise AdapterError(
                f"{path} is not of Adam or AdamW, which alone keep a second moment per parameter "
                f"and have two betas; found an optimiser with {_keys(group)}"
            )
    return groups, states


def _leaf_order(
    folder: Path, model: AdaptedModel, groups: list[dict[str, Any]]
) -> dict[str, tuple[Any, float]]:
    """For every leaf, the optimiser's number of it and its beta2."""
    numbers = [(number, float(group["betas"][1])) for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        names = [_leaf_name(str(name)) for group in groups for name in group["param_names"]]
    else:
        leaf_of = {
            id(p): leaf.name for p, leaf in zip(model.parameters, model.space.leaves, strict=True)
        }
        parameters = model.model.named_parameters()
        full = [(name, leaf_of[id(p)]) for name, p in parameters if id(p) in leaf_of]
        # stable: within each of the Trainer's two groups the order stays; an optimiser with one
        # group has this order too unless a layer's own name looks like a norm's
        exempt = [bool(_NO_DECAY.search(name.lower())) for name, _ in full]
        sizes = [len(group["params"]) for group in groups]
        rates = {group.get("initial_lr", group.get("lr")) for group in groups}
        lora_plus = _lora_plus(sizes, full)
        if lora_plus is not None and len(rates) > 1:
            say(
                f"note: {folder} trained A and B at different learning rates (LoRA+); damping time "
                "takes the rate of A, as the log has it"
            )
            full = lora_plus
        elif sizes == [exempt.count(False), exempt.count(True)]:
            full = [
                item
                for flag in (False, True)
                for item, e in zip(full, exempt, strict=True)
                if e == flag
            ]
        elif len(groups) > 1:
            raise AdapterError(
                f"the optimiser in {str(folder)!r} has {len(groups)} parameter groups of {sizes} "
                "parameters without names; expected one group, the Trainer's two, or those of "
                "PEFT's create_loraplus_optimizer: which parameter is which cannot be told"
            )
        names = [name for _, name in full]
    wanted = {leaf.name for leaf in model.space.leaves}
    if len(names) != len(numbers) or set(names) != wanted:
        raise AdapterError(
            f"the optimiser in {str(folder)!r} holds {len(numbers)} parameters, the adapter "
            f"{len(wanted)} LoRA matrices{'' if set(names) == wanted else ' of other names'}: "
            "pass a checkpoint of the run that trained exactly them"
        )
    return dict(zip(names, numbers, strict=True))


def _lora_plus(
    sizes: Sequence[int], full: Sequence[tuple[str, str]]
) -> list[tuple[str, str]] | None:
    """The matrices in the order of PEFT's `create_loraplus_optimizer`, None for other sizes.

    All A, then the B that decay, then the others (layers with `bias` in their name, which end up
    in no group of the Trainer's that decays), every B at a rate of its own.
    """
    parts: list[list[tuple[str, str]]] = [[], [], []]
    for item in full:
        is_B = item[1].endswith(".lora_B")
        parts[1 + ("bias" in item[0]) if is_B else 0].append(item)
    parts = [part for part in parts if part]
    if [len(part) for part in parts] != list(sizes):
        return None
    return [item for part in parts for item in part]


# ---- one parameter's state -----------------------------------------------------------------------


def _keys(state: Mapping[str, Any]) -> str:
    """The keys of a mapping for a message."""
    return ", ".join(sorted(str(key) for key in state)) or "nothing"


def _second_moment(state: Mapping[str, Any]) -> Tensor | str:
    """The second moment as it is kept, float32 or float64.

    Where there is none, the sentence that says why.
    """
    moment = state.get("exp_avg_sq", state.get("state2"))
    if not isinstance(moment, Tensor):
        return (
            f"no second moment per parameter; found {_keys(state)}. Only Adam and AdamW (also "
            "8-bit) keep one"
        )
    if moment.is_floating_point():
        return moment if moment.dtype == torch.float64 else moment.float()
    table, scale = state.get("qmap2"), state.get("absmax2")
    if (
        moment.dtype != torch.uint8
        or not isinstance(table, Tensor)
        or not isinstance(scale, Tensor)
    ):
        return (
            "an 8-bit second moment without its table and scales (qmap2, absmax2); found "
            f"{_keys(state)}"
        )
    block = next((size for size in _BLOCKS if -(-moment.numel() // size) == scale.numel()), None)
    if block is None or table.numel() != 256:
        return (
            f"an 8-bit second moment of {moment.numel()} values with {scale.numel()} scales and a "
            f"table of {table.numel()}; expected one scale for each {_BLOCKS[0]} values and a "
            "table of 256"
        )
    spread = scale.float().repeat_interleave(block)[: moment.numel()]
    return (table.float()[moment.flatten().long()] * spread).view(moment.shape)


def _sum_lr(path: Path) -> float | None:
    """The learning rates of the log summed over the steps 1 ... global_step.

    They are interpolated between the logged steps. None without any.
    """
    if not path.exists():
        return None
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            (int(e["step"]), float(e["learning_rate"]))
            for e in log["log_history"]
            if "learning_rate" in e
        ]
        last = int(log["global_step"])
        if not 0 <= last <= MAX_STEPS:
            raise ValueError(f"global_step is {last}, expected at most {MAX_STEPS}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise InputError(
            f"{path} is not a Trainer's state ({error!r}): copy the checkpoint again"
        ) from error
    if not entries:
        return None
    logged = dict(sorted(entries))
    return float(np.interp(np.arange(1, last + 1), list(logged), list(logged.values())).sum())
