"""Models from folders or the hub, and every refusal of an adapter that cannot be read rightly.

`load` reads a base (`influence.base_files`) and an adapter (`influence.adapter_files`,
`influence.adapter_weights`) by name and hands a `PeftModel` to `from_peft`, which checks it, finds
its sites and returns an `AdaptedModel`. What is refused is refused with all its reasons at once,
before any work. Weights are read from safetensors only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence import sharding
from influence.adapter import PREFIX, AdaptedModel, ParamSpace, Site
from influence.adapter_files import (
    AdapterFiles,
    note_unknown_fields,
    read_adapter,
    unsupported_options,
)
from influence.adapter_weights import add_adapter
from influence.base_files import DTYPES, BaseRequest, grouped, live_loading, load_base
from influence.errors import AdapterError, InputError, NumericalError, refuse
from influence.experts import is_wrapper, refusal, take_plain_products
from influence.known_digests import BaseFiles, LoadedTensors
from influence.manifest import LoadingRecord
from influence.precision import HALF, compute_in
from influence.progress import say
from influence.tokenizer_files import load_tokenizer

#: What a base computes in, as `load` takes it.
COMPUTE = ("auto", "float32", "own")


def load(
    base: str | Path | None,
    adapter: str | Path,
    *,
    dtype: str = "auto",
    compute: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    shard: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: str | None = None,
    checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> AdaptedModel:
    """Load a base model and a LoRA adapter from local folders or hub ids.

    What is loaded is what the files say: weights that the base's file lacks, and LoRA matrices that
    the adapter's file has and its configuration does not make, or the reverse, are errors.

    Parameters
    ----------
    base
        Folder or hub id of the base model; None takes the base recorded in the adapter's
        configuration. Of the base that is recorded there, the recorded revision is taken.
    adapter
        Folder or hub id of a PEFT LoRA adapter (`adapter_config.json` and
        `adapter_model.safetensors`); a hub id may go on with a folder and a revision,
        `owner/name/folder@revision`.
    dtype
        `float32`, `bfloat16`, `float16` or `float64`: type of the base's weights, or `auto`: the
        type they are saved in, in which they lose nothing and take no more memory than their file.
        The LoRA parameters, their gradients and all sums are float32 under a 16-bit base, else of
        the same type. A base saved quantised keeps its own.
    compute
        What a 16-bit or quantised base computes in. `float32`: its weights are cast up, layer by
        layer, for the time of each product, which takes no more memory and makes gradients as right
        as those of a float32 base. `own`: in 16 bits. `auto`: float32 for a 16-bit base whose type
        was left to `dtype` auto, so that nobody gets rounded gradients unasked, and on a CPU, where
        it is the faster one; else its own.
    device
        `auto` (cuda, else cpu) or any torch device that has float64 (mps does not).
    device_map
        `auto` and the other maps of transformers, in place of `device`: layers are spread over the
        accelerators. A map that leaves layers on the CPU beside an accelerator is refused.
    shard
        Hold a part of each decoder layer in each process that torchrun started
        (`influence.sharding`): the processes read the base in turn, on the CPU. All must call
        this. InputError with one process, a device map or quantised weights.
    load_in_4bit, load_in_8bit
        Quantise the base while it is loaded, as QLoRA does (nf4, doubly) or to bitsandbytes' 8
        bits; it computes in `dtype`.
    attn_implementation
        `eager`, `sdpa`, `flash_attention_2` ...: transformers' attention; None lets it choose.
    checkpointing
        Recompute each layer's activations in the backward: memory for one layer instead of all, for
        about one more forward per backward. The numbers stay the same.
    trust_remote_code
        Passed on to transformers; off unless asked for.

    Raises
    ------
    AdapterError
        Listing, at once, every reason why the adapter is not supported or does not belong to this
        base (told by site names and shapes, never by the recorded path); and for whatever
        transformers, PEFT or bitsandbytes raise.
    """
    for place in (base, adapter):
        _refuse_mistyped_path(place)
    if compute not in COMPUTE:
        raise InputError(f"compute {compute!r} was given; expected one of {', '.join(COMPUTE)}")
    if shard:
        sharding.refuse_loading(device_map, load_in_4bit or load_in_8bit)
        whole = partial(
            load,
            base,
            adapter,
            dtype=dtype,
            compute=sharding.compute_on(device, dtype, compute),
            device="cpu",
            attn_implementation=attn_implementation,
            checkpointing=checkpointing,
            trust_remote_code=trust_remote_code,
        )
        return sharding.load_in_turn(whole, device)
    how = LoadingRecord(load_in_4bit, load_in_8bit, attn_implementation)
    request = BaseRequest(str(base or ""), dtype, device, device_map, how, trust_remote_code)
    files = read_adapter(adapter)
    note_unknown_fields(files.config)
    request = replace(request, **_recorded_base(files, base))
    origin = BaseFiles.before_loading(
        (_folder_of(request), files.folder), dtype, how, device, device_map, trust_remote_code
    )
    body = load_base(request)
    model = add_adapter(body, files, request.place)
    tokenizer = load_tokenizer(
        files.folder,
        request.place,
        revision=request.revision,
        trust_remote_code=trust_remote_code,
    )
    if checkpointing:
        getattr(body, "activation_checkpointing_enable", body.gradient_checkpointing_enable)()
    loaded = from_peft(
        model,
        tokenizer,
        base=_reference(request.place),
        adapter=_reference(adapter),
    )
    if any(not site.parameter for site in loaded.routed):
        say(
            "note: this adapter's experts are modules of their own, which see tokens of many rows "
            "at once: rows run one by one, which is slower"
        )
    quantised = getattr(body.config, "quantization_config", None) is not None
    saved_quantised = quantised and not (load_in_4bit or load_in_8bit)
    half = quantised or next(body.parameters()).dtype in HALF
    if half and computes_wide(compute, dtype, loaded.device.type, quantised, saved_quantised):
        compute_in(body, torch.float32)
    if origin is not None:  # a newer version may have been fetched
        origin = origin.after_loading((_folder_of(request), files.folder))
    tensors = LoadedTensors(loaded.base_tensors())
    return replace(loaded, loading=how, files=origin, loaded=tensors)


def _folder_of(request: BaseRequest) -> Path:
    """Where the files of a base are: its folder, or that of the hub's cache once it is there."""
    from transformers.utils.hub import cached_file

    if Path(request.place).exists():
        return Path(request.place)
    try:
        config = cached_file(
            request.place, "config.json", revision=request.revision, local_files_only=True
        )
    except OSError:
        return Path(request.place)
    return Path(config or request.place).parent


def computes_wide(
    compute: str, dtype: str, device: str, quantised: bool, saved_quantised: bool
) -> bool:
    """Whether a base of fewer bits than float32 computes in float32, by what was asked of `load`."""
    if compute != "auto":
        return compute == "float32"
    unasked = dtype == "auto" and not saved_quantised
    return unasked or (device == "cpu" and not quantised)


def _recorded_base(files: AdapterFiles, base: str | Path | None) -> dict[str, str | None]:
    """The base's `place`, and its `revision` where it is the one that the adapter records."""
    recorded = files.config.get("base_model_name_or_path")
    place = str(base) if base is not None else recorded
    if not place or not isinstance(place, str):
        raise AdapterError(
            f"adapter {files.name!r} does not record its base model: pass it (--model BASE)"
        )
    if base is not None and recorded and Path(place).name != Path(str(recorded)).name:
        say(
            f"note: the adapter was trained on the base {str(recorded)!r}, and {place!r} is given: "
            "only its sites' names and shapes are compared"
        )
    revision = files.config.get("revision")
    return {"place": place, "revision": str(revision) if revision and place == recorded else None}


def from_peft(model: Any, tokenizer: Any, *, base: str = "", adapter: str = "") -> AdaptedModel:
    """Wrap a live `PeftModel` with one active, unmerged LoRA adapter on linear layers.

    The model is put in evaluation mode and its LoRA parameters in float32 (float64 stays); nothing
    else of it changes. Raises `AdapterError` with every reason at once; `NumericalError` for NaN or
    infinite weights.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise AdapterError(_no_peft_model(model))
    active = list(model.active_adapters)
    _refuse_disabled_or_offloaded(model)
    if len(active) != 1:
        raise AdapterError(
            f"{len(active)} adapters are active ({', '.join(active)}); influence is computed for "
            "exactly one: call model.set_adapter(NAME) first"
        )
    sites, reasons = _lora_sites(model, active[0])
    refuse("this adapter cannot be used", reasons)

    model.eval()
    if next(model.parameters()).dtype == torch.float64:
        take_plain_products(model)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights in place for a CPU kernel that has no backward; keep it
        # from doing so
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    for site in sites:
        for module in (site.A, site.B):
            if module.weight.dtype not in (torch.float32, torch.float64):
                module.to(torch.float32)
    _refuse_nan(model)
    _note_zero_sites(sites)
    shapes = [
        (f"{site.name}.lora_{side}", tuple(getattr(site, side).weight.shape))
        for site in sites
        for side in "AB"
    ]
    how = live_loading(model.get_base_model())
    return AdaptedModel(model, tokenizer, tuple(sites), ParamSpace.of(shapes), base, adapter, how)


def _no_peft_model(model: Any) -> str:
    """What to say of a model that is no `PeftModel`."""
    given = f"a {type(model).__name__} was given; expected a peft.PeftModel with a LoRA adapter."
    if getattr(model, "_hf_peft_config_loaded", False):
        return (
            f"{given} Its adapter was added by transformers itself (add_adapter, load_adapter): "
            "save it with save_pretrained(FOLDER) and load it with influence.load(BASE, FOLDER)"
        )
    return (
        f"{given} A merged model has no LoRA parameters left: use the adapter from before merging"
    )


def _refuse_disabled_or_offloaded(model: Any) -> None:
    """Refuse a model whose adapter is switched off, or whose weights are elsewhere."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if layers and all(layer.disable_adapters for layer in layers):
        raise AdapterError(
            "the adapter is switched off, so the model computes what its base does: call "
            "model.enable_adapter_layers(), or leave the block of disable_adapter()"
        )
    away = [
        name.removeprefix(PREFIX) for name, weight in model.named_parameters() if weight.is_meta
    ]
    refuse(
        f"{len(away)} weights are not in memory (offloaded to the CPU or a disk), and gradients do "
        "not pass through weights that are fetched when they are needed: load the model onto one "
        "device, in 4 bits where it is too large",
        grouped(away),
    )


def _note_zero_sites(sites: Sequence[Site]) -> None:
    """Warn where every B is zero, and say where some are: training did not reach them."""
    zero = [site.name for site in sites if not site.B.weight.any()]
    if len(zero) == len(sites):
        warnings.warn(
            "every B is zero: this adapter is fresh (untrained), so the gradients of every A "
            "vanish and half of each score is missing; train the adapter first",
            stacklevel=3,
        )
    elif zero:
        shown = ", ".join(grouped(zero)[:5])
        say(
            f"note: {len(zero)} of {len(sites)} sites have B = 0 ({shown}): training did not reach "
            "them, and their A has no gradient"
        )


def _lora_sites(model: Any, name: str) -> tuple[list[Site], list[str]]:
    """The sites of the adapter `name` in module order, and every reason why it is not supported."""
    from peft.tuners.lora.layer import LoraLayer

    reasons = unsupported_options(model.peft_config[name].to_dict())
    sites: list[Site] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        path = path.removeprefix(PREFIX)
        if layer.merged:
            reasons.append(
                f"{path}: the adapter is merged into the base; call model.unmerge_adapter() first"
            )
        if name in layer.lora_embedding_A:
            reasons.append(
                f"{path}: LoRA on an embedding is not supported; adapt linear layers only"
            )
        if name not in layer.lora_A:
            continue
        A, B = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant:
            reasons.append(
                f"{path}: LoRA variant {type(layer.lora_variant[name]).__name__} is not "
                "supported, its branch is not s B A x; plain LoRA and rsLoRA are"
            )
        elif not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)) or B.bias is not None:
            reasons.append(
                f"{path}: LoRA on {type(layer.get_base_layer()).__name__} is not supported; on "
                "nn.Linear and Conv1D it is"
            )
        elif is_wrapper(layer) and (reason := refusal(layer)):
            reasons.append(f"{path}: {reason}")
        else:
            parameter = str(getattr(layer, "parameter_name", ""))
            sites.append(Site(path, layer, A, B, float(layer.scaling[name]), parameter))
    adapted = {id(weight) for site in sites for weight in (site.A.weight, site.B.weight)}
    outside = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapted
    ]
    if outside and not reasons:
        reasons.append(
            f"{len(outside)} trainable parameters lie outside the LoRA sites "
            f"({', '.join(outside[:3])}, ...): their influence would be missed; freeze them or "
            "train an adapter without them"
        )
    if not sites and not reasons:
        reasons.append("it has no LoRA layer")
    return sites, reasons


def _refuse_mistyped_path(place: str | Path | None) -> None:
    """Refuse a path that does not exist in a folder that does.

    It is a slip and no hub id, so the network is not asked for it.
    """
    path = Path(place) if place is not None else Path(".")
    if not path.exists() and str(path.parent) != "." and path.parent.is_dir():
        folders = sorted(child.name for child in path.parent.iterdir() if child.is_dir())
        neighbours = ", ".join(folders[:8])
        raise AdapterError(
            f"there is no folder {str(place)!r}; {path.parent} has {neighbours or 'no folders'}"
        )


def _reference(place: str | Path) -> str:
    """A local folder as an absolute path, so that a run opens from anywhere. A hub id stays."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


def _refuse_nan(model: Any) -> None:
    bad = [
        name.removeprefix(PREFIX)
        for name, parameter in model.named_parameters()
        if parameter.dtype in DTYPES.values() and not torch.isfinite(parameter.detach()).all()
    ]
    if bad:
        raise NumericalError(
            f"{len(bad)} weights hold NaN or infinity "
            f"({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}): influence of such a model "
            "means nothing; save it again from a sound checkpoint"
        )
