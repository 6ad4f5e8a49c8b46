"""Predicted seconds of a prompt: parts worked out by hand, chunks, layers here and there."""

from dataclasses import replace

import numpy as np
import pytest
from placement_cases import ROUND_HARDWARE, small_spec

from placement import prompt
from placement.plan import Choice
from placement.prefill import ColdPrefill
from placement.prompt import PromptTime
from profiler.common.hardware import HardwareProfile

# QKV and output of one head of 4: 64 weights, 256 bytes, and norms; a neuron has 48 bytes.
HARDWARE = replace(ROUND_HARDWARE, cpu_gemm_flops=1e6, gpu_gemm_flops=1e7, gpu_launch_seconds=1e-3)
SEVEN_B = small_spec(
    n_layers=32, d_model=4096, d_ff=11008, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=32000, dtype="bf16",
    max_context=8192,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_calls(monkeypatch):
    for name in ("_CALL_SECONDS", "_PROMPT_SECONDS", "_EMBEDDED"):
        monkeypatch.setattr(prompt, name, 0.0)


def time_of(hot, on_gpu, head=True, spec=None, hardware=HARDWARE, **given):
    spec = spec or small_spec(n_layers=len(hot), d_ff=1000)
    choice = Choice(np.array(hot), np.array(on_gpu), head)
    return PromptTime(ColdPrefill(hardware, spec, **given), choice, range(spec.n_layers))


def test_a_layer_on_the_gpu_is_attention_and_neurons():
    time, tokens = time_of([1000], [True]), 10
    projections = max(2 * tokens * 64 / 1e7, time.cost.spec.layer_dense_bytes / 1e7)
    attention = 4 * tokens * (tokens / 2) * 4 / 1e7
    ffn = 2 * tokens * 12 * 1000 / 1e7
    launches, sent, head = prompt._LAUNCHES * 1e-3, 4 * tokens * 4 / 1e6, 10 * 16 / 1e7 + 1e-3
    assert time.seconds(tokens) == pytest.approx(projections + attention + ffn + launches + sent + head)


def test_a_layer_on_the_cpu_reads_its_weights_for_every_512_tokens():
    slow = replace(HARDWARE, cpu_gemm_flops=1e12)
    spec = small_spec(d_ff=1000, max_context=2048)
    one, three = (time_of([0], [False], False, spec, slow).seconds(tokens) for tokens in (512, 1500))
    read = (spec.layer_dense_bytes + 1000 * 48) / 1e6
    fixed = 10 * 16 / 1e6 + 1e-3 + 1e-3 + 1e-4  # head, its hand-off and the layer's
    exchanged = (1 + 2) * 16 / 1e6  # of a token: embedded, to the host and back
    assert one == pytest.approx(read + fixed + 512 * exchanged, rel=1e-3)
    assert three == pytest.approx(3 * read + fixed + 1500 * exchanged, rel=2e-3)


def test_the_cpu_alone_hands_nothing_over():
    fast, spec = replace(HARDWARE, cpu_gemm_flops=1e12), small_spec(n_layers=2, d_ff=1000, max_context=2048)
    time = time_of([0, 0], [False] * 2, False, spec, fast)
    read = 2 * (spec.layer_dense_bytes + 1000 * 48) / 1e6
    assert time.seconds_alone(256, 256) == pytest.approx(read + 10 * 16 / 1e6, rel=1e-3)
    assert time.seconds_alone(600, 256) == pytest.approx(3 * read + 10 * 16 / 1e6, rel=1e-3)


def test_windows_bound_the_keys_and_chunks_follow_each_other():
    spec = replace(SEVEN_B, sliding_window=256, sliding_layers=(True,) * 16 + (False,) * 16)
    time = time_of([11008] * 32, [True] * 32, spec=spec, hardware=HardwareProfile.load())
    assert time._attention_flops(512, 2048, 0) == 4 * 512 * 256 * 4096
    assert time._attention_flops(512, 2048, 31) == 4 * 512 * (2048 + 256) * 4096
    one, two = (
        time_of([11008] * 32, [True] * 32, spec=SEVEN_B, hardware=time.cost.hardware).seconds(n) for n in (2048, 4096)
    )
    assert 2 * one < two < 3 * one


def test_calls_bound_short_prompts_from_below(monkeypatch):
    """Of two layers for two times 512 tokens: attention and three pieces of hot neurons each; graphs have none."""
    spec = small_spec(n_layers=2, d_ff=1000, max_context=2048)
    given = {"hardware": replace(HARDWARE, gpu_launch_seconds=0.0), "spec": spec}
    before = [time_of([hot] * 2, [True] * 2, **given).seconds(1000) for hot in (992, 1000)]
    monkeypatch.setattr(prompt, "_CALL_SECONDS", 1.0)
    some, every = (time_of([hot] * 2, [True] * 2, **given) for hot in (992, 1000))
    assert some._calls(1000, 992, 8) == 2 * (13 + 8 * 4) and every._calls(1000, 1000, 0) == 0
    assert some.seconds(1000) > 2 * some._calls(1000, 992, 0) > before[0] and every.seconds(1000) == before[1]


def test_more_on_the_gpu_is_faster_and_so_are_registered_rows():
    hardware, layers = replace(HardwareProfile.load(), gpu_tensor_flops=1e15), 32
    seconds = [
        time_of([hot] * layers, [True] * layers, spec=SEVEN_B, hardware=hardware).seconds(512)
        for hot in (0, 3000, 6000, 11008)
    ]
    assert seconds == sorted(seconds, reverse=True)
    time = time_of([3000] * layers, [True] * layers, spec=SEVEN_B, hardware=hardware)
    assert replace(time, registered=()).seconds(512) > 1.5 * time.seconds(512)
    strong = replace(hardware, cpu_gemm_flops=1e13)
    assert 0 < time_of([3000] * layers, [True] * layers, spec=SEVEN_B, hardware=strong).by_cpu(512, 0, 0) < 8008
    some = time_of([0] * 16 + [3000] * 16, [False] * 16 + [True] * 16, spec=SEVEN_B, hardware=hardware)
    assert some.seconds(512) > time.seconds(512)


def test_what_the_cpu_computes_follows_the_attention_before():
    """The longer attention takes, the more rows are sent meanwhile, until there is nothing to do for the CPU."""
    strong = replace(HardwareProfile.load(), cpu_gemm_flops=8e12)
    time = time_of([3000] * 32, [True] * 32, spec=SEVEN_B, hardware=strong)
    found = [time.by_cpu(256, start, 0) for start in (0, 1024, 2048, 4096, 8192)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] and any(0 < count < 8008 for count in found)
