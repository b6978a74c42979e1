"""An adapter's folder: what it holds, its configuration, and the names and shapes of its weights.

What can be told without the base is told here, before it is loaded; `influence.adapter_weights`
puts the weights into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from influence.adapter import PREFIX
from influence.base_files import grouped
from influence.errors import AdapterError, libraries_named, refuse
from influence.progress import say
from influence.tokenizer_files import TOKENIZER_FILES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: The name that PEFT gives an adapter which is loaded without one.
NAME = "default"
#: Number types of a file that are the weights themselves.
_FLOATS = ("F64", "F32", "F16", "BF16")
COPY = "Copy the adapter again"
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

    A hub id may go on with a folder and end with a revision, as in `owner/name/checkpoint-10@v2`.
    Only the configuration, the safetensors file and the tokenizer are fetched. Errors: AdapterError
    that says what the folder lacks, and what it holds instead.
    """
    folder = Path(adapter)
    if (
        not folder.exists()
        and not folder.is_absolute()
        and len(folder.parts) >= 2
        and str(adapter)[0] not in "./~"
    ):
        folder = _fetched(str(adapter))
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


def _fetched(name: str) -> Path:
    """The local copy of an adapter on the hub, `owner/name[/folder][@revision]`."""
    from huggingface_hub import snapshot_download

    place, _, revision = name.partition("@")
    parts = Path(place).parts
    id, below = "/".join(parts[:2]), "/".join(parts[2:])
    patterns = [CONFIG, WEIGHTS, *TOKENIZER_FILES]
    if below:
        patterns = [f"{below}/{pattern}" for pattern in patterns]
    try:
        fetched = snapshot_download(id, revision=revision or None, allow_patterns=patterns)
        return Path(fetched) / below
    except Exception as error:
        raise AdapterError(
            f"adapter {name!r} is neither a local folder nor a hub id that could be "
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
            f"{missing} but {len(shards)} parts of one ({shards[0]}, ...), which PEFT does not "
            "load either: join the tensors of all parts into adapter_model.safetensors "
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
        libraries_named(f"{path} cannot be read as safetensors", COPY),
        safe_open(path, framework="pt") as file,
    ):
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            shapes[key], types[key] = tuple(part.get_shape()), part.get_dtype()
    refuse(f"the weights of adapter {str(adapter)!r} cannot be used", _spoiled(shapes, types))
    return AdapterFiles(str(adapter), folder, config, shapes, types)


def base_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file that are no LoRA matrices, by name; none without a file.

    PEFT saves the head under an adapted one, and embeddings of which there are more than the base
    has.
    """
    from safetensors import safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        return {}
    with (
        libraries_named(f"{path} cannot be read as safetensors", COPY),
        safe_open(path, framework="pt") as file,
    ):
        return {key: file.get_tensor(key) for key in file.keys() if ".lora_" not in key}  # noqa: SIM118


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
    names = [re.search(r"\.lora_[AB]\.(\w+)\.weight$", key) for key in matrices]
    if all(names) and names[0] and names[0][1] != NAME:  # which PEFT itself takes out
        return [
            f"names hold the adapter's name .{names[0][1]}, as {first}: the model's state_dict was "
            "saved. Save with save_pretrained, or take that word out of the names"
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
