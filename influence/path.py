"""The path from the base to the adapter, and the points on it where gradients are taken.

An adapter that stopped early and memorises its rows has nearly vanished gradients at its end: what
is left there is what training did *not* learn. Further back the rows still pull. So a run looks at
several points:

* `c` in (0, 1]: the adapter with every `B` replaced by `c B`; 0 would be the base, 1 is the adapter
  itself.
* training checkpoints, where they were kept (as TracIn does, Pruthi et al. 2020, arXiv 2002.08484;
  with a curvature per segment of training, SOURCE, Bae et al. 2024, arXiv 2405.12186). Each is
  weighted by the learning rate that training had there, where that is recorded, because that is how
  far its gradients moved the adapter.

What is made of several points is said in `influence.scores`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from influence.adapter import AdaptedModel, weight_key
from influence.adapter_files import adapter_folder
from influence.adapter_weights import under_peft_names
from influence.errors import AdapterError, InputError, refuse
from influence.manifest import PointRecord
from influence.progress import say

#: Where a run looks unless told otherwise: the evidence is in benchmarks/README.md.
DEFAULT_PATH = (0.4, 0.8)
#: The adapter itself.
END = (1.0,)
#: What must agree between the configurations of an adapter and its checkpoints.
_SAME = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


@dataclass(frozen=True)
class Point:
    """One point of the path: the LoRA parameters `theta` [P] and their share of the average."""

    label: str
    share: float
    theta: Tensor = field(repr=False)
    scale: float | None = None
    digest: str | None = None

    def record(self) -> PointRecord:
        """What the manifest keeps: the point without its parameters."""
        return PointRecord(self.label, self.share, self.scale, self.digest)


def check_path(path: Sequence[float]) -> tuple[float, ...]:
    """The scales as floats in (0, 1], each once. Anything else is an `InputError`."""
    try:
        if isinstance(path, str):
            raise TypeError
        scales = tuple(float(c) for c in path)
    except (TypeError, ValueError):
        raise InputError(
            f"path {path!r} was given; expected numbers, as in (0.4, 0.6, 0.8)"
        ) from None
    if not all(0 < c <= 1 for c in scales) or len(set(scales)) != len(scales):
        shown = ",".join(f"{c:g}" for c in scales)
        raise InputError(
            f"path {shown} was given; expected different numbers above 0 (the base, where no A "
            "has a gradient) and up to 1 (the adapter), as in 0.4,0.6,0.8 or 1.0"
        )
    return scales


def scaled(model: AdaptedModel, scale: float) -> Tensor:
    """The LoRA parameters `[P]` with every B multiplied by `scale`.

    At 1 they are the adapter's own bits.
    """
    theta = model.snapshot()
    if scale != 1:
        for leaf in model.space.leaves:
            if not leaf.is_A:
                theta[leaf.slice] *= scale
    return theta


def points(
    model: AdaptedModel, path: Sequence[float], checkpoints: Sequence[str | Path] = ()
) -> tuple[Point, ...]:
    """The points of a run: the checkpoints, then the scales.

    Checkpoints share by their learning rates, scales equally. With both, the checkpoints together
    and the scales together have as much weight as they have points. Raises `AdapterError` where a
    checkpoint is not of this adapter's shape, `InputError` for a path outside (0, 1].
    """
    scales = check_path(path)
    folders = _checkpoint_folders(checkpoints)
    if not scales and not folders:
        raise InputError("no point of the path was given; give --path 1.0, or leave it out")
    rates = _rates(folders)
    labels = _distinct([f"{c:g}" for c in scales], [repr(c) for c in scales])
    # `--at` names one point: a folder called like a scale, `all` or `end` is named in full
    taken = {"all", "end", *labels}
    names = _distinct([folder.name for folder in rates], [str(folder) for folder in rates])
    names = [
        str(folder) if name in taken else name for folder, name in zip(rates, names, strict=True)
    ]
    total, count = sum(rates.values()), len(scales) + len(rates)
    result = []
    for (folder, rate), name in zip(rates.items(), names, strict=True):
        theta = read_parameters(model, folder)
        share = rate / total * len(rates) / count
        with model.at(theta):
            digest = model.adapter_digest
        result.append(Point(name, share, theta, digest=digest))
    for label, c in zip(labels, scales, strict=True):
        result.append(Point(label, 1 / count, scaled(model, c), scale=c))
    return tuple(result)


def _checkpoint_folders(checkpoints: Sequence[str | Path]) -> list[Path]:
    """The folders of the checkpoints' adapters, absolute."""
    for folder in checkpoints:
        if not Path(folder).is_dir():
            raise AdapterError(
                f"there is no checkpoint folder {str(folder)!r}: give the folders that training "
                "kept"
            )
    return [adapter_folder(folder).resolve() for folder in checkpoints]


def _rates(folders: Sequence[Path]) -> dict[Path, float]:
    """The learning rate by which each checkpoint counts, above 0.

    All count as 1 where one does not record its rate. Those at a rate of 0 are left out.
    """
    recorded = {folder: learning_rate(folder) for folder in folders}
    if len(recorded) < len(folders):
        raise InputError("a checkpoint was given twice: give each once")
    if None in recorded.values():
        say("note: not every checkpoint records its learning rate; all checkpoints count equally")
        recorded = dict.fromkeys(folders, 1.0)
    for folder, rate in recorded.items():
        if rate == 0:
            say(f"note: {folder} is left out: training had a learning rate of 0 there")
    rates = {folder: rate for folder, rate in recorded.items() if rate}
    if folders and not rates:
        raise InputError(
            "the learning rate at every given checkpoint is 0: give checkpoints from earlier in "
            "training"
        )
    return rates


def _distinct(short: list[str], full: list[str]) -> list[str]:
    """The short names, or the full ones where two short ones are the same."""
    return short if len(set(short)) == len(short) else full


def point_from_record(model: AdaptedModel, record: PointRecord, theta: Tensor | None) -> Point:
    """A point from its record in the manifest.

    `theta` [P] is needed where the point is a checkpoint; a scale is applied to the adapter.
    """
    if record.scale is not None:
        theta = scaled(model, record.scale)
    assert theta is not None
    return Point(record.label, record.share, theta, record.scale, record.digest)


def read_parameters(model: AdaptedModel, folder: Path) -> Tensor:
    """The LoRA parameters `[P]` of another adapter of the same configuration.

    Errors: AdapterError that lists every difference.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        if not isinstance(config, dict):
            raise ValueError("adapter_config.json holds no JSON object")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"checkpoint {folder} cannot be read: {error}") from error
    expected = model.model.peft_config[model.model.active_adapters[0]].to_dict()
    reasons = [
        f"{key} is {config.get(key)!r} there and {expected.get(key)!r} in the adapter"
        for key in _SAME
        if (config.get(key) or None) != (expected.get(key) or None)
    ]
    wanted = {weight_key(leaf): leaf for leaf in model.space.leaves}
    tensors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    if not reasons and set(tensors) != set(wanted):
        tensors = under_peft_names(model, tensors)
    reasons += [f"{key} is missing" for key in wanted if key not in tensors]
    reasons += [f"{key} is not in the adapter" for key in tensors if key not in wanted]
    reasons += [
        f"{key} has shape {tuple(tensors[key].shape)}, expected {leaf.shape}"
        for key, leaf in wanted.items()
        if key in tensors and tuple(tensors[key].shape) != leaf.shape
    ]
    refuse(
        f"checkpoint {folder} is not of this adapter's training: give checkpoints of the same "
        "configuration",
        reasons,
    )
    theta = model.space.flatten([tensors[key].to(model.device, model.dtype) for key in wanted])
    if not bool(torch.isfinite(theta).all()):
        raise AdapterError(f"checkpoint {folder} holds NaN or infinite weights: give another")
    return theta


def learning_rate(folder: Path) -> float | None:
    """The learning rate that training had at a checkpoint, or None where it is not recorded.

    From `trainer_state.json` (Hugging Face trainers log it; the last entry up to the checkpoint's
    step counts) or `retrain.json` (`unlearn retrain`).
    """
    try:
        if (folder / "trainer_state.json").exists():
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            logged = [
                entry
                for entry in state["log_history"]
                if "learning_rate" in entry and entry["step"] <= state["global_step"]
            ]
            rate = max(logged, key=lambda entry: entry["step"])["learning_rate"] if logged else None
        elif (folder / "retrain.json").exists():
            rate = json.loads((folder / "retrain.json").read_text(encoding="utf-8")).get("lr")
        else:
            return None
        rate = None if rate is None else float(rate)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the training state beside checkpoint {folder} cannot be read: {error!r}"
        ) from error
    if rate is not None and not (np.isfinite(rate) and rate >= 0):
        raise InputError(
            f"checkpoint {folder} records a learning rate of {rate}; expected 0 or more"
        )
    return rate
