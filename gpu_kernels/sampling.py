"""Next token on the GPU: greedy, the k largest logits, and drawing from those as temperature, top-p and min-p say.

    greedy       out[t] = argmax(logits[t]), the lowest id among equals
    top_k        the k largest in falling order; of equal ones the lower id first; NaN above everything
    log_sum_exp  out[t] = log(sum over i of exp(logits[t, i] / temperature[t]))
    sample       p = softmax(values / temperature); the nucleus of top_p, cut by min_p; inverse CDF at `uniform`

Each token has settings of its own. They are device data, so that a captured graph is replayed with others. -1 in place
of a token asks the host to look: its own sampler then raises, or draws from the whole vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_kernels.launch import begin, options

MAX_K = 1024
_BLOCK = 2048  # logits that a program of the first pass takes


def blocks_of(vocab: int) -> int:
    """How many values the scratch of `greedy` and `log_sum_exp` holds for each token."""
    return triton.cdiv(vocab, _BLOCK)


def top_k_scratch(tokens: int, vocab: int, k: int) -> int:
    """int64 elements of `top_k`'s scratch."""
    keep, levels = _sort_sizes(k)
    blocks = triton.cdiv(vocab, 1 << levels)
    return tokens * (blocks + triton.cdiv(blocks << keep, 1 << levels)) << keep


def _sort_sizes(k: int) -> tuple[int, int]:
    """Binary logarithms of the keys that a program keeps, and of those that it sorts: at least four times as many."""
    keep = (k - 1).bit_length()
    return keep, max(_BLOCK.bit_length() - 1, keep + 2)


@triton.jit
def _best(values, ids):  # type: ignore[no-untyped-def]
    """The largest value and the lowest of the ids >= 0 that have it; id -1 where one of the ids is."""
    value = tl.max(values, 0)
    lowest = tl.min(tl.where(values == value, ids, 0x7FFFFFFF), 0)
    return value, tl.where(tl.min(ids, 0) < 0, -1, lowest)


@triton.jit
def _greedy_blocks(logits, scratch_values, scratch_ids, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each block's best; id -1 where it holds NaN."""
    begin(PDL)
    block, t = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + t.to(tl.int64) * vocab + i, mask=i < vocab, other=-float("inf"))
    ids = tl.where(logit == logit, tl.where(i < vocab, i, 0x7FFFFFFF), -1)
    value, best = _best(tl.where(logit == logit, logit, -float("inf")), ids)
    tl.store(scratch_values + t * tl.num_programs(0) + block, value)
    tl.store(scratch_ids + t * tl.num_programs(0) + block, best)


@triton.jit
def _greedy_best(scratch_values, scratch_ids, out, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(PDL)
    t, i = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(scratch_values + t * blocks + i, mask=i < blocks, other=-float("inf"))
    value, best = _best(values, tl.load(scratch_ids + t * blocks + i, mask=i < blocks, other=0x7FFFFFFF))
    finite = tl.abs(value) < float("inf")
    tl.store(out + t, tl.where(finite, best, -1))


def greedy(logits: torch.Tensor, scratch_values: torch.Tensor, scratch_ids: torch.Tensor, out: torch.Tensor) -> None:
    """Write the id of each token's largest logit, the lowest among equals; -1 where one is NaN or none is finite.

    logits: f32 [t, vocab]; scratch_values f32 and scratch_ids int32: [t, blocks_of(vocab)]; out: int32 or int64 [t].
    +inf counts as no number, as in the host's sampler. Raises `ValueError` when shapes or types do not fit.
    """
    tokens, vocab = _check_logits(logits)
    blocks = blocks_of(vocab)
    _check("scratch_values", scratch_values, (torch.float32,), (tokens, blocks))
    _check("scratch_ids", scratch_ids, (torch.int32,), (tokens, blocks))
    _check("out", out, (torch.int32, torch.int64), (tokens,))
    _greedy_blocks[(blocks, tokens)](logits, scratch_values, scratch_ids, vocab, BLOCK=_BLOCK, **options())
    _greedy_best[(tokens,)](scratch_values, scratch_ids, out, blocks, BLOCK=triton.next_power_of_2(blocks), **options())


def greedy_ref(
    logits: torch.Tensor, scratch_values: torch.Tensor, scratch_ids: torch.Tensor, out: torch.Tensor
) -> None:
    """`greedy` in torch."""
    largest = logits.amax(1)
    out.copy_(torch.where(largest.isfinite(), logits.argmax(1), -1))


@triton.jit
def _keys(logit, i):  # type: ignore[no-untyped-def]
    """int64 that order as logits do, -0 as 0 and NaN of either sign above all, and by falling id among equals."""
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    rank = tl.where(logit == logit, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return (rank.to(tl.int64) << 32) | (i ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _sorted(keys, FIRST: tl.constexpr, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bitonic sort of 2^LEVELS keys into falling order, from runs of 2^FIRST that fall and rise by turns."""
    i = tl.arange(0, 1 << LEVELS)
    for level in range(FIRST, LEVELS):
        for step in range(level + 1):
            stride = 1 << (level - step)
            other = tl.gather(keys, i ^ stride, 0)
            wants_larger = ((i & stride) == 0) == ((i & (2 << level)) == 0)
            keys = tl.where((other > keys) == wants_larger, other, keys)
    return keys


@triton.jit
def _top_of_logits(logits, keys, vocab, KEEP: tl.constexpr, LEVELS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The keys of the 2^KEEP largest of each block of 2^LEVELS logits, in falling order."""
    begin(PDL)
    block, t, i = tl.program_id(0), tl.program_id(1), tl.arange(0, 1 << LEVELS)
    at = (block << LEVELS) + i
    logit = tl.load(logits + t.to(tl.int64) * vocab + at, mask=at < vocab, other=0.0)
    top = _sorted(tl.where(at < vocab, _keys(logit, at), -(2**63)), 0, LEVELS)
    tl.store(keys + ((t * tl.num_programs(0) + block) << KEEP) + i, top, mask=i < (1 << KEEP))


@triton.jit
def _top_of_keys(keys, kept, n, KEEP: tl.constexpr, LEVELS: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The 2^KEEP largest of each 2^LEVELS of a token's n keys, which are falling runs of 2^KEEP; in falling order."""
    begin(PDL)
    block, t, i = tl.program_id(0), tl.program_id(1), tl.arange(0, 1 << LEVELS)
    at = (block << LEVELS) + (i ^ tl.where((i >> KEEP) % 2 == 1, (1 << KEEP) - 1, 0))  # every other run backwards
    top = _sorted(tl.load(keys + t * n + at, mask=at < n, other=-(2**63)), KEEP, LEVELS)
    tl.store(kept + ((t * tl.num_programs(0) + block) << KEEP) + i, top, mask=i < (1 << KEEP))


@triton.jit
def _write_top(keys, logits, values, ids, vocab, k, KEEP: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(PDL)
    t, i = tl.program_id(0), tl.arange(0, 1 << KEEP)
    key = tl.load(keys + (t << KEEP) + i, mask=i < k, other=0)
    chosen = (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    tl.store(ids + t * k + i, chosen, mask=i < k)
    tl.store(values + t * k + i, tl.load(logits + t.to(tl.int64) * vocab + chosen, mask=i < k, other=0.0), mask=i < k)


def top_k(logits: torch.Tensor, k: int, values: torch.Tensor, ids: torch.Tensor, scratch: torch.Tensor) -> None:
    """Write each token's k largest logits in falling order, of equal ones the lower id first; NaN is above everything.

    logits: f32 [t, vocab]; values f32 and ids int32: [t, k]; scratch: int64 of at least top_k_scratch(t, vocab, k).
    Raises `ValueError` when k is not in 1 to min(1024, vocab), or shapes or types do not fit.
    """
    tokens, vocab = _check_logits(logits)
    if not 1 <= k <= min(MAX_K, vocab):
        raise ValueError(f"top_k wants k of 1 to {min(MAX_K, vocab)}, got {k}")
    _check("values", values, (torch.float32,), (tokens, k))
    _check("ids", ids, (torch.int32,), (tokens, k))
    needed = top_k_scratch(tokens, vocab, k)
    if scratch.ndim != 1 or len(scratch) < needed or scratch.dtype != torch.int64 or not scratch.is_contiguous():
        raise ValueError(f"top_k wants int64 scratch of {needed}, got {scratch.dtype} {tuple(scratch.shape)}")
    _launch_top_k(logits, k, values, ids, scratch)


def _launch_top_k(logits: torch.Tensor, k: int, values: torch.Tensor, ids: torch.Tensor, scratch: torch.Tensor) -> None:
    """Blocks of logits, then blocks of what those kept, until one is left."""
    (tokens, vocab), (keep, levels) = logits.shape, _sort_sizes(k)
    count = triton.cdiv(vocab, 1 << levels)
    keys, other = scratch[: tokens * count << keep], scratch[tokens * count << keep :]
    _top_of_logits[(count, tokens)](logits, keys, vocab, KEEP=keep, LEVELS=levels, **options(8))
    while count > 1:
        n, count = count << keep, triton.cdiv(count << keep, 1 << levels)
        _top_of_keys[(count, tokens)](keys, other, n, KEEP=keep, LEVELS=levels, **options(8))
        keys, other = other, keys
    _write_top[(tokens,)](keys, logits, values, ids, vocab, k, KEEP=keep, **options())


def top_k_ref(logits: torch.Tensor, k: int, values: torch.Tensor, ids: torch.Tensor, scratch: torch.Tensor) -> None:
    """`top_k` in torch, whose sort puts NaN first too."""
    ids.copy_(logits.sort(dim=1, descending=True, stable=True).indices[:, :k])
    values.copy_(logits.gather(1, ids.long()))


@triton.jit
def _block_sums(logits, temperature, largest, sums, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each block's largest scaled logit m and its sum of exp(scaled - m)."""
    begin(PDL)
    block, t = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + t.to(tl.int64) * vocab + i, mask=i < vocab, other=-float("inf"))
    scaled = logit / tl.load(temperature + t)
    m = tl.maximum(tl.max(scaled, 0), -3.0e38)  # where all are -inf, their sum is 0 and not NaN
    tl.store(largest + t * tl.num_programs(0) + block, m)
    tl.store(sums + t * tl.num_programs(0) + block, tl.sum(tl.exp(scaled - m), 0))


@triton.jit
def _sum_of_blocks(largest, sums, out, blocks, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    begin(PDL)
    t, i = tl.program_id(0), tl.arange(0, BLOCK)
    m = tl.load(largest + t * blocks + i, mask=i < blocks, other=-float("inf"))
    top = tl.max(m, 0)
    total = tl.sum(tl.exp(m - top) * tl.load(sums + t * blocks + i, mask=i < blocks, other=0.0), 0)
    tl.store(out + t, top + tl.log(total))


def log_sum_exp(
    logits: torch.Tensor, temperature: torch.Tensor, scratch_max: torch.Tensor, scratch_sum: torch.Tensor,
    out: torch.Tensor
) -> None:  # fmt: skip
    """Write the logarithm of the sum of exp(logits / temperature) over each token's vocabulary.

    NaN where a logit is NaN or +inf.

    logits: f32 [t, vocab]; temperature, out: f32 [t]; scratch_max, scratch_sum: f32 [t, blocks_of(vocab)].
    Raises `ValueError` when shapes or types do not fit.
    """
    tokens, vocab = _check_logits(logits)
    blocks = blocks_of(vocab)
    _check("temperature", temperature, (torch.float32,), (tokens,))
    _check("scratch_max", scratch_max, (torch.float32,), (tokens, blocks))
    _check("scratch_sum", scratch_sum, (torch.float32,), (tokens, blocks))
    _check("out", out, (torch.float32,), (tokens,))
    _block_sums[(blocks, tokens)](logits, temperature, scratch_max, scratch_sum, vocab, BLOCK=_BLOCK, **options())
    _sum_of_blocks[(tokens,)](scratch_max, scratch_sum, out, blocks, BLOCK=triton.next_power_of_2(blocks), **options())


def log_sum_exp_ref(
    logits: torch.Tensor, temperature: torch.Tensor, scratch_max: torch.Tensor, scratch_sum: torch.Tensor,
    out: torch.Tensor
) -> None:  # fmt: skip
    """`log_sum_exp` in torch."""
    out.copy_((logits / temperature[:, None]).logsumexp(1))


@triton.jit
def _sample_kernel(  # type: ignore[no-untyped-def]
    values, ids, counts, temperature, top_p, min_p, uniform, total, out, k, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    t, i = tl.program_id(0), tl.arange(0, BLOCK)
    heat, nucleus, least = tl.load(temperature + t), tl.load(top_p + t), tl.load(min_p + t)
    values += t * k
    given = tl.load(counts + t)
    limit = tl.where(given > 0, tl.minimum(given, k), k)
    divisor = tl.where(heat > 0, heat, 1.0)
    largest = tl.load(values)
    exps = tl.exp((tl.load(values + i, mask=i < limit, other=-float("inf")) - largest) / divisor)
    p = exps / tl.sum(exps, 0)
    covered = heat > 0
    if total is not None:
        of_all = exps * tl.exp(largest / divisor - tl.load(total + t))
        covered = tl.where(given > 0, covered, (nucleus < 1) & (tl.sum(of_all, 0) > nucleus))
        p = tl.where(given > 0, p, of_all)
    p_first, p_last = tl.max(p, 0), tl.min(tl.where(i < limit, p, float("inf")), 0)
    covered = covered | (p_last < least * p_first)
    cumulative = tl.cumsum(p.to(tl.float64), 0)
    in_nucleus = cumulative - p < tl.where(nucleus < 1, nucleus, float("inf"))
    kept = (i == 0) | ((i < limit) & in_nucleus & (p >= least * p_first))
    mass = tl.max(tl.where(kept, cumulative, 0.0), 0)
    passed = tl.sum((kept & (cumulative <= tl.load(uniform + t).to(tl.float64) * mass)).to(tl.int32), 0)
    drawn = tl.load(ids + t * k + tl.minimum(passed, tl.sum(kept.to(tl.int32), 0) - 1))
    answer = tl.where(heat > 0, tl.where(covered & (mass > 0), drawn, -1), tl.load(ids + t * k))
    tl.store(out + t, tl.where(tl.abs(largest) < float("inf"), answer, -1))


def sample(
    values: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, uniform: torch.Tensor, out: torch.Tensor, total: torch.Tensor | None = None
) -> None:  # fmt: skip
    """Draw each token from its k candidates, as the host's sampler does from the same uniform number in [0, 1).

    values f32, ids int32: [t, k] in falling order, from `top_k`; counts: int32 [t]; temperature, top_p, min_p: f32 [t]
    (a temperature of 0 takes the first candidate, 1 and 0 switch the filters off); uniform: f32 or f64 [t]; out: int32
    or int64 [t].

    A token's candidates are the first counts[t], as with a top-k setting of so many, which are all there is then. For a
    count of 0 they are all k, whose probabilities are those of the whole vocabulary by `total`, f32 [t] from
    `log_sum_exp` at the same temperature; None where no count is 0. The draw is exact where what top_p and min_p leave
    lies within the candidates. Where it may not (their share is at most top_p, or top_p is off, and the last one passes
    min_p) out is -1: the host then draws from the whole vocabulary itself. Give the count k when the candidates are the
    whole vocabulary. -1 also where the largest value is not finite.
    Raises `ValueError` when shapes or types do not fit.
    """
    _check("values", values, (torch.float32,), (len(values), values.shape[-1]))
    tokens, k = values.shape
    _check("ids", ids, (torch.int32,), (tokens, k))
    _check("counts", counts, (torch.int32,), (tokens,))
    for name, setting in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        _check(name, setting, (torch.float32,), (tokens,))
    _check("uniform", uniform, (torch.float32, torch.float64), (tokens,))
    _check("out", out, (torch.int32, torch.int64), (tokens,))
    if total is not None:
        _check("total", total, (torch.float32,), (tokens,))
    block = triton.next_power_of_2(k)
    _sample_kernel[(tokens,)](
        values, ids, counts, temperature, top_p, min_p, uniform, total, out, k, BLOCK=block, **options()
    )  # fmt: skip


def sample_ref(
    values: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, uniform: torch.Tensor, out: torch.Tensor, total: torch.Tensor | None = None
) -> None:  # fmt: skip
    """`sample` in torch, a token at a time."""
    for t in range(len(values)):
        of_few = total is None or int(counts[t]) > 0
        scaled = values[t, : int(counts[t]) or None] / temperature[t]
        p = scaled.softmax(0) if total is None or of_few else (scaled - total[t]).exp()
        covered = of_few or bool(p.sum() > top_p[t] and top_p[t] < 1) or bool(p[-1] < min_p[t] * p[0])
        if temperature[t] == 0 or not values[t, 0].isfinite() or not covered:
            out[t] = ids[t, 0] if temperature[t] == 0 and values[t, 0].isfinite() else -1
            continue
        cumulative = p.double().cumsum(0)
        kept = ((cumulative - p < top_p[t]) | (top_p[t] >= 1)) & (p >= min_p[t] * p[0])
        kept[0] = True
        cumulative = cumulative[kept]
        point = uniform[t].double() * cumulative[-1]
        out[t] = ids[t, min(int(torch.searchsorted(cumulative, point, right=True)), len(cumulative) - 1)]


def _check_logits(logits: torch.Tensor) -> tuple[int, int]:
    """Their tokens and vocabulary."""
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.numel() or not logits.is_contiguous():
        raise ValueError(f"logits are contiguous f32 [t, vocab], got {logits.dtype} {tuple(logits.shape)}")
    return logits.shape[0], logits.shape[1]


def _check(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
        kinds = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} is contiguous {kinds} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
