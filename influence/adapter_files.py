"""An adapter's folder: its configuration and weights, and every way in which they say two things.

PEFT leaves matrices of the file out that the configuration does not create, and keeps fresh ones
where the file lacks some. Here both are errors. Names are judged after PEFT's own renaming: it
loads the weights, and what it loaded is compared with the file bit for bit.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence.adapter import PREFIX
from influence.base_files import grouped
from influence.errors import AdapterError, libraries_named, refuse
from influence.progress import say

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The name that PEFT gives an adapter which is loaded without one.
NAME = "default"
#: Number types of a file that are the weights themselves.
_FLOATS = ("F64", "F32", "F16", "BF16")
_COPY = "Copy the adapter again"
#: What an adapter was trained for, where that is not the next token.
_OTHER_TASKS = {
    "SEQ_CLS": "labels of sequences",
    "TOKEN_CLS": "labels of tokens",
    "SEQ_2_SEQ_LM": "an encoder-decoder's output",
    "QUESTION_ANS": "spans of text",
    "FEATURE_EXTRACTION": "embeddings",
}
#: Beginnings of `init_lora_weights` whose initialisation subtracts from the base, or replaces it
#: (`peft.tuners.lora.layer`: *_init). `eva`, `orthogonal`, `gaussian`, `mica` leave it alone.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder with its configuration, and the shapes and number types of its weights.

    `name` is what the user called it.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]


# ---- the folder ----------------------------------------------------------------------------------


def adapter_folder(adapter: str | Path) -> Path:
    """The local folder of an adapter, fetched from the hub if need be.

    A hub id may go on with a folder, as in `owner/name/checkpoint-10`. Only the configuration, the
    safetensors file and the tokenizer are fetched. Errors: AdapterError that says what the folder
    lacks, and what it holds instead.
    """
    folder = Path(adapter)
    if (
        not folder.exists()
        and not folder.is_absolute()
        and len(folder.parts) >= 2
        and str(adapter)[0] not in "./~"
    ):
        folder = _fetched(folder.parts)
    if not folder.is_dir():
        raise AdapterError(
            f"adapter {str(adapter)!r} is not a folder: pass the folder that holds "
            "adapter_config.json"
        )
    if not (folder / CONFIG).exists():
        raise AdapterError(_without_config(str(adapter), folder))
    if not (folder / WEIGHTS).exists():
        raise AdapterError(_without_weights(str(adapter), folder))
    return folder


def _fetched(parts: Sequence[str]) -> Path:
    """The local copy of an adapter on the hub."""
    from huggingface_hub import snapshot_download

    id, below = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [CONFIG, WEIGHTS, "tokenizer*", "special_tokens*", "*.jinja"]
    if below:
        patterns = [f"{below}/{pattern}" for pattern in patterns]
    try:
        return Path(snapshot_download(id, allow_patterns=patterns)) / below
    except Exception as error:
        raise AdapterError(
            f"adapter {'/'.join(parts)!r} is neither a local folder nor a hub id that could be "
            f"fetched: {error}"
        ) from error


def _without_config(adapter: str, folder: Path) -> str:
    """What to say of a folder without adapter_config.json."""
    if (folder / "config.json").exists():
        return (
            f"{adapter!r} is a full model (config.json, no adapter_config.json): a merged adapter "
            "has no LoRA parameters left; pass the adapter folder from before merging"
        )
    below = sorted(
        str(child.name)
        for child in folder.iterdir()
        if child.is_dir() and (child / CONFIG).exists()
    )
    if below:
        shown = ", ".join(below[:8]) + (", ..." if len(below) > 8 else "")
        return f"{adapter!r} has no adapter_config.json, its folders {shown} have: pass one of them"
    return f"{adapter!r} has no adapter_config.json: pass the folder of a PEFT adapter"


def _without_weights(adapter: str, folder: Path) -> str:
    """What to say of a folder with adapter_config.json and without adapter_model.safetensors."""
    missing = f"{adapter!r} has no adapter_model.safetensors"
    if (folder / "adapters.safetensors").exists():
        return (
            f"{missing}: it is an adapter of MLX (adapters.safetensors), whose A and B are "
            "transposed and named otherwise; convert it to PEFT's two files first"
        )
    shards = sorted(path.name for path in folder.glob("adapter_model-*.safetensors"))
    if shards:
        return (
            f"{missing} but {len(shards)} parts of one ({shards[0]}, ...), which PEFT does not load "
            "either: join the tensors of all parts into adapter_model.safetensors "
            "(safetensors.torch.load_file, save_file)"
        )
    if list(folder.glob("*.bin")):
        return (
            f"{missing}; pickled weights (.bin) are never loaded: save the adapter again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    if (folder / "model.safetensors").exists():
        return (
            f"{missing} but the weights of a full model: pass the folder that PEFT's "
            "save_pretrained wrote"
        )
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    return f"{missing} (it holds {held}): copy the adapter again"


def read_adapter(adapter: str | Path) -> AdapterFiles:
    """Read an adapter's configuration and the header of its weights.

    Errors: `AdapterError` for files that cannot be read, for what is not supported, and for
    weights that PEFT would not know, with what renamed or emptied them.
    """
    from safetensors import safe_open

    folder = adapter_folder(adapter)
    config = read_config(folder / CONFIG)
    refuse(f"adapter {str(adapter)!r} cannot be used", unsupported_options(config))
    path = folder / WEIGHTS
    shapes, types = {}, {}
    with (
        libraries_named(f"{path} cannot be read as safetensors", _COPY),
        safe_open(path, framework="pt") as file,
    ):
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            shapes[key], types[key] = tuple(part.get_shape()), part.get_dtype()
    refuse(f"the weights of adapter {str(adapter)!r} cannot be used", _spoiled(shapes, types))
    return AdapterFiles(str(adapter), folder, config, shapes, types)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object of a configuration."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): copy the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds no JSON object: copy the adapter again")
    return config


def _spoiled(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> list[str]:
    """What happened to weights whose names or shapes PEFT never writes. Empty if they are fine."""
    matrices = [key for key in shapes if ".lora_" in key]
    if not matrices:
        held = ", ".join(grouped(shapes)[:3]) or "nothing"
        return [f"the file holds no LoRA matrix, but {held}: copy the adapter again"]
    first = matrices[0]
    empty = [key for key in matrices if 0 in shapes[key]]
    if empty:
        return [
            f"{len(empty)} of {len(matrices)} matrices are empty, as {empty[0]} of shape "
            f"{list(shapes[empty[0]])}: DeepSpeed ZeRO-3 saved them without gathering its shards. "
            "Save again with stage3_gather_16bit_weights_on_model_save, or inside "
            "deepspeed.zero.GatheredParameters"
        ]
    if any("_orig_mod." in key for key in matrices):
        return [
            f"names hold _orig_mod, as {first}: a model in torch.compile was saved. Save its "
            "_orig_mod, or take that word out of the names"
        ]
    if any(key.count(PREFIX) > 1 for key in matrices):
        return [f"names begin with {PREFIX} more than once, as {first}: take the others away"]
    if not all(key.startswith("base_model.") for key in matrices):
        return [
            f"names do not begin with {PREFIX}, as {first}: PEFT's save_pretrained writes them so. "
            "Save again with it, or put that before the names"
        ]
    if all(f".{NAME}." in key or key.endswith(f".{NAME}") for key in matrices):
        return [
            f"names hold the adapter's name .{NAME}, as {first}: the model's state_dict was saved. "
            "Save with save_pretrained, or take that word out of the names"
        ]
    return [
        f"{key} is saved as {types[key]}, without the scales that would make weights of it: save "
        "the adapter as floats"
        for key in matrices
        if types[key] not in _FLOATS
    ]


# ---- the configuration ---------------------------------------------------------------------------


def unsupported_options(config: Mapping[str, Any]) -> list[str]:
    """Reasons why an adapter configuration is not supported. Empty if it is."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        if config.get("peft_type") is None and {"lora_parameters", "num_layers"} & set(config):
            return ["it is an adapter of MLX: convert it to PEFT's two files first"]
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
        "target_parameters": (
            "LoRA on bare parameters (fused experts) has no linear layer to read; target linear "
            "layers"
        ),
        "lora_bias": "lora_bias trains a bias beside B; train without it",
        "alora_invocation_tokens": (
            "activated LoRA changes where the adapter acts; plain LoRA is supported"
        ),
        "use_qalora": "QA-LoRA pools the input of A; plain LoRA is supported",
        "use_bdlora": "block-diagonal LoRA is not supported; plain LoRA is",
    }
    reasons = [f"{key}: {reason}" for key, reason in checks.items() if config.get(key)]
    bias = config.get("bias", "none")
    if bias in ("all", "lora_only"):
        reasons.append(
            f"bias={bias!r} trains biases outside the LoRA sites; train with bias='none'"
        )
    elif bias != "none":
        reasons.append(f"bias={bias!r} is given; PEFT knows 'none', 'all' and 'lora_only'")
    task = str(getattr(config.get("task_type"), "value", config.get("task_type")))
    if task in _OTHER_TASKS:
        reasons.append(
            f"task_type={task!r}: it was trained for {_OTHER_TASKS[task]}, with another loss than "
            "that of the next token; adapters of causal language models are supported"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        reasons.append(
            f"init_lora_weights={init!r} changed the base before training, so the base's own files "
            "are not what the adapter was trained on: PEFT converts it to plain LoRA, "
            "save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL_ADAPTER); the "
            "recipe is in docs/choosing.md, what is supported"
        )
    return reasons


def note_unknown_fields(config: Mapping[str, Any]) -> None:
    """Say which fields of a configuration this PEFT does not know, and so leaves out."""
    import peft

    known = {field.name for field in fields(peft.LoraConfig)} | {"runtime_config"}
    unknown = sorted(key for key, value in config.items() if key not in known and value)
    if unknown:
        say(
            f"note: PEFT {peft.__version__} does not know and ignores {', '.join(unknown[:8])} of "
            "adapter_config.json: if that changes what the adapter computes, upgrade PEFT"
        )


# ---- into the model ------------------------------------------------------------------------------


def add_adapter(base: Any, files: AdapterFiles, place: str) -> Any:
    """A `PeftModel` of a base and an adapter, whose LoRA matrices are those of the file, bit for
    bit.

    The base is changed in place, but keeps its own weights, also where the file holds a copy of
    them (an adapted LM head). It is resized where the file holds the embeddings of more tokens.
    `place` is what the user called the base. Errors: `AdapterError` that lists every difference
    between the file, the configuration and the base.
    """
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM, load_peft_weights
    from peft.utils import set_peft_model_state_dict

    message = f"adapter {files.name!r} could not be loaded by PEFT"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of names and fields is an error here
        with libraries_named(message, _COPY):
            stored = load_peft_weights(
                str(files.folder),
                device="cpu",
                key_mapping=getattr(base, "_checkpoint_conversion_mapping", None),
            )
            matrices = {key: tensor for key, tensor in stored.items() if ".lora_" in key}
        _take_base_weights(base, files, {k: t for k, t in stored.items() if k not in matrices})
        try:
            with libraries_named(message, _COPY):
                config = LoraConfig.from_pretrained(str(files.folder))
                config.inference_mode = True
                kind = PeftModelForCausalLM if config.task_type else PeftModel
                model = kind(base, config, NAME)
                report = set_peft_model_state_dict(
                    model, matrices, NAME, ignore_mismatched_sizes=True
                )
        except AdapterError:
            _refuse_other_base(files, place, _misfits(base, matrices))
            raise
    _compare(model, files, place, matrices, report.missing_keys, report.unexpected_keys)
    return model


def _refuse_other_base(files: AdapterFiles, place: str, reasons: Sequence[str]) -> None:
    refuse(
        f"adapter {files.name!r} was not made for base {place!r} (judged by its sites' names and "
        "shapes); pass the base it was trained on",
        reasons,
    )


def _misfits(base: Any, matrices: Mapping[str, Tensor | None]) -> list[str]:
    """Sites of the adapter that the base lacks or whose widths differ. Empty if it fits.

    The widths of a matrix that PEFT renamed (None) are not judged.
    """
    modules = {
        name.replace(".base_layer", ""): getattr(module, "base_layer", module)
        for name, module in base.named_modules()
        if ".lora_" not in name
    }
    reasons = []
    for key, tensor in sorted(matrices.items()):
        path, _, side = key.removeprefix(PREFIX).rpartition(".lora_")
        module = modules.get(path)
        if module is None and re.search(r"\.experts\.\d+\.", path):
            reasons.append(
                f"{path}: experts are one fused weight in this transformers, which has no linear "
                "layer to read; adapters of attention and shared layers are supported"
            )
        elif module is None:
            reasons.append(f"{path}: the base has no such layer")
        elif side in ("A.weight", "B.weight") and tensor is not None and tensor.dim() == 2:
            d_in, d_out = _features(module)
            if side[0] == "A" and d_in is not None and tensor.shape[1] != d_in:
                reasons.append(
                    f"{path}: the adapter expects {tensor.shape[1]} inputs, the base's layer has "
                    f"{d_in}"
                )
            if side[0] == "B" and d_out is not None and tensor.shape[0] != d_out:
                reasons.append(
                    f"{path}: the adapter expects {tensor.shape[0]} outputs, the base's layer has "
                    f"{d_out}"
                )
    return reasons


def _features(module: Any) -> tuple[int | None, int | None]:
    """Input and output width of a linear layer, a Conv1D of transformers, or a quantised linear."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # Conv1D holds its weight as [in, out]
        return module.weight.shape[0], module.nf
    return None, None


def _compare(
    model: Any,
    files: AdapterFiles,
    place: str,
    stored: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> None:
    """Refuse an adapter unless every matrix of the model is one of the file, and the reverse."""
    loaded = {
        _unnamed(key): parameter.detach()
        for key, parameter in model.named_parameters()
        if ".lora_" in key
    }
    strangers = [key for key in map(_unnamed, unexpected) if ".lora_" in key]
    lacking = [key for key in map(_unnamed, missing) if key in loaded]
    base = model.get_base_model()
    misfits = _misfits(base, {key: stored.get(key) for key in (*strangers, *lacking)})
    _refuse_other_base(files, place, misfits)
    ranks = [_rank_reason(key, stored[key], loaded[key]) for key in lacking if key in stored]
    message = (
        f"adapter {files.name!r}: adapter_config.json and adapter_model.safetensors do not belong "
        "together; copy both from the same training"
    )
    refuse(
        message,
        [
            *ranks,
            *(
                f"{_site(key)}: the file has it, the configuration does not adapt it "
                "(target_modules, layers_to_transform, exclude_modules ...)"
                for key in strangers
            ),
            *(
                f"{_site(key)}: the configuration adapts it, it is missing in the file"
                for key in lacking
                if key not in stored
            ),
        ],
    )
    refuse(message, _unequal(stored, loaded))


def _unequal(stored: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """Matrices of the file that the model does not hold bit for bit, in the model's type."""
    changed = [
        f"{_site(key)}: the loaded matrix is not that of the file"
        for key, tensor in stored.items()
        if key in loaded and _bytes(tensor.to(loaded[key].dtype)) != _bytes(loaded[key])
    ]
    # PEFT gave these another name: each must be there once
    renamed = [key for key in stored if key not in loaded]
    under_new_names = [key for key in loaded if key not in stored]
    if len(renamed) != len(under_new_names):
        return [*changed, f"{len(renamed)} matrices became {len(under_new_names)} in the model"]
    there = Counter(_bytes(loaded[key]) for key in under_new_names)
    kind = next(iter(loaded.values())).dtype
    for key in renamed:
        data = _bytes(stored[key].to(kind))
        if not there[data]:
            changed.append(f"{_site(key)}: no matrix of the model is that of the file")
        there[data] -= 1
    return changed


def _bytes(tensor: Tensor) -> bytes:
    """The bits of a matrix, in which NaN equals itself."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()  # pyright: ignore[reportArgumentType]


def _rank_reason(key: str, stored: Tensor, loaded: Tensor) -> str:
    """How a matrix of the file differs in shape from the one that the configuration makes."""
    axis = 0 if ".lora_A." in key else 1
    if stored.dim() == 2 and stored.shape[1 - axis] == loaded.shape[1 - axis]:
        return (
            f"{_site(key)}: the file has rank {stored.shape[axis]}, the configuration gives "
            f"{loaded.shape[axis]} (r, rank_pattern)"
        )
    return (
        f"{_site(key)}: the file has the shape {tuple(stored.shape)}, the configuration gives "
        f"{tuple(loaded.shape)}"
    )


def _unnamed(key: str) -> str:
    """A parameter's name as PEFT saves it, without the adapter's name."""
    return key.removesuffix(f".{NAME}").replace(f".{NAME}.weight", ".weight")


def _site(key: str) -> str:
    """A matrix's name for people: `model.layers.0.self_attn.q_proj.lora_A`."""
    return key.removeprefix(PREFIX).removesuffix(".weight")


# ---- the base's weights in the adapter's file ----------------------------------------------------


def base_weight_name(key: str) -> str:
    """The base's name of a weight of its own that lies in an adapter's file."""
    return re.sub(r"\.base_layer\b", "", key.removeprefix(PREFIX))


def _take_base_weights(base: Any, files: AdapterFiles, stored: Mapping[str, Tensor]) -> None:
    """Refuse weights of the base in the adapter's file that are not the base's own.

    PEFT saves an adapted LM head, and embeddings of which there are more than the base has. The
    base gets the rows of the tokens that it lacks.
    """
    own = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers())
    reasons: list[str] = []
    longer: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        name = base_weight_name(key)
        if name not in own:
            reasons.append(f"{key}: it is neither a LoRA matrix nor a weight of the base")
        elif own[name].shape == tensor.shape:
            if not _same_weights(own[name], tensor):
                reasons.append(f"{name}: it is not that of the base (trained, or of another base)")
        elif _is_embedding(base, name) and own[name].shape[1:] == tensor.shape[1:]:
            rows = min(len(own[name]), len(tensor))
            longer[name] = tensor
            if not _same_weights(own[name][:rows], tensor[:rows]):
                reasons.append(
                    f"{name}: its first {rows} rows are not those of the base (trained, or of "
                    "another base)"
                )
        else:
            reasons.append(
                f"{name}: the file has the shape {tuple(tensor.shape)}, the base "
                f"{tuple(own[name].shape)}"
            )
    refuse(
        f"adapter {files.name!r} holds weights of the base beside its LoRA matrices, and they are "
        "not the base's own, so their influence would be missed: train without them, or pass the "
        "base it was trained on",
        reasons,
    )
    if longer:
        _resize(base, files, longer)


def _same_weights(own: Tensor, stored: Tensor) -> bool:
    """Whether two weights are equal in the type of lower precision of the two."""
    own, stored = own.detach().cpu(), stored.cpu()
    return torch.equal(own, stored.to(own.dtype)) or torch.equal(own.to(stored.dtype), stored)


def _is_embedding(base: Any, name: str) -> bool:
    """Whether a weight of the base has a row for each token."""
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    return any(base.get_submodule(name.rpartition(".")[0]) is module for module in modules)


def _resize(base: Any, files: AdapterFiles, rows: Mapping[str, Tensor]) -> None:
    """Give the base as many token embeddings as the file holds, with the file's rows."""
    counts = {len(tensor) for tensor in rows.values()}
    before = base.get_input_embeddings().num_embeddings
    parameters = dict(base.named_parameters(remove_duplicate=False))
    by_row = {
        f"{name}.weight"
        for name, module in base.named_modules()
        if module in (base.get_input_embeddings(), base.get_output_embeddings())
    }
    covered = {id(parameters[name]) for name in rows}
    lacking = sorted(name for name in by_row if id(parameters[name]) not in covered)
    reasons = [f"{name}: its rows of the new tokens are missing" for name in lacking]
    if len(counts) > 1:
        reasons.append(f"its weights are of {sorted(counts)} tokens")
    refuse(
        f"adapter {files.name!r} was trained on a base with other than {before} tokens, and its "
        "file does not say what they are: save it with save_pretrained(..., "
        "save_embedding_layers=True), or pass the resized base",
        reasons,
    )
    (count,) = counts
    with libraries_named(f"the base could not be resized to {count} tokens", _COPY):
        base.resize_token_embeddings(count, mean_resizing=False)
        resized = dict(base.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in rows.items():
                resized[name][before:] = tensor[before:].to(resized[name])
    say(
        f"note: the base has {before} tokens and is resized to {count}, whose embeddings are in "
        "the adapter's file"
    )
