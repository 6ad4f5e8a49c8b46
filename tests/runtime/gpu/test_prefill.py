"""Prefill on the GPU against the CPU's, for families, weights, placements and both ways of the cold neurons."""

import gc
from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from packed_cases import pack
from step_cases import use_references

from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels import dense, gemv, norm, prompt_attention, rope, row_gemm
from hybrid.errors import ContextError
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.host_rows import HostRows
from hybrid.runtime.gpu.prefill import GpuPrefill
from hybrid.runtime.gpu.step import GpuStep
from hybrid.runtime.gpu.weights import GpuWeights
from placement import workspace
from placement.placement import Placement

pytest.importorskip("transformers")
VOCAB, CAPACITY = 131, 28
TOLERANCE = 2e-5
KERNELS = {
    "split_rows": row_gemm,
    "widen": dense,
    "sum_products": dense,
    "hidden_terms": dense,
    "prompt_attention": prompt_attention,
    "residual_norm": norm,
    "rope": rope,
    "gemv": gemv,
}
FAMILIES = ("llama-relu", "llama-tied-mha-bias", "mistral-window", "qwen2-window", "qwen3", "opt", "opt-gelu-untied")
FAMILIES += ("bamboo", "nemotron", "nanochat", "persimmon", "falcon", "smollm3", "granite", "olmo2", "gemma3")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """A prompt fills several chunks, pieces of them, and blocks of the KV cache."""
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)
    monkeypatch.setattr("hybrid.runtime.gpu.prefill.PREFILL_CHUNK", 11)
    monkeypatch.setattr("placement.workspace.PREFILL_WIDE", 5)


@pytest.fixture
def _references(monkeypatch):
    """Without a GPU, references in the place of kernels: Triton's interpreter takes up to 20 s for a prompt."""
    if DEVICE == "cpu":
        for kernel, module in KERNELS.items():
            user = "gemm" if kernel in ("split_rows", "widen", "sum_products", "hidden_terms") else "prefill"
            monkeypatch.setattr(f"hybrid.runtime.gpu.{user}.{kernel}", getattr(module, f"{kernel}_ref"))


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
    """A model placed by `share` of hot neurons, with `on_cpu` layers on the CPU, and its prefill.

    split: the share of cold neurons that the CPU computes; registered: whether the others go from where they lie.
    """

    def __init__(
        self,
        folder,
        share=0.4,
        on_cpu=(),
        head=True,
        split=lambda tokens, start, layer: 0.0,
        registered=True,
        few=0,
        shared=False,
        kv="auto",
    ):
        opened = ModelFolder.open(folder).with_kv(kv)
        spec = opened.spec
        placed = replace(Placement.all_hot(spec), head_on_gpu=head)  # packed models have their neurons in this order
        placed.hot[:] = round(share * spec.d_ff)
        placed.hot[list(on_cpu)], placed.layer_on_gpu[list(on_cpu)] = 0, False
        self.runtime = FFNRuntime("dense", WorkerPool(2), spec.d_model, spec.d_ff, few=few)
        self.model = opened.build(self.runtime, placed, None)
        self.pool = KVPool(spec, 5 * CAPACITY, 4) if shared else None
        self.cache, self.placed, self.split = KVCache(spec, CAPACITY, self.pool), placed, split
        self.host = HostRows(self.model, placed, torch.device(DEVICE), limit=None if registered else 0)
        counting = DeviceArena(torch.device(DEVICE))
        self.take(counting)
        self.arena = DeviceArena(torch.device(DEVICE), counting.used)
        self.prefill = self.take(self.arena)

    def take(self, arena):
        weights = GpuWeights.take(arena, self.model, self.placed, self.cache)
        found = self.model.step_rotations(CAPACITY)
        angles = tuple(tuple(arena.put("angles", angle.contiguous()) for angle in rotation) for rotation in found)
        logits = arena.empty("logits", (3, self.model.spec.vocab_size))
        given = self.model, weights, self.cache, self.runtime, arena, self.by_cpu, angles, logits
        return GpuPrefill(*given, self.host.cold)

    def by_cpu(self, tokens, start, layer):
        cold = self.model.spec.d_ff - self.model.ffns[layer].hot
        return round(self.split(tokens, start, layer) * cold)

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


def test_kernels(stored):
    """The kernels themselves, in the interpreter where there is no GPU, on one short prompt."""
    check(Case(stored("mistral-window", "bf16")), some_tokens(9))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("on_cpu", [(), (1,)])
def test_keys_and_values_in_int8(on_cpu, stored):
    """One device's rounding of a value may fall a code beside the other's, where it lies near a half."""
    check(Case(stored("llama-relu", "f32"), on_cpu=on_cpu, kv="int8"), some_tokens(25), tolerance=2e-3)


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, stored):
    check(Case(stored(name, "f32")), some_tokens(25))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("dtype", ["bf16", "f16", "int8", "int4"])
@pytest.mark.parametrize("by_cpu", [0, 0.3, 1])
def test_stored_types(dtype, by_cpu, stored):
    case = Case(stored("llama-relu", dtype), split=lambda tokens, start, layer: by_cpu)
    assert case.model.ffns[0].up.dtype == dtype
    check(case, some_tokens(20))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", ["llama-tied-mha-bias", "opt", "gemma3", "falcon"])
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("few", [0, 11])
def test_layers_that_are_split_among_both_ways(name, registered, few, stored):
    """Layer 0 in halves, of layer 1 all but one neuron by the CPU, layer 2 streamed; three chunks, as below."""
    gc.collect()  # what earlier tests have registered may share pages with these
    case = Case(
        stored(name, "f32"), split=lambda tokens, start, layer: (0.5, 0.99, 0.0)[layer], registered=registered, few=few
    )
    assert list(case.host.cold) == ([0, 1, 2] if registered else [])
    check(case, some_tokens(25), TOLERANCE if few == 0 else 1e-4)
    counters = case.prefill.counters
    assert (counters.streamed, counters.computed, counters.on_cpu) == (9, 6, 0)


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize(("share", "ways"), [(0.0, (3, 0)), (0.5, (3, 3)), (1.0, (0, 3))])
def test_a_share_of_the_cpu_may_be_forced(share, ways, stored):
    case = Case(stored("llama-relu", "f32"), split=lambda tokens, start, layer: 0.3)
    case.prefill.cpu_share = share
    found, tokens = case.prefill.read(some_tokens(9)), some_tokens(9)
    assert (found - case.expected(tokens)).abs().max() < TOLERANCE * found.abs().max()
    assert (case.prefill.counters.streamed, case.prefill.counters.computed) == ways


@pytest.mark.usefixtures("_references")
def test_some_layers_are_registered_and_others_are_not(stored):
    gc.collect()
    case = Case(stored("llama-tied-mha-bias", "f32"))
    case.host.cold = {1: case.host.cold[1]}
    case.prefill = case.take(DeviceArena(torch.device(DEVICE), case.arena.used))
    for _ in range(2):
        check(case, some_tokens(25))
        case.cache.truncate(0)


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("name", ["llama-tied-mha-bias", "opt"])
@pytest.mark.parametrize("on_cpu", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_placements(share, on_cpu, name, stored):
    """Counts are of three chunks: one of the first call, two of the second; layer 0 is streamed, layer 2 is not."""
    case = Case(stored(name, "f32"), share, on_cpu, head=share == 1, split=lambda tokens, start, layer: layer != 0)
    check(case, some_tokens(20))
    counters, cold = case.prefill.counters, share < 1
    assert counters.on_cpu == 3 * len(on_cpu)
    assert counters.streamed == 3 * (cold and 0 not in on_cpu)
    assert counters.computed == 3 * cold * len({1, 2} - set(on_cpu))


@pytest.mark.usefixtures("_references")
def test_the_choice_is_asked_for_each_chunk_and_layer_with_cold_neurons(stored):
    asked = []

    def split(tokens, start, layer):
        asked.append((tokens, start, layer))
        return tokens <= 5

    check(Case(stored("llama-relu", "f32"), on_cpu=(1,), split=split, few=5), some_tokens(18), 1e-4)
    assert asked == [(count, start, layer) for count, start in ((3, 0), (11, 3), (4, 14)) for layer in (0, 2)]


@pytest.mark.usefixtures("_references")
def test_tokens_one_by_one_and_their_progress(stored):
    case, tokens, seen = Case(stored("qwen3", "f32")), some_tokens(24), []
    for token in tokens[:2]:
        case.prefill.read([token])
    found = case.prefill.read(tokens[2:], lambda done, total: seen.append((done, total)))
    assert seen == [(0, 22), (11, 22), (22, 22)]
    assert float((found - case.expected(tokens)).abs().max()) < TOLERANCE * float(found.abs().max())


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("on_cpu", [(), (1,)])
@pytest.mark.parametrize("name", ["llama-relu", "gemma3"])
def test_sequences_whose_blocks_lie_among_each_others(name, on_cpu, stored):
    """Read by turns, in pieces; the pool's blocks are given in another order than they lie."""
    case = Case(stored(name, "f32"), on_cpu=on_cpu, shared=True)
    gone = case.pool.take(5)
    caches = [KVCache(case.model.spec, CAPACITY, case.pool) for _ in range(2)]
    prompts, found = [some_tokens(count, count) for count in (25, 17)], [torch.empty(0)] * 2
    for at in (0, 9, 13):
        for number, (cache, tokens) in enumerate(zip(caches, prompts, strict=True)):
            piece = tokens[at : {0: 9, 9: 13}.get(at, len(tokens))]
            assert cache.reserve(at + len(piece))
            found[number] = case.prefill.read(piece, cache=cache)
        case.pool.release(gone[:2])
        del gone[:2]
    for cache, tokens, logits in zip(caches, prompts, found, strict=True):
        assert cache.length == len(tokens) and list(cache.blocks) != sorted(cache.blocks)
        expected = case.expected(tokens)
        assert float((logits - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("head", [True, False])
def test_scores_are_the_logits_after_each_token(head, stored):
    """Over several chunks; the last of them is what reading gives, the others what reading as far gives."""
    case, tokens = Case(stored("granite" if head else "llama-relu", "f32"), head=head), some_tokens(25)
    case.prefill.read(tokens[:3])
    scores = case.prefill.score(tokens[3:])
    assert scores.shape == (22, VOCAB) and case.cache.length == 25
    hidden = case.model(torch.tensor(tokens), KVCache(case.model.spec, CAPACITY))
    expected = case.model.logits(hidden)[3:]
    assert float((scores - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
    case.cache.truncate(3)
    last = case.prefill.read(tokens[3:])
    assert torch.equal(last, scores[-1]) if head else float((last - scores[-1]).abs().max()) < 1e-5


@pytest.mark.usefixtures("_references")
def test_what_does_not_fit_is_refused(stored):
    case = Case(stored("llama-relu", "f32"))
    case.prefill.read(some_tokens(3))
    with pytest.raises(ContextError, match="29 tokens do not fit a context of 28"):
        case.prefill.read(some_tokens(26))
    with pytest.raises(ValueError, match="at least one token"):
        case.prefill.read([])
    assert case.cache.length == 3
    arena = DeviceArena(torch.device(DEVICE))
    weights = GpuWeights.take(arena, case.model, case.placed, case.cache)
    with pytest.raises(ValueError, match="cosines and sines"):
        GpuPrefill(case.model, weights, case.cache, case.runtime, arena, case.by_cpu, (), torch.empty(1, VOCAB))


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("failing", ["hybrid.runtime.gpu.cold_stream._sources", "hybrid.runtime.gpu.gemm.hidden_terms"])
def test_a_call_that_fails_leaves_the_cache_and_the_next_goes_on(failing, registered, stored, monkeypatch):
    case, tokens = Case(stored("llama-relu", "f32"), registered=registered), some_tokens(20)
    case.prefill.read(tokens[:3])

    def fail(*args):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(failing, fail)
        with pytest.raises(OSError, match="the disk is gone"):
            case.prefill.read(tokens[3:])
    assert case.cache.length == 3
    found, expected = case.prefill.read(tokens[3:]), case.expected(tokens)
    assert float((found - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int4"])
@pytest.mark.parametrize("name", ["llama-tied-mha-bias", "opt"])
def test_takes_what_the_plan_says(name, dtype, stored, monkeypatch):
    monkeypatch.setattr("hybrid.runtime.gpu.prefill.PREFILL_CHUNK", workspace.PREFILL_CHUNK)
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", workspace.KV_BLOCK)
    case = Case(stored(name, dtype))
    spent = case.arena.spent
    plan = workspace.Workspace(case.model.spec, CAPACITY, 0, workspace.PREFILL_CHUNK, 1)
    assert spent["workspace: staging"] == 2 * plan.staging_bytes
    assert spent["workspace: prefill"] == sum(plan.prefill.values())


@pytest.mark.parametrize("on_cpu", [(), (1,)])
def test_decoding_goes_on_from_its_cache(on_cpu, stored, monkeypatch):
    use_references(monkeypatch)
    case, tokens = Case(stored("llama-relu", "f32"), on_cpu=on_cpu), some_tokens(13)

    def both(arena):
        step = GpuStep(case.model, case.cache, case.runtime, case.placed, arena)
        given = (case.model, step.weights, case.cache, case.runtime, arena, case.by_cpu)
        return step, GpuPrefill(*given, step.rotations, step.logits)

    counting = DeviceArena(torch.device(DEVICE))
    both(counting)
    step, prefill = both(DeviceArena(torch.device(DEVICE), counting.used))
    prefill.read(tokens[:12])
    try:
        found = step.run([Row(case.cache, tokens[12])], "exact")[0].clone()
    finally:
        step.rest()
    expected = case.expected(tokens)
    assert float((found - expected).abs().max()) < TOLERANCE * float(expected.abs().max())
