"""The decode step over two devices against the CPU's: families, strategies, placements, batches and stored types."""

import pytest
import torch
from gpu_cases import DEVICE
from step_cases import CAPACITY, StepCase, relative_error, some_tokens, tiny_model, use_references

from hybrid import SamplingSettings
from hybrid.model.ffn import FFNCounters
from hybrid.model.kv_cache import Row
from hybrid.runtime.sampling import Sampler

pytest.importorskip("transformers")
FLOATS, BLOCKS, INT8_KV = 5e-6, 2e-3, 2e-3  # relative; blocks add the rounding of the CPU's inputs to 16 bits


KERNELS = [{"share": 0.4}, {"share": 0.4, "zero_copy": 20}, {"on_cpu": (0,), "head": False}]


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr("hybrid.model.kv_cache.BLOCK_SIZE", 8)


@pytest.fixture
def _references(monkeypatch):
    use_references(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def check(case, strategy, tokens=None, tolerance=FLOATS):
    """Logits after each token, one by one, from the empty cache."""
    for token in some_tokens(9) if tokens is None else tokens:
        expected = case.expected([token], strategy)
        error = relative_error(case.run(token, strategy), expected)
        assert error < tolerance, f"relative error {error:.2e} at token {case.cache.length}"
        case.step.rest()
    assert case.cache.length == case.own_cache.length
    case.cache.truncate(0)
    case.own_cache.truncate(0)


@pytest.mark.parametrize("placed", [*KERNELS, {"share": 1.0, "kv": "int8"}])
def test_the_kernels_themselves(models, placed):
    """In the interpreter where there is no GPU: a batch and one token after it."""
    folder, tokens = tiny_model("llama-relu", models, layers=1), some_tokens(3)
    case = StepCase(folder, threads=1 if DEVICE == "cpu" else 2, predictors=True, **placed)
    expected = case.expected(tokens, "learned")
    tolerance = INT8_KV if "kv" in placed else FLOATS
    assert relative_error(case.few(tokens, "learned"), expected) < tolerance
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("placed", [{"share": 1.0}, {"share": 0.4, "on_cpu": (0,)}])
def test_keys_and_values_in_int8(models, placed):
    """One device's rounding of a value may fall a code beside the other's, where it lies near a half."""
    case = StepCase(tiny_model("llama-relu", models), kv="int8", **placed)
    check(case, "exact", tolerance=INT8_KV)
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize(
    "name",
    [
        *("llama-relu", "llama-tied-mha-bias", "mistral-window", "opt", "qwen3"),
        *("prosparse", "bamboo", "nemotron", "nanochat", "persimmon", "falcon", "falcon-grouped"),
        *("smollm3", "granite", "olmo2", "gemma3"),
    ],
)
def test_families_and_strategies(models, name):
    case = StepCase(tiny_model(name, models), predictors=True)
    for strategy in ("dense", "exact", "learned"):
        check(case, strategy)
    case.close()


PLACEMENTS = [
    {"share": 0.0},
    {"share": 1.0},
    {"share": 1.0, "head": False},
    {"share": 0.4, "on_cpu": (0,)},
    {"share": 0.4, "on_cpu": (1,), "head": False},
    {"share": 0.0, "on_cpu": (0, 1)},
    {"share": 0.4, "zero_copy": 20},
    {"share": 0.4, "zero_copy": 1000},
]


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama-relu", "opt", "falcon", "gemma3"])
def test_placements(models, name, placed):
    case = StepCase(tiny_model(name, models), predictors=True, **placed)
    check(case, "learned" if name == "opt" else "exact", some_tokens(4))
    check(case, "exact" if name == "opt" else "learned", some_tokens(2))
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks(models, dtype):
    case = StepCase(tiny_model("llama-relu", models, dtype))
    check(case, "exact", tolerance=BLOCKS)
    case.close()


@pytest.mark.usefixtures("_references")
@pytest.mark.parametrize(
    "placed", [{"share": 0.4}, {"share": 0.4, "zero_copy": 20}, {"share": 0.4, "on_cpu": (1,), "head": False}]
)
@pytest.mark.parametrize("strategy", ["exact", "learned"])
def test_batches_are_tokens_one_by_one(models, placed, strategy):
    """15 tokens go through as 8, 4, 2 and 1 rows, each of which is checked."""
    case, tokens = StepCase(tiny_model("mistral-window", models), predictors=True, **placed), some_tokens(15)
    expected = torch.stack([case.expected([token], strategy) for token in tokens])
    at = 0
    for count in (8, 4, 2, 1):
        found = case.few(tokens[at : at + count], strategy)
        at += count
        assert relative_error(found, expected[at - 1]) < FLOATS
        assert relative_error(case.step._logits[:count], expected[at - count : at]) < FLOATS
    assert case.cache.length == 15
    case.cache.truncate(0)
    assert relative_error(case.few(tokens, strategy), expected[-1]) < FLOATS
    case.close()


@pytest.mark.usefixtures("_references")
def test_the_last_token_of_the_context(models):
    case, tokens = StepCase(tiny_model("llama-relu", models, layers=1), on_cpu=(0,)), some_tokens(CAPACITY)
    expected = case.expected(tokens, "exact")
    assert relative_error(case.few(tokens, "exact"), expected) < FLOATS
    assert case.cache.length == CAPACITY
    case.close()


@pytest.mark.usefixtures("_references")
def test_forgotten_tokens_are_overwritten(models):
    case, tokens = StepCase(tiny_model("llama-relu", models)), some_tokens(12)
    expected = case.expected(tokens, "exact")
    case.few([*tokens[:6], 3, 4, 5], "exact")
    case.cache.truncate(6)
    assert relative_error(case.few(tokens[6:], "exact"), expected) < FLOATS
    case.close()


@pytest.mark.usefixtures("_references")
def test_greedy_is_the_largest_logit(models):
    greedy = Sampler(SamplingSettings(temperature=0))
    for head in (True, False):
        case, tokens = StepCase(tiny_model("llama-relu", models), head=head), some_tokens(4)
        for token in tokens:
            expected = int(case.expected([token], "exact").argmax())
            assert case.step.next_tokens([Row(case.cache, token)], [greedy], "exact") == [expected]
            case.step.rest()
        case.close()


@pytest.mark.usefixtures("_references")
def test_counts_of_the_learned_strategy(models):
    """Neurons that predictors name, by where they are; of several rows those of all of them, for each."""
    case, tokens = StepCase(tiny_model("llama-relu", models), predictors=True), some_tokens(3)
    case.expected(tokens, "learned")
    truth, case.runtime.counters = case.runtime.counters, FFNCounters()
    case.few(tokens[:1], "learned")
    case.few(tokens[1:2], "learned")
    case.few(tokens[2:], "learned")
    found = case.runtime.counters
    assert (found.neurons, found.computed) == (truth.neurons, truth.computed)
    assert 0 < found.fired_hot < found.fired == found.computed == found.union and found.ffn_seconds > 0
    case.few(tokens, "learned")
    assert found.computed - truth.computed == 3 * (found.union - truth.union)
    assert found.neurons == 2 * truth.neurons > found.computed > 0
    case.close()


@pytest.mark.usefixtures("_references")
def test_loading_the_kernels_changes_nothing(models):
    case, tokens = StepCase(tiny_model("llama-relu", models)), some_tokens(5)
    expected = case.expected(tokens, "exact")
    case.step.load_kernels("exact")
    case.few(tokens[:3], "exact")
    case.step.load_kernels("exact")
    assert relative_error(case.few(tokens[3:], "exact"), expected) < FLOATS
    case.close()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs need an NVIDIA GPU")
@pytest.mark.parametrize("strategy", ["exact", "learned"])
def test_a_replayed_graph_equals_the_kernels_launched_one_by_one(models, strategy):
    """Bit for bit, for every batch size, and again when replayed."""
    case, tokens = StepCase(tiny_model("llama-relu", models), predictors=True, on_cpu=(1,)), some_tokens(8)
    for count in (1, 2, 4, 8):
        rows = [Row(case.cache, token) for token in tokens[:count]]
        case.step._workers.start(strategy)
        case.step._embed(rows, count)
        case.step._launch(strategy, count)
        torch.cuda.synchronize()
        eager = case.step._buffers.logits[:count].cpu()
        for _ in range(3):
            case.cache.truncate(0)
            assert torch.equal(case.step.run(rows, strategy), eager)
        case.cache.truncate(0)
    case.close()
