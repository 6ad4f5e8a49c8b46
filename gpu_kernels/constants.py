"""The numbers that kernels of both devices agree on (`cpu_kernels/contract.py`), as constants of Triton kernels."""

from __future__ import annotations

import triton.language as tl

from cpu_kernels import contract
from cpu_kernels.contract import Op, Word
from gpu_kernels.box import State, Tally

# Of rows in blocks.
BLOCK_WEIGHTS, GROUP_WEIGHTS = tl.constexpr(contract.BLOCK), tl.constexpr(contract.GROUP)
SCALE_BYTES, INT4_OFFSET = tl.constexpr(contract.SCALE_BYTES), tl.constexpr(contract.INT4_OFFSET)
# Of the mailbox.
OP_FFN, ALL_COLD = tl.constexpr(int(Op.FFN)), tl.constexpr(contract.ALL_COLD)
WORD_OP, WORD_LAYER, WORD_COUNT, WORD_TOKENS, WORD_POSITION = (
    tl.constexpr(int(word)) for word in (Word.OP, Word.LAYER, Word.COUNT, Word.TOKENS, Word.POSITION)
)
STATE_NUMBER, STATE_DUE, STATE_FAILED, STATE_POSTED, STATE_ENDED, STATE_WAITED = (
    tl.constexpr(int(word)) for word in State
)
TALLY_SENT, TALLY_ZERO_COPY = tl.constexpr(int(Tally.SENT)), tl.constexpr(int(Tally.ZERO_COPY))
