"""A base model with one LoRA adapter, seen as a point in a flat parameter space.

A *site* is one adapted layer, `y = W x + s B A x`. A *leaf* is one of its two trainable matrices; the flat
order is site after site in module order, A before B, each matrix row-major:

    theta = [A_1.ravel(), B_1.ravel(), A_2.ravel(), B_2.ravel(), ...]        shape [P]

Everything else in the toolkit speaks of flat vectors `[P]` (or stacks `[K, P]`) in this order.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence.errors import AdapterError, InputError, NumericalError
from influence.progress import say

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Leaf:
    """One trainable matrix: its name, its shape, and its place `[start:stop]` in the flat vector."""

    name: str
    shape: tuple[int, int]
    start: int
    stop: int

    @property
    def is_A(self) -> bool:
        """Whether this is the A (input side, `[r, d_in]`) of its site; else it is B, `[d_out, r]`."""
        return self.name.endswith(".lora_A")

    @property
    def slice(self) -> slice:
        """The leaf's coordinates in the flat vector."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class ParamSpace:
    """The one flat order of the LoRA parameters; `size` is P."""

    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[str, tuple[int, int]]]) -> ParamSpace:
        """Lay out `(name, shape)` pairs one after the other."""
        leaves, start = [], 0
        for name, shape in shapes:
            stop = start + shape[0] * shape[1]
            leaves.append(Leaf(name, (shape[0], shape[1]), start, stop))
            start = stop
        return cls(tuple(leaves))

    @property
    def size(self) -> int:
        """The number of LoRA parameters, P."""
        return self.leaves[-1].stop

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and shapes in order; two adapters with equal digests share their coordinates."""
        text = json.dumps([(leaf.name, leaf.shape) for leaf in self.leaves])
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views `[..., rows, cols]` of each leaf in a stack of flat vectors `[..., P]`."""
        sizes = [leaf.slice.stop - leaf.slice.start for leaf in self.leaves]
        return [part.unflatten(-1, leaf.shape) for part, leaf in zip(flat.split(sizes, -1), self.leaves, strict=True)]

    def flatten(self, leaves: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`: matrices `[..., rows, cols]` to flat vectors `[..., P]`."""
        return torch.cat([matrix.flatten(-2) for matrix in leaves], dim=-1)


@dataclass(frozen=True)
class Site:
    """One adapted layer: PEFT's layer, its `lora_A` and `lora_B` modules and its scaling s."""

    name: str
    layer: Any
    A: nn.Linear
    B: nn.Linear
    scaling: float


@dataclass(frozen=True)
class AdaptedModel:
    """A base model with exactly one active LoRA adapter, ready to be differentiated.

    Made by `load` (from folders or hub ids) or `from_peft` (from a live `PeftModel`). `base` and `adapter` are
    the references it was loaded from, for the record only; identity is told by the digests.
    """

    model: Any
    tokenizer: Any
    sites: tuple[Site, ...]
    space: ParamSpace
    base: str
    adapter: str

    @property
    def device(self) -> torch.device:
        """Where the base's first weight lies, and so where batches go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The LoRA parameters' type: float32 or float64; gradients and curvature are held in it."""
        return self.sites[0].A.weight.dtype

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable matrices in flat order."""
        return [leaf.weight for site in self.sites for leaf in (site.A, site.B)]

    @property
    def pad_id(self) -> int:
        """A token id for padding; its value never matters, padded positions reach no loss."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def snapshot(self) -> Tensor:
        """A copy of the LoRA parameters, `[P]`."""
        return self.space.flatten([parameter.detach() for parameter in self.parameters]).clone()

    @torch.no_grad()
    def restore(self, theta: Tensor) -> None:
        """Set the LoRA parameters to `theta`, `[P]`."""
        if theta.shape != (self.space.size,):
            raise InputError(
                f"a parameter vector of shape {tuple(theta.shape)} was given, but this adapter has "
                f"{self.space.size} LoRA parameters: pass a flat vector [{self.space.size}] in ParamSpace order"
            )
        for parameter, value in zip(self.parameters, self.space.split(theta), strict=True):
            parameter.copy_(value)

    @contextmanager
    def at(self, theta: Tensor) -> Iterator[AdaptedModel]:
        """Within the block the LoRA parameters are `theta` [P]; afterwards what they were, bit for bit."""
        before = self.snapshot()
        try:
            self.restore(theta)
            yield self
        finally:
            self.restore(before)

    @contextmanager
    def moved(self, delta: Tensor) -> Iterator[AdaptedModel]:
        """Within the block the adapter is at `theta + delta`; afterwards back at theta, bit for bit."""
        with self.at(self.snapshot() + delta.to(self.device, self.dtype)):
            yield self

    @property
    def adapter_digest(self) -> str:
        """SHA-256 over the LoRA matrices and their scalings: what the adapter does, not where it lies."""
        header = json.dumps([self.space.digest, [site.scaling for site in self.sites]])
        names = (leaf.name for leaf in self.space.leaves)
        return _digest_tensors(header, dict(zip(names, self.parameters, strict=True)))

    @contextmanager
    def evaluating(self, trainable: Sequence[Tensor] = ()) -> Iterator[AdaptedModel]:
        """Within the block dropout is off and only `trainable` require gradients; afterwards all is as it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        own = {id(parameter) for parameter in trainable}
        self.model.eval()
        for parameter, flag in flags:
            if flag != (id(parameter) in own):
                parameter.requires_grad_(id(parameter) in own)
        try:
            yield self
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)

    @cached_property
    def base_digest(self) -> str:
        """SHA-256 over the base's weights and buffers in their loaded type."""
        own = {id(parameter) for parameter in self.parameters}
        tensors = {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor) and id(tensor) not in own and ".lora_" not in name
        }
        return _digest_tensors(type(self.model.get_base_model()).__name__, tensors)


def load(
    base: str | Path | None,
    adapter: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> AdaptedModel:
    """Load a base model and a LoRA adapter from local folders or hub ids.

    Parameters
    ----------
    base
        Folder or hub id of the base model; None takes the base recorded in the adapter's configuration.
    adapter
        Folder or hub id of a PEFT LoRA adapter (`adapter_config.json` and `adapter_model.safetensors`).
    dtype
        `float32`, `bfloat16`, `float16` or `float64`: type of the base's weights. The LoRA parameters, their gradients
        and all sums are float32 under a bfloat16 base, else of the same type. A quantised base keeps its own.
    device
        `auto` (cuda, else cpu) or any torch device that has float64 (mps does not).
    checkpointing
        Recompute each layer's activations in the backward: memory for one layer instead of all, for about one more
        forward per backward. The numbers stay the same.
    trust_remote_code
        Passed on to transformers; off unless asked for.

    Raises
    ------
    AdapterError
        Listing, at once, every reason why the adapter is not supported or does not belong to this base
        (told by site names and shapes, never by the recorded path).
    """
    from peft import PeftModel

    for place in (base, adapter):
        _refuse_mistyped_path(place)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} was given; expected one of {', '.join(DTYPES)}")
    folder = adapter_folder(adapter)
    config = _read_config(folder / "adapter_config.json")
    refuse(f"adapter {str(adapter)!r} cannot be used", _unsupported_options(config))
    base = base if base is not None else config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"adapter {str(adapter)!r} does not record its base model: pass it (--model BASE)")
    body = _load_base(str(base), DTYPES[dtype], resolve_device(device), trust_remote_code)
    shapes = _tensor_shapes(folder / "adapter_model.safetensors")
    refuse(
        f"adapter {str(adapter)!r} was not made for base {str(base)!r} (judged by its sites' names and shapes); "
        "pass the base it was trained on",
        _misfits(body, shapes),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(body, str(folder), is_trainable=False)
    source = str(folder) if (folder / "tokenizer_config.json").exists() else str(base)
    loaded = from_peft(
        model, _load_tokenizer(source, trust_remote_code), base=_reference(base), adapter=_reference(adapter)
    )
    wanted = [weight_key(leaf) for leaf in loaded.space.leaves]
    refuse(
        f"adapter {str(adapter)!r} is incomplete: its configuration names layers whose weights its file lacks",
        [f"{key.removeprefix(_PREFIX)} is missing" for key in wanted if key not in shapes],
    )
    if checkpointing:
        getattr(body, "activation_checkpointing_enable", body.gradient_checkpointing_enable)()
    return loaded


def from_peft(model: Any, tokenizer: Any, *, base: str = "", adapter: str = "") -> AdaptedModel:
    """Wrap a live `PeftModel` with one active, unmerged LoRA adapter on linear layers.

    The model is put in evaluation mode and its LoRA parameters in float32 (float64 stays); nothing else of it
    changes. Raises `AdapterError` with every reason at once; `NumericalError` for NaN or infinite weights.
    """
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"a {type(model).__name__} was given; expected a peft.PeftModel with a LoRA adapter. A merged model "
            "has no LoRA parameters left: use the adapter from before merging"
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise AdapterError(
            f"{len(active)} adapters are active ({', '.join(active)}); influence is computed for exactly one: "
            "call model.set_adapter(NAME) first"
        )
    name = active[0]
    config = model.peft_config[name]
    reasons = _unsupported_options(config.to_dict())
    sites: list[Site] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        path = path.removeprefix(_PREFIX)
        if layer.merged:
            reasons.append(f"{path}: the adapter is merged into the base; call model.unmerge_adapter() first")
        if name in layer.lora_embedding_A:
            reasons.append(f"{path}: LoRA on an embedding is not supported; adapt linear layers only")
        if name not in layer.lora_A:
            continue
        A, B = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant:
            reasons.append(
                f"{path}: LoRA variant {type(layer.lora_variant[name]).__name__} is not supported, its branch is "
                "not s B A x; plain LoRA and rsLoRA are"
            )
        elif not (isinstance(A, nn.Linear) and isinstance(B, nn.Linear)) or B.bias is not None:
            reasons.append(
                f"{path}: LoRA on {type(layer.get_base_layer()).__name__} is not supported; on nn.Linear and Conv1D it is"
            )
        else:
            sites.append(Site(path, layer, A, B, float(layer.scaling[name])))
    own = {id(weight) for site in sites for weight in (site.A.weight, site.B.weight)}
    outside = [
        key for key, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in own
    ]
    if outside and not reasons:
        reasons.append(
            f"{len(outside)} trainable parameters lie outside the LoRA sites ({', '.join(outside[:3])}, ...): "
            "their influence would be missed; freeze them or train an adapter without them"
        )
    if not sites and not reasons:
        reasons.append("it has no LoRA layer")
    refuse("this adapter cannot be used", reasons)

    model.eval()
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights in place for a CPU kernel that has no backward; keep it from doing so
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    for site in sites:
        for module in (site.A, site.B):
            if module.weight.dtype not in (torch.float32, torch.float64):
                module.to(torch.float32)
    _refuse_nan(model)
    if all(not site.B.weight.any() for site in sites):
        warnings.warn(
            "every B is zero: this adapter is fresh (untrained), so the gradients of every A vanish and half of "
            "each score is missing; train the adapter first",
            stacklevel=2,
        )
    shapes = [(f"{site.name}.lora_{side}", tuple(getattr(site, side).weight.shape)) for site in sites for side in "AB"]
    return AdaptedModel(model, tokenizer, tuple(sites), ParamSpace.of(shapes), base, adapter)


def resolve_device(device: str) -> torch.device:
    """`auto` to cuda where there is one, else cpu; anything else as torch reads it."""
    if device != "auto":
        try:
            torch.empty(0, device=(chosen := torch.device(device)), dtype=torch.float64)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"device {device!r} was given; expected auto, cpu, cuda, cuda:1 ... that this machine has and that knows float64: {reason}"
            ) from error
        return chosen
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight_key(leaf: Leaf) -> str:
    """The name of a leaf's weights in PEFT's safetensors file."""
    return f"{_PREFIX}{leaf.name}.weight"


def accepts(model: Any, argument: str) -> bool:
    """Whether the base model's forward takes a keyword argument of this name."""
    return argument in inspect.signature(model.get_base_model().forward).parameters


def _refuse_mistyped_path(place: str | Path | None) -> None:
    """A path that does not exist, in a folder that does, is a slip and no hub id: do not ask the network for it."""
    path = Path(place) if place is not None else Path(".")
    if not path.exists() and str(path.parent) != "." and path.parent.is_dir():
        there = ", ".join(sorted(child.name for child in path.parent.iterdir() if child.is_dir())[:8])
        raise AdapterError(f"there is no folder {str(place)!r}; {path.parent} has {there or 'no folders'}")


def _reference(place: str | Path) -> str:
    """A local folder as an absolute path, so that a run opens from anywhere; a hub id as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


# ---- loading -------------------------------------------------------------------------------------------------


def adapter_folder(adapter: str | Path) -> Path:
    """The local folder of an adapter, fetched from the hub (configuration and safetensors only) if need be."""
    folder = Path(adapter)
    if not folder.exists() and not folder.is_absolute() and len(folder.parts) == 2 and str(adapter)[0] not in "./~":
        from huggingface_hub import snapshot_download

        try:
            patterns = ["adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens*", "*.jinja"]
            folder = Path(snapshot_download(str(adapter), allow_patterns=patterns))
        except Exception as error:
            raise AdapterError(
                f"adapter {str(adapter)!r} is neither a local folder nor a hub id that could be fetched: {error}"
            ) from error
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(adapter)!r} is not a folder: pass the folder that holds adapter_config.json")
    if not (folder / "adapter_config.json").exists():
        if (folder / "config.json").exists():
            raise AdapterError(
                f"{str(adapter)!r} is a full model (config.json, no adapter_config.json): a merged adapter has no "
                "LoRA parameters left; pass the adapter folder from before merging"
            )
        raise AdapterError(f"{str(adapter)!r} has no adapter_config.json: pass the folder of a PEFT adapter")
    if not (folder / "adapter_model.safetensors").exists():
        raise AdapterError(
            f"{str(adapter)!r} has no adapter_model.safetensors; pickled weights (.bin) are never loaded: save the "
            "adapter again with save_pretrained(..., safe_serialization=True)"
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
            say(f"note: the base is saved as {saved} and loaded as float32; --dtype {saved} takes half the memory")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"base model {base!r} could not be loaded: {error}\nPass a folder or hub id of a causal language model "
            "saved as safetensors (--model BASE)"
        ) from error
    return model if quantised else model.to(device)  # pyright: ignore[reportArgumentType]


def _load_tokenizer(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"no tokenizer could be loaded from {source!r}: {error}\nSave one beside the base (or the adapter)"
        ) from error


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{path} cannot be read as safetensors ({error}): copy the adapter again") from error


def _misfits(base: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Sites of the adapter that the base lacks or whose shapes differ; empty if it fits."""
    modules = dict(base.named_modules())
    reasons = []
    for key, shape in shapes.items():
        path, _, side = key.removeprefix(_PREFIX).rpartition(".lora_")
        module = modules.get(path)
        if not path or side not in ("A.weight", "B.weight"):
            reasons.append(f"{key}: not a LoRA matrix of a linear layer")
        elif module is None:
            reasons.append(f"{path}: the base has no such layer")
        else:
            d_in, d_out = _features(module)
            if side[0] == "A" and shape[-1] != d_in:
                reasons.append(f"{path}: the adapter expects {shape[-1]} inputs, the base's layer has {d_in}")
            if side[0] == "B" and shape[0] != d_out:
                reasons.append(f"{path}: the adapter expects {shape[0]} outputs, the base's layer has {d_out}")
    if not shapes:
        reasons.append("it holds no tensors")
    return reasons


def _features(module: Any) -> tuple[int | None, int | None]:
    """Input and output width of a linear layer, of transformers' Conv1D, or of a quantised linear."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "nf"):  # Conv1D holds its weight as [in, out]
        return module.weight.shape[0], module.nf
    return None, None


# ---- refusals ------------------------------------------------------------------------------------------------


def _unsupported_options(config: Mapping[str, Any]) -> list[str]:
    """Reasons why an adapter configuration is not supported; empty if it is."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        return [f"it is a {kind} adapter; LoRA adapters are supported"]
    checks = {
        "use_dora": "DoRA also trains a magnitude per output, which is not a LoRA matrix; plain LoRA and rsLoRA are supported",
        "modules_to_save": "modules_to_save trains whole modules whose influence would be missed; train without it",
        "trainable_token_indices": "trainable token embeddings are not LoRA matrices; train without them",
        "target_parameters": "LoRA on bare parameters (fused experts) has no linear layer to read; target linear layers",
        "lora_bias": "lora_bias trains a bias beside B; train without it",
        "alora_invocation_tokens": "activated LoRA changes where the adapter acts; plain LoRA is supported",
        "use_qalora": "QA-LoRA pools the input of A; plain LoRA is supported",
        "use_bdlora": "block-diagonal LoRA is not supported; plain LoRA is",
    }
    reasons = [f"{key}: {reason}" for key, reason in checks.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias={config['bias']!r} trains biases outside the LoRA sites; train with bias='none'")
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
        name.removeprefix(_PREFIX)
        for name, parameter in model.named_parameters()
        if parameter.dtype in DTYPES.values() and not torch.isfinite(parameter.detach()).all()
    ]
    if bad:
        raise NumericalError(
            f"{len(bad)} weights hold NaN or infinity ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}): "
            "influence of such a model means nothing; save it again from a sound checkpoint"
        )


def _digest_tensors(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a header and every tensor's name, type, shape and bytes, in name order."""

    def one(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        data = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        return digest.hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(one, sorted(tensors.items())))
    return hashlib.sha256("\n".join([header, *digests]).encode()).hexdigest()
