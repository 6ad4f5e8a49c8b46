"""The cases of `bench_gpu_kernels.py`: GPU kernels at a 7B model's shapes, with their references beside them.

A case holds calls over several copies of its weights, so that the L2 cache does not hold what the next call reads, a
reference, and torch's own way where there is one. To add a kernel, write a function that returns a `Case` and name it
in `all_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from cpu_kernels.blocks import FORMATS
from cpu_kernels.contract import BLOCK, LAYOUTS, padded
from gpu_kernels.attention import attention_scratch, attention_splits, decode_attention, decode_attention_ref
from gpu_kernels.compact import compact_indices, compact_indices_ref
from gpu_kernels.gemv import Tiling, gemv, gemv_ref
from gpu_kernels.low_rank import TILING, DevicePredictorView, PredictorTiling, predict, predict_ref
from gpu_kernels.matrix import KINDS, DeviceMatrix
from gpu_kernels.norm import residual_norm, residual_norm_ref
from gpu_kernels.proxy import DeviceProxyView, name_passing, name_passing_ref
from gpu_kernels.rope import rope, rope_ref
from gpu_kernels.sampling import blocks_of, greedy, greedy_ref, top_k, top_k_ref, top_k_scratch
from gpu_kernels.sparse_ffn import DeviceFFNView, FFNTiling, down_parts, sparse_ffn, sparse_ffn_ref

D, FF, VOCAB, HEADS, HEAD_DIM, RANK = 4096, 11008, 32000, 32, 128, 1024
DISTINCT_BYTES = 256 * 2**20  # that the calls of a case read together: five times an H100's L2
MOST_COPIES = 64
Call = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One kernel on one input. nbytes: that a call reads and writes; calls: the same on distinct copies; error: runs
    the first call and returns its relative error; torch: the same in torch, or empty; streams: whether the bytes come
    from memory, so that a share of its bandwidth has a meaning."""

    name: str
    nbytes: int
    calls: list[Call]
    error: Callable[[], float]
    torch: list[Call]
    streams: bool = True


def random_values(*shape: int) -> torch.Tensor:
    """Standard normal f32 on the GPU."""
    return torch.randn(shape, device="cuda")


def random_matrix(kind: str, n: int, d: int) -> DeviceMatrix:
    """Weights of about 1 / sqrt(d) on the GPU; blocks have random codes and scales."""
    if not LAYOUTS[kind].in_blocks:
        return DeviceMatrix((random_values(n, d) / d**0.5).to(KINDS[kind]), d, kind)
    rows = torch.randint(0, 256, (n, LAYOUTS[kind].row_bytes(d)), dtype=torch.uint8, device="cuda")
    largest = -FORMATS[kind].least
    scales = (torch.rand(n, padded(d) // BLOCK, device="cuda") + 0.5) / (largest * d**0.5)
    rows[:, -scales.shape[1] * 2 :] = scales.half().view(torch.uint8)
    return DeviceMatrix(rows, d, kind)


def copies(nbytes: int) -> int:
    return max(1, min(MOST_COPIES, -(-DISTINCT_BYTES // nbytes)))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def checked(run: Callable[..., None], reference: Callable[..., None], outputs: list[torch.Tensor]) -> float:
    """Both write to `outputs`; the largest relative error."""
    run()
    found = [out.clone() for out in outputs]
    reference()
    return max(relative_error(out, expected) for out, expected in zip(found, outputs, strict=True))


def gemv_case(kind: str, name: str, n: int, d: int, tokens: int = 1, tiling: Tiling | None = None) -> Case:
    """A dense matrix times a few tokens; beside it torch's linear in the weights' type, where it has one."""
    one = random_matrix(kind, n, d)
    matrices = [one, *(DeviceMatrix(one.rows.clone(), d, kind) for _ in range(copies(one.nbytes) - 1))]
    x, out = random_values(tokens, d), random_values(tokens, n)
    calls: list[Call] = [partial(gemv, matrix, x, None, out, tiling=tiling) for matrix in matrices]
    plain = matrices if kind in ("bf16", "f16") else []
    narrow = x.to(KINDS[kind]) if plain else x
    return Case(
        f"gemv {kind} {name} {n}x{d}" + (f" {tokens} tokens" if tokens > 1 else ""),
        one.nbytes + x.nbytes + out.nbytes,
        calls,
        lambda: checked(calls[0], lambda: gemv_ref(one, x, None, out), [out]),
        [partial(F.linear, narrow, matrix.rows) for matrix in plain],
    )


def sparse_ffn_case(
    kind: str, hot: int, active: int, tokens: int = 1, half: bool = False, tiling: FFNTiling | None = None
) -> Case:
    """A gated ReLU layer of `hot` rows, `active` of them listed; all of these fire, or with `half` every other."""
    one = [random_matrix(kind, hot, D) for _ in range(3)]
    fired = active // 2 if half else active
    row = one[0].nbytes // hot
    nbytes = row * (active + 2 * fired)
    bias = torch.full((hot,), 50.0, device="cuda")
    if half:
        bias[::2] = -50
    ids = torch.randperm(hot // 2, device="cuda")[: active // 2].sort().values * 2
    ids = torch.cat((ids, ids + 1)).sort().values.int()
    listed = torch.cat((ids, torch.zeros(hot - len(ids), dtype=torch.int32, device="cuda")))
    count = torch.tensor([len(ids)], dtype=torch.int32, device="cuda")
    x, hidden = random_values(tokens, D), random_values(tokens, hot)
    parts = random_values(down_parts(D, tiling.columns) if tiling else down_parts(D), tokens, D)
    views = [DeviceFFNView(*one, bias, None, "relu")]
    for _ in range(copies(nbytes) - 1):
        views.append(DeviceFFNView(*(DeviceMatrix(m.rows.clone(), D, kind) for m in one), bias, None, "relu"))
    calls: list[Call] = [
        partial(sparse_ffn, view, x, listed, count, None, hidden, parts, tiling=tiling) for view in views
    ]

    def error() -> float:
        calls[0]()
        found = parts.sum(0)
        sparse_ffn_ref(views[0], x, listed, count, None, hidden, parts)
        return relative_error(found, parts.sum(0))

    fires = ", half fire" if half else ""
    name = f"sparse_ffn {kind} {active} of {hot}{fires}" + (f" {tokens} tokens" if tokens > 1 else "")
    return Case(name, nbytes + parts.nbytes, calls, error, [])


def predict_case(tokens: int = 1, tiling: PredictorTiling = TILING) -> Case:
    """The int8 low-rank predictor of a layer."""
    codes = [torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda") for shape in ((RANK, D), (FF, RANK))]
    ends = [(torch.full((n,), 1 / 127 / 64, device="cuda"), random_values(n) / 10) for n in (RANK, FF)]
    x, hidden = random_values(tokens, D), random_values(tokens, RANK)
    masks = torch.zeros(FF, dtype=torch.int32, device="cuda")
    one = DevicePredictorView.of(codes[0], *ends[0], codes[1], *ends[1], 0.1, "cuda")
    count = copies(one.nbytes)
    views = [one] + [
        DevicePredictorView.of(codes[0].clone(), *ends[0], codes[1].clone(), *ends[1], 0.1, "cuda")
        for _ in range(count - 1)
    ]
    calls: list[Call] = [partial(predict, view, x, hidden, masks, tiling) for view in views]

    def error() -> float:
        """Of the hidden values, or the share of neurons that differ: a score at the threshold may round to one."""
        calls[0]()
        found, fires = hidden.clone(), masks.clone()
        predict_ref(one, x, hidden, masks)
        return max(relative_error(found, hidden), float((fires != masks).float().mean()))

    return Case(f"predict int8 {D}-{RANK}-{FF}", one.nbytes, calls, error, [])


def proxy_case(tokens: int = 1, tiling: Tiling | None = None) -> Case:
    """The proxy of a layer, copies of gate and up in int4, by which 40% pass or so."""
    x, masks = random_values(tokens, D), torch.zeros(FF, dtype=torch.int32, device="cuda")
    lengths = torch.ones(FF, device="cuda")

    def view() -> DeviceProxyView:
        gate, up = (random_matrix("int4", FF, D) for _ in range(2))
        return DeviceProxyView(gate, up, lengths, 0.3, "silu")

    one = view()
    views = [one, *(view() for _ in range(copies(one.nbytes) - 1))]
    calls: list[Call] = [partial(name_passing, each, x, masks, tiling) for each in views]

    def error() -> float:
        """The share of neurons that differ: a score at the threshold may round to one."""
        calls[0]()
        found = masks.clone()
        name_passing_ref(one, x, masks)
        return float((found != masks).float().mean())

    return Case(f"proxy int4 {D}-{FF}" + (f" {tokens} tokens" if tokens > 1 else ""), one.nbytes, calls, error, [])


def compact_case() -> Case:
    """The lists of a layer's hot and cold active neurons."""
    hot = 4000
    masks = (torch.rand(FF, device="cuda") < 0.1).to(torch.int32)
    sides = [
        (torch.zeros(n, dtype=torch.int32, device="cuda"), torch.zeros(n, dtype=torch.int32, device="cuda"))
        for n in (hot, FF - hot)
    ]
    counts = [torch.zeros(1, dtype=torch.int32, device="cuda") for _ in sides]
    given = (masks, hot, *sides[0], counts[0], *sides[1], counts[1])
    outputs = [sides[0][0], sides[1][0], *counts]
    run = partial(compact_indices, *given)
    return Case(
        f"compact {FF}", FF, [run], lambda: checked(run, partial(compact_indices_ref, *given), outputs), [], False
    )


def norm_case() -> Case:
    """The residual with the parts of the FFN added, and its RMSNorm."""
    x, weight, out, parts = (
        random_values(1, D),
        random_values(D),
        random_values(1, D),
        random_values(down_parts(D), 1, D),
    )
    start = x.clone()

    def error() -> float:
        x.copy_(start)
        residual_norm(x, weight, None, 1e-5, out, parts)
        found = out.clone()
        x.copy_(start)
        residual_norm_ref(x, weight, None, 1e-5, out, parts)
        return relative_error(found, out)

    run = partial(residual_norm, x, weight, None, 1e-5, out, parts / 1e6)
    return Case(f"residual_norm {D}, {len(parts)} parts", parts.nbytes + 4 * x.nbytes, [run], error, [], False)


def _cache(context: int, layers: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Caches f16 of blocks of 256 positions, the block table, and the last position."""
    blocks = -(-context // 256)
    caches = [random_values(blocks, 2, HEADS, 256, HEAD_DIM).half() for _ in range(layers)]
    table = torch.randperm(blocks, device="cuda").int()[None]
    return caches, table, torch.tensor([context - 1], dtype=torch.int32, device="cuda")


def attention_case(context: int) -> Case:
    """One token's attention over `context` positions, f16 keys and values."""
    nbytes = context * 2 * HEADS * HEAD_DIM * 2
    caches, table, position = _cache(context, copies(nbytes))
    q, out = random_values(1, HEADS, HEAD_DIM), random_values(1, HEADS * HEAD_DIM)
    scratch = attention_scratch(1, HEADS, HEAD_DIM, attention_splits(HEADS, 4096), "cuda")
    calls: list[Call] = [partial(decode_attention, q, c, table, position, None, out, scratch) for c in caches]
    reference = partial(decode_attention_ref, q, caches[0], table, position, None, out)
    return Case(f"attention f16 {context} positions", nbytes, calls, lambda: checked(calls[0], reference, [out]), [])


def rope_case() -> Case:
    """Rotation of one token's heads and the write to the cache."""
    caches, table, position = _cache(4096, 1)
    angles = random_values(4096, HEAD_DIM // 2)
    start = random_values(1, 3 * HEADS * HEAD_DIM)
    qkv = start.clone()
    given = (qkv, angles.cos(), angles.sin(), None, None, 1e-6, position, table, caches[0], HEADS)

    def error() -> float:
        rope(*given)
        found = qkv.clone()
        qkv.copy_(start)
        rope_ref(*given)
        return relative_error(found, qkv)

    return Case("rope and KV write", qkv.nbytes * 2, [partial(rope, *given)], error, [], False)


def greedy_case() -> Case:
    """The token with the largest logit."""
    logits, shape = random_values(1, VOCAB), (1, blocks_of(VOCAB))
    scratch = torch.zeros(shape, device="cuda"), torch.zeros(shape, dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    run, reference = partial(greedy, logits, *scratch, out), partial(greedy_ref, logits, *scratch, out)
    error = partial(checked, run, reference, [out])
    return Case(f"greedy {VOCAB}", logits.nbytes, [run], error, [partial(torch.argmax, logits, 1)], False)


def top_k_case(k: int) -> Case:
    """The k largest logits in order."""
    logits, values = random_values(1, VOCAB), random_values(1, k)
    ids = torch.zeros(1, k, dtype=torch.int32, device="cuda")
    scratch = torch.zeros(top_k_scratch(1, VOCAB, k), dtype=torch.int64, device="cuda")
    given = (logits, k, values, ids, scratch)
    run = partial(top_k, *given)
    error = partial(checked, run, partial(top_k_ref, *given), [values, ids])
    return Case(f"top_k {k} of {VOCAB}", logits.nbytes, [run], error, [partial(torch.topk, logits, k, 1)], False)


GEMV_SHAPES = {"qkv": (3 * D, D), "out": (D, D), "head": (VOCAB, D)}


def all_cases() -> dict[str, Callable[[], Case]]:
    """Makers of the cases by name, which is what `--only` selects from."""
    cases: dict[str, Callable[[], Case]] = {}
    for kind in KINDS:
        for name, (n, d) in GEMV_SHAPES.items():
            cases[f"gemv {kind} {name}"] = partial(gemv_case, kind, name, n, d)
    for kind in ("bf16", "int4"):
        for tokens in (2, 4, 8):
            cases[f"gemv {kind} qkv {tokens} tokens"] = partial(gemv_case, kind, "qkv", 3 * D, D, tokens)
            cases[f"sparse_ffn {kind} {tokens} tokens"] = partial(sparse_ffn_case, kind, 4000, 640, tokens)
    for kind in KINDS:
        cases[f"sparse_ffn {kind} 640 of 4000"] = partial(sparse_ffn_case, kind, 4000, 640)
        cases[f"sparse_ffn {kind} 1100 of {FF}"] = partial(sparse_ffn_case, kind, FF, 1100)
    cases["sparse_ffn bf16 all, half fire"] = partial(sparse_ffn_case, "bf16", 4000, 4000, 1, True)
    cases["predict"] = predict_case
    cases["proxy"] = proxy_case
    cases["proxy 4 tokens"] = partial(proxy_case, 4)
    cases["compact"] = compact_case
    cases["residual_norm"] = norm_case
    cases["rope"] = rope_case
    for context in (512, 2048):
        cases[f"attention {context}"] = partial(attention_case, context)
    cases["greedy"] = greedy_case
    cases["top_k"] = partial(top_k_case, 40)
    return cases
