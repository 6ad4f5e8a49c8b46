"""Strategy proxy on the CPU: the step against torch, over placements, threads and rows; and what is refused."""

from dataclasses import replace

import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from proxy_cases import ffn_ref, proxies_of, weights_of
from step_cases import StepCase, relative_error, some_tokens, tiny_model, use_references

from cpu_kernels.matrix import Matrix
from cpu_kernels.worker_pool import WorkerPool
from hybrid.model.ffn import FFNCounters, FFNRuntime
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.cpu_step import CpuStep
from placement.placement import Placement
from placement.workspace import proxy_bytes

pytest.importorskip("transformers")
CASES = ("mistral-full", "llama-rope-linear", "llama-tied-mha-bias", "opt-gelu-untied")
TOKENS = [7, 90, 3, 55, 21, 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in CASES:
        path = tmp_path_factory.mktemp("model") / name
        make_model(name, path)
        made[name] = ModelFolder.open(path)
    return made


@pytest.fixture(scope="module")
def banks(folders):
    return {name: proxies_of(folder) for name, folder in folders.items()}


def build(folder, bank, threads=1, placement=None):
    runtime = FFNRuntime("proxy", WorkerPool(threads), folder.spec.d_model, folder.spec.d_ff)
    return folder.build(runtime, placement, None, proxies=bank)


def decoded(model, tokens=TOKENS):
    """Logits [t, vocab] of token after token, and the share of neurons that was computed."""
    runtime = model.ffns[0].runtime
    runtime.counters = FFNCounters()
    step = CpuStep(model, KVCache(model.spec, 16), runtime)
    found = torch.stack([step.run(token, "proxy").clone() for token in tokens])
    return found, runtime.counters.computed / runtime.counters.neurons


@pytest.mark.parametrize("name", CASES)
def test_the_ffn_computes_what_passes_exactly_and_nothing_else(folders, banks, name):
    folder, bank = folders[name], banks[name]
    model = build(folder, bank)
    model.ffns[0].runtime.as_decode = True
    x = torch.randn(9, folder.spec.d_model, generator=torch.Generator().manual_seed(0))
    for layer, ffn in enumerate(model.ffns):
        expected = ffn_ref(weights_of(folder, layer), bank.layer(layer), x)
        expected += 0 if ffn.matrices.down_bias is None else ffn.matrices.down_bias
        torch.testing.assert_close(ffn(x), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_step_equals_the_model_token_by_token(folders, banks, name):
    model = build(folders[name], banks[name])
    found, share = decoded(model)
    runtime = model.ffns[0].runtime
    runtime.as_decode, runtime.counters = True, FFNCounters()
    expected = model.logits(model(torch.tensor(TOKENS)))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert share == pytest.approx(runtime.counters.computed / runtime.counters.neurons) and 0.3 < share < 0.7
    dense = model.logits(plain(model)(torch.tensor(TOKENS)))
    assert float((found - dense).abs().max() / dense.abs().max()) > 1e-3  # something was left out


def plain(model):
    model.ffns[0].runtime.as_decode = False
    return model


def test_same_logits_for_any_threads_and_placement(folders, banks):
    folder, bank = folders["llama-tied-mha-bias"], banks["llama-tied-mha-bias"]
    truth, share = decoded(build(folder, bank))
    for threads in (2, 3):
        found, _ = decoded(build(folder, bank, threads))
        assert torch.equal(found, truth)
    placed, placed_share = decoded(build(folder, bank, 2, Placement.random(folder.spec, 0.4, 0)))
    assert float((placed - truth).abs().max() / truth.abs().max()) < 1e-4 and placed_share == share


@pytest.mark.parametrize(("share", "computed"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_pass_and_none(folders, share, computed):
    folder = folders["mistral-full"]
    bank = proxies_of(folder, share)
    if share == 1.0:
        bank = bank.with_thresholds([1e30] * folder.spec.n_layers)
    found, seen = decoded(build(folder, bank))
    assert seen == computed
    if share == 0.0:
        model = plain(build(folder, bank))
        dense = model.logits(model(torch.tensor(TOKENS)))
        assert float((found - dense).abs().max() / dense.abs().max()) < 1e-4


def test_rows_of_several_sequences_get_what_they_get_alone(folders, banks):
    model = build(folders["mistral-full"], banks["mistral-full"], 2)
    runtime, pool = model.ffns[0].runtime, KVPool(model.spec, 64, 4)
    caches = [KVCache(model.spec, 16, pool) for _ in range(3)]
    step = CpuStep(model, caches[0], runtime)
    for cache in caches:
        assert cache.reserve(2)
    both = step.rows([Row(cache, token) for cache, token in zip(caches, TOKENS, strict=False)], "proxy").clone()
    for token, row in zip(TOKENS, both, strict=False):
        alone, _ = decoded(model, [token])
        assert torch.equal(alone[0], row)


def test_a_proxy_of_other_blocks_is_refused_by_the_step(folders, banks):
    folder = folders["mistral-full"]
    model = build(folder, banks["mistral-full"])
    view = model.ffns[0].proxy
    wide = Matrix.of(torch.randn(view.up.shape, generator=torch.Generator().manual_seed(0)), "int8")
    model.ffns[0].proxy = replace(view, gate=wide, up=wide)
    with pytest.raises(ValueError, match="copies in int4, got int8"):
        CpuStep(model, KVCache(model.spec, 16), model.ffns[0].runtime)


class ProxyCase(StepCase):
    """A step over two devices whose neurons proxies name; `StepCase` sets nothing up for those."""

    def prepare(self, folder):
        bank = proxies_of(folder)
        folder.use_proxies(self.model.ffns, bank, self.placement.order)


PLACEMENTS = [
    {"share": 0.0},
    {"share": 1.0},
    {"share": 0.4, "on_cpu": (1,), "head": False},
    {"share": 0.4, "zero_copy": 20},
]


@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("name", ["mistral-full", "llama-tied-mha-bias", "opt-gelu-untied"])
def test_two_devices_compute_what_the_cpu_does(tmp_path_factory, monkeypatch, name, placed):
    use_references(monkeypatch)
    case = ProxyCase(tiny_model(name, tmp_path_factory.getbasetemp()), **placed)
    for token in some_tokens(4):
        expected = case.expected([token], "proxy")
        assert relative_error(case.run(token, "proxy"), expected) < 2e-5
        case.step.rest()
    case.close()


@pytest.mark.parametrize("name", ["mistral-full", "llama-tied-mha-bias", "opt-gelu-untied"])
def test_proxies_take_the_bytes_that_are_planned(tmp_path_factory, name):
    case = ProxyCase(tiny_model(name, tmp_path_factory.getbasetemp()))
    spec = case.model.spec
    assert case.arena.spent["proxies"] == spec.n_layers * proxy_bytes(spec)
    case.close()


def test_the_kernels_themselves(tmp_path_factory):
    """In the interpreter where there is no GPU: a batch of three tokens."""
    tokens = some_tokens(3)
    folder = tiny_model("mistral-full", tmp_path_factory.getbasetemp(), layers=1)
    case = ProxyCase(folder, threads=1 if DEVICE == "cpu" else 2, zero_copy=20)
    expected = case.expected(tokens, "proxy")
    assert relative_error(case.few(tokens, "proxy"), expected) < 2e-5
    case.close()
