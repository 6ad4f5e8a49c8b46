"""Prefill on the GPU against the CPU's, for families, weights, placements and both ways of the cold neurons."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from packed_cases import pack

from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels import gemv, norm, prefill, rope
from hybrid.arena import DeviceArena
from hybrid.ffn import FFNRuntime
from hybrid.gpu_prefill import GpuPrefill
from hybrid.gpu_weights import GpuWeights
from hybrid.kv_cache import KVCache
from hybrid.loader import ModelFolder
from placement.placement import Placement

pytest.importorskip("transformers")
VOCAB, CAPACITY = 131, 28
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """A prompt fills several chunks, pieces of them, and blocks of the KV cache."""
    monkeypatch.setattr("hybrid.kv_cache.BLOCK_SIZE", 8)
    monkeypatch.setattr("hybrid.gpu_prefill.CHUNK", 11)
    monkeypatch.setattr("hybrid.gpu_prefill.WIDE", 5)


@pytest.fixture
def _references(monkeypatch):
    """Without a GPU, kernels' references in their place, which are tested against them elsewhere: Triton's interpreter
    takes 20 s for a prompt."""
    if DEVICE == "cuda":
        return
    for module, names in (
        ("gpu_gemm", {prefill: ("split", "widen")}),
        (
            "gpu_prefill",
            {prefill: ("activate_product", "causal_softmax"), norm: ("residual_norm",), rope: ("rope",)}
            | {gemv: ("gemv",)},
        ),
    ):
        for source, kernels in names.items():
            for kernel in kernels:
                monkeypatch.setattr(f"hybrid.{module}.{kernel}", getattr(source, f"{kernel}_ref"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folder of a case in a stored type, made once."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("models") / f"{name}-{dtype}"
            if dtype == "f32":
                make_model(name, made[name, dtype])
            else:
                pack(get(name, "f32"), made[name, dtype], dtype)
        return made[name, dtype]

    return get


class Case:
    """A model placed by `share` of hot neurons, with `on_cpu` layers on the CPU, and its prefill."""

    def __init__(self, folder, share=0.4, on_cpu=(), head=True, streams=lambda tokens, layer: True, few=0):
        opened = ModelFolder.open(folder)
        spec = opened.spec
        placed = replace(Placement.all_hot(spec), head_on_gpu=head)  # packed models have their neurons in this order
        placed.hot[:] = round(share * spec.d_ff)
        placed.hot[list(on_cpu)], placed.layer_on_gpu[list(on_cpu)] = 0, False
        self.runtime = FFNRuntime("dense", WorkerPool(2), spec.d_model, spec.d_ff, few=few)
        self.model = opened.build(self.runtime, placed, None)
        self.cache, self.placed, self.streams = KVCache(spec, CAPACITY), placed, streams
        counting = DeviceArena(torch.device(DEVICE))
        self.prefill(counting)
        self.arena = DeviceArena(torch.device(DEVICE), counting.used)
        self.prefill = self.prefill(self.arena)

    def prefill(self, arena):
        weights = GpuWeights.take(arena, self.model, self.placed, self.cache)
        found = self.model.rotation(torch.arange(CAPACITY)) or (None, None)
        angles = [None if angle is None else arena.put("angles", angle[:, 0].contiguous()) for angle in found]
        return GpuPrefill(self.model, weights, self.cache, self.runtime, arena, self.streams, tuple(angles))

    def expected(self, tokens):
        hidden = self.model(torch.tensor(tokens), KVCache(self.model.spec, CAPACITY))
        return self.model.logits(hidden[-1:])[0]


def some_tokens(count, seed=1):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check(case, tokens, tolerance=TOLERANCE):
    """Read in two calls, the second of which goes on in the middle of a block."""
    case.prefill.read(tokens[:3])
    found, expected = case.prefill.read(tokens[3:]), case.expected(tokens)
    assert case.cache.length == len(tokens)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"relative error {error:.2e}"


FAMILIES = ("llama-relu", "llama-tied-mha-bias", "mistral-window", "qwen2-window", "qwen3", "opt", "opt-gelu-untied")


def test_kernels(stored):
    """The kernels themselves, in the interpreter where there is no GPU, on one short prompt."""
    case = Case(stored("mistral-window", "bf16"))
    check(case, some_tokens(9))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, stored):
    check(Case(stored(name, "f32")), some_tokens(25))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("dtype", ["bf16", "f16", "int8", "int4"])
@pytest.mark.parametrize("streamed", [True, False])
def test_stored_types(dtype, streamed, stored):
    case = Case(stored("llama-relu", dtype), streams=lambda tokens, layer: streamed)
    assert case.model.ffns[0].up.dtype == dtype
    check(case, some_tokens(20))
