"""The weights of an adapter put into its base by PEFT, and compared with its file.

PEFT leaves matrices of the file out that the configuration does not create, and keeps fresh ones
where the file lacks some. Here both are errors. Names are judged after PEFT's own renaming: it
loads the weights, and what it loaded is compared with the file bit for bit.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from influence.adapter import PREFIX, AdaptedModel, weight_key
from influence.adapter_files import COPY, NAME, AdapterFiles
from influence.errors import AdapterError, libraries_named, refuse
from influence.experts import stacks
from influence.progress import say


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
        with libraries_named(message, COPY):
            stored = load_peft_weights(
                str(files.folder),
                device="cpu",
                key_mapping=getattr(base, "_checkpoint_conversion_mapping", None),
            )
            matrices = {key: tensor for key, tensor in stored.items() if ".lora_" in key}
        _take_base_weights(base, files, {k: t for k, t in stored.items() if k not in matrices})
        try:
            with libraries_named(message, COPY):
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


def under_peft_names(model: AdaptedModel, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of another file of the adapter under the names that PEFT gives them in this model.

    They keep their own names where PEFT does not know them all.
    """
    from peft.utils import set_peft_model_state_dict

    name, before = model.model.active_adapters[0], model.snapshot()
    message = "a checkpoint could not be loaded by PEFT"
    try:
        with warnings.catch_warnings(), libraries_named(message, COPY):
            warnings.simplefilter("ignore")
            report = set_peft_model_state_dict(
                model.model, dict(matrices), name, ignore_mismatched_sizes=True
            )
        if report.unexpected_keys or any(".lora_" in key for key in report.missing_keys):
            return dict(matrices)
        values = model.space.split(model.snapshot())
        return {
            weight_key(leaf): value for leaf, value in zip(model.space.leaves, values, strict=True)
        }
    finally:
        model.restore(before)


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
        path = path.replace(".base_layer", "")  # wrappers of fused experts lie in one another
        module = modules.get(path)
        if module is None and re.search(r"\.experts\.\d+\.", path):
            reasons.append(
                f"{path}: experts are one fused weight in this transformers, not modules of their "
                "own; adapters of fused experts (target_parameters) are supported"
            )
        elif module is None:
            alike = [name for name in modules if name.split(".")[-4:] == path.split(".")[-4:]]
            other = f", but {alike[0]} (another version's name?)" if len(alike) == 1 else ""
            reasons.append(f"{path}: the base has no such layer{other}")
        elif tensor is None or tensor.dim() != 2 or side not in ("A.weight", "B.weight"):
            continue
        elif experts := stacks(module):
            # an A of all experts is [E r, d_in], a B [d_out, r E], and PEFT takes the widths from
            # the parameter that it names
            rows, width = tensor.shape if side[0] == "A" else tensor.shape[::-1]
            if not any(rows % len(p) == 0 and width in p.shape[1:] for p in experts):
                shapes = ", ".join(str(tuple(p.shape)) for p in experts)
                reasons.append(
                    f"{path}: lora_{side[0]} has the shape {tuple(tensor.shape)}, and the base's "
                    f"experts {shapes}"
                )
        else:
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
    return list(dict.fromkeys(reasons))


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
    message = (
        f"adapter {files.name!r}: adapter_config.json and adapter_model.safetensors do not belong "
        "together; copy both from the same training"
    )
    names = Counter(map(_unnamed, stored))
    refuse(message, [f"{_site(key)}: is there twice" for key in names if names[key] > 1])
    stored = {_unnamed(key): tensor for key, tensor in stored.items()}
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
    with libraries_named(f"the base could not be resized to {count} tokens", COPY):
        base.resize_token_embeddings(count, mean_resizing=False)
        resized = dict(base.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in rows.items():
                resized[name][before:] = tensor[before:].to(resized[name])
    say(
        f"note: the base has {before} tokens and is resized to {count}, whose embeddings are in "
        "the adapter's file"
    )
