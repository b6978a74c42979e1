"""The base model from its files, and every way in which it is not what they say.

transformers fills weights that a file lacks with random numbers, and leaves out those that the
model does not have; it reports both in a log that programs do not read. Here the first is an error
and the second is said, or an error too where whole decoder layers are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence.errors import AdapterError, InputError, libraries_named, refuse
from influence.manifest import LoadingRecord
from influence.progress import say

#: Types of a base's weights, by the name that `load` takes.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
#: Types of a safetensors file whose numbers are the weights themselves.
_FLOATS = ("F64", "F32", "F16", "BF16")
_ADVICE = "Pass a folder or hub id of a causal language model saved as safetensors (--model BASE)"


@dataclass(frozen=True)
class BaseRequest:
    """Which base to load, and how: the keywords of `influence.load`, the dtype by name."""

    place: str
    dtype: str
    device: str
    device_map: str | None
    how: LoadingRecord
    trust_remote_code: bool
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, "auto"):
            raise InputError(
                f"dtype {self.dtype!r} was given; expected one of {', '.join(DTYPES)}, or auto for "
                "the type that the base is saved in"
            )
        if self.how.load_in_4bit and self.how.load_in_8bit:
            raise InputError("both 4 and 8 bits were given: quantise the base to one of them")
        if self.quantised_now and self.dtype == "float64":
            raise InputError(
                "dtype float64 was given for a base in 4 or 8 bits, which bitsandbytes computes in "
                "at most float32: leave one of them out"
            )
        if self.device_map is not None and self.device != "auto":
            raise InputError(
                f"device {self.device!r} and device map {self.device_map!r} were given: a map "
                "chooses the devices itself, leave one of them out"
            )

    @property
    def source(self) -> dict[str, Any]:
        """Keywords that say which files of the place are meant, and whether its code may run."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **revision}

    @property
    def quantised_now(self) -> bool:
        """Whether the base is quantised while it is loaded."""
        return self.how.load_in_4bit or self.how.load_in_8bit


def load_base(request: BaseRequest) -> Any:
    """The base model, whole, in evaluation mode.

    Errors: `AdapterError` for a base that cannot be loaded, that is no causal language model, or
    whose files lack or do not fit weights of the model; `InputError` for an unknown device.
    """
    from transformers import AutoConfig

    device = resolve_device(request.device)
    _refuse_adapter_inside(Path(request.place))
    message = f"base model {request.place!r} could not be loaded"
    with libraries_named(message, _ADVICE):
        config = AutoConfig.from_pretrained(request.place, **request.source)
    _refuse_other_kinds(request.place, config)
    saved_quantised = getattr(config, "quantization_config", None) is not None
    if saved_quantised and request.quantised_now:
        raise AdapterError(
            f"base model {request.place!r} is saved quantised already: leave --load-in-4bit and "
            "--load-in-8bit out"
        )
    with libraries_named(message, _advice(config)):
        model, report = _from_pretrained(request, config, device, saved_quantised)
    _check_report(request.place, model, report)
    if saved_quantised:
        _refuse_plain_weights(request.place, model)
    else:
        _refuse_integers(request, model)
    if getattr(model, "_hf_peft_config_loaded", False):
        _refuse_embedded_adapter(request.place)
    _refuse_offloaded(model)
    _note_saved_type(request, config, saved_quantised)
    return model


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


def _from_pretrained(
    request: BaseRequest, config: Any, device: torch.device, saved_quantised: bool
) -> tuple[Any, Mapping[str, Any]]:
    """The model of transformers on its device, and what was missing, unused or of other shape."""
    from transformers import AutoModelForCausalLM

    dtype = _type(request, config, saved_quantised)
    options: dict[str, Any] = {}
    if request.quantised_now:
        options["quantization_config"] = _quantisation(request.how, dtype)
    if request.how.attn_implementation is not None:
        options["attn_implementation"] = request.how.attn_implementation
    if request.device_map is not None:
        options["device_map"] = request.device_map
    elif saved_quantised or request.quantised_now:
        options["device_map"] = {"": device}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        request.place,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report names them; they are refused by it
        **request.source,
        **options,
    )
    model, report = loaded
    return model if "device_map" in options else model.to(device), report


def _quantisation(how: LoadingRecord, dtype: torch.dtype | str) -> Any:
    """How a base is quantised while it is loaded; in 4 bits it computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    if how.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def live_loading(base: Any) -> LoadingRecord:
    """How a live base was loaded: its bits, where it was quantised meanwhile, and its attention,
    where transformers by itself would choose another one.
    """
    settings = _quantised_live(base)
    attention = getattr(base.config, "_attn_implementation", None)
    return LoadingRecord(
        bool(getattr(settings, "load_in_4bit", False)),
        bool(getattr(settings, "load_in_8bit", False)),
        None if attention == _chosen_attention(base) else attention,
    )


def not_loaded_so(base: Any) -> str | None:
    """How a live base was quantised, in words, where `load` does not do so. None where it does."""
    settings = _quantised_live(base)
    if settings is None:
        return None
    how = live_loading(base)
    if not (how.load_in_4bit or how.load_in_8bit):
        return f"with {type(settings).__name__}"
    ours = _quantisation(how, next(base.parameters()).dtype).to_dict()
    theirs = settings.to_dict()
    prefix = "bnb_4bit_" if how.load_in_4bit else "llm_int8_"
    other = [
        f"{key}={theirs.get(key)}"
        for key in ours
        if (key.startswith(prefix) or key == "llm_int8_skip_modules")
        and theirs.get(key) != ours[key]
    ]
    return f"with {', '.join(other)}" if other else None


def _quantised_live(base: Any) -> Any:
    """The settings that a base was quantised with while it was loaded; None if it was not, or was
    saved so.
    """
    settings = getattr(base.config, "quantization_config", None)
    saved = getattr(getattr(base, "hf_quantizer", None), "pre_quantized", True)
    return None if saved else settings


def _chosen_attention(base: Any) -> str | None:
    """The attention that transformers takes for a base where none is asked for."""
    choose = getattr(base, "get_correct_attn_implementation", None)
    try:
        return None if choose is None else choose(None)
    except (ImportError, ValueError):
        return None


def _type(request: BaseRequest, config: Any, saved_quantised: bool) -> torch.dtype | str:
    """The type of the weights that are no integers, and in which a 4-bit base computes."""
    if saved_quantised or (request.dtype == "auto" and not request.quantised_now):
        return "auto"
    if request.dtype != "auto":
        return DTYPES[request.dtype]
    saved = getattr(config, "dtype", None)  # known here, so that a run is opened in the same type
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _advice(config: Any) -> str:
    """What to do where a base cannot be loaded."""
    method = _quantisation_method(config)
    if method is not None:
        return (
            f"It is saved quantised ({method}), which needs that method's own library and often a "
            "GPU: install it, or pass the base from before quantisation, with --load-in-4bit where "
            "memory is short"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        return f"Its config.json asks for the attention {attention!r}: --attn-implementation sdpa"
    return _ADVICE


def _quantisation_method(config: Any) -> str | None:
    """How the base was quantised before it was saved, as its configuration says."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        settings = vars(settings)
    method = settings.get("quant_method", "of a method that it does not name")
    return str(getattr(method, "value", method))


def _refuse_adapter_inside(folder: Path) -> None:
    """Refuse a local folder that holds an adapter: transformers would put that into the base."""
    if (folder / "adapter_config.json").exists():
        if (folder / "config.json").exists():
            _refuse_embedded_adapter(str(folder))
        raise AdapterError(
            f"base model {str(folder)!r} is an adapter's folder: pass the model that the adapter "
            "was trained on (--model BASE)"
        )


def _refuse_embedded_adapter(place: str) -> None:
    raise AdapterError(
        f"base model {place!r} holds an adapter_config.json beside its own weights, so "
        "transformers loads that adapter into it: keep base and adapter in folders of their own"
    )


def _refuse_other_kinds(place: str, config: Any) -> None:
    """Refuse what is no causal language model, in a sentence of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise AdapterError(
            f"base model {place!r} is an encoder-decoder ({kind}), whose loss is not that of a "
            "causal language model: causal language models are supported"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise AdapterError(
            f"base model {place!r} is of the type {kind!r}, which transformers knows no causal "
            f"language model of. {_ADVICE}"
        )
    named = getattr(config, "architectures", None)
    names = [str(name) for name in named] if isinstance(named, list) else []
    masked = any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in names)
    if masked and not getattr(config, "is_decoder", False) and hasattr(config, "is_decoder"):
        raise AdapterError(
            f"base model {place!r} is a masked language model ({names[0]}), whose tokens see those "
            "after them: causal language models are supported"
        )


def _check_report(place: str, model: Any, report: Mapping[str, Any]) -> None:
    """Refuse a base whose file lacks weights of the model or holds them in other shapes.

    Weights of the file that the model does not use are said; whole decoder layers are refused.
    """
    name = type(model).__name__
    buffers = {key for key, _ in model.named_buffers()}
    missing = [key for key in report["missing_keys"] if key not in buffers]
    unused = sorted(report["unexpected_keys"])
    shapes = [
        f"{key}: the file has the shape {tuple(there)}, config.json asks for {tuple(here)}"
        for key, there, here in sorted(report["mismatched_keys"])
    ]
    refuse(
        f"the file of base model {place!r} lacks or does not fit weights of {name}, which would be "
        f"filled with random numbers. {_cause(missing, unused)}",
        [*(f"{group} is missing" for group in grouped(missing)), *shapes],
    )
    layers = _unused_layers(model, unused)
    refuse(
        f"base model {place!r} is loaded without whole layers that its file holds: its config.json "
        "does not ask for them (num_hidden_layers). Restore config.json, or save the shorter model "
        "itself with save_pretrained",
        [f"{group} is not used" for group in grouped(layers)],
    )
    if unused:
        shown = grouped(unused)
        more = f" and {len(shown) - 8} more names" if len(shown) > 8 else ""
        say(
            f"note: {len(unused)} weights of the base's file are not used by {name}: "
            f"{', '.join(shown[:8])}{more}"
        )
    if absent := sorted(set(report["missing_keys"]) & buffers):
        say(f"note: the base's file lacks {', '.join(grouped(absent)[:8])}; defaults are used")


def _cause(missing: Collection[str], unused: Collection[str]) -> str:
    """What most likely happened to a file that lacks weights, and what to do."""
    if any(".lora_" in key or ".base_layer." in key for key in unused):
        return (
            "Its names hold base_layer or lora_: it was saved while an adapter was inside. Save it "
            "from the model without the adapter (PEFT's unload())"
        )
    quantised = (".qweight", ".absmax", ".SCB", ".weight_packed", ".weight_scale", ".quant_map")
    if any(part in key for key in unused for part in quantised):
        return "Its weights are quantised and config.json has no quantization_config: restore it"
    for key in missing:
        longer = next((other for other in unused if other.endswith(f".{key}")), None)
        if longer is not None:
            return (
                f"Its names begin with {longer.removesuffix(key)!r} once more: it was saved from "
                "inside another module. Save the language model itself with save_pretrained"
            )
    if missing and all(key.split(".")[0] in ("lm_head", "embed_out", "output") for key in missing):
        return (
            "It was saved without its head, as AutoModel is: save the AutoModelForCausalLM, or set "
            "tie_word_embeddings in config.json where the head is the embedding"
        )
    return "Save the base again with save_pretrained, or restore its config.json"


def _unused_layers(model: Any, unused: Iterable[str]) -> list[str]:
    """Unused weights that have the names of the model's own layers, with another number."""
    unused = list(unused)
    if not unused:  # which is usual, and a state_dict of a quantised model is not free
        return []
    having = {_DIGITS.sub("*", key) for key in model.state_dict()}
    config = model.config.get_text_config()
    # further layers that predict later tokens are left out by transformers itself
    ahead = int(getattr(config, "num_nextn_predict_layers", 0) or 0)
    first = int(getattr(config, "num_hidden_layers", 0) or 0)
    allowed = {str(number) for number in range(first, first + ahead)}
    return [
        key
        for key in unused
        if _DIGITS.sub("*", key) in having and not allowed & set(_DIGITS.findall(key))
    ]


_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in their numbers alone as one, with how many they are, in name order."""
    groups: dict[str, list[str]] = {}
    for key in sorted(names):
        groups.setdefault(_DIGITS.sub("*", key), []).append(key)
    return [
        same[0] if len(same) == 1 else f"{pattern} ({len(same)} of them)"
        for pattern, same in groups.items()
    ]


def _refuse_integers(request: BaseRequest, model: Any) -> None:
    """Refuse weights saved as integers or 8-bit floats that no configuration explains.

    Without their scales they would be cast to floats of another size. Only the files' headers are
    read.
    """
    from safetensors import safe_open

    floating = {key for key, weight in model.named_parameters()}
    bare = {key.removeprefix(f"{model.base_model_prefix}.") for key in floating}
    strange = []
    for path in _weight_files(request):
        with (
            libraries_named(f"{path} cannot be read as safetensors", "Copy the base again"),
            safe_open(path, framework="pt") as file,
        ):
            for key in file.keys():  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if kind not in _FLOATS and (key in floating or key in bare):
                    strange.append(f"{key} is saved as {kind}")
    refuse(
        f"base model {request.place!r} holds quantised weights and its config.json has no "
        "quantization_config, so they would be read as floats without their scales: restore "
        "config.json, or pass the base from before quantisation",
        strange,
    )


def _refuse_plain_weights(place: str, model: Any) -> None:
    """Refuse a base whose configuration says that bitsandbytes quantised it, and whose file not."""
    plain = [
        f"{name}.weight is not quantised"
        for name, module in model.named_modules()
        if (type(module).__name__ == "Linear4bit" and not hasattr(module.weight, "quant_state"))
        or (type(module).__name__ == "Linear8bitLt" and module.weight.dtype != torch.int8)
    ]
    refuse(
        f"config.json of base model {place!r} says that it is saved quantised, and its file holds "
        "other weights: take quantization_config out of config.json, and load with --load-in-4bit "
        "or --load-in-8bit if it was trained on so",
        plain,
    )


def _weight_files(request: BaseRequest) -> list[Path]:
    """The safetensors files that a base was loaded from: its own, or those of the hub's cache."""
    folder = Path(request.place)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        with libraries_named(f"base model {request.place!r} is not in the cache", _ADVICE):
            config = cached_file(request.place, "config.json", revision=request.revision)
        folder = Path(config or ".").parent
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return [path for path in [folder / "model.safetensors"] if path.exists()]
    with libraries_named(f"{index} cannot be read", "Copy the base again"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def _refuse_offloaded(model: Any) -> None:
    """Refuse a device map that left layers on the CPU's or disk's side of an accelerator."""
    away = [key for key, weight in model.named_parameters() if weight.is_meta]
    refuse(
        f"{len(away)} of the base's weights found no room on the devices, and gradients do not "
        "pass through weights that are fetched when they are needed: give more devices, "
        "--load-in-4bit or --dtype bfloat16",
        grouped(away),
    )


def _note_saved_type(request: BaseRequest, config: Any, saved_quantised: bool) -> None:
    """Say in which type the base is loaded, where that is not how it was saved or trained on."""
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if request.how.load_in_4bit:
        say(
            "note: the base is quantised to 4 bits as QLoRA does (nf4, doubly); where training "
            "chose otherwise, pass a base saved in its own quantisation"
        )
    elif not saved_quantised and saved in ("bfloat16", "float16") and request.dtype == "float32":
        say(
            f"note: the base is saved as {saved} and loaded as float32; --dtype auto takes half "
            "the memory, and its numbers are the same"
        )
    elif not saved_quantised and saved == "float32" and request.dtype in ("bfloat16", "float16"):
        say(
            f"note: the base is saved as float32 and loaded as {request.dtype}, which rounds its "
            "weights: right where the adapter was trained on them rounded so; else --dtype float32"
        )
