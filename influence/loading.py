"""Models from folders or the hub, and every refusal of an adapter that cannot be read rightly.

`load` reads a base and an adapter by name and hands a `PeftModel` to `from_peft`, which checks it,
finds its sites and returns an `AdaptedModel`. What is refused is refused with all its reasons at
once, before any work. Weights are read from safetensors only.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence.adapter import PREFIX, AdaptedModel, ParamSpace, Site, weight_key
from influence.errors import AdapterError, InputError, NumericalError
from influence.experts import is_wrapper, refusal, stacks, take_plain_products
from influence.precision import HALF, compute_in, type_name
from influence.progress import say

#: Types of a base's weights, by the name that `load` takes.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
#: What a base computes in, as `load` takes it.
COMPUTE = ("auto", "float32", "own")


def load(
    base: str | Path | None,
    adapter: str | Path,
    *,
    dtype: str = "float32",
    compute: str = "auto",
    device: str = "auto",
    checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> AdaptedModel:
    """Load a base model and a LoRA adapter from local folders or hub ids.

    Parameters
    ----------
    base
        Folder or hub id of the base model; None takes the base recorded in the adapter's
        configuration.
    adapter
        Folder or hub id of a PEFT LoRA adapter (`adapter_config.json` and
        `adapter_model.safetensors`).
    dtype
        `float32`, `bfloat16`, `float16` or `float64`: type of the base's weights. The LoRA
        parameters, their gradients and all sums are float32 under a bfloat16 base, else of the same
        type. A quantised base keeps its own.
    compute
        What a 16-bit or quantised base computes in. `float32`: its weights are cast up, layer by
        layer, for the time of each product, which takes no more memory and makes gradients as right
        as those of a float32 base. `own`: in 16 bits. `auto`: float32 for a 16-bit base on a CPU,
        where it is the faster one, else its own.
    device
        `auto` (cuda, else cpu) or any torch device that has float64 (mps does not).
    checkpointing
        Recompute each layer's activations in the backward: memory for one layer instead of all, for
        about one more forward per backward. The numbers stay the same.
    trust_remote_code
        Passed on to transformers; off unless asked for.

    Raises
    ------
    AdapterError
        Listing, at once, every reason why the adapter is not supported or does not belong to this
        base (told by site names and shapes, never by the recorded path).
    """
    from peft import PeftModel

    for place in (base, adapter):
        _refuse_mistyped_path(place)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} was given; expected one of {', '.join(DTYPES)}")
    if compute not in COMPUTE:
        raise InputError(f"compute {compute!r} was given; expected one of {', '.join(COMPUTE)}")
    folder = adapter_folder(adapter)
    config = _read_config(folder / "adapter_config.json")
    refuse(f"adapter {str(adapter)!r} cannot be used", _unsupported_options(config))
    base = base if base is not None else config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(
            f"adapter {str(adapter)!r} does not record its base model: pass it (--model BASE)"
        )
    body = _load_base(str(base), DTYPES[dtype], resolve_device(device), trust_remote_code)
    shapes = _tensor_shapes(folder / "adapter_model.safetensors")
    refuse(
        f"adapter {str(adapter)!r} was not made for base {str(base)!r} (judged by its sites' "
        "names and shapes); pass the base it was trained on",
        _misfits(body, shapes, fused=bool(config.get("target_parameters"))),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(body, str(folder), is_trainable=False)
    source = str(folder) if (folder / "tokenizer_config.json").exists() else str(base)
    loaded = from_peft(
        model,
        _load_tokenizer(source, trust_remote_code),
        base=_reference(base),
        adapter=_reference(adapter),
    )
    wanted = [weight_key(leaf) for leaf in loaded.space.leaves]
    refuse(
        f"adapter {str(adapter)!r} is incomplete: its configuration names layers whose weights "
        "its file lacks",
        [f"{key.removeprefix(PREFIX)} is missing" for key in wanted if key not in shapes],
    )
    if any(not site.parameter for site in loaded.routed):
        say(
            "note: this adapter's experts are modules of their own, which see tokens of many rows "
            "at once: rows run one by one, which is slower"
        )
    quantised = getattr(body.config, "quantization_config", None) is not None
    on_cpu = compute == "auto" and loaded.device.type == "cpu" and not quantised
    if (compute == "float32" or on_cpu) and (quantised or DTYPES[dtype] in HALF):
        compute_in(body, torch.float32)
    if checkpointing:
        getattr(body, "activation_checkpointing_enable", body.gradient_checkpointing_enable)()
    return loaded


def from_peft(model: Any, tokenizer: Any, *, base: str = "", adapter: str = "") -> AdaptedModel:
    """Wrap a live `PeftModel` with one active, unmerged LoRA adapter on linear layers.

    The model is put in evaluation mode and its LoRA parameters in float32 (float64 stays); nothing
    else of it changes. Raises `AdapterError` with every reason at once; `NumericalError` for NaN or
    infinite weights.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"a {type(model).__name__} was given; expected a peft.PeftModel with a LoRA adapter. "
            "A merged model has no LoRA parameters left: use the adapter from before merging"
        )
    active = list(model.active_adapters)
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
    if all(not site.B.weight.any() for site in sites):
        warnings.warn(
            "every B is zero: this adapter is fresh (untrained), so the gradients of every A "
            "vanish and half of each score is missing; train the adapter first",
            stacklevel=2,
        )
    shapes = [
        (f"{site.name}.lora_{side}", tuple(getattr(site, side).weight.shape))
        for site in sites
        for side in "AB"
    ]
    return AdaptedModel(model, tokenizer, tuple(sites), ParamSpace.of(shapes), base, adapter)


def _lora_sites(model: Any, name: str) -> tuple[list[Site], list[str]]:
    """The sites of the adapter `name` in module order, and every reason why it is not supported."""
    from peft.tuners.lora.layer import LoraLayer

    reasons = _unsupported_options(model.peft_config[name].to_dict())
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


def resolve_device(device: str) -> torch.device:
    """A torch device by name, where `auto` is cuda if there is one and else cpu.

    Errors: InputError for a device that this machine lacks or that does not know float64.
    """
    if device != "auto":
        try:
            torch.empty(0, device=(chosen := torch.device(device)), dtype=torch.float64)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"device {device!r} was given; expected auto, cpu, cuda, cuda:1 ... that this "
                f"machine has and that knows float64: {reason}"
            ) from error
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def adapter_folder(adapter: str | Path) -> Path:
    """The local folder of an adapter, fetched from the hub if need be.

    Only the configuration, the safetensors file and the tokenizer are fetched. Errors: AdapterError
    that says what the folder lacks.
    """
    folder = Path(adapter)
    if (
        not folder.exists()
        and not folder.is_absolute()
        and len(folder.parts) == 2
        and str(adapter)[0] not in "./~"
    ):
        from huggingface_hub import snapshot_download

        try:
            patterns = [
                "adapter_config.json",
                "adapter_model.safetensors",
                "tokenizer*",
                "special_tokens*",
                "*.jinja",
            ]
            folder = Path(snapshot_download(str(adapter), allow_patterns=patterns))
        except Exception as error:
            raise AdapterError(
                f"adapter {str(adapter)!r} is neither a local folder nor a hub id that could be "
                f"fetched: {error}"
            ) from error
    if not folder.is_dir():
        raise AdapterError(
            f"adapter {str(adapter)!r} is not a folder: pass the folder that holds "
            "adapter_config.json"
        )
    if not (folder / "adapter_config.json").exists():
        if (folder / "config.json").exists():
            raise AdapterError(
                f"{str(adapter)!r} is a full model (config.json, no adapter_config.json): a "
                "merged adapter has no LoRA parameters left; pass the adapter folder from before "
                "merging"
            )
        raise AdapterError(
            f"{str(adapter)!r} has no adapter_config.json: pass the folder of a PEFT adapter"
        )
    if not (folder / "adapter_model.safetensors").exists():
        raise AdapterError(
            f"{str(adapter)!r} has no adapter_model.safetensors; pickled weights (.bin) are never "
            "loaded: save the adapter again with save_pretrained(..., safe_serialization=True)"
        )
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): copy the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no JSON object: copy the adapter again")
    return config


def _load_base(base: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        quantised = getattr(config, "quantization_config", None) is not None
        model = AutoModelForCausalLM.from_pretrained(
            base,
            config=config,
            dtype="auto" if quantised else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **({"device_map": {"": device}} if quantised else {}),
        )
        saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
        if not quantised and saved in ("bfloat16", "float16") and dtype == torch.float32:
            say(
                f"note: the base is saved as {saved} and loaded as float32; --dtype {saved} takes "
                "half the memory"
            )
        if not quantised and saved == "float32" and dtype in HALF:
            say(
                f"note: the base is saved as float32 and loaded as {type_name(dtype)}, which rounds "
                "its weights: right where the adapter was trained on them rounded so; else "
                "--dtype float32"
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"base model {base!r} could not be loaded: {error}\nPass a folder or hub id of a "
            "causal language model saved as safetensors (--model BASE)"
        ) from error
    return model if quantised else model.to(device)  # pyright: ignore[reportArgumentType]


def _load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"no tokenizer could be loaded from {source!r}: {error}\nSave one beside the base (or "
            "the adapter)"
        ) from error


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{path} cannot be read as safetensors ({error}): copy the adapter again"
        ) from error


def _misfits(base: Any, shapes: Mapping[str, tuple[int, ...]], *, fused: bool) -> list[str]:
    """Sites of the adapter that the base lacks or whose shapes differ. Empty if it fits.

    `fused`: parameters of fused experts are adapted.
    """
    modules = dict(base.named_modules())
    reasons = []
    for key, shape in shapes.items():
        path, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        # each wrapper of a fused experts' parameter lies in the one before
        path = re.sub(r"(\.base_layer)+$", "", path) if fused else path
        module = modules.get(path)
        if not path or side not in ("A.weight", "B.weight"):
            reasons.append(f"{key}: not a LoRA matrix of a linear layer")
        elif module is None:
            reasons.append(f"{path}: the base has no such layer")
        elif fused and (experts := stacks(module)):
            # PEFT takes the widths from the parameter that it names
            rows, width = shape if side[0] == "A" else shape[::-1]
            if not any(rows % len(p) == 0 and width in p.shape[1:] for p in experts):
                reasons.append(
                    f"{path}: lora_{side[0]} has the shape {tuple(shape)}, and the base's experts "
                    f"{', '.join(str(tuple(p.shape)) for p in experts)}"
                )
        else:
            d_in, d_out = _features(module)
            if side[0] == "A" and shape[-1] != d_in:
                reasons.append(
                    f"{path}: the adapter expects {shape[-1]} inputs, the base's layer has {d_in}"
                )
            if side[0] == "B" and shape[0] != d_out:
                reasons.append(
                    f"{path}: the adapter expects {shape[0]} outputs, the base's layer has {d_out}"
                )
    if not shapes:
        reasons.append("it holds no tensors")
    return reasons


def _features(module: Any) -> tuple[int | None, int | None]:
    """Input and output width of a linear layer, a Conv1D of transformers, or a quantised linear."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # Conv1D holds its weight as [in, out]
        return module.weight.shape[0], module.nf
    return None, None


def _unsupported_options(config: Mapping[str, Any]) -> list[str]:
    """Reasons why an adapter configuration is not supported. Empty if it is."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        return [f"it is a {kind} adapter; LoRA adapters are supported"]
    checks = {
        "use_dora": (
            "DoRA also trains a magnitude per output, which is not a LoRA matrix; plain LoRA and "
            "rsLoRA are supported"
        ),
        "modules_to_save": (
            "modules_to_save trains whole modules whose influence would be missed; train without it"
        ),
        "trainable_token_indices": (
            "trainable token embeddings are not LoRA matrices; train without them"
        ),
        "lora_bias": "lora_bias trains a bias beside B; train without it",
        "alora_invocation_tokens": (
            "activated LoRA changes where the adapter acts; plain LoRA is supported"
        ),
        "use_qalora": "QA-LoRA pools the input of A; plain LoRA is supported",
        "use_bdlora": "block-diagonal LoRA is not supported; plain LoRA is",
    }
    reasons = [f"{key}: {reason}" for key, reason in checks.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(
            f"bias={config['bias']!r} trains biases outside the LoRA sites; train with bias='none'"
        )
    return reasons


def refuse(message: str, reasons: Sequence[str]) -> None:
    """Raise an `AdapterError` that lists the reasons, unless there are none."""
    if reasons:
        shown = [f"  - {reason}" for reason in reasons[:10]]
        if len(reasons) > 10:
            shown.append(f"  - ... and {len(reasons) - 10} more")
        raise AdapterError("\n".join([f"{message}:", *shown]))


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
