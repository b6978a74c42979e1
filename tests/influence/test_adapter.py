"""The one flat order of the LoRA parameters, moving along it and back, and digests."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

import influence
from influence.adapter import ParamSpace
from influence.errors import InputError
from tests.conftest import (
    build_model,
    examples,
)
from tests.helpers import edit_config, edit_weights, save

LLAMA = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_flat_order_is_site_after_site_A_before_B_row_major(kind):
    model = build_model(kind)
    names = [name for name, _ in model.model.named_modules() if name.endswith("lora_A")]
    expected = []
    for name in names:
        site = name.removeprefix("base_model.model.").removesuffix(".lora_A")
        layer = model.model.get_submodule(name.removesuffix(".lora_A"))
        expected += [
            (f"{site}.lora_A", layer.lora_A["default"].weight),
            (f"{site}.lora_B", layer.lora_B["default"].weight),
        ]
    assert [leaf.name for leaf in model.space.leaves] == [name for name, _ in expected]
    assert torch.equal(
        model.snapshot(), torch.cat([weight.detach().reshape(-1) for _, weight in expected])
    )
    assert [leaf.is_A for leaf in model.space.leaves] == [True, False] * len(names)
    assert [leaf.start for leaf in model.space.leaves][1:] == [
        leaf.stop for leaf in model.space.leaves
    ][:-1]


def test_flatten_is_the_inverse_of_split():
    space = ParamSpace.of([("x.lora_A", (2, 5)), ("x.lora_B", (3, 2)), ("y.lora_A", (1, 4))])
    assert space.size == 20
    for shape in [(20,), (7, 20), (2, 3, 20)]:
        flat = torch.arange(math.prod(shape)).reshape(shape).double()
        parts = space.split(flat)
        assert [tuple(part.shape[-2:]) for part in parts] == [(2, 5), (3, 2), (1, 4)]
        assert torch.equal(space.flatten(parts), flat)


def test_the_space_digest_tells_names_shapes_and_order():
    leaves = [("x.lora_A", (2, 5)), ("x.lora_B", (3, 2))]
    digests = {
        ParamSpace.of(leaves).digest,
        ParamSpace.of(leaves[::-1]).digest,
        ParamSpace.of([("z.lora_A", (2, 5)), leaves[1]]).digest,
        ParamSpace.of([("x.lora_A", (5, 2)), leaves[1]]).digest,
    }
    assert len(digests) == 4
    assert ParamSpace.of(list(leaves)).digest in digests


def test_restore_and_moved_come_back_bit_for_bit():
    model = build_model(**LLAMA, dtype=torch.float32)
    theta = model.snapshot()
    delta = (
        torch.randn(model.space.size, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    )
    with model.moved(delta) as moved:
        assert moved is model
        assert torch.equal(model.snapshot(), theta + delta.float())
    assert torch.equal(model.snapshot(), theta)
    with pytest.raises(RuntimeError, match="on the way"), model.moved(delta):
        raise RuntimeError("on the way")
    assert torch.equal(model.snapshot(), theta)
    model.restore(theta * 2)
    assert torch.equal(model.snapshot(), theta * 2)
    snapshot = model.snapshot()
    snapshot.zero_()  # a copy, not a view
    assert torch.equal(model.snapshot(), theta * 2)


def test_restore_refuses_a_vector_of_another_size():
    model = build_model(**LLAMA)
    with pytest.raises(
        InputError, match=rf"a parameter vector of shape \(3,\) was given.*\[{model.space.size}\]"
    ):
        model.restore(torch.zeros(3))


def test_the_digest_tells_weights_and_scalings_but_not_the_folder(tmp_path):
    base, adapter = save(tmp_path, **LLAMA)
    first = influence.load(base, adapter)
    shutil.copytree(adapter, tmp_path / "elsewhere")
    shutil.copytree(base, tmp_path / "base elsewhere")
    second = influence.load(tmp_path / "base elsewhere", tmp_path / "elsewhere")
    assert (second.adapter_digest, second.base_digest) == (first.adapter_digest, first.base_digest)

    edit_config(tmp_path / "elsewhere", lora_alpha=4)
    scaled = influence.load(base, tmp_path / "elsewhere")
    assert scaled.adapter_digest != first.adapter_digest
    assert scaled.base_digest == first.base_digest

    theta = first.snapshot()
    theta[-1] = torch.nextafter(theta[-1], torch.tensor(9.0))
    before = first.adapter_digest, first.base_digest
    first.restore(theta)
    assert first.adapter_digest != before[0]
    assert first.base_digest == before[1]

    edit_weights(base / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    assert influence.load(base, adapter).base_digest != before[1]


def test_the_base_digest_does_not_depend_on_use():
    model = build_model(**LLAMA)
    before = model.base_digest
    influence.check_gradients(model, examples(2))
    model.__dict__.pop("base_digest")
    assert model.base_digest == before


def test_a_padding_token_that_the_base_lacks_is_not_taken():
    model = build_model("llama", layers=1, target_modules=["q_proj"])
    assert model.pad_id == model.tokenizer.pad_token_id
    model.tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert model.tokenizer.pad_token_id == 25
    assert model.pad_id == 0
    assert influence.check_gradients(model, examples(4)).ok
