"""Tiny models for tests of the decode step over two devices, and one such step beside the CPU's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE
from model_cases import make_model
from packed_cases import pack

from cpu_kernels.worker_pool import WorkerPool
from gpu_kernels import (
    attention,
    certificate,
    dense,
    gemv,
    low_rank,
    mailbox,
    norm,
    prompt_attention,
    proxy,
    rope,
    row_gemm,
    sampling,
    sparse_ffn,
)
from gpu_kernels.box import Mailbox
from hybrid import Engine, EngineConfig, SamplingSettings
from hybrid.model.ffn import FFNRuntime, HybridFFN
from hybrid.model.kv_cache import KVCache, KVPool, Row
from hybrid.model.loader import ModelFolder
from hybrid.runtime.cpu_step import CpuStep
from hybrid.runtime.gpu import gemm as gpu_gemm
from hybrid.runtime.gpu import prefill as gpu_prefill
from hybrid.runtime.gpu import sampler as gpu_sampler
from hybrid.runtime.gpu import step as gpu_step
from hybrid.runtime.gpu.arena import DeviceArena
from hybrid.runtime.gpu.host_rows import HostRows
from hybrid.runtime.gpu.step import GpuStep
from placement.placement import Placement
from predictor.low_rank import LowRankPredictor
from predictor.row_copies import CopiedPart, CopyForm, LayerCopies
from profiler.common.spec import KVChoice, Strategy

VOCAB, CAPACITY = 131, 24
GREEDY, PROMPT = SamplingSettings(temperature=0, max_new_tokens=5), (77, 5, 101)
_USERS = (gpu_gemm, gpu_prefill, gpu_sampler, gpu_step)
_KERNELS = {
    "decode_attention",
    "gemv",
    "greedy",
    "predict",
    "certify",
    "name_passing",
    "residual_norm",
    "rope",
    "sparse_ffn",
}
_KERNELS |= {"top_k", "log_sum_exp", "sample"}
_KERNELS |= {"ask", "post", "receive", "send"} | {"split_rows", "widen", "sum_products", "hidden_terms"}
_KERNELS |= {"prompt_attention"}


def tiny_model(name: str, folder: Path, dtype: str = "f32", layers: int = 2) -> Path:
    """Make the case `name` of `model_cases` with few layers, once; returns its folder."""
    plain = folder / f"{name}-{layers}"
    if not plain.exists():
        make_model(
            name, plain, num_hidden_layers=layers, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    if dtype != "f32" and not (folder / f"{name}-{layers}-{dtype}").exists():
        pack(plain, folder / f"{name}-{layers}-{dtype}", dtype)
    return plain if dtype == "f32" else folder / f"{name}-{layers}-{dtype}"


def random_predictor(ffn: HybridFFN, rank: int = 5) -> LowRankPredictor:
    """Names about half of the neurons."""
    neurons, d = ffn.up.shape
    g = torch.Generator().manual_seed(neurons)
    fc1, fc2 = (
        torch.randint(-127, 128, shape, generator=g, dtype=torch.int8) for shape in ((rank, d), (neurons, rank))
    )
    scales = torch.rand(rank, generator=g) / 50, torch.rand(neurons, generator=g) / 50
    return LowRankPredictor(fc1, scales[0], torch.randn(rank, generator=g), fc2, scales[1], torch.zeros(neurons), 0.1)


def copies_of(ffn: HybridFFN) -> LayerCopies:
    """By which its neurons are certified."""
    part: CopiedPart = "up" if ffn.gate is None else "gate"
    weight = (ffn.gate or ffn.up).widen().numpy()
    return CopyForm((part,), bounded=True).layer({part: weight})


def some_tokens(count: int, seed: int = 1) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class StepCase:
    """A model's `GpuStep` and `CpuStep`, each with a cache of its own, under one placement.

    share: of the neurons that are hot, in the layers that are not `on_cpu`. head: whether the head is on the GPU.
    zero_copy: cold neurons that the GPU reads in host memory. rows: the most of a step, and where they are more than 8,
    `cache` is of a pool that `sequences` share, too. kv: how keys and values are kept.
    """

    def __init__(
        self,
        folder: Path,
        share: float = 0.4,
        on_cpu: Sequence[int] = (),
        head: bool = True,
        threads: int = 2,
        predictors: bool = False,
        zero_copy: int = 0,
        rows: int = 8,
        kv: KVChoice = "auto",
        certified: bool = False,
    ) -> None:
        opened = ModelFolder.open(folder).with_kv(kv)
        spec = opened.spec
        self.placement = replace(Placement.all_hot(spec), head_on_gpu=head)
        self.placement.hot[:] = round(share * spec.d_ff)
        self.placement.zero_copy[:] = np.minimum(zero_copy, spec.d_ff - self.placement.hot)
        for counts in (self.placement.hot, self.placement.zero_copy, self.placement.layer_on_gpu):
            counts[list(on_cpu)] = 0
        self.runtime = FFNRuntime("exact", WorkerPool(threads), spec.d_model, spec.d_ff)
        self.model = opened.build(self.runtime, self.placement, None)
        if predictors:
            for ffn in self.model.ffns:
                ffn.set_predictor(random_predictor(ffn))
        self.prepare(opened)
        if certified:
            for ffn in self.model.ffns:
                ffn.set_copies(copies_of(ffn))
        self.rows = rows
        pool = KVPool(spec, 20 * CAPACITY, 4) if rows > 8 else None
        self.cache, self.own_cache = KVCache(spec, CAPACITY, pool), KVCache(spec, CAPACITY)
        self.host = HostRows(self.model, self.placement, torch.device(DEVICE))
        counting = DeviceArena(torch.device(DEVICE))
        self._take(counting)
        self.arena = DeviceArena(torch.device(DEVICE), counting.used)
        self.step = self._take(self.arena)
        self._cpu = CpuStep(self.model, self.own_cache, self.runtime)

    def prepare(self, folder: ModelFolder) -> None:
        """For cases of their own: what else names the model's neurons."""

    def _take(self, arena: DeviceArena) -> GpuStep:
        return GpuStep(self.model, self.cache, self.runtime, self.placement, arena, self.host, self.rows)

    def run(self, token: int, strategy: Strategy) -> torch.Tensor:
        """Logits [vocab] of the step after one more token."""
        return self.step.run([Row(self.cache, token)], strategy)[0]

    def few(self, tokens: Sequence[int], strategy: Strategy, cache: KVCache | None = None) -> torch.Tensor:
        """Logits [vocab] of the step after some tokens, of which up to `rows` go through as rows."""
        for at in range(0, len(tokens), self.rows):
            rows = [Row(cache or self.cache, token) for token in tokens[at : at + self.rows]]
            logits = self.step.run(rows, strategy)[-1]
        return logits

    def sequences(self, lengths: Sequence[int], strategy: Strategy) -> list[KVCache]:
        """Sequences of one pool after so many tokens each; their blocks lie among each other's, in no order."""
        made = [KVCache(self.model.spec, CAPACITY, self.cache.pool) for _ in lengths]
        scattered = self.cache.pool.take(5)
        for tokens in range(CAPACITY + 1):
            for cache in made if tokens % 8 < 4 else made[::-1]:
                assert cache.reserve(tokens)
            self.cache.pool.release(scattered[tokens // 4 : tokens // 4 + 1] if tokens % 4 == 3 else [])
        for number, (cache, length) in enumerate(zip(made, lengths, strict=True)):
            if length:
                self.few(some_tokens(length, 10 + number), strategy, cache)
        return made

    def expected(self, tokens: Sequence[int], strategy: Strategy) -> torch.Tensor:
        """Logits after `tokens` from the CPU's step, which must be called while the workers are at rest."""
        for token in tokens:
            logits = self._cpu.run(token, strategy)
        return logits.clone()

    def close(self) -> None:
        self.step.rest()
        self.runtime.pool.close()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def use_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, references in the place of all kernels: the interpreter takes seconds for a token.

    The workers have a minute to answer, as the CPU of a test may be shared by many.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr(Mailbox, "new", partial(Mailbox.new, timeout=60.0))
        for module, user in product(
            (
                attention,
                certificate,
                dense,
                gemv,
                low_rank,
                mailbox,
                norm,
                prompt_attention,
                proxy,
                rope,
                row_gemm,
                sampling,
                sparse_ffn,
            ),
            _USERS,
        ):
            for name in _KERNELS & set(vars(module)) & set(vars(user)):
                monkeypatch.setattr(user, name, getattr(module, f"{name}_ref"))


def load_engine(folder: Path, gpu: bool = True) -> Engine:
    """An engine of 2 threads with hot and cold neurons, on the GPU too or on the CPU alone."""
    placement = Placement.random(ModelFolder.open(folder).spec, 0.4, 0)
    config = EngineConfig("exact", context=40, threads=2, vram_budget=None if gpu else 0)
    return Engine.load(folder, config, placement, device=torch.device(DEVICE) if gpu else None)


def answer(engine: Engine, prompt: Sequence[int] = PROMPT) -> list[int]:
    """Tokens of an answer from an empty KV cache."""
    engine.reset()
    return [step.token for step in engine.generate(prompt, GREEDY)]
