"""The GPU's end of the mailbox: ask the CPU's workers for a part of the step, and take up what they answer.

    post      out = norm(x), also to pinned host memory, where the CPU reads it
    send      compact the predicted neurons: hot ids stay here, cold ids go to the host; then release the request
    ask       x to the host, and release a request for whole layers or the head
    receive   wait for the answer; x += parts of the hot neurons + answer + bias; out = norm(x) for what follows

`cpu_kernels/mailbox.py` is the other end. A request's number is written last, with a fence that makes all before it
visible to the host; `receive` waits for the same number to come back. Who waits: the first token's program, for at most
`timeout` seconds, after which it marks the step failed and every later wait returns at once; the other tokens' programs
wait for it, as all of them polling the host's memory would slow each other. All of this is captured in a CUDA graph;
nothing asks the host.
"""

from __future__ import annotations

from time import monotonic, sleep

import torch
import triton
import triton.language as tl

from cpu_kernels.contract import Flag, Op, Word
from gpu_kernels.box import Mailbox, State, Tally, ZeroCopy
from gpu_kernels.compact import compact, compact_indices_ref, count_fired
from gpu_kernels.constants import (
    ALL_COLD,
    OP_FFN,
    STATE_DUE,
    STATE_ENDED,
    STATE_FAILED,
    STATE_NUMBER,
    STATE_POSTED,
    STATE_WAITED,
    TALLY_SENT,
    TALLY_ZERO_COPY,
    WORD_COUNT,
    WORD_LAYER,
    WORD_OP,
    WORD_POSITION,
    WORD_TOKENS,
)
from gpu_kernels.fences import acquire, nanoseconds, next_number, release
from gpu_kernels.launch import begin, is_native, options
from gpu_kernels.norm import add_parts, norm_kind, norm_weights, normed, residual_norm_ref, row_sizes

_COMPACT_BLOCK, _COUNT_BLOCK = 4096, 16384
_PIECE = 1024  # of the neurons listed here; those for the host are one program's, whose writes one fence orders
# Each warp that waits polls the host's memory; with 16 of them a token of 32 layers took some 0.2 ms more than with 4.
_POLLING_WARPS = 4


@triton.jit
def _post_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, host, posted, state, eps, d, AHEAD: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * d
    columns = tl.arange(0, BLOCK)
    mask = columns < d
    weights, biases = norm_weights(weight, bias, columns, mask, NORM)
    begin(PDL)
    values = normed(tl.load(x + row + columns, mask=mask, other=0.0), mask, weights, biases, eps, d, NORM)
    tl.store(out + row + columns, values, mask=mask)
    tl.store(host + row + columns, values, mask=mask)
    if AHEAD:
        release(posted, next_number(state + STATE_POSTED), NATIVE)


@triton.jit
def _request(request, state, op, layer, count, tokens, positions, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a request and release it."""
    number = next_number(state + STATE_NUMBER)
    tl.store(request + WORD_OP, op.to(tl.int64))
    tl.store(request + WORD_LAYER, layer.to(tl.int64))
    tl.store(request + WORD_COUNT, count.to(tl.int64))
    tl.store(request + WORD_TOKENS, tokens.to(tl.int64))
    tl.store(request + WORD_POSITION, tl.load(positions).to(tl.int64))
    release(request, number, NATIVE)


@triton.jit
def _list_piece(  # type: ignore[no-untyped-def]
    masks, start, stop, piece, pieces, ids, ids_masks, count, tally, COUNT: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """Compact a piece of a range; the program of the last piece knows the count of all."""
    first = start + piece * PIECE
    before = count_fired(masks, start, first, COUNT)
    end = tl.minimum(first + PIECE, stop)
    total = before + compact(masks, first, end, ids + before, ids_masks + before, PIECE, start)
    if piece == pieces - 1:
        tl.store(count, total)
        tl.store(tally, tl.load(tally) + total)


@triton.jit(do_not_specialize=["layer", "hot", "far", "f", "tokens", "pieces"])
def _send_kernel(  # type: ignore[no-untyped-def]
    masks, hot, far, f, hot_ids, hot_masks, hot_count, zero_copy_ids, zero_copy_masks, zero_copy_count,
    cold_ids, cold_masks, request, state, tallies, layer, tokens, positions, pieces,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, PIECE: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    if tl.program_id(0) == 0:
        count = compact(masks, far, f, cold_ids, cold_masks, BLOCK)
        due = (count > 0) & (tl.load(state + STATE_FAILED) == 0)
        tl.store(state + STATE_DUE, due.to(tl.int64))
        tl.store(tallies + TALLY_SENT, tl.load(tallies + TALLY_SENT) + count)
        if due:
            _request(request, state, tl.full([], OP_FFN, tl.int32), layer, count, tokens, positions, NATIVE)
    elif tl.program_id(0) <= pieces:
        piece = tl.program_id(0) - 1
        _list_piece(masks, 0, hot, piece, pieces, hot_ids, hot_masks, hot_count, tallies, COUNT, PIECE)
    else:
        piece, last = tl.program_id(0) - 1 - pieces, tl.num_programs(0) - 1 - pieces
        _list_piece(
            masks,
            hot,
            far,
            piece,
            last,
            zero_copy_ids,
            zero_copy_masks,
            zero_copy_count,
            tallies + TALLY_ZERO_COPY,
            COUNT,
            PIECE,
        )


@triton.jit(do_not_specialize=["op", "layer", "cold", "tokens", "values"])
def _ask_kernel(  # type: ignore[no-untyped-def]
    x, host, values, request, state, tallies, op, layer, cold, tokens, positions, COPY: tl.constexpr,
    BLOCK: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    begin(PDL)
    if COPY:
        for first in range(0, values, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(host + at, tl.load(x + at, mask=at < values, other=0.0), mask=at < values)
    due = tl.load(state + STATE_FAILED) == 0
    tl.store(state + STATE_DUE, due.to(tl.int64))
    tl.store(tallies + TALLY_SENT, tl.load(tallies + TALLY_SENT) + cold)
    if due:
        _request(request, state, op, layer, tl.full([], ALL_COLD, tl.int32), tokens, positions, NATIVE)


@triton.jit
def _answered(flags, state, timeout, SEVERAL: tl.constexpr, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait for the answer, if one is due; whether it came. When it does not come in time, the step has failed.

    SEVERAL: whether there are more programs than the first, which alone asks the host.
    """
    number = tl.load(state + STATE_NUMBER)
    due = tl.load(state + STATE_DUE) != 0
    begun = nanoseconds(number, NATIVE)
    now = begun
    done = number - due.to(tl.int64)
    if tl.program_id(0) == 0:
        while (done < number) & (now - begun < timeout):
            done = acquire(flags, NATIVE)
            now = nanoseconds(now, NATIVE)
        tl.store(state + STATE_WAITED, tl.load(state + STATE_WAITED) + now - begun)
        if done < number:
            tl.store(state + STATE_FAILED, number)
        if SEVERAL:
            release(state + STATE_ENDED, number, NATIVE)
    else:
        while done < number:
            done = acquire(state + STATE_ENDED, NATIVE)
        if due & (tl.load(state + STATE_FAILED, volatile=True) == number):
            done = number - 1
    tl.debug_barrier()
    return tl.where(done >= number, due.to(tl.int32), 0)


@triton.jit(do_not_specialize=["timeout"])
def _receive_kernel(  # type: ignore[no-untyped-def]
    x, parts, added, host, flags, state, weight, bias, out, eps, d, part_stride, timeout, PARTS: tl.constexpr,
    ADDED: tl.constexpr, ASKED: tl.constexpr, SEVERAL: tl.constexpr, REPLACE: tl.constexpr, NORM: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * d
    columns = tl.arange(0, BLOCK)
    mask = columns < d
    weights, biases = norm_weights(weight, bias, columns, mask, NORM)
    begin(PDL)
    values = tl.load(x + row + columns, mask=mask, other=0.0)
    if PARTS:
        values = add_parts(values, parts + row, columns, mask, part_stride, PARTS, AT_ONCE)
    if ADDED:
        values += tl.load(added + columns, mask=mask, other=0.0)
    if ASKED:
        came = _answered(flags, state, timeout, SEVERAL, NATIVE)
        answered = tl.where(mask, came, 0) != 0
        answer = tl.load(host + row + columns, mask=answered, other=0.0, volatile=True)
        values = answer if REPLACE else values + answer
    tl.store(x + row + columns, values, mask=mask)
    tl.store(out + row + columns, normed(values, mask, weights, biases, eps, d, NORM), mask=mask)


def post(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor, box: Mailbox
) -> None:
    """out [t, d] = norm(x [t, d]), RMSNorm, with a bias LayerNorm, without a weight x; the same to the host. All f32.

    One token's is numbered, so that the workers take it while the GPU still predicts which neurons they will compute.
    """
    _check(x, out, box)
    tokens, d = x.shape
    _post_kernel[(tokens,)](
        x, weight, bias, out, box.x, box.request[Word.POSTED :], box.state, eps, d,
        AHEAD=tokens == 1, NORM=norm_kind(weight, bias), NATIVE=is_native(), **row_sizes(d),
    )  # fmt: skip


def send(
    masks: torch.Tensor,
    hot: int,
    hot_ids: torch.Tensor,
    hot_masks: torch.Tensor,
    hot_count: torch.Tensor,
    spare: torch.Tensor,
    box: Mailbox,
    layer: int,
    positions: torch.Tensor,
    zero_copy: ZeroCopy | None = None,
) -> None:
    """Ask the CPU for the cold neurons of `layer` that masks [f] names; list the hot ones, below number `hot`, here.

    masks: int32 [f], bit t where token t needs the neuron. hot_ids, hot_masks [hot], hot_count int32 [1]. spare: int32
    [f] scratch. positions: int32 [t], of which the length counts here. zero_copy: cold neurons that are
    listed here as well, rather than sent. Without a neuron to send nothing is sent.
    """
    tokens = positions.shape[0]
    # For one token the host reads no masks.
    cold_masks = spare if tokens == 1 else box.masks
    listed = (hot_ids, hot_masks, hot_count) if zero_copy is None else (zero_copy.ids, zero_copy.masks, zero_copy.count)
    far = hot if zero_copy is None else zero_copy.stop
    pieces, zero_copy_pieces = (max(1, triton.cdiv(size, _PIECE)) for size in (hot, far - hot))
    _send_kernel[(1 + pieces + (0 if zero_copy is None else zero_copy_pieces),)](
        masks, hot, far, len(masks), hot_ids, hot_masks, hot_count, *listed, box.ids, cold_masks, box.request,
        box.state, box.tallies, layer, tokens, positions, pieces, BLOCK=_COMPACT_BLOCK, COUNT=_COUNT_BLOCK,
        PIECE=_PIECE, NATIVE=is_native(), **options(8),
    )  # fmt: skip


def ask(
    op: int, layer: int, x: torch.Tensor | None, box: Mailbox, positions: torch.Tensor, tokens: int, cold: int = 0
) -> None:
    """Ask the CPU for the operation `op` of `layer`; x f32 [t, d] goes along, None where the host has it already.

    cold: neurons that the answer takes, for the tally.
    """
    values = 0 if x is None else x.numel()
    _ask_kernel[(1,)](
        x, box.x, values, box.request, box.state, box.tallies, op, layer, cold, tokens, positions,
        COPY=x is not None, BLOCK=4096, NATIVE=is_native(), **options(8),
    )  # fmt: skip


def receive(
    x: torch.Tensor,
    parts: torch.Tensor | None,
    added: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    box: Mailbox,
    asked: bool,
    replace: bool = False,
) -> None:
    """x += parts [s, t, d] in order + added [d] + the CPU's answer, where one is `asked` and due; out = norm(x).

    replace: x is the answer, of a whole layer. x, out: f32 [t, d]. weight, bias: of the norm that follows.
    """
    _check(x, out, box)
    tokens, d = x.shape
    _receive_kernel[(tokens,)](
        x, parts, added, box.out, box.flags[Flag.DONE :], box.state, weight, bias, out, eps,
        d, tokens * d, int(box.timeout * 1e9), PARTS=0 if parts is None else parts.shape[0],
        ADDED=added is not None, ASKED=asked, SEVERAL=tokens > 1, REPLACE=replace, NORM=norm_kind(weight, bias),
        NATIVE=is_native(),
        **row_sizes(d, _POLLING_WARPS if asked else 16, sums=True),
    )  # fmt: skip


def _check(x: torch.Tensor, out: torch.Tensor, box: Mailbox) -> None:
    fits = x.ndim == 2 and out.shape == x.shape and x.shape[1] == box.x.shape[1] and x.shape[0] <= box.x.shape[0]
    if not fits or not x.is_contiguous() or x.dtype != torch.float32 or out.dtype != torch.float32:
        raise ValueError(
            f"the mailbox takes contiguous f32 [t, {box.x.shape[1]}], t up to {box.x.shape[0]}; got {tuple(x.shape)}"
        )


def post_ref(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out: torch.Tensor, box: Mailbox
) -> None:
    """`post` in torch."""
    residual_norm_ref(x, weight, bias, eps, out)
    box.x[: len(x)] = out
    if len(x) == 1:
        box.state[State.POSTED] += 1
        box.request[Word.POSTED] = box.state[State.POSTED]


def send_ref(
    masks: torch.Tensor,
    hot: int,
    hot_ids: torch.Tensor,
    hot_masks: torch.Tensor,
    hot_count: torch.Tensor,
    spare: torch.Tensor,
    box: Mailbox,
    layer: int,
    positions: torch.Tensor,
    zero_copy: ZeroCopy | None = None,
) -> None:
    """`send` in torch."""
    cold_masks, cold = spare if len(positions) == 1 else box.masks, torch.zeros(1, dtype=torch.int32)
    if zero_copy is not None:
        nothing = torch.zeros(len(masks), dtype=torch.int32), torch.zeros(len(masks), dtype=torch.int32)
        below = masks.clone()
        below[:hot], below[zero_copy.stop :] = 0, 0
        compact_indices_ref(
            below, zero_copy.stop, zero_copy.ids, zero_copy.masks, zero_copy.count, *nothing, torch.zeros_like(cold)
        )
        zero_copy.ids[: int(zero_copy.count[0])] -= hot
        box.tallies[Tally.ZERO_COPY] += int(zero_copy.count[0])
        masks = masks.clone()
        masks[hot : zero_copy.stop] = 0
    compact_indices_ref(masks, hot, hot_ids, hot_masks, hot_count, box.ids, cold_masks, cold)
    box.tallies[Tally.HOT] += int(hot_count[0])
    box.tallies[Tally.SENT] += int(cold[0])
    _request_ref(box, Op.FFN, layer, int(cold), positions, len(positions), due=int(cold) > 0)


def ask_ref(
    op: int, layer: int, x: torch.Tensor | None, box: Mailbox, positions: torch.Tensor, tokens: int, cold: int = 0
) -> None:
    """`ask` in torch."""
    if x is not None:
        box.x[: len(x)] = x
    box.tallies[Tally.SENT] += cold
    _request_ref(box, op, layer, ALL_COLD.value, positions, tokens, due=True)


def _request_ref(
    box: Mailbox, op: int, layer: int, count: int, positions: torch.Tensor, tokens: int, due: bool
) -> None:
    due = due and int(box.state[State.FAILED]) == 0
    box.state[State.DUE] = due
    if due:
        box.state[State.NUMBER] += 1
        box.request[Word.OP : Word.POSITION + 1] = torch.tensor([op, layer, count, tokens, int(positions[0])])
        box.request[Word.NUMBER] = box.state[State.NUMBER]


def receive_ref(
    x: torch.Tensor,
    parts: torch.Tensor | None,
    added: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    box: Mailbox,
    asked: bool,
    replace: bool = False,
) -> None:
    """`receive` in torch; the host waits."""
    answer = torch.zeros_like(x)
    if asked and int(box.state[State.DUE]) and _answered_ref(box, int(box.state[State.NUMBER])):
        answer = box.out[: len(x)].to(x)
    if asked and len(x) > 1:
        box.state[State.ENDED] = box.state[State.NUMBER]
    terms = [] if parts is None else list(parts)
    terms += [] if added is None else [added]
    for term in [*terms, answer] if asked else terms:
        x += term
    if replace:
        x.copy_(answer)
    residual_norm_ref(x, weight, bias, eps, out)


def _answered_ref(box: Mailbox, number: int) -> bool:
    end = monotonic() + box.timeout
    while box.flags[Flag.DONE] < number:
        if monotonic() > end:
            box.state[State.FAILED] = number
            return False
        sleep(1e-5)
    return True
