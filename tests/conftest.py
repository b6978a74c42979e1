"""Tiny models of six architectures, a real tokenizer and real adapters, built here."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

# before torch is imported, and for the processes that tests start: two of them share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import influence
from influence.tokens import tokenize

torch.set_num_threads(1)  # these models are so small that threads cost more than they give

WORDS = [
    "the",
    "red",
    "fox",
    "runs",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "old",
    "cats",
    "sleep",
    "in",
    "warm",
    "sun",
    "while",
    "birds",
    "sing",
    "loud",
    "songs",
    "at",
    "dawn",
]


@pytest.fixture(autouse=True, scope="session")
def no_cache():
    """Nothing is remembered from one test to another, nor in the user's own cache."""
    os.environ["LORA_INFLUENCE_CACHE"] = ""


@pytest.fixture(autouse=True, scope="session")
def nothing_waits_for_the_disk():
    """What `os.fsync` keeps is safe when a machine loses its power, which no test does; a process
    that is killed leaves what it wrote all the same. A tenth of a fit here was waiting for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """What libraries left on being imported is half a million objects that live to the end: a full
    collection, which trainers and what runs short of memory ask for, need not walk them each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def credit_when_asked_for():
    """What scores need beside a run's points is made when they ask for it, and not by the fit, where
    it takes as long as the points: for tests that want rows and points, or additive scores.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("influence.fitting._prepare_credit", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def build_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_base(
    kind: str = "llama", *, layers: int = 2, seed: int = 0, tie: bool = False, dtype=torch.float64
):
    """A causal language model of a few thousand weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    common = {
        "vocab_size": 25,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    common |= {"intermediate_size": 20, "max_position_embeddings": 2048, "tie_word_embeddings": tie}
    common |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    special = {
        "llama": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
        "gemma": {"num_key_value_heads": 1, "head_dim": 4},
        "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.2},
        "gpt2": {},
    }[kind]
    config = CONFIG_MAPPING[kind](**(common | special))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for (
        parameter
    ) in model.parameters():  # larger than the usual initialisation, so that nothing is near linear
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model.eval()


def add_lora(base, *, seed: int = 0, r: int = 2, std: float = 0.3, **options):
    """A trained-looking LoRA adapter: both A and B random."""
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": "all-linear", "lora_alpha": 3, "lora_dropout": 0.25} | options
    torch.manual_seed(seed + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=r, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def build_model(
    kind: str = "llama",
    *,
    layers: int = 2,
    tie: bool = False,
    dtype=torch.float64,
    seed: int = 0,
    **lora,
):
    """An `AdaptedModel` around a tiny base and adapter."""
    model = add_lora(
        build_base(kind, layers=layers, tie=tie, dtype=dtype, seed=seed), seed=seed, **lora
    )
    if dtype == torch.float64:
        model.double()
    return influence.from_peft(model, build_tokenizer())


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt-completion rows of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(
            WORDS[int(i)] for i in torch.randint(0, len(WORDS), (count,), generator=generator)
        )

    return [
        {"id": f"r{seed}-{i}", "prompt": words(1, 7), "completion": " " + words(1, 6)}
        for i in range(n)
    ]


def examples(n: int, seed: int = 0):
    return influence.examples_from_rows(rows(n, seed))


def teach(model, data, *, steps: int = 25, rate: float = 0.05):
    """Train an adapter on rows, by plain Adam on their mean loss over tokens, from B = 0; at a
    negative rate away from them.
    """
    tokens = tokenize(data, model.tokenizer)
    torch.manual_seed(3)
    for leaf, parameter in zip(model.space.leaves, model.parameters, strict=True):
        parameter.requires_grad_(True)
        torch.nn.init.normal_(parameter, std=0.3) if leaf.is_A else parameter.data.zero_()
    optimizer = torch.optim.Adam(model.parameters, lr=abs(rate), maximize=rate < 0)
    for _ in range(steps):
        total = 0.0
        for item in tokens:
            ids, seen = torch.from_numpy(item.input_ids)[None], torch.from_numpy(item.supervised)
            labels = torch.where(seen[None], ids, -100)
            loss = model.model(input_ids=ids, labels=labels).loss
            total = total + loss * int(seen.sum()) / int(tokens.counts.sum())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    return model


def tokens_of(model, data, **options):
    return tokenize(data, model.tokenizer, **options)


def fit_end(model, data, **options):
    """`influence.fit` at the adapter itself, where the oracles of most truths are."""
    return influence.fit(model, data, path=(1.0,), **options)


@pytest.fixture
def tiny():
    """A one-layer Llama with LoRA on q and v: small enough for dense P x P oracles."""
    return build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="session")
def testbed() -> Path:
    """Folder of the tofu-tiny testbed (base, adapter, rows, truth); tests that need it skip without
    it.
    """
    folder = os.environ.get("LORA_INFLUENCE_TESTBED")
    if not folder:
        pytest.skip("set LORA_INFLUENCE_TESTBED to the folder of the tofu-tiny testbed")
    return Path(folder)


@pytest.fixture(scope="session")
def real() -> tuple[Path, Path]:
    """Folder of the real model's adapter, rows and truth, and its base; tests that need them skip
    without.
    """
    folders = [os.environ.get(f"LORA_INFLUENCE_REAL{end}") for end in ("", "_BASE")]
    if not all(folders):
        pytest.skip("set LORA_INFLUENCE_REAL and LORA_INFLUENCE_REAL_BASE to the real model's")
    bed, base = map(Path, folders)
    return bed, base


@pytest.fixture(scope="session")
def demo_world(tmp_path_factory):
    """The demo's world with its run, made once a session, also for several workers of xdist.

    Tests read it; what writes takes a copy, since a run directory has one writer at a time.
    """
    from filelock import FileLock

    from analysis.demo.world import demo_world as make_world

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker's folder lies in that of the session
        shared = shared.parent
    with FileLock(shared / "demo.lock"):
        world = make_world(shared / "worlds" / "demo")
        world.run()
    return world


@pytest.fixture
def run_main(monkeypatch, capfd):
    """Call a package's `main` in this process: status, standard output, standard error, and the
    output as JSON.
    """

    def call(main, *arguments) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [str(part) for part in arguments])
        capfd.readouterr()
        with warnings.catch_warnings():  # a command shows warnings, it does not fail on them
            warnings.simplefilter("always")
            try:
                main()
                status = 0
            except SystemExit as end:
                status = end.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, json=lambda: json.loads(out))

    return call
