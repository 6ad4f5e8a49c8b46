"""Next token on the GPU: against the references, and against the host's sampler and top k."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, assert_close, random_input
from model_cases import make_model
from step_cases import use_references

from cpu_kernels import top_k as on_cpu
from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels.sampling import (
    blocks_of,
    greedy,
    greedy_ref,
    log_sum_exp,
    log_sum_exp_ref,
    sample,
    sample_ref,
    top_k,
    top_k_ref,
    top_k_scratch,
)
from hybrid.generation import SamplingSettings
from hybrid.model.ffn import FFNRuntime
from hybrid.model.kv_cache import KVCache, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.step import GpuStep
from hybrid.runtime.sampling import Sampler, candidates
from placement.placement import Placement

NAN, INF = float("nan"), float("inf")


def _greedy(logits: torch.Tensor, dtype: torch.dtype = torch.int32) -> list[int]:
    shape, out = (len(logits), blocks_of(logits.shape[1])), torch.full((len(logits),), -7, dtype=dtype, device=DEVICE)
    scratch = torch.empty(shape, device=DEVICE), torch.empty(shape, dtype=torch.int32, device=DEVICE)
    greedy(logits, *scratch, out)
    expected = torch.empty_like(out)
    greedy_ref(logits, *scratch, expected)
    assert torch.equal(out, expected)
    return out.tolist()


def _top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(len(logits), k, device=DEVICE)
    ids = torch.empty(len(logits), k, dtype=torch.int32, device=DEVICE)
    scratch = torch.empty(top_k_scratch(*logits.shape, k), dtype=torch.int64, device=DEVICE)
    top_k(logits, k, values, ids, scratch)
    return values, ids


def _drawn_from(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_top_k`, from the reference, where drawing is tested: the interpreter takes 0.5 s for the kernel."""
    values = torch.empty(len(logits), k, device=DEVICE)
    ids = torch.empty(len(logits), k, dtype=torch.int32, device=DEVICE)
    top_k_ref(logits, k, values, ids, torch.empty(0))
    return values, ids


def _log_sum_exp(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    shape, out = (len(logits), blocks_of(logits.shape[1])), torch.empty(len(logits), device=DEVICE)
    log_sum_exp(logits, temperature, torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE), out)
    return out


def _each(value: float, tokens: int) -> torch.Tensor:
    return torch.full((tokens,), value, device=DEVICE)


@pytest.mark.parametrize("vocab", [1, 17, 2048, 5001])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_greedy_is_argmax(vocab, dtype):
    logits = random_input(3, vocab)
    assert _greedy(logits, dtype) == logits.argmax(1).tolist()


def test_greedy_takes_the_lowest_of_equals():
    logits = torch.zeros(2, 5001, device=DEVICE)
    logits[1, [4100, 2049, 4999]] = 3.5
    assert _greedy(logits) == [0, 2049]
    assert _greedy(-logits) == [0, 0]


@pytest.mark.parametrize("bad", [NAN, -NAN, INF])
@pytest.mark.parametrize("at", [0, 2050, 5000])
def test_greedy_tells_of_logits_that_are_not_numbers(bad, at):
    logits = random_input(2, 5001)
    logits[0, at] = bad
    assert _greedy(logits) == [-1, int(logits[1].argmax())]


def test_greedy_and_minus_infinity():
    logits = torch.full((2, 2100), -INF, device=DEVICE)
    logits[1, 2099] = -5.0
    assert _greedy(logits) == [-1, 2099]


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (17, 3), (17, 17), (5001, 1), (5001, 40), (5001, 513), (9000, 1024)])
def test_top_k_equals_reference_and_cpu(vocab, k):
    logits = (random_input(2, vocab) * 4).round() / 4 if vocab < 6000 else random_input(2, vocab)  # many equal
    values, ids = _top_k(logits, k)
    expected_values, expected_ids = torch.empty_like(values), torch.empty_like(ids)
    top_k_ref(logits, k, expected_values, expected_ids, torch.empty(0))
    assert torch.equal(ids, expected_ids)
    assert torch.equal(values, expected_values)
    for t in range(2):
        assert ids[t].tolist() == on_cpu.top_k(logits[t].cpu().numpy(), k, WorkerPool(1)).tolist()


def test_top_k_of_many_blocks():
    logits = random_input(1, 70_000)  # three passes: 35 blocks of 64 keys are more than a block of 2048
    assert _top_k(logits, 50)[1][0].tolist() == logits[0].topk(50).indices.tolist()


def test_top_k_orders_zeros_infinities_and_nan():
    logits = torch.tensor([[-INF, -0.0, 0.0, INF, NAN, -1.0, 1.0, -NAN]], device=DEVICE)
    values, ids = _top_k(logits, 8)
    assert ids[0].tolist() == [4, 7, 3, 6, 1, 2, 5, 0]
    assert ids[0].tolist() == on_cpu.top_k(logits[0].cpu().numpy(), 8, WorkerPool(1)).tolist()
    np.testing.assert_array_equal(values[0].cpu(), [NAN, NAN, INF, 1, 0, 0, -1, -INF])


@pytest.mark.parametrize("vocab", [1, 17, 5001])
def test_log_sum_exp(vocab):
    logits, temperature = random_input(3, vocab) * 9, torch.tensor([0.5, 1.0, 1.7], device=DEVICE)
    logits[0, 0] = -INF if vocab > 1 else 2.0
    logits[:, 2048:4096] = -INF
    found, expected = _log_sum_exp(logits, temperature), torch.empty(3, device=DEVICE)
    log_sum_exp_ref(logits, temperature, found, found, expected)
    assert_close(found, expected, 1e-6)


def test_log_sum_exp_of_nan():
    logits = random_input(2, 2100)
    logits[1, 2099] = NAN
    assert _log_sum_exp(logits, _each(1.0, 2)).isnan().tolist() == [False, True]


def _counts(value, tokens):
    return torch.full((tokens,), value, dtype=torch.int32, device=DEVICE)


SETTINGS = [(1.0, 1.0, 0.0), (0.7, 0.9, 0.0), (1.5, 0.5, 0.05), (0.3, 1.0, 0.2), (1.0, 1e-6, 0.0), (0.01, 0.95, 0.0)]


@pytest.mark.parametrize(("temperature", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("k", [1, 17, 40])
@pytest.mark.parametrize("whole", [False, True])
def test_sample_equals_reference(temperature, top_p, min_p, k, whole):
    tokens = 12 if DEVICE == "cuda" else 3  # the interpreter takes 40 ms for one
    logits = random_input(tokens, 300) * 2
    values, ids = _drawn_from(logits, k)
    settings = [_each(value, tokens) for value in (temperature, top_p, min_p)]
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    total = _log_sum_exp(logits, settings[0]) if whole else None
    found, expected = (torch.full((tokens,), -7, dtype=torch.int64, device=DEVICE) for _ in range(2))
    counts = _counts(0 if whole else k, tokens)
    sample(values, ids, counts, *settings, uniform, found, total)
    sample_ref(values, ids, counts, *settings, uniform, expected, total)
    assert found.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where the interpreter divides by a temperature of 0
def test_each_token_has_settings_and_candidates_of_its_own():
    """Among them greedy ones, some of few candidates, and one of the whole vocabulary's nucleus: each as alone."""
    logits = random_input(5, 300) * 2
    values, ids = _drawn_from(logits, 64)
    counts = torch.tensor([1, 5, 0, 40, 1], dtype=torch.int32, device=DEVICE)
    temperature, top_p, min_p = torch.tensor(
        [[0.0, 1.5, 1.0, 0.7, 0.0], [1.0, 1.0, 0.6, 0.9, 1.0], [0.0, 0.0, 0.01, 0.05, 0.0]], device=DEVICE
    )
    uniform = torch.tensor([0.5, 0.99, 0.8, 0.6, 0.0], dtype=torch.float64, device=DEVICE)
    out, alone = _counts(-7, 5), _counts(-7, 1)
    sample(values, ids, counts, temperature, top_p, min_p, uniform, out, _log_sum_exp(logits, temperature))
    for t, count in enumerate(counts.tolist()):
        some, only = slice(t, t + 1), count or 64
        total = None if count else _log_sum_exp(logits[some], temperature[some])
        given = (values[some, :only].contiguous(), ids[some, :only].contiguous(), counts[some])
        sample(*given, temperature[some], top_p[some], min_p[some], uniform[some], alone, total)
        assert out[t] == alone[0] and out[t] in ids[t, :only]
    assert out[0] == ids[0, 0] and out[4] == ids[4, 0] and len({*out[1:4].tolist(), *ids[1:4, 0].tolist()}) > 3


@pytest.mark.parametrize(("temperature", "top_p", "min_p"), SETTINGS)
@pytest.mark.parametrize("top_k_setting", [0, 40])
def test_sample_draws_as_the_host(temperature, top_p, min_p, top_k_setting):
    """Over a sweep of uniform numbers, each id comes as often as the host's probabilities say."""
    logits, points = random_input(1, 300) * 3, 100 if DEVICE == "cuda" else 40
    k = top_k_setting or 128
    values, ids = (part.expand(points, -1).contiguous() for part in _drawn_from(logits, k))
    settings = [_each(value, points) for value in (temperature, top_p, min_p)]
    total = None if top_k_setting else _log_sum_exp(logits, settings[0][:1]).expand(points).contiguous()
    uniform = ((torch.arange(points) + 0.5) / points).to(DEVICE)
    out = torch.full((points,), -7, dtype=torch.int32, device=DEVICE)
    sample(values, ids, _counts(top_k_setting, points), *settings, uniform, out, total)
    if total is not None and top_p == 1 and min_p == 0:
        assert out.tolist() == [-1] * points
        return
    chosen = SamplingSettings(temperature=temperature, top_k=top_k_setting, top_p=top_p, min_p=min_p)
    host_ids, host_p = candidates(logits[0].cpu(), chosen, WorkerPool(1))
    order = host_p.argsort(descending=True, stable=True)
    counts = torch.bincount(out.cpu(), minlength=300)[host_ids[order]]
    assert int(counts.sum()) == points
    np.testing.assert_allclose(counts, host_p[order] * points, atol=1.01)
    assert out.tolist() == sorted(out.tolist(), key=host_ids[order].tolist().index)


def test_sample_without_the_nucleus_among_the_candidates():
    logits = torch.zeros(3, 300, device=DEVICE)  # each has 1/300
    values, ids = _top_k(logits, 30)
    settings = _each(1.0, 3), torch.tensor([0.0883, 0.11, 1.0], device=DEVICE), _each(0.0, 3)
    out = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    sample(values, ids, _counts(0, 3), *settings, _each(0.999, 3), out, _log_sum_exp(logits, settings[0]))
    assert out.tolist() == [26, -1, -1]


def test_sample_at_the_ends_of_uniform():
    values, ids = torch.tensor([[2.0, 1.0]] * 3, device=DEVICE), torch.tensor([[8, 3]] * 3, dtype=torch.int32)
    settings, out = (_each(1.0, 3), _each(1.0, 3), _each(0.0, 3)), torch.empty(3, dtype=torch.int32, device=DEVICE)
    uniform = torch.tensor([0.0, 0.9999999999, 1.0], dtype=torch.float64, device=DEVICE)
    sample(values, ids.to(DEVICE), _counts(2, 3), *settings, uniform, out)
    assert out.tolist() == [8, 3, 3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where the interpreter computes with NaN
@pytest.mark.parametrize("whole", [False, True])
def test_sample_temperature_zero_and_broken_logits(whole):
    logits = torch.tensor([[1.0, 5.0, 2.0], [1.0, NAN, 2.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]], device=DEVICE)
    values, ids = _top_k(logits, 3)
    for temperature in (0.0, 1.0):
        settings = _each(temperature, 4), _each(0.5, 4), _each(0.0, 4)
        total = _log_sum_exp(logits, settings[0]) if whole else None
        out = torch.full((4,), -7, dtype=torch.int32, device=DEVICE)
        sample(values, ids, _counts(0 if whole else 3, 4), *settings, _each(0.5, 4), out, total)
        assert out.tolist() == [1, -1, -1, -1]


def test_refuses_wrong_shapes_and_types():
    logits, out = random_input(2, 300), torch.empty(2, dtype=torch.int32, device=DEVICE)
    scratch, scratch_ids = torch.empty(2, 1, device=DEVICE), torch.empty(2, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"f32 \[t, vocab\]"):
        greedy(logits.T, scratch, scratch_ids, out)
    with pytest.raises(ValueError, match="scratch_ids"):
        greedy(logits, scratch, scratch, out)
    with pytest.raises(ValueError, match=r"int32 or torch\.int64"):
        greedy(logits, scratch, scratch_ids, scratch[:, 0])
    values, ids = _top_k(logits, 5)
    for k in (0, 301, 1025):
        with pytest.raises(ValueError, match="k of 1 to 300"):
            top_k(logits, k, values, ids, torch.empty(0))
    with pytest.raises(ValueError, match="int64 scratch of"):
        top_k(logits, 5, values, ids, torch.empty(7, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="temperature"):
        sample(values, ids, _counts(5, 2), _each(1.0, 1), _each(1.0, 2), _each(0.0, 2), _each(0.5, 2), out)
    with pytest.raises(ValueError, match="temperature"):
        log_sum_exp(logits, _each(1.0, 3), scratch, scratch, scratch[:, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model("llama-relu", folder, num_hidden_layers=1, vocab_size=67, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return folder


@pytest.mark.parametrize("head_on_gpu", [True, False])
def test_the_step_takes_the_largest_of_its_logits(folder, head_on_gpu, monkeypatch):
    use_references(monkeypatch)
    monkeypatch.setattr("hybrid.runtime.gpu.sampler.greedy", greedy)
    opened = ModelFolder.open(folder)
    spec, pool = opened.spec, WorkerPool(1)
    placement = replace(Placement.all_hot(spec), head_on_gpu=head_on_gpu)
    placement.hot[:] = 40
    runtime = FFNRuntime("exact", pool, spec.d_model, spec.d_ff)
    model, counting = opened.build(runtime, placement, None), DeviceArena(torch.device(DEVICE))
    cache = KVCache(spec, 8)
    GpuStep(model, cache, runtime, placement, counting)
    step = GpuStep(model, cache, runtime, placement, DeviceArena(torch.device(DEVICE), counting.used))
    try:
        greedy_one = [Sampler(SamplingSettings(temperature=0))]
        expected = [int(step.run([Row(cache, token)], "exact").argmax()) for token in (5, 41)]
        cache.truncate(0)
        assert [step.next_tokens([Row(cache, token)], greedy_one, "exact")[0] for token in (5, 41)] == expected
        assert cache.length == 2
        if head_on_gpu:
            step.weights.norms[-1].weight.fill_(NAN)
            with pytest.raises(RuntimeError, match="logits are not numbers"):
                step.next_tokens([Row(cache, 7)], greedy_one, "exact")
    finally:
        step.rest()
        pool.close()
